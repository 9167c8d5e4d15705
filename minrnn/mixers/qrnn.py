"""QRNN as a mixer: gates from a short convolution, and minGRU's recurrence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mingru_scan
from .base import Mixer, State, like
from .recurrent import units


class QRNN(Mixer):
    """A quasi-recurrent network with fo-pooling and `expansion * dim` units, and a projection to dim.

    (Bradbury et al., arXiv 1611.01576, equations 1 and 4.) With * a causal convolution of `window` taps over time:

        z = tanh(W_z * x),   f = sigmoid(W_f * x),   o = sigmoid(W_o * x),
        c_t = f_t * c_{t-1} + (1 - f_t) * z_t,   h_t = o_t * c_t

    QRNN is an ancestor of minGRU: its gates too depend on inputs alone, so its recurrence is minGRU's scan.
    minGRU has no window, tanh or output gate. The state starts from zeros. As in the authors' code, convolutions have
    biases and are one Linear (github.com/salesforce/pytorch-qrnn 0e8afb5, torchqrnn/qrnn.py); there is no zoneout.

    Args:
        window: how many inputs candidate and gates take, up to the current one; the paper's language models have 2.

    Raises:
        ValueError: window is below 1, or expansion * dim is not a whole number.

    A state is the pair of the last window - 1 inputs, (B, window - 1, dim), and c, (B, expansion * dim).
    """

    def __init__(self, dim: int, expansion: float = 1, window: int = 2):
        super().__init__()
        if window < 1:
            raise ValueError(f"window: expected a positive int, got {window}")
        self.dim = dim
        self.window = window
        hidden_size = units(dim, expansion)
        self.in_proj = nn.Linear(window * dim, 3 * hidden_size)  # z, f, o from the inputs, oldest first
        self.out = nn.Linear(hidden_size, dim)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        T = x.shape[1]
        if state is None:
            seen, c0 = F.pad(x, (0, 0, self.window - 1, 0)), None
        else:
            seen, c0 = torch.cat([state[0], x], 1), state[1]
        windows = torch.cat([seen[:, k : k + T] for k in range(self.window)], -1)
        z, f, o = self.in_proj(windows).chunk(3, -1)
        c = mingru_scan(-f, z.tanh(), c0, activation="identity")  # minGRU's gate is 1 - f
        return self.out(o.sigmoid() * c), None if state is None else (seen[:, T:], c[:, -1])

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.forward(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def initial_state(self, batch_size: int) -> State:
        weight = self.out.weight
        return like(weight, batch_size, self.window - 1, self.dim), like(weight, batch_size, weight.shape[1])
