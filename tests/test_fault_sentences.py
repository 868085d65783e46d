"""What is said of errors as they are really raised; the drill is in test_faults.py."""

import errno
import re
import sqlite3

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from gptcore.config import InputError
from helpers.servers import free_port
from helpers.store import store_in
from sweeps.execution.faults import Fault, fault_of_sweep, fault_of_trial
from sweeps.session import naming_faults
from tracking.address import store_address
from tracking.health import check_database
from tracking.store import Store

MEMORY = (
    r"; this process held at most [\d.]+ [MG]B, and [\d.]+ [MG]B of the machine's [\d.]+ [MG]B "
    "are free"
)


def raised(break_it):
    with pytest.raises(Exception) as error:  # noqa: PT011
        break_it()
    return error.value


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda: torch.empty(10**15), r"an allocation of 4 PB was refused"),
        (lambda: np.empty(10**15), r"Unable to allocate 7\.11 PiB for an array with .*"),
        (lambda: bytearray(10**15), "an allocation was refused"),
    ],
)
def test_a_trial_without_memory_says_how_much_it_wanted_and_there_is(tmp_path, break_it, said):
    error = raised(break_it)
    assert fault_of_sweep(error, store_address(tmp_path), tmp_path) is None
    assert re.fullmatch(f"out of memory: {said}{MEMORY}", fault_of_trial(error))


def test_a_device_without_memory_is_told_as_pytorch_tells_it(monkeypatch):
    told = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = torch.OutOfMemoryError(told)
    assert fault_of_trial(error) == f"out of memory on the device: {told}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_without_memory_says_how_much_it_has():
    error = raised(lambda: torch.empty(10**15, device="cuda"))
    assert re.fullmatch(
        r"out of memory on the device: CUDA out of memory\. Tried to allocate .*; PyTorch held "
        r"at most [\d.]+ \w+, and [\d.]+ [MG]B of the device's [\d.]+ GB are free",
        fault_of_trial(error),
    )


def test_what_else_a_trial_breaks_on_is_told_as_it_is():
    assert fault_of_trial(ValueError("no such thing")) == "ValueError: no such thing"
    assert fault_of_trial(InputError("take another")) == "take another"


def test_a_full_disk_is_a_fault_of_the_sweep_however_it_is_met(tmp_path):
    def checkpoint():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise InputError("the checkpoint cannot be written") from error

    def database():
        client = store_in(tmp_path).client
        (engine,) = [client._tracking_client.store.engine]
        with engine.connect() as store:
            # As small as it is.
            pages = store.exec_driver_sql("pragma page_count").scalar()
            store.exec_driver_sql(f"pragma max_page_count = {pages}")
            for number in range(100):
                store.exec_driver_sql(
                    "insert into experiment_tags values (?, ?, 0)", (f"key {number}", "x" * 4000)
                )

    for break_it in (checkpoint, database):
        said = fault_of_sweep(raised(break_it), store_address(tmp_path), tmp_path)
        assert re.fullmatch(
            r"the disk of .+ is full, [\d.]+ \w+ of [\d.]+ \w+ are "
            "free: make room, then run the same command again to continue",
            said,
        )


def test_a_server_that_is_gone_for_good_ends_the_sweep_and_keeps_its_password(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    uri = f"http://me:secret@127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with (
        pytest.raises(Fault, match=f"the tracking server at 127.0.0.1:{port} fails .*refused") as e,
        naming_faults(Store(store_address(tmp_path)), tmp_path),
    ):
        MlflowClient(uri).search_experiments()
    assert "secret" not in str(e.value)


def test_what_a_store_refuses_is_no_fault_of_the_sweep(tmp_path):
    store = store_in(tmp_path)
    error = raised(lambda: store.client.get_run("none of that name"))
    assert isinstance(error, MlflowException)
    assert fault_of_sweep(error, store.address, tmp_path) is None
    assert fault_of_sweep(ValueError(), store.address, tmp_path) is None


def test_a_database_that_another_process_writes_to_is_not_damaged(tmp_path):
    store_in(tmp_path)
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as other:
        other.execute("begin immediate")
        check_database(file)
        other.rollback()
