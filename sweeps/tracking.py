"""The only writer of MLflow: one experiment a sweep, one run a trial key, found or created.

A run's timestamps are its start plus the step, so that a trial that runs again on a CPU of the same
kind writes the very points it wrote before, and MLflow keeps one of each. Metrics are a selection
for eyes; the Parquet artifacts hold everything and are what the analysis reads.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# How long a tracking server that does not answer is waited for, by driver and workers alike: every
# request is tried ten times more, after 0, 4, 8, 16, 32, 64 and then each 120 seconds, ten minutes
# in all. MLflow takes no higher number; whoever wants less sets it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "10")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType

from gptcore.config import InputError, Scalar, spelling
from gptcore.files import remove_leftovers
from gptcore.records import MemoryRecorder, Row, TrialResult
from sweeps.charts import chart_points
from sweeps.parquet import write_tables

DONE = ("finished", "diverged")
"""Of a trial's status: a diverged trial has a result."""
FLUSH_AT = 1000
"""Metrics a call: MLflow's own limit for log_batch."""


def wait_no_longer() -> None:
    """From here on in this process, a tracking server that does not answer is not waited for."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"


def open_experiment(
    client: MlflowClient, name: str, runs_dir: Path, tags: Mapping[str, str] | None = None
) -> str:
    """The id of the sweep's experiment, made if it is new, with these tags beside its others."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server keeps artifacts where it was told to; the local file keeps them beside itself.
        local = client.tracking_uri.startswith("sqlite:")
        location = (runs_dir.resolve() / "artifacts").as_uri() if local else None
        experiment_id = client.create_experiment(name, artifact_location=location)
    elif experiment.lifecycle_stage != "active":
        raise InputError(
            f"sweep {name} was deleted in MLflow: restore it there or take another --name"
        )
    else:
        experiment_id = experiment.experiment_id
    for tag, value in (tags or {}).items():
        client.set_experiment_tag(experiment_id, tag, value)
    return experiment_id


def find_run(client: MlflowClient, experiment_id: str | None, kind: str, **tags: str) -> Run | None:
    """The newest run of a kind (trial, sweep) with the given tags; None looks into every sweep."""
    experiments = [experiment_id] if experiment_id else _experiments(client)
    clauses = [f"tags.{name} = '{value}'" for name, value in {"kind": kind, **tags}.items()]
    found = client.search_runs(
        experiments,
        " and ".join(clauses),
        ViewType.ACTIVE_ONLY,
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return found[0] if found else None


def _experiments(client: MlflowClient) -> list[str]:
    return [experiment.experiment_id for experiment in client.search_experiments()]


def _running(client: MlflowClient, experiments: list[str]) -> list[Run]:
    """The trials' runs that are RUNNING."""
    return client.search_runs(
        experiments, "tags.kind = 'trial' and attributes.status = 'RUNNING'", max_results=50_000
    )


class SweepRun:
    """The sweep's own run: its plan, its report, and whether it is under way."""

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        plan: Mapping[str, Any],
        launched: float,
        looks: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the sweep's run for what is about to run.

        `launched` is a time in seconds since the epoch, by which the newest sweep is found.
        `looks`: as `keep_looks` takes them, where the sweep is looked at while it grows.
        """
        name = plan["sweep"]
        self.client = client
        run = find_run(client, experiment_id, "sweep")
        if run is None:
            # What is claimed counts as said beforehand if it was said before the first trial.
            run = client.create_run(
                experiment_id,
                run_name=f"sweep {name}",
                tags={"claims_digest": plan["claims_digest"]},
            )
        self.run_id = run.info.run_id
        self.plans(plan)
        if looks:
            self.keep_looks(looks)
        # A reader sees a sweep by its kind: it has a plan by then.
        set_tags(client, self.run_id, sweep=name, launched=f"{launched:.3f}", **plan["tags"])
        set_tags(client, self.run_id, kind="sweep")
        client.update_run(self.run_id, status="RUNNING")

    def plans(self, plan: Mapping[str, Any]) -> None:
        """Record what is about to run, in place of what was planned before."""
        self.client.log_dict(self.run_id, dict(plan), "plan.json")

    def keep_looks(self, looks: Mapping[str, Any]) -> None:
        """Record the looks taken and to come, analysis.looks' Record, in place of those before."""
        self.client.log_dict(self.run_id, dict(looks), "looks.json")
        set_tags(self.client, self.run_id, until_decided=str(len(looks["seeds"])))

    def keep(self, files: Sequence[Path], **tags: str) -> None:
        """Keep files in the run's folder `report`, then tags that say what they are."""
        for file in files:
            self.client.log_artifact(self.run_id, str(file), "report")
        if tags:
            set_tags(self.client, self.run_id, **tags)

    def report_of(self) -> str | None:
        """The tag that the latest report was kept with."""
        tag: str | None = self.client.get_run(self.run_id).data.tags.get("report_of")
        return tag

    def end(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)


class MlflowRecorder(MemoryRecorder):
    """The rows of one trial into its MLflow run."""

    def __init__(
        self,
        uri: str,
        experiment_id: str,
        key: str,
        name: str,
        params: Mapping[str, Scalar],
        tags: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.client = MlflowClient(uri)
        run = find_run(self.client, None, "trial", trial_key=key)
        if run is None:
            # All that a reader goes by is there from the start: the worker may die at any moment.
            first = {"kind": "trial", "trial_key": key, "trial_status": "running", **cut(tags)}
            run = self.client.create_run(experiment_id, run_name=f"{name} {key}", tags=first)
            if uri.startswith("http"):
                self._delete_twins(run)
        else:
            # It stays where it is: that of the sweep that wanted it first.
            tags = {**tags, "sweep": run.data.tags["sweep"]}
        self.run_id, self.start_ms = run.info.run_id, run.info.start_time
        self.artifacts = urllib.parse.urlsplit(run.info.artifact_uri)
        self.client.update_run(self.run_id, status="RUNNING")
        self.client.log_batch(
            self.run_id,
            # MLflow refuses another value for a param; what is not in the key may have one.
            params=[
                Param(name, spelling(params[name])) for name in params.keys() - run.data.params
            ],
        )
        set_tags(
            self.client,
            self.run_id,
            **tags,
            host=platform.node(),
            trial_status="running",
            reason="",
        )
        self.metrics: list[Metric] = []

    def _delete_twins(self, run: Run) -> None:
        """What a server makes that dies before it can say so: MLflow then asks for another run."""
        key = run.data.tags["trial_key"]
        for twin in self.client.search_runs(
            [run.info.experiment_id], f"tags.kind = 'trial' and tags.trial_key = '{key}'"
        ):
            if twin.info.run_id != run.info.run_id:
                self.client.delete_run(twin.info.run_id)

    def log(self, rows: Sequence[Row]) -> None:
        super().log(rows)
        for row in rows:
            for name, step, value in chart_points(row):
                self.metrics.append(Metric(name, value, self.start_ms + step, step))
        if len(self.metrics) >= FLUSH_AT:
            self._flush()

    def close(self, result: TrialResult) -> None:
        super().close(result)
        self._flush()
        if self.artifacts.scheme == "file":
            # In place: MLflow's copying would leave half a file where it is cut off.
            in_place = Path(urllib.parse.unquote(self.artifacts.path))
            for table in self.rows:
                remove_leftovers(in_place / f"{table}.parquet")
            write_tables(self.rows, in_place)
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_tables(self.rows, Path(folder))
                self.client.log_artifacts(self.run_id, folder)
        errors = {"loss_error": result.loss_error, "gradient_error": result.gradient_error}
        set_tags(
            self.client,
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
        """Close the run of a trial that broke, with the reason and, as failure.txt, the details."""
        set_tags(self.client, self.run_id, trial_status="failed", reason=reason)
        if details:
            self.client.log_text(self.run_id, details, "failure.txt")
        self.client.set_terminated(self.run_id, "FAILED")

    def _flush(self) -> None:
        for start in range(0, len(self.metrics), FLUSH_AT):
            self.client.log_batch(self.run_id, metrics=self.metrics[start : start + FLUSH_AT])
        self.metrics.clear()


def set_tags(client: MlflowClient, run_id: str, **tags: str) -> None:
    """Set tags in one call."""
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in cut(tags).items()])


def delete_tags(client: MlflowClient, run_id: str, prefix: str) -> None:
    """Delete the tags of a run whose names begin so."""
    for name in client.get_run(run_id).data.tags:
        if name.startswith(prefix):
            client.delete_tag(run_id, name)


def cut(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags no longer than MLflow takes."""
    return {name: value[:5000] for name, value in tags.items()}


def set_aside(client: MlflowClient, run: Run) -> None:
    """Keep a trial's run, marked, so that the trial counts as not run: see --redo."""
    set_tags(
        client, run.info.run_id, kind="replaced", replaced_at=time.strftime("%Y-%m-%d %H:%M:%S")
    )
    if run.info.status == "RUNNING":
        client.set_terminated(run.info.run_id, "KILLED")


def close_cut_off(client: MlflowClient, experiment_id: str) -> None:
    """Leave no trial's run of the sweep RUNNING; for a driver that knows itself to be the only one.

    A driver that was killed could not do it. Whoever runs such a trial again opens its run anew.
    """
    for run in _running(client, [experiment_id]):
        close_run(client, run, "stopped")


def close_run(client: MlflowClient, run: Run, status: str, reason: str = "") -> None:
    """End a run that nobody works on: as failed, pruned or stopped, with the reason; one that has
    its result, and died before it could say so, as finished."""
    if run.data.tags["trial_status"] in DONE:
        client.set_terminated(run.info.run_id, "FINISHED")
        return
    set_tags(client, run.info.run_id, trial_status=status, reason=reason)
    client.set_terminated(run.info.run_id, "FAILED" if status == "failed" else "KILLED")


def close_runs(
    store: Mapping[str, str],
    jobs: Iterable[Mapping[str, Any]],
    failed: Mapping[str, str],
    retried: Mapping[str, Sequence[str]],
    pruned: Mapping[str, str],
) -> None:
    """Leave nobody's run RUNNING when no job runs any more.

    `failed` says why, by trial key, for the jobs that broke: a worker that died could not say so
    itself, or had not even begun its run. A run still RUNNING beside those was stopped: KILLED.
    `retried` says of those that lost a worker, and went on with another, why; `pruned` of those
    that a search gave up, when.
    """
    client = MlflowClient(store["uri"])
    # Asked once: a question for each of thousands that have ended well would take minutes.
    running = {run.data.tags["trial_key"]: run for run in _running(client, _experiments(client))}
    for job in jobs:
        key = job["key"]
        run = running.get(key)
        if key in failed or key in retried:
            run = find_run(client, None, "trial", trial_key=key)
        if run and key in retried:
            why = "; ".join(retried[key])
            set_tags(client, run.info.run_id, retries=str(len(retried[key])), retried_because=why)
        if run is None and key in failed:
            MlflowRecorder(store["uri"], store["experiment_id"], **job).fail(failed[key])
        elif run and run.info.status == "RUNNING" and key in failed:
            close_run(client, run, "failed", failed[key])
        elif run and run.info.status == "RUNNING" and key in pruned:
            close_run(client, run, "pruned", pruned[key])
        elif run and run.info.status == "RUNNING":
            close_run(client, run, "stopped")
