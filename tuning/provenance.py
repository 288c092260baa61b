"""Where a result came from: package versions and the git commit of the code that ran."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "optuna", "hyperopt", "mlflow", "numpy", "pandas", "pyarrow", "scipy", "scikit-learn")


def versions() -> dict[str, str]:
    """Package -> version, and Python's own."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def git(folder: Path) -> dict[str, Any]:
    """{commit, dirty} of the checkout that holds `folder`; commit "" where there is none."""
    try:
        ask = ["git", "-C", str(folder)]
        commit = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"commit": "", "dirty": False}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
