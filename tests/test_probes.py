"""Every probe gives what its definition says, for one model and for several at once.

This is one file because every probe is tested on the same models.
"""

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from gptcore import array as arrays
from gptcore.array import ModelArray
from gptcore.config import InitConfig, ModelConfig, OptimConfig, ProbesConfig
from gptcore.init_schemes import initialise
from gptcore.looks import pack
from gptcore.model import GPT
from gptcore.probes import (
    HISTOGRAM_EDGES,
    PROBES,
    moment_of,
    observe,
    probes_due,
    subjects_of,
    update_rows,
)
from gptcore.records import TABLE_OF
from gptcore.steps import StepOutput
from gptcore.token_groups import TokenGroups
from gptcore.token_probs import MIN_TOKENS, distinct_tokens
from gptcore.weights import model_parts, values_of

LAYERS = [0, 1]

GROUPS = {
    "used": np.arange(0, 60),  # the batch draws its tokens from here
    "unused": np.arange(1000, 1100),
    "few": np.arange(2000, 2000 + MIN_TOKENS - 1),
}


@dataclass(frozen=True)
class Seen:
    """A model in the middle of its training, and what probes are given of its trial."""

    model: GPT
    initial: dict[str, torch.Tensor]
    fixed_texts: dict[str, torch.Tensor]
    ids_BT: torch.Tensor
    hidden_BTD: torch.Tensor
    log_z_BT: torch.Tensor
    layers: Any = tuple(LAYERS)
    step: int = 7

    def subject(self):
        """The subject of the probes: the model, as the only one of an array."""
        array = SimpleNamespace(
            models=[self.model],
            parameters={name: values[None] for name, values in self.model.named_parameters()},
        )
        for name, stacked in array.parameters.items():
            stacked = stacked.detach()
            stacked.grad = self.model.get_parameter(name).grad[None]
            array.parameters[name] = stacked
        array.outputs = lambda ids_KBT, of: ModelArray.outputs(
            SimpleNamespace(models=[self.model], vmapped_trunk=None), ids_KBT, of
        )
        trial = SimpleNamespace(
            initial=self.initial,
            fixed_texts=self.fixed_texts,
            groups=TokenGroups(GROUPS, np.arange(50257), -np.arange(50257) / 1000),
        )
        (subject,) = subjects_of(array, [trial], self.layers)
        return subject


@pytest.fixture(scope="module")
def moment():
    generator = torch.Generator().manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, d_model=16, context=12))
    initialise(model, InitConfig(scheme="normal", std=0.3))
    initial = {
        part.name: part.values.detach() + 0.01 * torch.randn(part.values.shape, generator=generator)
        for part in model_parts(model, LAYERS)
    }
    for layer in LAYERS:  # Q, K and V are parts of the merged weight at step 0 too
        merged = initial[f"blocks.{layer}.attn.qkv"].chunk(3)
        initial |= dict(zip((f"blocks.{layer}.attn.{kind}" for kind in "qkv"), merged, strict=True))
    ids, targets = torch.randint(40, (2, 5, 12), generator=generator)
    (hidden,), (head,) = ModelArray([model], OptimConfig()).gradients(ids[None], targets[None])
    texts = {
        text: torch.randint(80, (3, 13), generator=generator) for text in ("probe", "held_out")
    }
    return Seen(model, initial, texts, ids, hidden, head.log_z_BT)


@pytest.fixture(autouse=True, params=[False, True], ids=["as on a CPU", "as on a GPU"])
def together(request, monkeypatch):
    """Both ways to measure: model by model in the CPU's cache, and all at once."""
    monkeypatch.setitem(arrays.RUNS_TOGETHER, "cpu", request.param)


def copied(model):
    """A copy of a model with its gradients."""
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        parameter.grad = model.get_parameter(name).grad.clone()
    return copied


def made(seen, measured):
    """The rows of what was measured."""
    packed = pack(range(1), measured)
    return list(packed.rows(0, seen.step, packed.values_KX[0]))


def rows_of(probe, seen):
    output = StepOutput(
        *(x[None] for x in (seen.ids_BT, seen.ids_BT, seen.hidden_BTD, seen.log_z_BT))
    )
    return made(seen, observe(moment_of(seen.subject(), output), [probe]))


@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_gives_rows_of_a_table_at_the_moments_step(probe, moment):
    rows = rows_of(probe, moment)
    assert rows
    assert {type(row) for row in rows} <= set(TABLE_OF)
    assert {row.step for row in rows} == {7}


@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_only_reads(probe, moment):
    parameters = list(moment.model.parameters())
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in parameters]
    state = torch.get_rng_state()
    rows_of(probe, moment)
    assert torch.equal(state, torch.get_rng_state())
    for (values, grad), now in zip(before, parameters, strict=True):
        assert torch.equal(values, now)
        assert torch.equal(grad, now.grad)


def test_probes_are_due_at_their_cadence_at_the_start_and_at_the_end(moment):
    def seen(step, last=False):
        config = ProbesConfig(every=5, histogram_every=10, spectrum_every=15, text_every=20)
        due = probes_due(config, step, last=last)
        return {TABLE_OF[type(row)] for probe in due for row in rows_of(probe, moment)}

    often = {"weights", "activations", "attention", "token_groups"}
    texts = {"text_losses", "group_weights"}
    ours = often | texts | {"histograms", "spectra", "tokens"}  # of probes that may get company
    assert seen(0) & ours == seen(3, last=True) & ours == ours
    assert seen(5) & ours == often
    assert seen(30) & ours == often | {"histograms", "spectra"}
    assert seen(20) & ours == often | texts | {"histograms"}
    assert seen(3) == set()


def test_only_the_given_layers_are_measured(moment):
    second = replace(moment, layers=[1])
    for probe in ("weights", "spectra", "histograms", "activations"):
        assert {row.layer for row in rows_of(probe, second)} <= {None, 1}
        every, some = (rows_of(probe, at) for at in (moment, second))
        assert some == [row for row in every if row.layer in (None, 1)]


def test_spectra_are_numpys(moment):
    rows = {row.tensor: row for row in rows_of("spectra", moment)}
    matrices = {part.name: part.values for part in model_parts(moment.model, LAYERS)}
    assert set(rows) == {name for name, values in matrices.items() if values.dim() == 2}
    for name in ("wte", "blocks.1.attn.k", "blocks.0.attn.qkv", "blocks.1.mlp.proj"):
        singular = np.linalg.svd(matrices[name].detach().double().numpy(), compute_uv=False)
        assert rows[name].spectral_norm == pytest.approx(singular[0], rel=1e-4)
        rank = (singular**2).sum() / singular[0] ** 2
        assert rows[name].stable_rank == pytest.approx(rank, rel=1e-4)


def test_what_an_update_does_is_measured_against_the_weights_before_it(moment):
    model = copied(moment.model)
    before = values_of(model, LAYERS)
    subject = replace(moment, model=model).subject()
    with torch.no_grad():
        subject.weights.statistics()
        subject.weights.remember()
        model.wpe.weight.mul_(1.25)
        model.blocks[1].attn.qkv.weight[16:32] += 0.5  # K of the second block
    rows = {row.tensor: row for row in made(moment, update_rows(subject))}
    assert set(rows) == set(before)
    assert {row.step for row in rows.values()} == {moment.step}
    assert rows["wpe"].ratio == pytest.approx(0.25, rel=1e-5)
    assert rows["blocks.1.attn.k"].rms == pytest.approx(0.5, rel=1e-5)
    assert rows["blocks.1.attn.qkv"].rms == pytest.approx(0.5 / 3**0.5, rel=1e-5)
    assert rows["blocks.1.attn.q"].rms == rows["blocks.1.attn.q"].ratio == 0
    assert rows["blocks.0.mlp.fc"].ratio == 0
    assert rows["blocks.0.attn.qkv"].ratio == 0
    assert rows["ln_f.bias"].ratio is None  # all zeros before


def test_tensors_of_zeros_have_no_angle_and_no_rank(moment):
    model = copied(moment.model)
    for parameter in model.parameters():
        parameter.grad.zero_()
    with torch.no_grad():
        model.blocks[0].mlp.proj.weight.zero_()
    zeroed = replace(moment, model=model)
    (weights,) = (r for r in rows_of("weights", zeroed) if r.tensor == "blocks.0.mlp.proj")
    (spectrum,) = (r for r in rows_of("spectra", zeroed) if r.tensor == "blocks.0.mlp.proj")
    assert weights.cosine is weights.excess_kurtosis is spectrum.stable_rank is None
    assert weights.frobenius == weights.std == spectrum.spectral_norm == weights.grad_rms == 0


def test_weight_statistics_are_numpys(moment):
    rows = {row.tensor: row for row in rows_of("weights", moment)}
    assert set(rows) == set(moment.initial)
    for name in ("wte", "blocks.1.attn.k", "blocks.0.attn.qkv", "blocks.1.mlp.fc"):
        part = next(part for part in model_parts(moment.model, LAYERS) if part.name == name)
        values = part.values.detach().double().numpy().ravel()
        initial = moment.initial[name].double().numpy().ravel()
        moved = values - initial
        grad = part.grad.double().numpy().ravel()
        row = rows[name]
        assert row.size == values.size
        assert row.mean == pytest.approx(values.mean(), abs=1e-6)
        assert row.std == pytest.approx(values.std(), rel=1e-5)
        assert row.excess_kurtosis == pytest.approx(stats.kurtosis(values), abs=1e-4)
        assert row.max_abs == pytest.approx(np.abs(values).max(), rel=1e-6)
        assert row.frobenius == pytest.approx(np.linalg.norm(values), rel=1e-5)
        cosine = values @ initial / np.linalg.norm(values) / np.linalg.norm(initial)
        assert row.cosine == pytest.approx(cosine, abs=1e-5)
        assert row.grad_rms == pytest.approx(np.sqrt((grad**2).mean()), rel=1e-5)
        assert row.rms_displacement == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-4)
    bias = rows["blocks.0.mlp.fc.bias"]
    assert (bias.kind, bias.std, bias.max_abs, bias.excess_kurtosis) == ("bias", 0.0, 0.0, None)
    assert rows["ln_f.weight"].layer is None
    assert rows["blocks.1.attn.k"].layer == 1


def test_histograms_lose_nothing_and_give_the_std_back(moment):
    edges = np.array(HISTOGRAM_EDGES)
    assert (np.diff(edges) > 0).all()
    for row in rows_of("histograms", moment):
        values = moment.model.blocks[row.layer].attn.qkv.weight.detach().numpy().ravel()
        assert sum(row.counts) == values.size
        assert row.counts[1:-1] == np.histogram(values, edges)[0].tolist()
        middles = np.concatenate([[edges[0]], (edges[1:] + edges[:-1]) / 2, [edges[-1]]])
        assert np.sqrt(np.average(middles**2, weights=row.counts)) == pytest.approx(
            values.std(), rel=0.02
        )


def test_values_outside_the_edges_fall_into_the_outer_bins(moment):
    weight = moment.model.blocks[0].attn.qkv.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(100.0)
        weight[0] = -100.0
    try:
        row = rows_of("histograms", moment)[0]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert (row.counts[0], row.counts[-1]) == (16, 48 * 16 - 16)


def expected_pairs(ids_BT, mask, positions):
    """[B, T, V]: which pairs of a position and a token a mask leaves in, spelled out."""
    B, T = ids_BT.shape
    keep = torch.zeros(B, T, 50257, dtype=torch.bool)
    for b in range(B):
        for t in [0] if positions == "first" else range(1, T):
            inputs = {
                "sequence": ids_BT[b],
                "prefix": ids_BT[b, : t + 1],
                "batch": ids_BT.flatten(),
                "none": torch.tensor([], dtype=torch.long),
            }[mask]
            keep[b, t] = True
            keep[b, t, inputs] = False
    return keep


def test_group_log_probs_are_those_of_a_full_log_softmax(moment):
    weight = moment.model.head.weight.detach()
    texts = {"batch": (moment.ids_BT, moment.hidden_BTD.detach())}
    for text, windows in moment.fixed_texts.items():
        texts[text] = windows[:, :-1], moment.model(windows[:, :-1]).detach()
    rows = [*rows_of("batch_groups", moment), *rows_of("fixed_texts", moment)]
    rows = [row for row in rows if TABLE_OF[type(row)] == "token_groups"]
    assert len(rows) == len(GROUPS) * 4 * 2 * 3
    for text, (ids, hidden) in texts.items():
        logits = (hidden @ weight.T).double()
        log_prob = logits.log_softmax(2)
        for mask in ("sequence", "prefix", "batch", "none"):
            for positions in ("first", "rest"):
                pairs = expected_pairs(ids, mask, positions)
                n_positions = pairs.any(2).sum().item()
                for group, members in GROUPS.items():
                    keep = torch.zeros_like(pairs)
                    keep[:, :, members] = pairs[:, :, members]
                    (row,) = (
                        row
                        for row in rows
                        if (row.text, row.mask, row.positions, row.group)
                        == (text, mask, positions, group)
                    )
                    assert row.n_tokens == pytest.approx(keep.sum().item() / n_positions)
                    values = (row.mean_logprob, row.mean_logit, row.log_z, row.excess)
                    if row.n_tokens < MIN_TOKENS:
                        assert set(values) == {None}
                        assert row.log_mean_prob is None
                        continue
                    mean_log_prob = log_prob[keep].mean().item()
                    unigram = -keep.nonzero()[:, 2].double().mean().item() / 1000
                    assert row.mean_logprob == pytest.approx(mean_log_prob, abs=1e-5)
                    assert row.mean_logit == pytest.approx(logits[keep].mean().item(), abs=1e-5)
                    assert row.mean_logprob == pytest.approx(row.mean_logit - row.log_z, abs=1e-12)
                    assert row.excess == pytest.approx(mean_log_prob - unigram, abs=1e-5)
                    if text == "batch":
                        assert row.log_mean_prob is None
                    else:
                        log_mean = log_prob[keep].exp().mean().log().item()
                        assert row.log_mean_prob == pytest.approx(log_mean, abs=1e-5)


def test_the_loss_on_a_fixed_text_is_its_cross_entropy(moment):
    rows = [row for row in rows_of("fixed_texts", moment) if TABLE_OF[type(row)] == "text_losses"]
    assert [row.text for row in rows] == ["probe", "held_out"]
    for row in rows:
        windows = moment.fixed_texts[row.text]
        with torch.no_grad():
            logits = moment.model(windows[:, :-1]) @ moment.model.head.weight.T
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert row.loss == pytest.approx(loss.item(), abs=1e-5)
        assert row.log_z == pytest.approx(logits.logsumexp(2).mean().item(), abs=1e-5)


def test_every_token_can_be_followed(moment):
    (row,) = rows_of("tokens", moment)
    ids = moment.fixed_texts["probe"][:, :-1]
    weight = moment.model.head.weight.detach()
    with torch.no_grad():
        log_prob = (moment.model(ids) @ weight.T).double().log_softmax(2)[:, 1:]
    in_one, nowhere = int(ids[0, 3]), 40_000
    for token in (in_one, nowhere):
        absent = [b for b in range(3) if token not in ids[b]]
        assert row.log_prob[token] == pytest.approx(log_prob[:, :, token].mean().item(), abs=1e-5)
        assert row.log_prob_masked[token] == pytest.approx(
            log_prob[absent, :, token].mean().item(), abs=1e-5
        )
        assert row.norm[token] == pytest.approx(weight[token].norm().item(), rel=1e-5)
        moved = (weight - moment.initial["wte"])[token].norm().item()
        assert row.displacement[token] == pytest.approx(moved, rel=1e-5)
        assert row.count[token] == token
        assert row.log_unigram[token] == -token / 1000
    assert {len(values) for values in (row.count, row.log_prob, row.norm)} == {50257}


def test_a_groups_rows_are_measured_together(moment):
    weight = moment.model.head.weight.detach()
    moved = weight - moment.initial["wte"]
    for row in rows_of("group_weights", moment):
        members = GROUPS[row.group]
        assert row.rms == pytest.approx(weight[members].square().mean().sqrt().item(), rel=1e-5)
        assert row.rms_displacement == pytest.approx(
            moved[members].square().mean().sqrt().item(), rel=1e-5
        )


def test_a_token_of_every_sequence_has_no_masked_log_prob(moment):
    windows = moment.fixed_texts["probe"].clone()
    windows[:, 5] = 77
    (row,) = rows_of(
        "tokens", replace(moment, fixed_texts={**moment.fixed_texts, "probe": windows})
    )
    assert row.log_prob_masked[77] is None
    assert row.log_prob[77] < 0


def test_streams_are_those_of_the_forward_pass(moment):
    """Each site recomputed from the model's own parts, for the second block."""
    rows = rows_of("activations", moment)
    sizes = {(row.site, row.layer): row for row in rows if TABLE_OF[type(row)] == "activations"}
    model, block = moment.model, moment.model.blocks[1]
    ids = moment.fixed_texts["probe"][:, :-1]
    with torch.no_grad():
        x = model.wte(ids) + model.wpe.weight[:12]
        expected = {("embedding", None): x}
        x = model.blocks[0](x)
        expected["residual", 0] = x
        q, k, v = block.attn.qkv(block.ln_1(x)).split(16, dim=2)
        expected |= {("q", 1): q, ("k", 1): k, ("v", 1): v}
        expected["attn", 1] = block.attn(block.ln_1(x))
        x = x + expected["attn", 1]
        expected["fc", 1] = block.mlp.fc(block.ln_2(x))
        expected["mlp", 1] = block.mlp(block.ln_2(x))
        expected["residual", 1] = x + expected["mlp", 1]
        expected["hidden", None] = model.ln_f(expected["residual", 1])
        scores = torch.einsum("bthc,bshc->bhts", q.view(3, 12, 2, 8), k.view(3, 12, 2, 8)) / 8**0.5
    assert len(sizes) == 2 + 2 * 7
    for site, values in expected.items():
        assert sizes[site].rms == pytest.approx(values.square().mean().sqrt().item(), rel=1e-5)
        assert sizes[site].max_abs == pytest.approx(values.abs().max().item(), rel=1e-5)
    heads = [row for row in rows if TABLE_OF[type(row)] == "attention" and row.layer == 1]
    assert [row.head for row in heads] == [0, 1]
    for row in heads:
        entropies = torch.stack(
            [
                torch.distributions.Categorical(logits=scores[:, row.head, t, : t + 1]).entropy()
                for t in range(1, 12)
            ]
        )
        uniform = torch.arange(2, 13).log()[:, None]
        seen = [scores[:, row.head, t, : t + 1].max().item() for t in range(1, 12)]
        assert row.entropy == pytest.approx(entropies.mean().item(), rel=1e-5)
        assert row.entropy_share == pytest.approx((entropies / uniform).mean().item(), rel=1e-5)
        assert row.max_logit == pytest.approx(max(seen), rel=1e-5)


def test_attention_without_queries_is_uniform(moment):
    model = copied(moment.model)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:16].zero_()
    rows = rows_of("activations", replace(moment, model=model))
    heads = [row for row in rows if TABLE_OF[type(row)] == "attention" and row.layer == 0]
    assert [row.entropy_share for row in heads] == pytest.approx([1.0, 1.0])
    assert [row.max_logit for row in heads] == [0.0, 0.0]


def test_distinct_tokens_are_found_in_two_ways():
    ids_KN = torch.tensor([[5, 3, 5, 9, 3, 3]])
    present, which, is_used = distinct_tokens(ids_KN, padded=False)
    assert (present.tolist(), which.tolist()) == ([[3, 5, 9]], [[1, 0, 1, 2, 0, 0]])
    assert is_used.tolist() == [[1, 1, 1]]
    padded, padded_which, padded_is_used = distinct_tokens(ids_KN, padded=True)
    assert padded[0, :3].tolist() == [3, 5, 9]
    assert padded_which.tolist() == which.tolist()
    assert padded_is_used.tolist() == [[1, 1, 1, 0, 0, 0]]
