"""The selective scan on NVIDIA GPUs, in Triton.

A program processes one sequence and BLOCK_D channels with all their N states, one tile of several steps at a time. A
lane owns a channel, warps share the N states, and each thread keeps a tile's time axis in its registers: the scan along
it is a plain loop in the reference's order. Only sums cross threads, once per tile: over N for y, and over channels for
the gradients of B and C. The forward pass loads the next tile before it computes the current one.

The forward pass saves the state that enters each tile, 4 N / STEPS bytes per channel and step in float32, which for
N = 16 is twice the size of u; the backward pass recomputes a tile's states from it in registers and stores no others.

For sums across programs, each program writes its share, and torch adds the shares up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_scan import _generic_jit

BLOCK_D = 32
MAX_STATES = 1024
# How many elements of a tile a thread holds. It holds several tiles, and more of them in the backward pass.
FORWARD_PER_THREAD = 32
BACKWARD_PER_THREAD = 16
DOUBLE_PER_THREAD = 16


@triton.jit
def _exp(x):
    """Returns exp(x), in base 2 because the hardware needs one instruction for that."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _row(x, rows, i):
    """Returns step i of a tile, (1, BLOCK_N, BLOCK_D). Adding 0 to integers, unlike floats, compiles to nothing."""
    bits: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    picked = tl.where(rows == i, x.to(bits, bitcast=True), 0)
    return tl.sum(picked, axis=0, keep_dims=True).to(bits).to(x.dtype, bitcast=True)


@triton.jit
def _entering(a, x, h, rows, STEPS: tl.constexpr, BACKWARD: tl.constexpr):
    """Returns the states of h -> a h + x before each step of a tile, and after all; h enters the first (or last)."""
    before = tl.zeros_like(a)
    for k in tl.static_range(STEPS):
        i = STEPS - 1 - k if BACKWARD else k
        before = tl.where(rows == i, h, before)
        h = _row(a, rows, i) * h + _row(x, rows, i)
    return before, h


@triton.jit
def _load_tile(x, t, steps, stride, width, stop, T, ACC: tl.constexpr):
    """Returns (steps, width) from step t on, with zeros outside."""
    mask = ((t + steps)[:, None] < T) & (width < stop)[None, :]
    return tl.load(x + t * stride + steps[:, None] * stride + width[None, :], mask=mask, other=0).to(ACC)


@triton.jit
def _store_tile(x, t, steps, stride, width, stop, T, tile):
    mask = ((t + steps)[:, None] < T) & (width < stop)[None, :]
    tl.store(x + t * stride + steps[:, None] * stride + width[None, :], tile, mask=mask)


@_generic_jit
def _forward_kernel(
    u, dt, A, B, C, h0, y, last, saved,
    T: tl.int32, D: tl.int64, N: tl.int64,
    u_b: tl.int64, u_t: tl.int64, dt_b: tl.int64, dt_t: tl.int64, B_b: tl.int64, B_t: tl.int64, C_b: tl.int64,
    C_t: tl.int64, y_b: tl.int64, y_t: tl.int64,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_D)
    b = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    steps = tl.arange(0, STEPS).to(tl.int64)
    rows = steps[:, None, None]
    inside = (n < N)[None, :, None] & (d < D)[None, None, :]
    state_at = n[None, :, None] * D + d[None, None, :]
    A_tile = tl.load(A + state_at, mask=inside, other=0)
    if h0 is None:
        h = tl.zeros((1, BLOCK_N, BLOCK_D), ACC)
    else:
        h = tl.load(h0 + b * N * D + state_at, mask=inside, other=0)
    tiles = tl.cdiv(T, STEPS)
    saved += b * tiles * N * D + state_at
    u += b * u_b
    dt += b * dt_b
    B += b * B_b
    C += b * C_b
    y += b * y_b
    u_next = _load_tile(u, b * 0, steps, u_t, d, D, T, ACC)
    dt_next = _load_tile(dt, b * 0, steps, dt_t, d, D, T, ACC)
    B_next = _load_tile(B, b * 0, steps, B_t, n, N, T, ACC)
    C_next = _load_tile(C, b * 0, steps, C_t, n, N, T, ACC)
    t = b.to(tl.int64) * 0
    while t < T:
        u_tile, dt_tile, B_tile, C_tile = u_next, dt_next, B_next, C_next
        u_next = _load_tile(u, t + STEPS, steps, u_t, d, D, T, ACC)
        dt_next = _load_tile(dt, t + STEPS, steps, dt_t, d, D, T, ACC)
        B_next = _load_tile(B, t + STEPS, steps, B_t, n, N, T, ACC)
        C_next = _load_tile(C, t + STEPS, steps, C_t, n, N, T, ACC)
        tl.store(saved, h, mask=inside)
        saved += N * D
        a = _exp(dt_tile[:, None, :] * A_tile)
        x = (dt_tile * u_tile)[:, None, :] * B_tile[:, :, None]
        before, h = _entering(a, x, h, rows, STEPS, False)  # a step outside has a = 1 and x = 0
        states = a * before + x
        _store_tile(y, t, steps, y_t, d, D, T, tl.sum(states * C_tile[:, :, None], axis=1))
        t += STEPS
    tl.store(last + b * N * D + state_at, h, mask=inside)


@_generic_jit
def _backward_kernel(
    u, dt, A, B, C, saved, grad, grad_last, du, ddt, dA, dB, dC, grad_h0,
    T: tl.int32, D: tl.int64, N: tl.int64,
    u_b: tl.int64, u_t: tl.int64, dt_b: tl.int64, dt_t: tl.int64, B_b: tl.int64, B_t: tl.int64, C_b: tl.int64,
    C_t: tl.int64, grad_b: tl.int64, grad_t: tl.int64, du_b: tl.int64, du_t: tl.int64, ddt_b: tl.int64,
    ddt_t: tl.int64,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes dA as a share per sequence, (B, N, D), and dB and dC per block of channels, (B, blocks, T, N)."""
    blocks = tl.cdiv(D, BLOCK_D)
    b = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    steps = tl.arange(0, STEPS).to(tl.int64)
    rows = steps[:, None, None]
    inside = (n < N)[None, :, None] & (d < D)[None, None, :]
    state_at = n[None, :, None] * D + d[None, None, :]
    A_tile = tl.load(A + state_at, mask=inside, other=0)
    carry = tl.zeros((1, BLOCK_N, BLOCK_D), ACC)
    if grad_last is not None:
        carry = tl.load(grad_last + b * N * D + state_at, mask=inside, other=0)
    dA_tile = tl.zeros((1, BLOCK_N, BLOCK_D), ACC)
    tiles = tl.cdiv(T, STEPS)
    saved += b * tiles * N * D + state_at
    u += b * u_b
    dt += b * dt_b
    B += b * B_b
    C += b * C_b
    du += b * du_b
    ddt += b * ddt_b
    share = tl.program_id(0).to(tl.int64) * T * N
    tile = tiles - 1
    while tile >= 0:
        t = tile.to(tl.int64) * STEPS
        u_tile = _load_tile(u, t, steps, u_t, d, D, T, ACC)
        dt_tile = _load_tile(dt, t, steps, dt_t, d, D, T, ACC)
        B_tile = _load_tile(B, t, steps, B_t, n, N, T, ACC)
        C_tile = _load_tile(C, t, steps, C_t, n, N, T, ACC)
        if grad is None:
            grad_tile = tl.zeros_like(u_tile)
        else:
            grad_tile = _load_tile(grad + b * grad_b, t, steps, grad_t, d, D, T, ACC)
        h = tl.load(saved + tile * N * D, mask=inside, other=0)
        a = _exp(dt_tile[:, None, :] * A_tile)
        scaled = dt_tile * u_tile
        x = scaled[:, None, :] * B_tile[:, :, None]
        before, _after = _entering(a, x, h, rows, STEPS, False)
        states = a * before + x
        _store_tile(dC + share, t, steps, N, n, N, T, tl.sum(states * grad_tile[:, None, :], axis=2))
        reached = grad_tile[:, None, :] * C_tile[:, :, None]
        # the gradient that later steps pass back, c_t = a_t (c_{t+1} + reached_t)
        later, carry = _entering(a, a * reached, carry, rows, STEPS, True)
        total = reached + later
        onward = a * total
        _store_tile(dB + share, t, steps, N, n, N, T, tl.sum(total * scaled[:, None, :], axis=2))
        dx = tl.sum(total * B_tile[:, :, None], axis=1)
        exponent = onward * before
        dA_tile += tl.sum(exponent * dt_tile[:, None, :], axis=0, keep_dims=True)
        _store_tile(du, t, steps, du_t, d, D, T, dx * dt_tile)
        _store_tile(ddt, t, steps, ddt_t, d, D, T, dx * u_tile + tl.sum(exponent * A_tile, axis=1))
        tile -= 1
    tl.store(dA + b * N * D + state_at, dA_tile, mask=inside)
    if grad_h0 is not None:
        tl.store(grad_h0 + b * N * D + state_at, carry, mask=inside)


def forward(u, dt, A, B, C, h0, y, last, saved, steps: int) -> None:
    """Fills `y` (B, T, D), `last` (B, D, N) and `saved` (B, T / steps rounded up, N, D), flat.

    Channels are contiguous in `last` and `saved`, and the last dimension in u, dt, B, C and y; other strides are free.
    """
    _launch(
        _forward_kernel, u.shape, A.shape[1], steps,
        **_views(u=u, dt=dt, B=B, C=C, y=y), A=_channels_last(A), h0=_channels_last(h0), last=last, saved=saved,
    )  # fmt: skip


def backward(u, dt, A, B, C, saved, grad, grad_last, du, ddt, dA, dB, dC, grad_h0, steps: int) -> None:
    """Fills the gradients `du` to `grad_h0` from those of y and of the last state; None there means zeros.

    Channels are contiguous in `grad_h0`, as in `last`.
    """
    (batch, T, D), N = u.shape, A.shape[1]
    blocks = triton.cdiv(D, _block_d(N))
    dA_shares = A.new_empty(batch, N, D)
    dB_shares, dC_shares = A.new_empty(2, batch, blocks, T, N)
    _launch(
        _backward_kernel, u.shape, N, steps,
        **_views(u=u, dt=dt, B=B, C=C, grad=grad, du=du, ddt=ddt), A=_channels_last(A), saved=saved,
        grad_last=_channels_last(grad_last), dA=dA_shares, dB=dB_shares, dC=dC_shares, grad_h0=grad_h0,
    )  # fmt: skip
    dA.copy_(dA_shares.sum(0).mT)
    dB.copy_(dB_shares.sum(1))
    dC.copy_(dC_shares.sum(1))


def _channels_last(states: Tensor | None) -> Tensor | None:
    """Returns states (..., D, N) as (..., N, D) with contiguous channels."""
    return None if states is None else states.mT.contiguous()


def _views(**tensors: Tensor | None) -> dict:
    arguments: dict = {}
    for name, x in tensors.items():
        b, t = (0, 0) if x is None else x.stride()[:2]
        arguments |= {name: x, f"{name}_b": b, f"{name}_t": t}
    return arguments


def _block_d(N: int) -> int:
    """Returns the channels per program, fewer than 32 if their states would need too many warps."""
    return max(1, min(BLOCK_D, MAX_STATES // triton.next_power_of_2(N)))


def _launch(kernel, shape: tuple[int, int, int], N: int, steps: int, **arguments) -> None:
    batch, T, D = shape
    block_n, block_d = triton.next_power_of_2(N), _block_d(N)
    double = arguments["u"].dtype == torch.float64
    per_thread = FORWARD_PER_THREAD if kernel is _forward_kernel else BACKWARD_PER_THREAD
    threads = steps * block_n * block_d // (DOUBLE_PER_THREAD if double else per_thread)
    arguments |= {"T": T, "D": D, "N": N, "STEPS": steps, "BLOCK_N": block_n, "BLOCK_D": block_d}
    arguments["ACC"] = tl.float64 if double else tl.float32
    with torch.cuda.device_of(arguments["u"]):
        kernel[(batch * triton.cdiv(D, block_d),)](
            **arguments, num_warps=min(32, max(1, threads // 32)), num_stages=1, enable_fp_fusion=True
        )
