"""Aaren as a mixer: attention with a learned query, which makes it a recurrence."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear_scan
from .base import Mixer, State, no_weight_decay


class Aaren(Mixer):
    """Attention as a recurrent network: the softmax average of all values so far, under one learned query per head.

    (Feng et al., "Attention as an RNN", arXiv 2405.13956, sections 3.2 and 3.3.) For every head, with s_i =
    query . k_i / sqrt(D / heads): o_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i), then a projection of all
    heads. Both sums are linear recurrences, so a step costs the same at any t. The paper learns a token that the
    usual projection turns into the query; here the query itself is learned, which gives the same functions. As in
    `Attention`, the Linears have no biases, and the model adds the positions.

    Args:
        dim: D, a multiple of heads.
        heads: their number, each D / heads wide; None means heads of 64 channels, but at least 4, as in `Attention`.

    Raises:
        ValueError: heads does not divide dim.

    A state is (numerator (B, heads, D / heads), denominator (B, heads, 1), maximum (B, heads, 1)): both sums,
    divided by exp(maximum), and the largest score so far; float32 (float64 for float64), under autocast too.
    """

    def __init__(self, dim: int, heads: int | None = None):
        super().__init__()
        heads = max(4, dim // 64) if heads is None else heads
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        self.dim = dim
        self.heads = heads
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        # N(0, 1), so that scores are as large as the keys' channels, for any width of the heads (0.6 with torch's
        # Linears after a norm). A small query would give plain means, and an equally small gradient to the keys.
        self.query = nn.Parameter(torch.randn(heads, dim // heads))
        self.out = nn.Linear(dim, dim, bias=False)
        no_weight_decay(self.query)  # decay would draw each output towards the plain mean

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        score, value = self._read(x)
        numerator, denominator, before = self.initial_state(x.shape[0]) if state is None else state
        # No output depends on the maximum: it scales numerator and denominator alike, here and in later chunks. So it
        # is detached, which is exact and spares cummax's backward. The maximum of a given state does matter (it is the
        # scale of the state's sums), so `before` stays attached in the first decay.
        maximum = torch.cat([before[:, None], score], 1).detach().cummax(1).values[:, 1:]
        decay = (torch.cat([before[:, None], maximum[:, :-1]], 1) - maximum).exp()
        terms = (score - maximum).exp() * F.pad(value, (0, 1), value=1.0)  # the last column is the denominator
        sums = linear_scan(
            decay.expand_as(terms).flatten(2), terms.flatten(2), torch.cat([numerator, denominator], -1).flatten(1)
        )
        numerator, denominator = sums.unflatten(2, terms.shape[2:]).split([value.shape[-1], 1], -1)
        y = self._write(numerator / denominator, x)
        return y, None if state is None else (numerator[:, -1], denominator[:, -1], maximum[:, -1])

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        score, value = self._read(x_t)
        numerator, denominator, before = state
        maximum = torch.maximum(before, score).detach()
        decay, weight = (before - maximum).exp(), (score - maximum).exp()
        numerator, denominator = decay * numerator + weight * value, decay * denominator + weight
        return self._write(numerator / denominator, x_t), (numerator, denominator, maximum)

    def initial_state(self, batch_size: int) -> State:
        """Zero sums and a maximum of -inf, that of no scores: the first score is finite, so the first decay is 0."""
        heads, width = self.query.shape
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        sums = torch.zeros(batch_size, heads, width + 1, device=self.query.device, dtype=dtype)
        return *sums.split([width, 1], -1), sums.new_full((batch_size, heads, 1), -math.inf)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores (..., heads, 1) and values (..., heads, D / heads), in float32 or wider."""
        wide = self.kv(x).to(torch.promote_types(x.dtype, torch.float32))
        key, value = wide.unflatten(-1, (2, *self.query.shape)).unbind(-3)
        # A product and a sum, because autocast would do a matmul in 16 bits.
        return (key * self.query).sum(-1, keepdim=True) / math.sqrt(key.shape[-1]), value

    def _write(self, heads: Tensor, x: Tensor) -> Tensor:
        return self.out(heads.flatten(-2).to(x.dtype))
