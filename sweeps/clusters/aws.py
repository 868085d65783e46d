"""A provider of machines on AWS for `ray up`: checks the cluster's file, then uses Ray's own.

An error in the file is reported in one sentence before a machine starts. A security group and
rights are made here, because Ray's own security group lets the whole world try to log in, and its
workers have no rights to any bucket.
"""

from __future__ import annotations

import contextlib
import copy
import ipaddress
import json
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND

from gptcore.config import InputError
from gptcore.files import JsonObject, is_trusted
from sweeps.clusters.aws_rules import ENVIRONMENT, TOKEN, ClusterFile, workers, wrong_with
from sweeps.execution.private_api import aws_node_provider, ssh_folder
from sweeps.execution.ray_token import close_to_others

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
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def bootstrap(cluster_config: ClusterFile) -> JsonObject:
    """Return a file for Ray's own provider, with the security group, rights and image made here.

    Raises:
        InputError: AWS refuses; also boto3's own errors.
    """
    config = copy.deepcopy(dict(cluster_config))
    cluster, provider = config["cluster_name"], config["provider"]
    for folder in config["file_mounts"].values():
        if folder == "." and not ENDING and not Path(ENVIRONMENT).is_file():
            raise InputError(
                "file_mounts has the folder in which `ray up` is called: "
                f"{Path.cwd()} is not a checkout of this project"
            )
    region, bucket = provider["region"], provider["bucket"]
    if not ENDING:
        check_bucket(region, bucket)
    group = security_group(region, cluster, provider["ssh_from"])
    profile, role = rights_to(region, cluster, bucket)
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        node["SecurityGroupIds"] = [group]
        if node["ImageId"].startswith(LATEST):
            node["ImageId"] = image(region, cluster, node["ImageId"].removeprefix(LATEST))
    for _, kind in workers(config):
        kind["node_config"]["IamInstanceProfile"] = {"Arn": profile}
    make_token()
    check_ssh_folder()
    forget_cached(cluster)
    del provider["module"]
    provider["type"] = "aws"
    resolved = dict(AWSNodeProvider.bootstrap_config(config))
    # A role that the file gives the head itself is for its author to extend.
    if rays := resolved["head_node"].get("IamInstanceProfile"):
        let_start(region, rays["Arn"], role)
    return resolved


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
    filters = {
        f"tag:{TAG_RAY_CLUSTER_NAME}": cluster,
        f"tag:{TAG_RAY_NODE_KIND}": NODE_KIND_HEAD,
        "instance-state-name": "running",
    }
    heads = boto3.resource("ec2", region).instances.filter(
        Filters=[{"Name": name, "Values": [value]} for name, value in filters.items()]
    )
    for head in heads:
        return str(head.image_id)
    return str(boto3.client("ssm", region).get_parameter(Name=parameter)["Parameter"]["Value"])


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
    group = next(iter(found), None) or ec2.create_security_group(
        GroupName=name, Description=f"Ray cluster {cluster}", VpcId=vpcs[0].id
    )
    if group.ip_permissions:
        group.revoke_ingress(IpPermissions=group.ip_permissions)
    network = str(ipaddress.IPv4Network(ssh_from, strict=False))
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": network}]}
    among_themselves = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}
    group.authorize_ingress(IpPermissions=[among_themselves, ssh])
    return str(group.id)


def rights_to(region: str, cluster: str, bucket: str) -> tuple[str, str]:
    """Make or correct an instance profile and its role, with rights to one bucket.

    Returns:
        The ARNs of the profile and of the role.
    """
    iam = boto3.client("iam", region)
    # Roles belong to no region, and every region may have a cluster of this name.
    name = f"{cluster}-{region}-workers"
    exists = contextlib.suppress(iam.exceptions.EntityAlreadyExistsException)
    machines = {"Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    with exists:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=_policy(machines))
    there = f"arn:aws:s3:::{bucket}"
    verbs = ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")
    policy = _policy(
        {"Action": "s3:ListBucket", "Resource": there},
        {"Action": [f"s3:{verb}" for verb in verbs], "Resource": f"{there}/*"},
    )
    iam.put_role_policy(RoleName=name, PolicyName="bucket", PolicyDocument=policy)
    with exists:
        iam.create_instance_profile(InstanceProfileName=name)
    profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    if not profile["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return profile["Arn"], iam.get_role(RoleName=name)["Role"]["Arn"]


def let_start(region: str, head_profile: str, role: str) -> None:
    """Let the head, whose role is Ray's, start machines with another role.

    AWS asks for a right of its own for that.
    """
    iam = boto3.client("iam", region)
    name = head_profile.rpartition("/")[2]
    (head,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
    iam.put_role_policy(
        RoleName=head["RoleName"],
        PolicyName=role.rpartition("/")[2],
        PolicyDocument=_policy({"Action": "iam:PassRole", "Resource": role}),
    )


def _policy(*allowed: JsonObject) -> str:
    statements = [{"Effect": "Allow", **statement} for statement in allowed]
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


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
