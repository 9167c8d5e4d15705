"""Mamba's Table 1, Aaren, QRNN, SRU and two-layer gates, written out here in float64 loops: results and gradients."""

import math

import pytest
import torch

from minrnn.mixers import make

B, T, D = 2, 13, 8


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def conjugates(pairs):
    """(..., M, 2) of real and imaginary parts, as both of each pair: (..., 2 M)."""
    half = torch.complex(pairs[..., 0], pairs[..., 1])
    return torch.cat([half, half.conj()], -1)


def recurrence(A, b, C, D_, x):
    """y_t = Re C h_t + D x_t with h_t = A h_{t-1} + b x_t: (dim, N, N), (dim, N), (dim, N), (dim,), (B, T, dim)."""
    h, ys = torch.zeros(len(x), *b.shape, dtype=b.dtype), []
    for x_t in x.unbind(1):
        h = torch.einsum("dnm,bdm->bdn", A, h) + b * x_t[..., None]
        ys.append((C * h).sum(-1).real + D_ * x_t)
    return torch.stack(ys, 1)


def continuous(p, name):
    """A (dim, N), diagonal, B, C (dim, N) and dt (dim, 1, 1)."""
    A = conjugates(torch.stack([-torch.exp(p[f"{name}.log_A_real"]), p[f"{name}.A_imag"]], -1))
    C, b = conjugates(p[f"{name}.C"]), torch.ones_like(A)
    if f"{name}.B" in p:
        b = conjugates(p[f"{name}.B"])
    return A, b, C, torch.exp(p[f"{name}.log_dt"])[:, None, None]


def bilinear(A, b, dt):
    """Of dense A (dim, N, N): (I - dt/2 A)^-1 (I + dt/2 A) and (I - dt/2 A)^-1 dt B."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    inverse = torch.linalg.inv(eye - dt / 2 * A)
    return inverse @ (eye + dt / 2 * A), (inverse @ (dt * b[..., None]))[..., 0]


def s4(p, name, x):
    """arXiv 2111.00396: A = Lambda - P P^*, bilinear."""
    A, b, C, dt = continuous(p, name)
    P = conjugates(p[f"{name}.P"])
    A, b = bilinear(torch.diag_embed(A) - P[..., :, None] * P[..., None, :].conj(), b, dt)
    return recurrence(A, b, C, p[f"{name}.D"], x)


def s4d(p, name, x):
    """arXiv 2206.11893: zero-order hold, B = 1."""
    A, b, C, dt = continuous(p, name)
    a = torch.exp(dt[..., 0] * A)
    return recurrence(torch.diag_embed(a), (a - 1) / A * b, C, p[f"{name}.D"], x)


def s4d_bilinear(p, name, x):
    A, b, C, dt = continuous(p, name)
    return recurrence(*bilinear(torch.diag_embed(A), b, dt), C, p[f"{name}.D"], x)


def s6(p, name, x):
    """arXiv 2312.00752, algorithm 2."""
    rank, N = p[f"{name}.dt_proj.weight"].shape[1], p[f"{name}.A_log"].shape[1]
    h, ys = 0, []
    for u in x.unbind(1):
        low, b, c = linear(p, f"{name}.x_proj", u).split([rank, N, N], -1)
        dt = torch.log1p(torch.exp(linear(p, f"{name}.dt_proj", low)))
        h = torch.exp(-dt[..., None] * torch.exp(p[f"{name}.A_log"])) * h + (dt * u)[..., None] * b[:, None]
        ys.append((h * c[:, None]).sum(-1) + p[f"{name}.D"] * u)
    return torch.stack(ys, 1)


def hyena(p, name, x):
    """arXiv 2302.10866, sections 3.3 and 3.4; positions and decay as in the authors' code, for sequences up to T."""
    t = torch.arange(T, dtype=torch.float64)
    z = [t / (T - 1)]
    for band in (1e-4, 1.0):
        z += [torch.cos(2 * math.pi / T * band * t)]
    for band in (1e-4, 1.0):
        z += [-torch.sin(2 * math.pi / T * band * t)]
    k = torch.stack(z, 1)
    for i in range(3):
        k = torch.sin(p[f"{name}.frequency"] * linear(p, f"{name}.hidden.{i}", k))
    rates = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, x.shape[2], dtype=torch.float64)
    k = linear(p, f"{name}.out", k) * torch.exp(-t[:, None] / (T - 1) * rates)
    rows = [sum(k[s] * x[:, t - s] for s in range(t + 1)) + p[f"{name}.D"] * x[:, t] for t in range(x.shape[1])]
    return torch.stack(rows, 1)


def short_convolution(p, name, x):
    weight, rows = p[f"{name}.weight"], []
    for t in range(x.shape[1]):
        past = [weight[len(weight) - 1 - k] * x[:, t - k] for k in range(len(weight)) if t >= k]
        rows.append(p[f"{name}.bias"] + sum(past))
    return torch.stack(rows, 1)


def shift(p, name, x):
    """arXiv 2212.14052, section 3.1: the state moves by one place, and takes B x in."""
    h, ys = torch.zeros(len(x), *p[f"{name}.B"].shape, dtype=torch.float64), []
    for x_t in x.unbind(1):
        h = torch.cat([torch.zeros_like(h[..., :1]), h[..., :-1]], -1) + p[f"{name}.B"] * x_t[..., None]
        ys.append((p[f"{name}.C"] * h).sum(-1) + p[f"{name}.D"] * x_t)
    return torch.stack(ys, 1)


def ungated(inner):
    def block(p, x):
        y = inner(p, "inner", x)
        value, gate = linear(p, "out_proj", y / 2 * (1 + torch.erf(y / math.sqrt(2)))).chunk(2, -1)
        return value * sigmoid(gate)

    return block


def h3(inner):
    def block(p, x):
        q, k, v = linear(p, "in_proj", x).chunk(3, -1)
        return linear(p, "out_proj", q * inner(p, "inner", shift(p, "conv", k) * v))

    return block


def hyena_operator(p, x):
    q, k, v = short_convolution(p, "conv", linear(p, "in_proj", x)).chunk(3, -1)
    return linear(p, "out_proj", q * hyena(p, "inner", k * v))


def mamba(inner):
    def block(p, x):
        u, z = linear(p, "in_proj", x).chunk(2, -1)
        u = short_convolution(p, "conv", u)
        return linear(p, "out_proj", inner(p, "inner", u * sigmoid(u)) * z * sigmoid(z))

    return block


def aaren(p, x):
    """arXiv 2405.13956, section 3.2: the softmax average of all values so far, under one query a head."""
    query = p["query"]
    key, value = linear(p, "kv", x).unflatten(-1, (2, *query.shape)).unbind(2)
    weights, rows = torch.exp((key * query).sum(-1) / math.sqrt(query.shape[1])), []
    for t in range(1, T + 1):
        w = weights[:, :t, :, None]
        rows.append((w * value[:, :t]).sum(1) / w.sum(1))
    return linear(p, "out", torch.stack(rows, 1).flatten(2))


def qrnn(window):
    """arXiv 1611.01576, equations 1 and 4."""

    def block(p, x):
        c, rows = 0, []
        filters = p["in_proj.weight"].unflatten(1, (window, D))
        for t in range(T):
            taps = sum(x[:, t - k] @ filters[:, window - 1 - k].T for k in range(window) if t >= k)
            z, f, o = (taps + p["in_proj.bias"]).chunk(3, -1)
            c = sigmoid(f) * c + (1 - sigmoid(f)) * torch.tanh(z)
            rows.append(sigmoid(o) * c)
        return linear(p, "out", torch.stack(rows, 1))

    return block


def sru(p, x):
    """arXiv 1709.02755v5, equations 1 to 4, with alpha of its section 3.2; a fourth matrix where widths differ."""
    W, W_f, W_r, *W_x = p["in_proj.weight"].split(p["v"].shape[1])
    (v_f, v_r), (b_f, b_r) = p["v"], p["bias"]
    c, rows = torch.zeros(B, len(W), dtype=torch.float64), []
    for x_t in x.unbind(1):
        f = sigmoid(x_t @ W_f.T + v_f * c + b_f)
        r = sigmoid(x_t @ W_r.T + v_r * c + b_r)
        c = f * c + (1 - f) * (x_t @ W.T)
        rows.append(r * c + (1 - r) * (x_t @ W_x[0].T if W_x else 3**0.5 * x_t))
    return linear(p, "out", torch.stack(rows, 1))


def two_layer_gates(signed):
    """arXiv 2410.01201, sections 3.1 and 3.2, with an MLP for each gate's Linear."""

    def g(x):
        return torch.where(x >= 0, x + 0.5, sigmoid(x))

    def block(p, x):
        h, rows = g(p["initial"]).expand(B, -1), []
        for x_t in x.unbind(1):
            hidden, candidate = linear(p, "rnn.fc", x_t).chunk(2, -1)
            hidden = hidden / 2 * (1 + torch.erf(hidden / math.sqrt(2)))
            gates = sigmoid(linear(p, "rnn.gates", hidden)).split(h.shape[1], -1)
            f, i = (1 - gates[0], gates[0]) if len(gates) == 1 else gates
            f, i = f / (f + i), i / (f + i)
            if signed:
                f, i = f - i, 1 - (f - i).abs()
            h = f * h + i * g(candidate)
            rows.append(h)
        return linear(p, "out", torch.stack(rows, 1))

    return block


def ssm(inner, wrapping, **settings):
    return make("ssm", inner=inner, wrapping=wrapping, **settings)


BLOCKS = {
    "No gate S4": (ssm("s4", "none", state_size=8), ungated(s4)),
    "No gate S4D": (ssm("s4d", "none", state_size=8), ungated(s4d)),
    "No gate S6": (ssm("s6", "none"), ungated(s6)),
    "H3 S4": (ssm("s4", "h3", state_size=8), h3(s4d_bilinear)),
    "H3 Hyena": (ssm("hyena", "h3", max_len=T), hyena_operator),
    "H3 S6": (ssm("s6", "h3"), h3(s6)),
    "Mamba S4": (ssm("s4", "mamba", state_size=8), mamba(s4)),
    "Mamba Hyena": (ssm("hyena", "mamba", max_len=T), mamba(hyena)),
    "Mamba S6": (ssm("s6", "mamba"), mamba(s6)),
    "Aaren": (make("aaren", heads=2), aaren),
    "QRNN": (make("qrnn", expansion=2), qrnn(2)),
    "QRNN, no window": (make("qrnn", window=1), qrnn(1)),
    "QRNN, window 4": (make("qrnn", window=4), qrnn(4)),
    "SRU": (make("sru"), sru),
    "SRU, wider": (make("sru", expansion=2), sru),
} | {
    f"{name}, signed={signed}": (make(name, expansion=2, signed=signed, gate_layers=2), two_layer_gates(signed))
    for name in ("mingru", "minlstm")
    for signed in (False, True)
}


def differences(block, written):
    """Relative differences of the result and of every gradient, by name."""
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(B, T, D, generator=generator, dtype=torch.float64) for _ in range(2))
    mine = {"x": x.to(block.dtype).requires_grad_()} | dict(block.layer.named_parameters())
    theirs = {name: value.detach().double().clone().requires_grad_() for name, value in mine.items()}
    found = []
    for y, leaves in ((block.layer(mine["x"])[0], mine), (written(theirs, theirs["x"]), theirs)):
        gradients = torch.autograd.grad(y, list(leaves.values()), weight.to(y.dtype))
        found.append({"y": y.detach()} | dict(zip(leaves, gradients, strict=True)))
    assert all(value.norm() > 0 for value in found[1].values())
    return {name: ((found[0][name] - found[1][name]).norm() / found[1][name].norm()).item() for name in found[1]}


class Block:
    def __init__(self, build, dtype):
        torch.manual_seed(0)
        self.layer, self.dtype = build(D).to(dtype), dtype
        with torch.no_grad():
            for parameter in self.layer.parameters():  # away from 0 and 1, at which mistakes cancel
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_is_the_published_one(name, dtype, most):
    build, written = BLOCKS[name]
    found = differences(Block(build, dtype), written)
    assert max(found.values()) <= most, found
