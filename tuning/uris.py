"""Where MLflow's runs go: is a tracking URI one that MLflow can keep runs in? Asked before anything is written."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from trainables.family import BadValue
from tuning.secrets import redact

DRIVERS = {"postgresql": "psycopg2", "mysql": "mysqldb", "mssql": "pyodbc"}
"""Database -> the driver that SQLAlchemy takes for it unless the URI names another."""
PACKAGES = {"psycopg2": ("psycopg2-binary", "psycopg2"), "mysqldb": ("mysqlclient",)}
"""Driver -> the packages that bring it, where they have another name."""
KNOWN = "http://HOST:PORT, sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE or databricks"


def check_uri(uri: str, storage: Path | None, what: str = "") -> None:
    """`BadValue` where `uri` cannot be one of MLflow's, or needs what this machine lacks. Asks no server: one that is
    away costs a delay and no more.

    Args:
        uri: as given by the user.
        storage: the folder of sweeps, which need not be there yet. None: only the form is looked at, not whether the
            file's folder exists (a sweep whose storage was moved may go on; its points wait).
        what: how the message calls it.
    """
    what = what or f"--tracking-uri {redact(uri)!r}"
    if not uri.isprintable() or " " in uri:
        raise BadValue(f"{what} has blanks in it; it should look like {KNOWN}")
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018  # raises for what is no port
    except ValueError as error:
        raise BadValue(f"{what} is no address ({error}); it should look like {KNOWN}") from None
    scheme, _, driver = parts.scheme.partition("+")
    if scheme in ("http", "https"):
        if not uri.startswith(f"{scheme}://") or not parts.hostname:
            raise BadValue(f"{what} names no host; it should look like {scheme}://HOST:PORT")
    elif scheme == "sqlite":
        _check_sqlite(what, uri, storage)
    elif scheme in DRIVERS:
        _check_database(what, parts, driver or DRIVERS[scheme])
    elif uri != "databricks" and scheme not in _other_schemes():
        folder = " (it keeps no runs in folders any more)" if scheme in ("", "file") else ""
        raise BadValue(f"{what} is nothing MLflow can keep runs in{folder}; it should look like {KNOWN}")


def _check_sqlite(what: str, uri: str, storage: Path | None) -> None:
    path = sqlite_path(uri)
    if not path:
        raise BadValue(f"{what} names no file; it should look like sqlite:///FILE, or sqlite:////FILE from the root")
    file = Path(path)
    try:
        if file.is_dir():
            raise BadValue(f"{what} is a folder; it should name a file in it")
        if storage and not file.parent.is_dir() and file.resolve().parent != storage:
            raise BadValue(f"{what}: the folder {file.parent} does not exist")
    except OSError as error:
        raise BadValue(f"{what} cannot be a file: {error.strerror}") from None


def sqlite_path(uri: str) -> str:
    """What an SQLite URI names as its file; "" where it names none."""
    return uri.partition(":///")[2].partition("?")[0]


def _check_database(what: str, parts: SplitResult, driver: str) -> None:
    if not parts.netloc and "host=" not in parts.query:
        raise BadValue(f"{what} names no host; it should look like {parts.scheme}://USER:PASSWORD@HOST/DATABASE")
    if not parts.path.strip("/"):
        raise BadValue(f"{what} names no database; it should look like {parts.scheme}://USER:PASSWORD@HOST/DATABASE")
    packages = PACKAGES.get(driver, (driver,))
    if not any(map(_installed, packages)):
        advice = "'lanewise[postgres]'" if driver == "psycopg2" else packages[0]
        raise BadValue(f"{what} needs {packages[0]}, which is not installed: pip install {advice}")


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except (PackageNotFoundError, ValueError):
        return False
    return True


def _other_schemes() -> set[str]:
    """Databricks', and those of MLflow plug-ins that are installed."""
    return {"databricks", *(entry.name for entry in entry_points(group="mlflow.tracking_store"))}
