"""Decision Transformer and Decision Mamba are the published ones: against plain loops in float64, and by count.

Decision Transformer: https://github.com/kzl/decision-transformer/tree/e2d82e68f330c00f763507b3b01d774740bee53f/gym/
decision_transformer/models. Decision Mamba: https://github.com/Toshihiro-Ota/decision-mamba/tree/
35f99441975c47f8652f82e37b63998d360521e6/gym/models.
"""

import math

import pytest
import torch

from experiments import decision, launch

STATE, ACTION = 11, 3  # Hopper's
B, K = 3, 6


def published(name, *settings):
    return decision.model(launch.resolve("decision", [f"model={name}", "profile=paper", *settings]), STATE, ACTION)


# -- the models, one number after another; p: parameters by name


def linear(p, name, x):
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layer_norm(p, name, x):
    centred = x - x.sum() / len(x)
    return centred / ((centred**2).sum() / len(x) + 1e-5) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def relu(x):
    return torch.where(x > 0, x, 0)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x):
    return x / (1 + torch.exp(-x))


def attention(p, name, sequence):
    """One head."""
    queries, keys, values = zip(*(linear(p, f"{name}.qkv", x).chunk(3) for x in sequence), strict=True)
    outputs = []
    for t, query in enumerate(queries):
        weights = [torch.exp(query @ key / math.sqrt(len(query))) for key in keys[: t + 1]]
        mixed = sum(weight * value for weight, value in zip(weights, values, strict=False)) / sum(weights)
        outputs.append(linear(p, f"{name}.out", mixed))
    return outputs


def mamba(p, name, sequence):
    A, N = -torch.exp(p[f"{name}.inner.A_log"]), p[f"{name}.inner.A_log"].shape[1]
    taps, h, past, outputs = p[f"{name}.conv.weight"], 0, [], []
    for token in sequence:
        x, z = linear(p, f"{name}.in_proj", token).chunk(2)
        past.append(x)
        u = p[f"{name}.conv.bias"]
        for back in range(min(len(taps), len(past))):
            u = u + taps[len(taps) - 1 - back] * past[-1 - back]
        u = silu(u)
        selected = p[f"{name}.inner.x_proj.weight"] @ u
        low, B, C = selected[: -2 * N], selected[-2 * N : -N], selected[-N:]
        dt = torch.log(1 + torch.exp(linear(p, f"{name}.inner.dt_proj", low)))
        h = torch.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B
        outputs.append(linear(p, f"{name}.out_proj", (h @ C + p[f"{name}.inner.D"] * u) * silu(z)))
    return outputs


def plain(p, layers, mixer, activation, returns_to_go, states, actions, timesteps):
    found = []
    for b in range(len(states)):
        stream = []
        for t, timestep in enumerate(timesteps[b].tolist()):
            for kind, value in (("return", returns_to_go), ("state", states), ("action", actions)):
                embedded = linear(p, f"embed_{kind}", value[b, t]) + p["embed_timestep.weight"][timestep]
                stream.append(layer_norm(p, "embed_ln", embedded))
        for i in range(layers):
            mixed = mixer(p, f"backbone.mixers.{i}", [layer_norm(p, f"backbone.norms.{i}", x) for x in stream])
            stream = [x + y for x, y in zip(stream, mixed, strict=True)]
            for place, x in enumerate(stream):
                hidden = activation(linear(p, f"backbone.mlps.{i}.fc", layer_norm(p, f"backbone.mlp_norms.{i}", x)))
                stream[place] = x + linear(p, f"backbone.mlps.{i}.out", hidden)
        after_states = [layer_norm(p, "backbone.norm", x) for x in stream[1::3]]
        found.append(torch.stack([torch.tanh(linear(p, "predict_action.0", x)) for x in after_states]))
    return torch.stack(found)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-13), (torch.float32, 1e-6)))
@pytest.mark.parametrize("name, mixer, activation", (("transformer", attention, relu), ("mamba", mamba, gelu)))
def test_outputs_and_all_gradients_are_the_published_models(name, mixer, activation, dtype, tolerance):
    torch.manual_seed(0)
    net = published(name, "model.dim=8", "model.layers=2", "model.dropout=0").to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():  # what starts as 0 or 1 would hide its mistakes
            parameter += 0.1 * torch.randn_like(parameter)
    inputs = [torch.randn(B, K, size, dtype=dtype) for size in (1, STATE, ACTION)]
    timesteps = torch.randint(990, (B, 1)) + torch.arange(K)
    timesteps[0, :2] = 0  # padding on the left, whose timesteps are 0
    leaves = [*net.parameters(), *(x.requires_grad_() for x in inputs)]
    weight = torch.randn(B, K, ACTION, dtype=dtype)
    out = net(*inputs, timesteps)
    grads = torch.autograd.grad(out, leaves, weight)

    wide = [x.detach().double().requires_grad_() for x in leaves]
    names = [name for name, _ in net.named_parameters()]
    expected = plain(dict(zip(names, wide, strict=False)), 2, mixer, activation, *wide[-3:], timesteps)
    wide_grads = torch.autograd.grad(expected, wide, weight.double())
    names += ["returns_to_go", "states", "actions"]
    pairs = {
        "out": (out, expected),
        "gradient": [torch.cat([x.flatten() for x in each]) for each in (grads, wide_grads)],
    }
    pairs |= {f"grad of {key}": pair for key, pair in zip(names, zip(grads, wide_grads, strict=True), strict=True)}
    for key, (got, value) in pairs.items():
        error = ((got.double() - value).norm() / value.norm()).item()
        # A part may be small beside the terms that it is the sum of.
        assert error <= tolerance * (1 if key in ("out", "gradient") else 4), f"{key}: {error:.1e}"


# -- what surrounds the mathematics


def test_decision_transformer_has_as_many_parameters_as_published():
    d = 128
    embeddings = (1 + 1) * d + (STATE + 1) * d + (ACTION + 1) * d + 1000 * d  # return, state, action, timestep
    layer = 2 * d + (d + 1) * 3 * d + (d + 1) * d + 2 * d + (d + 1) * 4 * d + (4 * d + 1) * d
    whole = embeddings + 2 * d + 3 * layer + 2 * d + (d + 1) * ACTION
    # The published model's count less its GPT-2's word embedding of one row, which nothing reads; its heads for state
    # and return, which nothing trains, are not in it either.
    assert whole == 726_147 - 1 * d == 726_019
    assert sum(x.numel() for x in published("transformer").parameters()) == whole


def test_decision_mamba_has_as_many_parameters_as_published():
    d, inner, N, rank = 128, 256, 16, 8
    embeddings = (1 + 1) * d + (STATE + 1) * d + (ACTION + 1) * d + 1000 * d
    block = d * 2 * inner + (4 + 1) * inner + inner * (rank + 2 * N) + (rank + 1) * inner + (N + 1) * inner + inner * d
    layer = 2 * d + block + 2 * d + (d + 1) * 4 * d + (4 * d + 1) * d
    whole = embeddings + 2 * d + 3 * layer + 2 * d + (d + 1) * ACTION
    assert whole == 877_315 == sum(x.numel() for x in published("mamba").parameters())


def uniform(bound):
    return bound / math.sqrt(3)


@pytest.mark.parametrize("name", ("transformer", "mamba"))
def test_initial_values_are_the_published_models(name):
    nets = []
    for seed in range(20):  # embed_return has 128 weights
        torch.manual_seed(seed)
        nets.append(dict(published(name).named_parameters()))
    outside = {
        "embed_timestep.weight": 1, "predict_action.0.weight": uniform(128**-0.5),
        "predict_action.0.bias": uniform(128**-0.5),
    }  # fmt: skip
    for kind, size in (("return", 1), ("state", STATE), ("action", ACTION)):
        outside |= {f"embed_{kind}.{x}": uniform(size**-0.5) for x in ("weight", "bias")}
    for key in nets[0]:
        values = torch.stack([net[key].detach() for net in nets])
        if "norm" in key or "embed_ln" in key:
            assert (values == (1 if key.endswith("weight") else 0)).all(), key
        elif key.endswith("A_log"):
            assert torch.allclose(values.exp(), torch.arange(1.0, 17)), key
        elif key.endswith("inner.D"):
            assert (values == 1).all(), key
        elif ".conv." in key:
            assert values.std().item() == pytest.approx(uniform(4**-0.5), rel=0.03), key
        elif key in outside:  # 60 numbers are few
            assert values.std().item() == pytest.approx(outside[key], rel=0.03 if values.numel() > 1000 else 0.15), key
        elif key.endswith("bias"):
            assert (values == 0).all(), key
        else:
            assert values.std().item() == pytest.approx(0.02, rel=0.03) and abs(values.mean()) < 1e-3, key
    if name == "mamba":
        biases = [value for key, value in nets[0].items() if key.endswith("dt_proj.bias")]
        assert len(biases) == 3 and all((x == 0).all() for x in biases)  # softplus(0) = 0.693 in every channel


def test_timestep_embeddings_may_start_small():
    for name in ("transformer", "mingru"):
        net = published(name, "data.timestep_std=0.02")
        assert net.embed_timestep.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_where_there_is_dropout():
    transformer, mamba = published("transformer"), published("mamba")
    assert [x.dropout for x in transformer.backbone.mixers] == [0.1] * 3
    for net, mixer_dropout in ((transformer, 0.1), (mamba, 0), (published("mingru"), 0)):
        assert net.drop.p == 0.1 and net.backbone.mixer_dropout.p == mixer_dropout
        assert [mlp.dropout.p for mlp in net.backbone.mlps] == [0.1] * 3


def test_a_model_and_a_dataset_are_all_that_a_command_needs():
    """What the published models differ in is in their files, and no profile undoes it."""
    expected = {
        "transformer": ("right", 20, 3), "mamba": ("left", 20, 3), "aaren": ("right", None, 3),
        "s4": ("right", None, 1),
        "mingru": ("right", None, 3), "minlstm": ("right", None, 3), "gru": ("right", None, 3),
        "lstm": ("right", None, 3),
    }  # fmt: skip
    for name, values in expected.items():
        for profile in ("cpu", "paper"):
            cfg = launch.resolve("decision", [f"model={name}", f"profile={profile}"])
            assert (cfg.data.padding, cfg.eval.context_length, cfg.data.tokens) == values, (name, profile)
            assert (cfg.data.context_length, cfg.data.timestep_std) == (20, 1.0)
            assert cfg.eval.episodes == {"cpu": 50, "paper": 100}[profile]
    cfg = launch.resolve("decision", ["model=mamba", "data.context_length=50"])
    assert cfg.eval.context_length == 50
