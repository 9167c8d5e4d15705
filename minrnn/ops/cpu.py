"""The scans on a CPU: gates fused with the recurrence, compiled with numba, forward and backward.

Memory bandwidth limits the speed: minGRU in float32 moves 12 bytes per element forward (read gate and candidate,
write h) and 24 backward (read gate, candidate, h and its gradient, write two gradients); nothing else is saved or
moved. Next come two exponentials and one division per element in either direction, so the exponential is a
polynomial that the compiler vectorises.

A kernel loops over time outside and over a row of channels inside, in blocks of 16 or 32. The last block of a row
overlaps the one before it, which avoids a scalar remainder: it computes a few channels twice, from its own carried
state, and writes the same values again. Rows shorter than a block are copied into one.

A kernel is specialised by the types of two tags, the cell and the element type. There are as many threads as torch
uses, each with a fixed share of the batch or the channels, so that results do not depend on timing.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .cells import LINEAR, Cell
from .compiled import (
    ELEMENT_TAGS,
    cached_jit,
    copy_element,
    in_threads,
    inline_overload,
    jit,
    load,
    load_bool,
    row_at,
    store,
    zero_of,
)
from .cpu_cells import CELL_OF, TAGS, coefficients, gradients

# Channels per block. The linear scan's loop over a block is so short that the compiler unrolls one of 16 before
# vectorising it, and then vectorises badly; with 32 it does not. The gated cells are slower with more than 16.
LANES, LINEAR_LANES = 16, 32
# Bytes of a block of the widest element, and the number of such slots for rows shorter than a block.
SLOT = LINEAR_LANES * 8
SCRATCH_SLOTS = 8
# Below this many elements per thread another thread costs more than it saves.
MIN_ELEMENTS_PER_THREAD = 1 << 18
# The least number of channels per thread: threads that work side by side on the same rows disturb each other's
# prefetching (at D = 64 two threads took three times as long as one).
MIN_PIECE = 1 << 12
# Elements of one time step that are processed together if time is the outermost dimension: their carried states stay
# in the L1 cache.
CARRY_ELEMENTS = 1 << 12
# Regions of memory, as `compiled.load` has them: inputs, the carried state, each tensor written.
INPUT, CARRY, OUT, OUT_2, OUT_3 = range(5)


def _lanes(tag):
    return LINEAR_LANES if CELL_OF[type(tag)] == LINEAR else LANES


@inline_overload(_lanes)
def _(tag):
    lanes = LINEAR_LANES if CELL_OF[tag.instance_class] == LINEAR else LANES
    return lambda tag: lanes


# --- kernels -----------------------------------------------------------------------------------------------
# A stream is (address of its first element, stride over the batch, stride over time), in bytes; its rows are
# contiguous. `carry` holds the carried states of the rows processed together, each padded to whole blocks.


@jit
def _block_start(block, lanes, width):
    return max(0, min(block * lanes, width - lanes))


@jit
def _begin_carry(element, h0, b, lanes, width, carry, carry_start, blocks):
    zero = zero_of(element)
    for j in range(blocks):
        start = _block_start(j, lanes, width)
        for k in range(min(lanes, width)):
            state = load(INPUT, element, row_at(h0, b, 0), start + k) if h0[0] != 0 else zero
            store(CARRY, zero, carry, carry_start + j * lanes + k, state)


@jit
def _clear_carry(element, carry, carry_start, count):
    zero = zero_of(element)
    for k in range(count):
        store(CARRY, zero, carry, carry_start + k, zero)


@jit
def _reset_at(resets, b, t):
    return resets[0] != 0 and load_bool(row_at(resets, b, t))


@jit
def _copy_row(element, source, target, width):
    for i in range(width):
        copy_element(element, source, i, target, i)


@jit
def _forward_block(tag, element, gate, input_gate, candidate, out, start, carry, carry_start):
    zero = zero_of(element)
    for k in range(_lanes(tag)):
        i = start + k
        a, b = coefficients(
            tag, load(INPUT, element, gate, i), load(INPUT, element, input_gate, i), load(INPUT, element, candidate, i)
        )
        h = a * load(CARRY, zero, carry, carry_start + k) + b
        store(CARRY, zero, carry, carry_start + k, h)
        store(OUT, element, out, i, h)


@cached_jit
def _forward(
    tag, element, gate, input_gate, candidate, h0, resets, out,
    bounds, b_start, b_stop, together, width, carry, scratch,
):  # fmt: skip
    lanes = _lanes(tag)
    blocks = (width + lanes - 1) // lanes
    padded = blocks * lanes
    for b_first in range(b_start, b_stop, together):
        b_last = min(b_first + together, b_stop)
        for b in range(b_first, b_last):
            _begin_carry(element, h0, b, lanes, width, carry, (b - b_first) * padded, blocks)
        for t in range(bounds[b_first, 0], bounds[b_first, 1]):
            for b in range(b_first, b_last):
                carry_start = (b - b_first) * padded
                if _reset_at(resets, b, t):
                    _clear_carry(element, carry, carry_start, padded)
                r_gate, r_input_gate, r_candidate = (
                    row_at(gate, b, t),
                    row_at(input_gate, b, t),
                    row_at(candidate, b, t),
                )
                r_out = row_at(out, b, t)
                if width < lanes:
                    s_gate, s_input_gate, s_candidate = scratch, scratch + SLOT, scratch + 2 * SLOT
                    s_out = scratch + 3 * SLOT
                    _copy_row(element, r_gate, s_gate, width)
                    _copy_row(element, r_input_gate, s_input_gate, width)
                    _copy_row(element, r_candidate, s_candidate, width)
                    _forward_block(tag, element, s_gate, s_input_gate, s_candidate, s_out, 0, carry, carry_start)
                    _copy_row(element, s_out, r_out, width)
                else:
                    for j in range(blocks):
                        start = _block_start(j, lanes, width)
                        _forward_block(
                            tag, element, r_gate, r_input_gate, r_candidate, r_out,
                            start, carry, carry_start + j * lanes,
                        )  # fmt: skip


@jit
def _backward_block(
    tag, element, gate, input_gate, candidate, previous, grad, grad_gate, grad_input_gate, grad_candidate,
    start, carry, carry_start,
):  # fmt: skip
    zero = zero_of(element)
    for k in range(_lanes(tag)):
        i = start + k
        onward, d_gate, d_input_gate, d_candidate = gradients(
            tag,
            load(INPUT, element, gate, i),
            load(INPUT, element, input_gate, i),
            load(INPUT, element, candidate, i),
            load(INPUT, element, grad, i) + load(CARRY, zero, carry, carry_start + k),
            load(INPUT, element, previous, i),
        )
        store(CARRY, zero, carry, carry_start + k, onward)
        store(OUT, element, grad_gate, i, d_gate)
        _store_input_gate(tag, element, grad_input_gate, i, d_input_gate)
        store(OUT_3, element, grad_candidate, i, d_candidate)


def _store_input_gate(tag, element, address, index, value):
    raise NotImplementedError("compiled only")


@inline_overload(_store_input_gate)
def _(tag, element, address, index, value):
    if "input_gate" in CELL_OF[tag.instance_class].inputs:
        return lambda tag, element, address, index, value: store(OUT_2, element, address, index, value)
    return lambda tag, element, address, index, value: None


@cached_jit
def _backward(
    tag, element, gate, input_gate, candidate, h0, resets, h, grad,
    grad_gate, grad_input_gate, grad_candidate, grad_h0,
    bounds, b_start, b_stop, together, width, carry, scratch,
):  # fmt: skip
    lanes = _lanes(tag)
    blocks = (width + lanes - 1) // lanes
    padded = blocks * lanes
    zeros = scratch + SCRATCH_SLOTS * SLOT
    for b_first in range(b_start, b_stop, together):
        b_last = min(b_first + together, b_stop)
        _clear_carry(element, carry, 0, (b_last - b_first) * padded)
        first_t = bounds[b_first, 0]
        for t in range(bounds[b_first, 1] - 1, first_t - 1, -1):
            for b in range(b_last - 1, b_first - 1, -1):
                carry_start = (b - b_first) * padded
                reset = _reset_at(resets, b, t)
                if reset or (t == first_t and h0[0] == 0):
                    previous = zeros
                elif t == first_t:
                    previous = row_at(h0, b, 0)
                else:
                    previous = row_at(h, b, t - 1)
                r_gate, r_input_gate, r_candidate = (
                    row_at(gate, b, t),
                    row_at(input_gate, b, t),
                    row_at(candidate, b, t),
                )
                r_grad, r_grad_gate = row_at(grad, b, t), row_at(grad_gate, b, t)
                r_grad_input_gate, r_grad_candidate = row_at(grad_input_gate, b, t), row_at(grad_candidate, b, t)
                if width < lanes:
                    s_gate, s_input_gate, s_candidate = scratch, scratch + SLOT, scratch + 2 * SLOT
                    s_grad, s_previous, s_grad_gate = scratch + 3 * SLOT, scratch + 4 * SLOT, scratch + 5 * SLOT
                    s_grad_input_gate, s_grad_candidate = scratch + 6 * SLOT, scratch + 7 * SLOT
                    _copy_row(element, r_gate, s_gate, width)
                    _copy_row(element, r_input_gate, s_input_gate, width)
                    _copy_row(element, r_candidate, s_candidate, width)
                    _copy_row(element, r_grad, s_grad, width)
                    _copy_row(element, previous, s_previous, width)
                    _backward_block(
                        tag, element, s_gate, s_input_gate, s_candidate, s_previous, s_grad,
                        s_grad_gate, s_grad_input_gate, s_grad_candidate, 0, carry, carry_start,
                    )  # fmt: skip
                    _copy_row(element, s_grad_gate, r_grad_gate, width)
                    if r_grad_input_gate != 0:
                        _copy_row(element, s_grad_input_gate, r_grad_input_gate, width)
                    _copy_row(element, s_grad_candidate, r_grad_candidate, width)
                else:
                    for j in range(blocks - 1, -1, -1):
                        _backward_block(
                            tag, element, r_gate, r_input_gate, r_candidate, previous, r_grad,
                            r_grad_gate, r_grad_input_gate, r_grad_candidate,
                            _block_start(j, lanes, width), carry, carry_start + j * lanes,
                        )  # fmt: skip
                if reset:
                    _clear_carry(element, carry, carry_start, padded)
        if grad_h0[0] != 0:
            for b in range(b_first, b_last):
                _end_carry(element, grad_h0, b, lanes, width, carry, (b - b_first) * padded, blocks)


@jit
def _end_carry(element, grad_h0, b, lanes, width, carry, carry_start, blocks):
    for j in range(blocks):
        start = _block_start(j, lanes, width)
        for k in range(min(lanes, width)):
            state = load(CARRY, zero_of(element), carry, carry_start + j * lanes + k)
            store(OUT, element, row_at(grad_h0, b, 0), start + k, state)


# --- launch ------------------------------------------------------------------------------------------------


def forward(cell: Cell, inputs, h0, resets, cu_seqlens, reverse, out) -> None:
    """Fills `out` (B, T, D) with the states. Tensors share a dtype, with contiguous channels and any other strides."""
    _launch(_forward, cell, (*_three(inputs, inputs[-1]), h0, resets, out), cu_seqlens, reverse)


def backward(cell: Cell, inputs, h0, resets, cu_seqlens, reverse, h, grad, grads, grad_h0) -> None:
    """Fills `grads`, one for each input, and `grad_h0` (B, D) if there is an h0."""
    tensors = (*_three(inputs, inputs[-1]), h0, resets, h, grad, *_three(grads, None), grad_h0)
    _launch(_backward, cell, tensors, cu_seqlens, reverse)


def _three(tensors, input_gate):
    """Returns gate, input_gate and candidate; `input_gate` replaces that of a cell without one."""
    return tensors if len(tensors) == 3 else (tensors[0], input_gate, tensors[1])


def _launch(kernel, cell, tensors, cu_seqlens: Tensor | None, reverse: bool) -> None:
    like = tensors[0]
    B, T, D = like.shape
    compute = np.float64 if like.dtype == torch.float64 else np.float32
    time_outermost = cu_seqlens is None and like.stride(1) > like.stride(0)
    if cu_seqlens is not None:
        # The first step of each sequence and the one after its last; reversal is by negative strides.
        edges = cu_seqlens.numpy()
        bounds = np.stack([edges[:-1], edges[1:]], 1) if not reverse else T - np.stack([edges[1:], edges[:-1]], 1)
        shares = _shares(edges, D)
    else:
        bounds = np.tile(np.array([[0, T]]), (B, 1))
        shares = _shares(np.arange(B + 1) * T, D)

    tag = TAGS[cell]
    lanes = _lanes(tag)

    def run(b_start, b_stop, d_start, d_stop):
        width = d_stop - d_start
        padded = -(-width // lanes) * lanes
        together = max(1, min(b_stop - b_start, CARRY_ELEMENTS // padded)) if time_outermost else 1
        carry = np.empty(together * padded, compute)
        scratch = np.zeros(SCRATCH_SLOTS * SLOT + padded * 8, np.uint8)
        streams = (_stream(x, d_start, reverse) for x in tensors)
        kernel(
            tag, ELEMENT_TAGS[like.dtype], *streams,
            bounds, b_start, b_stop, together, width, carry.ctypes.data, scratch.ctypes.data,
        )  # fmt: skip

    in_threads(run, shares)


def _shares(edges: np.ndarray, D: int) -> list[tuple[int, int, int, int]]:
    """Returns (b_start, b_stop, d_start, d_stop) per thread; channels are divided if the batch is too small.

    `edges` (B + 1,) holds the number of steps before each sequence, and the total.
    """
    B, steps = len(edges) - 1, int(edges[-1])
    threads = max(1, min(torch.get_num_threads(), steps * D // MIN_ELEMENTS_PER_THREAD))
    pieces = 1 if B >= 4 * threads else max(1, min(threads // math.gcd(B, threads), D // MIN_PIECE))
    rows = min(B, threads // pieces)
    blocks = -(-D // LINEAR_LANES)
    b_edges = [int(b) for b in np.searchsorted(edges, [i * steps / rows for i in range(rows + 1)])]
    d_edges = [min(D, i * blocks // pieces * LINEAR_LANES) for i in range(pieces + 1)]
    return [(*b, *d) for b in pairwise(b_edges) if b[0] < b[1] for d in pairwise(d_edges)]


def _stream(x: Tensor | None, d: int, reverse: bool) -> tuple[int, int, int]:
    """Returns the stream of a (B, T, D) or (B, D) tensor from channel `d` on, or of (B, T) resets.

    A batch of 1 has stride 0, because packed sequences share its row.
    """
    if x is None:
        return 0, 0, 0
    size = x.element_size()
    if x.dtype == torch.bool:
        address, t_stride = x.data_ptr(), x.stride(1) * size
    else:
        address, t_stride = x.data_ptr() + d * size, x.stride(1) * size if x.dim() == 3 else 0
    b_stride = 0 if x.shape[0] == 1 else x.stride(0) * size
    if reverse and t_stride:
        return address + (x.shape[1] - 1) * t_stride, b_stride, -t_stride
    return address, b_stride, t_stride
