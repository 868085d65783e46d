"""A provider of machines on AWS for `ray up`: checks the cluster's file, then uses Ray's own.

An error in the file is reported in one sentence before a machine starts. A security group, rights
and a key are made here. Ray's own security group lets the whole world try to log in, its head may
do everything with every machine and bucket of the account, and its workers have no rights at all.
sweeps/clusters/aws_remove.py removes what is made here.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ipaddress
import json
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND

from gptcore.config import InputError
from gptcore.files import JsonObject, is_trusted
from sweeps.clusters.aws_rights import check_ours, make_roles, tags_of
from sweeps.clusters.aws_rules import ENVIRONMENT, TOKEN, ClusterFile, workers, wrong_with
from sweeps.execution.private_api import aws_node_provider, ssh_folder
from sweeps.execution.ray_token import close_to_others
from tracking.arguments import print_error

AWSNodeProvider: Any = aws_node_provider()

ENDING = sys.argv[1:2] == ["down"]
"""Whether this is `ray down`: machines that cost money are ended whatever else is wrong."""
LATEST = "resolve:ssm:"
"""How AWS spells the latest image of a kind: by the parameter that names it."""


class Provider(AWSNodeProvider):
    """The provider that `ray up` uses; the cluster's machines get Ray's own provider."""

    @staticmethod
    def fillout_available_node_types_resources(cluster_config: JsonObject) -> JsonObject:
        """Add the cores, memory and GPUs of each machine to the file: Ray calls this first.

        Ends `ray up` with exit code 2 where a rule is broken.
        """
        with _one_sentence():
            for sentence in () if ENDING else wrong_with(cluster_config):
                raise InputError(sentence)
            for name, kind in workers(cluster_config):
                instance = str(kind.get("node_config", {}).get("InstanceType"))
                check_gpu(cluster_config["provider"]["region"], name, instance)
            return dict(AWSNodeProvider.fillout_available_node_types_resources(cluster_config))

    @staticmethod
    def bootstrap_config(cluster_config: JsonObject) -> JsonObject:
        """Make what the cluster needs on AWS, and add it to the file.

        Ends `ray up` with exit code 2 where AWS refuses.
        """
        with _one_sentence():
            return bootstrap(cluster_config)


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Inside, errors end the command with one sentence; Ray would warn or show a traceback."""
    try:
        yield
    except (ValueError, BotoCoreError, ClientError) as error:
        print_error(error)
        raise SystemExit(2) from error


def bootstrap(cluster_config: ClusterFile) -> JsonObject:
    """Return a file for Ray's own provider, with what is made here.

    Raises:
        InputError: AWS refuses; also boto3's own errors.
    """
    config = copy.deepcopy(dict(cluster_config))
    cluster, provider = config["cluster_name"], config["provider"]
    del provider["module"]
    provider["type"] = "aws"
    forget_cached(cluster)
    if ENDING:
        return ended(config)
    for folder in config["file_mounts"].values():
        if folder == "." and not Path(ENVIRONMENT).is_file():
            raise InputError(
                "file_mounts has the folder in which `ray up` is called: "
                f"{Path.cwd()} is not a checkout of this project"
            )
    region, bucket = provider["region"], provider["bucket"]
    check_bucket(region, bucket)
    group = security_group(region, cluster, provider["ssh_from"])
    head, profile = make_roles(region, cluster, bucket, group)
    kinds = config["available_node_types"]
    for kind in kinds.values():
        node = kind["node_config"]
        node["SecurityGroupIds"] = [group]
        if node["ImageId"].startswith(LATEST):
            node["ImageId"] = image(region, cluster, node["ImageId"].removeprefix(LATEST))
    for _, kind in workers(config):
        kind["node_config"]["IamInstanceProfile"] = {"Arn": profile}
    # A role that the file gives the head itself is for its author to limit.
    of_head = kinds[config["head_node_type"]]["node_config"]
    of_head.setdefault("IamInstanceProfile", {"Arn": head})
    make_token()
    check_ssh_folder()
    # Ray's own key would be for all clusters of the region.
    own_key = "ssh_private_key" not in config["auth"] and "key_pair" not in provider
    if own_key:
        provider["key_pair"] = {"key_name": f"{cluster}-{region}"}
    known = keys(region)
    resolved = dict(AWSNodeProvider.bootstrap_config(config))
    kind = resolved["available_node_types"][resolved["head_node_type"]]["node_config"]
    # For the head alone: another machine of the same kind would have its rights too.
    resolved["head_node"]["IamInstanceProfile"] = kind.pop("IamInstanceProfile")
    if own_key:
        mark_key(region, cluster, kind["KeyName"], known)
    return resolved


def ended(config: JsonObject) -> JsonObject:
    """Return a file with which Ray finds and ends machines. Nothing is made for that."""
    for head in heads(config["provider"]["region"], config["cluster_name"]):
        key = Path("~/.ssh").expanduser() / f"{head.key_name}.pem"
        config["auth"].setdefault("ssh_private_key", str(key))
    # Ray keeps this file too, and would start a cluster with it the next time.
    atexit.register(forget_cached, config["cluster_name"])
    return config


def check_gpu(region: str, name: str, instance: str) -> None:
    """Raise InputError unless a machine has GPUs that torch can use."""
    ec2 = boto3.client("ec2", region)
    (found,) = ec2.describe_instance_types(InstanceTypes=[instance])["InstanceTypes"]
    makers = {gpu["Manufacturer"] for gpu in found.get("GpuInfo", {}).get("Gpus", ())}
    if makers != {"NVIDIA"} or "x86_64" not in found["ProcessorInfo"]["SupportedArchitectures"]:
        raise InputError(
            f"{name} takes an x86-64 machine with an NVIDIA GPU, such as g5.xlarge, not {instance}"
        )


def check_bucket(region: str, bucket: str) -> None:
    """Raise InputError unless this account can use the bucket, in that region."""
    try:
        found = boto3.client("s3", region).head_bucket(Bucket=bucket).get("BucketRegion", region)
    except ClientError as error:
        raise InputError(
            f"the bucket {bucket} cannot be used ({error.response['Error'].get('Message')}): "
            f"`aws s3 mb s3://{bucket} --region {region}` makes one"
        ) from error
    if found != region:
        raise InputError(f"the bucket {bucket} is in {found}: take one in {region}")


def image(region: str, cluster: str, parameter: str) -> str:
    """Return the id of the image that the cluster's head runs, or else of the latest image.

    Ray ends a head whose image differs from the file's, and with it what is recorded there.
    """
    for head in heads(region, cluster):
        return str(head.image_id)
    return str(boto3.client("ssm", region).get_parameter(Name=parameter)["Parameter"]["Value"])


def heads(region: str, cluster: str) -> Iterator[Any]:
    """Yield the cluster's head, if it runs."""
    filters = {
        f"tag:{TAG_RAY_CLUSTER_NAME}": cluster,
        f"tag:{TAG_RAY_NODE_KIND}": NODE_KIND_HEAD,
        "instance-state-name": "running",
    }
    yield from boto3.resource("ec2", region).instances.filter(
        Filters=[{"Name": name, "Values": [value]} for name, value in filters.items()]
    )


def security_group(region: str, cluster: str, ssh_from: str) -> str:
    """Make or correct the cluster's security group in the default VPC. Return its id.

    The machines reach each other, one network may connect by ssh, and nothing else is open.
    """
    ec2 = boto3.resource("ec2", region)
    vpcs = list(ec2.vpcs.filter(Filters=[{"Name": "is-default", "Values": ["true"]}]))
    if not vpcs:
        raise InputError(
            f"{region} has no default VPC: `aws ec2 create-default-vpc --region {region}` makes one"
        )
    name = f"{cluster}-nodes"
    found = vpcs[0].security_groups.filter(Filters=[{"Name": "group-name", "Values": [name]}])
    for group in found:
        check_ours("security group", name, group.tags, cluster)
    group = next(iter(found), None) or ec2.create_security_group(
        GroupName=name,
        Description=f"Ray cluster {cluster}",
        VpcId=vpcs[0].id,
        TagSpecifications=[{"ResourceType": "security-group", "Tags": tags_of(cluster)}],
    )
    if group.ip_permissions:
        group.revoke_ingress(IpPermissions=group.ip_permissions)
    network = str(ipaddress.IPv4Network(ssh_from, strict=False))
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": network}]}
    among_themselves = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}
    group.authorize_ingress(IpPermissions=[among_themselves, ssh])
    return str(group.id)


def keys(region: str) -> dict[str, JsonObject]:
    """Return the ssh keys that AWS knows, by name."""
    known = boto3.client("ec2", region).describe_key_pairs()["KeyPairs"]
    return {key["KeyName"]: dict(key) for key in known}


def mark_key(region: str, cluster: str, name: str, known: Mapping[str, JsonObject]) -> None:
    """Tag the key that Ray has made, so that it can be told from others.

    Raises:
        InputError: it was there before, and somebody else made it.
    """
    if name in known:
        check_ours("key pair", name, known[name].get("Tags"), cluster)
        return
    made = keys(region)[name]
    boto3.client("ec2", region).create_tags(Resources=[made["KeyPairId"]], Tags=tags_of(cluster))


def make_token() -> None:
    """Make the token that Ray's processes show each other, unless this machine has one."""
    file = Path(TOKEN).expanduser()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32))
    close_to_others(file)


def check_ssh_folder() -> None:
    """Raise InputError where another account could pose as the cluster to Ray's ssh."""
    folder = ssh_folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or not is_trusted(folder):
        raise InputError(
            f"Ray keeps its ssh connections in {folder}, which another account has made or can "
            "write: remove it, or have it removed"
        )


def forget_cached(cluster: str) -> None:
    """Delete Ray's cached results of earlier files for this cluster.

    Ray does not process a file that it has seen before: undoing an edit would have no effect.
    """
    for file in Path(tempfile.gettempdir()).glob("ray-config-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(file.read_text())["config"]["cluster_name"] == cluster:
                file.unlink()
