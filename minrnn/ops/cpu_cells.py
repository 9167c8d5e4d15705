"""The cells on a CPU: coefficients and gradients as functions that numba compiles into the scan's loops."""

from collections import namedtuple

import numpy as np

from .cells import CELLS
from .compiled import constant, exp_minus_abs, exp_minus_abs_finite, inline_overload, jit

# `coefficients` returns (a, b). `gradients` takes the gradient s that reaches a state and the `previous` state;
# it returns the gradient passed on to `previous` (a s) and those of gate, input_gate (a dummy if there is none) and
# candidate. For the linear scan, a and b replace gate and candidate; for minLSTM, gate is the forget gate. The
# formulas are those of cells.py.

# One type per cell: numba specialises by type, and its cache on disk finds a type by its name in this module.
CELL_OF = {namedtuple(f"_{name}", (), module=__name__): cell for name, cell in CELLS.items()}
globals().update({tag.__name__: tag for tag in CELL_OF})
TAGS = {cell: tag() for tag, cell in CELL_OF.items()}


@jit
def _sigmoids(x, e, reciprocal):
    """Returns sigmoid(x), sigmoid(-x) from e = exp(-|x|) and 1 / (1 + e), both to full relative precision."""
    small = e * reciprocal
    return (reciprocal, small) if x >= constant(x, 0.0) else (small, reciprocal)


@jit
def _g(x, e, reciprocal):
    return e * reciprocal if x < constant(x, 0.0) else x + constant(x, 0.5)


@jit
def _g_slope(x, g):
    """Returns dg/dx, given g(x)."""
    one = constant(x, 1.0)
    return one if x >= constant(x, 0.0) else g * (one - g)


@jit
def _times_difference(s, x, y):
    """Returns s x - s y: factored for precision where x is near y, unfactored if s is not finite."""
    return s * (x - y) if abs(s) < constant(s, np.inf) else s * x - s * y


@jit
def _mingru_parts(gate, candidate):
    """Returns 1 - z, z, g(candidate), with one division instead of two."""
    one = constant(gate, 1.0)
    e_gate, e_candidate = exp_minus_abs(gate), exp_minus_abs_finite(candidate)
    gate_sum, candidate_sum = one + e_gate, one + e_candidate
    reciprocal = one / (gate_sum * candidate_sum)
    take, a = _sigmoids(gate, e_gate, reciprocal * candidate_sum)
    return a, take, _g(candidate, e_candidate, reciprocal * gate_sum)


@jit
def _mingru_identity_parts(gate, candidate):
    one = constant(gate, 1.0)
    e = exp_minus_abs(gate)
    take, a = _sigmoids(gate, e, one / (one + e))
    return a, take, candidate


@jit
def _g_of(x):
    one = constant(x, 1.0)
    e = exp_minus_abs_finite(x)
    return _g(x, e, one / (one + e))


@jit
def _normalized_gates(forget_gate, input_gate):
    """Returns f / (f + i), i / (f + i), 1 - f, 1 - i, where f and i are the gates' sigmoids.

    sigmoid(x) = exp(min(x, 0)) / (1 + exp(-|x|)). Only the ratio of the two exp(min(x, 0)) is computed, so that two
    gates far below zero do not give 0 / 0.
    """
    zero, one = constant(forget_gate, 0.0), constant(forget_gate, 1.0)
    e_forget, e_input = exp_minus_abs(forget_gate), exp_minus_abs(input_gate)
    ratio = min(forget_gate, zero) - min(input_gate, zero)
    e_ratio = exp_minus_abs(ratio)
    forget_sum, input_sum = one + e_forget, one + e_input
    forget = (e_ratio if ratio < zero else one) * input_sum
    take = (one if ratio < zero else e_ratio) * forget_sum
    r = one / (forget + take)
    _, not_forget = _sigmoids(forget_gate, e_forget, one / forget_sum)
    _, not_input = _sigmoids(input_gate, e_input, one / input_sum)
    return forget * r, take * r, not_forget, not_input


@jit
def _unnormalized_gates(forget_gate, input_gate):
    """Returns f, i, 1 - f, 1 - i, where f and i are the gates' sigmoids."""
    one = constant(forget_gate, 1.0)
    e_forget, e_input = exp_minus_abs(forget_gate), exp_minus_abs(input_gate)
    a, not_forget = _sigmoids(forget_gate, e_forget, one / (one + e_forget))
    take, not_input = _sigmoids(input_gate, e_input, one / (one + e_input))
    return a, take, not_forget, not_input


@jit
def _signed(a, take):
    """Returns 2 a - 1, 1 - |2 a - 1| and the sign of 2 a - 1, for a + take = 1.

    The gates must not share a division with the candidate as in `_mingru_parts`: rounding would move a from 1 to
    1 - 6e-8, and a state that only flips its sign would decay.
    """
    zero, one = constant(a, 0.0), constant(a, 1.0)
    keep = a - take
    return keep, constant(a, 2.0) * min(a, take), one if keep > zero else (-one if keep < zero else zero)


def coefficients(tag, gate, input_gate, candidate):
    raise NotImplementedError("compiled only")


def gradients(tag, gate, input_gate, candidate, s, previous):
    raise NotImplementedError("compiled only")


@inline_overload(coefficients)
def _(tag, gate, input_gate, candidate):
    cell = CELL_OF[tag.instance_class]
    has_g, signed, normalize = cell.activation == "g", cell.signed, cell.normalize
    if cell.kind == "linear":
        return lambda tag, gate, input_gate, candidate: (gate, candidate)
    if cell.kind == "mingru":
        parts = _mingru_parts if has_g and not signed else _mingru_identity_parts

        def mingru(tag, gate, input_gate, candidate):
            a, take, c = parts(gate, candidate)
            if signed:
                a, take, _ = _signed(a, take)
                c = _g_of(candidate) if has_g else c
            return a, take * c

        return mingru
    gates = _normalized_gates if normalize else _unnormalized_gates

    def minlstm(tag, gate, input_gate, candidate):
        a, take, not_forget, _ = gates(gate, input_gate)
        if signed:
            if normalize:
                a, take, _ = _signed(a, take)
            else:
                a = a - not_forget
        return a, take * (_g_of(candidate) if has_g else candidate)

    return minlstm


@inline_overload(gradients)
def _(tag, gate, input_gate, candidate, s, previous):
    cell = CELL_OF[tag.instance_class]
    has_g, signed, normalize = cell.activation == "g", cell.signed, cell.normalize
    if cell.kind == "linear":
        return lambda tag, gate, input_gate, candidate, s, previous: (gate * s, s * previous, s, s)
    if cell.kind == "mingru":
        parts = _mingru_parts if has_g and not signed else _mingru_identity_parts

        def mingru(tag, gate, input_gate, candidate, s, previous):
            a, take, c = parts(gate, candidate)
            if signed:
                c = _g_of(candidate) if has_g else c
                keep, left, sign = _signed(a, take)
                d_c = s * left
                d_gate = constant(a, 2.0) * a * _times_difference(s * take, sign * c, previous)
                return keep * s, d_gate, d_gate, d_c * _g_slope(candidate, c) if has_g else d_c
            d_c = s * take
            d_gate = a * _times_difference(d_c, c, previous)
            return a * s, d_gate, d_gate, d_c * _g_slope(candidate, c) if has_g else d_c

        return mingru
    gates = _normalized_gates if normalize else _unnormalized_gates

    def minlstm(tag, gate, input_gate, candidate, s, previous):
        a, take, not_forget, not_input = gates(gate, input_gate)
        c = _g_of(candidate) if has_g else candidate
        d_c = s * take
        if signed and normalize:
            keep, left, sign = _signed(a, take)
            d_balance = constant(a, 2.0) * a * _times_difference(d_c, previous, sign * c)
            d_c = s * left
            d_gate, d_input_gate = d_balance * not_forget, -d_balance * not_input
            a = keep
        elif signed:
            d_gate, d_input_gate = constant(a, 2.0) * s * previous * a * not_forget, d_c * c * not_input
            a = a - not_forget
        elif normalize:
            d_balance = a * _times_difference(d_c, previous, c)
            d_gate, d_input_gate = d_balance * not_forget, -d_balance * not_input
        else:
            d_gate, d_input_gate = s * previous * a * not_forget, d_c * c * not_input
        return a * s, d_gate, d_input_gate, d_c * _g_slope(candidate, c) if has_g else d_c

    return minlstm
