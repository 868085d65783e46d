import pytest

from analysis.runs import connect, trial_runs
from gptcore.config import InputError
from sweeps.tracking import open_experiment
from sweeps.trainable import run_batch


def test_a_worker_that_sees_another_text_than_the_driver_refuses_the_trial(tiny, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    store = {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}
    job = {"key": "planned", "params": tiny.to_flat(), "tags": {}}
    with pytest.raises(InputError, match="its corpus or its gptcore is not the driver's"):
        run_batch({"store": store, "runs_dir": str(tmp_path), "batch": [job]})
    run = trial_runs(client, "sweep")["planned"]
    assert run.info.status == "FAILED"
    assert "is not the driver's" in run.data.tags["reason"]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["failure.txt"]
