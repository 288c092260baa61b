"""A sweep tracked by a real `mlflow server`: PostgreSQL behind it, artifacts in S3, access control on."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import URL, make_url

from tests.objects import BUCKET, ObjectStorage, environment, object_storage
from tests.postgres import MlflowServer, missing, postgres
from tests.test_sweeps import assert_consistent
from tests.test_tracking import contents, tree_of
from tests.toy_sweeps import ROOT, UNDISTURBED, Process

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(bool(missing()), reason=missing())]
AUTH = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Tracking:
    """The server, and who may use it."""

    uri: str
    objects: ObjectStorage
    login: dict[str, str]
    secrets: tuple[str, ...]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory) -> Iterator[Tracking]:
    folder = tmp_path_factory.mktemp("tracking")
    password, key = secrets.token_hex(12), secrets.token_hex(12)
    with object_storage(folder) as objects, postgres() as database:
        config = folder / "auth.ini"
        url = make_url(database.uri())
        store = URL.create(url.drivername, url.username, None, url.host, url.port, url.database).render_as_string()
        config.write_text(AUTH.format(database=store))
        settings = {
            **objects.environment,
            "PGPASSWORD": str(url.password),
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": key,
        }
        arguments = ("--app-name", "basic-auth", "--artifacts-destination", f"s3://{BUCKET}/mlflow")
        with MlflowServer(store, folder, *arguments, env=settings) as server:
            login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
            yield Tracking(
                server.uri,
                objects,
                login,
                (password, key, str(url.password), objects.environment["AWS_SECRET_ACCESS_KEY"]),
            )


def test_nobody_enters_without_a_password(tracking):
    with environment(dict.fromkeys(tracking.login, "wrong")), pytest.raises(MlflowException):
        MlflowClient(tracking.uri).search_experiments()


def test_a_sweep_through_it(tracking, tmp_path, undisturbed):
    """The driver knows neither PostgreSQL's nor S3's keys: the server brings artifacts there."""
    swept = Process(tmp_path, "whole", *UNDISTURBED, "--tracking-uri", tracking.uri, environment=tracking.login).wait()
    assert swept.code == 0, swept.err
    assert_consistent(swept)
    with environment(tracking.login):
        tree = tree_of(tracking.uri)
        assert {kind: len(runs) for kind, runs in tree.items()} == {"sweep": 1, "config": 6, "run": 12}
        (top,) = tree["sweep"]
        client = MlflowClient(tracking.uri)
        names = {item.path for item in client.list_artifacts(top.info.run_id)}
        assert {"sweep.json", "runs.parquet", "epochs", "steps", "report"} <= names
        stored = [name for name in tracking.objects.names("mlflow/") if top.info.run_id in name]
        assert any(name.endswith("/report/index.html") for name in stored)
        page = client.download_artifacts(top.info.run_id, "report/index.html", str(tmp_path))
        assert Path(page).read_bytes() == (swept.folder / "report" / "index.html").read_bytes()
        metrics = [sorted(run[3]) for run in contents(tracking.uri).values()]
    local = [sorted(run[3]) for run in contents(f"sqlite:///{undisturbed.folder.parent / 'mlflow.db'}").values()]
    assert sorted(metrics) == sorted(local)
    assert_no_secret(swept.folder, tracking)
    for name in tracking.objects.names():
        assert not [secret for secret in tracking.secrets if secret.encode() in tracking.objects.read(name)], name


def test_a_password_that_is_not_taken_costs_a_delay(tracking, tmp_path):
    wrong = {**tracking.login, "MLFLOW_TRACKING_PASSWORD": "not-the-one"}
    swept = Process(tmp_path, "late", *UNDISTURBED, "--tracking-uri", tracking.uri, environment=wrong).wait()
    assert swept.code == 0, swept.err
    assert "MLflow is away" in swept.log
    assert "not-the-one" not in swept.log
    command = [sys.executable, "-m", "tuning.sync", "late", "--storage", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **tracking.login}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "delivered" in done.stdout
    assert_no_secret(swept.folder, tracking)


def assert_no_secret(folder: Path, tracking: Tracking) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not [secret for secret in tracking.secrets if secret.encode() in path.read_bytes()], path
