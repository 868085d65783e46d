"""The rules for a cluster file on AWS, which are checked before AWS is asked for anything."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterator, Mapping

import boto3

from gptcore.files import Json, JsonObject

ClusterFile = Mapping[str, Json]
"""A cluster file, as YAML gives it."""

TOKEN = "~/.ray/auth_token"
ENVIRONMENT = "sweeps/clusters/environment"
WIDEST = 16
"""The shortest prefix of a network that may log in: 65,536 addresses."""
SECRET = re.compile(
    r"(AKIA|ASIA)[0-9A-Z]{16}|PRIVATE KEY|(secret\w*|password|token)['\"]?\s*[:=]\s*['\"]?[\w+]",
    re.I,
)
KEPT_HOME = (".env*", ".netrc", ".aws", ".ssh", "*.pem", "*.key", "id_*", ".git/config")
"""Names of files with secrets, as rsync takes them."""
METADATA = {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
DASHBOARD = "--dashboard-host=127.0.0.1"
S3_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def wrong_with(cluster: ClusterFile) -> Iterator[str]:
    """Yield one sentence for each rule that a cluster file breaks."""
    for place, text in _texts(cluster):
        if placeholder := re.search("<[a-z-]+>", text):
            yield f"{place} still has {placeholder[0]}: replace it by your own value"
        if SECRET.search(f"{place}: {text}"):
            yield f"{place} looks like a secret: the file takes none, AWS keys stay in ~/.aws"
    provider = cluster["provider"]
    region, bucket, ssh_from = (provider.get(key) for key in ("region", "bucket", "ssh_from"))
    if region not in _regions():
        yield f"provider.region takes a region of AWS such as us-west-2, not {region!r}"
    if not S3_BUCKET.fullmatch(str(bucket)):
        yield f"provider.bucket takes the name of an S3 bucket, not {bucket!r}"
    try:
        network = ipaddress.IPv4Network(str(ssh_from), strict=False)
        if network.prefixlen < WIDEST:
            yield (
                f"provider.ssh_from {network} lets {network.num_addresses:,} addresses try to log "
                f"in: take a network with a prefix of /{WIDEST} or longer"
            )
    except ValueError:
        yield f"provider.ssh_from takes a CIDR such as 203.0.113.7/32, not {ssh_from!r}"
    for name, kind in workers(cluster):
        least, most = kind.get("min_workers", 0), kind.get("max_workers", cluster["max_workers"])
        if least != 0 or not all(
            isinstance(limit, int) and limit >= 1 for limit in (most, cluster["max_workers"])
        ):
            yield (
                f"{name} takes min_workers 0, so that no machine costs money between sweeps, and "
                f"max_workers of 1 or more, not {least} and {most}"
            )
    for name, kind in cluster["available_node_types"].items():
        node = kind.get("node_config") or {}
        if not METADATA.items() <= (node.get("MetadataOptions") or {}).items():
            asked = ", ".join(f"{key}: {value}" for key, value in METADATA.items())
            yield (
                f"{name} takes MetadataOptions: {{{asked}}}, so that no web request that a "
                "program is tricked into gets the machine's rights"
            )
        disks = [disk["Ebs"] for disk in node.get("BlockDeviceMappings") or () if "Ebs" in disk]
        if not disks or any(disk.get("Encrypted") is not True for disk in disks):
            yield f"{name} takes BlockDeviceMappings, with Encrypted: true for each disk"
    if missing := [one for one in KEPT_HOME if one not in (cluster.get("rsync_exclude") or ())]:
        yield (
            f"rsync_exclude takes {', '.join(missing)}: such files hold secrets, and stay on this "
            "machine"
        )
    if TOKEN not in cluster.get("file_mounts", {}):
        yield f"file_mounts takes {TOKEN}: {TOKEN}, by which Ray and MLflow know their users"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in cluster.get(commands, ()):
            if "ray start" in command and (
                ENVIRONMENT not in command or "RAY_AUTH_MODE" in command
            ):
                yield (
                    f"{commands} takes `ray start` only after `. {ENVIRONMENT}`, without which Ray "
                    "is open to everyone"
                )
            is_open = re.search(r"--dashboard-host[= ](?!127\.0\.0\.1\b)", command)
            is_head = "ray start" in command and "--head" in command
            if is_open or (is_head and DASHBOARD not in command):
                yield f"{commands} takes {DASHBOARD}, as `ray dashboard` expects"


@functools.cache
def _regions() -> list[str]:
    return list(boto3.Session().get_available_regions("ec2"))


def _texts(value: Json, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text and number of a YAML value, with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, place)
    else:
        yield place, str(value)


def workers(cluster: ClusterFile) -> Iterator[tuple[str, JsonObject]]:
    """Yield the kinds of machines that trials run on, by name."""
    for name, kind in cluster["available_node_types"].items():
        if name != cluster["head_node_type"]:
            yield name, kind
