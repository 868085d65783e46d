"""Every formula is written here a second time, so that a mistake in a scheme shows."""

import itertools
from math import sqrt

import pytest
import torch

from gptcore.config import InitConfig, InputError, ModelConfig
from gptcore.init_schemes import INIT_SCHEMES, Draw, check_init, initialise
from gptcore.model import GPT, module_outputs

L, V, T = 4, 8192, 64
EMBEDDINGS, BRANCH_ENDS = ("wte", "wpe"), ("proj", "mlp_proj")
BRANCHES = ("attn", "mlp")
EXCESS_KURTOSIS = {"uniform": -1.2, "student_t": 6.0, "laplace": 3.0, "rademacher": -2.0}


def fans(kind, d):
    """Columns and rows."""
    return {
        "wte": (d, V), "wpe": (d, T), "fc": (d, 4 * d), "mlp_proj": (4 * d, d)
    }.get(kind, (d, d))  # fmt: skip


def xavier(kind, d):
    return sqrt(2 / sum(fans(kind, d)))


# (kind, layer, d_model) -> std. The head, a Linear, comes after the embedding it is tied to.
EXPECTED = {
    "model5": lambda kind, layer, d: sqrt(2 / (T + d)) if kind == "wpe" else 0.02,
    "normal": lambda kind, layer, d: 0.02,
    "truncated_normal": lambda kind, layer, d: 0.02,
    "uniform": lambda kind, layer, d: 0.02,
    "student_t": lambda kind, layer, d: 0.02,
    "laplace": lambda kind, layer, d: 0.02,
    "rademacher": lambda kind, layer, d: 0.02,
    "torch_default": lambda kind, layer, d: (
        1.0 if kind == "wpe" else 1 / sqrt(3 * fans(kind, d)[0])
    ),
    "xavier_normal": lambda kind, layer, d: xavier(kind, d),
    "xavier_uniform": lambda kind, layer, d: xavier(kind, d),
    "kaiming_normal": lambda kind, layer, d: sqrt(2 / fans(kind, d)[0]),
    "kaiming_uniform": lambda kind, layer, d: sqrt(2 / fans(kind, d)[0]),
    "lecun_normal": lambda kind, layer, d: sqrt(1 / fans(kind, d)[0]),
    "lecun_uniform": lambda kind, layer, d: sqrt(1 / fans(kind, d)[0]),
    "orthogonal": lambda kind, layer, d: 1 / sqrt(max(fans(kind, d))),
    "gpt2": lambda kind, layer, d: 0.02 / sqrt(2 * L) if kind in BRANCH_ENDS else 0.02,
    "per_depth": lambda kind, layer, d: (
        0.02 / sqrt(2 * (layer + 1)) if kind in BRANCH_ENDS else 0.02
    ),
    "small_init": lambda kind, layer, d: (
        2 / (L * sqrt(d)) if kind in BRANCH_ENDS else sqrt(2 / (5 * d))
    ),
    "t_fixup": lambda kind, layer, d: (
        (9 * L) ** -0.25 / sqrt(d) if kind in EMBEDDINGS
        else xavier(kind, d) * (1 if kind in "qk" else 0.67 / L**0.25)
    ),
    "deepnet": lambda kind, layer, d: (
        1 / sqrt(d) if kind in EMBEDDINGS
        else xavier(kind, d) * (1 if kind in "qk" else 1 / (8 * L) ** 0.25)
    ),
    "mup": lambda kind, layer, d: 0.0 if kind == "q" else 1 / sqrt(fans(kind, d)[0]),
    "zero_residual": lambda kind, layer, d: 0.0 if kind in BRANCH_ENDS else 0.02,
}  # fmt: skip


def shape(d_model=64, **others):
    sizes = {"d_model": d_model, "n_layer": L, "n_head": 4, "context": T, "vocab_size": V}
    return ModelConfig(**(sizes | others))


def built(scheme, seed=0, model_config=None, **parameters):
    model = GPT(model_config or shape())
    with torch.no_grad():  # so that what a scheme does not set shows
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    rows = initialise(model, InitConfig(scheme=scheme, seed=seed, **parameters))
    return model, rows


def weights(model):
    found = {"wte": [model.wte.weight], "wpe": [model.wpe.weight]}
    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        named = {"q": q, "k": k, "v": v, "proj": block.attn.proj.weight}
        named |= {"fc": block.mlp.fc.weight, "mlp_proj": block.mlp.proj.weight}
        for kind, weight in named.items():
            found.setdefault(kind, []).append(weight)
    return found


def test_every_scheme_has_its_formula_here():
    assert set(EXPECTED) == set(INIT_SCHEMES)


# (kind, d_model) -> std, where it is another one without the tie.
UNTIED = {
    "model5": lambda kind, d: xavier("wte", d) if kind == "wte" else None,
    "torch_default": lambda kind, d: 1.0 if kind == "wte" else None,
    "t_fixup": lambda kind, d: xavier("wte", d) if kind == "head" else None,
    "mup": lambda kind, d: {"wte": 1.0, "wpe": 1.0, "head": 0.0}.get(kind),
}


@pytest.mark.parametrize("scheme", INIT_SCHEMES)
def test_an_untied_head_and_its_embedding_have_rules_of_their_own(scheme):
    model, rows = built(scheme, model_config=shape(tied=False))
    said = {row.kind: row.std for row in rows}
    measured = {"wte": model.wte.weight, "wpe": model.wpe.weight, "head": model.head.weight}
    for kind, weight in measured.items():
        tied = EXPECTED[scheme]("wte" if kind == "head" else kind, None, 64)
        other = UNTIED.get(scheme, lambda kind, d: None)(kind, 64)
        expected = tied if other is None else other
        assert said[kind] == pytest.approx(expected, rel=1e-12), kind
        # 4,096 elements of wpe, five standard errors of the heaviest tail.
        assert weight.std().item() == pytest.approx(expected, rel=0.12), kind


@pytest.mark.parametrize(
    ("scheme", "d_model"),
    [*itertools.product(INIT_SCHEMES, (64, 256)), ("model5", 768)],
)
def test_measured_std_is_the_formulas(scheme, d_model, capsys):
    model, rows = built(scheme, model_config=shape(d_model))
    said = {row.tensor: row.std for row in rows}
    lines = [f"\n{scheme}, d_model {d_model}\nkind      expected           measured"]
    for kind, tensors in weights(model).items():
        layered = kind not in EMBEDDINGS
        expected = [EXPECTED[scheme](kind, i, d_model) for i in range(len(tensors))]
        names = [row.tensor for row in rows if row.kind == kind]
        assert [said[name] for name in names] == pytest.approx(expected, rel=1e-12), kind
        measured = [tensor.detach().std().item() for tensor in tensors]
        lines.append(
            f"{kind:9s} {span(expected):18s} {span(measured):18s}{'' if layered else ' (one)'}"
        )
        if expected[0] == 0:
            assert measured == expected, kind
            continue
        ratio = torch.cat([t.flatten() / std for t, std in zip(tensors, expected, strict=True)])
        # Five standard errors of a std, and a little for what rounding does.
        excess = EXCESS_KURTOSIS.get(scheme, 0.0)
        tolerance = 5 * sqrt((excess + 2) / (4 * ratio.numel())) + 0.001
        assert ratio.std().item() == pytest.approx(1, rel=tolerance), kind
        assert abs(ratio.mean().item()) < 6 / sqrt(ratio.numel()), kind
    with capsys.disabled():
        print("\n".join(lines))


def span(values):
    low, high = min(values), max(values)
    return f"{low:.5f}" if f"{low:.5f}" == f"{high:.5f}" else f"{low:.5f} .. {high:.5f}"


@pytest.mark.parametrize("scheme", [*EXCESS_KURTOSIS, "normal"])
def test_shapes_of_matched_variance_differ_in_their_tails(scheme):
    parameters = {"nu": 10.0} if scheme == "student_t" else {}  # at 5, a sample's is far too noisy
    expected = 1.0 if scheme == "student_t" else EXCESS_KURTOSIS.get(scheme, 0.0)
    # A large sample: 50,257 rows.
    model, _ = built(scheme, model_config=shape(vocab_size=50257), **parameters)
    standard = model.wte.weight.detach() / 0.02
    assert (standard**4).mean().item() - 3 == pytest.approx(expected, abs=0.1)


def test_a_truncated_normal_ends_at_its_cut():
    for cut, parent in ((2.0, 0.02 / 0.87962566), (3.0, 0.02 / 0.98658)):
        model, _ = built("truncated_normal", cut=cut)
        assert model.wte.weight.abs().max().item() == pytest.approx(cut * parent, rel=1e-3)


@pytest.mark.parametrize("scheme", ["xavier_normal", "xavier_uniform", "orthogonal"])
def test_gain_scales_the_std(scheme):
    plain, _ = built(scheme)
    doubled, _ = built(scheme, gain=2.0)
    assert torch.allclose(2 * plain.blocks[1].mlp.fc.weight, doubled.blocks[1].mlp.fc.weight)


def test_every_tensor_is_set_by_one_rule(monkeypatch):
    asked = []

    def spy(place):
        asked.append((place.kind, place.layer))
        return Draw("normal", 0.02)

    monkeypatch.setitem(INIT_SCHEMES, "spy", spy)
    _, rows = built("spy")
    per_block = [(kind, i) for i in range(L) for kind in ("q", "k", "v", "proj", "fc", "mlp_proj")]
    assert sorted(asked, key=str) == sorted(
        [*per_block, ("wte", None), ("wpe", None), ("head", None)], key=str
    )
    assert len({row.tensor for row in rows}) == len(rows)


@pytest.mark.parametrize("scheme", INIT_SCHEMES)
def test_every_parameter_is_set_biases_to_zero_and_norms_to_the_identity(scheme):
    model, rows = built(scheme)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
    assert len({row.tensor for row in rows}) == len(rows)


@pytest.mark.parametrize("scheme", INIT_SCHEMES)
def test_the_seed_alone_decides_the_draw(scheme):
    torch.manual_seed(1)
    first, _ = built(scheme)
    torch.manual_seed(2)
    again, _ = built(scheme)
    other, _ = built(scheme, seed=1)
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, first.blocks[1].attn.qkv.weight)


def test_q_k_and_v_are_drawn_separately():
    model, _ = built("orthogonal")
    for part in model.blocks[0].attn.qkv.weight.chunk(3):
        assert torch.allclose(part @ part.T, torch.eye(64), atol=1e-5)


def test_schemes_of_one_seed_differ_by_their_rule_alone():
    model5, _ = built("model5")
    scaled, _ = built("normal", std=0.1)
    assert torch.allclose(5 * model5.blocks[2].mlp.fc.weight, scaled.blocks[2].mlp.fc.weight)


def test_more_layers_do_not_change_the_first():
    shallow, _ = built("normal", model_config=shape(n_layer=1))
    deep, _ = built("normal", model_config=shape(n_layer=3))
    assert torch.equal(shallow.blocks[0].mlp.fc.weight, deep.blocks[0].mlp.fc.weight)


@pytest.mark.full
def test_model5_gives_the_sources_table_at_the_sources_shape():
    model, _ = built(
        "model5", model_config=ModelConfig(n_layer=12, n_head=12, d_model=768, context=256)
    )
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.wpe.weight.std().item() == pytest.approx(0.0442, rel=0.01)
    assert model.blocks[5].mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_unknown_schemes_and_parameters_are_refused():
    with pytest.raises(InputError, match=r"'xavier' is unknown: .*take one of model5, normal, "):
        check_init(InitConfig(scheme="xavier"))
    says = "gpt2 does not take init.std: leave it out, or take one of normal"
    with pytest.raises(InputError, match=says):
        check_init(InitConfig(scheme="gpt2", std=0.1))
    check_init(InitConfig(scheme="normal", std=0.1))


def test_activations_keep_their_size_over_widths_under_mup_and_grow_under_normal(capsys):
    """The coordinate check of Yang et al. 2022, at init: RMS of what each branch adds."""
    rms = {}
    ids = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(0))
    for scheme in ("mup", "normal"):
        for d_model in (64, 128, 256):
            model, _ = built(scheme, model_config=shape(d_model, tied=False))
            with torch.no_grad(), module_outputs(model) as outputs:
                model(ids)
            branches = [outputs[f"blocks.{i}.{branch}"] for i in range(L) for branch in BRANCHES]
            rms[scheme, d_model] = torch.stack([x.square().mean().sqrt() for x in branches])
    with capsys.disabled():
        print("\nRMS of what the branches add, median over the blocks")
        for (scheme, d_model), values in rms.items():
            attn, mlp = values[::2].median(), values[1::2].median()
            print(f"{scheme:8s}d_model {d_model:4d}  attention {attn:.5f}  MLP {mlp:.5f}")
    for branch in (0, 1):
        wide, narrow = (rms["mup", d][branch::2].median() for d in (256, 64))
        assert 0.8 < wide / narrow < 1.25
        # Two Linears of fixed std in a row: each grows with the root of its fan_in.
        wide, narrow = (rms["normal", d][branch::2].median() for d in (256, 64))
        assert wide / narrow > 3
