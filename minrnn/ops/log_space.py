"""The paper's log-space scan (appendix B.1; Heinsen's method, arXiv 2311.06281), for comparison only.

It is less precise than the plain loop (the rounding error grows with T, see docs/benchmarks.md) and is not defined for
negative values, for a state of zero or for resets. Use it to compare with published code, not to train.
"""

import torch
from torch import Tensor

from .cells import Cell, log_coefficients


def scan(
    cell: Cell,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Returns states (B, T, D) in the inputs' dtype, in which all is computed, as published.

    Raises ValueError if a logarithm is undefined. h0=None means no initial term.
    """
    if cu_seqlens is not None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise ValueError("backend: 'log' takes packed sequences one by one, which no graph holds; use another")
        lengths = cu_seqlens.diff().tolist()
        each = zip(*(x.split(lengths, 1) for x in inputs), strict=True)
        states = [None] * len(lengths) if h0 is None else h0.split(1)
        return torch.cat([scan(cell, xs, h, resets, None, reverse) for xs, h in zip(each, states, strict=True)], 1)
    if cell.signed:
        raise ValueError("signed: not defined in log space (its coefficients are negative too); use another backend")
    if resets is not None:
        raise ValueError("resets: not defined in log space (log 0); use another backend")
    positive = {"h0": h0} if h0 is not None else {}
    if cell.kind == "linear":
        positive |= {"a": inputs[0], "b": inputs[1]}
    elif cell.activation == "identity":
        positive |= {"candidate": inputs[-1]}
    for name, value in positive.items():
        if not bool((value > 0).all()):
            raise ValueError(
                f"{name}: the log-space scan is defined for positive values only, got a minimum of "
                f"{value.min().item():g}; use another backend" + (", or h0=None" if name == "h0" else "")
            )
    log_a, log_b = log_coefficients(cell, inputs)
    if reverse:
        log_a, log_b = log_a.flip(1), log_b.flip(1)
    a_star = log_a.cumsum(1)
    terms = log_b - a_star
    if h0 is not None:
        terms = torch.cat([h0.log()[:, None], terms], 1)
    h = torch.exp(a_star + terms.logcumsumexp(1)[:, int(h0 is not None) :])
    return h.flip(1) if reverse else h
