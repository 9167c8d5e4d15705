"""S4 and S4D: time-invariant state space layers, the baselines "S4" of Mamba's Table 1.

B batch, T time, D channels, M = state_size / 2 modes: one of each conjugate pair. Every channel is a system of its own
with one input and one output, both real although its modes are complex.

Both layers are computed from the response Re sum_n l_n a_n^t r_n of diagonal modes. With t = m q + r it is a product of
two small matrices, (Q, M) by (M, m) with Q and m near sqrt(T), so no (D, M, T) tensor is ever made. These small tensors
are complex128 whatever the parameters are: they cost little beside the convolution, powers up to T amplify rounding,
S4's feedback cancels digits, and no TF32 setting affects float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, causal_convolution, like, no_weight_decay

B_CLIP = 2.0


def _powers(a: Tensor, n: int) -> Tensor:
    """Returns a^0, ..., a^(n-1) as (..., n), by products because a = 0 has no logarithm."""
    a = a.unsqueeze(-1)
    powers = torch.ones_like(a)
    while powers.shape[-1] < n:
        powers, a = torch.cat((powers, powers * a), -1), a * a
    return powers[..., :n]


def _blocked_powers(a: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Returns first (..., m) and second (..., Q), Q m >= T, with a^(m q + r) = first[r] * second[q]."""
    m = 1 << ((T - 1).bit_length() + 1) // 2
    first = _powers(a, m)
    return first, _powers(first[..., -1] * a, -(-T // m))


def _response(a: Tensor, left: Tensor, right: Tensor, T: int) -> Tensor:
    """Returns Re sum_n left a^t right for t < T: (D, M), (I, D, M), (J, D, M) -> (I, J, D, T)."""
    first, second = _blocked_powers(a, T)
    rows = torch.view_as_real(left.unsqueeze(-1) * first)
    columns = torch.view_as_real((right.unsqueeze(-1) * second).conj_physical())
    return torch.einsum("jdnqc,idnrc->ijdqr", columns, rows).flatten(-2)[..., :T]  # Re(u v) = (conj u) . v as pairs


def _collect(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """Returns the state sum_t a^(T-1-t) b u_t of diagonal modes: (D, M), (D, M), real (B, D, T) -> (B, D, M)."""
    T = u.shape[-1]
    first, second = _blocked_powers(a, T)
    m, Q = first.shape[-1], second.shape[-1]
    blocks = F.pad(u.flip(-1), (0, Q * m - T)).unflatten(-1, (Q, m))
    inner = torch.einsum("bdqr,dnrc->bdqnc", blocks, torch.view_as_real(first))  # u is real, which halves the work
    return b * torch.einsum("bdqn,dnq->bdn", torch.view_as_complex(inner), second)


def _evolve(a: Tensor, h: Tensor, T: int) -> Tensor:
    """Returns a^T h."""
    first, second = _blocked_powers(a, T)
    return first[..., (T - 1) % first.shape[-1]] * second[..., -1] * a * h


def _delay(k: Tensor) -> Tensor:
    """Delays k (..., T) by one step."""
    return F.pad(k, (1, 0))[..., :-1]


def _feed_back(k: Tensor, u: Tensor) -> Tensor:
    """Returns w with w_t + sum_{j<t} k_{t-1-j} w_j = u_t: (D, T), (..., D, T) -> (..., D, T).

    This divides by the power series 1 + z k(z). Each Newton iteration doubles the length of its inverse.
    """
    T = k.shape[-1]
    g = F.pad(k, (1, 0), value=1.0)[..., :T]
    inverse = torch.ones_like(k[..., :1])
    while (n := inverse.shape[-1]) < T:
        n = min(2 * n, T)
        padded = F.pad(inverse, (0, n - inverse.shape[-1]))
        inverse = 2 * padded - causal_convolution(padded, causal_convolution(padded, g[..., :n]))
    return causal_convolution(u, inverse)


class _StateSpace(Mixer):
    """The base of S4 and S4D, without A, B and the discretisation: y = the system's response to x + D x."""

    def __init__(self, dim: int, state_size: int, dt_min: float, dt_max: float):
        super().__init__()
        for name, value in {"dim": dim, "state_size": state_size}.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value <= 0:
                raise ValueError(f"{name}: expected a positive int, got {value}")
        if state_size % 2:
            raise ValueError(f"state_size: expected an even int (modes come in conjugate pairs), got {state_size}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.dim = dim
        self.state_size = state_size
        # Complex parameters are pairs of reals, because module.double() and .to(dtype) skip or break complex ones.
        self.log_dt = nn.Parameter(torch.empty(dim).uniform_(math.log(dt_min), math.log(dt_max)))
        self.C = nn.Parameter(torch.randn(dim, state_size // 2, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(dim))
        no_weight_decay(self.D)

    def _small_steps(self, *parameters: nn.Parameter) -> None:
        """Bounds the learning rate of parameters by 1e-3 and turns weight decay off for them, as the authors do."""
        no_weight_decay(*parameters)
        for parameter in parameters:
            parameter.lr_max = 1e-3

    def _discretise(self) -> tuple[Tensor, ...]:
        """Returns a, b, c and whatever else `_advance` needs, (D, M) complex128 each."""
        raise NotImplementedError

    def _kernel(self, T: int) -> Tensor:
        """Returns the response to 1, 0, 0, ... without D, (D, T) float64."""
        raise NotImplementedError

    def _run(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y without D x, and the state after the last step: x (B, D, T) float64, h (B, D, M) complex128."""
        raise NotImplementedError

    @staticmethod
    def _advance(system: tuple[Tensor, ...], x_t: Tensor, h: Tensor) -> Tensor:
        """Returns the state after x_t (B, D, 1), given the one before it, h (B, D, M)."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `Mixer.forward`. The convolution is in float32, or in float64 where x or the parameters are.

        With a state everything is in float64, because S4's feedback cancels digits. This is three to twelve times
        slower, but training needs no state.

        Args:
            x: (B, T, D), T >= 1.
            state: (B, D, M) complex, or None.
        """
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.dim:
            raise ValueError(f"x: expected shape (B, T >= 1, {self.dim}), got {tuple(x.shape)}")
        self._check_state(state, x.shape[0])
        wide = torch.promote_types(torch.promote_types(x.dtype, self.D.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            u = x.transpose(1, 2)
            if state is None:
                y = causal_convolution(u.to(wide), self._kernel(x.shape[1]).to(wide))
            else:
                y, h = self._run(u.double(), state.to(torch.complex128))
                y, state = y.to(wide), h.to(state.dtype)
            return (y.transpose(1, 2) + self.D.to(wide) * x).to(x.dtype), state

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `Mixer.step`. Each call discretises anew, 0.1 ms of 0.3 (B = 32, D = 64, one CPU core).

        Args:
            x_t: (B, D).
            state: (B, D, M) complex.
        """
        if x_t.dim() != 2 or x_t.shape[1] != self.dim:
            raise ValueError(f"x_t: expected shape (B, {self.dim}), got {tuple(x_t.shape)}")
        self._check_state(state, x_t.shape[0])
        with torch.autocast(x_t.device.type, enabled=False):
            system = tuple(part.to(state.dtype) for part in self._discretise())
            wide = x_t.to(state.real.dtype)
            state = self._advance(system, wide.unsqueeze(-1), state)
            y = (system[2] * state).real.sum(-1) + self.D.to(wide.dtype) * wide
            return y.to(x_t.dtype), state

    def initial_state(self, batch_size: int) -> Tensor:
        """Returns zeros, (B, D, M) complex."""
        dtype = torch.promote_types(self.C.dtype, torch.complex64)
        return torch.zeros(batch_size, self.dim, self.state_size // 2, dtype=dtype, device=self.C.device)

    def _check_state(self, state: Tensor | None, batch_size: int) -> None:
        expected = (batch_size, self.dim, self.state_size // 2)
        if state is not None and (state.shape != expected or not state.is_complex()):
            raise ValueError(f"state: expected complex {expected}, got {state.dtype} {tuple(state.shape)}")

    def extra_repr(self) -> str:
        return f"{self.dim}, state_size={self.state_size}"


def _complex(pairs: Tensor) -> Tensor:
    """Returns pairs (..., 2) as complex128 (...)."""
    return torch.view_as_complex(pairs.double())


class S4D(_StateSpace):
    """The diagonal state space layer, S4D-Lin (arXiv 2206.11893, section 4; its section 5 compares the choices).

        h' = A h + x,   y = 2 Re(C h) + D x,   A = -exp(log_A_real) + i A_imag

    It is discretised by zero-order hold with a step of its own for each channel. As in the authors' listing
    (https://github.com/state-spaces/s4/blob/2ed46fcf77f2392145ceb801a553367c9111675a/models/s4/s4d.py): A_n starts
    at -1/2 + i pi n, B is 1 since C can absorb it, log dt is uniform, C and D are normal. log_dt and A are not
    decayed and their lr_max is 1e-3; C is an ordinary parameter; D is not decayed.

    Args:
        dim: D.
        state_size: N = 2M, the real size of each channel's state.
        dt_min, dt_max: the range of the initial steps.
        discretization: "zoh" (zero-order hold), or "bilinear", as inside H3.
        learn_B: whether B is a parameter too, as inside H3; it starts from 1 and is trained as A is.
    """

    def __init__(
        self,
        dim: int,
        state_size: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        discretization: str = "zoh",
        learn_B: bool = False,
    ):
        super().__init__(dim, state_size, dt_min, dt_max)
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization: expected 'zoh' or 'bilinear', got {discretization!r}")
        modes = state_size // 2
        self.discretization = discretization
        self.log_A_real = nn.Parameter(torch.full((dim, modes), math.log(0.5)))
        self.A_imag = nn.Parameter((math.pi * torch.arange(modes)).repeat(dim, 1))
        self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(dim, modes, 1)) if learn_B else None
        self._small_steps(self.log_dt, self.log_A_real, self.A_imag, *([self.B] if learn_B else []))

    def _discretise(self) -> tuple[Tensor, ...]:
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        dt = self.log_dt.double().exp().unsqueeze(-1)
        if self.discretization == "zoh":
            a = (dt * A).exp()
            b = (a - 1) / A
        else:
            d = 1 / (1 - dt * A / 2)
            a, b = 2 * d - 1, dt * d
        return a, b if self.B is None else b * _complex(self.B), 2 * _complex(self.C)

    def _kernel(self, T: int) -> Tensor:
        a, b, c = self._discretise()
        return _response(a, c[None], b[None], T)[0, 0]

    def _run(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = self._discretise()
        T = x.shape[-1]
        y = causal_convolution(x, _response(a, c[None], b[None], T)[0, 0]) + _response(a, (c * a)[None], h, T)[0]
        return y, _evolve(a, h, T) + _collect(a, b, x)

    @staticmethod
    def _advance(system: tuple[Tensor, ...], x_t: Tensor, h: Tensor) -> Tensor:
        a, b, _ = system
        return a * h + b * x_t


def _legs(state_size: int) -> tuple[Tensor, Tensor]:
    """Returns HiPPO-LegS as the imaginary parts of Lambda, (M,) float64, and B, (M,) complex128.

    The real parts are -1/2. With p_n = sqrt(n + 1/2) the matrix is S - 1/2 - p p^T, S skew (arXiv 2111.00396, appendix
    C.1), and sqrt(2) p is its input vector, so P = B / sqrt(2). An eigenvector's phase is free: its first component is
    real here, as in LAPACK's result for the authors, whose clipping of B (see `S4`) depends on the phase.
    """
    p = (torch.arange(state_size, dtype=torch.float64) + 0.5).sqrt()
    pp = torch.outer(p, p)
    omega, V = torch.linalg.eigh(-1j * (pp.triu(1) - pp.tril(-1)))
    upper = slice(state_size // 2, None)  # in ascending order: the positive half of the conjugate pairs
    V = V[:, upper] * (V[0, upper].abs() / V[0, upper])
    return omega[upper], V.mH @ (math.sqrt(2) * p).to(V.dtype)


class S4(_StateSpace):
    """The structured state space layer with the HiPPO-LegS matrix (arXiv 2111.00396, section 3).

        h' = A h + B x,   y = 2 Re(C h) + D x,   A h = Lambda h - P 2 Re(P^* h),   Lambda = -exp(log_A_real) + i A_imag

    It is discretised by the bilinear transform with a step of its own for each channel. The two low-rank factors are
    tied, which keeps A stable (arXiv 2202.09729, on stabilising S4). Each channel has its own Lambda, P, B and dt. They
    are not decayed and their lr_max is 1e-3; C is an ordinary parameter, initially normal; D is not decayed. The
    imaginary part of the initial B is clipped to 2, as the authors' code does
    (https://github.com/state-spaces/s4/blob/e757cef57d89e448c413de7325ed5601aceaac13/models/s4/s4.py, nplr).

    The discrete matrix is again diagonal plus rank one: h_t = a h_{t-1} - p w_t + b x_t with w_t = Re(q h_{t-1}), a
    diagonal system with one feedback w. This gives the paper's Woodbury identity with its four generating functions,
    K(z) = k_cb(z) - k_cp(z) (1 + z k_qp(z))^-1 z k_qb(z). The paper evaluates it at the roots of unity, where it is
    the infinite kernel folded to length T, and so trains C (I - A^T) for one T. Here the four functions are truncated
    power series, divided as series. This is exact for every T with C itself as the parameter, describes the same
    system as `step`, and is cheaper at these sizes than the T-th power of a dense matrix.

    Args:
        dim: D.
        state_size: N = 2M, the real size of each channel's state.
        dt_min, dt_max: the range of the initial steps, uniform in log dt.
    """

    def __init__(self, dim: int, state_size: int = 64, dt_min: float = 1e-3, dt_max: float = 1e-1):
        super().__init__(dim, state_size, dt_min, dt_max)
        omega, B = _legs(state_size)
        omega, P = omega.to(self.D.dtype).repeat(dim, 1), B / math.sqrt(2)
        B = torch.complex(B.real, B.imag.clamp(-B_CLIP, B_CLIP))
        self.log_A_real = nn.Parameter(torch.full_like(omega, math.log(0.5)))
        self.A_imag = nn.Parameter(omega)
        self.B, self.P = (nn.Parameter(torch.view_as_real(x).to(self.D.dtype).repeat(dim, 1, 1)) for x in (B, P))
        self._small_steps(self.log_dt, self.log_A_real, self.A_imag, self.B, self.P)

    def _discretise(self) -> tuple[Tensor, ...]:
        """Returns a, b, c, p, q. With E = I - (dt/2) A the bilinear transform gives 2 E^-1 - I and E^-1 dt B."""
        half_dt = self.log_dt.double().exp().unsqueeze(-1) / 2
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        B, P = _complex(self.B), _complex(self.P)
        d = 1 / (1 - half_dt * A)
        q = 2 * P.conj() * d
        p = 2 * half_dt * d * P / (1 + half_dt * (q * P).real.sum(-1, keepdim=True))
        b = 2 * half_dt * d * B - half_dt * p * (q * B).real.sum(-1, keepdim=True)
        return 2 * d - 1, b, 2 * _complex(self.C), p, q

    def _kernel(self, T: int) -> Tensor:
        a, b, c, p, q = self._discretise()
        (cb, cp), (qb, qp) = _response(a, torch.stack((c, q)), torch.stack((b, p)), T)
        return cb - causal_convolution(cp, _feed_back(qp, _delay(qb)))

    def _run(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, p, q = self._discretise()
        T = x.shape[-1]
        (cb, cp), (qb, qp) = _response(a, torch.stack((c, q)), torch.stack((b, p)), T)
        y_free, w_free = _response(a, torch.stack((c * a, q)), h, T)
        w = _feed_back(qp, w_free + causal_convolution(x, _delay(qb)))
        y = y_free + causal_convolution(x, cb) - causal_convolution(w, cp)
        return y, _evolve(a, h, T) + _collect(a, b, x) - _collect(a, p, w)

    @staticmethod
    def _advance(system: tuple[Tensor, ...], x_t: Tensor, h: Tensor) -> Tensor:
        a, b, _, p, q = system
        return a * h - p * (q * h).real.sum(-1, keepdim=True) + b * x_t


class ShiftSSM(Mixer):
    """The shift SSM of H3: a causal filter of `size` taps for every channel, and D x (arXiv 2212.14052, section 3.1).

    y_t = C h_t + D x_t, where h_t is h_{t-1} shifted by one place, plus B x_t, so the taps are k_j = sum_n B_n C_{n+j}.
    As in the authors' code
    (https://github.com/HazyResearch/H3/blob/5c4d06b5795405170387c80998b58d76179a8a1a/src/models/ssm/ss_kernel.py)
    B starts from e_1 and C from U(-1/sqrt(size), 1/sqrt(size)), and both are trained. B and D do not decay, and B's
    lr_max is 1e-3, as for the dynamics of S4D
    (https://github.com/HazyResearch/safari/blob/02220c69d247e5473616cd053a443ad99fd2559b/configs/model/layer/h3.yaml).

    The state is the last size - 1 inputs, (batch, size - 1, dim).
    """

    def __init__(self, dim: int, size: int = 64):
        super().__init__()
        if size < 2:
            raise ValueError(f"size: expected at least 2, got {size}")
        self.dim = dim
        self.size = size
        self.B = nn.Parameter(torch.zeros(dim, size).index_fill_(1, torch.tensor(0), 1.0))
        self.C = nn.Parameter(torch.empty(dim, size).uniform_(-(size**-0.5), size**-0.5))
        self.D = nn.Parameter(torch.randn(dim))
        no_weight_decay(self.B, self.D)
        self.B.lr_max = 1e-3

    def taps(self) -> Tensor:
        """Returns the taps (dim, size), in the parameters' dtype."""
        n = 2 * self.size
        wide = torch.fft.rfft(self.B.double(), n).conj() * torch.fft.rfft(self.C.double(), n)
        return torch.fft.irfft(wide, n)[:, : self.size].to(self.C.dtype)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `Mixer.forward`. The convolution is in float32, or in float64 where x or the parameters are."""
        T, past = x.shape[1], 0 if state is None else self.size - 1
        window = x if state is None else torch.cat([state, x], 1)
        wide = torch.promote_types(torch.promote_types(x.dtype, self.D.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            taps = self.taps().to(wide)
            taps = F.pad(taps, (0, max(0, T + past - self.size)))[:, : T + past]
            y = causal_convolution(window.transpose(1, 2).to(wide), taps)[..., past:].transpose(1, 2)
            y = (y + self.D.to(wide) * x).to(x.dtype)
        return y, None if state is None else window[:, T:].clone()

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([state, x_t[:, None]], 1)
        y = (window * self.taps().flip(1).T).sum(1) + self.D * x_t
        return y.to(x_t.dtype), window[:, 1:]

    def initial_state(self, batch_size: int) -> Tensor:
        return like(self.D, batch_size, self.size - 1, self.dim)
