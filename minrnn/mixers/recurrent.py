"""Recurrent networks as mixers: an RNN of `expansion * dim` units, then a projection back to `dim`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mingru_scan, minlstm_scan
from ..ops.scan import Backend
from ..rnn import MinGRU, MinLSTM
from .base import Mixer, State, like


def units(dim: int, expansion: float) -> int:
    """Returns `expansion * dim`, which must be a whole number of units."""
    width = expansion * dim
    if width < 1 or width != int(width):
        raise ValueError(f"expansion: expected expansion * dim to be a whole number, got {expansion} * {dim} = {width}")
    return int(width)


def g(x: Tensor) -> Tensor:
    """The paper's activation of candidates, g(x) = x + 0.5 for x >= 0, else sigmoid(x) (arXiv 2410.01201, B)."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class _TwoLayerGates(nn.Module):
    """minGRU or minLSTM for `_MinRNNMixer`, with gates of two layers: Linear(GELU(Linear(x))).

    The hidden layer is as wide as the state. The candidate stays a Linear of x. This variant is unpublished.

    Args:
        gates: their number, 1 (minGRU) or 2 (minLSTM).
        scan: takes the gates, the candidate and h0.
    """

    def __init__(self, input_size: int, hidden_size: int, gates: int, scan: Callable[..., Tensor]):
        super().__init__()
        self.hidden_size = hidden_size
        self.scan = scan
        self.fc = nn.Linear(input_size, 2 * hidden_size)  # the input of GELU, and the candidate
        self.gates = nn.Linear(hidden_size, gates * hidden_size)

    def forward(self, x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        hidden, candidate = self.fc(x).chunk(2, -1)
        gates = self.gates(F.gelu(hidden)).split(self.hidden_size, -1)
        h = self.scan(*gates, candidate, hx[0])
        return h, h[:, -1].unsqueeze(0)

    def step(self, x_t: Tensor, hx: Tensor) -> Tensor:
        return self(x_t.unsqueeze(1), hx)[1]


class _MinRNNMixer(Mixer):
    """minGRU or minLSTM with a learned initial state, then a projection.

    The layout of the authors' public code (BorealisAI/minRNNs ff52e9d, models/minRNNs.py): the initial state is
    g(p) with p ~ N(0, 1). Weights and biases of gates and candidate are marked (`is_gate`): that code does not decay
    them.
    """

    rnn: MinGRU | MinLSTM | _TwoLayerGates

    def __init__(self, dim: int, expansion: float, gate_layers: int, rnn: type[nn.Module], scan: Callable, **settings):
        super().__init__()
        if gate_layers not in (1, 2):
            raise ValueError(f"gate_layers: expected 1 or 2, got {gate_layers}")
        self.dim = dim
        hidden_size = units(dim, expansion)
        if gate_layers == 1:
            self.rnn = rnn(dim, hidden_size, batch_first=True, **settings)
        else:
            self.rnn = _TwoLayerGates(dim, hidden_size, 1 if rnn is MinGRU else 2, scan)
        self.initial = nn.Parameter(torch.randn(self.rnn.hidden_size))
        self.out = nn.Linear(self.rnn.hidden_size, dim)
        for parameter in self.rnn.parameters():
            parameter.is_gate = True

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        h0 = self.initial_state(x.shape[0]) if state is None else state
        h, h_n = self.rnn(x, h0.to(x.dtype).unsqueeze(0))  # the dtypes differ only under autocast
        return self.out(h), None if state is None else h_n[0].to(state.dtype)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        h = self.rnn.step(x_t, state.to(x_t.dtype).unsqueeze(0))[0]
        return self.out(h), h.to(state.dtype)

    def initial_state(self, batch_size: int) -> Tensor:
        """Returns the learned state, (B, expansion * dim)."""
        return g(self.initial).expand(batch_size, -1)


class MinGRUMixer(_MinRNNMixer):
    """minGRU (`minrnn.MinGRU`) of `expansion * dim` units with a learned initial state, and a projection to dim.

    With gate_layers=2, an unpublished variant, the gate is Linear(GELU(Linear(x))) with a hidden layer as wide as the
    state. signed and backend are the layer's.
    """

    def __init__(
        self, dim: int, expansion: float = 6, signed: bool = False, gate_layers: int = 1, backend: Backend = "auto"
    ):
        settings: dict[str, Any] = {"signed": signed, "backend": backend}
        super().__init__(dim, expansion, gate_layers, MinGRU, partial(mingru_scan, **settings), **settings)


class MinLSTMMixer(_MinRNNMixer):
    """minLSTM (`minrnn.MinLSTM`) of `expansion * dim` units with a learned initial state, and a projection to dim.

    The defaults are the paper's; normalize_gates=False with forget_bias=3 is what the authors' public code does.
    gate_layers=2 is as in `MinGRUMixer`, for both gates, and excludes forget_bias.
    """

    def __init__(
        self,
        dim: int,
        expansion: float = 6,
        normalize_gates: bool = True,
        forget_bias: float = 0,
        signed: bool = False,
        gate_layers: int = 1,
        backend: Backend = "auto",
    ):
        if gate_layers == 2 and forget_bias:
            raise ValueError(f"forget_bias: expected 0 where gate_layers=2, got {forget_bias}")
        settings: dict[str, Any] = {"signed": signed, "backend": backend}
        scan = partial(minlstm_scan, normalize=normalize_gates, **settings)
        settings |= {"normalize_gates": normalize_gates, "forget_bias": forget_bias}
        super().__init__(dim, expansion, gate_layers, MinLSTM, scan, **settings)


class _TorchRNNMixer(Mixer):
    """torch's own recurrent layer (cuDNN's on a GPU), which starts from zeros, then a projection."""

    def __init__(self, dim: int, expansion: float, rnn: type[nn.Module], states: int):
        super().__init__()
        self.dim = dim
        self.rnn = rnn(dim, units(dim, expansion), batch_first=True)
        self.out = nn.Linear(self.rnn.hidden_size, dim)
        self.states = states

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        if state is None:
            return self.out(self.rnn(x)[0]), None
        # torch's layers take (L, B, H), contiguous.
        hx = tuple(h.unsqueeze(0).contiguous() for h in (state if self.states > 1 else (state,)))
        h, h_n = self.rnn(x, hx if self.states > 1 else hx[0])
        return self.out(h), tuple(s[0] for s in h_n) if self.states > 1 else h_n[0]

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.forward(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def initial_state(self, batch_size: int) -> State:
        """Returns h = 0, (B, expansion * dim), or for LSTM the pair (h, c)."""
        h = like(self.out.weight, batch_size, self.rnn.hidden_size)
        return (h, h) if self.states > 1 else h


class GRUMixer(_TorchRNNMixer):
    """torch.nn.GRU of `expansion * dim` units and a projection to dim."""

    def __init__(self, dim: int, expansion: float = 1):
        super().__init__(dim, expansion, nn.GRU, 1)


class LSTMMixer(_TorchRNNMixer):
    """torch.nn.LSTM of `expansion * dim` units and a projection to dim."""

    def __init__(self, dim: int, expansion: float = 1):
        super().__init__(dim, expansion, nn.LSTM, 2)
