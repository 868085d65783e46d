import multiprocessing
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest
import requests
import torch

from analysis.runs import connect, trial_runs
from gptcore import checkpoint
from gptcore.config import TrialConfig
from gptcore.corpus import GIVEN, Corpus
from gptcore.experiment import check_trial, run_trial
from gptcore.records import TABLES
from helpers.trials import undisturbed, undisturbed_tables
from sweeps.execution import trainable
from sweeps.execution.trainable import run_batch
from tracking import recorder as tracking
from tracking.recorder import MlflowRecorder, open_experiment


def test_a_worker_that_sees_another_text_than_the_driver_refuses_the_trial(
    tiny, tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr(trainable.tune, "report", told.append)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    store = {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}
    job = {
        "key": "planned",
        "name": "a trial",
        "params": tiny.to_flat(),
        "tags": {"sweep": "sweep"},
    }
    run_batch({"store": store, "runs_dir": str(tmp_path), "batch": [job]})
    assert told[0]["status"] == "failed"
    assert "its corpus or its gptcore is not the driver's" in told[0]["reason"]
    run = trial_runs(client)["planned"]
    assert run.info.status == "FAILED"
    assert "is not the driver's" in run.data.tags["reason"]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["failure.txt"]


def test_a_trial_that_tune_cut_off_goes_on_and_its_run_holds_every_point_once(
    tiny, tmp_path, monkeypatch
):
    """Outside Tune, with a report that cuts the trial off where one stopped by Tune would end."""
    config = replace(tiny, train=replace(tiny.train, checkpoint_seconds=0.0))
    key = config.key(check_trial(config).digest)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    store = {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}
    job = {"key": key, "name": "a trial", "params": config.to_flat(), "tags": {"sweep": "sweep"}}
    monkeypatch.setattr(trainable, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", float("inf"))
    trained, batch = [], Corpus.batch
    monkeypatch.setattr(
        Corpus,
        "batch",
        lambda self, step, **knobs: trained.append(step) or batch(self, step, **knobs),
    )

    def report_until(last):
        def report(result):
            if result["step"] == last:
                raise SystemExit

        monkeypatch.setattr(trainable.tune, "report", report)

    report_until(3)
    with pytest.raises(SystemExit):
        run_batch({"store": store, "runs_dir": str(tmp_path), "batch": [job]})
    report_until(None)
    run_batch({"store": store, "runs_dir": str(tmp_path), "batch": [job]})
    assert trained == [0, 1, 2, 3, 3, 4, 5]
    run = trial_runs(client)[key]
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "loss/train")
    assert [point.step for point in points] == [0, 1, 2, 3, 4, 5]

    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    for table, expected in undisturbed_tables(config).items():
        assert pl.read_parquet(artifacts / f"{table}.parquet").equals(expected), table


@contextmanager
def cutting_one_answer(server, what):
    """An address that hands everything on to the server, but breaks off in the middle of the first
    answer to a request whose path has `what` in it."""
    cut = threading.Event()

    class Between(BaseHTTPRequestHandler):
        def hand_on(self):
            answer = requests.request(
                self.command,
                server + self.path,
                data=self.rfile.read(int(self.headers.get("Content-Length", 0))),
                headers={"Content-Type": self.headers.get("Content-Type", "")},
            )
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            breaks_off = what in self.path and not cut.is_set()
            self.wfile.write(answer.content[:-1] if breaks_off else answer.content)
            if breaks_off:
                cut.set()

        do_GET = do_POST = do_PUT = do_PATCH = hand_on

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Between) as between:
        threading.Thread(target=between.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{between.server_port}"
        between.shutdown()
    assert cut.is_set()


@pytest.mark.parametrize(
    ("seed", "what"),
    [
        (0, "runs/search"),
        (1, "runs/create"),
        (2, "runs/log-batch"),
        (3, "mlflow-artifacts"),
        (4, "runs/update"),
    ],
)
def test_an_answer_that_a_server_did_not_end_is_asked_for_again(
    server_sweep, tiny, tmp_path, monkeypatch, seed, what
):
    """MLflow by itself asks again where a server does not answer at all."""
    told = []
    monkeypatch.setattr(trainable.tune, "report", told.append)
    config = replace(tiny, init=replace(tiny.init, seed=90 + seed))
    key = config.key(check_trial(config).digest)
    with cutting_one_answer(server_sweep, what) as uri:
        store = {"uri": uri, "experiment_id": open_experiment(connect(uri), "cut off", tmp_path)}
        job = {"key": key, "name": "a trial", "params": config.to_flat(), "tags": {"sweep": "cut"}}
        run_batch({"store": store, "runs_dir": str(tmp_path), "batch": [job]})
    assert told[-1] == {"trial_key": key, "step": 5, "status": "finished"}
    client = connect(server_sweep)
    (run,) = client.search_runs([store["experiment_id"]], f"tags.trial_key = '{key}'")
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "loss/train")
    assert [point.step for point in points] == [0, 1, 2, 3, 4, 5]
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts == {f"{table}.parquet" for table in TABLES}


def _hold(key, runs_dir, held, release):
    with trainable.alone_with([key], runs_dir):
        held.set()
        release.wait(60)


def test_a_trial_that_another_process_runs_is_waited_for_and_not_run_again(
    tiny, tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr(trainable.tune, "report", told.append)
    key = tiny.key(check_trial(tiny).digest)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    store = {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}
    job = {"key": key, "name": "a trial", "params": tiny.to_flat(), "tags": {"sweep": "sweep"}}
    config = {"store": store, "runs_dir": str(tmp_path), "batch": [job]}
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(key, tmp_path, held, release))
    other.start()
    assert held.wait(60)
    waiting = threading.Thread(target=run_batch, args=[config])
    waiting.start()
    waiting.join(3)
    assert waiting.is_alive()
    assert trial_runs(client) == {}
    # The other one is done with it: the trial is run once.
    recorder = MlflowRecorder(**store, **job)
    run_trial(tiny, recorder)
    release.set()
    waiting.join(60)
    other.join(60)
    assert told == [{"trial_key": key, "step": tiny.train.steps, "status": "finished"}]
    assert trial_runs(client)[key].info.run_id == recorder.run_id


def test_a_text_that_is_not_on_this_machine_is_given_with_the_trial(tiny, tmp_path, monkeypatch):
    elsewhere = "/nowhere/book.txt"
    text = {elsewhere: ("All of it is elsewhere, said the captain. " * 200, "the driver")}
    config = replace(tiny, corpus=replace(tiny.corpus, name=elsewhere))
    monkeypatch.setattr(trainable.tune, "report", lambda _: None)
    for name, given in text.items():
        monkeypatch.setitem(GIVEN, name, given)
    key = config.key(check_trial(config).digest)
    monkeypatch.delitem(GIVEN, elsewhere)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    store = {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}
    job = {"key": key, "name": "a trial", "params": config.to_flat(), "tags": {"sweep": "sweep"}}
    work = {"store": store, "runs_dir": str(tmp_path), "batch": [job]}
    run_batch(work)
    assert trial_runs(client)[key].info.status == "FAILED"  # nobody gave it
    run_batch(work, text)
    del GIVEN[elsewhere]
    assert trial_runs(client)[key].info.status == "FINISHED"


def test_a_trial_whose_gpu_is_lost_is_left_to_another_worker(tiny, tmp_path, monkeypatch):
    def lose(*_):
        raise torch.AcceleratorError("CUDA error: the device fell off the bus\nCompile with ...")

    monkeypatch.setattr(trainable, "run_trials", lose)
    key = tiny.key(check_trial(tiny).digest)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    store = {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}
    job = {"key": key, "name": "a trial", "params": tiny.to_flat(), "tags": {"sweep": "sweep"}}
    # Of what a worker raises, Tune makes another worker.
    with pytest.raises(RuntimeError, match="the GPU failed: CUDA error: the device fell off the"):
        run_batch({"store": store, "runs_dir": str(tmp_path), "batch": [job]})
    # Neither failed nor closed: the driver does that, once nobody goes on with it.
    assert trial_runs(client)[key].data.tags["trial_status"] == "running"


@pytest.fixture
def three(tiny, tmp_path, monkeypatch):
    """Three trials that go together, one of which diverges, as a batch; -> it, what Tune is told,
    and the store's client."""
    told = []
    monkeypatch.setattr(trainable.tune, "report", told.append)
    plain = tiny.to_flat()
    configs = [
        TrialConfig.from_flat({**plain, **knobs})
        for knobs in (
            {"init.seed": 0},
            {"init.scheme": "normal", "init.std": 1e18},
            {"init.seed": 2, "corpus.subset": "0-0.5"},
        )
    ]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = connect(uri)
    store = {"uri": uri, "experiment_id": open_experiment(client, "sweep", tmp_path)}
    jobs = [
        {
            "key": config.key(check_trial(config).digest),
            "name": "a trial",
            "params": config.to_flat(),
            "tags": {"sweep": "sweep"},
        }
        for config in configs
    ]
    return {"store": store, "runs_dir": str(tmp_path), "batch": jobs}, told, client


def losses_of(client, key):
    run_id = trial_runs(client)[key].info.run_id
    return [point.value for point in client.get_metric_history(run_id, "loss/train")]


def test_trials_of_an_array_leave_what_each_leaves_alone(three, tmp_path):
    work, told, client = three
    run_batch(work)
    first, wild, last = (job["key"] for job in work["batch"])
    statuses = {one["trial_key"]: one["status"] for one in told if "status" in one}
    assert statuses == {first: "finished", wild: "diverged", last: "finished"}
    runs = trial_runs(client)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags["array"] for run in runs.values()} == {"3"}
    for job in (work["batch"][0], work["batch"][2]):
        alone = undisturbed(TrialConfig.from_flat(job["params"]))
        expected = [row.loss for row in alone.rows["training"]]
        assert losses_of(client, job["key"]) == expected
    told.clear()
    run_batch(work)  # as another sweep might, that wants the same trials
    assert {one["trial_key"]: one["status"] for one in told} == statuses


def _take(key, runs_dir):
    with trainable.alone_with([key], runs_dir):
        pass


def free(keys, runs_dir):
    """Those of the trials that another process could run now."""
    fork = multiprocessing.get_context("fork")
    others = {key: fork.Process(target=_take, args=(key, runs_dir)) for key in keys}
    for other in others.values():
        other.start()
        other.join(2)
        other.kill()
        other.join()
    return [key for key, other in others.items() if other.exitcode == 0]


def test_a_trial_of_an_array_that_has_its_result_is_free_while_the_others_train(
    three, tmp_path, monkeypatch
):
    work, _, _ = three
    keys = [job["key"] for job in work["batch"]]
    found = {}

    def told(result):
        if "status" in result:
            found[result["trial_key"]] = free(keys, tmp_path)

    monkeypatch.setattr(trainable.tune, "report", told)
    run_batch(work)
    first, wild, last = keys
    assert found == {wild: [wild], first: [first, wild], last: keys}


def test_a_trial_that_cannot_begin_leaves_the_array_to_the_others(three):
    work, told, client = three
    work["batch"][0]["key"] = "planned"
    run_batch(work)
    statuses = {one["trial_key"]: one["status"] for one in told if "status" in one}
    assert list(statuses.values()) == ["failed", "diverged", "finished"]
    assert trial_runs(client)["planned"].info.status == "FAILED"


def test_an_array_that_breaks_goes_on_as_single_trials_and_the_broken_one_alone_fails(
    three, monkeypatch
):
    work, told, client = three
    broken = work["batch"][2]["key"]
    run, sizes = trainable.run_trials, []

    def counted(trials):
        sizes.append(len(trials))
        return run(trials)

    log = trainable.MlflowRecorder.log

    def break_at_step_3(recorder, rows):
        log(recorder, rows)
        at_3 = any(getattr(row, "step", 0) == 3 for row in rows)
        if at_3 and trial_runs(client)[broken].info.run_id == recorder.run_id:
            raise ArithmeticError("no such number")

    monkeypatch.setattr(trainable, "run_trials", counted)
    monkeypatch.setattr(trainable.MlflowRecorder, "log", break_at_step_3)
    run_batch(work)
    statuses = {one["trial_key"]: one["status"] for one in told if "status" in one}
    assert sizes == [3, 1, 1]  # one had diverged by then
    assert list(statuses.values()) == ["diverged", "finished", "failed"]
    assert "no such number" in trial_runs(client)[broken].data.tags["reason"]


def test_an_array_that_was_cut_off_goes_on_and_holds_every_point_once(three, monkeypatch):
    work, told, client = three
    for job in work["batch"]:
        job["params"]["train.checkpoint_seconds"] = 0.0
    monkeypatch.setattr(trainable, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", float("inf"))
    monkeypatch.setattr(tracking, "FLUSH_AT", 1)

    def cut(result):
        if result["step"] == 3:
            raise SystemExit

    monkeypatch.setattr(trainable.tune, "report", cut)
    with pytest.raises(SystemExit):
        run_batch(work)
    first = work["batch"][0]["key"]
    assert len(losses_of(client, first)) == 4  # which come again
    monkeypatch.setattr(trainable.tune, "report", told.append)
    run_batch(work)
    for job in (work["batch"][0], work["batch"][2]):
        assert len(losses_of(client, job["key"])) == job["params"]["train.steps"] + 1
    assert {run.info.status for run in trial_runs(client).values()} == {"FINISHED"}
