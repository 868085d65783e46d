"""The entry points of gptcore: check a trial, run a trial, or run several as an array."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gptcore.array import ModelArray
from gptcore.checkpoint import Checkpoint, Progress
from gptcore.config import KNOBS, InputError, TrialConfig, varying_knobs
from gptcore.corpus import NO_TEXTS, Corpus, Texts, load_corpus
from gptcore.init_schemes import check_init, initialise
from gptcore.model import GPT
from gptcore.optimizers import check_optim
from gptcore.precision import check_precision
from gptcore.records import Recorder, TrialResult
from gptcore.replay import WARM_UP_CALLS, graphs_for
from gptcore.steps import Steps
from gptcore.token_groups import token_groups
from gptcore.train import Member, train
from gptcore.weights import values_of


def check_trial(config: TrialConfig, preloaded_texts: Texts = NO_TEXTS) -> Corpus:
    """Check what TrialConfig cannot check by itself, and load the corpus.

    Args:
        preloaded_texts: texts that are not read from this machine, by corpus.name.

    Raises:
        InputError: the trial cannot run: its scheme, its optimiser or a knob of these is wrong, or
            the text is missing or too short.
    """
    check_knobs(config)
    return load_corpus(config.corpus, config.model.context, preloaded_texts)


def check_knobs(config: TrialConfig) -> None:
    """Check the scheme, the optimiser and their knobs. Raises InputError if one is wrong."""
    check_init(config.init)
    check_optim(config.optim)


@dataclass(frozen=True)
class Trial:
    """A trial to run, and where its rows and its checkpoint go."""

    config: TrialConfig
    recorder: Recorder
    file: Path | None = None
    """The checkpoint: the trial continues from it where it exists; None keeps no checkpoint."""
    after_save: Callable[[Path], object] | None = None
    """Called with `file` each time it was written."""


def run_trial(
    config: TrialConfig,
    recorder: Recorder,
    file: Path | None = None,
    after_save: Callable[[Path], object] | None = None,
) -> TrialResult:
    """Run one trial, and close its recorder with the result.

    On one kind of CPU and one build of PyTorch, the same config always gives bitwise the same rows.
    See Trial for the arguments.

    Raises:
        InputError: the trial cannot run. A loss that diverges is a result, and no error. The
            recorder is not closed after an error of any kind.
    """
    (result,) = run_trials([Trial(config, recorder, file, after_save)])
    return result


def run_trials(
    trials: Sequence[Trial], preloaded_texts: Texts = NO_TEXTS, sync_every: int | None = None
) -> list[TrialResult]:
    """Run trials of one shape together, as an array, and close each recorder with its result.

    The rows of a trial equal those that it has alone: bitwise on a CPU, up to rounding on a GPU.

    Args:
        trials: they differ in PER_TRIAL_KNOBS only.
        preloaded_texts: texts that are not read from this machine, by corpus.name.
        sync_every: steps between two reads from the device; by default DEVICE_SYNC_EVERY.

    Raises:
        InputError: a trial cannot run, or the trials cannot train together.
    """
    if knobs := conflicting_knobs([trial.config for trial in trials]):
        raise InputError(
            f"these trials cannot train together: they differ in {', '.join(knobs)}, "
            "which must be equal in an array"
        )
    results = {}
    with one_thread():
        members = [_prepare(trial, preloaded_texts) for trial in trials]
        # Interrupted trials may have stopped at different steps: one array for each of these steps.
        for step in sorted({member.start.step for member in members}):
            array = [member for member in members if member.start.step == step]
            for member, result in train(array, sync_every):
                member.recorder.close(result)
                if member.checkpoint:
                    member.checkpoint.delete()
                results[id(member)] = result
    return [results[id(member)] for member in members]


PER_TRIAL_KNOBS = frozenset(
    knob for knob in KNOBS if knob.startswith(("init.", "corpus.")) and knob != "corpus.tokenizer"
)
"""The knobs that may differ between the trials of an array."""


def conflicting_knobs(configs: Sequence[TrialConfig]) -> list[str]:
    """List the knobs that prevent trials from training together; empty where they can."""
    differ = varying_knobs([config.to_flat() for config in configs])
    return [knob for knob in differ if knob not in PER_TRIAL_KNOBS]


def step_seconds(
    config: TrialConfig, sizes: Sequence[int], preloaded_texts: Texts = NO_TEXTS
) -> list[float]:
    """Measure the time of one training step of arrays of these sizes.

    The arrays take turns, so that a disturbance of the machine meets all of them.

    Args:
        config: a trial like those of the arrays.
        sizes: numbers of trials in an array.
        preloaded_texts: texts that are not read from this machine, by corpus.name.

    Returns:
        For each size the median over TIMED_STEPS steps, in seconds.
    """
    corpus, device = check_trial(config, preloaded_texts), device_of(config)
    model = GPT(config.model)
    initialise(model, config.init)
    model.to(device)
    batch_shape = (config.train.batch_size, config.model.context + 1)
    times: list[list[float]] = [[] for _ in sizes]
    with one_thread():
        arrays = []
        for size in sizes:
            graphs = graphs_for(device)
            models = [copy.deepcopy(model) for _ in range(size)]
            array = ModelArray(models, config.optim, config.train.precision, graphs is not None)
            arrays.append(Steps(array, config.optim.clip, batch_shape, 1, graphs))
        del model
        warm_up = WARM_UP_CALLS + 1 if graphs else 1
        for step in range(warm_up + TIMED_STEPS):
            batch = corpus.batch(step, batch_size=config.train.batch_size, seed=0)
            for size, steps, seconds in zip(sizes, arrays, times, strict=True):
                start = time.perf_counter()
                steps.load([[batch] * size], [config.optim.lr])
                steps.step()
                steps.stats_M3K.tolist()  # waits for the device
                seconds.append(time.perf_counter() - start)
    # The first steps allocate memory or are recorded, and are left out.
    return [statistics.median(seconds[warm_up:]) for seconds in times]


TIMED_STEPS = 5


def _prepare(trial: Trial, preloaded_texts: Texts) -> Member:
    """Build a trial at step 0 or at its checkpoint, and log the rows that belong to no step."""
    config, corpus = trial.config, check_trial(trial.config, preloaded_texts)
    device, checkpoint = device_of(config), None
    if trial.file:
        identity = config.identity(corpus.digest)
        pause = config.train.checkpoint_seconds
        checkpoint = Checkpoint(trial.file, identity, pause, trial.after_save)
    model = GPT(config.model)
    trial.recorder.log(initialise(model, config.init))
    model.to(device)
    groups = token_groups(corpus.counts(), config.corpus.data_seed, corpus.tokenizer)
    trial.recorder.log([*groups.rows(), *corpus.fixed_text_rows()])
    start, state = checkpoint.load(device) if checkpoint else (Progress(0, [], 0.0), None)
    return Member(
        config=config,
        model=model,
        initial=values_of(model, config.probed_layers()),
        corpus=corpus,
        groups=groups,
        recorder=trial.recorder,
        checkpoint=checkpoint,
        start=start,
        state=state,
    )


def device_of(config: TrialConfig) -> torch.device:
    """Return the device that `train.device` means on this machine.

    Raises:
        InputError: it is cuda, and there is no CUDA device, or the device does not have
            `train.precision`.
    """
    name = config.train.device
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "train.device is cuda, but PyTorch finds no CUDA device here: take auto or cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    check_precision(config.train, device)
    return device


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread, and treat denormal numbers as 0, while the context lasts.

    Two trials on two cores are faster than one trial on both, and sums keep their order. Denormal
    numbers are an order of magnitude slower to compute with, and Adam's second moments of unused
    rows decay into them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
