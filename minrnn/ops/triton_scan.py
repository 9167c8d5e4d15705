"""The scans on NVIDIA GPUs, in Triton.

A program processes one batch row and 32 channels over time (or over one chunk of it), one tile of several steps at a
time. A warp's lane owns a channel and holds the tile's whole time axis in its registers, so `tl.associative_scan`
along time is a plain loop inside each thread: no shared memory, no shuffles, and the same additions and
multiplications in the same order as the reference's. The state that enters a tile is folded into its first row
instead of being multiplied by a product of a's, so infinities and NaN propagate exactly as in the loop. The next
tile is loaded before the current one is computed, which keeps memory busy with one warp per program.

Only the states are saved for the backward pass, which recomputes the gates from the inputs. Its recurrence,
s_t = grad_t + a_{t+1} s_{t+1}, runs against time. Every kernel here counts steps upwards; for the other direction the
host starts it at the last step with negated time strides.

If there are too few channels to fill the GPU and T is long, time is split into chunks in three launches: the first
gives each chunk's product of a's and its end from a zero state; the second scans those over the chunks, which gives
the state that enters each; the third computes the states from these. A product does not show what the loop does with
infinities or NaN, so where its result is not finite, the second launch computes the chunk step by step (slowly).

Bytes moved per element of a minGRU in float32 (half of it in bfloat16 and float16):

               one pass                          split adds            together
    forward    read 2 inputs, write h: 12        read 2 inputs: 8      20
    backward   read 2 inputs, h, grad and        read gate, grad: 8    32
               write 2 gradients: 24

12 and 24 are the least possible without saving or fusing more, so both kernels are memory-bound.

Every offset is 64-bit and B, T, D and all strides are plain run-time numbers, so one binary serves all layouts.
This also keeps the compiler from vectorising the loads: several channels per lane would need more registers, and
32 lanes reading neighbouring channels already fill whole memory transactions.
"""

import inspect

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import Cell

BLOCK_D = 32  # a lane per channel, one warp per program
LAUNCH = {"BLOCK_D": BLOCK_D, "num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
# Steps per tile, powers of two: more steps keep more bytes in flight. With these no kernel spills registers on sm_75,
# 80 and 90, and those of a minGRU leave room for 12 warps or more per SM. The backward pass reads more tensors; resets,
# and in that pass a second gate, leave room for fewer steps.
FORWARD_STEPS = 16
NARROW_FORWARD_STEPS = 8
BACKWARD_STEPS = 8
NARROW_BACKWARD_STEPS = 4
CARRY_CHUNKS = 16
# With fewer warps per SM than MIN_WARPS_PER_SM, time is split so that there are WARPS_PER_SM.
MIN_WARPS_PER_SM = 2
WARPS_PER_SM = 16
MIN_SPLIT_STEPS = 1024
MIN_CHUNK_STEPS = 128


def _generic_jit(kernel):
    """Compiles a kernel without specialising on arguments' values or alignment: one binary serves all layouts.

    This also keeps loads at one element per lane. Wider ones would divide a tile's rows among lanes, and the scan would
    need shuffles.
    """
    parameters = inspect.signature(kernel).parameters.values()
    return triton.jit(do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])(kernel)


@triton.jit
def _decay(x):
    """Returns exp(-|x|), in base 2: one instruction in hardware, and Triton adds none for subnormals."""
    return tl.exp2(tl.abs(x) * -1.4426950408889634)


@triton.jit
def _sigmoids(x):
    """Returns sigmoid(x), sigmoid(-x), both without cancellation or overflow."""
    e = _decay(x)
    r = 1 / (1 + e)
    return tl.where(x >= 0, r, e * r), tl.where(x >= 0, e * r, r)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Returns the activation of x, and its derivative."""
    if ACTIVATION == "g":
        e = _decay(x)
        r = 1 / (1 + e)
        return tl.where(x >= 0, x + 0.5, e * r), tl.where(x >= 0, 1.0, e * r * r)
    else:
        return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _normalized(forget_gate, input_gate):
    """Returns sigmoid(forget_gate), sigmoid(input_gate) over their sum, defined even if both underflow."""
    e_forget = _decay(forget_gate)
    e_input = _decay(input_gate)
    ratio = tl.where(forget_gate > 0, 0.0, forget_gate) - tl.where(input_gate > 0, 0.0, input_gate)
    e_ratio = _decay(ratio)
    forget = tl.where(ratio < 0, e_ratio, 1.0) * (1 + e_input)
    take = tl.where(ratio < 0, 1.0, e_ratio) * (1 + e_forget)
    r = 1 / (forget + take)
    return forget * r, take * r


@triton.jit
def _gates(gate, input_gate, KIND: tl.constexpr, NORMALIZE: tl.constexpr, SIGNED: tl.constexpr):
    """Returns the factors of the state and of the candidate."""
    if KIND == "linear":
        return gate, tl.full(gate.shape, 1.0, gate.dtype)
    elif KIND == "minlstm" and not NORMALIZE:
        a, not_a = _sigmoids(gate)
        take, _ = _sigmoids(input_gate)
        return a - not_a if SIGNED else a, take
    else:
        if KIND == "mingru":
            take, a = _sigmoids(gate)
        else:
            a, take = _normalized(gate, input_gate)
        if SIGNED:
            return a - take, 2 * tl.where(a < take, a, take)
        else:
            return a, take


@triton.jit
def _coefficients(
    gate, input_gate, candidate,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZE: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Returns a, b of h_t = a_t h_{t-1} + b_t, as cells.coefficients does."""
    a, take = _gates(gate, input_gate, KIND, NORMALIZE, SIGNED)
    c, _ = _activate(candidate, ACTIVATION)
    return a, take * c


@triton.jit
def _times_difference(s, x, y):
    """Returns s x - s y: factored for precision where x is near y, unfactored if s is not finite."""
    return tl.where(tl.abs(s) < float("inf"), s * (x - y), s * x - s * y)


@triton.jit
def _input_gradients(
    gate, input_gate, candidate, previous, s,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZE: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Returns the gradients of gate, input_gate (unused if there is none) and candidate, from s, that of h_t."""
    a, take = _gates(gate, input_gate, KIND, NORMALIZE, False)
    c, slope = _activate(candidate, ACTIVATION)
    if KIND == "linear":
        return s * previous, s, s
    elif KIND == "minlstm" and not NORMALIZE:
        _, not_forget = _sigmoids(gate)
        _, not_input = _sigmoids(input_gate)
        rate = 2.0 if SIGNED else 1.0
        return s * previous * (rate * a * not_forget), s * c * (take * not_input), s * take * slope
    else:
        grad_candidate = s * take * slope
        if SIGNED:
            grad_candidate = s * (2 * tl.where(a < take, a, take)) * slope
            c = tl.where(a < take, -c, tl.where(a > take, c, 0.0))
        grad_balance = (2.0 if SIGNED else 1.0) * (a * take) * _times_difference(s, previous, c)
        if KIND == "mingru":
            return -grad_balance, -grad_balance, grad_candidate
        else:
            _, not_forget = _sigmoids(gate)
            _, not_input = _sigmoids(input_gate)
            return grad_balance * not_forget, -grad_balance * not_input, grad_candidate


@triton.jit
def _then(a_left, b_left, reset_left, a, b, reset):
    """Composes two stretches of h -> a h + b; a reset drops the state that enters it, even infinities and NaN."""
    return a_left * a, tl.where(reset, b, a * b_left + b), reset_left | reset


@triton.jit
def _then_gradient(p_left, s_left, a_left, reset_left, p, s, a, reset):
    """Composes two stretches of s -> p s + g; a takes the last gradient of one to the first of the next."""
    carried_p = tl.where(reset_left, 0.0, a_left * p_left)
    carried_s = tl.where(reset_left, 0.0, a_left * s_left)
    return p * carried_p, s + p * carried_s, a, reset


@triton.jit
def _last(x, rows, STEPS: tl.constexpr):
    return tl.sum(tl.where(rows == STEPS - 1, x, 0.0), axis=0, keep_dims=True)


@triton.jit
def _load(pointer, t, rows, stride, mask, other):
    """Loads steps t + rows. Offsets have two parts, so that a tile's addresses cost one addition each."""
    return tl.load(pointer + t * stride + rows.to(tl.int64) * stride, mask=mask, other=other)


@triton.jit
def _store(pointer, t, rows, stride, x, mask):
    tl.store(pointer + t * stride + rows.to(tl.int64) * stride, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _nothing(d, stride):
    """Returns offsets with a stride of zero, so that all lanes read a step's one reset.

    The hint is untrue, but harmless, because no known alignment would allow wider reads. Without it Triton 3.6 lays
    this tile out along time, and the scan no longer stays within a thread.
    """
    return tl.max_contiguous(d * stride, (1, d.shape[1]))


@triton.jit
def _load_inputs(
    gate, input_gate, candidate, resets, t, rows, mask, gate_t, input_gate_t, candidate_t, resets_t,
    KIND: tl.constexpr,
):  # fmt: skip
    """Loads a tile of each input, as stored; outside the mask a = 1, b = 0. Absent inputs cost nothing."""
    if KIND == "linear":
        gate_tile = _load(gate, t, rows, gate_t, mask, 1.0)
    elif KIND == "mingru":
        gate_tile = _load(gate, t, rows, gate_t, mask, float("-inf"))
    else:
        gate_tile = _load(gate, t, rows, gate_t, mask, float("inf"))
    if input_gate is None:
        input_gate_tile = gate_tile
    else:
        input_gate_tile = _load(input_gate, t, rows, input_gate_t, mask, float("-inf"))
    candidate_tile = _load(candidate, t, rows, candidate_t, mask, 0)
    if resets is None:
        reset_tile = mask ^ mask  # false
    else:
        reset_tile = _load(resets, t, rows, resets_t, mask, 0) != 0
    return gate_tile, input_gate_tile, candidate_tile, reset_tile


@triton.jit
def _walk(
    gate, input_gate, candidate, resets, out, h, start, stop, lanes,
    gate_t, input_gate_t, candidate_t, resets_t, out_t,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZE: tl.constexpr, SIGNED: tl.constexpr,
    ADJOINT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Runs from state h (1, BLOCK_D) over the steps start..stop; returns the last state and the product of the a's.

    The pointers are (1, BLOCK_D), at step 0. States are stored if `out` is given. ADJOINT: candidate is the gradient
    of the states, and the recurrence is that of the backward pass, c_t = a_t (c_{t-1} + candidate_t).
    """
    rows = tl.arange(0, STEPS)[:, None]
    product = tl.full(h.shape, 1.0, h.dtype)
    gate_next, input_gate_next, candidate_next, reset_next = _load_inputs(
        gate, input_gate, candidate, resets, start, rows, (rows < (stop - start).to(tl.int32)) & lanes,
        gate_t, input_gate_t, candidate_t, resets_t, KIND,
    )  # fmt: skip
    t = start
    while t < stop:
        gate_tile, input_gate_tile, candidate_tile, reset = gate_next, input_gate_next, candidate_next, reset_next
        gate_next, input_gate_next, candidate_next, reset_next = _load_inputs(
            gate, input_gate, candidate, resets, t + STEPS, rows, (rows < (stop - t - STEPS).to(tl.int32)) & lanes,
            gate_t, input_gate_t, candidate_t, resets_t, KIND,
        )  # fmt: skip
        gate_tile, input_gate_tile = gate_tile.to(h.dtype), input_gate_tile.to(h.dtype)
        candidate_tile = candidate_tile.to(h.dtype)
        if ADJOINT:
            a, _ = _gates(gate_tile, input_gate_tile, KIND, NORMALIZE, SIGNED)
            s = tl.where(rows == 0, candidate_tile + h, candidate_tile)
            products, states, a, reset = tl.associative_scan(
                (tl.full(a.shape, 1.0, h.dtype), s, a, reset), 0, _then_gradient
            )
            products = tl.where(reset, 0.0, a * products)
            states = tl.where(reset, 0.0, a * states)
        else:
            a, b = _coefficients(gate_tile, input_gate_tile, candidate_tile, KIND, ACTIVATION, NORMALIZE, SIGNED)
            b = tl.where(reset, a * 0 + b, b)  # as the loop does: NaN where a is not finite
            a = tl.where(reset, 0.0, a)
            b = tl.where((rows == 0) & (reset == 0), a * h + b, b)
            products, states, _ = tl.associative_scan((a, b, reset), 0, _then)
        if out is not None:
            _store(out, t, rows, out_t, states, (rows < (stop - t).to(tl.int32)) & lanes)
        h = _last(states, rows, STEPS)
        product *= _last(products, rows, STEPS)
        t += STEPS
    return h, product


@triton.jit
def _place(bounds, b, T):
    """Returns a sequence's first step and number of steps: 0 and T unless `bounds` (sequences, 2) gives both ends."""
    if bounds is None:
        return b * 0, T
    else:
        first = tl.load(bounds + 2 * b)
        return first, tl.load(bounds + 2 * b + 1) - first


@_generic_jit
def _scan_kernel(
    gate, input_gate, candidate, resets, bounds, initial, out, products, ends,
    T: tl.int32, D: tl.int64, chunk_steps: tl.int32, chunks: tl.int32,
    gate_b: tl.int64, gate_t: tl.int64, input_gate_b: tl.int64, input_gate_t: tl.int64,
    candidate_b: tl.int64, candidate_t: tl.int64,
    resets_b: tl.int64, resets_t: tl.int64, resets_d: tl.int64, initial_b: tl.int64, initial_c: tl.int64,
    out_b: tl.int64, out_t: tl.int64,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZE: tl.constexpr, SIGNED: tl.constexpr, ADJOINT: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores one chunk's states, or without `out` its product of a's and its last state, both (B, chunks, D)."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // blocks
    b, chunk = row // chunks, row % chunks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    lanes = d < D
    if initial is None:
        h = tl.zeros((1, BLOCK_D), ACC)
    else:
        h = tl.load(initial + b * initial_b + chunk * initial_c + d, mask=lanes, other=0).to(ACC)
    first, T = _place(bounds, b, T)
    start = chunk.to(tl.int64) * chunk_steps
    stop = tl.minimum(start + chunk_steps, T)
    h, product = _walk(
        gate + b * gate_b + first * gate_t + d,
        None if input_gate is None else input_gate + b * input_gate_b + first * input_gate_t + d,
        candidate + b * candidate_b + first * candidate_t + d,
        None if resets is None else resets + b * resets_b + first * resets_t + _nothing(d, resets_d),
        None if out is None else out + b * out_b + first * out_t + d,
        h, start, stop, lanes, gate_t, input_gate_t, candidate_t, resets_t, out_t,
        KIND, ACTIVATION, NORMALIZE, SIGNED, ADJOINT, STEPS,
    )  # fmt: skip
    if out is None:
        tl.store(products + row * D + d, product, mask=lanes)
        tl.store(ends + row * D + d, h, mask=lanes)


@_generic_jit
def _carry_kernel(
    gate, input_gate, candidate, resets, bounds, initial, products, ends, entering,
    T: tl.int32, D: tl.int64, chunk_steps: tl.int32, chunks: tl.int32,
    gate_b: tl.int64, gate_t: tl.int64, input_gate_b: tl.int64, input_gate_t: tl.int64,
    candidate_b: tl.int64, candidate_t: tl.int64,
    resets_b: tl.int64, resets_t: tl.int64, resets_d: tl.int64, initial_b: tl.int64,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZE: tl.constexpr, SIGNED: tl.constexpr, ADJOINT: tl.constexpr,
    STEPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the state entering every chunk, (B, chunks + 1, D), from all chunks' products and ends, (B, chunks, D).

    The last one is the state after all `chunks`.
    """
    blocks = tl.cdiv(D, BLOCK_D)
    b = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    lanes = d < D
    if initial is None:
        h = tl.zeros((1, BLOCK_D), ACC)
    else:
        h = tl.load(initial + b * initial_b + d, mask=lanes, other=0).to(ACC)
    entering += b * (chunks + 1) * D + d
    tl.store(entering, h, mask=lanes)
    first_t, T = _place(bounds, b, T)
    summaries = b * chunks * D + d
    rows = tl.arange(0, CHUNKS)[:, None].to(tl.int64)
    first = b * 0
    while first < chunks:
        chunk = first + rows
        mask = (chunk < chunks) & lanes
        offsets = summaries + chunk * D
        product = tl.load(products + offsets, mask=mask, other=1)
        end = tl.load(ends + offsets, mask=mask, other=0)
        end = tl.where(rows == 0, product * h + end, end)
        _, states, _ = tl.associative_scan((product, end, mask ^ mask), 0, _then)
        tl.store(entering + (chunk + 1) * D, states, mask=mask)
        finite = tl.where(mask, tl.abs(states) < float("inf"), mask == mask)
        if tl.min(finite.to(tl.int32)) == 1:
            h = _last(states, rows, CHUNKS)
        else:
            k = first
            while k < tl.minimum(first + CHUNKS, chunks):
                summary = summaries + k * D
                chunk_start = k * chunk_steps
                jumped = tl.load(products + summary, mask=lanes, other=1) * h
                jumped += tl.load(ends + summary, mask=lanes, other=0)
                walked, _product = _walk(
                    gate + b * gate_b + first_t * gate_t + d,
                    None if input_gate is None else input_gate + b * input_gate_b + first_t * input_gate_t + d,
                    candidate + b * candidate_b + first_t * candidate_t + d,
                    None if resets is None else resets + b * resets_b + first_t * resets_t + _nothing(d, resets_d),
                    None,
                    h, chunk_start, tl.minimum(chunk_start + chunk_steps, T), lanes,
                    gate_t, input_gate_t, candidate_t, resets_t, 0, KIND, ACTIVATION, NORMALIZE, SIGNED, ADJOINT, STEPS,
                )  # fmt: skip
                h = tl.where(tl.abs(jumped) < float("inf"), jumped, walked)
                k += 1
                tl.store(entering + k * D, h, mask=lanes)
        first += CHUNKS


@_generic_jit
def _gradient_kernel(
    gate, input_gate, candidate, resets, bounds, initial, states, grad, entering,
    grad_gate, grad_input_gate, grad_candidate, grad_initial,
    T: tl.int32, D: tl.int64, chunk_steps: tl.int32, chunks: tl.int32,
    gate_b: tl.int64, gate_t: tl.int64, input_gate_b: tl.int64, input_gate_t: tl.int64,
    candidate_b: tl.int64, candidate_t: tl.int64,
    resets_b: tl.int64, resets_t: tl.int64, resets_d: tl.int64, initial_b: tl.int64, states_b: tl.int64,
    states_t: tl.int64, grad_b: tl.int64, grad_t: tl.int64, grad_gate_b: tl.int64, grad_gate_t: tl.int64,
    grad_input_gate_b: tl.int64, grad_input_gate_t: tl.int64, grad_candidate_b: tl.int64, grad_candidate_t: tl.int64,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZE: tl.constexpr, SIGNED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores one chunk's gradients. Step 0 is the last of the forward pass, so the previous state is at t + 1."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // blocks
    b, chunk = row // chunks, row % chunks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    lanes = d < D
    first, T = _place(bounds, b, T)
    gate += b * gate_b + first * gate_t + d
    candidate += b * candidate_b + first * candidate_t + d
    states += b * states_b + first * states_t + d
    grad += b * grad_b + first * grad_t + d
    grad_gate += b * grad_gate_b + first * grad_gate_t + d
    grad_candidate += b * grad_candidate_b + first * grad_candidate_t + d
    if input_gate is not None:
        input_gate += b * input_gate_b + first * input_gate_t + d
        grad_input_gate += b * grad_input_gate_b + first * grad_input_gate_t + d
    if resets is not None:
        resets += b * resets_b + first * resets_t + _nothing(d, resets_d)
    h0 = tl.zeros((1, BLOCK_D), ACC)
    if initial is not None:
        h0 = tl.load(initial + b * initial_b + d, mask=lanes, other=0).to(ACC)
    carry = tl.zeros((1, BLOCK_D), ACC)
    if entering is not None:
        carry = tl.load(entering + row * D + d, mask=lanes, other=0)
    start = chunk.to(tl.int64) * chunk_steps
    stop = tl.minimum(start + chunk_steps, T)

    rows = tl.arange(0, STEPS)[:, None]
    mask = (rows < (stop - start).to(tl.int32)) & lanes
    gate_next, input_gate_next, candidate_next, reset_next = _load_inputs(
        gate, input_gate, candidate, resets, start, rows, mask, gate_t, input_gate_t, candidate_t, resets_t, KIND
    )
    grad_next = _load(grad, start, rows, grad_t, mask, 0)
    previous_next = _load(states, start + 1, rows, states_t, mask & (rows < (T - 1 - start).to(tl.int32)), 0)
    t = start
    while t < stop:
        gate_tile, input_gate_tile, candidate_tile, reset = gate_next, input_gate_next, candidate_next, reset_next
        s, previous = grad_next.to(ACC), previous_next.to(ACC)
        ahead = t + STEPS
        mask = (rows < (stop - ahead).to(tl.int32)) & lanes
        gate_next, input_gate_next, candidate_next, reset_next = _load_inputs(
            gate, input_gate, candidate, resets, ahead, rows, mask, gate_t, input_gate_t, candidate_t, resets_t, KIND
        )
        grad_next = _load(grad, ahead, rows, grad_t, mask, 0)
        previous_next = _load(states, ahead + 1, rows, states_t, mask & (rows < (T - 1 - ahead).to(tl.int32)), 0)
        gate_tile, input_gate_tile = gate_tile.to(ACC), input_gate_tile.to(ACC)
        candidate_tile = candidate_tile.to(ACC)
        a, _ = _gates(gate_tile, input_gate_tile, KIND, NORMALIZE, SIGNED)
        s = tl.where(rows == 0, s + carry, s)
        _, s, a, reset = tl.associative_scan((tl.full(s.shape, 1.0, ACC), s, a, reset), 0, _then_gradient)
        carry = _last(tl.where(reset, 0.0, a * s), rows, STEPS)
        previous = tl.where(reset, 0.0, tl.where(rows == (T - 1 - t).to(tl.int32), h0, previous))
        d_gate, d_input_gate, d_candidate = _input_gradients(
            gate_tile, input_gate_tile, candidate_tile, previous, s, KIND, ACTIVATION, NORMALIZE, SIGNED
        )
        inside = (rows < (stop - t).to(tl.int32)) & lanes
        _store(grad_gate, t, rows, grad_gate_t, d_gate, inside)
        if input_gate is not None:
            _store(grad_input_gate, t, rows, grad_input_gate_t, d_input_gate, inside)
        _store(grad_candidate, t, rows, grad_candidate_t, d_candidate, inside)
        t += STEPS
    if grad_initial is not None:
        if chunk == chunks - 1:
            tl.store(grad_initial + b * D + d, carry.to(grad_initial.dtype.element_ty), mask=lanes)


def forward(
    cell: Cell,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    out: Tensor,
) -> None:
    """Fills `out` (B, T, D) with the states. All tensors have D contiguous and any strides over B and T."""
    B, T, D, bounds = _sequences(out, cu_seqlens, flip=reverse)
    arguments = _cell(cell, out.dtype) | _inputs(inputs, resets, flip=reverse) | {"bounds": bounds}
    chunk_steps = _chunk_steps(B, T, D, out.device)
    initial = h0 if chunk_steps >= T else _entering(arguments, h0, B, T, D, chunk_steps)
    _launch(
        _scan_kernel,
        B * triton.cdiv(T, chunk_steps) * triton.cdiv(D, BLOCK_D),
        **arguments,
        **_view("out", out, flip=reverse),
        initial=initial,
        initial_b=0 if initial is None else initial.stride(0),
        initial_c=0 if initial is None or initial is h0 else initial.stride(1),
        products=None,
        ends=None,
        **_extent(T, D, chunk_steps, triton.cdiv(T, chunk_steps)),
        ADJOINT=False,
        STEPS=_forward_steps(arguments),
    )


def backward(
    cell: Cell,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    h: Tensor,
    grad: Tensor,
    grads: tuple[Tensor, ...],
    grad_h0: Tensor | None,
) -> None:
    """Fills `grads`, one for each input, and `grad_h0` (B, D), from the states h and their gradient."""
    flip = not reverse
    B, T, D, bounds = _sequences(h, cu_seqlens, flip)
    arguments = _cell(cell, h.dtype) | _inputs(inputs, resets, flip) | {"bounds": bounds}
    chunk_steps = _chunk_steps(B, T, D, h.device)
    entering = None
    if chunk_steps < T:
        entering = _entering(arguments | _view("candidate", grad, flip), None, B, T, D, chunk_steps, adjoint=True)
    *grad_gates, grad_candidate = grads
    grad_gate, grad_input_gate = (*grad_gates, None)[:2]
    _launch(
        _gradient_kernel,
        B * triton.cdiv(T, chunk_steps) * triton.cdiv(D, BLOCK_D),
        **arguments,
        **_view("states", h, flip),
        **_view("grad", grad, flip),
        **_view("grad_gate", grad_gate, flip),
        **_view("grad_input_gate", grad_input_gate, flip),
        **_view("grad_candidate", grad_candidate, flip),
        initial=h0,
        initial_b=0 if h0 is None else h0.stride(0),
        entering=entering,
        grad_initial=grad_h0,
        **_extent(T, D, chunk_steps, triton.cdiv(T, chunk_steps)),
        STEPS=_backward_steps(arguments),
    )


def _sequences(h: Tensor, cu_seqlens: Tensor | None, flip: bool) -> tuple[int, int, int, Tensor | None]:
    """Returns how many sequences there are, the most steps of one, D, and each one's bounds if they are packed."""
    B, T, D = h.shape
    if cu_seqlens is None:
        return B, T, D, None
    bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1)
    longest = int(cu_seqlens.diff().max())
    return len(bounds), longest, D, (T - bounds.flip(1) if flip else bounds).to(h.device)


def _entering(
    arguments: dict, h0: Tensor | None, B: int, T: int, D: int, chunk_steps: int, adjoint: bool = False
) -> Tensor:
    """Returns the state (or gradient) entering every chunk, (B, chunks, D) in the dtype of accumulation."""
    chunks = triton.cdiv(T, chunk_steps)
    gate = arguments["gate"]
    options = {"dtype": torch.promote_types(gate.dtype, torch.float32), "device": gate.device}
    products, ends = torch.empty(2, B, chunks - 1, D, **options)  # nothing follows the last chunk
    entering = torch.empty(B, chunks, D, **options)
    shared = arguments | _extent(T, D, chunk_steps, chunks - 1)
    shared |= {"products": products, "ends": ends, "ADJOINT": adjoint}
    blocks = triton.cdiv(D, BLOCK_D)
    _launch(
        _scan_kernel,
        B * (chunks - 1) * blocks,
        **shared,
        **_view("out", None),
        initial=None,
        initial_b=0,
        initial_c=0,
        STEPS=_forward_steps(arguments),
    )
    _launch(
        _carry_kernel,
        B * blocks,
        **shared,
        initial=h0,
        initial_b=0 if h0 is None else h0.stride(0),
        entering=entering,
        CHUNKS=CARRY_CHUNKS,
        STEPS=_steps(NARROW_BACKWARD_STEPS, gate.dtype),  # it rarely goes step by step: small rather than fast
    )
    return entering


def _chunk_steps(B: int, T: int, D: int, device: torch.device) -> int:
    """Returns the steps per program: all T, or fewer if there are too few channels to fill the GPU."""
    if device.type != "cuda" or T < MIN_SPLIT_STEPS:
        return T
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = B * triton.cdiv(D, BLOCK_D)
    if programs >= MIN_WARPS_PER_SM * multiprocessors:
        return T
    chunks = triton.cdiv(WARPS_PER_SM * multiprocessors, programs)
    return max(MIN_CHUNK_STEPS, triton.cdiv(triton.cdiv(T, chunks), FORWARD_STEPS) * FORWARD_STEPS)


def _forward_steps(arguments: dict) -> int:
    return _steps(FORWARD_STEPS if arguments["resets"] is None else NARROW_FORWARD_STEPS, arguments["gate"].dtype)


def _backward_steps(arguments: dict) -> int:
    narrow = arguments["input_gate"] is not None or arguments["resets"] is not None
    return _steps(NARROW_BACKWARD_STEPS if narrow else BACKWARD_STEPS, arguments["gate"].dtype)


def _steps(steps: int, dtype: torch.dtype) -> int:
    """Returns a quarter of steps for float64: a number takes two registers, and its exponential many more."""
    return steps // 4 if dtype == torch.float64 else steps


def _cell(cell: Cell, dtype: torch.dtype) -> dict:
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    form = {"KIND": cell.kind, "ACTIVATION": cell.activation, "NORMALIZE": cell.normalize, "SIGNED": cell.signed}
    return form | {"ACC": acc}


def _inputs(inputs: tuple[Tensor, ...], resets: Tensor | None, flip: bool) -> dict:
    *gates, candidate = inputs
    gate, input_gate = (*gates, None)[:2]
    resets = None if resets is None else resets.view(torch.uint8)
    named = {"gate": gate, "input_gate": input_gate, "candidate": candidate, "resets": resets}
    return {"resets_d": 0} | {k: v for name, x in named.items() for k, v in _view(name, x, flip).items()}


def _view(name: str, x: Tensor | None, flip: bool = False) -> dict:
    """Returns the kernel's arguments for a (B, T, ...) tensor; if flipped, its step 0 is the last one."""
    if x is None:
        return {name: None, f"{name}_b": 0, f"{name}_t": 0}
    b, t = x.stride()[:2]
    b = 0 if x.shape[0] == 1 else b  # packed sequences share one row of the batch
    return {name: x[:, -1:] if flip else x, f"{name}_b": b, f"{name}_t": -t if flip else t}


def _extent(T: int, D: int, chunk_steps: int, chunks: int) -> dict:
    return {"T": T, "D": D, "chunk_steps": chunk_steps, "chunks": chunks}


def _launch(kernel, programs: int, **arguments) -> None:
    with torch.cuda.device_of(arguments["gate"]):
        kernel[(programs,)](**arguments, **LAUNCH)
