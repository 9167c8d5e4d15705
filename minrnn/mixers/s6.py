"""S6, the selective state space model of Mamba (arXiv 2312.00752, section 3.2, algorithm 2).

B, C and dt are the paper's. Tensors are (batch, T, dim); B and C are (batch, T, N), where N is the state's size.
"""

import importlib.util
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.selective import BACKENDS, selective_scan
from .base import Mixer, no_weight_decay


class S6(Mixer):
    """The selective state space layer, without gate, convolution or output projection.

    With (dt_low, B, C) = Linear(x) and dt = softplus(Linear(dt_low)), every channel with its N states computes
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = C_t h_t + D x_t. Settings, names and initial values are those
    of https://github.com/state-spaces/mamba (mamba_ssm/modules/mamba_simple.py), which derives dt_rank from the width
    of the model; the default here derives it from that of this layer.

    Args:
        dt_rank: the width of dt_low; None means dim / 16, rounded up.
        dt_min, dt_max: the range of softplus(bias of dt) at initialisation, drawn log-uniformly.
        dt_floor: the least value of it.
        backend: one of `minrnn.ops.selective.selective_scan`, or "mamba-ssm", that package's CUDA kernel. It takes
            no initial state, so a call with a state runs on "auto" of `selective_scan`. "auto" is "mamba-ssm" if it
            is installed and the tensors are on CUDA and not float64; otherwise it is `selective_scan`'s.
    """

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_floor: float = 1e-4,
        backend: str = "auto",
    ):
        super().__init__()
        if backend not in ("auto", "mamba-ssm", *BACKENDS):
            raise ValueError(f"backend: expected one of {('auto', 'mamba-ssm', *BACKENDS)}, got {backend!r}")
        if backend == "mamba-ssm" and not _has_mamba_ssm():
            raise ValueError("backend: 'mamba-ssm' needs the package mamba-ssm, which is not installed")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.dim = dim
        self.state_size = state_size
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.backend = backend
        self.x_proj = nn.Linear(dim, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, dim)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim))
        no_weight_decay(self.A_log, self.D, self.dt_proj.bias)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = torch.empty(dim).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `Mixer.forward`; the state is (batch, dim, N), float32 (float64 for float64)."""
        dt, B, C = self._select(x)
        with _no_autocast(x):
            u, A, D, bias = self._wide(x)
            if state is None and self._uses_mamba_ssm(u):
                y = _mamba_ssm_scan(u, dt, A, B, C, D, bias)
            else:
                backend = "auto" if self.backend == "mamba-ssm" else self.backend
                y, h = selective_scan(u, F.softplus(dt + bias), A, B, C, state, backend=backend)
                y = y + D * u
        return y.to(x.dtype), None if state is None else h

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        dt, B, C = self._select(x_t)
        with _no_autocast(x_t):
            u, A, D, bias = self._wide(x_t)
            a, b = _coefficients(u, F.softplus(dt + bias), A, B)
            h = a * state + b
            y = (h @ C[..., None]).squeeze(-1) + D * u
        return y.to(x_t.dtype), h

    def initial_state(self, batch_size: int) -> Tensor:
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return torch.zeros(batch_size, self.dim, self.state_size, device=self.A_log.device, dtype=dtype)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dt without its bias, B and C, in float32 or wider."""
        low, B, C = self.x_proj(x).split([self.dt_rank, self.state_size, self.state_size], -1)
        dt = F.linear(low, self.dt_proj.weight)
        return _widen(dt, x), _widen(B, x), _widen(C, x)

    def _wide(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x, A, D and the bias of dt, in float32 or wider."""
        return _widen(x, x), -_widen(self.A_log, x).exp(), _widen(self.D, x), _widen(self.dt_proj.bias, x)

    def _uses_mamba_ssm(self, u: Tensor) -> bool:
        if self.backend == "auto":
            return u.is_cuda and u.dtype == torch.float32 and _has_mamba_ssm()
        if self.backend == "mamba-ssm" and not (u.is_cuda and u.dtype == torch.float32):
            raise ValueError(f"backend: 'mamba-ssm' works on CUDA tensors up to float32, got {u.dtype} on {u.device}")
        return self.backend == "mamba-ssm"


def _coefficients(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns exp(dt A) and dt u B, (..., dim, N) each, for u, dt (..., dim) and B (..., N)."""
    return torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[..., None, :]


def _mamba_ssm_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """Returns y (batch, T, dim), including D x; dt is given without its bias and softplus."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, B, C = (x.transpose(1, 2).contiguous() for x in (u, dt, B, C))  # time is the last dimension there
    return selective_scan_fn(u, dt, A, B, C, D, delta_bias=bias, delta_softplus=True).transpose(1, 2)


@cache
def _has_mamba_ssm() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


def _widen(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.promote_types(like.dtype, torch.float32))


def _no_autocast(x: Tensor) -> torch.autocast:
    """Turns autocast off, so that exponentials and long sums stay in float32."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
