import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from gptcore.config import InitConfig, ModelConfig, ProbesConfig
from gptcore.init_schemes import initialise
from gptcore.model import GPT, loss_of
from gptcore.probes import (
    HISTOGRAM_EDGES,
    MIN_TOKENS,
    PROBES,
    Moment,
    model_parts,
    observe,
    update_rows,
    values_of,
)
from gptcore.records import TABLE_OF
from gptcore.token_groups import TokenGroups

GROUPS = {
    "used": np.arange(0, 60),  # the batch draws its tokens from here
    "unused": np.arange(1000, 1100),
    "few": np.arange(2000, 2000 + MIN_TOKENS - 1),
}


@pytest.fixture(scope="module")
def moment():
    generator = torch.Generator().manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, d_model=16, context=12))
    initialise(model, InitConfig(scheme="normal", std=0.3))
    initial = {
        part.name: part.values.detach() + 0.01 * torch.randn(part.values.shape, generator=generator)
        for part in model_parts(model)
    }
    ids, targets = torch.randint(40, (2, 5, 12), generator=generator)
    hidden = model(ids)
    loss, log_z = loss_of(hidden, model.head.weight, targets)
    loss.backward()
    return Moment(
        step=7,
        model=model,
        initial=initial,
        groups=TokenGroups(GROUPS, np.zeros(50257, dtype=np.int64)),
        ids_BT=ids,
        hidden_BTD=hidden,
        log_z_BT=log_z,
    )


def rows_of(probe, moment):
    with torch.no_grad():
        return PROBES[probe].rows(moment)


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
    def due(step, last=False):
        at = Moment(**{**vars(moment), "step": step})
        rows = observe(at, ProbesConfig(every=5, histogram_every=10, spectrum_every=15), last=last)
        return {TABLE_OF[type(row)] for row in rows}

    everything = {"weights", "token_groups", "histograms", "spectra"}
    assert due(0) == due(30) == due(3, last=True) == everything
    assert due(5) == everything - {"histograms", "spectra"}
    assert due(10) == everything - {"spectra"}
    assert due(3) == set()


def test_spectra_are_numpys(moment):
    rows = {row.tensor: row for row in rows_of("spectra", moment)}
    matrices = {part.name: part.values for part in model_parts(moment.model)}
    assert set(rows) == {name for name, values in matrices.items() if values.dim() == 2}
    for name in ("wte", "blocks.1.attn.k", "blocks.0.attn.qkv", "blocks.1.mlp.proj"):
        singular = np.linalg.svd(matrices[name].detach().double().numpy(), compute_uv=False)
        assert rows[name].spectral_norm == pytest.approx(singular[0], rel=1e-4)
        rank = (singular**2).sum() / singular[0] ** 2
        assert rows[name].stable_rank == pytest.approx(rank, rel=1e-4)


def test_what_an_update_does_is_measured_against_the_weights_before_it(moment):
    model = copy.deepcopy(moment.model)
    before = values_of(model)
    with torch.no_grad():
        model.wpe.weight.mul_(1.25)
        model.blocks[1].attn.qkv.weight[16:32] += 0.5  # K of the second block
    rows = {row.tensor: row for row in update_rows(3, model, before)}
    assert set(rows) == set(before)
    assert {row.step for row in rows.values()} == {3}
    assert rows["wpe"].ratio == pytest.approx(0.25, rel=1e-5)
    assert rows["blocks.1.attn.k"].rms == pytest.approx(0.5, rel=1e-5)
    assert rows["blocks.1.attn.qkv"].rms == pytest.approx(0.5 / 3**0.5, rel=1e-5)
    assert rows["blocks.1.attn.q"].rms == rows["blocks.1.attn.q"].ratio == 0
    assert rows["blocks.0.mlp.fc"].ratio == 0
    assert rows["blocks.0.attn.qkv"].ratio == 0
    assert rows["ln_f.bias"].ratio is None  # all zeros before


def test_tensors_of_zeros_have_no_angle_and_no_rank(moment):
    model = copy.deepcopy(moment.model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
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
        part = next(part for part in model_parts(moment.model) if part.name == name)
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


def test_group_log_probs_are_those_of_a_full_log_softmax(moment):
    logits = (moment.hidden_BTD @ moment.model.head.weight.T).detach().double()
    log_prob = logits.log_softmax(2)
    B, T, V = logits.shape
    present = torch.zeros(B, V, dtype=torch.bool).scatter_(1, moment.ids_BT, True)
    left_in = {
        "sequence": ~present,
        "batch": ~present.any(0).expand(B, V),
        "none": torch.ones(B, V, dtype=torch.bool),
    }
    rows = rows_of("token_groups", moment)
    assert len(rows) == len(GROUPS) * len(left_in)
    for row in rows:
        keep = torch.zeros(B, V, dtype=torch.bool)
        keep[:, GROUPS[row.group]] = left_in[row.mask][:, GROUPS[row.group]]
        assert row.n_tokens == keep.sum().item() / B
        if row.n_tokens < MIN_TOKENS:
            assert row.mean_logprob is row.mean_logit is row.log_z is None
            continue
        weights = keep[:, None, :].expand(B, T, V)
        assert row.mean_logprob == pytest.approx(log_prob[weights].mean().item(), abs=1e-5)
        assert row.mean_logit == pytest.approx(logits[weights].mean().item(), abs=1e-5)
        assert row.mean_logprob == pytest.approx(row.mean_logit - row.log_z, abs=1e-12)


def test_masks_leave_out_what_the_inputs_hold(moment):
    left = {(row.group, row.mask): row.n_tokens for row in rows_of("token_groups", moment)}
    distinct = [len(set(sequence)) for sequence in moment.ids_BT.tolist()]
    assert left["used", "sequence"] == 60 - np.mean(distinct)
    assert left["used", "batch"] == 60 - len(set(moment.ids_BT.flatten().tolist()))
    assert left["used", "none"] == 60
    assert {left["unused", mask] for mask in ("sequence", "batch", "none")} == {100}
