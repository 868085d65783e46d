"""What the machines of a cluster on AWS may do, and what they are refused, by the roles made."""

import copy
from functools import partial
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from moto import mock_aws
from pyarrow.fs import FileSystem
from ray.autoscaler._private.aws import utils as ray_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER
from ray.train._internal.storage import StorageContext

from gptcore.checkpoint import checkpoint_file
from gptcore.config import TrialConfig
from gptcore.files import write_atomically
from helpers.amazon import BUCKET, REGION, edited, fill, rights_of, start, up
from helpers.amazon_rights import allows, asked_of_ec2, guarded_amazon
from helpers.driving import outcome
from helpers.driving import start as begin
from helpers.trials import KILLED, flags
from sweeps.execution.checkpoints import (
    check_bucket,
    delete_checkpoint,
    fetch_checkpoint,
    save_checkpoint,
    with_checkpoint,
)
from tracking import server as tracking_server

ROOT_KEY, HEAD_KEY, WORKER_KEY = "AKIAROOT", "AKIAHEAD", "AKIAWORKER"
FOREIGN = ["thesis/data", "gpt-sweeps-of-others/x", "checked"]
OF_THE_HEAD = [
    "gpt-sweeps/head/tracking.dump", "gpt-sweeps/tracking.dump", "gpt-sweeps/artifacts/1/a",
    "gpt-sweeps/ray/1/tuner.pkl", "gpt-sweeps/checked", "gpt-sweeps/checkpoints-2/k.pt",
]  # fmt: skip


@pytest.fixture
def roles(at_home):
    """The statements of the roles that `ray up` makes, by whose they are."""
    with mock_aws():
        session = boto3.Session(region_name=REGION)
        fill(session)
        up(edited())
        return {whose: rights_of(session, whose) for whose in ("head", "workers")}


@pytest.fixture
def s3(roles, monkeypatch):
    """An S3 that knows the roles, with a file of the head or of others at each place."""
    with guarded_amazon() as amazon:
        monkeypatch.setenv("AWS_ENDPOINT_URL", amazon.address)
        monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
        monkeypatch.setenv("GPT_SWEEPS_BUCKET", f"s3://{BUCKET}/gpt-sweeps")
        root = client(ROOT_KEY)
        root.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        for key in FOREIGN + OF_THE_HEAD:
            root.put_object(Bucket=BUCKET, Key=key, Body=b"theirs")
        amazon.roles = {HEAD_KEY: roles["head"], WORKER_KEY: roles["workers"]}
        yield amazon


def client(key):
    """S3 as a machine with this access key sees it."""
    return boto3.client("s3", REGION, aws_access_key_id=key, aws_secret_access_key="secret")


@pytest.fixture
def worker(s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", WORKER_KEY)
    return s3


@pytest.fixture
def head(s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", HEAD_KEY)
    return s3


def test_a_worker_reads_and_writes_checkpoints(worker, tmp_path):
    file = checkpoint_file(tmp_path, "k")
    fetch_checkpoint(file)  # there is none yet
    file.parent.mkdir(parents=True)
    file.write_bytes(b"step 1")
    save_checkpoint(file)
    file.write_bytes(b"step 2")
    fetch_checkpoint(file)
    assert file.read_bytes() == b"step 1"
    assert with_checkpoint(tmp_path) == {"k"}
    delete_checkpoint(file)
    assert with_checkpoint(tmp_path) == set()
    assert worker.refused_of(BUCKET) == []


def refused(call, **arguments):
    """Whether S3 refuses a call."""
    try:
        call(Bucket=BUCKET, **arguments)
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    return False


def test_a_worker_is_refused_everything_else(worker):
    here = client(WORKER_KEY)
    for key in OF_THE_HEAD + FOREIGN:
        assert refused(here.get_object, Key=key)
        assert refused(here.put_object, Key=key, Body=b"mine")
        assert refused(here.create_multipart_upload, Key=key)
        assert refused(here.delete_object, Key=key)
        assert refused(here.delete_objects, Delete={"Objects": [{"Key": key}]})
        assert client(ROOT_KEY).get_object(Bucket=BUCKET, Key=key)["Body"].read() == b"theirs"


def test_a_worker_lists_nothing_but_checkpoints(worker):
    here = client(WORKER_KEY)
    assert refused(here.list_objects_v2)
    for prefix in ("", "gpt-sweeps/", "gpt-sweeps/head/", "thesis/"):
        assert refused(here.list_objects_v2, Prefix=prefix)
    assert not refused(here.list_objects_v2, Prefix="gpt-sweeps/checkpoints/")


def test_the_head_uses_all_of_the_cluster_s_folder(head, tmp_path):
    checkpoint = checkpoint_file(tmp_path, "k")
    write_atomically(checkpoint, lambda file: file.write_bytes(b"step 1"))
    check_bucket()
    save_checkpoint(checkpoint)
    delete_checkpoint(checkpoint)
    files, name = FileSystem.from_uri(f"s3://{BUCKET}/gpt-sweeps/head/tracking.dump")
    with files.open_output_stream(name) as stream:
        stream.write(b"dump")
    with files.open_input_file(name) as stream:
        assert stream.read() == b"dump"
    artifacts = S3ArtifactRepository(f"s3://{BUCKET}/gpt-sweeps/artifacts/1/run")
    write_atomically(tmp_path / "rows", lambda file: file.write_bytes(b"rows"))
    artifacts.log_artifact(str(tmp_path / "rows"))
    assert [file.path for file in artifacts.list_artifacts()] == ["rows"]
    artifacts.download_artifacts("rows", str(tmp_path))
    artifacts.delete_artifacts("rows")
    StorageContext(f"s3://{BUCKET}/gpt-sweeps/ray", "1")
    assert head.refused_of(BUCKET) == []


def test_the_head_is_refused_what_is_not_the_cluster_s(head):
    here = client(HEAD_KEY)
    for key in FOREIGN:
        assert refused(here.get_object, Key=key)
        assert refused(here.put_object, Key=key, Body=b"mine")
        assert refused(here.delete_object, Key=key)


APART = """
import os, sys
if any("default_worker" in word for word in sys.orig_argv):
    os.environ["AWS_ACCESS_KEY_ID"] = "{key}"
"""


@pytest.mark.full
def test_a_sweep_needs_no_other_rights(head, tmp_path):
    """The driver has the head's key, and its workers have theirs."""
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "sitecustomize.py").write_text(APART.format(key=WORKER_KEY))
    runs_dir, config = tmp_path / "runs", TrialConfig.from_flat({**KILLED, "train.steps": 300})
    arguments = [*flags(config), "--init.seed", "0", "1", "--name", "away", "--no-report"]
    code, output = outcome(begin("init_sweep.py", runs_dir, *arguments, PYTHONPATH=str(apart)))
    assert code == 0, output
    assert "2 of 2 finished" in output
    print("allowed:", *sorted(head.allowed), sep="\n  ")
    assert head.refused_of(BUCKET) == []
    assert (WORKER_KEY, "s3:PutObject") in head.allowed
    assert (HEAD_KEY, "s3:PutObject") in head.allowed


def test_a_head_does_not_restore_what_workers_could_write(head, tmp_path, monkeypatch, capsys):
    client(ROOT_KEY).delete_object(Bucket=BUCKET, Key="gpt-sweeps/head/tracking.dump")
    monkeypatch.setattr(tracking_server, "FOLDER", tmp_path / "t")
    file = tmp_path / "cluster.yaml"
    file.write_text(f"provider: {{bucket: {BUCKET}, head_ip: 127.0.0.1}}")
    assert tracking_server.main(["--cluster", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"error: s3://{BUCKET}/gpt-sweeps/tracking.dump is a database that an earlier" in said
    assert not (tmp_path / "t").exists()


@pytest.fixture
def ec2(amazon):
    """EC2 for a head: every call that Ray's provider makes there is asked of the head's role."""
    config = up(edited())
    head, worker = start(config, NODE_KIND_HEAD, "head"), start(config, NODE_KIND_WORKER, "worker")
    statements = rights_of(amazon, "head")
    calls = []

    def ask(params, model, **_):
        calls.append(model.name)
        for action, resource, known in asked_of_ec2(amazon, model.name, params):
            if not allows(statements, action, resource, known):
                why = {"Code": "UnauthorizedOperation", "Message": f"{action} {resource} {known}"}
                raise ClientError({"Error": why}, model.name)

    for cache in (ray_aws.resource_cache, ray_aws.client_cache):
        cache.cache_clear()
    boto3.setup_default_session(region_name=REGION)
    boto3.DEFAULT_SESSION.events.register("before-parameter-build.ec2", ask)
    yield config, AWSNodeProvider(config["provider"], "gpt-sweeps"), head, worker, calls
    for cache in (ray_aws.resource_cache, ray_aws.client_cache):
        cache.cache_clear()


def test_the_head_starts_names_and_ends_its_workers(ec2):
    config, provider, head, worker, calls = ec2
    node = copy.deepcopy(config["available_node_types"]["worker"]["node_config"])
    (new,) = provider.create_node(node, {"ray-node-kind": NODE_KIND_WORKER}, 1)
    assert set(provider.non_terminated_nodes({})) == {head.id, worker.id, new}
    provider.set_node_tags(new, {"ray-node-status": "up-to-date"})
    provider.terminate_nodes([new, worker.id])
    assert provider.non_terminated_nodes({}) == [head.id]
    assert set(calls) == {"RunInstances", "DescribeInstances", "CreateTags", "TerminateInstances"}


def other_machine(session, **tags):
    """A machine of somebody else."""
    (machine,) = session.resource("ec2").create_instances(
        ImageId="ami-03cf127a", MinCount=1, MaxCount=1,
        TagSpecifications=[
            {"ResourceType": "instance", "Tags": [{"Key": key, "Value": tags[key]} for key in tags]}
        ] if tags else [],
    )  # fmt: skip
    return machine.id


@pytest.mark.parametrize("tags", [{}, {"ray-cluster-name": "another"}])
def test_the_head_has_no_rights_to_machines_of_others(ec2, amazon, tags):
    _, provider, *_ = ec2
    foreign, head = other_machine(amazon, **tags), provider.ec2.meta.client
    ours = [{"Key": "ray-cluster-name", "Value": "gpt-sweeps"}]
    for call in (
        partial(head.terminate_instances, InstanceIds=[foreign]),
        partial(head.stop_instances, InstanceIds=[foreign]),
        partial(head.create_tags, Resources=[foreign], Tags=ours),
    ):
        with pytest.raises(ClientError, match="UnauthorizedOperation"):
            call()
    assert amazon.resource("ec2").Instance(foreign).state["Name"] == "running"


def open_group(session):
    return session.client("ec2").create_security_group(GroupName="open", Description="x")["GroupId"]


def strong_profile(session):
    iam = session.client("iam")
    iam.create_role(RoleName="admin", AssumeRolePolicyDocument="{}")
    made = iam.create_instance_profile(InstanceProfileName="admin")["InstanceProfile"]
    iam.add_role_to_instance_profile(InstanceProfileName="admin", RoleName="admin")
    return {"Arn": made["Arn"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda session: {"SecurityGroupIds": [open_group(session)]}, ":security-group/"),
        (lambda session: {"IamInstanceProfile": strong_profile(session)}, "iam:PassRole"),
        (lambda session: {"TagSpecifications": []}, ":instance/"),
    ],
    ids=["another security group", "another role", "without the cluster's name"],
)
def test_the_head_starts_no_other_machines(ec2, amazon, change, named):
    config, provider, *_ = ec2
    node = copy.deepcopy(config["available_node_types"]["worker"]["node_config"])
    node["SubnetId"] = node.pop("SubnetIds")[0]
    tags = [{"Key": "ray-cluster-name", "Value": "gpt-sweeps"}]
    node["TagSpecifications"] = [{"ResourceType": "instance", "Tags": tags}]
    run = partial(provider.ec2.meta.client.run_instances, MinCount=1, MaxCount=1)
    run(**node)
    with pytest.raises(ClientError, match=f"UnauthorizedOperation.*{named}"):
        run(**{**node, **change(amazon)})


def test_the_roles_are_for_the_machines_that_they_are_made_for(amazon):
    """Another machine of the head's kind would have the head's rights, were they its kind's."""
    config = up(edited())
    head, worker = (config["available_node_types"][name] for name in ("head", "worker"))
    assert "IamInstanceProfile" not in head["node_config"]
    assert config["head_node"]["IamInstanceProfile"]["Arn"].endswith(f"gpt-sweeps-{REGION}-head")
    assert worker["node_config"]["IamInstanceProfile"]["Arn"].endswith("-workers")


def test_a_role_that_the_file_gives_the_head_is_kept(amazon):
    own = strong_profile(amazon)
    place = ("available_node_types", "head", "node_config", "IamInstanceProfile")
    assert up(edited(*place, value=own))["head_node"]["IamInstanceProfile"] == own


def role_of_somebody(session):
    session.client("iam").create_role(
        RoleName=f"gpt-sweeps-{REGION}-head", AssumeRolePolicyDocument="{}"
    )


def group_of_somebody(session):
    session.client("ec2").create_security_group(GroupName="gpt-sweeps-nodes", Description="x")


def key_of_somebody(session):
    session.client("ec2").create_key_pair(KeyName=f"gpt-sweeps-{REGION}")
    file = Path("~/.ssh").expanduser() / f"gpt-sweeps-{REGION}.pem"
    file.parent.mkdir()
    file.touch()


@pytest.mark.parametrize("make", [role_of_somebody, group_of_somebody, key_of_somebody])
def test_what_somebody_else_made_under_the_same_name_is_left_alone(amazon, make, capsys):
    make(amazon)
    with pytest.raises(SystemExit) as ended:
        up(edited())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "was not made by `ray up` for this cluster (it lacks the tag made-by=gpt-sweeps)" in said
