"""The metadata service of a mocked EC2: tells a machine the keys of its role, by the address it asks from.

`python -m tests.cluster.metadata EC2-URL KEY SECRET`, at 169.254.169.254. moto's own knows no machines, gives keys to
everybody, and only with a slash at the end of the path, as boto3 asks and the C++ client of pyarrow does not.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3

ADDRESS = "169.254.169.254"
ROLES = "/latest/meta-data/iam/security-credentials"


class Metadata(BaseHTTPRequestHandler):
    """Version 2 of the protocol: a token first, which is not looked at afterwards."""

    ec2: Any
    keys: tuple[str, str]

    def do_PUT(self) -> None:
        self._answer("token" if self.path == "/latest/api/token" else "")

    def do_GET(self) -> None:
        role = self._role()
        path = self.path.rstrip("/")
        if not role or not path.startswith(ROLES):
            self._answer("")
        elif path == ROLES:
            self._answer(role)
        else:
            key, secret = self.keys
            told = {"AccessKeyId": key, "SecretAccessKey": secret, "Token": role, "Expiration": "2099-01-01T00:00:00Z"}
            self._answer(json.dumps({"Code": "Success", "Type": "AWS-HMAC", **told}))

    def _role(self) -> str:
        mine = [{"Name": "private-ip-address", "Values": [self.client_address[0]]}]
        for entry in self.ec2.describe_instances(Filters=mine)["Reservations"]:
            for instance in entry["Instances"]:
                if instance["State"]["Name"] == "running" and "IamInstanceProfile" in instance:
                    return instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        return ""

    def _answer(self, text: str) -> None:
        self.send_response(200 if text else 404)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    url, key, secret = sys.argv[1:]
    Metadata.keys = (key, secret)
    Metadata.ec2 = boto3.client(
        "ec2", region_name="us-east-1", endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret
    )
    ThreadingHTTPServer((ADDRESS, 80), Metadata).serve_forever()
