"""The plain time loop: the oracle of every test, and the slowest backend by far."""

import torch
from torch import Tensor

from .cells import Cell, coefficients


def scan(cell: Cell, inputs: tuple[Tensor, ...], h0: Tensor | None, resets: Tensor | None, reverse: bool) -> Tensor:
    """States (B, T, D) of the recurrence, in the inputs' dtype. bf16 and fp16 accumulate in float32.

    Any device, any float dtype, differentiable any number of times. `reverse` runs from the last step to
    the first.
    """
    dtype = inputs[0].dtype
    compute = torch.promote_types(dtype, torch.float32)
    a, b = coefficients(cell, tuple(x.to(compute) for x in inputs))
    B, _, D = b.shape
    h = b.new_zeros(B, D) if h0 is None else h0.to(compute)
    # unbind, not a[:, t]: the gradient of an index is a tensor as large as what was indexed
    streams = (a, b) if resets is None else (a, b, resets[..., None])
    steps = list(zip(*(x.unbind(1) for x in streams), strict=True))
    states = []
    for a_t, b_t, *reset in reversed(steps) if reverse else steps:
        if reset:
            h = torch.where(reset[0], 0.0, h)
        h = a_t * h + b_t
        states.append(h)
    if not states:
        return (b + h[:, None]).to(dtype)  # (B, 0, D), yet part of the graph
    if reverse:
        states.reverse()
    return torch.stack(states, 1).to(dtype)
