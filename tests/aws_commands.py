"""What AWS's command line would call, without having it: `aws SERVICE OPERATION --flag value ...`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import botocore.session
from botocore import xform_name
from botocore.model import OperationModel


def call_of(words: Sequence[str]) -> tuple[str, str, dict[str, Any]]:
    """Service, boto3 method and arguments of a command; fails where AWS knows no such operation or flag."""
    aws, service, operation, *flags = words
    assert aws == "aws"
    assert len(flags) % 2 == 0, "a flag without a value"
    service = {"s3api": "s3"}.get(service, service)
    model = botocore.session.get_session().get_service_model(service)
    (name,) = [name for name in model.operation_names if xform_name(name, "-") == operation]
    members = members_of(model.operation_model(name))
    arguments = {members[flag.removeprefix("--")]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    for argument, value in arguments.items():
        if argument.endswith("Document"):
            json.loads(value)
    return service, xform_name(name), arguments


def members_of(operation: OperationModel) -> dict[str, str]:
    """Flag -> argument."""
    assert operation.input_shape is not None
    return {xform_name(member, "-"): member for member in operation.input_shape.members}
