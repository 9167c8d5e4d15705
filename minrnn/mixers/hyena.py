"""The long convolution of Hyena (Poli et al., arXiv 2302.10866), as an inner layer."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, State, causal_convolution, no_weight_decay

# The window falls to TARGET at FAST * max_len in the fastest channel and at SLOW * max_len in the slowest.
FAST, SLOW, TARGET = 0.3, 1.5, 1e-2
NO_STATE = "Hyena has no recurrent form: its filter has no end, so every step reads all inputs before it"


class Hyena(Mixer):
    """y_t = sum_s k_s x_{t-s} + D x_t, where the filter k is an MLP of the position s times an exponential window.

    Sections 3.3 and 3.4 of the paper; the settings are those of its synthetic tasks at
    https://github.com/HazyResearch/safari (src/models/sequence/hyena.py and, for width, bands and frequency,
    configs/experiment/synthetics/associative_recall/hyena-131k-30vs.yaml). The gates, the short convolution and
    the projections of the published operator are in the block around this layer (`wrappings.HyenaOperator`).

    The output at t depends on every earlier input, so there is no recurrent form: no state and no `step`.

    Args:
        max_len: the longest sequence. Positions are fractions of it, whatever the length of a call, so it should be
            near the lengths in use: with a far larger one the filter is almost constant over them.
        width: the hidden width of the MLP, which has three hidden layers.
        bands: how many pairs of a sine and a cosine of the position the MLP takes.
        frequency: the initial value of the sine activations' learned frequency.
        shift: the value that the window falls to instead of zero.
    """

    def __init__(
        self,
        dim: int,
        max_len: int = 1024,
        width: int = 64,
        bands: int = 2,
        frequency: float = 10.0,
        shift: float = 0.0,
    ):
        super().__init__()
        if max_len < 1:
            raise ValueError(f"max_len: expected a positive int, got {max_len}")
        if bands < 1:
            raise ValueError(f"bands: expected a positive int, got {bands}")
        self.dim = dim
        self.max_len = max_len
        self.bands = bands
        self.shift = shift
        self.hidden = nn.ModuleList([nn.Linear(1 + 2 * bands, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.frequency = nn.Parameter(torch.full((width,), frequency))  # one for all three layers, as published
        self.out = nn.Linear(width, dim, bias=False)
        self.D = nn.Parameter(torch.randn(dim))
        no_weight_decay(*self.hidden.parameters(), self.frequency, *self.out.parameters())

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, None]:
        """As `Mixer.forward`, for T up to max_len and without a state."""
        if state is not None:
            raise NotImplementedError(NO_STATE)
        T = x.shape[1]
        if T > self.max_len:
            raise ValueError(f"x: expected at most max_len={self.max_len} steps, got {T}")
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, torch.float32))
            y = causal_convolution(u, self.filter(T).to(u.dtype)[None], 1) + self.D * u
        return y.to(x.dtype), None

    def filter(self, T: int) -> Tensor:
        """Returns the first T taps, (T, dim) float64. A shorter filter is the beginning of a longer one.

        A sine of ten times a sine amplifies rounding: in float32 results would be off by 2e-5.
        """
        dtype = torch.float64
        linspace = partial(torch.linspace, device=self.D.device, dtype=dtype)
        t = torch.arange(T, device=self.D.device, dtype=dtype)[:, None]
        angles = 2 * math.pi / self.max_len * t * linspace(1e-4, self.bands - 1, self.bands)
        t = t / max(1, self.max_len - 1)
        k = torch.cat([t, angles.cos(), -angles.sin()], -1)
        for layer in self.hidden:
            k = torch.sin(self.frequency * F.linear(k, layer.weight.to(dtype), layer.bias.to(dtype)))
        k = F.linear(k, self.out.weight.to(dtype))
        rates = -math.log(TARGET) * linspace(1 / SLOW, 1 / FAST, self.dim)
        return k * (torch.exp(-t * rates) + self.shift)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        raise NotImplementedError(NO_STATE)

    def initial_state(self, batch_size: int) -> State:
        raise NotImplementedError(NO_STATE)
