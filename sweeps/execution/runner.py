"""Trials on Ray Tune: a grid that is known beforehand, or what a search suggests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import tune
from rich.console import Console

from gptcore.corpus import Texts
from sweeps.estimate.packing import Batch
from sweeps.execution.faults import Fault
from sweeps.execution.interrupts import on_interrupt
from sweeps.execution.progress import StopTune, SweepProgress, TrialOutcomes, key_of
from sweeps.execution.ray_cluster import stop_ray
from sweeps.execution.resources import autoscaler_machines, slots
from sweeps.execution.trainable import Recording, run_batch
from tracking.health import reporting_absence
from tracking.recorder import Job, close_runs
from tracking.store import Store, bucket, stop_waiting

if TYPE_CHECKING:
    from sweeps.searching.study import Suggestions

RETRIES, RETRIES_ON_SPOT = 2, 10
"""How often a trial whose worker dies goes on with another one, and where machines come and go.
An error of the trial's own is not tried again."""

TRIALS_PER_TUNER_RUN, ROUNDS_PER_SLOT = 500, 20
"""Tune is given so many batches at a time, or as many as fill every slot so many times: it keeps
70 kB of each, finished or not, and goes through all of them again and again."""


@dataclass(frozen=True)
class Run:
    """What both kinds of run need: where trials are recorded, and what they are told."""

    store: Store
    recording: Recording
    texts: Texts
    console: Console


def run_grid(jobs: Sequence[Job], batches: Sequence[Batch], run: Run) -> bool:
    """Run trials that are known beforehand. Return whether the user stopped them.

    Afterwards no job's MLflow run is RUNNING: one that failed has its reason, one that Ctrl-C
    stopped is KILLED.

    Args:
        jobs: the trials.
        batches: which of them train together, and what each batch needs of a machine.
        run: where trials are recorded, and what they are told.

    Raises:
        Fault: something ended the sweep before its trials did.
    """
    outcomes = TrialOutcomes({job.key: int(job.params["train.steps"]) for job in jobs}, len(jobs))
    progress = SweepProgress(run.console, outcomes)
    kinds = {str(batch.needs): batch for batch in batches}.values()
    size = max(TRIALS_PER_TUNER_RUN, ROUNDS_PER_SLOT * max(slots(kind.needs) for kind in kinds))
    job_of = {job.key: job for job in jobs}
    batch_of = {batch.keys[0]: [job_of[key] for key in batch.keys] for batch in batches}
    needs = {batch.keys[0]: batch.needs for batch in batches}
    with _closing_runs(jobs, outcomes, run), _stopping(progress, run) as stopped:
        for start in range(0, len(batches), size):
            portion = [batch.keys[0] for batch in batches[start : start + size]]
            space = {
                "recording": run.recording,
                # Tune copies its whole space for every trial of it.
                "key": tune.grid_search(portion),
                "batch": tune.sample_from(lambda config: batch_of[config["key"]]),
            }
            make_tuner(run, progress, needs, param_space=space).fit()
        stopped.clear()
    return bool(stopped)


def run_search(suggestions: Suggestions, batch: Batch, run: Run) -> bool:
    """Run the trials that a search suggests, each like the one batch. Return as run_grid."""
    outcomes = TrialOutcomes({}, suggestions.left)
    progress = SweepProgress(run.console, outcomes, suggestions.errors)
    if autoscaler_machines():  # by itself Tune asks for one machine after the other
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots(batch.needs))
    with _closing_runs(suggestions.jobs, outcomes, run), _stopping(progress, run) as stopped:
        make_tuner(run, progress, {}, batch.needs, suggestions).fit()
        stopped.clear()
    return bool(stopped)


def make_tuner(
    run: Run,
    progress: SweepProgress,
    needs: Mapping[str, Mapping[str, float]],
    need: Mapping[str, float] | None = None,
    search: Suggestions | None = None,
    param_space: dict[str, Any] | None = None,
) -> tune.Tuner:
    """Make a Tuner of run_batch.

    Args:
        run: where trials are recorded, and what they are told.
        progress: shows what Tune says.
        needs: what a batch takes of a machine, by the key of its first trial.
        need: what any other batch takes.
        search: suggests the trials; None for a grid.
        param_space: the grid.
    """
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_batch, texts=dict(run.texts)),
            lambda config: tune.PlacementGroupFactory(
                [dict(needs.get(key_of(config), need or {}))]
            ),
        ),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            trial_name_creator=lambda trial: key_of(trial.config),
            trial_dirname_creator=lambda trial: key_of(trial.config),
            search_alg=search,
            num_samples=search.left if search else 1,
        ),
        run_config=tune.RunConfig(
            name=f"{time.time():.3f}",
            storage_path=f"{bucket() or run.recording.runs_dir}/ray",
            stop=search.prunes if search else None,
            callbacks=[progress],
            failure_config=tune.FailureConfig(
                max_failures=RETRIES_ON_SPOT if autoscaler_machines() else RETRIES
            ),
            verbose=0,
        ),
    )


@contextmanager
def _stopping(progress: SweepProgress, run: Run) -> Iterator[list[str]]:
    """Inside, Ctrl-C and SIGTERM stop Tune at its next step.

    Yields a list that says whether the trials were stopped; whoever gets to their end clears it.
    """
    stopped = ["before the end"]
    # Whoever ends the driver politely ends it as Ctrl-C does; Ray itself would only print and die.
    handler = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with (
            progress,
            reporting_absence(run.store.address.uri, run.store.address.server, run.console.print),
            on_interrupt(progress.interrupt),
        ):
            yield stopped
    except StopTune:
        pass
    finally:
        signal.signal(signal.SIGTERM, handler)
        if stopped:
            stop_ray()  # a trial that is being stopped may still write


@contextmanager
def _closing_runs(jobs: Sequence[Job], outcomes: TrialOutcomes, run: Run) -> Iterator[None]:
    """Afterwards no job's MLflow run is RUNNING. Raises Fault for what ended the sweep."""
    try:
        yield
    finally:
        if outcomes.fault:
            stop_waiting()  # a store that does not answer has been waited for
        close_runs(
            run.store,
            run.recording.experiment_id,
            jobs,
            outcomes.failed,
            outcomes.retried,
            outcomes.pruned,
        )
    if outcomes.fault:
        raise Fault(outcomes.fault)
