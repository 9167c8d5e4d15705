"""Causal self-attention as a mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Mixer, State, like


class Attention(Mixer):
    """Multi-head causal self-attention with torch's fused kernel, as in nanoGPT's blocks.

    (https://github.com/karpathy/nanoGPT, model.py, CausalSelfAttention.) It has no positions: the model adds them.
    The state is all keys and values so far: unlike a recurrent mixer's it grows, and so does the cost of a step.

    Args:
        dim: D, a multiple of heads.
        heads: their number, each D / heads wide; None means heads of 64 channels, but at least 4, as in nanoGPT.
        dropout: on the attention weights, in training.
        bias: whether both Linears have one.
    """

    def __init__(self, dim: int, heads: int | None = None, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        heads = max(4, dim // 64) if heads is None else heads
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        self.dim = dim
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """As `Mixer.forward`; the state is the pair of keys and values, (B, heads, steps so far, D / heads) each."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask, before = None, 0 if state is None else state[0].shape[2]
        if state is not None and before:
            k, v = (torch.cat([past.to(now.dtype), now], 2) for past, now in zip(state, (k, v), strict=True))
            if q.shape[2] > 1:  # a single query sees all keys
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(before)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=not before)
        return self.out(y.transpose(1, 2).flatten(2)), None if state is None else (k, v)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.forward(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def initial_state(self, batch_size: int) -> State:
        empty = like(self.out.weight, batch_size, self.heads, 0, self.dim // self.heads)
        return empty, empty
