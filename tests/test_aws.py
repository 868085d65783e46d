"""The cluster file for AWS: its rules, Ray's own checks, and `ray up` against moto's Amazon."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from helpers.amazon import (
    BUCKET,
    FILE,
    HOME_ADDRESS,
    REGION,
    edited,
    fill,
    publish,
    rights_of,
    start,
    up,
)
from helpers.paths import ROOT
from sweeps.clusters.aws_rules import wrong_with

HEAD, WORKER = (("available_node_types", name) for name in ("head", "worker"))
DISKS = [
    {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 120, "Encrypted": True}},
    {"DeviceName": "/dev/sdb", "Ebs": {"VolumeSize": 1000}},
]
SOURCED = ". ~/gpt-sweeps/sweeps/clusters/environment && "
LOOPBACK = "--dashboard-host=127.0.0.1"


def test_the_file_as_it_comes_names_its_placeholders():
    said = list(wrong_with(yaml.safe_load(FILE.read_text())))
    assert "provider.bucket still has <your-bucket>: replace it by your own value" in said
    assert "provider.ssh_from still has <your-address>: replace it by your own value" in said


def test_what_a_user_edits_stands_in_four_numbered_lines_at_the_top():
    lines = FILE.read_text().splitlines()
    numbered = {
        number: line.split(":")[0].strip()
        for line in lines[:14]
        for number in "123456789"
        if f"# {number}. " in line
    }
    assert numbered == {"1": "region", "2": "bucket", "3": "ssh_from", "4": "worker"}


def test_the_edited_file_keeps_the_rules_and_rays_own_schema():
    config = prepare_config(edited())
    assert list(wrong_with(config)) == []
    for kind in config["available_node_types"].values():
        kind.setdefault("resources", {"CPU": 4})
    validate_config(config)


@pytest.mark.parametrize(
    ("cluster", "sentence"),
    [
        (edited("provider", "region", value="us-west-9"), "provider.region takes a region of AWS"),
        (edited("provider", "region"), "provider.region takes a region of AWS"),
        (edited("provider", "bucket"), "provider.bucket takes the name of an S3 bucket, not None"),
        (edited("provider", "bucket", value="s3://lab"), "provider.bucket takes the name"),
        (edited("provider", "ssh_from", value="0.0.0.0/0"), "lets 4,294,967,296 addresses try"),
        (edited("provider", "ssh_from", value="0.0.0.0/1"), "lets 2,147,483,648 addresses"),
        (edited("provider", "ssh_from", value="::/0"), "provider.ssh_from takes a CIDR"),
        (edited("provider", "ssh_from", value="everybody"), "provider.ssh_from takes a CIDR"),
        (edited("provider", "ssh_from"), "provider.ssh_from takes a CIDR"),
        (edited(*WORKER, "min_workers", value=2), "worker takes min_workers 0"),
        (edited(*WORKER, "max_workers", value=0), "worker takes min_workers 0"),
        (edited(*WORKER, "max_workers", value="many"), "worker takes min_workers 0"),
        (edited("max_workers", value=0), "worker takes min_workers 0"),
        (
            edited("setup_commands", value=["export AWS_SECRET_ACCESS_KEY=abcdefgh"]),
            "setup_commands looks like a secret",
        ),
        (
            edited("provider", "aws_credentials", value={"aws_secret_access_key": "abcdefgh"}),
            "provider.aws_credentials.aws_secret_access_key looks like a secret",
        ),
        (
            edited("provider", "aws_credentials", value={"aws_access_key_id": f"AKIA{'A' * 16}"}),
            "provider.aws_credentials.aws_access_key_id looks like a secret",
        ),
        (edited("file_mounts", "~/.ray/auth_token"), "file_mounts takes ~/.ray/auth_token"),
        (
            edited("worker_start_ray_commands", value=["ray start --address=$RAY_HEAD_IP:6379"]),
            "worker_start_ray_commands takes `ray start` only after",
        ),
        (
            edited(
                "head_start_ray_commands",
                value=[f"{SOURCED}RAY_AUTH_MODE=disabled ray start --head {LOOPBACK}"],
            ),
            "head_start_ray_commands takes `ray start` only after",
        ),
        (
            edited(
                "head_start_ray_commands",
                value=[f"{SOURCED}ray start --head --dashboard-host 0.0.0.0"],
            ),
            "head_start_ray_commands takes --dashboard-host=127.0.0.1",
        ),
        (
            edited("head_start_ray_commands", value=[f"{SOURCED}ray start --head"]),
            "head_start_ray_commands takes --dashboard-host=127.0.0.1",
        ),
        (edited(*HEAD, "node_config", "MetadataOptions"), "head takes MetadataOptions: {HttpTok"),
        (
            edited(*HEAD, "node_config", "MetadataOptions", value={"HttpTokens": "optional"}),
            "head takes MetadataOptions: {HttpTokens: required, HttpPutResponseHopLimit: 1}",
        ),
        (
            edited(*WORKER, "node_config", "MetadataOptions", value={"HttpTokens": "required"}),
            "worker takes MetadataOptions: {HttpTokens: required, HttpPutResponseHopLimit: 1}",
        ),
        (edited(*HEAD, "node_config", "BlockDeviceMappings"), "head takes BlockDeviceMappings"),
        (
            edited(*WORKER, "node_config", "BlockDeviceMappings", value=DISKS),
            "worker takes BlockDeviceMappings, with Encrypted: true for each disk",
        ),
        (
            edited("rsync_exclude", value=["*.pem"]),
            "rsync_exclude takes .env*, .netrc, .aws, .ssh, *.key, id_*, .git/config: such files",
        ),
        (edited("rsync_exclude"), "rsync_exclude takes .env*, "),
    ],
)
def test_a_broken_file_is_told_what_is_wrong(cluster, sentence):
    (said,) = wrong_with(cluster)
    assert sentence in said


def opened(session, config):
    """Who is let in by the security group that all machines are in: protocol, port, from where."""
    groups = {
        tuple(kind["node_config"]["SecurityGroupIds"])
        for kind in config["available_node_types"].values()
    }
    ((group_id,),) = groups
    rules = session.resource("ec2").SecurityGroup(group_id).ip_permissions
    return sorted(
        (rule["IpProtocol"], rule.get("FromPort"), source)
        for rule in rules
        for source in [one["CidrIp"] for one in rule["IpRanges"]]
        + ["itself" for one in rule["UserIdGroupPairs"] if one["GroupId"] == group_id]
        + [one["CidrIpv6"] for one in rule["Ipv6Ranges"]]
    )


def buckets(session):
    """The buckets that the workers' role names."""
    named = [one["Resource"] for one in rights_of(session, "workers")]
    return {resource.removeprefix("arn:aws:s3:::").partition("/")[0] for resource in named}


LET_IN = [("-1", None, "itself"), ("tcp", 22, HOME_ADDRESS)]


def test_the_first_ray_up_of_an_account_makes_what_the_file_says(amazon, at_home):
    config = up(edited())
    print("let in:", opened(amazon, config))
    assert opened(amazon, config) == LET_IN
    assert buckets(amazon) == {BUCKET}
    names = sorted(role["RoleName"] for role in amazon.client("iam").list_roles()["Roles"])
    assert names == [f"gpt-sweeps-{REGION}-head", f"gpt-sweeps-{REGION}-workers"]
    assert config["provider"]["type"] == "aws"
    head, worker = (config["available_node_types"][name] for name in ("head", "worker"))
    assert (head["resources"]["CPU"], worker["resources"]["GPU"]) == (0, 1)
    assert (worker["min_workers"], worker["max_workers"]) == (0, 8)
    token = at_home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64


def test_an_edit_replaces_what_was_before_and_so_does_taking_it_back(amazon):
    office, other = "198.51.100.0/24", "another-bucket"
    amazon.client("s3").create_bucket(
        Bucket=other, CreateBucketConfiguration={"LocationConstraint": REGION}
    )
    up(edited())
    config = up(edited("provider", "ssh_from", value=office))
    assert opened(amazon, config) == [("-1", None, "itself"), ("tcp", 22, office)]
    config = up(edited("provider", "bucket", value=other))
    assert buckets(amazon) == {other}
    config = up(edited())
    assert opened(amazon, config) == LET_IN
    assert buckets(amazon) == {BUCKET}


def test_an_address_in_a_network_stands_for_the_network(amazon):
    config = up(edited("provider", "ssh_from", value="203.0.113.7/24"))
    assert opened(amazon, config) == [("-1", None, "itself"), ("tcp", 22, "203.0.113.0/24")]


def test_amazon_starts_the_machines_that_the_file_describes(amazon):
    config = up(edited())
    head = start(config, NODE_KIND_HEAD, "head")
    worker = start(config, NODE_KIND_WORKER, "worker")
    assert (head.instance_type, worker.instance_type) == ("m7i.xlarge", "g5.xlarge")
    assert (head.instance_lifecycle, worker.instance_lifecycle) == (None, "spot")
    for machine, profile in ((head, "-head"), (worker, "-workers")):
        (group,) = machine.security_groups
        assert group["GroupName"] == "gpt-sweeps-nodes"
        assert machine.iam_instance_profile["Arn"].endswith(profile)
        assert machine.metadata_options["HttpTokens"] == "required"
        assert machine.metadata_options["HttpPutResponseHopLimit"] == 1
        (disk,) = machine.volumes.all()
        assert (disk.size, disk.volume_type, disk.encrypted) == (120, "gp3", True)


def test_a_new_image_does_not_end_the_head_that_runs(amazon):
    config = up(edited())
    head = start(config, NODE_KIND_HEAD, "head")
    newer = "ami-0b863b9d36a5bb4f8"
    publish(newer)
    config = up(edited("max_workers", value=4))
    images = {kind["node_config"]["ImageId"] for kind in config["available_node_types"].values()}
    assert images == {head.image_id}
    head.terminate()
    config = up(edited("max_workers", value=5))
    assert config["available_node_types"]["head"]["node_config"]["ImageId"] == newer


@pytest.mark.parametrize(
    ("cluster", "sentence"),
    [
        (edited("provider", "bucket", value="no-bucket"), "the bucket no-bucket cannot be used"),
        (edited("provider", "region", value="eu-west-1"), "the bucket a-lab-s-bucket is in us-we"),
        (
            edited(*WORKER, "node_config", "InstanceType", value="m5.large"),
            "worker takes an x86-64 machine with an NVIDIA GPU, such as g5.xlarge, not m5.large",
        ),
        (edited(*WORKER, "node_config", "InstanceType", value="g5g.xlarge"), "NVIDIA GPU"),
        (edited(*WORKER, "node_config", "InstanceType", value="g5.tiny"), "g5.tiny"),
        (
            edited("available_node_types", "head", "node_config", "InstanceType", value="m7i.tiny"),
            "m7i.tiny is not available",
        ),
    ],
)
def test_ray_up_ends_before_anything_is_made(amazon, at_home, cluster, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        up(cluster)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert sentence in said
    groups = amazon.client("ec2").describe_security_groups()["SecurityGroups"]
    assert [group["GroupName"] for group in groups] == ["default"]
    assert amazon.client("iam").list_roles()["Roles"] == []
    assert not (at_home / ".ray").exists()


def test_a_region_without_a_network_is_told_how_to_get_one(amazon, capsys):
    ec2 = amazon.resource("ec2")
    for subnet in ec2.subnets.all():
        subnet.delete()
    for vpc in ec2.vpcs.all():
        vpc.delete()
    with pytest.raises(SystemExit):
        up(edited())
    assert "us-west-2 has no default VPC: `aws ec2 create-default-vpc" in capsys.readouterr().err


def test_another_folder_than_the_checkout_is_not_sent_to_the_machines(
    amazon, at_home, monkeypatch, capsys
):
    monkeypatch.chdir(at_home)
    with pytest.raises(SystemExit):
        up(edited())
    assert f"{at_home} is not a checkout of this project" in capsys.readouterr().err


def test_a_laptop_without_credentials_is_told_so(at_home, monkeypatch, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        up(edited())
    assert "error: Unable to locate credentials" in capsys.readouterr().err


def ray(*arguments, **environment):
    """A command of Ray in the checkout, as a user calls it."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("cluster", "sentence"),
    [
        (
            yaml.safe_load(FILE.read_text()),
            "provider.bucket still has <your-bucket>: replace it by your own value",
        ),
        (
            edited("provider", "ssh_from", value="0.0.0.0/0"),
            "provider.ssh_from 0.0.0.0/0 lets 4,294,967,296 addresses try to log in: take a "
            "network with a prefix of /16 or longer",
        ),
    ],
)
def test_the_command_ray_up_refuses_with_one_sentence(at_home, cluster, sentence):
    (at_home / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    ended = ray("up", "-y", str(at_home / "cluster.yaml"))
    assert ended.returncode == 2
    *rays, said = ended.stderr.splitlines()
    assert said == f"error: {sentence}"
    # Ray tells what it does first, a time before each.
    assert all(line.startswith("20") for line in rays)


RECORDER = """#!{python}
import json, pathlib, shutil, sys
*words, last = sys.argv[1:]
with open("{log}", "a") as log:
    log.write(json.dumps([pathlib.Path(sys.argv[0]).name, last]) + "\\n")
if last.endswith("ray_bootstrap_config.yaml"):
    shutil.copy(words[-1], "{config}")
"""


@pytest.mark.full
def test_the_command_ray_up_carries_the_file_to_a_head(at_home):
    """But for the machine itself: what goes there by ssh and rsync is written down instead."""
    log, given = at_home / "log", at_home / "given"
    for name in ("ssh", "rsync"):
        command = at_home / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(RECORDER.format(python=sys.executable, log=log, config=given))
        command.chmod(0o755)
    (at_home / "cluster.yaml").write_text(yaml.safe_dump(edited()))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
            session = boto3.Session(region_name=REGION)
            fill(session)
            ended = ray("up", "-y", str(at_home / "cluster.yaml"), PATH=f"{at_home}/bin:/usr/bin")
            assert ended.returncode == 0, ended.stdout + ended.stderr
            (head,) = session.resource("ec2").instances.all()
            assert [group["GroupName"] for group in head.security_groups] == ["gpt-sweeps-nodes"]
            assert head.iam_instance_profile["Arn"].endswith(f"gpt-sweeps-{REGION}-head")
            # Whatever is wrong with the file by then.
            spoilt = edited("provider", "bucket", value="<your-bucket>")
            (at_home / "cluster.yaml").write_text(yaml.safe_dump(spoilt))
            down = ray("down", "-y", str(at_home / "cluster.yaml"), PATH=f"{at_home}/bin:/usr/bin")
            assert down.returncode == 0, down.stdout + down.stderr
            head.reload()
            assert head.state["Name"] in ("shutting-down", "terminated")
    finally:
        server.stop()
    done = [json.loads(line) for line in log.read_text().splitlines()]
    carried = [last.partition(":")[2] for name, last in done if name == "rsync"]
    assert {"~/gpt-sweeps/", "~/.ray/auth_token", "~/ray_bootstrap_config.yaml"} <= set(carried)
    order = ["chmod 600 ~/.ray/auth_token", "pip install", "ray stop"]
    order += ["tracking.server --cluster ~/ray_bootstrap_config.yaml", "ray start --head"]
    said = [last for name, last in done if name == "ssh"]
    places = [next(i for i, last in enumerate(said) if words in last) for words in order]
    assert places == sorted(places)
    # As the head reads it, and tracking/server.py.
    config = AutoscalingConfig(json.loads(given.read_text()), skip_content_hash=True)
    assert config.get_config("provider")["type"] == "aws"
    assert config.get_config("provider")["bucket"] == BUCKET
    workers = config.get_cloud_node_config("worker")
    assert workers["IamInstanceProfile"]["Arn"].endswith(f"gpt-sweeps-{REGION}-workers")
    assert config.get_node_resources("worker")["GPU"] == 1
