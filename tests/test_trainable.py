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

from gptcore import checkpoint
from gptcore.config import TrialConfig
from gptcore.corpus import Corpus
from gptcore.experiment import check_trial, run_trial
from gptcore.records import TABLES
from helpers.store import job_of, open_store, recorder_of, worker_config
from helpers.trials import undisturbed, undisturbed_tables
from sweeps.execution import trainable
from sweeps.execution.trainable import TrialReport, run_batch
from tracking import recorder


@pytest.fixture
def told(monkeypatch):
    """What workers of this process tell Tune."""
    reports = []
    monkeypatch.setattr(
        trainable.tune, "report", lambda result: reports.append(TrialReport.of(result))
    )
    return reports


@pytest.fixture
def work_of(store, experiment_id, tmp_path):
    """Return a function that makes, of jobs, what Tune gives a worker."""
    return lambda *jobs: worker_config(store, experiment_id, tmp_path, jobs)


def statuses_of(told):
    """By trial key the status that a worker told of at last."""
    return {report.trial_key: report.status for report in told if report.status}


def test_a_worker_that_sees_another_text_than_the_driver_refuses_the_trial(
    tiny, store, work_of, told
):
    run_batch(work_of(job_of(tiny, "planned")))
    assert told[0].status == "failed"
    assert (
        "the worker has another text or another version of gptcore than the driver"
        in told[0].reason
    )
    run = store.trial_runs()["planned"]
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"] == told[0].reason
    assert [file.path for file in store.client.list_artifacts(run.info.run_id)] == ["failure.txt"]


def test_the_last_report_of_a_trial_has_its_last_loss(tiny, store, work_of, told):
    run_batch(work_of(job := job_of(tiny)))
    loss = undisturbed_tables(tiny)["training"]["loss"][-1]
    assert told[-1] == TrialReport(trial_key=job.key, step=5, loss=loss, status="finished")


def test_a_trial_that_tune_cut_off_goes_on_and_its_run_holds_every_point_once(
    tiny, store, work_of, monkeypatch
):
    """Outside Tune, with a report that cuts the trial off where one stopped by Tune would end."""
    config = replace(tiny, train=replace(tiny.train, checkpoint_seconds=0.0))
    job = job_of(config)
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
        run_batch(work_of(job))
    report_until(None)
    run_batch(work_of(job))
    assert trained == [0, 1, 2, 3, 3, 4, 5]
    run = store.trial_runs()[job.key]
    assert run.info.status == "FINISHED"
    points = store.client.get_metric_history(run.info.run_id, "loss/train")
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
    server_sweep, tiny, tmp_path, told, seed, what
):
    """MLflow by itself asks again where a server does not answer at all."""
    config = replace(tiny, init=replace(tiny.init, seed=90 + seed))
    job = job_of(config, sweep="cut")
    experiment_id = open_store(server_sweep).open_experiment("cut off", tmp_path)
    with cutting_one_answer(server_sweep, what) as uri:
        store = open_store(uri)
        run_batch(worker_config(store, experiment_id, tmp_path, [job]))
    assert replace(told[-1], loss=None) == TrialReport(trial_key=job.key, step=5, status="finished")
    client = open_store(server_sweep).client
    (run,) = client.search_runs([experiment_id], f"tags.trial_key = '{job.key}'")
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "loss/train")
    assert [point.step for point in points] == [0, 1, 2, 3, 4, 5]
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts == {f"{table}.parquet" for table in TABLES}


def _hold(key, runs_dir, held, release):
    with trainable.trial_locks([key], runs_dir):
        held.set()
        release.wait(60)


def test_a_trial_that_another_process_runs_is_waited_for_and_not_run_again(
    tiny, store, experiment_id, work_of, told, tmp_path
):
    job = job_of(tiny)
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(job.key, tmp_path, held, release))
    other.start()
    assert held.wait(60)
    waiting = threading.Thread(target=run_batch, args=[work_of(job)])
    waiting.start()
    waiting.join(3)
    assert waiting.is_alive()
    assert store.trial_runs() == {}
    # The other one is done with it: the trial is run once.
    first = recorder_of(store, experiment_id, job)
    run_trial(tiny, first)
    release.set()
    waiting.join(60)
    other.join(60)
    assert told == [TrialReport(trial_key=job.key, step=tiny.train.steps, status="finished")]
    assert store.trial_runs()[job.key].info.run_id == first.run_id


def test_a_text_that_is_not_on_this_machine_is_given_with_the_trial(tiny, store, work_of, told):
    elsewhere = "/nowhere/book.txt"
    text = {elsewhere: ("All of it is elsewhere, said the captain. " * 200, "the driver")}
    config = replace(tiny, corpus=replace(tiny.corpus, name=elsewhere))
    job = job_of(config, config.key(check_trial(config, text).digest))
    run_batch(work_of(job))
    assert store.trial_runs()[job.key].info.status == "FAILED"  # nobody gave it
    run_batch(work_of(job), text)
    assert store.trial_runs()[job.key].info.status == "FINISHED"


def test_a_trial_whose_gpu_is_lost_is_left_to_another_worker(tiny, store, work_of, monkeypatch):
    def lose(*_):
        raise torch.AcceleratorError("CUDA error: the device fell off the bus\nCompile with ...")

    monkeypatch.setattr(trainable, "run_trials", lose)
    job = job_of(tiny)
    # Of what a worker raises, Tune makes another worker.
    with pytest.raises(RuntimeError, match="the GPU failed: CUDA error: the device fell off the"):
        run_batch(work_of(job))
    # Neither failed nor closed: the driver does that, once nobody goes on with it.
    assert store.trial_runs()[job.key].data.tags["trial_status"] == "running"


@pytest.fixture
def three(tiny):
    """Three trials that go together, the second of which diverges."""
    plain = tiny.to_flat()
    configs = [
        TrialConfig.from_flat({**plain, **knobs})
        for knobs in (
            {"init.seed": 0},
            {"init.scheme": "normal", "init.std": 1e18},
            {"init.seed": 2, "corpus.subset": "0-0.5"},
        )
    ]
    return [job_of(config) for config in configs]


def losses_of(store, job):
    run_id = store.trial_runs()[job.key].info.run_id
    return [point.value for point in store.client.get_metric_history(run_id, "loss/train")]


def test_trials_of_an_array_leave_what_each_leaves_alone(three, store, work_of, told):
    run_batch(work_of(*three))
    first, wild, last = three
    statuses = statuses_of(told)
    assert statuses == {first.key: "finished", wild.key: "diverged", last.key: "finished"}
    runs = store.trial_runs()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags["array"] for run in runs.values()} == {"3"}
    for job in (first, last):
        alone = undisturbed(TrialConfig.from_flat(job.params))
        expected = [row.loss for row in alone.rows["training"]]
        assert losses_of(store, job) == expected
    told.clear()
    run_batch(work_of(*three))  # as another sweep might, that wants the same trials
    assert {report.trial_key: report.status for report in told} == statuses


def _take(key, runs_dir):
    with trainable.trial_locks([key], runs_dir):
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
    three, work_of, tmp_path, monkeypatch
):
    keys = [job.key for job in three]
    found = {}

    def hear(result):
        if "status" in result:
            found[result["trial_key"]] = free(keys, tmp_path)

    monkeypatch.setattr(trainable.tune, "report", hear)
    run_batch(work_of(*three))
    first, wild, last = keys
    assert found == {wild: [wild], first: [first, wild], last: keys}


def test_a_trial_that_cannot_begin_leaves_the_array_to_the_others(three, store, work_of, told):
    first, *others = three
    run_batch(work_of(replace(first, key="planned"), *others))
    assert list(statuses_of(told).values()) == ["failed", "diverged", "finished"]
    assert store.trial_runs()["planned"].info.status == "FAILED"


def test_an_array_that_breaks_goes_on_as_single_trials_and_the_broken_one_alone_fails(
    three, store, work_of, told, monkeypatch
):
    broken = three[2].key
    run, sizes = trainable.run_trials, []

    def counted(trials, texts):
        sizes.append(len(trials))
        return run(trials, texts)

    log = trainable.MlflowRecorder.log

    def break_at_step_3(self, rows):
        log(self, rows)
        at_3 = any(getattr(row, "step", 0) == 3 for row in rows)
        if at_3 and store.trial_runs()[broken].info.run_id == self.run_id:
            raise ArithmeticError("no such number")

    monkeypatch.setattr(trainable, "run_trials", counted)
    monkeypatch.setattr(trainable.MlflowRecorder, "log", break_at_step_3)
    run_batch(work_of(*three))
    assert sizes == [3, 1, 1]  # one had diverged by then
    assert list(statuses_of(told).values()) == ["diverged", "finished", "failed"]
    assert "no such number" in store.trial_runs()[broken].data.tags["reason"]


def test_an_array_that_was_cut_off_goes_on_and_holds_every_point_once(
    three, store, work_of, monkeypatch
):
    jobs = [replace(job, params={**job.params, "train.checkpoint_seconds": 0.0}) for job in three]
    monkeypatch.setattr(trainable, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", float("inf"))
    monkeypatch.setattr(recorder, "FLUSH_AT", 1)

    def cut(result):
        if result["step"] == 3:
            raise SystemExit

    monkeypatch.setattr(trainable.tune, "report", cut)
    with pytest.raises(SystemExit):
        run_batch(work_of(*jobs))
    assert len(losses_of(store, jobs[0])) == 4  # which come again
    monkeypatch.setattr(trainable.tune, "report", lambda _: None)
    run_batch(work_of(*jobs))
    for job in (jobs[0], jobs[2]):
        assert len(losses_of(store, job)) == job.params["train.steps"] + 1
    assert {run.info.status for run in store.trial_runs().values()} == {"FINISHED"}
