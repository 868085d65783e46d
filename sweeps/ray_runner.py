"""Trials on Ray Tune."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from rich.console import Console

from sweeps.bucket import bucket
from sweeps.cluster import addable, slots, stop_ray
from sweeps.faults import Fault, saying_when_away
from sweeps.interrupts import on_interrupt
from sweeps.progress import Ended, SweepProgress, key_of
from sweeps.tracking import close_runs, wait_no_longer
from sweeps.trainable import run_batch

if TYPE_CHECKING:
    from sweeps.estimate import Batch
    from sweeps.study import Suggestions

RETRIES, RETRIES_ON_SPOT = 2, 10
"""How often a trial whose worker dies goes on with another one, and where machines come and go.
What a trial itself breaks on is not tried again."""

# That Tune keeps no files of results is so because MLflow and Parquet have them; why a trial failed
# is told once, by SweepProgress; that Tune cannot keep a state of its own loses nothing, for nobody
# reads it.
for chatty in (
    "ray.train._internal.syncer",
    "ray.tune.analysis.experiment_analysis",
    "ray.tune.execution.tune_controller",
    "ray.tune.tune",
):
    logging.getLogger(chatty).setLevel(logging.CRITICAL)


PORTION, ROUNDS = 500, 20
"""So many trials, or arrays of them, are Tune's at a time, or as many as fill every slot so many
times: it keeps 70 kB of each, finished or not, and goes through all of them again and again."""


def run_on_ray(
    jobs: Sequence[Mapping[str, Any]],
    batches: Sequence[Batch],
    store: Mapping[str, str],
    texts: Mapping[str, tuple[str, str]],
    runs_dir: Path,
    console: Console,
    search: Suggestions | None = None,
) -> bool:
    """Run trials; -> whether stopped.

    A job is a trial as sweeps.trainable takes it; `batches` say which train together; `texts` are
    as texts_for gives them. A search adds its jobs as it suggests them, each like the one batch.
    Afterwards no job's MLflow run is RUNNING: one that failed has its reason, one that was pruned
    or that Ctrl-C stopped is KILLED. Raises Fault for what ended the sweep before its trials did.
    """
    steps = {job["key"]: job["params"]["train.steps"] for job in jobs}
    needs = {batch.keys[0]: batch.needs for batch in batches}
    need = batches[0].needs  # of all that a search suggests
    progress = SweepProgress(console, steps, trials=search.left if search else len(jobs))
    progress.errors = search.errors if search else []
    # Whoever ends the driver politely ends it as Ctrl-C does; Ray itself would only print and die.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

    def tune_trials(space: dict[str, Any] | None) -> None:
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_batch, texts=dict(texts)),
                lambda config: tune.PlacementGroupFactory([dict(needs.get(key_of(config), need))]),
            ),
            param_space=space,
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                trial_name_creator=lambda trial: key_of(trial.config),
                trial_dirname_creator=lambda trial: key_of(trial.config),
                search_alg=search,
                num_samples=search.left if search else 1,
            ),
            run_config=tune.RunConfig(
                name=f"{time.time():.3f}",
                storage_path=f"{bucket() or runs_dir}/ray",
                stop=search.prunes if search else None,
                callbacks=[progress],
                failure_config=tune.FailureConfig(
                    max_failures=RETRIES_ON_SPOT if addable() else RETRIES
                ),
                verbose=0,
            ),
        ).fit()

    with progress, saying_when_away(store["uri"], console.print):
        stopped = True
        try:
            with on_interrupt(progress.interrupt):
                if search:
                    if addable():  # by itself Tune asks for one machine after the other
                        most = slots(need)
                        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(most)
                    tune_trials(None)
                else:
                    kinds = {str(batch.needs): batch for batch in batches}.values()
                    most = max(PORTION, ROUNDS * max(slots(batch.needs) for batch in kinds))
                    job_of = {job["key"]: dict(job) for job in jobs}
                    batch_of = {
                        batch.keys[0]: [job_of[key] for key in batch.keys] for batch in batches
                    }
                    for start in range(0, len(batches), most):
                        portion = [batch.keys[0] for batch in batches[start : start + most]]
                        tune_trials(
                            {
                                "store": dict(store),
                                "runs_dir": str(runs_dir),
                                # Tune copies its whole space for every trial of it.
                                "key": tune.grid_search(portion),
                                "batch": tune.sample_from(lambda config: batch_of[config["key"]]),
                            }
                        )
            stopped = False
        except Ended:
            pass
        finally:
            if stopped:
                stop_ray()  # a trial that is being stopped may still write
            if progress.fault:
                wait_no_longer()  # a store that does not answer has been waited for
            close_runs(store, jobs, progress.failed, progress.retried, progress.pruned)
    if progress.fault:
        raise Fault(progress.fault)
    return stopped
