"""What `ray down` leaves on AWS, and the command that removes it."""

import pytest
import yaml
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER

from helpers.amazon import BUCKET, REGION, edited, start, up
from sweeps.clusters import aws
from sweeps.clusters.aws_remove import main

NAME = f"gpt-sweeps-{REGION}"


@pytest.fixture
def left(amazon, at_home):
    """The file of a cluster that ran and left results, next to what others have in the account."""
    (at_home / "cluster.yaml").write_text(yaml.safe_dump(edited()))
    config = up(edited())
    machines = [
        start(config, kind, name)
        for kind, name in ((NODE_KIND_HEAD, "head"), (NODE_KIND_WORKER, "worker"))
    ]
    for machine in machines:
        machine.terminate()
    # What others have, also by names that begin like ours.
    up({**edited(), "cluster_name": "gpt-sweeps-2"})
    amazon.client("ec2").create_key_pair(KeyName="ray-autoscaler_us-west-2")
    amazon.client("iam").create_role(RoleName=f"{NAME}-thesis", AssumeRolePolicyDocument="{}")
    s3 = amazon.client("s3")
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    for key in ("gpt-sweeps/head/tracking.dump", "gpt-sweeps/a", "gpt-sweeps-2/a", "thesis"):
        for body in (b"old", b"newer"):
            s3.put_object(Bucket=BUCKET, Key=key, Body=body)
    s3.delete_object(Bucket=BUCKET, Key="gpt-sweeps/a")
    s3.create_multipart_upload(Bucket=BUCKET, Key="gpt-sweeps/half")
    return at_home / "cluster.yaml"


def account(session):
    """All that the account has, of the kinds that a cluster makes."""
    ec2, iam, bucket = (
        session.client("ec2"), session.client("iam"), session.resource("s3").Bucket(BUCKET)
    )  # fmt: skip
    return {
        "groups": {one["GroupName"] for one in ec2.describe_security_groups()["SecurityGroups"]},
        "keys": {one["KeyName"] for one in ec2.describe_key_pairs()["KeyPairs"]},
        "roles": {one["RoleName"] for one in iam.list_roles()["Roles"]},
        "profiles": {
            one["InstanceProfileName"] for one in iam.list_instance_profiles()["InstanceProfiles"]
        },
        "files": {one.object_key for one in bucket.object_versions.all()},
        "uploads": {one.object_key for one in bucket.multipart_uploads.all()},
    }


OTHERS = {
    "groups": {"default", "gpt-sweeps-2-nodes"},
    "keys": {f"gpt-sweeps-2-{REGION}", "ray-autoscaler_us-west-2"},
    "roles": {f"gpt-sweeps-2-{REGION}-{one}" for one in ("head", "workers")} | {f"{NAME}-thesis"},
    "profiles": {f"gpt-sweeps-2-{REGION}-{one}" for one in ("head", "workers")},
    "files": {"gpt-sweeps-2/a", "thesis"},
    "uploads": set(),
}
RESULTS = {
    "files": {"gpt-sweeps/head/tracking.dump", "gpt-sweeps/a"},
    "uploads": {"gpt-sweeps/half"},
}


def test_it_lists_and_removes_nothing_without_being_told_to(left, amazon, capsys):
    before = account(amazon)
    assert main([str(left)]) == 0
    said = capsys.readouterr().out.splitlines()
    print(*said, sep="\n")
    begins = ["security group gpt-sweeps-nodes (sg-", f"key pair {NAME}, "]
    begins += [f"{kind} {NAME}-{whose}" for whose in ("head", "workers")
               for kind in ("instance profile", "role")]  # fmt: skip
    begins += [f"results in s3://{BUCKET}/gpt-sweeps: 5 files, 0.00 GB"]
    assert len(said) == len(begins) + 1
    for line, begin in zip(said, begins, strict=False):
        assert line.startswith(f"there is: {begin}")
    assert said[-1] == "--yes removes this; results only with --results"
    assert account(amazon) == before


def test_it_removes_what_ray_up_made_and_nothing_else(left, amazon, at_home, capsys):
    key = at_home / ".ssh" / f"{NAME}.pem"
    assert key.exists()
    assert main([str(left), "--yes"]) == 0
    said = capsys.readouterr().out
    assert f"removed: role {NAME}-head" in said
    assert f"there is: results in s3://{BUCKET}/gpt-sweeps" in said
    assert account(amazon) == OTHERS | {kind: OTHERS[kind] | RESULTS[kind] for kind in RESULTS}
    assert not key.exists()
    assert (at_home / ".ssh" / f"gpt-sweeps-2-{REGION}.pem").exists()


def test_results_are_removed_with_all_their_versions_if_that_is_asked_for(left, amazon, capsys):
    assert main([str(left), "--yes", "--results"]) == 0
    assert account(amazon) == OTHERS
    capsys.readouterr()
    assert main([str(left), "--yes", "--results"]) == 0
    assert capsys.readouterr().out == f"gpt-sweeps left nothing in {REGION}\n"


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_it_refuses_while_a_machine_is_there(left, amazon, capsys, kind):
    tag = NODE_KIND_HEAD if kind == "head" else NODE_KIND_WORKER
    machine = start(up(edited()), tag, kind)
    machine.stop()
    before = account(amazon)
    assert main([str(left), "--yes", "--results"]) == 2
    assert f"error: gpt-sweeps still has machines, {machine.id} (stopped): call `ray down`" in (
        capsys.readouterr().err
    )
    assert account(amazon) == before


def test_afterwards_ray_up_makes_everything_again(left, amazon):
    """Ray would otherwise go by what it remembers of the file."""
    assert main([str(left), "--yes"]) == 0
    up(edited())
    assert f"{NAME}-head" in account(amazon)["roles"]
    assert "gpt-sweeps-nodes" in account(amazon)["groups"]


def test_ray_down_makes_nothing_and_ray_up_does_not_go_by_it(left, amazon, monkeypatch):
    assert main([str(left), "--yes"]) == 0
    before = account(amazon)
    registered = []
    monkeypatch.setattr(aws, "ENDING", True)
    monkeypatch.setattr(aws.atexit, "register", lambda *call: registered.append(call))
    assert up(edited())["provider"]["type"] == "aws"
    assert account(amazon) == before
    ((forget, *arguments),) = registered
    forget(*arguments)
    monkeypatch.setattr(aws, "ENDING", False)
    assert "IamInstanceProfile" in up(edited())["head_node"]


def test_a_bucket_that_is_gone_leaves_no_results(left, amazon, capsys):
    bucket = amazon.resource("s3").Bucket(BUCKET)
    bucket.object_versions.delete()
    for upload in bucket.multipart_uploads.all():
        upload.abort()
    bucket.delete()
    assert main([str(left), "--yes", "--results"]) == 0
    assert "results" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        ("provider: {type: local}", "is not a cluster file for AWS, with a cluster_name"),
        ("[", "is not a cluster file for AWS"),
    ],
)
def test_a_file_that_names_no_cluster_is_refused(tmp_path, capsys, text, sentence):
    file = tmp_path / "file.yaml"
    if text:
        file.write_text(text)
    assert main([str(file)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_role_of_somebody_else_is_left_alone_whatever_its_name(amazon, at_home, capsys):
    (at_home / "cluster.yaml").write_text(yaml.safe_dump(edited()))
    iam = amazon.client("iam")
    iam.create_role(RoleName=f"{NAME}-head", AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName=f"{NAME}-head")
    assert main([str(at_home / "cluster.yaml"), "--yes", "--results"]) == 0
    assert capsys.readouterr().out == f"gpt-sweeps left nothing in {REGION}\n"
    assert account(amazon)["roles"] == account(amazon)["profiles"] == {f"{NAME}-head"}
