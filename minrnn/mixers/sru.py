"""SRU as a mixer: gates with one weight per unit for the previous state, and a highway around the recurrence."""

import math

import torch
from torch import Tensor, nn

from .base import Mixer, State, like
from .recurrent import units

ALPHA = math.sqrt(3)  # keeps the variance along the highway; the paper's value for a reset gate without a bias


class SRU(Mixer):
    """A simple recurrent unit with `expansion * dim` units, then a projection to dim.

    (Lei et al., arXiv 1709.02755 version 5, EMNLP 2018, equations 1 to 4, with section 3.2's constant alpha = sqrt(3).)

        f_t = sigmoid(W_f x_t + v_f * c_{t-1} + b_f),   c_t = f_t * c_{t-1} + (1 - f_t) * W x_t,
        r_t = sigmoid(W_r x_t + v_r * c_{t-1} + b_r),   h_t = r_t * c_t + (1 - r_t) * alpha x_t

    SRU is an ancestor of minGRU and minLSTM: without v its recurrence would be minGRU's. With v the state enters its
    own gate, so the recurrence is not linear and runs as a plain loop over time. The state starts from zeros. If
    expansion is not 1, a fourth matrix times x replaces alpha x. This and the initial values are those of the authors'
    package (sru 2.6.0, sru/modules.py).

    Raises:
        ValueError: expansion * dim is not a whole number.

    A state is c, (B, expansion * dim).
    """

    def __init__(self, dim: int, expansion: float = 1):
        super().__init__()
        self.dim = dim
        H = self.hidden_size = units(dim, expansion)
        self.in_proj = nn.Linear(dim, (3 if H == dim else 4) * H, bias=False)  # W, W_f, W_r, and the highway's matrix
        self.v = nn.Parameter(torch.empty(2, H).uniform_(-math.sqrt(1.5), math.sqrt(1.5)))  # v_f, v_r
        self.bias = nn.Parameter(torch.zeros(2, H))  # b_f, b_r
        self.out = nn.Linear(H, dim)
        with torch.no_grad():
            self.in_proj.weight.uniform_(-math.sqrt(3 / dim), math.sqrt(3 / dim))
            self.in_proj.weight[H : 3 * H] *= math.sqrt(0.5)
            self.in_proj.weight[3 * H :] *= ALPHA

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        c = self.initial_state(x.shape[0]) if state is None else state
        candidate, f, r, *carried = self.in_proj(x).to(c.dtype).split(self.hidden_size, -1)
        states = [c]
        for u_t, f_t in zip(candidate.unbind(1), (f + self.bias[0]).unbind(1), strict=True):
            states.append(torch.lerp(u_t, states[-1], torch.sigmoid(f_t + self.v[0] * states[-1])))
        c = torch.stack(states, 1)
        r = torch.sigmoid(r + self.bias[1] + self.v[1] * c[:, :-1])
        h = torch.lerp(carried[0] if carried else ALPHA * x.to(c.dtype), c[:, 1:], r)
        return self.out(h), None if state is None else states[-1]

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.forward(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def initial_state(self, batch_size: int) -> State:
        return like(self.v, batch_size, self.hidden_size)
