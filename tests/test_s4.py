"""S4 and S4D against dense matrices stepped through time in numpy, against the published form, and themselves."""

import numpy as np
import pytest
import torch

from minrnn.mixers.base import Mixer
from minrnn.mixers.s4 import S4, S4D


class InH3(S4D):
    """S4D as it is inside H3."""

    def __init__(self, *settings, **more):
        super().__init__(*settings, discretization="bilinear", learn_B=True, **more)


LAYERS = [S4, S4D, InH3]
each_layer = pytest.mark.parametrize("layer", LAYERS)
DYNAMICS = {S4: {"log_dt", "log_A_real", "A_imag", "B", "P"}, S4D: {"log_dt", "log_A_real", "A_imag"}}
DYNAMICS[InH3] = DYNAMICS[S4D] | {"B"}


def make(layer, dim=3, state_size=8, dtype=torch.float64, noise=0.3, **settings):
    """A layer whose parameters have left their initial values by `noise`."""
    torch.manual_seed(0)
    mixer = layer(dim, state_size, **settings).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += noise * torch.randn_like(parameter)
    return mixer


@pytest.fixture
def float64():
    """Parameters are born in float64, so that the initial values are not rounded."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def array(parameter):
    return parameter.detach().double().numpy()


def complex_array(parameter):
    return array(parameter)[..., 0] + 1j * array(parameter)[..., 1]


def impulse_response(A_bar, B_bar, C, T):
    """(N, N), (N,), (N,) -> (T,)."""
    h, out = B_bar, []
    for _ in range(T):
        out.append(C @ h)
        h = A_bar @ h
    return np.array(out)


def bilinear(A, B, dt):
    left = np.eye(len(A)) - dt / 2 * A
    return np.linalg.solve(left, np.eye(len(A)) + dt / 2 * A), np.linalg.solve(left, dt * B)


def zero_order_hold(A, B, dt):
    """exp of [[A, B], [0, 0]] dt holds both: by scaling, a Taylor series, and squaring."""
    N = len(A)
    M = np.zeros((N + 1, N + 1), complex)
    M[:N, :N], M[:N, N] = A * dt, B * dt
    M /= 2**10
    total, term = np.eye(N + 1, dtype=complex), np.eye(N + 1, dtype=complex)
    for k in range(1, 20):
        term = term @ M / k
        total = total + term
    for _ in range(10):
        total = total @ total
    return total[:N, :N], total[:N, N]


def full(half):
    """Both of each conjugate pair."""
    return np.concatenate((half, half.conj()))


def dense_system(mixer, d):
    """Channel d from the parameters alone: continuous A (N, N), B (N,), C (N,), dt."""
    A = np.diag(full(-np.exp(array(mixer.log_A_real)[d]) + 1j * array(mixer.A_imag)[d]))
    B = np.ones(len(A)) if mixer.B is None else full(complex_array(mixer.B)[d])
    C = full(complex_array(mixer.C)[d])
    if isinstance(mixer, S4):
        P = full(complex_array(mixer.P)[d])
        A = A - np.outer(P, P.conj())
    return A, B, C, np.exp(array(mixer.log_dt)[d])


def dense_kernel(mixer, T):
    """(D, T) of the whole layer, D x included."""
    discretise = zero_order_hold if getattr(mixer, "discretization", "bilinear") == "zoh" else bilinear
    kernels = []
    for d in range(mixer.dim):
        A, B, C, dt = dense_system(mixer, d)
        kernel = impulse_response(*discretise(A, B, dt), C, T)
        assert np.abs(kernel.imag).max() < 1e-9 * np.abs(kernel).max()
        kernels.append(kernel.real + array(mixer.D)[d] * (np.arange(T) == 0))
    return np.array(kernels)


def layer_kernel(mixer, T):
    """(D, T): what the layer answers to an impulse."""
    impulse = torch.zeros(1, T, mixer.dim, dtype=mixer.D.dtype)
    impulse[:, 0] = 1
    with torch.no_grad():
        return mixer(impulse)[0][0].mT.double().numpy()


def error(actual, expected):
    return float(abs(actual - expected).max() / abs(expected).max())


def run_steps(mixer, x, state):
    ys = []
    for x_t in x.unbind(1):
        y, state = mixer.step(x_t, state)
        ys.append(y)
    return torch.stack(ys, 1), state


@pytest.mark.parametrize("state_size", [2, 16, 64])
def test_s4_starts_as_the_hippo_matrix(float64, state_size):
    """The published formula of HiPPO-LegS, diagonalised here, with the imaginary part of B clipped to 2 as in nplr."""
    T, mixer = 200, make(S4, 3, state_size, noise=0)
    n = np.arange(state_size)
    r = np.sqrt(2 * n + 1)
    A = np.where(n[:, None] > n, -np.outer(r, r), np.diag(-(n + 1.0)))
    eigenvalues, V = np.linalg.eig(A + np.outer(r, r) / 2)
    order = np.argsort(eigenvalues.imag)[state_size // 2 :]
    V = V[:, order] / np.linalg.norm(V[:, order], axis=0)
    V = V * np.exp(-1j * np.angle(V[0]))  # LAPACK's eigh leaves the first component real; its sign is free
    B, P = V.conj().T @ r, V.conj().T @ r / np.sqrt(2)
    # Unclipped it is the real system, in another basis.
    C = np.random.default_rng(0).normal(size=(len(order), 2)) @ [1, 1j]
    dense = np.diag(full(eigenvalues[order])) - np.outer(full(P), full(P).conj())
    split = impulse_response(*bilinear(dense, full(B), 0.05), full(C), T)
    assert error(split, impulse_response(*bilinear(A, r, 0.05), 2 * (C @ V.conj().T).real, T)) < 1e-10
    if state_size == 64:
        assert (abs(B.imag) > 2).sum() == 11 and abs(B.imag).max() > 40
    B = B.real + 1j * np.clip(B.imag, -2, 2)
    for d, dt in enumerate(np.exp(array(mixer.log_dt))):
        expected = impulse_response(*bilinear(dense, full(B), dt), full(complex_array(mixer.C)[d]), T).real
        expected[0] += array(mixer.D)[d]
        assert error(layer_kernel(mixer, T)[d], expected) < 1e-10


def test_s4d_starts_as_s4d_lin(float64):
    mixer = make(S4D, 3, 16, noise=0)
    np.testing.assert_allclose(array(mixer.A_imag), np.pi * np.arange(8) * np.ones((3, 1)), rtol=1e-15)
    np.testing.assert_allclose(np.exp(array(mixer.log_A_real)), 0.5, rtol=1e-15)
    assert error(layer_kernel(mixer, 100), dense_kernel(mixer, 100)) < 1e-10


@each_layer
@pytest.mark.parametrize("noise", [0.3, 1.5])
@pytest.mark.parametrize("T", [1, 2, 3, 64, 101])
def test_kernel_is_that_of_the_dense_system(layer, noise, T):
    mixer = make(layer, 4, 8, noise=noise)
    assert error(layer_kernel(mixer, T), dense_kernel(mixer, T)) < 1e-10


def test_strong_feedback_at_full_size():
    """P of ten times its size: what the diagonal part and the feedback say cancels."""
    mixer = make(S4, 2, 64, noise=0.3)
    with torch.no_grad():
        mixer.P *= 10
    assert error(layer_kernel(mixer, 1000), dense_kernel(mixer, 1000)) < 1e-9


@pytest.mark.parametrize("T", [1, 16, 33])
def test_s4_kernel_is_the_published_generating_function(T):
    """Algorithm 1 of arXiv 2111.00396: Cauchy sums at the roots of unity with C (I - A^T), then an inverse FFT."""
    mixer = make(S4, 2, 8)
    z = np.exp(-2j * np.pi * np.arange(T) / T) * (1 + 1e-9j)  # off -1, where (1 - z) / (1 + z) has its pole
    for d in range(2):
        A, B, C, dt = dense_system(mixer, d)
        C = C - C @ np.linalg.matrix_power(bilinear(A, B, dt)[0], T)
        P = full(complex_array(mixer.P)[d])
        Lambda = np.diag(A) + P * P.conj()
        cauchy = 1 / (2 / dt * ((1 - z) / (1 + z))[:, None] - Lambda)
        k = {name: cauchy @ v for name, v in dict(cb=C * B, cp=C * P, qb=P.conj() * B, qp=P.conj() * P).items()}
        kernel = np.fft.ifft(2 / (1 + z) * (k["cb"] - k["cp"] * k["qb"] / (1 + k["qp"]))).real
        kernel[0] += array(mixer.D)[d]
        assert error(layer_kernel(mixer, T)[d], kernel) < 1e-6


@each_layer
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("T", [1, 2, 7, 64, 100])
def test_law(layer, dtype, tolerance, T):
    """Whole = chunks with the state carried = steps; the last state too."""
    mixer = make(layer, 5, 16, dtype)
    x = torch.randn(3, T, 5, dtype=dtype)
    with torch.no_grad():
        whole, no_state = mixer(x)
        assert no_state is None and whole.shape == x.shape and whole.dtype == dtype
        steps, last = run_steps(mixer, x, mixer.initial_state(3))
        results = {"none": (whole, last)}
        for size in (1, 3, 32, 100):
            state, ys = mixer.initial_state(3), []
            for chunk in x.split(size, 1):
                y, state = mixer(chunk, state)
                ys.append(y)
            results[f"chunks of {size}"] = (torch.cat(ys, 1), state)
    for name, (y, state) in results.items():
        assert error(y, steps) < tolerance, name
        assert error(state, last) < tolerance and state.dtype == last.dtype == mixer.initial_state(1).dtype, name


@each_layer
def test_law_at_full_size(layer):
    mixer = make(layer, 2, 64, torch.float32, noise=0)
    x = torch.randn(1, 1500, 2)
    with torch.no_grad():
        steps, last = run_steps(mixer, x, mixer.initial_state(1))
        assert error(mixer(x)[0], steps) < 1e-4
        y, state = mixer(x, mixer.initial_state(1))
        assert error(y, steps) < 1e-4 and error(state, last) < 1e-4
        y, state = mixer(x[:, 1000:], mixer(x[:, :1000], mixer.initial_state(1))[1])
        assert error(y, steps[:, 1000:]) < 1e-4 and error(state, last) < 1e-4


@each_layer
@pytest.mark.parametrize("T, state_size", [(1, 2), (7, 2), (37, 8)])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradients_are_those_of_the_steps(layer, T, state_size, with_state):
    mixer = make(layer, 3, state_size)
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, state_size // 2, dtype=torch.complex128) if with_state else mixer.initial_state(2)
    h.requires_grad_()
    weight = torch.randn(2, T, 3, dtype=torch.float64)
    leaves = {**dict(mixer.named_parameters()), "x": x} | ({"state": h} if with_state else {})

    def gradients(y, state):
        loss = (weight * y).sum() + ((1 + 2j) * state).real.sum() * with_state
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    y, state = mixer(x, h if with_state else None)
    actual, expected = gradients(y, h if state is None else state), gradients(*run_steps(mixer, x, h))
    for name in leaves:
        assert error(actual[name], expected[name]) < 1e-9, name


@each_layer
def test_gradients_numerically(layer):
    mixer = make(layer, 2, 4)
    x, h = torch.randn(1, 5, 2, dtype=torch.float64), torch.randn(1, 2, 2, dtype=torch.complex128)
    names, values = zip(*mixer.named_parameters(), strict=True)

    def f(x, h, *parameters):
        call = torch.func.functional_call
        whole = call(mixer, dict(zip(names, parameters, strict=True)), (x,))[0]
        return whole, *call(mixer, dict(zip(names, parameters, strict=True)), (x, h))

    inputs = [v.detach().clone().requires_grad_() for v in (x, h, *values)]
    assert torch.autograd.gradcheck(f, inputs)


@each_layer
def test_long_kernel_in_float32_is_exact_and_decays(layer):
    """The longest sequence of the experiments; steps of 0.01 to 0.1 forget within it."""
    mixer = make(layer, 4, 64, torch.float32, noise=0, dt_min=1e-2)
    kernel = layer_kernel(mixer, 4112)
    exact = dense_kernel(mixer, 4112)
    assert error(kernel, exact) < 1e-5
    early, late = np.abs(kernel[:, :512]).max(1), np.abs(kernel[:, 3600:]).max(1)
    assert (late < 1e-4 * early).all()


@each_layer
def test_causal_and_layout_free(layer):
    mixer = make(layer)
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, 11:] += 1
    with torch.no_grad():
        y = mixer(x)[0]
        torch.testing.assert_close(mixer(changed)[0][:, :11], y[:, :11])
        assert error(mixer(changed)[0][:, 11], y[:, 11]) > 1e-3
        for strange in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
            torch.testing.assert_close(mixer(strange)[0], y)
            torch.testing.assert_close(mixer(strange, mixer.initial_state(2))[0], y)


@each_layer
def test_autocast_changes_only_the_rounding_of_x(layer):
    mixer = make(layer, 4, 16, torch.float32)
    x = torch.randn(2, 300, 4)
    exact = mixer(x)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer(x)[0], exact)
        assert error(mixer(x, mixer.initial_state(2))[0].detach(), exact) < 1e-5
        low, state = mixer(x.bfloat16(), mixer.initial_state(2))
        whole = mixer(x.bfloat16())[0]
        steps, _ = run_steps(mixer, x.bfloat16(), mixer.initial_state(2))
    assert whole.dtype == low.dtype == steps.dtype == torch.bfloat16 and state.dtype == torch.complex64
    for y in (whole, low, steps):
        assert error(y.detach().float(), exact) < 1e-2
    whole.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in mixer.parameters())


@each_layer
def test_bfloat16_module(layer):
    mixer = make(layer, 4, 16, torch.bfloat16)
    x = torch.randn(2, 30, 4).bfloat16()
    with torch.no_grad():
        y, _ = mixer(x)
        steps, _ = run_steps(mixer, x, mixer.initial_state(2))
    assert y.dtype == torch.bfloat16 and error(y, steps) < 1e-2


@each_layer
def test_initial_values_and_marks(layer):
    mixer = layer(2000, 4)
    assert isinstance(mixer, Mixer) and mixer.dim == 2000
    log_dt = array(mixer.log_dt)
    assert np.log(1e-3) <= log_dt.min() and log_dt.max() <= np.log(1e-1)
    assert abs(np.mean(log_dt) - np.log(1e-2)) < 0.1
    assert abs(np.mean(np.abs(complex_array(mixer.C)) ** 2) - 1) < 0.1
    for name, parameter in mixer.named_parameters():
        assert getattr(parameter, "no_weight_decay", False) == (name in DYNAMICS[layer] | {"D"}), name
        assert getattr(parameter, "lr_max", None) == (1e-3 if name in DYNAMICS[layer] else None), name


@each_layer
@pytest.mark.parametrize(
    "settings, name",
    [
        ({"dim": 0}, "dim"),
        ({"dim": -1}, "dim"),
        ({"dim": 4, "state_size": 0}, "state_size"),
        ({"dim": 4, "state_size": -2}, "state_size"),
        ({"dim": 4, "state_size": 7}, "state_size"),
        ({"dim": 4, "dt_min": 0.0}, "dt_min"),
        ({"dim": 4, "dt_min": 0.2}, "dt_min"),
    ],
)
def test_wrong_settings(layer, settings, name):
    with pytest.raises(ValueError, match=name):
        layer(**settings)


def test_a_discretization_that_there_is_not():
    with pytest.raises(ValueError, match="discretization: expected 'zoh' or 'bilinear', got 'euler'"):
        S4D(4, discretization="euler")


@each_layer
def test_wrong_arguments(layer):
    with pytest.raises(TypeError, match="dim"):
        layer(4.0)
    with pytest.raises(TypeError, match="state_size"):
        layer(4, state_size=True)
    mixer = layer(4, 8)
    for x in (torch.zeros(2, 3), torch.zeros(2, 3, 5), torch.zeros(2, 0, 4)):
        with pytest.raises(ValueError, match="x: expected shape"):
            mixer(x)
    with pytest.raises(ValueError, match="x_t: expected shape"):
        mixer.step(torch.zeros(2, 1, 4), mixer.initial_state(2))
    for state in (mixer.initial_state(3), mixer.initial_state(2).real):
        with pytest.raises(ValueError, match="state: expected complex"):
            mixer(torch.zeros(2, 3, 4), state)
        with pytest.raises(ValueError, match="state: expected complex"):
            mixer.step(torch.zeros(2, 4), state)
