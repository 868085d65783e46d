"""The only door into gptcore: check a trial, run a trial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptcore.config import InputError, TrialConfig
from gptcore.corpus import Corpus, load_corpus
from gptcore.init_schemes import check_init, initialise
from gptcore.model import GPT
from gptcore.records import Recorder, TrialResult
from gptcore.token_groups import token_groups
from gptcore.train import train


def check_trial(config: TrialConfig) -> Corpus:
    """The corpus of a trial that can run here. Raises InputError for one that cannot.

    Beyond what TrialConfig checks by itself: names that the registries must know, the text and
    its length, the device.
    """
    check_init(config.init)
    device_of(config)
    return load_corpus(config.corpus, config.model.context)


def device_of(config: TrialConfig) -> torch.device:
    """The device that `train.device` stands for on this machine."""
    name = config.train.device
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"train.device takes auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device is cuda, but PyTorch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def run_trial(config: TrialConfig, recorder: Recorder) -> TrialResult:
    """Run one trial from its config to its last row; the recorder is closed with the result.

    A loss that diverges is a result; InputError and faults are raised, the recorder left open.
    On a CPU the same config gives bitwise the same rows, wherever it runs.
    """
    corpus = check_trial(config)
    with one_thread():
        model = GPT(config.model)
        initialise(model, config.init)
        model.to(device_of(config))
        groups = token_groups(corpus.tokens, config.corpus.data_seed)
        recorder.log(groups.rows())
        result = train(model, corpus, groups, config, recorder)
    recorder.close(result)
    return result


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
