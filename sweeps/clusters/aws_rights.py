"""What the machines of a cluster may do on AWS: a role for the head, and one for workers.

A worker reads and writes checkpoints. The head uses all of the cluster's folder in the bucket, and
starts, names and ends the cluster's own machines.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import boto3
from botocore.client import BaseClient
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

from gptcore.config import InputError
from gptcore.files import JsonObject
from tracking.bucket import CHECKPOINTS, FOLDER

OURS = {"Key": "made-by", "Value": "gpt-sweeps"}
"""The tag of everything that is made here. Nothing without it is changed or removed."""
SECONDS_TO_SPREAD = 15.0
"""EC2 knows a new role a while after IAM has made it; Ray waits as long for its own."""

FILES = [f"s3:{verb}Object" for verb in ("Get", "Put", "Delete")] + ["s3:AbortMultipartUpload"]
STARTED_WITH = (
    "volume", "network-interface", "subnet", "key-pair", "snapshot", "spot-instances-request",
    "placement-group", "launch-template", "capacity-reservation",
)  # fmt: skip
"""What EC2 asks rights for when a machine starts, besides machine, image and security group."""


def tags_of(cluster: str) -> list[dict[str, str]]:
    """Return the tags of everything that is made for a cluster."""
    return [OURS, {"Key": TAG_RAY_CLUSTER_NAME, "Value": cluster}]


def check_ours(kind: str, name: str, tags: Sequence[JsonObject] | None, cluster: str) -> None:
    """Raise InputError unless something with these tags was made for the cluster."""
    if not is_ours(tags, cluster):
        raise InputError(
            f"the {kind} {name} was not made by `ray up` for this cluster (it lacks the tag "
            f"{OURS['Key']}={OURS['Value']}): delete it, or change cluster_name"
        )


def is_ours(tags: Sequence[JsonObject] | None, cluster: str) -> bool:
    """Return whether these are the tags of something that was made for the cluster."""
    return all(tag in (tags or ()) for tag in tags_of(cluster))


def role_name(region: str, cluster: str, whose: str) -> str:
    """Return the name of a role and of its profile: roles belong to no region, clusters do."""
    return f"{cluster}-{region}-{whose}"


def worker_rights(bucket: str) -> list[JsonObject]:
    """Return the statements of the workers' role."""
    there = f"arn:aws:s3:::{bucket}"
    inside = f"{FOLDER}/{CHECKPOINTS}/*"
    return [
        # Without this, S3 does not say that a file is missing, but that it is forbidden.
        {
            "Action": "s3:ListBucket",
            "Resource": there,
            "Condition": {"StringLike": {"s3:prefix": inside}},
        },
        {"Action": FILES, "Resource": f"{there}/{inside}"},
    ]


def head_rights(
    region: str, cluster: str, bucket: str, group: str, worker_role: str
) -> list[JsonObject]:
    """Return the statements of the head's role.

    Args:
        region: the region of the cluster.
        cluster: its name, which is a tag of each of its machines.
        bucket: the bucket of the cluster.
        group: the id of its security group.
        worker_role: the ARN of the workers' role.
    """
    account = worker_role.split(":")[4]
    there, ec2 = f"arn:aws:s3:::{bucket}", f"arn:aws:ec2:{region}:{account}"
    machines = f"{ec2}:instance/*"
    spot = f"arn:aws:iam::{account}:role/aws-service-role/spot.amazonaws.com/*"

    def named(key: str) -> JsonObject:
        return {"StringEquals": {f"{key}/{TAG_RAY_CLUSTER_NAME}": cluster}}

    return [
        # For the whole bucket: Tune asks first whether there is such a bucket.
        {"Action": "s3:ListBucket", "Resource": there},
        {"Action": FILES, "Resource": f"{there}/{FOLDER}/*"},
        {"Action": "ec2:DescribeInstances", "Resource": "*"},
        {
            "Action": "ec2:RunInstances",
            "Resource": machines,
            "Condition": named("aws:RequestTag"),
        },
        {
            "Action": "ec2:RunInstances",
            "Resource": [
                f"{ec2}:security-group/{group}",
                f"arn:aws:ec2:{region}::image/*",
                f"{ec2}:image/*",
                *(f"{ec2}:{kind}/*" for kind in STARTED_WITH),
            ],
        },
        {
            "Action": "ec2:CreateTags",
            "Resource": f"{ec2}:*/*",
            "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
        },
        {
            "Action": [
                "ec2:CreateTags",
                "ec2:TerminateInstances",
                "ec2:StopInstances",
                "ec2:StartInstances",
            ],
            "Resource": machines,
            "Condition": named("aws:ResourceTag"),
        },
        {
            "Action": "iam:PassRole",
            "Resource": worker_role,
            "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        },
        # The first spot machine of an account makes AWS's own role for them.
        {
            "Action": "iam:CreateServiceLinkedRole",
            "Resource": spot,
            "Condition": {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}},
        },
    ]


def make_roles(region: str, cluster: str, bucket: str, group: str) -> tuple[str, str]:
    """Make or correct the roles of the machines.

    Returns:
        The ARNs of the instance profiles of the head and of the workers.

    Raises:
        InputError: somebody else made a role or a profile of such a name.
    """
    iam = boto3.client("iam", region)
    made = {whose: make_role(iam, region, cluster, whose) for whose in ("head", "workers")}
    rights = {
        "head": head_rights(region, cluster, bucket, group, made["workers"].role),
        "workers": worker_rights(bucket),
    }
    for whose, statements in rights.items():
        iam.put_role_policy(
            RoleName=role_name(region, cluster, whose),
            PolicyName="rights",
            PolicyDocument=_policy(statements),
        )
    if any(one.is_new for one in made.values()):
        time.sleep(SECONDS_TO_SPREAD)
    return made["head"].profile, made["workers"].profile


@dataclass(frozen=True)
class Made:
    """A role and the instance profile that gives it to machines, by their ARNs."""

    role: str
    profile: str
    is_new: bool


def make_role(iam: BaseClient, region: str, cluster: str, whose: str) -> Made:
    """Make a role and its instance profile, or find those that were made earlier.

    Raises:
        InputError: somebody else made one of this name.
    """
    name, tags = role_name(region, cluster, whose), tags_of(cluster)
    exists = contextlib.suppress(iam.exceptions.EntityAlreadyExistsException)
    machines = {"Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    with exists:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=_policy([machines]), Tags=tags)
    with exists:
        iam.create_instance_profile(InstanceProfileName=name, Tags=tags)
    role = iam.get_role(RoleName=name)["Role"]
    profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    check_ours("role", name, role.get("Tags"), cluster)
    check_ours("instance profile", name, profile.get("Tags"), cluster)
    if is_new := not profile["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return Made(role["Arn"], profile["Arn"], is_new)


def _policy(allowed: Sequence[JsonObject]) -> str:
    statements = [{"Effect": "Allow", **statement} for statement in allowed]
    return json.dumps({"Version": "2012-10-17", "Statement": statements})
