"""The blocks around an inner layer: the architectures of Mamba's table 1 (arXiv 2312.00752, section 4.1).

Every wrapping takes `inner`, a callable from a width to a Mixer: a class, or functools.partial(S6, state_size=8).
Its state is a tuple that ends with the inner layer's; it has a recurrent form if the inner layer has one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, State, like
from .s4 import ShiftSSM


class CausalConv(Mixer):
    """One filter of `size` taps for every channel, with a bias: y_t = bias + sum_k weight_k x_{t - size + 1 + k}.

    It equals torch.nn.Conv1d(dim, dim, size, groups=dim) over a sequence with size - 1 zeros before it, and has its
    initialisation. The weight is (size, dim), time first, so the sequence needs no transposed copy.
    The state is the last size - 1 inputs, (B, size - 1, dim).
    """

    def __init__(self, dim: int, size: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected a positive int, got {size}")
        self.dim = dim
        self.size = size
        self.weight = nn.Parameter(torch.empty(size, dim).uniform_(-(size**-0.5), size**-0.5))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        T = x.shape[1]
        window = F.pad(x, (0, 0, self.size - 1, 0)) if state is None else torch.cat([state, x], 1)
        y = sum((window[:, k : k + T] * self.weight[k] for k in range(self.size)), self.bias)
        return y, None if state is None else window[:, T:].clone()

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def initial_state(self, batch_size: int) -> Tensor:
        return like(self.weight, batch_size, self.size - 1, self.dim)


class Ungated(Mixer):
    """inner -> GELU -> Linear to 2 dim -> GLU: the block of S4 and S4D in their authors' code, without a gate.

    (https://github.com/state-spaces/s4/blob/e757cef57d89e448c413de7325ed5601aceaac13, models/s4/s4d.py and
    src/models/sequence/modules/s4block.py.) The state is (the inner layer's,).
    """

    def __init__(self, dim: int, inner: Callable[[int], Mixer]):
        super().__init__()
        self.dim = dim
        self.inner = inner(dim)
        self.out_proj = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        return self._mix(x, state, self.inner)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return self._mix(x_t, state, self.inner.step)

    def initial_state(self, batch_size: int) -> State:
        return (self.inner.initial_state(batch_size),)

    def _mix(self, x, state, inner):
        (inner_state,) = (None,) if state is None else state
        y, inner_state = inner(x, inner_state)
        return F.glu(self.out_proj(F.gelu(y)), -1), None if state is None else (inner_state,)


class _Gated(Mixer):
    """The base of H3, Hyena and Mamba: a short convolution, an inner layer, and the state of both."""

    conv: CausalConv | ShiftSSM
    inner: Mixer

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        return self._mix(x, state, self.conv, self.inner)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        return self._mix(x_t, state, self.conv.step, self.inner.step)

    def initial_state(self, batch_size: int) -> State:
        return self.conv.initial_state(batch_size), self.inner.initial_state(batch_size)

    def _mix(self, x: Tensor, state: State | None, conv: Callable, inner: Callable) -> tuple[Tensor, State | None]:
        """Maps a sequence or a token, whichever conv and inner are given for."""
        raise NotImplementedError


class H3(_Gated):
    """q * inner(shift(k) * v), between two Linears (arXiv 2212.14052, section 3.2).

    The shift is a `ShiftSSM` of 64 taps. With bilinear S4D-Lin and a learned B inside, this is the authors' code
    (https://github.com/HazyResearch/H3, src/models/ssm/h3.py, with heads of one channel, its default).
    The state is (the shift's, the inner layer's).
    """

    def __init__(self, dim: int, inner: Callable[[int], Mixer], shift_size: int = 64):
        super().__init__()
        self.dim = dim
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.conv = ShiftSSM(dim, shift_size)
        self.inner = inner(dim)
        self.out_proj = nn.Linear(dim, dim)

    def _mix(self, x, state, conv, inner):
        conv_state, inner_state = (None, None) if state is None else state
        q, k, v = self.in_proj(x).chunk(3, -1)
        k, conv_state = conv(k, conv_state)
        y, inner_state = inner(k * v, inner_state)
        return self.out_proj(q * y), None if state is None else (conv_state, inner_state)


class HyenaOperator(_Gated):
    """q * inner(k * v) with (q, k, v) = conv(Linear(x)), then a Linear (arXiv 2302.10866, definition 3.1).

    With `Hyena` inside and a convolution of 3 taps it is the authors' operator of order 2
    (https://github.com/HazyResearch/safari, src/models/sequence/hyena.py).
    The state is (the convolution's, the inner layer's).
    """

    def __init__(self, dim: int, inner: Callable[[int], Mixer], conv_size: int = 3):
        super().__init__()
        self.dim = dim
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.conv = CausalConv(3 * dim, conv_size)
        self.inner = inner(dim)
        self.out_proj = nn.Linear(dim, dim)

    def _mix(self, x, state, conv, inner):
        conv_state, inner_state = (None, None) if state is None else state
        qkv, conv_state = conv(self.in_proj(x), conv_state)
        q, k, v = qkv.chunk(3, -1)
        y, inner_state = inner(k * v, inner_state)
        return self.out_proj(q * y), None if state is None else (conv_state, inner_state)


class Mamba(_Gated):
    """inner(SiLU(conv(x'))) * SiLU(z) with (x', z) = Linear(x), then a Linear (arXiv 2312.00752, section 3.4).

    The two Linears have no bias. With S6 inside this is Mamba's block, whose dt_rank comes from the outer width:
    `partial(S6, dt_rank=math.ceil(dim / 16))`.
    The state is (the convolution's, the inner layer's).
    """

    def __init__(self, dim: int, inner: Callable[[int], Mixer], expand: int = 2, conv_size: int = 4):
        super().__init__()
        self.dim = dim
        self.in_proj = nn.Linear(dim, 2 * expand * dim, bias=False)
        self.conv = CausalConv(expand * dim, conv_size)
        self.inner = inner(expand * dim)
        self.out_proj = nn.Linear(expand * dim, dim, bias=False)

    def _mix(self, x, state, conv, inner):
        conv_state, inner_state = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, -1)
        x, conv_state = conv(x, conv_state)
        y, inner_state = inner(F.silu(x), inner_state)
        return self.out_proj(y * F.silu(z)), None if state is None else (conv_state, inner_state)
