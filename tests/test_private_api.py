"""The parts of Ray and MLflow that no documentation promises are as this project needs them.

A failure names the library and what another version of it has changed.
"""

import inspect
import os
import signal
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from ray._common import usage
from ray._private import ray_constants, resource_and_label_spec, services, utils
from ray._raylet import GcsClient

from helpers.paths import ROOT
from sweeps.execution import private_api
from tracking import private_api as tracking_api
from tracking.address import StoreAddress
from tracking.store import Store


def changed(library, what):
    return f"{library} {version(library)} has changed {what}: adapt private_api.py"


def test_ray_counts_this_machine_by_its_resources():
    counted = private_api.resources_here(100 * 2**20, 1, None)
    says = changed("ray", "ResourceAndLabelSpec")
    assert counted["CPU"] >= 1, says
    assert counted["memory"] > 2**20, says
    parameters = inspect.signature(resource_and_label_spec.ResourceAndLabelSpec).parameters
    assert "object_store_memory" in parameters, says


def test_ray_knows_the_memory_of_this_machine():
    free, total = private_api.memory_here()
    assert 0 < free < total, changed("ray", "get_system_memory or get_used_memory")
    assert total > 2**27, changed("ray", "the unit of get_system_memory")


def test_ray_has_a_switch_that_keeps_a_local_ray_on_loopback(monkeypatch):
    says = changed("ray", "ray_constants.ENABLE_RAY_CLUSTER")
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool), says
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    private_api.listen_on_loopback()
    assert ray_constants.ENABLE_RAY_CLUSTER is False
    # Where Ray chooses the address on which it listens, it has to read the switch.
    assert "ENABLE_RAY_CLUSTER" in inspect.getsource(services), says


def test_ray_starts_its_processes_by_a_class_that_can_be_replaced(monkeypatch):
    says = changed("ray", "services.ConsolePopen")
    monkeypatch.setattr(services, "ConsolePopen", subprocess.Popen)
    private_api.start_apart()
    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process), says
    process = services.ConsolePopen([sys.executable, "-c", "import os; print(os.getsid(0))"],
                                    stdout=subprocess.PIPE, text=True)  # fmt: skip
    said, _ = process.communicate()
    assert int(said) == process.pid != os.getsid(0), says


def test_ray_prints_what_a_dead_worker_took_with_it_by_a_function_that_can_be_silenced(monkeypatch):
    says = changed("ray", "worker.print_to_stdstream")
    assert callable(ray._private.worker.print_to_stdstream), says
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", print)
    private_api.silence_workers()
    assert ray._private.worker.print_to_stdstream("anything", key="value") is None, says


def test_ray_sets_its_handler_of_sigterm_by_a_function_that_can_be_replaced(monkeypatch):
    says = changed("ray", "utils.set_sigterm_handler")
    monkeypatch.setattr(utils, "set_sigterm_handler", utils.set_sigterm_handler)
    handler = signal.getsignal(signal.SIGTERM)
    private_api.leave_signals()
    utils.set_sigterm_handler(print)
    assert signal.getsignal(signal.SIGTERM) == handler, says
    for module in (ray._private.worker, ray._private.node):  # where a driver gets its handlers
        source = inspect.getsource(module)
        assert "utils.set_sigterm_handler(" in source, says
        assert "signal.signal(" not in source, says


def test_ray_says_what_versions_a_cluster_has():
    """What it answers is tried on a real cluster in test_cluster.py."""
    asked = inspect.signature(usage.usage_lib.get_cluster_metadata).parameters
    assert list(asked)[:1] == ["gcs_client"], changed("ray", "get_cluster_metadata")
    assert callable(GcsClient), changed("ray", "GcsClient")


def test_ray_refuses_another_version_of_itself():
    python = ".".join(map(str, sys.version_info[:3]))
    private_api.check_versions({"ray_version": ray.__version__, "python_version": python})
    with pytest.raises(RuntimeError):
        private_api.check_versions({"ray_version": "2.0.0", "python_version": python})
    assert callable(utils.check_version_info), changed("ray", "check_version_info")


def test_ray_says_whether_this_account_has_a_token(tmp_path):
    """In processes of their own: Ray keeps the first token that it finds."""
    token = tmp_path / "token"
    code = "from sweeps.execution.private_api import has_token; print(has_token())"

    def said():
        environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
        return subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT)

    assert said() == b"False\n", changed("ray", "AuthenticationTokenLoader")
    token.write_text("0" * 64)
    assert said() == b"True\n", changed("ray", "AuthenticationTokenLoader")


def test_the_loggers_that_are_silenced_are_still_rays():
    from importlib import import_module

    for name in private_api.CHATTY_LOGGERS:
        module = name if name != "ray._private.authentication" else f"{name}.authentication_utils"
        assert import_module(module), changed("ray", f"the logger {name}")


def test_ray_has_a_provider_for_aws_with_the_hooks_that_ours_overrides():
    pytest.importorskip("boto3")
    provider = private_api.aws_node_provider()
    for hook in ("fillout_available_node_types_resources", "bootstrap_config"):
        assert isinstance(inspect.getattr_static(provider, hook), staticmethod), changed(
            "ray", f"AWSNodeProvider.{hook}"
        )


def test_ray_keeps_its_ssh_connections_in_a_folder_of_this_name():
    command_runner = pytest.importorskip("ray.autoscaler._private.command_runner")
    runner = command_runner.SSHCommandRunner(
        "", "node", None, {"ssh_user": "me"}, "cluster", subprocess, False
    )
    folder = Path(runner.ssh_control_path).parent
    assert folder == private_api.ssh_folder(), changed("ray", "ssh_control_path")


def test_tune_keeps_the_errors_of_a_trial_in_a_file():
    from ray.tune.experiment import Trial

    assert isinstance(Trial.error_file, property), changed("ray", "Trial.error_file")
    assert "Failure # " in inspect.getsource(Trial), changed("ray", "the text of Trial.error_file")


def test_mlflows_tables_hold_runs_and_tags_as_they_are_read(tmp_path):
    address = StoreAddress(f"sqlite:///{tmp_path / 'mlflow.db'}")
    store = Store(address)
    store.open()
    experiment_id = store.client.create_experiment("one")
    made = store.client.create_run(experiment_id, tags={"kind": "trial", "trial_key": "k"})
    store.client.set_terminated(made.info.run_id, "FINISHED")
    (read,) = tracking_api.runs_in_database(address.uri, [experiment_id], "trial")
    known = store.client.get_run(made.info.run_id)
    says = changed("mlflow", "the tables runs and tags")
    assert {**dict(known.info), "run_name": None} == dict(read.info), says  # the one left out
    ours = {name: known.data.tags[name] for name in ("kind", "trial_key")}
    assert {name: read.data.tags.get(name) for name in ours} == ours, says
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        columns = {row[1] for row in database.execute("pragma table_info(runs)")}
    assert {"run_uuid", "lifecycle_stage", "artifact_uri"} <= columns, says


def test_mlflow_makes_an_engine_of_a_databases_address(tmp_path):
    engine = tracking_api.create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.connect() as connection:
        assert connection.dialect.name == "sqlite", changed("mlflow", "create_sqlalchemy_engine")
    engine.dispose()


def test_mlflow_copies_one_file_by_a_method_of_every_repository():
    known = inspect.signature(ArtifactRepository._download_file).parameters
    assert list(known) == ["self", "remote_file_path", "local_path"], changed("mlflow", known)
