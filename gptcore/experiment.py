"""The only door into gptcore: check a trial, run a trial."""

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
from gptcore.config import KNOBS, InputError, TrialConfig, varied
from gptcore.corpus import NO_TEXTS, Corpus, Texts, load_corpus
from gptcore.init_schemes import check_init, initialise
from gptcore.model import GPT, workspace
from gptcore.optimizers import check_optim
from gptcore.probes import values_of
from gptcore.records import Recorder, TrialResult
from gptcore.token_groups import token_groups
from gptcore.train import Member, train, upload


def check_trial(config: TrialConfig, preloaded_texts: Texts = NO_TEXTS) -> Corpus:
    """The corpus of a trial that can run. Raises InputError for a trial that cannot.

    Beyond what TrialConfig checks by itself: the scheme and its parameters, the text, the subset
    and its length.
    """
    check_knobs(config)
    return load_corpus(config.corpus, config.model.context, preloaded_texts)


def check_knobs(config: TrialConfig) -> None:
    """The part of check_trial that needs no text."""
    check_init(config.init)
    check_optim(config.optim)


@dataclass(frozen=True)
class Trial:
    """A trial to run, and who is told of it."""

    config: TrialConfig
    recorder: Recorder
    file: Path | None = None
    """Where it leaves its state when it is cut off, and goes on from where it finds one."""
    keep: Callable[[Path], object] | None = None
    """Is called with the file each time it was written."""


def run_trial(
    config: TrialConfig,
    recorder: Recorder,
    file: Path | None = None,
    keep: Callable[[Path], object] | None = None,
) -> TrialResult:
    """Run one trial from its config to its last row; the recorder is closed with the result.

    A loss that diverges is a result; InputError and faults are raised, the recorder left open.
    On one kind of CPU and one build of PyTorch the same config gives bitwise the same rows, alone
    or under Ray.
    """
    (result,) = run_trials([Trial(config, recorder, file, keep)])
    return result


def run_trials(
    trials: Sequence[Trial], preloaded_texts: Texts = NO_TEXTS, sync_every: int | None = None
) -> list[TrialResult]:
    """Run trials of one shape side by side as an array; each recorder is closed with its result.

    They may differ in the PER_TRIAL_KNOBS. Of several, a trial's rows are those that it has alone
    up to rounding. Raises what run_trial raises, and InputError for trials that cannot go
    together.
    """
    if knobs := conflicting_knobs([trial.config for trial in trials]):
        raise InputError(f"these trials cannot train together: they differ in {', '.join(knobs)}")
    results = {}
    with one_thread():
        members = [_prepared(trial, preloaded_texts) for trial in trials]
        # What was cut off need not have come equally far.
        for step in sorted({member.begun.step for member in members}):
            together = [one for one in members if one.begun.step == step]
            for member, result in train(together, sync_every):
                member.recorder.close(result)
                if member.checkpoint:
                    member.checkpoint.delete()
                results[id(member)] = result
    return [results[id(member)] for member in members]


PER_TRIAL_KNOBS = frozenset(
    knob for knob in KNOBS if knob.startswith(("init.", "corpus.")) and knob != "corpus.tokenizer"
)
"""The knobs that each trial of an array has to itself."""


def conflicting_knobs(configs: Sequence[TrialConfig]) -> list[str]:
    """The knobs for whose sake trials cannot train together: all that differ but their own."""
    differ = varied([config.to_flat() for config in configs])
    return [knob for knob in differ if knob not in PER_TRIAL_KNOBS]


def step_seconds(
    config: TrialConfig, sizes: Sequence[int], preloaded_texts: Texts = NO_TEXTS
) -> list[float]:
    """What a step of arrays of so many trials like this one takes, taken in turns: a median."""
    corpus, device = check_trial(config, preloaded_texts), device_of(config)
    model = GPT(config.model)
    initialise(model, config.init)
    model.to(device)
    times: list[list[float]] = [[] for _ in sizes]
    with one_thread():
        arrays = [
            ModelArray(
                [copy.deepcopy(model) for _ in range(size)], config.optim, config.train.precision
            )
            for size in sizes
        ]
        del model
        for step in range(ROUNDS + 1):
            batch = corpus.batch(step, batch_size=config.train.batch_size, seed=0)
            ids_BT, targets_BT = (upload(side, device) for side in batch)
            for size, array, seconds in zip(sizes, arrays, times, strict=True):
                start = time.perf_counter()
                array.gradients(ids_BT.expand(size, -1, -1), targets_BT.expand(size, -1, -1))
                norm_K = array.norms()
                array.update(config.optim.lr, config.optim.clip, norm_K)
                norm_K.tolist()  # waits for the device
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]  # the first finds memory


ROUNDS = 5


def _prepared(trial: Trial, preloaded_texts: Texts) -> Member:
    """The trial where it begins or goes on, with what comes before its first step logged."""
    config, corpus = trial.config, check_trial(trial.config, preloaded_texts)
    device, checkpoint = device_of(config), None
    if trial.file:
        identity = config.identity(corpus.digest)
        pause = config.train.checkpoint_seconds
        checkpoint = Checkpoint(trial.file, identity, pause, trial.keep)
    model = GPT(config.model)
    trial.recorder.log(initialise(model, config.init))
    model.to(device)
    groups = token_groups(corpus.counts(), config.corpus.data_seed, corpus.tokenizer)
    trial.recorder.log([*groups.rows(), *corpus.fixed_text_rows()])
    begun, state = checkpoint.load(device) if checkpoint else (Progress(0, [], 0.0), None)
    return Member(
        config=config,
        model=model,
        initial=values_of(model, config.probed_layers()),
        corpus=corpus,
        groups=groups,
        recorder=trial.recorder,
        checkpoint=checkpoint,
        begun=begun,
        state=state,
    )


def device_of(config: TrialConfig) -> torch.device:
    """The device that `train.device` stands for on this machine."""
    if config.train.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device is cuda, but PyTorch finds no CUDA device here")
    return torch.device(config.train.device)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread a trial: two trials on two cores beat one trial on two, and sums keep order.

    Denormal numbers count as 0 meanwhile: Adam's second moments of unused rows decay into them,
    where arithmetic is an order of magnitude slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        workspace.cache_clear()  # other processes may want what a GPU has of it
