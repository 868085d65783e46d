"""The benchmark of the GPU runs on any machine, and goes on after what fails."""

import dataclasses
import re
import time

import pytest
import torch

from benchmarks import gpu
from gptcore.model import GPT
from gptcore.precision import DTYPES

CPU = ["--quick", "--device", "cpu"]
RATES = gpu.Rates(bytes_per_second=1e12, flops=dict.fromkeys(gpu.PEER_PRECISIONS, 1e15))


def run_of(seconds: float = 60) -> gpu.Run:
    """Make a run of tiny models that ends after so many seconds."""
    deadline = time.perf_counter() + seconds
    return gpu.Run(gpu.QUICK, "cpu", ["float32"], deadline, RATES, quick=True)


def cells_of(text: str, title: str) -> list[list[str]]:
    """Return the rows of a printed table, without its header."""
    (table,) = re.findall(rf"^### {title}.*\n\n((?:\|.*\n)+)", text, re.M)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


@pytest.mark.full
def test_a_quick_run_fills_its_tables(capsys):
    """This trains a dozen tiny arrays, which takes some seconds."""
    gpu.main([*CPU, "--only", "arrays", "model5", "peers", "watching"])
    text = capsys.readouterr().out
    assert "Error" not in text
    assert "Left out" not in text
    arrays = cells_of(text, "Arrays")
    assert {row[3] for row in arrays} == DTYPES.keys() - {"tf32"}  # which a CPU does not have
    assert {row[4] for row in arrays} == {"1", "2"}
    assert all(float(row[5]) > 0 for row in arrays + cells_of(text, "Model 5"))
    compared = cells_of(text, "One trial's step")
    assert all(float(row[-1]) > 0 for row in compared if row[2] in gpu.PEER_PRECISIONS)
    assert len(cells_of(text, "Watching")) == 2


@pytest.mark.full
def test_a_whole_quick_run_has_no_failure(capsys):
    """This compiles models with PyTorch, and with JAX where it is installed: about a minute."""
    gpu.main([*CPU, "--profile"])
    text = capsys.readouterr().out
    assert "Error" not in text
    assert "failed" not in text
    assert len(cells_of(text, "Peers in PyTorch, torch.compile")) == 2
    assert len(cells_of(text, "Profile: Model 5")) == 12


def test_what_there_is_no_time_for_is_named(capsys):
    gpu.main([*CPU, "--seconds", "0"])
    text = capsys.readouterr().out
    for section in gpu.SECTIONS:
        assert f"\n- all of {section}\n" in text
    run = run_of(seconds=0)
    gpu.arrays(run)
    assert run.left_out == ["ours d16 L1 32 float32 1", "ours d16 L1 32 float32 2"]


def test_a_row_that_fails_says_why_and_the_next_is_measured(capsys):
    run = run_of()
    config = run.small("d16 L1", "float32")

    def measure(error: Exception | None) -> tuple[float, float]:
        if error:
            raise error
        return 0.002, 3e9

    errors = [torch.OutOfMemoryError("CUDA"), RuntimeError("broken | in\ntwo"), None]
    for error in errors:
        run.measured("ours", "d16 L1", config, 2, lambda error=error: measure(error))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "| ours | d16 L1 | 32 | float32 | 2 | out of memory |"
    assert second == "| ours | d16 L1 | 32 | float32 | 2 | RuntimeError: broken / in |"
    assert third.startswith("| ours | d16 L1 | 32 | float32 | 2 | 2.00 | 1.000 | 32000 |")
    assert third.endswith("| 3.00 |")


def test_a_missing_library_leaves_out_its_section_alone(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    gpu.jax(run_of())
    assert "JAX is not installed" in capsys.readouterr().out
    assert gpu.peer_model() == ("plain PyTorch", gpu.PlainLoss)


def test_a_process_of_jax_that_ends_leaves_its_last_words(capsys, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho no device >&2\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    gpu.jax(run_of())
    rows = cells_of(capsys.readouterr().out, "Peer in JAX")
    assert [row[4] for row in rows] == ["1", "2"]
    assert {row[5] for row in rows} == {"RuntimeError: the process of JAX ended: no device"}


def test_the_floor_is_the_larger_of_moving_and_computing():
    config = run_of().small("d16 L1", "float32")
    parameters = 257 * 16 + 16 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16
    moved = 16 * parameters + 2 * 4 * 32 * 257
    assert RATES.floor(config, 3) == pytest.approx(3 * moved / 1e12)
    slow = dataclasses.replace(RATES, flops=dict.fromkeys(gpu.PEER_PRECISIONS, 1e6))
    flop = 32 * (6 * (parameters - 16 * 16) + 12 * 16 * 16)
    assert slow.floor(config, 3) == pytest.approx(3 * flop / 1e6)


def test_model_5_gets_as_many_tokens_as_the_table_says():
    config = run_of().model5(64, "float32")
    assert (config.train.batch_size, config.model.context) == (4, 16)


def test_the_peer_of_hugging_face_has_our_parameters():
    pytest.importorskip("transformers", reason="transformers is not installed")
    shape = gpu.QUICK.model5
    sizes = [
        sum(values.numel() for values in model.parameters())
        for model in (gpu.HuggingFaceLoss(shape), GPT(shape))
    ]
    assert sizes[0] == sizes[1]


def test_every_precision_has_a_kind_of_product():
    assert DTYPES.keys() <= gpu.PRODUCTS.keys()
