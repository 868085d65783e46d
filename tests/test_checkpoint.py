"""A trial that is interrupted and continues ends with the rows of one that was not."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from gptcore import checkpoint
from gptcore.array import ModelArray
from gptcore.checkpoint import Checkpoint, Progress
from gptcore.config import InputError, TrialConfig
from gptcore.corpus import Corpus
from gptcore.experiment import run_trial
from gptcore.model import GPT
from gptcore.optimizers import OPTIMIZERS
from gptcore.records import MemoryRecorder
from helpers.trials import Cut, CutAt, undisturbed


@pytest.fixture(autouse=True)
def save_at_every_step(monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", float("inf"))


@pytest.fixture
def tiny(tiny):
    return replace(tiny, train=replace(tiny.train, checkpoint_seconds=0.0))


def run(config, file=None):
    recorder = MemoryRecorder()
    run_trial(config, recorder, file)
    return recorder


def cut(config, file, step):
    with pytest.raises(Cut):
        run_trial(config, CutAt(step), file)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("step", [0, 1, 4, 5])
def test_a_trial_that_was_cut_off_ends_bitwise_like_one_that_was_not(tiny, tmp_path, name, step):
    config = TrialConfig.from_flat(
        {**tiny.to_flat(), "optim.name": name, "optim.schedule": "cosine"}
    )
    file = tmp_path / "folder" / "key.pt"
    cut(config, file, step)
    assert torch.load(file, weights_only=False)["step"] == step
    resumed = run(config, file)
    assert resumed.rows == undisturbed(config).rows
    assert resumed.result.steps == 5
    assert list(file.parent.iterdir()) == []  # nothing is left of an ended trial


def test_a_trial_can_be_cut_off_again_and_again(tiny, tmp_path):
    file = tmp_path / "key.pt"
    for step in (1, 2, 4):
        cut(tiny, file, step)
    assert run(tiny, file).rows == run(tiny).rows


def test_a_resumed_trial_does_not_train_again_what_it_had_done(tiny, tmp_path, monkeypatch):
    file = tmp_path / "key.pt"
    cut(tiny, file, 4)
    steps, batch = [], Corpus.batch
    monkeypatch.setattr(
        Corpus,
        "batch",
        lambda self, step, **knobs: steps.append(step) or batch(self, step, **knobs),
    )
    run(tiny, file)
    assert steps == [4, 5]


def test_a_diverging_trial_diverges_alike_after_a_resume(tiny, tmp_path):
    config = TrialConfig.from_flat({**tiny.to_flat(), "optim.lr": 1e30})
    file = tmp_path / "key.pt"
    cut(config, file, 0)
    resumed, whole = run(config, file), undisturbed(config)
    assert resumed.result.status == whole.result.status == "diverged"
    assert resumed.result.reason == whole.result.reason
    assert resumed.rows == whole.rows


def test_a_checkpoint_of_another_trial_is_refused_with_what_differs(tiny, tmp_path):
    file = tmp_path / "key.pt"
    cut(tiny, file, 3)
    other = TrialConfig.from_flat({**tiny.to_flat(), "init.seed": 7})
    with pytest.raises(
        InputError,
        match=r"belongs to another trial \(init\.seed is 0 in the file and 7 in this trial\)",
    ):
        run(other, file)
    assert file.exists()


def _saved(what):
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    ["cut short", "other bytes", "empty", "a bit", "its head", "a list", "half of it", "a folder"],
)
def test_a_damaged_checkpoint_is_named_and_left_alone(tiny, tmp_path, damage):
    file = tmp_path / "key.pt"
    cut(tiny, file, 3)
    whole, middle = file.read_bytes(), file.stat().st_size // 2
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(
            {
                "cut short": whole[: len(whole) // 2],
                "other bytes": b"not a checkpoint",
                "empty": b"",
                "a bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
                "its head": whole[:40] + b"\x00\xff\x13\x99" + whole[44:],
                "a list": _saved([1]),
                "half of it": _saved({**torch.load(file, weights_only=False), "optimizer": 3}),
            }[damage]
        )
    with pytest.raises(InputError, match=r"key\.pt is damaged .*: delete it to begin from step 0"):
        run(tiny, file)
    assert file.exists()


def test_what_a_checkpoint_holds_is_never_run_as_code(tiny, tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint's code was run",))

    file = tmp_path / "key.pt"
    torch.save({"identity": Evil()}, file)
    with pytest.raises(InputError, match="is damaged"):
        run(tiny, file)


def test_a_checkpoint_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/key\.pt cannot be written"):
        run(tiny, tmp_path / "file" / "key.pt")


def test_saving_takes_its_small_share_of_the_time(tiny, tmp_path, monkeypatch):
    """Use a clock on which a save takes one second, and a step ten."""
    monkeypatch.setattr(checkpoint, "SHARE_OF_TIME", 0.01)
    now, saved_at = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])
    write = checkpoint.write_atomically

    def write_in_a_second(*arguments):
        saved_at.append(now[0])
        write(*arguments)
        now[0] += 1

    monkeypatch.setattr(checkpoint, "write_atomically", write_in_a_second)
    found = Checkpoint(tmp_path / "key.pt", {}, pause=10.0)
    state = ModelArray([GPT(tiny.model)], tiny.optim).state(0)
    while now[0] < 500:
        if found.due():
            found.save(Progress(0, [], 0.0), state)
        now[0] += 10
    assert saved_at == [10, 111, 212, 313, 414]


def test_the_time_before_the_cut_counts(tiny, tmp_path):
    file = tmp_path / "key.pt"
    cut(tiny, file, 3)
    state = torch.load(file, weights_only=False)
    torch.save({**state, "seconds": 1000.0}, file)
    assert run(tiny, file).result.seconds > 1000


def test_rows_of_another_schema_are_refused(tiny, tmp_path, monkeypatch):
    file = tmp_path / "key.pt"
    cut(tiny, file, 3)
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 99)
    with pytest.raises(InputError, match=r"schema_version is \d+ in the file and 99 in this trial"):
        run(tiny, file)


def test_two_processes_that_save_one_trial_do_not_meet(tiny, tmp_path):
    """As `--debug` and a sweep may do at one time: the file is complete, whoever wrote last."""
    state = ModelArray([GPT(tiny.model)], tiny.optim).state(0)
    ones = [Checkpoint(tmp_path / "key.pt", {}, pause=0.0) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        for _ in range(10):
            for saving in [pool.submit(one.save, Progress(7, [], 0.0), state) for one in ones]:
                saving.result()
    assert ones[0].load(torch.device("cpu"))[0].step == 7
    assert [file.name for file in tmp_path.iterdir()] == ["key.pt"]
