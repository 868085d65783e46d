"""Trials on Ray Tune: a grid that is known beforehand, or what a search suggests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import tune
from rich.console import Console

from gptcore.corpus import Texts
from sweeps.estimate.arrays import Batch
from sweeps.execution.faults import Fault
from sweeps.execution.interrupts import Interrupts
from sweeps.execution.progress import (
    StopTune,
    SweepProgress,
    TrialOutcomes,
    key_of,
)
from sweeps.execution.ray_cluster import stop_ray
from sweeps.execution.resources import (
    Resources,
    autoscaler_machines,
    cluster_address,
    slots,
)
from sweeps.execution.trainable import Recording, run_batch
from tracking.address import bucket, credentials
from tracking.health import reporting_absence
from tracking.job import Job
from tracking.recorder import close_runs
from tracking.store import Store, stop_waiting

if TYPE_CHECKING:
    from sweeps.searching.study import Suggestions

RETRIES, RETRIES_ON_SPOT = 2, 10
"""How often a trial is given to a new worker after its worker died; the second number is for
machines that an autoscaler starts and ends. An error of the trial itself is not retried."""

TRIALS_PER_TUNER_RUN, ROUNDS_PER_SLOT = 500, 20
"""Tune gets 500 batches at a time, or 20 for each slot if that is more. It keeps 70 kB for each
batch, also after its end, and goes through all of them at each step."""


@dataclass(frozen=True)
class RunContext:
    """What all trials of a driver share."""

    store: Store
    recording: Recording
    texts: Texts
    console: Console
    interrupts: Interrupts
    tell: Callable[[SweepProgress], object] = lambda progress: None
    """Called whenever there is something new to show."""


def run_grid(jobs: Sequence[Job], batches: Sequence[Batch], context: RunContext) -> bool:
    """Run trials that are known beforehand. Return whether the user stopped them.

    Args:
        jobs: the trials.
        batches: which of them train together, and what each batch needs of a machine.
        context: where trials are recorded, and their texts.

    Raises:
        Fault: something ended the sweep before its trials did.
    """
    steps = {job.key: int(job.params["train.steps"]) for job in jobs}
    outcomes = TrialOutcomes(steps, len(jobs), {job.key: job.scheme for job in jobs})
    progress = SweepProgress(
        context.console, outcomes, take_signals=context.interrupts.install, tell=context.tell
    )
    kinds = {str(batch.needs): batch for batch in batches}.values()
    size = max(TRIALS_PER_TUNER_RUN, ROUNDS_PER_SLOT * max(slots(kind.needs) for kind in kinds))
    job_of = {job.key: job for job in jobs}
    batch_of = {batch.keys[0]: [job_of[key] for key in batch.keys] for batch in batches}
    needs = {batch.keys[0]: batch.needs for batch in batches}
    with _ending_runs(jobs, outcomes, progress, context) as has_stopped:
        for start in range(0, len(batches), size):
            portion = [batch.keys[0] for batch in batches[start : start + size]]
            space = {
                "recording": context.recording,
                # Tune copies its whole space for every trial of it.
                "key": tune.grid_search(portion),
                "batch": tune.sample_from(lambda config: batch_of[config["key"]]),
            }
            make_tuner(context, progress, needs.__getitem__, param_space=space).fit()
    return has_stopped()


def run_search(suggestions: Suggestions, batch: Batch, context: RunContext) -> bool:
    """Run the trials that a search suggests. Return whether the user stopped them.

    Args:
        suggestions: suggests trials, and receives their results.
        batch: one trial, with the resources that every trial needs.
        context: where trials are recorded, and their texts.

    Raises:
        Fault: something ended the search before its trials did.
    """
    outcomes = TrialOutcomes({}, suggestions.left)
    progress = SweepProgress(
        context.console, outcomes, suggestions.errors, context.interrupts.install
    )
    if autoscaler_machines():  # else Tune asks for one machine after another
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots(batch.needs))
    with _ending_runs(suggestions.jobs, outcomes, progress, context) as has_stopped:
        make_tuner(context, progress, lambda _: batch.needs, suggestions).fit()
    return has_stopped()


def make_tuner(
    context: RunContext,
    progress: SweepProgress,
    needs_of_key: Callable[[str], Resources],
    search: Suggestions | None = None,
    param_space: dict[str, Any] | None = None,
) -> tune.Tuner:
    """Make a Tuner of run_batch.

    Args:
        context: where trials are recorded, and their texts.
        progress: shows what Tune reports.
        needs_of_key: returns what a batch takes of a machine, by the key of its first trial.
        search: suggests the trials; None for a grid.
        param_space: the grid.
    """
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(
                run_batch,
                texts=dict(context.texts),
                # Not by Ray's environment of workers, which is in its logs and among the arguments
                # of its processes. Workers on this machine have inherited it.
                secrets=credentials() if cluster_address() else {},
            ),
            lambda config: tune.PlacementGroupFactory([dict(needs_of_key(key_of(config)))]),
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
            storage_path=f"{bucket() or context.recording.runs_dir}/ray",
            stop=search.prunes if search else None,
            callbacks=[progress],
            failure_config=tune.FailureConfig(
                max_failures=RETRIES_ON_SPOT if autoscaler_machines() else RETRIES
            ),
            verbose=0,
        ),
    )


@contextmanager
def _ending_runs(
    jobs: Sequence[Job], outcomes: TrialOutcomes, progress: SweepProgress, context: RunContext
) -> Iterator[Callable[[], bool]]:
    """Inside, what interrupts the sweep stops Tune; afterwards no job's MLflow run is RUNNING.

    A run whose trial failed then has the reason, and a run that the user stopped is KILLED.
    Yields a function that returns whether the user stopped the trials.

    Raises:
        Fault: something ended the sweep before its trials did.
    """
    stopped, address = True, context.store.address
    with progress, reporting_absence(address, context.console.print):
        try:
            with context.interrupts.calling(progress.interrupt):
                yield lambda: stopped
            stopped = False
        except StopTune:
            pass
        finally:
            with context.interrupts.postponed():
                if stopped:
                    stop_ray()  # a trial that is being stopped may still write
                if outcomes.fault:
                    stop_waiting()  # the store has been waited for already
                close_runs(
                    context.store,
                    context.recording.experiment_id,
                    jobs,
                    outcomes.failed,
                    outcomes.retried,
                    outcomes.pruned,
                    context.recording.owner,
                )
    if outcomes.fault:
        raise Fault(outcomes.fault)
