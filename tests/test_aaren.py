"""Aaren against torch's softmax over each prefix in float64, outputs and gradients, and the law of its state."""

import math

import pytest
import torch

from minrnn.mixers import Aaren, make
from minrnn.mixers.base import state_map
from minrnn.models import parameter_groups

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
SHAPES = {"one_step": (1, 6, 3), "odd": (7, 15, 5), "one_head": (33, 5, 1), "heads_of_one": (63, 4, 4)}  # T, D, heads


def prefix_softmax(heads, x, kv, query, out):
    """The whole layer from its weights: one head at a time, all pairs of steps, a mask."""
    D, T = x.shape[2], x.shape[1]
    width = D // heads
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        key, value = x @ kv[:D][rows].T, x @ kv[D:][rows].T
        scores = (key @ query[head] / width**0.5)[:, None, :].expand(-1, T, -1)
        outputs.append(torch.softmax(scores.masked_fill(future, -math.inf), -1) @ value)
    return torch.cat(outputs, -1) @ out.T


def varied(dim, heads, dtype=torch.float64):
    """A layer whose scores spread over several units, so that the maximum moves and old values fade."""
    layer = Aaren(dim, heads)
    with torch.no_grad():
        layer.kv.weight.mul_(2)
        layer.query.mul_(4)
    return layer.to(dtype)


def wide_leaves(layer, x):
    """x and the parameters by name, as float64 leaves of their own."""
    leaves = {"x": x, "kv": layer.kv.weight, "query": layer.query, "out": layer.out.weight}
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


def leaves_of(layer, x):
    return {"x": x, "kv": layer.kv.weight, "query": layer.query, "out": layer.out.weight}


def assert_close(got, expected, tolerance, name=""):
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    assert got.isfinite().all() and expected.isfinite().all(), name
    error = ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1)).item()
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same_as_softmax(layer, x, y, tolerance, scale=10):
    """y, made from x by the layer, and its gradients, whose sums cancel from `scale` times their size."""
    wide = wide_leaves(layer, x)
    expected = prefix_softmax(layer.heads, **wide)
    assert_close(y.detach(), expected.detach(), tolerance, "y")
    assert y.dtype == x.dtype
    weight = torch.randn_like(expected)
    leaves = leaves_of(layer, x)
    got = torch.autograd.grad(y, leaves.values(), weight.to(y.dtype))
    wanted = torch.autograd.grad(expected, wide.values(), weight)
    for name, one, other in zip(leaves, got, wanted, strict=True):
        assert_close(one, other, tolerance * scale, name)


def by_steps(layer, x, state):
    outputs = []
    for x_t in x.unbind(1):
        y, state = layer.step(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape, dtype):
    T, dim, heads = SHAPES[shape]
    layer = varied(dim, heads, dtype)
    x = torch.randn(2, T, dim, dtype=dtype, requires_grad=True)
    y, none = layer(x)
    assert none is None
    assert_same_as_softmax(layer, x, y, TOLERANCE[dtype])
    assert_same_as_softmax(layer, x, layer(x, layer.initial_state(2))[0], TOLERANCE[dtype])
    assert_same_as_softmax(layer, x, by_steps(layer, x, layer.initial_state(2))[0], TOLERANCE[dtype])


def test_second_gradients():
    layer, x = varied(4, 2), torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("how", ("chunk, chunk", "chunk, steps", "steps, chunk"))
def test_every_split(how, dtype):
    """Outputs, the last state, and the gradients of outputs and of those after the split alone: through the state."""
    ways = {"chunk": lambda layer, x, state: layer(x, state), "steps": by_steps}
    first, second = (ways[way] for way in how.split(", "))
    layer = varied(6, 3, dtype)
    x = torch.randn(2, 9, 6, dtype=dtype, requires_grad=True)
    wide = wide_leaves(layer, x)
    expected = prefix_softmax(3, **wide)
    last = layer(x, layer.initial_state(2))[1]
    weight = torch.randn_like(expected)
    for split in range(1, 9):
        start, carried = first(layer, x[:, :split], layer.initial_state(2))
        end, state = second(layer, x[:, split:], carried)
        assert_close(torch.cat([start, end], 1).detach(), expected.detach(), TOLERANCE[dtype], f"y, {split}")
        for name, one, other in zip(("numerator", "denominator", "maximum"), state, last, strict=True):
            assert_close(one.detach(), other.detach(), TOLERANCE[dtype], f"{name}, {split}")
            assert one.dtype == dtype
        leaves = leaves_of(layer, x)
        got = torch.autograd.grad(end, leaves.values(), weight[:, split:].to(dtype))
        wanted = torch.autograd.grad(expected[:, split:], wide.values(), weight[:, split:], retain_graph=True)
        assert wanted[0][:, :split].norm() > 1e-2
        for name, one, other in zip(leaves, got, wanted, strict=True):
            assert_close(one, other, 10 * TOLERANCE[dtype], f"{name}, {split}")


@pytest.mark.parametrize("way", ("forward", "step"))
def test_gradients_of_a_given_state(way):
    """A state as leaves, and the state after it used once more: against the sums without any maximum."""
    layer = varied(6, 3)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    shapes = ((2, 3, 2), (2, 3, 1), (2, 3, 1))
    state = tuple(torch.randn(shape, dtype=torch.float64).abs().requires_grad_() for shape in shapes)
    if way == "forward":
        y, between = layer(x[:, :3], state)
        y = torch.cat([y, layer(x[:, 3:], between)[0]], 1)
    else:
        y, _ = by_steps(layer, x, state)
    numerator, denominator = (part * state[2].exp() for part in state[:2])
    expected = []
    for x_t in x.unbind(1):
        key, value = (x_t @ part.T for part in layer.kv.weight.split(6))
        weight = torch.exp((key.view(2, 3, 2) * layer.query).sum(-1, keepdim=True) / 2**0.5)
        numerator, denominator = numerator + weight * value.view(2, 3, 2), denominator + weight
        expected.append((numerator / denominator).flatten(1) @ layer.out.weight.T)
    expected = torch.stack(expected, 1)
    assert_close(y.detach(), expected.detach(), 1e-12, "y")
    weight = torch.randn_like(y)
    got, wanted = (torch.autograd.grad(z, state, weight) for z in (y, expected))
    for name, one, other in zip(("numerator", "denominator", "maximum"), got, wanted, strict=True):
        assert other.norm() > 1e-3, name
        assert_close(one, other, 1e-12, name)


SCORES = {
    "rising": torch.linspace(-1e4, 1e4, 12),
    "falling": torch.linspace(1e4, -1e4, 12),
    "alternating": torch.tensor([1e4, -1e4] * 6),
    "all_low": torch.full((12,), -1e4) + torch.linspace(0, 2, 12),
    "all_high": torch.full((12,), 1e4) - torch.linspace(0, 2, 12),
    "low_then_usual": torch.cat([torch.full((4,), -1e4), torch.randn(8, generator=torch.Generator().manual_seed(3))]),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scores", SCORES)
def test_huge_scores(scores, dtype):
    """One head of four channels with the query (2, 0, 0, 0) and x's first channel as the key: that is the score."""
    layer = Aaren(4, 1)
    with torch.no_grad():
        layer.query.copy_(torch.tensor([[2.0, 0, 0, 0]]))
        layer.kv.weight[:4] = torch.eye(4)
        layer.kv.weight[4:, 0] = 0  # nor is the value huge
    layer.to(dtype)
    x = torch.randn(2, 12, 4, dtype=dtype)
    x[..., 0] = SCORES[scores]
    x.requires_grad_()
    start, state = layer(x[:, :5], layer.initial_state(2))
    assert all(part.isfinite().all() for part in state)
    in_chunks = torch.cat([start, layer(x[:, 5:], state)[0]], 1)
    # The query's and the keys' gradients are sums of x, as large as the scores, times terms that add up to 0.
    for y in (layer(x)[0], in_chunks, by_steps(layer, x, layer.initial_state(2))[0]):
        assert_same_as_softmax(layer, x, y, TOLERANCE[dtype], scale=1000)


def test_first_token():
    """Nothing came before it: the average is its own value, and the state it leaves is (value, 1, score)."""
    layer = varied(6, 3, torch.float32)
    empty = layer.initial_state(2)
    assert [tuple(part.shape) for part in empty] == [(2, 3, 2), (2, 3, 1), (2, 3, 1)]
    assert not empty[0].any() and not empty[1].any() and (empty[2] == -math.inf).all()
    x = torch.randn(2, 1, 6, requires_grad=True)
    key, value = (part.view(2, 3, 2) for part in (x[:, 0] @ layer.kv.weight.T).chunk(2, -1))
    for y, state in (layer(x, empty), by_steps(layer, x, empty)):
        assert_close(y[:, 0].detach(), (value.flatten(1) @ layer.out.weight.T).detach(), 1e-6, "y")
        assert_close(state[0].detach(), value.detach(), 1e-6, "numerator")
        assert (state[1] == 1).all()
        assert_close(state[2].detach(), (key * layer.query).sum(-1, keepdim=True).detach() / 2**0.5, 1e-6, "maximum")
        leaves = leaves_of(layer, x)
        for name, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves.values()), strict=True):
            assert grad.isfinite().all(), name
            # One value alone has weight 1, whatever its score.
            assert (grad.norm() < 1e-5) == (name == "query"), name
    assert not empty[0].any() and (empty[2] == -math.inf).all(), "the state was changed in place"


@pytest.mark.parametrize("narrow", ("autocast", "parameters"))
def test_sums_and_state_stay_wide(narrow):
    """Linears in bfloat16; from their outputs on, 1000 steps of float32, forward and stepwise."""
    layer = varied(6, 3, torch.bfloat16 if narrow == "parameters" else torch.float32)
    x = torch.randn(2, 1000, 6).to(layer.query.dtype)
    projected = x.bfloat16() @ layer.kv.weight.detach().bfloat16().T
    key, value = projected.double().view(2, 1000, 2, 3, 2).unbind(2)
    scores = (key * layer.query.detach()).sum(-1) / 2**0.5
    average = (torch.softmax(scores, 1)[..., None] * value).sum(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow == "autocast"):
        y, state = layer(x, layer.initial_state(2))
        y_steps, state_steps = by_steps(layer, x, layer.initial_state(2))
        y.float().square().mean().backward()
    assert layer.query.grad.isfinite().all() and layer.query.grad.any()
    for found in (state, state_steps):
        assert {part.dtype for part in found} == {torch.float32}
        assert_close((found[0] / found[1]).detach(), average, 1e-5, "average")
        assert_close(found[2].squeeze(-1).detach(), scores.amax(1), 1e-6, "maximum")
    expected = prefix_softmax(3, **wide_leaves(layer, x)).detach()
    for found in (y, y_steps):
        assert found.dtype == torch.bfloat16
        assert_close(found.detach(), expected, 2e-2, "y")


def test_float64_stays_so():
    layer = Aaren(8).double()
    x = torch.randn(2, 5, 8).double()
    for y, state in (layer(x, layer.initial_state(2)), by_steps(layer, x, layer.initial_state(2))):
        assert {part.dtype for part in (y, *state, *layer.initial_state(2))} == {torch.float64}


def test_the_state_does_not_grow():
    layer = Aaren(8, 2)
    sizes = []
    for T in (1, 50):
        state_map(lambda part: sizes.append(part.shape) or part, layer(torch.randn(3, T, 8), layer.initial_state(3))[1])
    assert sizes[:3] == sizes[3:] == [part.shape for part in layer.initial_state(3)]


def test_any_layout_of_the_input():
    layer, x = varied(6, 3), torch.randn(5, 2, 6, dtype=torch.float64)
    assert_close(layer(x.transpose(0, 1))[0].detach(), layer(x.transpose(0, 1).contiguous())[0].detach(), 1e-14)


def test_settings():
    assert isinstance(make("aaren")(8), Aaren)
    assert [Aaren(dim).heads for dim in (8, 256, 320)] == [4, 4, 5]
    layer = make("aaren", heads=2)(8)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
        "query": (2, 4), "kv.weight": (16, 8), "out.weight": (8, 8)
    }  # fmt: skip
    kept, decayed = sorted(parameter_groups(layer, 1e-3, 0.1), key=lambda group: group["weight_decay"])
    assert kept["weight_decay"] == 0 and [id(p) for p in kept["params"]] == [id(layer.query)]
    assert decayed["weight_decay"] == 0.1 and len(decayed["params"]) == 2


@pytest.mark.parametrize("heads", (1, 4, 64))
def test_initial_scores_have_the_keys_size_at_any_width(heads):
    layer = Aaren(256, heads)
    _, (_, _, score) = layer.step(torch.randn(2000, 256), layer.initial_state(2000))
    assert 0.5 < score.std() / (1 / 3) ** 0.5 < 1.5  # torch's Linears give keys a variance of 1/3


@pytest.mark.parametrize("dim, heads", ((8, 3), (8, 0), (8, -2), (8, 16), (6, None)))
def test_heads_that_do_not_divide_the_width(dim, heads):
    with pytest.raises(
        ValueError, match=f"heads: expected a divisor of dim={dim}, got {4 if heads is None else heads}"
    ):
        Aaren(dim, heads)
