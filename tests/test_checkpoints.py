"""Checkpoints in a bucket, for machines that share no folder: over S3 as moto serves it."""

import logging
import os
import re
import shutil
import signal

import boto3
import polars as pl
import pytest
from moto.server import ThreadedMotoServer

from gptcore.checkpoint import checkpoint_file
from gptcore.config import InputError, TrialConfig
from helpers.driving import outcome, start, wait_for
from helpers.store import runs_of
from helpers.trials import KILLED, flags, undisturbed, with_knobs
from sweeps.execution.checkpoints import (
    check_bucket,
    delete_checkpoint,
    fetch_checkpoint,
    save_checkpoint,
    with_checkpoint,
)
from sweeps.launch import main
from sweeps.presets import PRESETS
from tracking.address import store_address


@pytest.fixture(scope="module")
def amazon():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def lab(amazon, monkeypatch):
    """What the bucket holds, by name; the environment says where it is."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
        "AWS_ENDPOINT_URL": amazon,
        "GPT_SWEEPS_BUCKET": "s3://lab/gpt-sweeps/",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = boto3.resource("s3").Bucket("lab")
    bucket.create(CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    yield lambda: {file.key.removeprefix("gpt-sweeps/"): file for file in bucket.objects.all()}
    bucket.objects.all().delete()
    bucket.delete()


def test_what_one_machine_keeps_another_fetches(lab, tmp_path):
    here, there = (checkpoint_file(tmp_path / name, "k") for name in ("here", "there"))
    here.parent.mkdir(parents=True)
    here.write_bytes(b"step 1")
    save_checkpoint(here)
    fetch_checkpoint(there)
    assert there.read_bytes() == b"step 1"
    there.write_bytes(b"step 2")
    save_checkpoint(there)
    fetch_checkpoint(here)
    assert here.read_bytes() == b"step 2"
    assert with_checkpoint(tmp_path / "anywhere") == {"k"}
    delete_checkpoint(there)
    assert not there.exists()
    assert with_checkpoint(tmp_path / "anywhere") == set()
    delete_checkpoint(there)  # twice is no error


def test_a_checkpoint_that_the_bucket_has_not_is_none(lab, tmp_path):
    """It is of a trial that was redone or ended elsewhere."""
    left = checkpoint_file(tmp_path, "k")
    left.parent.mkdir()
    left.write_bytes(b"old")
    fetch_checkpoint(left)
    assert not left.exists()


def test_without_a_bucket_checkpoints_stay_where_they_are(tmp_path):
    file = checkpoint_file(tmp_path, "k")
    file.parent.mkdir()
    file.write_bytes(b"step 1")
    check_bucket()
    fetch_checkpoint(file)
    save_checkpoint(file)
    assert with_checkpoint(tmp_path) == {"k"}
    delete_checkpoint(file)
    assert with_checkpoint(tmp_path) == set()


@pytest.mark.parametrize("address", ["s3://nowhere-at-all/runs", "lab/runs"])
def test_a_bucket_that_cannot_be_written_is_refused(lab, monkeypatch, address):
    monkeypatch.setenv("GPT_SWEEPS_BUCKET", address)
    with pytest.raises(InputError, match=f"GPT_SWEEPS_BUCKET={address} cannot be written"):
        check_bucket()


def test_a_bucket_that_fails_for_once_costs_a_trial_nothing(lab, tmp_path, monkeypatch, capsys):
    file = checkpoint_file(tmp_path, "k")
    file.parent.mkdir()
    file.write_bytes(b"step 1")
    monkeypatch.setenv("GPT_SWEEPS_BUCKET", "s3://nowhere-at-all/runs")
    save_checkpoint(file)
    assert "k.pt could not be copied to s3://nowhere-at-all/runs" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_sweep_with_a_bad_bucket_is_refused_whatever_it_is_to_do(
    tmp_path, monkeypatch, capsys, more
):
    monkeypatch.setenv("GPT_SWEEPS_BUCKET", "lab/runs")
    assert main("doc", PRESETS, ["--runs-dir", str(tmp_path / "runs"), *more]) == 2
    assert "error: GPT_SWEEPS_BUCKET=lab/runs cannot be written" in capsys.readouterr().err


@pytest.mark.full
def test_a_sweep_goes_on_from_the_bucket_where_all_else_is_gone(lab, tmp_path):
    config = TrialConfig.from_flat({**KILLED, "corpus.windows": 2})

    def checkpoints():
        return [name for name in lab() if re.fullmatch(r"checkpoints/\w+\.pt", name)]

    runs_dir = tmp_path / "runs"
    arguments = [
        *flags(config),
        "--init.seed",
        "0",
        "1",
        "--name",
        "away",
        "--no-report",
        "--no-estimate",
    ]
    arguments += ["--array", "off"]  # so that every bit is to be as alone
    killed = start("init_sweep.py", runs_dir, *arguments)
    wait_for(lambda: len(checkpoints()) == 2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    shutil.rmtree(runs_dir / "checkpoints")
    code, output = outcome(start("init_sweep.py", runs_dir, "--dry-run", *arguments))
    assert code == 0, output
    assert output.count("continues from its checkpoint") == 2
    code, output = outcome(start("init_sweep.py", runs_dir, *arguments))
    assert code == 0, output
    assert not checkpoints()
    assert [name for name in lab() if name.startswith("ray/")]  # Tune's own
    runs = runs_of(store_address(runs_dir).uri).values()
    assert sorted(run.data.params["init.seed"] for run in runs) == ["0", "1"]
    for run in runs:
        whole = undisturbed(with_knobs(config, init__seed=int(run.data.params["init.seed"])))
        artifacts = run.info.artifact_uri.removeprefix("file://")
        rows = pl.read_parquet(f"{artifacts}/training.parquet").sort("step")
        assert rows["loss"].to_list() == [row.loss for row in whole.rows["training"]]
