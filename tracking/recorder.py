"""The rows of a trial into its MLflow run, and the end of runs that nobody works on any more.

A run's timestamps are its start plus the step, so that a trial that runs again on a CPU of the same
kind writes the very points that it wrote before, and MLflow keeps one of each. Metrics are a
selection for charts; the Parquet files hold everything and are what the analysis reads.
"""

from __future__ import annotations

import platform
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mlflow.entities import Metric, Param, Run

from gptcore.config import spelling
from gptcore.files import remove_leftovers
from gptcore.records import MemoryRecorder, Row, TrialResult
from tracking.charts import chart_points
from tracking.job import Job
from tracking.lease import works_elsewhere
from tracking.private_api import RUN_COLOUR_TAG
from tracking.store import DONE, MADE_BY, Store, cut_tags, delete_twins
from tracking.tables import write_tables

FLUSH_AT = 1000
"""Metrics of one call: MLflow's own limit for log_batch."""


class MlflowRecorder(MemoryRecorder):
    """Writes the rows of one trial into its MLflow run."""

    def __init__(self, store: Store, run: Run, job: Job) -> None:
        """Begin to write, or go on, into the run of the trial, which may be of another sweep."""
        super().__init__()
        self.store, self.client = store, store.client
        # It stays where it is: a run of the sweep that asked for it first.
        tags = {**job.tags, "sweep": run.data.tags.get("sweep", job.tags.get("sweep", ""))}
        self.run_id, self.start_ms = run.info.run_id, run.info.start_time
        self.folder = store.folder_of(run)
        self.client.update_run(self.run_id, status="RUNNING")
        self.client.log_batch(
            self.run_id,
            # MLflow refuses another value for a param; what is not in the key may have one.
            params=[
                Param(name, spelling(job.params[name]))
                for name in job.params.keys() - run.data.params
            ],
        )
        self.store.set_tags(
            self.run_id,
            **tags,
            host=platform.node(),
            trial_status="running",
            reason="",
        )
        self.metrics: list[Metric] = []

    def log(self, rows: Sequence[Row]) -> None:
        """Keep rows, and send the points of MLflow's charts in batches."""
        super().log(rows)
        for row in rows:
            for name, step, value in chart_points(row):
                self.metrics.append(Metric(name, value, self.start_ms + step, step))
        if len(self.metrics) >= FLUSH_AT:
            self._flush()

    def close(self, result: TrialResult) -> None:
        """Write the tables as Parquet files, and end the run with the result."""
        super().close(result)
        self._flush()
        if self.folder:
            # Written in place: MLflow copies files, and would leave half a file if it were cut off.
            for table in self.rows:
                remove_leftovers(self.folder / f"{table}.parquet")
            write_tables(self.rows, self.folder)
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_tables(self.rows, Path(folder))
                self.client.log_artifacts(self.run_id, folder)
        errors = {"loss_error": result.loss_error, "gradient_error": result.gradient_error}
        self.store.set_tags(
            self.run_id,
            **{name: f"{error:.2e}" for name, error in errors.items() if error is not None},
            trial_status=result.status,
            reason=result.reason,
            steps=str(result.steps),
            device=result.device,
            seconds=f"{result.seconds:.1f}",
            tokens_per_second=f"{result.tokens_per_second:.0f}",
        )
        self.client.set_terminated(self.run_id, "FINISHED")

    def fail(self, reason: str, details: str = "") -> None:
        """End the run as failed, with the reason and, in failure.txt, the details."""
        self.store.set_tags(self.run_id, trial_status="failed", reason=reason)
        if details:
            self.client.log_text(self.run_id, details, "failure.txt")
        self.client.set_terminated(self.run_id, "FAILED")

    def _flush(self) -> None:
        for start in range(0, len(self.metrics), FLUSH_AT):
            self.client.log_batch(self.run_id, metrics=self.metrics[start : start + FLUSH_AT])
        self.metrics.clear()


def make_run(store: Store, experiment_id: str, job: Job) -> Run:
    """Make a run for a trial, which is then under way; delete_twins may have to follow."""
    # A run has the tags that readers need from the start: a worker may die at any moment.
    first = {"kind": "trial", "trial_key": job.key, "trial_status": "running", **MADE_BY}
    # Set only once, because a user may choose another colour.
    colour = {RUN_COLOUR_TAG: job.colour} if job.colour else {}
    attempt = {"attempt": uuid.uuid4().hex} if store.address.is_server else {}
    return store.client.create_run(
        experiment_id,
        run_name=job.name,
        tags={**first, **colour, **attempt, **cut_tags(job.tags)},
    )


RUNNING = "tags.kind = 'trial' and attributes.status = 'RUNNING'"
"""MLflow's condition for the runs of trials that are under way, or were when they were cut off."""


def _running(store: Store, experiment_id: str | None = None) -> list[Run]:
    """List the runs of our trials that are under way, or were when they were cut off."""
    return [run for run in store.search(RUNNING, experiment_id) if "trial_key" in run.data.tags]


def close_cut_off(store: Store, experiment_id: str, owner: str | None = None) -> None:
    """End the runs of a sweep's trials that a killed driver left RUNNING.

    Only the driver that holds the sweep's lock may call it. A worker that runs such a trial again
    opens its run again.

    Args:
        store: where the runs are.
        experiment_id: the sweep's experiment.
        owner: the name by which this driver owns trials, in a store with leases. A trial on which
            another sweep works is left alone.
    """
    for run in _running(store, experiment_id):
        if not (owner and works_elsewhere(store, run, owner)):
            close_run(store, run, "stopped")


Unfinished = Literal["failed", "pruned", "stopped"]
"""The status of a trial that ended without a result."""


def close_run(store: Store, run: Run, status: Unfinished, reason: str = "") -> None:
    """End the run of a trial that no worker runs.

    Args:
        store: where the run is.
        run: a run whose trial has its result ends as finished, whatever `status` says: its worker
            died before it could do so.
        status: what became of the trial otherwise.
        reason: why.
    """
    if run.data.tags.get("trial_status") in DONE:
        store.client.set_terminated(run.info.run_id, "FINISHED")
        return
    store.set_tags(run.info.run_id, trial_status=status, reason=reason)
    store.client.set_terminated(run.info.run_id, "FAILED" if status == "failed" else "KILLED")


def close_runs(
    store: Store,
    experiment_id: str,
    jobs: Iterable[Job],
    failed: Mapping[str, str],
    retried: Mapping[str, Sequence[str]],
    pruned: Mapping[str, str],
    owner: str | None = None,
) -> None:
    """End every run that is still RUNNING once no worker runs any more.

    Args:
        store: where the runs are.
        experiment_id: where the run of a trial is made that failed before it had one.
        jobs: the trials.
        failed: by trial key, why it failed: a worker that died could not say so itself.
        retried: by trial key, why it went on with another worker, each time.
        pruned: by trial key, at which step a search gave it up.
        owner: as for close_cut_off.

    All other runs that are RUNNING were stopped by the user.
    """
    # One query for all: one for each of thousands of trials that ended well would take minutes.
    running = {run.data.tags["trial_key"]: run for run in _running(store)}
    for job in jobs:
        key = job.key
        run = running.get(key)
        if key in failed or key in retried:
            run = store.find_run("trial", trial_key=key)
        if run and key in retried:
            why = "; ".join(retried[key])
            store.set_tags(run.info.run_id, retries=str(len(retried[key])), retried_because=why)
        if run is None:
            if key in failed:
                run = make_run(store, experiment_id, job)
                delete_twins(store, run, store.find_runs("trial", experiment_id, trial_key=key))
                MlflowRecorder(store, run, job).fail(failed[key])
        elif run.info.status == "RUNNING" and not (owner and works_elsewhere(store, run, owner)):
            status: Unfinished = (
                "failed" if key in failed else "pruned" if key in pruned else "stopped"
            )
            close_run(store, run, status, failed.get(key) or pruned.get(key, ""))
