"""Scans alone: their time beside other libraries' and beside that of a copy, and their error.

A wrong scan of ours stops the measurement; another library's that is wrong or fails gives a point that says why.
Libraries that are not installed are left out.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minrnn.ops.cells import CELLS
from minrnn.ops.scan import scan

from ..config import EfficiencyData
from ..measure import Call, check, copy_bandwidth, relative_error
from .timer import Case, Point, Timer, dtypes, name_of, sizes

SCANS = {"minGRU": "mingru_g", "minLSTM": "minlstm_g", "linear": "linear"}
PASSES = ("forward", "backward", "both")
BACKENDS = {"log-space": "log", "loop": "reference", "minrnn": "auto"}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Log space in float32 is off by 1e-3 at T = 65536.
PEER_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

Scan = Callable[..., Tensor]
Peer = tuple[Scan, list[Tensor], Tensor]  # with its inputs and output gradient in the layout that suits it best


def prepare(
    data: EfficiencyData, device: torch.device, stack: contextlib.ExitStack
) -> tuple[list[Case], dict[str, Any]]:
    cases = []
    for size in sizes(data):
        for name in SCANS:
            for dtype in dtypes(data, device):
                said = {"scan": name, **size, "dtype": name_of(dtype)}
                cases.append((said, partial(time_scan, data, device, said)))
    return cases, {}


def time_scan(data: EfficiencyData, device: torch.device, said: Point, before: list[Point]) -> list[Point]:
    """Times forward, backward, and both as in a training step: our scan first, then other libraries'."""
    cell, dtype = SCANS[said["scan"]], getattr(torch, said["dtype"])
    shape = said["batch"], said["length"], said["width"]
    bandwidth = copy_bandwidth(device.type, data.seconds)  # measured anew, as a shared machine changes by the second
    leaves, weight = draw(cell, shape, dtype, device), torch.randn(shape).to(device, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = with_gradients(scan_of(cell, "reference"), wide, weight.double())
    found = with_gradients(scan_of(cell), leaves, weight)
    error = max(
        check(f"{said['scan']} {shape} {said['dtype']}, result {i}", a, e, TOLERANCE[dtype])
        for i, (a, e) in enumerate(zip(found, expected, strict=True))
    )
    peers: dict[str, Peer] = {}
    if said["scan"] == "minGRU" and dtype == torch.float32:
        peers["log-space"] = scan_of(cell, "log"), leaves, weight
    if said["scan"] == "linear":
        peers = linear_peers(device, *(x.detach() for x in leaves), weight)
    points = []
    for which, moved in zip(PASSES, bytes_moved(cell, dtype), strict=True):
        numbers = {"bytes": math.prod(shape) * moved, "bandwidth": bandwidth}
        timer = Timer(data, device, said | {"pass": which})
        ours = partial(run_of, scan_of(cell), leaves, weight, which)
        # Not by turns: a slow one would empty the caches for ours.
        timer.measure({"minrnn": ours}, lambda *_, numbers=numbers: numbers | {"error": error})
        for name, peer in peers.items():
            errors: dict[str, float] = {}
            build = partial(run_of_peer, name, peer, which, expected[0], PEER_TOLERANCE[dtype], errors)
            timer.measure({name: build}, lambda *_, errors=errors: errors)
        points += timer.points
    return points


def scan_of(cell: str, backend: str = "auto") -> Scan:
    return lambda *inputs: scan(CELLS[cell], inputs, backend=backend)


def draw(cell: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    inputs = [torch.randn(shape) for _ in CELLS[cell].inputs]
    if cell == "linear":
        inputs[0] = torch.rand(shape)
    return [x.to(device, dtype).requires_grad_() for x in inputs]


def with_gradients(f: Scan, leaves: list[Tensor], weight: Tensor) -> list[Tensor]:
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def bytes_moved(cell: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """The fewest bytes per element that each pass moves: every tensor it needs, once.

    The linear scan's backward does not need b.
    """
    n, size = len(CELLS[cell].inputs), dtype.itemsize
    forward, backward = (n + 1) * size, (2 * n + 2 - (cell == "linear")) * size
    return forward, backward, forward + backward


def run_of(f: Scan, leaves: list[Tensor], weight: Tensor, which: str) -> Call:
    if which == "forward":
        return torch.no_grad()(lambda: f(*leaves))
    if which == "both":
        return lambda: torch.autograd.grad(f(*leaves), leaves, weight)
    out = f(*leaves)
    return lambda: torch.autograd.grad(out, leaves, weight, retain_graph=True)


def run_of_peer(name: str, peer: Peer, which: str, expected: Tensor, most: float, errors: dict[str, float]) -> Call:
    """The run to be timed, after a check of the result, whose error is stored in `errors`."""
    f, leaves, weight = peer
    h = f(*leaves).detach()
    errors["error"] = check(name, h.mT if name == "accelerated-scan" else h, expected, most)
    return run_of(f, leaves, weight, which)


def linear_peers(device: torch.device, a: Tensor, b: Tensor, weight: Tensor) -> dict[str, Peer]:
    """Other libraries' scans of h_t = a_t h_{t-1} + b_t."""
    # Imported where they are called: some compile on import, and a failure there is recorded like any other.
    peers = {}
    if device.type == "cuda" and importlib.util.find_spec("accelerated_scan"):
        inputs = [x.mT.contiguous().requires_grad_() for x in (a, b)]  # (B, D, T)
        peers["accelerated-scan"] = accelerated_scan, inputs, weight.mT.contiguous()
    if device.type == "cuda" and importlib.util.find_spec("fla"):
        inputs = [a.log().requires_grad_(), b.clone().requires_grad_()]
        peers["fla chunk_hgrn"] = partial(hgrn, "chunk_hgrn"), inputs, weight
        peers["fla fused_recurrent_hgrn"] = partial(hgrn, "fused_recurrent_hgrn"), inputs, weight
    return peers


def accelerated_scan(a: Tensor, b: Tensor) -> Tensor:
    from accelerated_scan.warp import scan as warp_scan

    return warp_scan(a, b)


def hgrn(name: str, log_a: Tensor, b: Tensor) -> Tensor:
    import fla.ops.hgrn

    return getattr(fla.ops.hgrn, name)(b, log_a)[0]


def prepare_precision(
    data: EfficiencyData, device: torch.device, stack: contextlib.ExitStack
) -> tuple[list[Case], dict[str, Any]]:
    cases = []
    for size in sizes(data):
        for dtype in dtypes(data, device):
            said = {"scan": "minGRU", **size, "dtype": name_of(dtype), "pass": "forward"}
            cases.append((said, partial(errors_of, data, device, said)))
    return cases, {}


def errors_of(data: EfficiencyData, device: torch.device, said: Point, before: list[Point]) -> list[Point]:
    """Errors of minGRU's states against the float64 loop, from normal pre-activations rounded before both."""
    torch.manual_seed(said["length"])
    dtype, shape = getattr(torch, said["dtype"]), (said["batch"], said["length"], said["width"])
    inputs = [torch.randn(shape).to(dtype) for _ in range(2)]
    expected = scan_of("mingru_g", "reference")(*(x.double() for x in inputs))
    timer = Timer(data, device, said)
    for name, backend in BACKENDS.items():
        h = scan_of("mingru_g", backend)(*(x.to(device) for x in inputs)).cpu()
        values = {
            "error": relative_error(h, expected), "worst": ((h.double() - expected).abs() / expected).max().item()
        }  # fmt: skip
        if name == "minrnn":
            check(f"minGRU {shape} {said['dtype']}", h, expected, TOLERANCE[dtype])
        if all(map(math.isfinite, values.values())):
            timer.note(name, "done", **values)
        else:
            timer.note(name, "failed", "its states are no finite numbers")
    return timer.points
