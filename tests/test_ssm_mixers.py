"""S6, Hyena and the wrappings against loops in float64, the law of a recurrent layer, and causality."""

import math
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minrnn.mixers import QRNN, SRU, MinGRUMixer, MinLSTMMixer, make, s6
from minrnn.mixers.base import Mixer, state_map
from minrnn.mixers.hyena import Hyena
from minrnn.mixers.s4 import S4D, ShiftSSM
from minrnn.mixers.s6 import S6, selective_scan
from minrnn.mixers.wrappings import H3, CausalConv, HyenaOperator, Mamba, Ungated
from minrnn.ops import mingru_scan


class Leaky(Mixer):
    """h_t = h_{t-1} / 2 + x_t: an inner layer that no wrapping knows."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x, state=None):
        h, out = self.initial_state(len(x)).to(x) if state is None else state, []
        for x_t in x.unbind(1):
            h = h / 2 + x_t
            out.append(h)
        return torch.stack(out, 1), None if state is None else h

    def step(self, x_t, state):
        return state / 2 + x_t, state / 2 + x_t

    def initial_state(self, batch_size):
        return torch.zeros(batch_size, self.dim)


DIM = 6
RECURRENT = {
    "s6": partial(S6, DIM, state_size=4),
    "conv": partial(CausalConv, DIM, 4),
    "conv_1": partial(CausalConv, DIM, 1),
    "ungated_leaky": partial(Ungated, DIM, Leaky),
    "ungated_s4d": partial(Ungated, DIM, partial(S4D, state_size=4)),
    "h3_leaky": partial(H3, DIM, Leaky),
    "h3_s6": partial(H3, DIM, partial(S6, state_size=4), shift_size=5),
    "hyena_leaky": partial(HyenaOperator, DIM, Leaky),
    "shift": partial(ShiftSSM, DIM, 9),
    "mamba_leaky": partial(Mamba, DIM, Leaky, expand=3),
    "mamba_s6": partial(Mamba, DIM, partial(S6, state_size=4)),
    "qrnn": partial(QRNN, DIM, expansion=1.5),
    "qrnn_1": partial(QRNN, DIM, window=1),
    "qrnn_5": partial(QRNN, DIM, window=5),
    "sru": partial(SRU, DIM),
    "sru_wide": partial(SRU, DIM, expansion=1.5),
    "mingru_mlp": partial(MinGRUMixer, DIM, 1.5, gate_layers=2),
    "minlstm_mlp": partial(MinLSTMMixer, DIM, 1.5, gate_layers=2),
    "minlstm_mlp_unnormalized": partial(MinLSTMMixer, DIM, 1.5, normalize_gates=False, gate_layers=2),
}
HYENA = {
    "hyena": partial(Hyena, DIM, max_len=40),
    "h3_hyena": partial(HyenaOperator, DIM, partial(Hyena, max_len=40)),
    "mamba_hyena": partial(Mamba, DIM, partial(Hyena, max_len=40)),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def assert_close(got, expected, tolerance, name=""):
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    assert expected.isfinite().all() and expected.norm() > 0, name
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def numpy_s6(layer, x, h0=None):
    """The paper's equations, one number at a time: y, last h."""
    p = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    x = x.detach().double().numpy()
    R, N = layer.dt_rank, layer.state_size
    h = np.zeros((len(x), layer.dim, N)) if h0 is None else h0.detach().double().numpy().copy()
    y = np.zeros_like(x)
    for i in range(x.shape[0]):
        for t in range(x.shape[1]):
            selected = p["x_proj.weight"] @ x[i, t]
            B, C = selected[R : R + N], selected[R + N :]
            for d in range(x.shape[2]):
                dt = math.log1p(math.exp(p["dt_proj.weight"][d] @ selected[:R] + p["dt_proj.bias"][d]))
                for n in range(N):
                    a = math.exp(-dt * math.exp(p["A_log"][d, n]))
                    h[i, d, n] = a * h[i, d, n] + dt * B[n] * x[i, t, d]
                    y[i, t, d] += C[n] * h[i, d, n]
                y[i, t, d] += p["D"][d] * x[i, t, d]
    return y, h


def torch_s6(layer, x, h):
    """The same, with a graph: all channels at once, one step at a time."""
    y = []
    for x_t in x.unbind(1):
        selected = x_t @ layer.x_proj.weight.T
        low, B, C = selected.split([layer.dt_rank, layer.state_size, layer.state_size], 1)
        dt = (1 + (low @ layer.dt_proj.weight.T + layer.dt_proj.bias).exp()).log()
        a = torch.einsum("bd,dn->bdn", dt, -layer.A_log.exp()).exp()
        h = a * h + torch.einsum("bd,bd,bn->bdn", dt, x_t, B)
        y.append(torch.einsum("bdn,bn->bd", h, C) + layer.D * x_t)
    return torch.stack(y, 1), h


def varied(layer):
    """Every parameter away from its initial value, so that none stands idle at 1 or at the same for all channels."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("with_state", [False, True])
def test_s6_is_the_papers_equations(dtype, tolerance, with_state):
    layer = varied(S6(5, state_size=3, dt_rank=2)).to(dtype)
    x = torch.randn(2, 7, 5, dtype=dtype)
    h0 = torch.randn(2, 5, 3, dtype=dtype) if with_state else None
    y, h = layer(x, h0)
    expected_y, expected_h = numpy_s6(layer, x, h0)
    assert_close(y.detach(), expected_y, tolerance, "y")
    if with_state:
        assert_close(h.detach(), expected_h, tolerance, "state")
    else:
        assert h is None


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_s6_gradients(dtype, tolerance, backend):
    layer = varied(S6(5, state_size=3, dt_rank=2, backend=backend)).to(dtype)
    wide = S6(5, state_size=3, dt_rank=2).double()
    wide.load_state_dict(layer.state_dict())
    x, h0 = torch.randn(3, 7, 5, dtype=dtype), torch.randn(3, 5, 3, dtype=dtype)
    weights = torch.randn_like(x), torch.randn_like(h0)

    def gradients(layer, run, dtype):
        leaves = {"x": x, "h0": h0}
        leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
        outputs = run(leaves["x"], leaves["h0"])
        leaves |= dict(layer.named_parameters())
        grads = torch.autograd.grad(outputs, leaves.values(), [w.to(dtype) for w in weights])
        return dict(zip(leaves, grads, strict=True))

    expected = gradients(wide, partial(torch_s6, wide), torch.float64)
    for name, grad in gradients(layer, layer, dtype).items():
        assert_close(grad, expected[name], tolerance, name)


def test_s6_is_mingru_with_a_zero_order_hold():
    """Mamba's theorem 1 (N = 1, A = -1, B = 1). It discretises B exactly: (1 - exp(-dt)) x; the layer has dt x."""
    z, x = torch.randn(2, 9, 3).double(), torch.randn(2, 9, 3).double()
    one = torch.ones(2, 9, 1).double()
    dt = F.softplus(z)
    y, _ = selective_scan(x * (1 - torch.exp(-dt)) / dt, dt, -torch.ones(3, 1).double(), one, one)
    assert_close(y, mingru_scan(z, x, activation="identity", backend="reference"), 1e-12)


def test_s6_initial_parameters():
    layer = S6(2000, state_size=3)
    assert layer.dt_rank == 125
    dt = F.softplus(layer.dt_proj.bias.double())
    assert 0.999e-3 <= dt.min() < 1.2e-3 and 0.08 < dt.max() <= 0.1001
    assert abs(dt.log10().mean() + 2) < 0.05  # log-uniform
    assert 0.99 < layer.dt_proj.weight.abs().max() * 125**0.5 <= 1
    assert_close(layer.A_log.detach().exp(), torch.tensor([1.0, 2.0, 3.0]).expand(2000, 3), 1e-6)
    assert torch.equal(layer.D.detach(), torch.ones(2000))
    floored = S6(8, dt_min=1e-6, dt_max=1e-5)
    assert_close(F.softplus(floored.dt_proj.bias.detach()), torch.full((8,), 1e-4), 1e-5)


def test_no_weight_decay():
    def marked(layer):
        return {name for name, p in layer.named_parameters() if getattr(p, "no_weight_decay", False)}

    assert marked(S6(4)) == {"A_log", "D", "dt_proj.bias"}
    assert marked(Hyena(4)) == {name for name, _ in Hyena(4).named_parameters()} - {"D"}


def test_s6_hands_mamba_ssm_what_its_kernel_takes(monkeypatch):
    """A stand-in of selective_scan_fn's signature, by a loop; the kernel itself needs CUDA."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert z is None and delta_softplus
        assert all(x.is_contiguous() for x in (u, delta, A, B, C, D, delta_bias))
        delta = F.softplus(delta + delta_bias[:, None])
        h, y = 0, []
        for t in range(u.shape[2]):
            h = h * (delta[:, :, t, None] * A).exp() + (delta * u)[:, :, t, None] * B[:, None, :, t]
            y.append((h * C[:, None, :, t]).sum(2) + D * u[:, :, t])
        return torch.stack(y, 2)

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(s6, "_has_mamba_ssm", lambda: True)
    monkeypatch.setattr(S6, "_uses_mamba_ssm", lambda self, u: True)
    layer = varied(S6(5, state_size=3, backend="mamba-ssm"))
    x = torch.randn(2, 7, 5)
    y, state = layer(x)
    assert_close(y.detach(), numpy_s6(layer, x)[0], 1e-6)
    assert state is None
    y, state = layer(x, layer.initial_state(2))  # the kernel takes no state: the project's scan
    assert_close(y.detach(), numpy_s6(layer, x)[0], 1e-6)
    assert_close(state.detach(), numpy_s6(layer, x)[1], 1e-6)


def test_s6_errors(monkeypatch):
    for unknown in ("cuda", "log"):  # log: of linear_scan alone
        with pytest.raises(ValueError, match=f"backend: expected one of .* got '{unknown}'"):
            S6(4, backend=unknown)
    with pytest.raises(ValueError, match="0 < dt_min <= dt_max, got 0.2 and 0.1"):
        S6(4, dt_min=0.2)
    monkeypatch.setattr(s6, "_has_mamba_ssm", lambda: False)
    with pytest.raises(ValueError, match="needs the package mamba-ssm, which is not installed"):
        S6(4, backend="mamba-ssm")
    monkeypatch.setattr(s6, "_has_mamba_ssm", lambda: True)
    with pytest.raises(ValueError, match="works on CUDA tensors up to float32, got torch.float32 on cpu"):
        S6(4, backend="mamba-ssm")(torch.randn(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("T", [1, 2, 7, 33])
@pytest.mark.parametrize("kind", RECURRENT)
def test_the_law(kind, T, dtype):
    layer = varied(RECURRENT[kind]()).to(dtype)
    x = torch.randn(3, T, DIM, dtype=dtype)
    start = state_map(lambda s: s.to(torch.promote_types(s.dtype, dtype)), layer.initial_state(3))
    kept = []
    state_map(lambda s: kept.append((s, s.clone())), start)
    with torch.no_grad():
        whole, no_state = layer(x)
        with_state, last = layer(x, start)
        chunks, state = [], start
        for chunk in odd(x):
            y, state = layer(chunk, state)
            chunks.append(y)
        steps, stepped = [], start
        for x_t in x.unbind(1):
            y, stepped = layer.step(x_t, stepped)
            steps.append(y)
    assert no_state is None
    assert whole.shape == x.shape and whole.dtype == dtype
    for name, y in {"state": with_state, "chunks": torch.cat(chunks, 1), "steps": torch.stack(steps, 1)}.items():
        assert_close(y, whole, TOLERANCE[dtype], name)
    for name, other in {"chunks": state, "steps": stepped}.items():
        assert_same_states(other, last, TOLERANCE[dtype], name)
    assert all(torch.equal(s, copy) for s, copy in kept), "a state was changed in place"


def odd(x):
    """Chunks of 1, 2, 5 and the rest."""
    edges = [t for t in (0, 1, 3, 8) if t < x.shape[1]] + [x.shape[1]]
    return [x[:, a:b] for a, b in zip(edges, edges[1:], strict=False)]


def assert_same_states(got, expected, tolerance, name):
    if isinstance(expected, tuple):
        assert isinstance(got, tuple) and len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            assert_same_states(g, e, tolerance, name)
    elif expected.numel():
        assert got.dtype == expected.dtype
        assert_close(as_real(got), as_real(expected), tolerance, name)


def as_real(x):
    return torch.view_as_real(x) if x.is_complex() else x


@pytest.mark.parametrize("kind", ["mamba_s6", "h3_s6", "ungated_s4d", "qrnn_5", "sru", "minlstm_mlp"])
def test_gradients_through_chunks(kind):
    layer = varied(RECURRENT[kind]()).double()
    x = torch.randn(2, 11, DIM).double().requires_grad_()
    weight = torch.randn(2, 11, DIM).double()
    chunks, state = [], state_map(lambda s: s.to(torch.promote_types(s.dtype, torch.float64)), layer.initial_state(2))
    for chunk in odd(x):
        y, state = layer(chunk, state)
        chunks.append(y)
    leaves = {"x": x} | dict(layer.named_parameters())
    whole = torch.autograd.grad(layer(x)[0], leaves.values(), weight)
    in_chunks = torch.autograd.grad(torch.cat(chunks, 1), leaves.values(), weight)
    for name, got, expected in zip(leaves, in_chunks, whole, strict=True):
        assert_close(got, expected, 1e-10, name)


@pytest.mark.parametrize("kind", RECURRENT | HYENA)
def test_causality(kind):
    layer = varied((RECURRENT | HYENA)[kind]())
    x = torch.randn(2, 33, DIM)
    changed = x.clone()
    changed[:, 20] += 1
    with torch.no_grad():
        y, other = layer(x)[0], layer(changed)[0]
    by_fft = kind in HYENA or "s4d" in kind or "h3" in kind or kind == "shift"
    tolerance = 1e-6 * y.abs().max() if by_fft else 0
    assert (y[:, :20] - other[:, :20]).abs().max() <= tolerance
    assert (y[:, 20] - other[:, 20]).abs().max() > 1e-3
    if kind != "conv_1":
        assert (y[:, 21] - other[:, 21]).abs().max() > 1e-5


@pytest.mark.parametrize("T", [1, 2, 3, 30, 37])
def test_hyena_is_its_convolution(T):
    """Against the O(T^2) sum, gradients included."""

    def direct(layer, x):
        k, D = layer.filter(T).double(), layer.D.double()
        return torch.stack([sum(k[s] * x[:, t - s] for s in range(t + 1)) + D * x[:, t] for t in range(T)], 1)

    layer = varied(Hyena(3, max_len=40)).double()
    x, weight = torch.randn(2, T, 3).double().requires_grad_(), torch.randn(2, T, 3).double()
    leaves = {"x": x} | dict(layer.named_parameters())
    y, expected_y = layer(x)[0], direct(layer, x)
    assert_close(y.detach(), expected_y.detach(), 1e-12, "y")
    got, expected = (torch.autograd.grad(out, leaves.values(), weight) for out in (y, expected_y))
    for name, g, e in zip(leaves, got, expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-10, atol=1e-12), name
    with torch.no_grad():
        layer.float()
        assert_close(layer(x.float())[0], direct(layer, x), 1e-6, "float32")


@pytest.mark.parametrize("bands", [1, 2, 16])
def test_hyena_filter(bands):
    """The published formula, written with complex exponentials."""
    L, dim = 50, 4
    layer = varied(Hyena(dim, max_len=L, bands=bands, shift=0.05)).double()
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    t = np.linspace(0, 1, L)
    wave = np.exp(-1j * np.outer(2 * np.pi * np.arange(L) / L, np.linspace(1e-4, bands - 1, bands)))
    h = np.concatenate([t[:, None], wave.real, wave.imag], 1)
    for i in range(3):
        h = np.sin(p["frequency"] * (h @ p[f"hidden.{i}.weight"].T + p[f"hidden.{i}.bias"]))
    rates = np.abs(np.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, dim))
    expected = h @ p["out.weight"].T * (np.exp(-np.outer(t, rates)) + 0.05)
    assert_close(layer.filter(L).detach(), expected, 1e-9)  # the sines of sines lose some digits


def test_hyena_of_a_prefix():
    layer = varied(Hyena(3, max_len=40)).double()
    x = torch.randn(2, 40, 3).double()
    whole = layer(x)[0]
    for T in (1, 7, 39):
        assert_close(layer(x[:, :T])[0].detach(), whole[:, :T].detach(), 1e-12)


def test_hyena_errors():
    layer = Hyena(DIM, max_len=8)
    with pytest.raises(ValueError, match="at most max_len=8 steps, got 9"):
        layer(torch.randn(1, 9, DIM))
    for kind in HYENA.values():
        with pytest.raises(NotImplementedError, match="no recurrent form"):
            kind().initial_state(2)
    with pytest.raises(NotImplementedError, match="no recurrent form"):
        layer.step(torch.randn(2, DIM), torch.randn(2, DIM))
    with pytest.raises(NotImplementedError, match="no recurrent form"):
        layer(torch.randn(1, 8, DIM), torch.randn(1, DIM))
    with pytest.raises(ValueError, match="max_len: expected a positive int, got 0"):
        Hyena(DIM, max_len=0)
    with pytest.raises(ValueError, match="bands: expected a positive int, got 0"):
        Hyena(DIM, bands=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_conv_is_conv1d(size):
    layer = CausalConv(5, size).double()
    conv = torch.nn.Conv1d(5, 5, size, groups=5, padding=size - 1).double()
    with torch.no_grad():
        conv.weight.copy_(layer.weight.T[:, None])
        conv.bias.copy_(layer.bias)
    x = torch.randn(2, 9, 5).double()
    assert_close(layer(x)[0].detach(), conv(x.transpose(1, 2))[..., :9].transpose(1, 2).detach(), 1e-14)
    with pytest.raises(ValueError, match="size: expected a positive int, got 0"):
        CausalConv(5, 0)


def conv1d(layer, x):
    """(B, T, D) by torch, from the weights of a CausalConv."""
    size, dim = layer.weight.shape
    weight = layer.weight.T[:, None]
    return F.conv1d(F.pad(x.transpose(1, 2), (size - 1, 0)), weight, layer.bias, groups=dim).transpose(1, 2)


def shifted(layer, x):
    """The shift SSM by its state: h_t is h_{t-1} moved by one place, plus B x_t; y_t = C h_t + D x_t."""
    h, ys = x.new_zeros(len(x), layer.dim, layer.size), []
    for x_t in x.unbind(1):
        h = torch.cat([torch.zeros_like(h[..., :1]), h[..., :-1]], -1) + layer.B * x_t[..., None]
        ys.append((layer.C * h).sum(-1) + layer.D * x_t)
    return torch.stack(ys, 1)


@pytest.mark.parametrize("T", [1, 5, 9, 40])
def test_the_shift_ssm_is_its_state_space_form(T):
    layer, x = varied(ShiftSSM(4, 9)).double(), torch.randn(2, T, 4, dtype=torch.float64, requires_grad=True)
    found = layer(x)[0], shifted(layer, x)
    assert_close(found[0].detach(), found[1].detach(), 1e-12)
    weight, inputs = torch.randn_like(found[0]), (x, *layer.parameters())
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, weight) for y in found), strict=True):
        assert_close(mine, theirs, 1e-12)
    started = ShiftSSM(500, 64)
    assert torch.equal(started.B, torch.eye(64)[:1].expand(500, 64))
    assert started.C.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.03) and started.C.abs().max() <= 1 / 8
    assert started.D.std().item() == pytest.approx(1, rel=0.1)
    marks = {name: (hasattr(p, "no_weight_decay"), getattr(p, "lr_max", None)) for name, p in layer.named_parameters()}
    assert marks == {"B": (True, 1e-3), "C": (False, None), "D": (True, None)}


def test_the_published_blocks_have_their_parameters():
    """At width 64 with a state of 64: counted from the authors' code."""
    D, N = 64, 64
    dynamics, projection = D + 2 * D * N // 2, D * D + D  # log_dt, A; a square Linear
    counts = {
        # B, C and P; D; Linear to 2 D.
        "s4": ("none", dynamics + 3 * D * N + D + 2 * projection),
        # C; D; Linear to 2 D.
        "s4d": ("none", dynamics + D * N + D + 2 * projection),
        # Shift: B, C, D. S4D: B, C; D. Projections of q, k, v and the output.
        "s4 in h3": ("h3", 2 * D * 64 + D + dynamics + 2 * D * N + D + 4 * projection),
        # A convolution of 3 on 3 D with bias; the filter's MLP on 5 features, its frequency, bias D.
        "hyena": ("h3", 3 * D * 4 + (5 + 1) * 64 + 2 * (64 + 1) * 64 + 64 + 64 * D + D + 4 * projection),
    }
    for name, (wrapping, expected) in counts.items():
        layer = make("ssm", inner=name.split()[0], wrapping=wrapping)(D)
        assert sum(p.numel() for p in layer.parameters()) == expected, name
    assert counts["s4"][1] == 24_832  # of the authors' S4 block


def test_wrappings_are_the_papers_equations():
    x = torch.randn(2, 7, 4).double()

    def inner(layer, u):
        return torch.as_tensor(numpy_s6(layer, u)[0])

    with torch.no_grad():
        ungated = varied(Ungated(4, S6)).double()
        y = inner(ungated.inner, x)
        gelu = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        value, gate = (gelu @ ungated.out_proj.weight.T + ungated.out_proj.bias).split(4, -1)
        assert_close(ungated(x)[0], value / (1 + torch.exp(-gate)), 1e-12, "Ungated")

        h3 = varied(H3(4, S6, shift_size=3)).double()
        q, k, v = (x @ w.T + b for w, b in zip(h3.in_proj.weight.split(4), h3.in_proj.bias.split(4), strict=True))
        y = q * inner(h3.inner, shifted(h3.conv, k) * v)
        assert_close(h3(x)[0], y @ h3.out_proj.weight.T + h3.out_proj.bias, 1e-12, "H3")

        hyena = varied(HyenaOperator(4, S6)).double()
        q, k, v = conv1d(hyena.conv, hyena.in_proj(x)).split(4, -1)
        y = q * inner(hyena.inner, k * v)
        assert_close(hyena(x)[0], y @ hyena.out_proj.weight.T + hyena.out_proj.bias, 1e-12, "Hyena")

        mamba = varied(Mamba(4, S6, expand=3)).double()
        u, z = (x @ w.T for w in mamba.in_proj.weight.split(12))
        u = conv1d(mamba.conv, u)
        y = inner(mamba.inner, u / (1 + torch.exp(-u))) * z / (1 + torch.exp(-z))
        assert_close(mamba(x)[0], y @ mamba.out_proj.weight.T, 1e-12, "Mamba")


@pytest.mark.parametrize("dim", [24, 64])
def test_mamba_parameter_count(dim):
    """That of mamba_simple.py, whose dt_rank is a sixteenth of the width outside."""
    E, N, R = 2 * dim, 16, math.ceil(dim / 16)
    expected = 2 * E * dim + (4 * E + E) + E * (R + 2 * N) + (R * E + E) + E * N + E + E * dim
    block = Mamba(dim, partial(S6, dt_rank=R))
    assert sum(p.numel() for p in block.parameters()) == expected


def test_recurrent_mixers_have_their_parameters():
    D, H = 8, 24
    out, initial = H * D + D, H
    counts = {
        QRNN(D, 3, window=5): 3 * (5 * D * H + H) + out,
        SRU(D): 3 * D * D + 4 * D + D * D + D,
        SRU(D, 3): 4 * D * H + 4 * H + out,
        MinGRUMixer(D, 3): 2 * (D * H + H) + initial + out,
        MinGRUMixer(D, 3, gate_layers=2): 2 * (D * H + H) + H * H + H + initial + out,
        MinLSTMMixer(D, 3, gate_layers=2): 2 * (D * H + H) + 2 * (H * H + H) + initial + out,
    }
    for layer, expected in counts.items():
        assert sum(p.numel() for p in layer.parameters()) == expected, layer
    names = ["initial", "rnn.weight_ih_l0", "rnn.bias_ih_l0", "out.weight", "out.bias"]
    assert [name for name, _ in MinGRUMixer(D).named_parameters()] == names
    gates = {f"rnn.{layer}.{kind}" for layer in ("fc", "gates") for kind in ("weight", "bias")}
    layer = MinGRUMixer(D, gate_layers=2)
    assert {name for name, p in layer.named_parameters() if getattr(p, "is_gate", False)} == gates


def test_sru_starts_as_published():
    """The variances of the authors' package, sru 2.6.0; v and the gates' weights share that of a gate."""
    layer = SRU(400, 2)
    candidate, f, r, carried = layer.in_proj.weight.split(800)
    for part, variance in ((candidate, 1), (f, 1 / 2), (r, 1 / 2), (carried, 3)):
        assert part.var().item() * 400 == pytest.approx(variance, rel=0.02)
        assert part.abs().max().item() == pytest.approx((3 * variance / 400) ** 0.5, rel=0.01)
    assert layer.v.var().item() == pytest.approx(0.5, rel=0.1) and not layer.bias.any()


def test_recurrent_mixers_errors():
    with pytest.raises(ValueError, match="window: expected a positive int, got 0"):
        QRNN(DIM, window=0)
    for kind in (QRNN, SRU):
        with pytest.raises(ValueError, match="expansion: expected expansion . dim to be a whole number"):
            kind(DIM, 0.3)
    for kind in (MinGRUMixer, MinLSTMMixer):
        with pytest.raises(ValueError, match="gate_layers: expected 1 or 2, got 3"):
            kind(DIM, gate_layers=3)
    with pytest.raises(ValueError, match="forget_bias: expected 0 where gate_layers=2, got 3"):
        MinLSTMMixer(DIM, forget_bias=3, gate_layers=2)


@pytest.mark.parametrize("kind", RECURRENT | HYENA)
def test_autocast(kind):
    """Linear layers in bfloat16; recurrences and FFTs stay in float32."""
    layer = (RECURRENT | HYENA)[kind]()
    x = torch.randn(2, 33, DIM)
    with torch.no_grad():
        exact = layer(x)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(layer(x)[0].float(), exact, 3e-2)
            if kind in RECURRENT:
                state, y = layer.initial_state(2), []
                for x_t in x.unbind(1):
                    y_t, state = layer.step(x_t, state)
                    y.append(y_t.float())
                assert_close(torch.stack(y, 1), exact, 3e-2)


@pytest.mark.parametrize("kind", ["s6", "conv", "hyena", "qrnn", "sru", "mingru_mlp"])
def test_any_layout(kind):
    layer = (RECURRENT | HYENA)[kind]()
    x = torch.randn(2, 9, DIM)
    strided = torch.randn(9, DIM, 4)[..., ::2].permute(2, 0, 1)
    strided.copy_(x)
    assert_close(layer(strided)[0].detach(), layer(x)[0].detach(), 1e-6)


def test_long_states_stay_exact_in_bfloat16():
    """Parameters in bfloat16: the state is float32 and 2000 steps of it lose nothing against one long call."""
    layer = S6(4, state_size=2).bfloat16()
    x = torch.randn(1, 2000, 4).bfloat16()
    with torch.no_grad():
        y, state = layer(x, layer.initial_state(1))
        expected = numpy_s6(layer, x)[1]
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close(state, expected, 2e-2)
