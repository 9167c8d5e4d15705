"""`make bench`: scans and layers on this machine, against their peers and against the machine's copy limit.

    python -m benchmarks.run [cpu|cuda] [--only kernels layers precision training language decision]

Every case is first checked against the float64 loop, peers' scans and layers too; one of ours that is wrong stops the
benchmark, a peer's that is wrong or fails is named so and not timed. Peers that are not installed are left out.
Writes results/bench/<device>.json and then every table (tables.py).
"""

import argparse
import importlib.util
import json
from functools import partial
from pathlib import Path

import torch

import minrnn
from experiments.machine import commit, hardware, versions
from experiments.measure import copy_bandwidth, relative_error, seconds, summary
from minrnn.ops.cells import CELLS
from minrnn.ops.scan import scan

from . import tables
from .decision import decision
from .training import language, training

KERNEL_SHAPES = {
    "cpu": [(64, 256, 768), (8, 1024, 384), (4, 4096, 384), (1, 65536, 64)],
    "cuda": [(64, 512, 384), (64, 4096, 384), (8, 4096, 2048), (1, 65536, 1024)],
}
KERNEL_CELLS = ("mingru_g", "minlstm_g", "linear")
# (B, T, input, hidden). The first is that of the complaint lucidrains/minGRU-pytorch#13.
LAYER_SHAPES = {
    "cpu": [(64, 1000, 10, 100), (16, 512, 384, 384), (64, 128, 128, 128), (1, 4096, 256, 256)],
    "cuda": [(64, 1000, 10, 100), (64, 256, 384, 384), (64, 512, 384, 384), (64, 4096, 384, 384)],
}
PRECISION_LENGTHS = (512, 1024, 4096, 16384, 65536)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
PEER_TOLERANCE = {
    torch.float32: 2e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-2,
}  # log space in float32 is off by 1e-3 at T = 65536


def dtypes(device: str) -> tuple[torch.dtype, torch.dtype]:
    """float32, and the 16-bit type that the device has: a T4 has no bfloat16."""
    old = device == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    return torch.float32, torch.float16 if old else torch.bfloat16


def bytes_moved(cell: str, dtype: torch.dtype) -> tuple[int, int]:
    """The fewest bytes an element, forward and backward: each tensor that is needed, once.

    The linear scan's backward does not need b.
    """
    n, size = len(CELLS[cell].inputs), dtype.itemsize
    return (n + 1) * size, (2 * n + 2 - (cell == "linear")) * size


def check(name: str, actual: list, expected: list, tolerance: float) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = relative_error(a.cpu(), e.cpu())
        if not error <= tolerance:
            raise SystemExit(f"{name}: result {i} is off by {error:.1e}, allowed {tolerance:.0e}; not measured")


def with_gradients(f, leaves, weight) -> list:
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def draw(cell: str, shape, dtype, device) -> list:
    inputs = [torch.randn(shape) for _ in CELLS[cell].inputs]
    if cell == "linear":
        inputs[0] = torch.rand(shape)
    return [x.to(device, dtype).requires_grad_() for x in inputs]


def time_both(f, leaves, weight, device, **options) -> dict[str, dict]:
    """forward, backward, and both together as a training step does them."""
    out = f(*leaves)

    def forward():
        with torch.no_grad():
            f(*leaves)

    cases = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, leaves, weight, retain_graph=True),
        "both": lambda: torch.autograd.grad(f(*leaves), leaves, weight),
    }
    return {name: summary(seconds(case, device, **options)) for name, case in cases.items()}


def accelerated_scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from accelerated_scan.warp import scan as warp_scan

    return warp_scan(a, b)


def hgrn(name: str, log_a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import fla.ops.hgrn

    return getattr(fla.ops.hgrn, name)(b, log_a)[0]


def linear_peers(device: str, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> dict[str, tuple]:
    """Scans of h_t = a_t h_{t-1} + b_t by others, each with its inputs and weight as it likes them best."""
    # Imported where they are called: some compile on import, and what fails there is recorded as any failure.
    peers = {}
    if device == "cuda" and importlib.util.find_spec("accelerated_scan"):
        inputs = [x.mT.contiguous().requires_grad_() for x in (a, b)]  # (B, D, T)
        peers["accelerated-scan"] = accelerated_scan, inputs, weight.mT.contiguous()
    if device == "cuda" and importlib.util.find_spec("fla"):
        inputs = [a.log().requires_grad_(), b.clone().requires_grad_()]
        peers["fla chunk_hgrn"] = partial(hgrn, "chunk_hgrn"), inputs, weight
        peers["fla fused_recurrent_hgrn"] = partial(hgrn, "fused_recurrent_hgrn"), inputs, weight
    return peers


def kernels(device: str) -> list[dict]:
    rows = []
    for shape in KERNEL_SHAPES[device]:
        bandwidth = copy_bandwidth(device)  # beside what it is compared with: a shared machine changes by the second
        for cell in KERNEL_CELLS:
            for dtype in dtypes(device):
                leaves = draw(cell, shape, dtype, device)
                weight = torch.randn(shape).to(leaves[0])
                wide = [x.detach().double().requires_grad_() for x in leaves]

                def run(*x, cell=cell, backend="auto"):
                    return scan(CELLS[cell], x, backend=backend)

                expected = with_gradients(partial(run, backend="reference"), wide, weight.double())
                check(f"{cell} {shape} {dtype}", with_gradients(run, leaves, weight), expected, TOLERANCE[dtype])
                row = {"shape": shape, "cell": cell, "dtype": str(dtype).removeprefix("torch.")}
                row |= {"copy_bandwidth": bandwidth, "bytes_per_element": bytes_moved(cell, dtype)}
                row["minrnn"] = time_both(run, leaves, weight, device)
                peers = {}
                if cell == "mingru_g" and dtype == torch.float32:
                    peers["log-space"] = partial(run, backend="log"), leaves, weight
                if cell == "linear":
                    peers = linear_peers(device, *(x.detach() for x in leaves), weight)
                for name, (peer, peer_leaves, peer_weight) in peers.items():
                    try:  # a peer's failure is a result: what it cannot do
                        h = peer(*peer_leaves).detach()
                        error = relative_error(h.mT if name == "accelerated-scan" else h, expected[0])
                        if not error <= PEER_TOLERANCE[dtype]:
                            raise ArithmeticError(f"relative error {error:.1e}")
                        row[name] = time_both(peer, peer_leaves, peer_weight, device, at_least=0.5, runs=(3, 30))
                    except Exception as error:
                        row[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
                rows.append(row)
                print(tables.kernel_line(row), flush=True)
                del leaves, weight, wide, expected
    return rows


def layers(device: str) -> list[dict]:
    rows = []
    for B, T, width, H in LAYER_SHAPES[device]:
        for dtype in dtypes(device)[: 1 if device == "cpu" else 2]:
            x = torch.randn(B, T, width, device=device, dtype=dtype)
            weight = torch.randn(B, T, H, device=device, dtype=dtype)
            make = partial(dict, batch_first=True, device=device, dtype=dtype)
            candidates = {
                "MinGRU": minrnn.MinGRU(width, H, **make()),
                "MinLSTM": minrnn.MinLSTM(width, H, **make()),
                "torch.nn.GRU": torch.nn.GRU(width, H, **make()),
                "torch.nn.LSTM": torch.nn.LSTM(width, H, **make()),
            }
            candidates["log-space minGRU"] = minrnn.MinGRU(width, H, **make(), backend="log")
            if importlib.util.find_spec("minGRU_pytorch") and width == H:
                from minGRU_pytorch import minGRU

                candidates["minGRU-pytorch"] = minGRU(width).to(device, dtype)
            check_layers(candidates, x, dtype)
            row = {"shape": (B, T, width, H), "dtype": str(dtype).removeprefix("torch.")}
            for name, layer in candidates.items():
                parameters = list(layer.parameters())

                def step(layer=layer, parameters=parameters, x=x, weight=weight):
                    out = layer(x)
                    torch.autograd.grad(out[0] if isinstance(out, tuple) else out, parameters, weight)

                if device == "cuda":
                    step()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    step()
                    peak = torch.cuda.max_memory_allocated() - before
                row[name] = summary(seconds(step, device, at_least=2.0, runs=(5, 60)))
                if device == "cuda":
                    row[name]["peak_bytes"] = peak
            rows.append(row)
            print(tables.layer_line(row), flush=True)
    return rows


def check_layers(candidates: dict, x: torch.Tensor, dtype: torch.dtype) -> None:
    """The layers of one family, given the same weights, compute the same; ours is held to the float64 loop."""
    first = slice(0, 2)
    for name, cls in {"MinGRU": minrnn.MinGRU, "MinLSTM": minrnn.MinLSTM}.items():
        ours = candidates[name]
        exact = cls(ours.input_size, ours.hidden_size, batch_first=True, dtype=torch.float64, backend="reference")
        exact.load_state_dict(ours.state_dict())
        expected = exact(x[first].cpu().double())[0]
        # In 16 bits, and with tf32, the projection's rounding comes on top of the scan's.
        check(name, [ours(x[first])[0]], [expected], 5e-6 if dtype == torch.float32 else 2e-2)
    if dtype != torch.float32:
        return  # log space in 16 bits is wrong throughout, see the precision table; timed all the same
    expected = [candidates["MinGRU"](x[first])[0]]
    weights = candidates["MinGRU"].state_dict()
    candidates["log-space minGRU"].load_state_dict(weights)
    check("log-space minGRU", [candidates["log-space minGRU"](x[first])[0]], expected, PEER_TOLERANCE[dtype])
    if "minGRU-pytorch" in candidates:  # it has no bias, and stacks candidate and gate the other way round
        ours = minrnn.MinGRU(x.shape[-1], x.shape[-1], bias=False, batch_first=True, device=x.device)
        gate, candidate = weights["weight_ih_l0"].chunk(2)
        ours.load_state_dict({"weight_ih_l0": weights["weight_ih_l0"]})
        candidates["minGRU-pytorch"].load_state_dict({"to_hidden_and_gate.weight": torch.cat([candidate, gate])})
        peer = [candidates["minGRU-pytorch"](x[first])]
        check("minGRU-pytorch", peer, [ours(x[first])[0]], PEER_TOLERANCE[dtype])


def precision(device: str) -> list[dict]:
    """Relative error of the states against the float64 loop: minGRU, normal pre-activations, 64 channels."""
    rows = []
    for T in PRECISION_LENGTHS:
        torch.manual_seed(T)
        inputs = [torch.randn(1, T, 64) for _ in range(2)]
        for dtype in dtypes(device):
            rounded = tuple(x.to(dtype) for x in inputs)
            expected = scan(CELLS["mingru_g"], tuple(x.double() for x in rounded), backend="reference")
            here = tuple(x.to(device) for x in rounded)
            for backend in ("log", "reference", "auto"):
                h = scan(CELLS["mingru_g"], here, backend=backend).cpu()
                rows.append({"T": T, "dtype": str(dtype).removeprefix("torch."), "backend": backend})
                rows[-1]["error"] = relative_error(h, expected)
                rows[-1]["worst"] = ((h.double() - expected).abs() / expected).max().item()
        print(tables.precision_line(rows[-6:]), flush=True)
    return rows


PARTS = {
    "precision": precision,
    "kernels": kernels,
    "layers": layers,
    "training": training,
    "language": language,
    "decision": decision,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder (results)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    path = arguments.results / "bench" / f"{device}.json"
    facts = hardware(device) | versions("numba", "triton")
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.only:
        print(f"\n{name} on {device}", flush=True)
        results[name] = {"rows": PARTS[name](device), "hardware": facts, **commit("minrnn", "benchmarks")}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")  # a run that is killed leaves the old results
        whole.write_text(json.dumps(results, indent=1) + "\n")
        whole.replace(path)
    tables.main(arguments.results)


if __name__ == "__main__":
    main()
