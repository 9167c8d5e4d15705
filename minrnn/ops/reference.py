"""The plain time loop: the oracle of every test, and the slowest backend by far."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Cell, coefficients


def scan(
    cell: Cell,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Returns the recurrence's states (B, T, D) in the inputs' dtype. bf16 and fp16 accumulate in float32.

    Any device, any float dtype, differentiable any number of times. `reverse` runs from the last step to
    the first. For `cu_seqlens` see `minrnn.ops.scan.scan`.
    """
    dtype = inputs[0].dtype
    a, b, h = start(cell, inputs, h0, cu_seqlens, reverse)
    # unbind, because the gradient of a[:, t] is a tensor as large as a
    streams = (a, b) if resets is None else (a, b, resets[..., None])
    steps = list(zip(*(x.unbind(1) for x in streams), strict=True))
    states = []
    for a_t, b_t, *reset in reversed(steps) if reverse else steps:
        if reset:
            h = torch.where(reset[0], 0.0, h)
        h = a_t * h + b_t
        states.append(h)
    if not states:
        return (b + h[:, None]).to(dtype)  # (B, 0, D), and part of the graph
    if reverse:
        states.reverse()
    return torch.stack(states, 1).to(dtype)


def start(
    cell: Cell,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    log_sigmoid: Callable[[Tensor], Tensor] = F.logsigmoid,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a, b (B, T, D) and the state before the first step (B, D), in the dtype of accumulation.

    If sequences are packed end to end, the first step of each has a = 0 and b = a h0 + b, so that it starts anew.
    """
    compute = torch.promote_types(inputs[0].dtype, torch.float32)
    a, b = coefficients(cell, tuple(x.to(compute) for x in inputs), log_sigmoid)
    zeros = b.new_zeros(b.shape[0], b.shape[2])
    if cu_seqlens is None:
        return a, b, zeros if h0 is None else h0.to(compute)
    first = (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]).to(b.device)
    if h0 is not None:
        b = b.index_copy(1, first, a[:, first] * h0.to(compute) + b[:, first])
    return a.index_fill(1, first, 0.0), b, zeros
