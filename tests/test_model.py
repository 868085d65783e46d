import itertools

import pytest
import torch
import torch.nn.functional as F

from gptcore.config import InitConfig, ModelConfig
from gptcore.init_schemes import initialise
from gptcore.model import GPT, head_errors, head_loss, parts_of, softmax_sums
from gptcore.weights import model_parts

SMALL = ModelConfig(n_layer=2, n_head=2, d_model=16, context=12)


@pytest.fixture(scope="module")
def model():
    model = GPT(SMALL)
    initialise(model, InitConfig(scheme="normal", std=0.2))
    return model


def ids(*shape):
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(0))


def test_it_has_gpt2s_shape(model):
    assert model(ids(3, 12)).shape == (3, 12, 16)
    assert model.blocks[1].attn.qkv.weight.shape == (48, 16)
    assert model.head.weight is model.wte.weight
    d, layers = 16, 2
    block = 12 * d * d + 13 * d
    expected = (50257 + 12) * d + layers * block + 2 * d
    assert sum(p.numel() for p in model.parameters()) == expected


def test_post_norm_ends_every_block_normalised_and_has_no_norm_behind():
    post, deepnet = (
        GPT(ModelConfig(n_layer=8, n_head=2, d_model=16, context=12, norm=norm))
        for norm in ("post", "deepnet")
    )
    for model in (post, deepnet):
        initialise(model, InitConfig())
        hidden = model(ids(3, 12))
        assert torch.allclose(hidden.mean(2), torch.zeros(3, 12), atol=1e-5)
        assert torch.allclose(hidden.square().mean(2), torch.ones(3, 12), atol=1e-2)
        assert not [name for name, _ in model.named_parameters() if name.startswith("ln_f")]
    assert post.blocks[0].alpha == 1
    assert deepnet.blocks[0].alpha == 2  # (2 * 8)^(1/4)
    block = deepnet.blocks[0]
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    y = block.ln_1(2 * x + block.attn(x))
    assert torch.allclose(block(x), block.ln_2(2 * y + block.mlp(y)))


def test_an_untied_head_is_a_tensor_of_its_own():
    model = GPT(ModelConfig(n_layer=1, n_head=2, d_model=16, context=12, tied=False))
    rows = initialise(model, InitConfig())
    kinds = {row.kind: row.std for row in rows}
    assert kinds["head"] == 0.02
    assert kinds["wte"] == pytest.approx((2 / (50257 + 16)) ** 0.5)  # the embedding keeps Xavier
    assert not torch.equal(model.head.weight, model.wte.weight)
    assert "head" in {part.kind for part in model_parts(model, [0])}


def test_a_position_sees_nothing_that_comes_after_it(model):
    before = ids(2, 12)
    after = before.clone()
    after[:, 7:] = (after[:, 7:] + 1) % 50257
    first, second = model(before), model(after)
    assert torch.allclose(first[:, :7], second[:, :7], atol=1e-6)
    assert not torch.allclose(first[:, 7:], second[:, 7:], atol=1e-3)


def test_parts_cover_every_parameter_and_split_qkv(model):
    parts = [p for name, module in model.named_modules() for p in parts_of(name, module)]
    whole = {part.values.data_ptr() for part in parts}
    assert whole >= {parameter.data_ptr() for parameter in model.parameters()}
    assert len({part.name for part in parts}) == len(parts)
    by_name = {part.name: part for part in parts}
    q, k, v = (by_name[f"blocks.1.attn.{kind}"].values for kind in "qkv")
    assert torch.equal(torch.cat([q, k, v]), model.blocks[1].attn.qkv.weight)
    assert by_name["blocks.1.mlp.proj"].kind == "mlp_proj"
    assert by_name["blocks.1.attn.proj"].kind == "proj"
    assert by_name["wpe"].layer is None


@pytest.mark.parametrize(
    "sequences", [1, 5, 21, 22, 43]
)  # below, around and above a chunk of tokens
@pytest.mark.parametrize("scale", [1.0, 200.0])  # logits that need no shift, and logits that do
def test_the_chunked_head_is_cross_entropy(sequences, scale):
    generator = torch.Generator().manual_seed(1)
    weight = (0.1 * torch.randn(50257, 16, generator=generator)).requires_grad_()
    hidden = (scale * torch.randn(sequences, 12, 16, generator=generator)).requires_grad_()
    targets = ids(sequences, 12)

    loss, log_z, grad = head_loss(hidden, weight, targets)
    got = grad, weight.grad
    weight.grad = None
    logits = hidden.double() @ weight.double().T
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(log_z.double(), torch.logsumexp(logits, 2), rtol=1e-5)
    for ours, reference in zip(got, (hidden.grad, weight.grad), strict=True):
        assert torch.allclose(ours, reference, atol=1e-4 * reference.abs().max().item())


def test_the_head_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(*shape, 5, dtype=torch.double, generator=generator) for shape in ((2, 3), (11,))
    )
    targets = torch.randint(11, (2, 3), generator=generator)
    found = head_loss(hidden, weight, targets)
    for values, gradient in ((hidden, found.grad_BTD), (weight, weight.grad.clone())):
        for where in itertools.product(*map(range, values.shape)):
            losses = []
            for side in (1e-6, -1e-6):
                values[where] += side
                losses.append(head_loss(hidden, weight, targets).loss)
                values[where] -= side
            assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(gradient[where].item(), abs=1e-8)


def test_the_head_adds_its_gradient_to_that_of_the_weight():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*shape, 5, generator=generator) for shape in ((2, 3), (11,)))
    targets = torch.randint(11, (2, 3), generator=generator)
    head_loss(hidden, weight, targets)
    once, place = weight.grad.clone(), weight.grad.data_ptr()
    head_loss(hidden, weight, targets)
    assert torch.allclose(weight.grad, 2 * once)
    assert weight.grad.data_ptr() == place


@pytest.mark.parametrize("vocabulary", [1000, 50257])  # one tile and many
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_a_head_in_bfloat16_is_near_the_exact_one_and_its_error_is_reported(scale, vocabulary):
    generator = torch.Generator().manual_seed(1)
    weight = 0.1 * torch.randn(vocabulary, 16, generator=generator)
    hidden = scale * torch.randn(30, 12, 16, generator=generator)
    targets = ids(30, 12) % vocabulary
    exact = head_loss(hidden, weight, targets)
    gradient, weight.grad = weight.grad, None
    low = head_loss(hidden, weight, targets, torch.bfloat16)
    loss_error, gradient_error = head_errors(hidden, weight, targets, "bf16")
    assert loss_error == pytest.approx(abs(low.loss - exact.loss).item(), rel=1e-3)
    assert 0 < loss_error < 1e-3 * exact.loss.item()
    found = [
        ((a - b).norm() / b.norm()).item()
        for a, b in ((low.grad_BTD, exact.grad_BTD), (weight.grad, gradient))
    ]
    assert gradient_error == pytest.approx(max(found), rel=1e-3)
    assert gradient_error < 0.02 * scale**0.5


def test_a_loss_that_is_not_finite_comes_out_as_such():
    hidden = torch.full((1, 2, 4), float("nan"))
    assert head_loss(hidden, torch.ones(10, 4), torch.zeros(1, 2, dtype=torch.long)).loss.isnan()


@pytest.mark.parametrize("scale", [1.0, 200.0])  # logits that need no shift, and logits that do
def test_sums_of_probability_are_those_of_softmax(scale):
    generator = torch.Generator().manual_seed(2)
    weight = 0.1 * torch.randn(50257, 16, generator=generator)
    hidden = scale * torch.randn(9, 16, generator=generator)
    members = (torch.rand(3, 50257, generator=generator) < 0.3).float()
    prob, log_z = softmax_sums(hidden, weight, members)
    logits = (hidden @ weight.T).double()
    assert torch.allclose(prob.double(), logits.softmax(1) @ members.double().T, atol=1e-5)
    assert torch.allclose(log_z.double(), logits.logsumexp(1), atol=1e-5, rtol=1e-6)
