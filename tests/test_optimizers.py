import math
import os
import subprocess
import sys

import pytest
import torch

from gptcore.array import ModelArray
from gptcore.config import InitConfig, InputError, ModelConfig, OptimConfig
from gptcore.init_schemes import initialise
from gptcore.model import GPT
from gptcore.optimizers import OPTIMIZERS, SCHEDULES, check_optim, learning_rate
from helpers.paths import ROOT

SHAPE = ModelConfig(d_model=16, n_layer=1, n_head=2, context=8)


def trained(name, steps=5, **knobs):
    """Return a model after updates on one batch, its token rows before them, and the losses."""
    model = GPT(SHAPE)
    initialise(model, InitConfig())
    array = ModelArray([model], OptimConfig(name=name, **knobs))
    before = model.wte.weight.detach().clone()
    ids = torch.randint(0, 100, (1, 4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        _, (head,) = array.gradients(ids[..., :-1], ids[..., 1:])
        losses.append(head.loss.item())
        array.update(array.config.lr, 0.0, array.norms())
    return model, before, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_and_moves_every_parameter(name):
    model, _, losses = trained(name, lr=0.1 if name == "sgd" else 1e-2)
    assert losses[-1] < losses[0]
    start = GPT(SHAPE)
    initialise(start, InitConfig())
    for (label, now), then in zip(model.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(now, then), label


def test_adam_moves_unused_rows_as_far_as_any_and_the_others_hardly():
    def share_of_unused(name, **knobs):
        model, before, _ = trained(name, **knobs)
        moved = (model.wte.weight.detach() - before).square().mean(1).sqrt()
        return (moved[1000:].mean() / moved[:100].mean()).item()

    assert share_of_unused("adamw") > 0.5
    assert share_of_unused("adam") > 0.5
    assert share_of_unused("adam", eps=1e-2) < 0.05
    assert share_of_unused("coupled_adam") < 0.05
    assert share_of_unused("sgd") < 0.05


def moved_by(name, updates=6, **knobs):
    """Update an untied model by given gradients.

    Returns:
        Its parameters, their values before, and the gradients of each update, by name.
    """
    model = GPT(ModelConfig(d_model=16, n_layer=1, n_head=2, context=8, tied=False))
    initialise(model, InitConfig())
    array = ModelArray([model], OptimConfig(name=name, **knobs))
    generator = torch.Generator().manual_seed(1)
    starts = {label: p.detach().clone() for label, p in model.named_parameters()}
    gradients = {label: [] for label in starts}
    for update in range(updates):
        for label, parameter in model.named_parameters():
            parameter.grad.copy_((1 + update) * torch.randn(parameter.shape, generator=generator))
            gradients[label].append(parameter.grad.double())
        array.optimizer.step()
    return dict(model.named_parameters()), starts, gradients


def test_coupled_adam_shares_second_moments_over_the_vocabulary_and_is_adamw_elsewhere():
    knobs = {"lr": 0.01, "weight_decay": 0.5, "beta1": 0.8, "beta2": 0.9}
    coupled, starts, gradients = moved_by("coupled_adam", **knobs)
    alone, _, _ = moved_by("adamw", **knobs)
    for label, values in coupled.items():
        if label not in ("wte.weight", "head.weight"):
            assert torch.allclose(values, alone[label], atol=1e-6), label
            continue
        assert not torch.allclose(values, alone[label], atol=1e-3), label
        w, m, v = starts[label].double(), 0.0, 0.0
        for t, gradient in enumerate(gradients[label], start=1):
            m = 0.8 * m + 0.2 * gradient
            v = 0.9 * v + 0.1 * gradient.square().mean(0)
            w = w * (1 - 0.01 * 0.5)
            w = w - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        assert torch.allclose(values.double(), w, atol=1e-6), label


def test_adam_and_adamw_differ_in_their_weight_decay_alone():
    same, _, _ = moved_by("adam")
    plain, _, _ = moved_by("adamw")
    decayed, _, _ = moved_by("adam", weight_decay=0.5)
    decoupled, _, _ = moved_by("adamw", weight_decay=0.5)
    assert torch.allclose(same["wte.weight"], plain["wte.weight"], atol=1e-7)
    assert not torch.allclose(decayed["wte.weight"], decoupled["wte.weight"], atol=1e-5)


def test_sgd_keeps_a_velocity():
    values, starts, gradients = moved_by("sgd", updates=2, lr=0.01, momentum=0.7)
    first, second = gradients["wte.weight"]
    expected = starts["wte.weight"] - 0.01 * (first + (second + 0.7 * first))
    assert torch.allclose(values["wte.weight"].double(), expected, atol=1e-6)


def test_learning_rates_warm_up_and_end_as_their_schedule_says():
    def rates(schedule, warmup=0, steps=10):
        config = OptimConfig(lr=1.0, schedule=schedule, warmup=warmup)
        return [learning_rate(config, step, steps) for step in range(steps)]

    assert rates("constant") == [1.0] * 10
    assert rates("linear", steps=4) == [1.0, 0.75, 0.5, 0.25]
    assert rates("cosine", steps=4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5,
                                                      (1 - math.sqrt(0.5)) / 2])  # fmt: skip
    for schedule in SCHEDULES:
        assert rates(schedule, warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_unknown_names_and_knobs_of_others_are_refused():
    for config, says in (
        (
            {"name": "adan"},
            r"optim.name 'adan' is unknown: did you mean .*take one of adamw, adam, ",
        ),
        ({"schedule": "step"}, r"optim.schedule 'step' is unknown: .*take one of constant, "),
        (
            {"name": "sgd", "eps": 1e-3},
            r"sgd does not take optim.eps: leave it out, or take one of adamw",
        ),
        (
            {"momentum": 0.5},
            r"adamw does not take optim.momentum: leave it out, or take one of sgd",
        ),
    ):
        with pytest.raises(InputError, match=says):
            check_optim(OptimConfig(**config))
    check_optim(OptimConfig(name="sgd", momentum=0.5))


ALL = """
import sys
from pathlib import Path
from helpers.trials import TINY
from gptcore.config import TrialConfig
from gptcore.experiment import Trial, run_trials
from gptcore.optimizers import OPTIMIZERS
from gptcore.records import MemoryRecorder

eager = {"train.checkpoint_seconds": 1e-9}
for name in OPTIMIZERS:
    configs = [TrialConfig.from_flat({**TINY, **eager, "optim.name": name, "init.seed": seed})
               for seed in range(3)]
    file = Path(sys.argv[1], name)
    run_trials([Trial(configs[0], MemoryRecorder(), file)])
    run_trials([Trial(configs[0], MemoryRecorder(), file)])  # from its last checkpoint
    run_trials([Trial(config, MemoryRecorder()) for config in configs[1:]])
print("torch._dynamo" in sys.modules)
"""


def test_no_trial_waits_for_the_import_of_pytorchs_compiler(tmp_path):
    command = [sys.executable, "-c", ALL, str(tmp_path)]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr
