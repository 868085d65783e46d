"""Remove what a cluster leaves on AWS after `ray down`: security group, roles, key, and results.

python -m sweeps.clusters.aws_remove cluster.yaml                    lists what there is
python -m sweeps.clusters.aws_remove cluster.yaml --yes              removes it, except for results
python -m sweeps.clusters.aws_remove cluster.yaml --yes --results    and all results in the bucket

Only what `ray up` made for this cluster is removed: it has two tags, which are checked. The bucket
itself stays.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

from gptcore.config import InputError
from sweeps.clusters.aws import forget_cached
from sweeps.clusters.aws_rights import is_ours, role_name, tags_of
from tracking.arguments import Parser, print_error
from tracking.bucket import FOLDER

GONE = "terminated"


@dataclass(frozen=True)
class Leftover:
    """Something that a cluster leaves behind."""

    what: str
    remove: Callable[[], object]
    is_result: bool = False


def check_no_machine(region: str, cluster: str) -> None:
    """Raise InputError while a machine of the cluster is there."""
    machines = boto3.resource("ec2", region).instances.filter(
        Filters=[{"Name": f"tag:{TAG_RAY_CLUSTER_NAME}", "Values": [cluster]}]
    )
    there = [f"{one.id} ({one.state['Name']})" for one in machines if one.state["Name"] != GONE]
    if there:
        raise InputError(
            f"{cluster} still has machines, {', '.join(there)}: call `ray down` first, and wait "
            "until they are terminated"
        )


def leftovers(region: str, cluster: str, bucket: str) -> Iterator[Leftover]:
    """Yield what the cluster left, in an order in which it can be removed."""
    ec2 = boto3.resource("ec2", region)
    tags = [{"Name": f"tag:{tag['Key']}", "Values": [tag["Value"]]} for tag in tags_of(cluster)]
    for group in ec2.security_groups.filter(Filters=tags):
        yield Leftover(f"security group {group.group_name} ({group.id})", group.delete)
    for key in ec2.key_pairs.filter(Filters=tags):
        file = Path("~/.ssh").expanduser() / f"{key.key_name}.pem"
        yield Leftover(f"key pair {key.key_name}, {file}", partial(remove_key, key, file))
    for whose in ("head", "workers"):
        yield from roles(region, cluster, role_name(region, cluster, whose))
    objects = boto3.resource("s3", region).Bucket(bucket)
    for count, size in counted(objects):
        yield Leftover(
            f"results in s3://{bucket}/{FOLDER}: {count:,} files, {size / 1e9:.2f} GB",
            partial(remove_results, objects),
            is_result=True,
        )


def roles(region: str, cluster: str, name: str) -> Iterator[Leftover]:
    """Yield the instance profile and the role of this name, if they are the cluster's."""
    iam = boto3.client("iam", region)
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        if is_ours(profile.get("Tags"), cluster):
            yield Leftover(f"instance profile {name}", partial(remove_profile, iam, profile))
    with contextlib.suppress(iam.exceptions.NoSuchEntityException):
        if is_ours(iam.get_role(RoleName=name)["Role"].get("Tags"), cluster):
            yield Leftover(f"role {name}", partial(remove_role, iam, name))


def counted(bucket: Any) -> Iterator[tuple[int, int]]:
    """Yield the number and the size of the files in the cluster's folder, unless there is none."""
    sizes: list[int] = []
    with contextlib.suppress(bucket.meta.client.exceptions.NoSuchBucket):
        versions = bucket.object_versions.filter(Prefix=f"{FOLDER}/")
        sizes = [version.size or 0 for version in versions]
    if sizes:
        yield len(sizes), sum(sizes)


def remove_key(key: Any, file: Path) -> None:
    """Delete a key on AWS, and then its secret half on this machine."""
    key.delete()
    file.unlink(missing_ok=True)


def remove_profile(iam: Any, profile: Any) -> None:
    """Delete an instance profile."""
    name = {"InstanceProfileName": profile["InstanceProfileName"]}
    for role in profile["Roles"]:
        iam.remove_role_from_instance_profile(**name, RoleName=role["RoleName"])
    iam.delete_instance_profile(**name)


def remove_role(iam: Any, name: str) -> None:
    """Delete a role with its rights. AWS refuses if somebody attached more rights to it."""
    for policy in iam.list_role_policies(RoleName=name)["PolicyNames"]:
        iam.delete_role_policy(RoleName=name, PolicyName=policy)
    iam.delete_role(RoleName=name)


def remove_results(bucket: Any) -> None:
    """Delete the cluster's folder: every version of its files, and files that are half sent."""
    bucket.object_versions.filter(Prefix=f"{FOLDER}/").delete()
    for upload in bucket.multipart_uploads.filter(Prefix=f"{FOLDER}/"):
        upload.abort()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises InputError for a bad one."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="the cluster's file, such as cluster.yaml")
    parser.add_argument("--yes", action="store_true", help="remove what is listed")
    parser.add_argument("--results", action="store_true", help="results in the bucket too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return its exit code: 2 where something cannot be removed."""
    try:
        args = arguments(argv)
        region, cluster, bucket = named_in(args.file)
        check_no_machine(region, cluster)
        found = list(leftovers(region, cluster, bucket))
        for one in found:
            goes = args.yes and (args.results or not one.is_result)
            if goes:
                one.remove()
            print(f"{'removed' if goes else 'there is'}: {one.what}")
        if args.yes:
            # Ray would start the next cluster with what it remembers of this one.
            forget_cached(cluster)
        if not found:
            print(f"{cluster} left nothing in {region}")
        elif not args.yes:
            print("--yes removes this; results only with --results")
    except (InputError, BotoCoreError, ClientError) as error:
        print_error(error)
        return 2
    return 0


def named_in(file: Path) -> tuple[str, str, str]:
    """Return the region, the name and the bucket of the cluster of a file.

    Raises:
        InputError: this is no cluster file for AWS.
    """
    try:
        cluster = yaml.safe_load(file.read_text())
        provider = cluster["provider"]
        return provider["region"], cluster["cluster_name"], provider["bucket"]
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not a cluster file for AWS, with a cluster_name, a region and a bucket"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
