"""What a role allows: its statements, decided as AWS decides, also in front of moto's S3.

moto's own check knows no conditions, and takes every S3 file for the same resource.
"""

import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qs, unquote

import requests
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

Statements = list[dict[str, Any]]
OPERATORS: Mapping[str, Callable[[str, str], bool]] = {
    "StringEquals": lambda value, wanted: value == wanted,
    "StringLike": fnmatchcase,
}


def allows(
    statements: Statements, action: str, resource: str, known: Mapping[str, str] | None = None
) -> bool:
    """Whether one of the statements allows an action.

    Args:
        statements: of a role; none of them denies anything.
        action: such as `s3:GetObject`.
        resource: its ARN.
        known: what a condition can ask for. What is not known fulfils no condition.
    """
    for one in statements:
        assert one.keys() <= {"Effect", "Action", "Resource", "Condition"}
        assert one["Effect"] == "Allow"
        if (
            action in several(one["Action"])
            and any(fnmatchcase(resource, pattern) for pattern in several(one["Resource"]))
            and all(
                key in (known or {})
                and any(OPERATORS[operator]((known or {})[key], each) for each in several(wanted))
                for operator, keys in one.get("Condition", {}).items()
                for key, wanted in keys.items()
            )
        ):
            return True
    return False


def several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


Asked = list[tuple[str, str, dict[str, str]]]
VERBS = {"GET": "Get", "HEAD": "Get", "PUT": "Put", "POST": "Put", "DELETE": "Delete"}


def asked_of_s3(method: str, path: str, query: Mapping[str, list[str]], body: bytes) -> Asked:
    """The rights that a request to S3 takes: action, resource, what conditions can ask for."""
    bucket, _, key = unquote(path).lstrip("/").partition("/")
    there = f"arn:aws:s3:::{bucket}"
    if key:
        action = f"s3:{VERBS[method]}Object"
        if method == "DELETE" and "uploadId" in query:
            action = "s3:AbortMultipartUpload"
        return [(action, f"{there}/{key}", {})]
    if method == "POST" and "delete" in query:
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
        return [("s3:DeleteObject", f"{there}/{key}", {}) for key in keys]
    assert method in ("GET", "HEAD"), (method, path)
    prefix = {"s3:prefix": query["prefix"][0]} if "prefix" in query else {}
    return [("s3:ListBucket", there, prefix)]


def asked_of_ec2(session: Any, operation: str, params: Mapping[str, Any]) -> Asked:
    """The rights that a call of EC2 takes, as AWS documents them for each kind of resource."""
    here = f"arn:aws:ec2:{session.region_name}:{DEFAULT_ACCOUNT_ID}"
    if operation.startswith("Describe"):
        return [(f"ec2:{operation}", "*", {})]
    if operation != "RunInstances":
        asked = []
        for one in params.get("InstanceIds") or params["Resources"]:
            tags = session.resource("ec2").Instance(one).tags or ()
            known = {f"aws:ResourceTag/{tag['Key']}": tag["Value"] for tag in tags}
            asked.append((f"ec2:{operation}", f"{here}:instance/{one}", known))
        return asked
    new = f"{here}:instance/i-new"
    known = {
        f"aws:RequestTag/{tag['Key']}": tag["Value"]
        for one in params.get("TagSpecifications", ())
        for tag in one["Tags"]
    }
    used = [f"subnet/{params['SubnetId']}", f"key-pair/{params['KeyName']}", "volume/vol-new"]
    used += [f"security-group/{group}" for group in params["SecurityGroupIds"]]
    used += ["network-interface/eni-new"]
    used += ["spot-instances-request/sir-new"] if "InstanceMarketOptions" in params else []
    image = f"arn:aws:ec2:{session.region_name}::image/{params['ImageId']}"
    asked = [("ec2:RunInstances", new, known)]
    asked += [("ec2:RunInstances", one, {}) for one in [image, *(f"{here}:{x}" for x in used)]]
    if known:
        asked.append(("ec2:CreateTags", new, {**known, "ec2:CreateAction": "RunInstances"}))
    if profile := params.get("IamInstanceProfile"):
        (role,) = session.client("iam").get_instance_profile(
            InstanceProfileName=profile["Arn"].rpartition("/")[2]
        )["InstanceProfile"]["Roles"]
        to_whom = {"iam:PassedToService": "ec2.amazonaws.com"}
        asked.append(("iam:PassRole", role["Arn"], to_whom))
    return asked


class GuardedAmazon:
    """moto's Amazon over http, which asks the role of whoever signs a request to S3."""

    def __init__(self) -> None:
        self.roles: dict[str, Statements] = {}
        """The statements of a role, by the access key that a request is signed with. A key without
        a role may do everything."""
        self.refused: list[str] = []
        """What was refused."""
        self.allowed: set[tuple[str, str]] = set()
        """The access key and the right of each request to S3 that was allowed."""
        self.behind = DomainDispatcherApplication(create_backend_app)
        self.server = make_server(
            "127.0.0.1", 0, self.answer, threaded=True, request_handler=MotoRequestHandler
        )
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, environ: dict[str, Any], respond: Any) -> Any:
        signed = re.search(
            r"Credential=([^/]+)/\d+/[^/]+/s3/", environ.get("HTTP_AUTHORIZATION", "")
        )
        statements = self.roles.get(signed[1]) if signed else None
        if not signed or statements is None:
            return self.behind(environ, respond)
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        body = b""
        if method == "POST" and "delete" in query:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = io.BytesIO(body)
        for action, resource, known in asked_of_s3(method, path, query, body):
            if allows(statements, action, resource, known):
                self.allowed.add((signed[1], action))
            else:
                return self.refuse(f"{action} {resource} {known or ''}".strip(), respond)
        told: list[Any] = []
        answer = list(self.behind(environ, lambda *given: told.append(given)))
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        # Who may not list a file is not told that it is missing.
        if (
            told[0][0].startswith("404")
            and key
            and not allows(
                statements, "s3:ListBucket", f"arn:aws:s3:::{bucket}", {"s3:prefix": key}
            )
        ):
            return self.refuse(f"{method} {path}, which is missing", respond)
        respond(*told[0])
        return answer

    def refused_of(self, bucket: str) -> list[str]:
        """What was refused of a bucket: Arrow asks for one that is nowhere, and expects a no."""
        return [what for what in self.refused if bucket in what]

    def reset(self) -> None:
        """Forget all: what moto knows belongs to the process, and outlives the server."""
        requests.post(f"{self.address}/moto-api/reset", timeout=30).raise_for_status()

    def refuse(self, what: str, respond: Any) -> list[bytes]:
        self.refused.append(what)
        respond("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]


@contextmanager
def guarded_amazon() -> Iterator[GuardedAmazon]:
    """Inside, such an Amazon answers."""
    amazon = GuardedAmazon()
    thread = threading.Thread(target=amazon.server.serve_forever, daemon=True)
    thread.start()
    try:
        amazon.reset()
        yield amazon
    finally:
        amazon.reset()
        amazon.server.shutdown()
        thread.join()
