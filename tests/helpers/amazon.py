"""An account on AWS for a test, as moto serves it, and the cluster file as a user leaves it."""

import copy

import boto3
import pytest
import yaml
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ssm.models import Parameter, ssm_backends
from ray.autoscaler._private.aws import node_provider
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

from helpers.paths import ROOT
from sweeps.clusters import aws_rights

REGION, BUCKET, HOME_ADDRESS = "us-west-2", "a-lab-s-bucket", "203.0.113.7/32"
KINDS = ["m7i.xlarge", "m5.large", "g5.xlarge", "g5g.xlarge"]
FILE = ROOT / "cluster.yaml"


def edited(*place, value=None):
    """The cluster file as a user leaves it, with another value at one place or, for None, none."""
    cluster = yaml.safe_load(FILE.read_text())
    cluster["provider"] |= {"bucket": BUCKET, "ssh_from": HOME_ADDRESS}
    if place:
        *way, last = place
        inner = cluster
        for step in way:
            inner = inner[step]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return cluster


def spare_the_wait(patch: pytest.MonkeyPatch) -> None:
    """moto takes seconds to tell all kinds of machines; and it knows a new role at once."""
    patch.setattr(aws_rights, "SECONDS_TO_SPREAD", 0.0)
    patch.setattr(
        node_provider,
        "list_ec2_instances",
        lambda region, _: boto3.client("ec2", region).describe_instance_types(InstanceTypes=KINDS)[
            "InstanceTypes"
        ],
    )


def fill(session):
    """Give an empty account a bucket, and Amazon's image."""
    session.client("s3").create_bucket(
        Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION}
    )
    publish("ami-03cf127a")


def publish(image_id):
    """What Amazon calls its latest image is not for its users to say: moto takes it from inside."""
    node = edited()["available_node_types"]["head"]["node_config"]
    name = node["ImageId"].removeprefix("resolve:ssm:")
    parameter = Parameter(
        DEFAULT_ACCOUNT_ID, name, image_id, "String", None, None, None, 0, 1, "text"
    )
    ssm_backends[DEFAULT_ACCOUNT_ID][REGION]._parameters[name].append(parameter)


def up(cluster):
    """What `ray up` makes of a file before it starts a machine, and may keep for the next time."""
    return _bootstrap_config(copy.deepcopy(cluster))


def start(config, kind, name):
    """A machine, started as Ray starts it."""
    node = copy.deepcopy(config["available_node_types"][name]["node_config"])
    if kind == NODE_KIND_HEAD:
        node |= config["head_node"]
    provider = node_provider.AWSNodeProvider(config["provider"], config["cluster_name"])
    (machine,) = provider.create_node(node, {TAG_RAY_NODE_KIND: kind}, 1).values()
    machine.reload()
    return machine


def rights_of(session, whose):
    """The statements of the head's role, or of the workers'. Nothing else gives rights."""
    iam, name = session.client("iam"), f"gpt-sweeps-{REGION}-{whose}"
    assert not iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
    (policy,) = iam.list_role_policies(RoleName=name)["PolicyNames"]
    document = iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"]
    return document["Statement"]
