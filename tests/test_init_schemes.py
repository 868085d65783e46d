"""Formulas are written out here anew, so that a slip in a scheme shows."""

from math import sqrt

import pytest
import torch

from gptcore.config import InitConfig, InputError, ModelConfig
from gptcore.init_schemes import INIT_SCHEMES, check_init, initialise
from gptcore.model import GPT

D, L, V, T = 64, 4, 50257, 64
SHAPE = ModelConfig(d_model=D, n_layer=L, n_head=4, context=T)


def same(std, **others):
    kinds = ("wte", "wpe", "q", "k", "v", "proj", "fc", "mlp_proj")
    return dict.fromkeys(kinds, std) | others


EXPECTED = {
    # The head, a Linear, comes after the embedding it is tied to.
    "model5": same(0.02, wpe=sqrt(2 / (T + D))),
    "gpt2": same(0.02, proj=0.02 / sqrt(2 * L), mlp_proj=0.02 / sqrt(2 * L)),
    "normal": same(0.02),
    "xavier_normal": same(
        sqrt(2 / (D + D)),
        wte=sqrt(2 / (V + D)),
        wpe=sqrt(2 / (T + D)),
        fc=sqrt(2 / (D + 4 * D)),
        mlp_proj=sqrt(2 / (D + 4 * D)),
    ),
    "kaiming_normal": same(sqrt(2 / D), mlp_proj=sqrt(2 / (4 * D))),
    "orthogonal": same(
        1 / sqrt(D), wte=1 / sqrt(V), wpe=1 / sqrt(max(T, D)), fc=1 / sqrt(4 * D),
        mlp_proj=1 / sqrt(4 * D),
    ),
}  # fmt: skip


def built(scheme, seed=0, shape=SHAPE, **parameters):
    model = GPT(shape)
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


@pytest.mark.parametrize("scheme", INIT_SCHEMES)
def test_measured_std_is_the_formulas(scheme, capsys):
    model, rows = built(scheme)
    lines = [f"\n{scheme:16s}expected  measured  said"]
    for kind, tensors in weights(model).items():
        values = torch.cat([tensor.detach().flatten() for tensor in tensors])
        # Five standard errors of a normal's std, and a little for what rounding does.
        tolerance = 5 / sqrt(2 * values.numel()) + 0.001
        (said,) = {row.std for row in rows if row.kind == kind}
        lines.append(
            f"{kind:16s}{EXPECTED[scheme][kind]:.5f}   {values.std().item():.5f}   {said:.5f}"
        )
        assert values.std().item() == pytest.approx(EXPECTED[scheme][kind], rel=tolerance), kind
        assert said == pytest.approx(EXPECTED[scheme][kind], rel=1e-12), kind
    with capsys.disabled():
        print("\n".join(lines))


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


def test_q_k_and_v_are_drawn_apart():
    model, _ = built("orthogonal")
    for part in model.blocks[0].attn.qkv.weight.chunk(3):
        assert torch.allclose(part @ part.T, torch.eye(D), atol=1e-5)


def test_schemes_of_one_seed_differ_by_their_rule_alone():
    model5, _ = built("model5")
    scaled, _ = built("normal", std=0.1)
    assert torch.allclose(5 * model5.blocks[2].mlp.fc.weight, scaled.blocks[2].mlp.fc.weight)


def test_more_layers_do_not_change_the_first():
    shallow, _ = built("normal", shape=ModelConfig(n_layer=1))
    deep, _ = built("normal", shape=ModelConfig(n_layer=3))
    assert torch.equal(shallow.blocks[0].mlp.fc.weight, deep.blocks[0].mlp.fc.weight)


@pytest.mark.slow
def test_model5_gives_the_sources_table_at_the_sources_shape():
    model, _ = built("model5", shape=ModelConfig(n_layer=12, n_head=12, d_model=768, context=256))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.wpe.weight.std().item() == pytest.approx(0.0442, rel=0.01)
    assert model.blocks[5].mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_unknown_schemes_and_parameters_are_refused():
    with pytest.raises(InputError, match="'xavier' is unknown: take model5, gpt2"):
        check_init(InitConfig(scheme="xavier"))
    with pytest.raises(InputError, match=r"gpt2 takes no init.std: the schemes that do are normal"):
        check_init(InitConfig(scheme="gpt2", std=0.1))
    check_init(InitConfig(scheme="normal", std=0.1))
