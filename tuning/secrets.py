"""Nothing secret is written down: passwords, tokens and keys are taken out of what is recorded, logged and shown.

A tracking URI may hold a password that the sweep needs again when it resumes. It is kept in `secrets.json` in the
sweep's folder, readable by its owner alone, and nowhere else: sweep.json, MLflow and the report hold `***`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN = "***"
FILE = "secrets.json"
_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|secret|(?:auth|access|bearer|api)[_-]?token|credential|api[_-]?key|access[_-]?key|"
    r"private[_-]?key)[\w.-]*|[\w.-]*\btoken|[\w.-]*_token"
)
_PATTERNS = (
    # user:password@host, or a token in the place of the user
    (re.compile(r"(?P<keep>[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s/@:]*:)?)[^\s/]+(?=@)"), r"\g<keep>" + HIDDEN),
    # name=value, name: value, "name": "value", --name value
    (re.compile(rf"(?i)(?P<keep>\b(?:{_NAME})[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"), r"\g<keep>" + HIDDEN),
    (re.compile(rf"(?i)(?P<keep>--?(?:{_NAME})\s+)(?!-)[^\s\"']+"), r"\g<keep>" + HIDDEN),
    # signatures in a URL's query, authorisation headers
    (
        re.compile(r"(?i)(?P<keep>[?&](?:sig|signature|x-amz-signature|x-amz-credential|key)=)[^\s&]+"),
        r"\g<keep>" + HIDDEN,
    ),
    (re.compile(r"(?i)(?P<keep>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}"), r"\g<keep>" + HIDDEN),
    # what tells itself by its form: AWS, GitHub, GitLab, Hugging Face, Databricks, Slack, OpenAI-like, Google, JWT
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|hf_|dapi|xox[abpr]-|sk-|AIza)[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), HIDDEN),
)
_FLAG = re.compile(rf"(?i)--?(?:{_NAME})")


def redact(text: str) -> str:
    """The text with every secret in it replaced by `***`."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_command(words: Sequence[str]) -> list[str]:
    """A command line without its secrets; also a secret that is a word of its own, behind its flag."""
    shown, after_flag = [], False
    for word in words:
        shown.append(HIDDEN if after_flag and not word.startswith("-") else redact(word))
        after_flag = bool(_FLAG.fullmatch(word))
    return shown


class RedactingFormatter(logging.Formatter):
    """Messages and tracebacks without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def keep_uri(folder: Path, uri: str) -> None:
    """Keep a tracking URI that holds a secret where only this user can read it; one without needs no such place."""
    if redact(uri) == uri:
        return
    handle = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w") as file:
        json.dump({"tracking_uri": uri}, file)
        file.flush()
        os.fsync(file.fileno())


def tracking_uri(folder: Path, plain: Mapping[str, Any]) -> str:
    """The tracking URI of the sweep in `folder`, whole; `plain` is its sweep.json. It is empty there for sweeps in
    object storage that named none: each machine then has a database of its own beside its copy of them."""
    if not plain["tracking_uri"]:
        return f"sqlite:///{folder.parent.resolve() / 'mlflow.db'}"
    path = folder / FILE
    if HIDDEN in plain["tracking_uri"] and path.is_file():
        return str(json.loads(path.read_text())["tracking_uri"])
    return str(plain["tracking_uri"])
