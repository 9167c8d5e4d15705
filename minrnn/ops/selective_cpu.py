"""The selective scan on a CPU, compiled with numba, forward and backward.

Arithmetic limits the speed: B T D N exponentials forward and again backward. So only the state is kept, in the L1
cache, and the exponential is the polynomial of `compiled`, which the compiler vectorises.

A kernel takes one sequence and a block of 16 channels, whose N states are stored as N rows of 16 numbers: the sum over
N for y, and those of the backward pass, then do not cross a vector's lanes. Rows of u, dt and the gradient are copied
into blocks padded with zeros, which neither change a state nor add to a sum. The forward pass saves the state every
`steps` steps. From there the backward pass recomputes a stretch's states, keeps them and the exponentials in scratch
memory of the L2 cache's size, and goes back through them. The gradients of B and C, sums over channels, are added up
lane by lane over the blocks, and across lanes once per stretch.

Work is divided into items by the shapes alone: a sequence, or a group of its blocks if there are few sequences. Each
item has its own share of every sum, and shares are added in order, so that results do not depend on the number of
threads.
"""

from itertools import pairwise

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from .compiled import (
    ELEMENT_TAGS,
    REGIONS,
    bounded_exp,
    cached_jit,
    constant,
    in_threads,
    inline_overload,
    jit,
    load,
    row_at,
    store,
    zero_of,
)

LANES = 16
# Below this many states (times steps) per thread another thread costs more than it saves.
MIN_STATES_PER_THREAD = 1 << 17
# With fewer sequences than ITEMS each is divided into groups of at least MIN_GROUP blocks.
ITEMS = 64
MIN_GROUP = 4
CACHE_LINE = 64

# Regions of memory. None overlaps another, and each is always accessed by its own number.
INPUT, ROW, STATE, PREVIOUS, DECAY, SUM, ROW_SUM, ROW_SUM_2, GRAD_A, OUTPUT = range(REGIONS)


def _size(element):
    raise NotImplementedError("compiled only")


@inline_overload(_size)
def _(element):
    size = 8 if element == types.float64 else 4
    return lambda element: size


# --- rows --------------------------------------------------------------------------------------------------
# A stream is (address of its first element, stride over the batch, stride over time), in bytes; its rows are
# contiguous. A stream of states has a third stride, over N. The address 0 means zeros.


@jit
def _exp(x):
    """Returns exp(x), which is 0 or infinite outside the range of normal numbers; NaN stays NaN."""
    low, high = constant(x, -88.0), constant(x, 89.0)
    if _size(x) == 8:
        low, high = constant(x, -709.0), constant(x, 710.0)
    x = low if x < low else x
    return bounded_exp(high if x > high else x)


@jit
def _clear(element, region, target, count):
    zero = zero_of(element)
    for i in range(count):
        store(region, element, target, i, zero)


@jit
def _read_row(element, region, source, target, width):
    if width == LANES and source != 0:
        for k in range(LANES):
            store(region, element, target, k, load(INPUT, element, source, k))
    else:
        _clear(element, region, target, LANES)
        for k in range(width if source != 0 else 0):
            store(region, element, target, k, load(INPUT, element, source, k))


@jit
def _write_row(element, region, source, target, width):
    if width == LANES:
        for k in range(LANES):
            store(OUTPUT, element, target, k, load(region, element, source, k))
    else:
        for k in range(width):
            store(OUTPUT, element, target, k, load(region, element, source, k))


@jit
def _multiply_rows(element, x, y, out):
    for k in range(LANES):
        store(ROW, element, out, k, load(ROW, element, x, k) * load(ROW, element, y, k))


@jit
def _read_states(element, states, b, d, target, N, width):
    _clear(element, STATE, target, N * LANES)
    if states[0] != 0:
        for k in range(width):
            source = states[0] + b * states[1] + (d + k) * states[2]
            for n in range(N):
                store(STATE, element, target, n * LANES + k, load(INPUT, element, source + n * states[3], 0))


@jit
def _write_states(element, states, b, d, source, N, width):
    if states[0] != 0:
        for k in range(width):
            target = states[0] + b * states[1] + (d + k) * states[2]
            for n in range(N):
                store(OUTPUT, element, target + n * states[3], 0, load(STATE, element, source, n * LANES + k))


@jit
def _saved_at(saved, b, stretch, n, stretches, N, D, d, size):
    """Returns the address of row n, from channel d on, of the state that enters a stretch."""
    return saved + (((b * stretches + stretch) * N + n) * D + d) * size


# --- forward -----------------------------------------------------------------------------------------------


@jit
def _forward_step(element, dt, x, A, B, C, h, y, N):
    _clear(element, ROW_SUM, y, LANES)
    for n in range(N):
        b, c = load(INPUT, element, B, n), load(INPUT, element, C, n)
        for k in range(LANES):
            i = n * LANES + k
            a = _exp(load(ROW, element, dt, k) * load(INPUT, element, A, i))
            state = a * load(STATE, element, h, i) + load(ROW, element, x, k) * b
            store(STATE, element, h, i, state)
            store(ROW_SUM, element, y, k, load(ROW_SUM, element, y, k) + state * c)


@cached_jit
def _forward(element, u, dt, A, B, C, h0, y, last, saved, T, D, N, steps, groups, first, stop, scratch):
    size = _size(element)
    row, block_size = LANES * size, N * LANES * size
    dt_row, x_row, y_row, carry = scratch, scratch + row, scratch + 2 * row, scratch + 3 * row
    blocks = (D + LANES - 1) // LANES
    stretches = (T + steps - 1) // steps
    for item in range(first, stop):
        b, group = item // groups, item % groups
        first_block, stop_block = group * blocks // groups, (group + 1) * blocks // groups
        for block in range(first_block, stop_block):
            h = carry + (block - first_block) * block_size
            _read_states(element, h0, b, block * LANES, h, N, min(LANES, D - block * LANES))
        for stretch in range(stretches):  # all blocks of one stretch together, as its rows are close in memory
            for block in range(first_block, stop_block):
                d = block * LANES
                width = min(LANES, D - d)
                h = carry + (block - first_block) * block_size
                for n in range(N):
                    target = _saved_at(saved, b, stretch, n, stretches, N, D, d, size)
                    _write_row(element, STATE, h + n * row, target, width)
                for t in range(stretch * steps, min((stretch + 1) * steps, T)):
                    _read_row(element, ROW, row_at(dt, b, t) + d * size, dt_row, width)
                    _read_row(element, ROW, row_at(u, b, t) + d * size, x_row, width)
                    _multiply_rows(element, x_row, dt_row, x_row)
                    _forward_step(
                        element, dt_row, x_row, A + block * block_size, row_at(B, b, t), row_at(C, b, t), h, y_row, N
                    )  # fmt: skip
                    _write_row(element, ROW_SUM, y_row, row_at(y, b, t) + d * size, width)
        for block in range(first_block, stop_block):
            h = carry + (block - first_block) * block_size
            _write_states(element, last, b, block * LANES, h, N, min(LANES, D - block * LANES))


# --- backward ----------------------------------------------------------------------------------------------


@jit
def _recompute_step(element, dt, x, grad, A, B, h, previous, decay, dC, N):
    """Repeats a forward step, stores the state before it and the exponential, and adds to the lanes of dC."""
    for n in range(N):
        b = load(INPUT, element, B, n)
        for k in range(LANES):
            i = n * LANES + k
            a = _exp(load(ROW, element, dt, k) * load(INPUT, element, A, i))
            before = load(STATE, element, h, i)
            state = a * before + load(ROW, element, x, k) * b
            store(PREVIOUS, element, previous, i, before)
            store(DECAY, element, decay, i, a)
            store(STATE, element, h, i, state)
            store(SUM, element, dC, i, load(SUM, element, dC, i) + load(ROW, element, grad, k) * state)


@jit
def _backward_step(element, dt, x, grad, A, B, C, s, previous, decay, dB, dA, dx, ddt, N):
    """Goes back one step: s is the state's gradient from later steps, dx that of dt u, ddt that of dt in exp(dt A)."""
    _clear(element, ROW_SUM, dx, LANES)
    _clear(element, ROW_SUM_2, ddt, LANES)
    for n in range(N):
        b, c = load(INPUT, element, B, n), load(INPUT, element, C, n)
        for k in range(LANES):
            i = n * LANES + k
            total = load(STATE, element, s, i) + load(ROW, element, grad, k) * c
            onward = total * load(DECAY, element, decay, i)
            exponent = onward * load(PREVIOUS, element, previous, i)
            store(STATE, element, s, i, onward)
            store(SUM, element, dB, i, load(SUM, element, dB, i) + total * load(ROW, element, x, k))
            store(ROW_SUM, element, dx, k, load(ROW_SUM, element, dx, k) + total * b)
            store(ROW_SUM_2, element, ddt, k, load(ROW_SUM_2, element, ddt, k) + exponent * load(INPUT, element, A, i))
            store(GRAD_A, element, dA, i, load(GRAD_A, element, dA, i) + exponent * load(ROW, element, dt, k))


@jit
def _input_gradients(element, dt, u, dx, ddt):
    """Turns dx into the gradient of u and ddt into that of dt, in place."""
    for k in range(LANES):
        g = load(ROW_SUM, element, dx, k)
        store(ROW_SUM, element, dx, k, g * load(ROW, element, dt, k))
        store(ROW_SUM_2, element, ddt, k, load(ROW_SUM_2, element, ddt, k) + g * load(ROW, element, u, k))


@njit(forceinline=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _write_sums(element, sums, target, N):
    """Writes sums over the lanes, added in an order that the compiler chooses."""
    for n in range(N):
        total = zero_of(element)
        for k in range(LANES):
            total += load(SUM, element, sums, n * LANES + k)
        store(OUTPUT, element, target, n, total)


@cached_jit
def _backward(
    element, u, dt, A, B, C, saved, grad, grad_last, du, ddt, dA, dB, dC, grad_h0,
    T, D, N, steps, groups, first, stop, scratch,
):  # fmt: skip
    size = _size(element)
    row, block_size = LANES * size, N * LANES * size
    blocks = (D + LANES - 1) // LANES
    stretches = (T + steps - 1) // steps
    dx_row, ddt_row = scratch, scratch + row
    h = scratch + 2 * row
    dt_rows = h + block_size
    u_rows, x_rows, grad_rows = dt_rows + steps * row, dt_rows + 2 * steps * row, dt_rows + 3 * steps * row
    previous = dt_rows + 4 * steps * row
    decay = previous + steps * block_size
    sums_B, sums_C = decay + steps * block_size, decay + 2 * steps * block_size
    carry = decay + 3 * steps * block_size
    for item in range(first, stop):
        b, group = item // groups, item % groups
        first_block, stop_block = group * blocks // groups, (group + 1) * blocks // groups
        for block in range(first_block, stop_block):
            s = carry + (block - first_block) * block_size
            _read_states(element, grad_last, b, block * LANES, s, N, min(LANES, D - block * LANES))
        for stretch in range(stretches - 1, -1, -1):
            start = stretch * steps
            count = min(steps, T - start)
            _clear(element, SUM, sums_B, count * N * LANES)
            _clear(element, SUM, sums_C, count * N * LANES)
            for block in range(first_block, stop_block):
                d = block * LANES
                width = min(LANES, D - d)
                block_A = A + block * block_size
                for n in range(N):
                    source = _saved_at(saved, b, stretch, n, stretches, N, D, d, size)
                    _read_row(element, STATE, source, h + n * row, width)
                for i in range(count):
                    t = start + i
                    at = i * row
                    _read_row(element, ROW, row_at(dt, b, t) + d * size, dt_rows + at, width)
                    _read_row(element, ROW, row_at(u, b, t) + d * size, u_rows + at, width)
                    _read_row(element, ROW, row_at(grad, b, t) + d * size if grad[0] != 0 else 0, grad_rows + at, width)
                    _multiply_rows(element, dt_rows + at, u_rows + at, x_rows + at)
                    _recompute_step(
                        element, dt_rows + at, x_rows + at, grad_rows + at, block_A, row_at(B, b, t), h,
                        previous + i * block_size, decay + i * block_size, sums_C + i * block_size, N,
                    )  # fmt: skip
                for i in range(count - 1, -1, -1):
                    t = start + i
                    at = i * row
                    _backward_step(
                        element, dt_rows + at, x_rows + at, grad_rows + at, block_A, row_at(B, b, t), row_at(C, b, t),
                        carry + (block - first_block) * block_size,
                        previous + i * block_size, decay + i * block_size, sums_B + i * block_size,
                        dA + (b * blocks + block) * block_size, dx_row, ddt_row, N,
                    )  # fmt: skip
                    _input_gradients(element, dt_rows + at, u_rows + at, dx_row, ddt_row)
                    _write_row(element, ROW_SUM, dx_row, row_at(du, b, t) + d * size, width)
                    _write_row(element, ROW_SUM_2, ddt_row, row_at(ddt, b, t) + d * size, width)
            for i in range(count):
                _write_sums(element, sums_B + i * block_size, row_at(dB, item, start + i), N)
                _write_sums(element, sums_C + i * block_size, row_at(dC, item, start + i), N)
        for block in range(first_block, stop_block):
            s = carry + (block - first_block) * block_size
            _write_states(element, grad_h0, b, block * LANES, s, N, min(LANES, D - block * LANES))


# --- launch ------------------------------------------------------------------------------------------------


def forward(u, dt, A, B, C, h0, y, last, saved, steps: int) -> None:
    """Fills `y` (B, T, D), `last` (B, D, N) and `saved` (B, T / steps rounded up, N, D), flat.

    The last dimension of u, dt, B, C and y is contiguous; other strides are free.
    """
    N = A.shape[1]
    blocked = _blocked(A)
    streams = *map(_rows, (u, dt)), blocked.data_ptr(), *map(_rows, (B, C)), _states(h0), _rows(y), _states(last)
    _launch(_forward, u, N, (*streams, saved.data_ptr()), steps, lambda blocks: 3 + blocks * N)


def backward(u, dt, A, B, C, saved, grad, grad_last, du, ddt, dA, dB, dC, grad_h0, steps: int) -> None:
    """Fills the gradients `du` to `grad_h0` from those of y and of the last state; None there means zeros."""
    (batch, T, D), N = u.shape, A.shape[1]
    groups = _groups(batch, D)
    blocked = _blocked(A)
    dA_of_each = blocked.new_zeros(batch, *blocked.shape)
    dB_of_each, dC_of_each = (x.new_empty(batch * groups, T, N) if groups > 1 else x for x in (dB, dC))
    _launch(
        _backward, u, N,
        (
            *map(_rows, (u, dt)), blocked.data_ptr(), *map(_rows, (B, C)), saved.data_ptr(), _rows(grad),
            _states(grad_last), *map(_rows, (du, ddt)), dA_of_each.data_ptr(), *map(_rows, (dB_of_each, dC_of_each)),
            _states(grad_h0),
        ),
        steps, lambda blocks: 2 + (1 + blocks) * N + 4 * steps * (1 + N),
    )  # fmt: skip
    # numpy adds in a fixed order; torch's order depends on the number of threads
    dA_sum = torch.from_numpy(dA_of_each.numpy().sum(0))
    dA.copy_(dA_sum.transpose(1, 2).reshape(-1, N)[:D])
    if groups > 1:
        for x, of_each in ((dB, dB_of_each), (dC, dC_of_each)):
            x.copy_(torch.from_numpy(of_each.view(batch, groups, T, N).numpy().sum(1)))


def _launch(kernel, like: Tensor, N: int, arguments: tuple, steps: int, scratch_rows) -> None:
    """Runs a kernel in threads; `scratch_rows` maps a group's blocks to a thread's scratch rows of LANES numbers."""
    batch, T, D = like.shape
    groups = _groups(batch, D)
    items = batch * groups
    size = scratch_rows(-(-_count_blocks(D) // groups)) * LANES * like.element_size()
    threads = max(1, min(torch.get_num_threads(), items, batch * T * D * N // MIN_STATES_PER_THREAD))

    def run(first, stop):
        scratch = np.empty(size + CACHE_LINE, np.uint8)
        start = -(-scratch.ctypes.data // CACHE_LINE) * CACHE_LINE
        kernel(ELEMENT_TAGS[like.dtype], *arguments, T, D, N, steps, groups, first, stop, start)

    shares = list(pairwise(i * items // threads for i in range(threads + 1)))
    in_threads(run, shares)


def _count_blocks(D: int) -> int:
    return -(-D // LANES)


def _groups(batch: int, D: int) -> int:
    """Returns the number of items per sequence."""
    return max(1, min(_count_blocks(D) // MIN_GROUP, -(-ITEMS // batch)))


def _blocked(A: Tensor) -> Tensor:
    """Returns A (D, N) as (blocks, N, LANES), with zeros where D ends within a block."""
    D, N = A.shape
    padded = A.new_zeros(_count_blocks(D) * LANES, N)
    padded[:D] = A
    return padded.view(-1, LANES, N).transpose(1, 2).contiguous()


def _rows(x: Tensor | None) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0) * x.element_size(), x.stride(1) * x.element_size()


def _states(x: Tensor | None) -> tuple[int, int, int, int]:
    if x is None:
        return 0, 0, 0, 0
    return x.data_ptr(), *(stride * x.element_size() for stride in x.stride())
