"""Language models as their authors define them, written out here in float64 loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from experiments import charlm
from experiments.launch import resolve
from minrnn.models import parameter_groups

B, T, VOCAB = 2, 13, 65
TOKENS = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(1))


def build(*overrides, dtype=torch.float64):
    torch.manual_seed(0)
    cfg = resolve("charlm", list(overrides))
    return cfg, charlm.model(cfg, VOCAB).to(dtype)


def moved(model):
    """With every parameter away from values, such as 0 and 1, at which mistakes cancel."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def compared(model, written):
    """The largest relative difference of logits and of each parameter's gradient between a model and its equations.

    `written` takes the parameters by name and ids, and gives logits.
    """
    names = dict(model.named_parameters())
    theirs = {name: p.detach().double().clone().requires_grad_() for name, p in names.items()}
    found = []
    for logits, parameters in ((model(TOKENS[:, :-1])[0], names), (written(theirs, TOKENS[:, :-1]), theirs)):
        loss = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        found.append({"logits": logits.detach()} | dict(zip(parameters, gradients, strict=True)))
    differences = {k: ((found[0][k] - found[1][k]).norm() / found[1][k].norm()).item() for k in found[1]}
    assert all(found[1][k].norm() > 0 for k in found[1])
    return max(differences.values()), differences


def g(x):
    return torch.where(x >= 0, x + 0.5, 1 / (1 + torch.exp(-x)))


def gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def norm(p, name, x):
    if f"{name}.gamma" in p:  # RMSNorm as in the authors' code; eps is that of F.rms_norm
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (1 + p[f"{name}.gamma"])
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]


EPS = torch.finfo(torch.float64).eps


def geglu(p, name, x):
    gate, value = (x @ p[f"{name}.fc.weight"].T + p[f"{name}.fc.bias"]).chunk(2, -1)
    return gelu(gate) * value * p[f"{name}.scale"] @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]


def convolution(p, i, x):
    """Depthwise of 4 over the past, then pointwise."""
    weight, rows = p[f"backbone.convs.{i}.weight"], []
    for t in range(x.shape[1]):
        past = [weight[3 - k] * x[:, t - k] for k in range(4) if t >= k]
        rows.append(p[f"backbone.convs.{i}.bias"] + sum(past))
    y = torch.stack(rows, 1)
    return y @ p[f"backbone.pointwise.{i}.weight"].T + p[f"backbone.pointwise.{i}.bias"]


def min_rnn(kind):
    def mix(p, name, x):
        h, rows = g(p[f"{name}.initial"]).expand(len(x), -1), []
        weight, bias = p[f"{name}.rnn.weight_ih_l0"], p[f"{name}.rnn.bias_ih_l0"]
        for x_t in x.unbind(1):
            *gates, candidate = (x_t @ weight.T + bias).chunk(2 if kind == "mingru" else 3, -1)
            gates = [1 / (1 + torch.exp(-gate)) for gate in gates]
            if kind == "mingru":
                (z,) = gates
                h = (1 - z) * h + z * g(candidate)
            else:
                f, i = gates
                total = f + i if kind == "minlstm" else 1
                h = f / total * h + i / total * g(candidate)
            rows.append(h)
        return torch.stack(rows, 1) @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]

    return mix


def gru(p, name, x):
    h, rows = x.new_zeros(len(x), p[f"{name}.rnn.weight_hh_l0"].shape[1]), []
    for x_t in x.unbind(1):
        xr, xz, xn = (x_t @ p[f"{name}.rnn.weight_ih_l0"].T + p[f"{name}.rnn.bias_ih_l0"]).chunk(3, -1)
        hr, hz, hn = (h @ p[f"{name}.rnn.weight_hh_l0"].T + p[f"{name}.rnn.bias_hh_l0"]).chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        h = (1 - z) * torch.tanh(xn + r * hn) + z * h
        rows.append(h)
    return torch.stack(rows, 1) @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]


def lstm(p, name, x):
    h = c = x.new_zeros(len(x), p[f"{name}.rnn.weight_hh_l0"].shape[1])
    rows = []
    for x_t in x.unbind(1):
        both = x_t @ p[f"{name}.rnn.weight_ih_l0"].T + h @ p[f"{name}.rnn.weight_hh_l0"].T
        i, f, n, o = (both + p[f"{name}.rnn.bias_ih_l0"] + p[f"{name}.rnn.bias_hh_l0"]).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n)
        h = torch.sigmoid(o) * torch.tanh(c)
        rows.append(h)
    return torch.stack(rows, 1) @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]


def mamba(p, name, x):
    """arXiv 2312.00752, algorithm 2 and figure 3, with dt_rank = ceil(D / 16) and a state of 16."""
    inside, gate = (x @ p[f"{name}.in_proj.weight"].T).chunk(2, -1)
    weight, rank = p[f"{name}.conv.weight"], p[f"{name}.inner.dt_proj.weight"].shape[1]
    A, h, rows = -torch.exp(p[f"{name}.inner.A_log"]), 0, []
    for t in range(x.shape[1]):
        u = p[f"{name}.conv.bias"] + sum(weight[3 - k] * inside[:, t - k] for k in range(4) if t >= k)
        u = u / (1 + torch.exp(-u))
        low, b, c = (u @ p[f"{name}.inner.x_proj.weight"].T).split([rank, 16, 16], -1)
        dt = torch.log1p(torch.exp(low @ p[f"{name}.inner.dt_proj.weight"].T + p[f"{name}.inner.dt_proj.bias"]))
        h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * b[:, None]
        y = (h * c[:, None]).sum(-1) + p[f"{name}.inner.D"] * u
        rows.append(y * gate[:, t] / (1 + torch.exp(-gate[:, t])))
    return torch.stack(rows, 1) @ p[f"{name}.out_proj.weight"].T


def attention(p, name, x):
    """One query and one head at a time."""
    D = x.shape[2]
    q, k, v = (x @ p[f"{name}.qkv.weight"].T).split(D, -1)
    rows = []
    for t in range(x.shape[1]):
        heads = []
        for part in torch.arange(D).split(D // 4):
            weights = torch.exp((k[:, : t + 1, part] * q[:, t : t + 1, part]).sum(-1) / math.sqrt(len(part)))
            heads.append((weights[..., None] * v[:, : t + 1, part]).sum(1) / weights.sum(1, keepdim=True))
        rows.append(torch.cat(heads, -1))
    return torch.stack(rows, 1) @ p[f"{name}.out.weight"].T


MIXERS = {"gru": gru, "lstm": lstm, "mamba": mamba, "transformer": attention}
MIXERS |= {kind: min_rnn(kind) for kind in ("mingru", "minlstm", "minlstm_unnormalized")}


def written(model):
    def logits(p, ids):
        x = p["embedding.weight"][ids]
        if model == "transformer":
            x = x + p["positions.weight"][: ids.shape[1]]
        for i in range(2):
            if f"backbone.convs.{i}.weight" in p:
                x = x + convolution(p, i, x)
            x = x + MIXERS[model](p, f"backbone.mixers.{i}", norm(p, f"backbone.norms.{i}", x))
            if model == "transformer":
                hidden = norm(p, f"backbone.mlp_norms.{i}", x) @ p[f"backbone.mlps.{i}.fc.weight"].T
                x = x + gelu(hidden) @ p[f"backbone.mlps.{i}.out.weight"].T
            elif model != "mamba":
                x = x + geglu(p, f"backbone.mlps.{i}", norm(p, f"backbone.mlp_norms.{i}", x))
        head = p.get("head.weight", p["embedding.weight"])  # tied, and then not a parameter of its own
        return norm(p, "backbone.norm", x) @ head.T

    return logits


@pytest.mark.parametrize("convention", ["nanogpt", "torch"])
@pytest.mark.parametrize("model", MIXERS)
def test_the_language_models_are_the_published_ones(model, convention):
    overrides = (f"model={model}", f"convention={convention}", "model.layers=2", "model.dim=16")
    _, exact = build(*overrides)
    worst, differences = compared(moved(exact), written(model))
    assert worst < 1e-12, differences
    _, single = build(*overrides, dtype=torch.float32)
    single.load_state_dict(exact.state_dict())
    worst, differences = compared(single, written(model))
    assert worst < 1e-6, differences


def test_the_papers_block_has_the_authors_parameters():
    """664,192 at width 128 with 3 layers and an untied head: counted by hand from FACTS 1.5."""
    _, model = build("model=mingru", "convention=torch", "model.dim=128")
    D, H = 128, 256
    conv, rnn = 4 * D + D + D * D + D, 2 * H * D + 2 * H + H + D * H + D
    geglu = 2 * H * D + 2 * H + H + D * H + D
    assert sum(p.numel() for p in model.parameters()) == 3 * (conv + rnn + geglu + 2 * D) + D + 2 * 65 * D == 664_192


def test_models_of_the_scaled_table_have_nanogpts_number_of_parameters():
    for model in ("mingru", "minlstm", "mamba", "transformer", "gru", "lstm"):
        _, built = build(f"model={model}")
        count = sum(p.numel() for p in built.parameters())
        assert abs(count / 804_096 - 1) < 0.01, (model, count)
        assert model != "transformer" or count == 804_096


@pytest.mark.parametrize("model", ["mingru", "minlstm_unnormalized", "transformer", "gru"])
def test_initial_values_are_nanogpts(model):
    """N(0, 0.02) for Linears and embeddings, less by sqrt(2 layers) for what adds to the residual; biases 0."""
    _, built = build(f"model={model}", "model.layers=8", "model.dim=256", dtype=torch.float32)
    assert built.head.weight is built.embedding.weight
    for name, p in built.named_parameters():
        if ".convs." in name or ".pointwise." in name or (model == "gru" and ".rnn." in name):
            continue  # no Linears: torch's own values
        if name.endswith("bias"):
            forget = model == "minlstm_unnormalized" and ".rnn." in name
            expected = torch.cat([torch.full((512,), 3.0), torch.zeros(1024)]) if forget else torch.zeros_like(p)
            assert torch.equal(p, expected), name
        elif p.dim() == 2:
            expected = 0.02 / 4 if name.endswith(".out.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < 4 * expected / p.numel() ** 0.5, name
        elif name.endswith(("norm.weight", "scale")) or ".norms." in name:
            assert (p == 1).all(), name


def test_initial_values_of_mamba_are_its_authors():
    """Embeddings N(0, 0.02); out_proj a Linear's own U(-1/sqrt(K), 1/sqrt(K)) over sqrt(layers); the rest as it is."""
    _, built = build("model=mamba", "model.layers=4", "model.dim=256", dtype=torch.float32)
    assert built.embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for mixer in built.backbone.mixers:
        assert mixer.out_proj.weight.std().item() == pytest.approx((3 * 512) ** -0.5 / 2, rel=0.03)
        assert mixer.in_proj.weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.03)
        dt = F.softplus(mixer.inner.dt_proj.bias)
        assert (
            1e-3 <= dt.min()
            and dt.max() <= 0.1
            and dt.log().std().item() == pytest.approx(math.log(100) / 12**0.5, rel=0.1)
        )


def test_decay_is_nanogpts_or_the_authors():
    cfg, model = build("model=mingru", "model.dim=16", "model.layers=1")
    names = {id(p): name for name, p in model.named_parameters()}

    def decaying(decay):
        groups = parameter_groups(model, 1e-3, 0.1, decay)
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    assert cfg.train.decay == "matrices"
    assert decaying("matrices") == {name for name, p in model.named_parameters() if p.dim() > 1}
    gates = {"backbone.mixers.0.rnn.weight_ih_l0", "backbone.mixers.0.rnn.bias_ih_l0"}
    assert decaying("all") == set(names.values()) - gates
    with pytest.raises(ValueError, match="decay: expected one of"):
        parameter_groups(model, 1e-3, 0.1, "some")
