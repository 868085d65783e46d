"""The only door into gptcore: check a trial, run a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gptcore.checkpoint import Checkpoint
from gptcore.config import InputError, TrialConfig
from gptcore.corpus import Corpus, load_corpus
from gptcore.init_schemes import check_init, initialise
from gptcore.model import GPT
from gptcore.optimizers import check_optim
from gptcore.records import Recorder, TrialResult
from gptcore.token_groups import token_groups
from gptcore.train import train


def check_trial(config: TrialConfig) -> Corpus:
    """The corpus of a trial that can run. Raises InputError for a trial that cannot.

    Beyond what TrialConfig checks by itself: the scheme and its parameters, the text, the subset
    and its length.
    """
    check_knobs(config)
    return load_corpus(config.corpus, config.model.context)


def check_knobs(config: TrialConfig) -> None:
    """The part of check_trial that needs no text."""
    check_init(config.init)
    check_optim(config.optim)


def run_trial(
    config: TrialConfig,
    recorder: Recorder,
    file: Path | None = None,
    keep: Callable[[Path], object] | None = None,
) -> TrialResult:
    """Run one trial from its config to its last row; the recorder is closed with the result.

    Where a `file` is named, a trial that is cut off leaves its state there, and one that finds it
    there goes on from it. `keep` is called with the file each time it was written.

    A loss that diverges is a result; InputError and faults are raised, the recorder left open.
    On one kind of CPU and one build of PyTorch the same config gives bitwise the same rows, alone
    or under Ray.
    """
    corpus = check_trial(config)
    checkpoint = None
    if file:
        identity = config.identity(corpus.digest)
        checkpoint = Checkpoint(file, identity, config.train.checkpoint_seconds, keep)
    device = device_of(config)
    with one_thread():
        model = GPT(config.model)
        recorder.log(initialise(model, config.init))
        model.to(device)
        groups = token_groups(corpus.counts(), config.corpus.data_seed)
        recorder.log([*groups.rows(), *corpus.fixed_text_rows()])
        result = train(model, corpus, groups, config, recorder, checkpoint)
    recorder.close(result)
    if checkpoint:
        checkpoint.delete()
    return result


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
