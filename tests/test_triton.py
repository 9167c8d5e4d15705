"""The Triton backend against the plain loop, and its kernels compiled ahead of time.

Without a GPU the kernels run in Triton's interpreter (conftest sets TRITON_INTERPRET=1), on small shapes. Compiling
needs no GPU at all; it runs in a process of its own, as Triton decides at import whether it interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from minrnn.ops import triton_scan  # noqa: E402
from minrnn.ops.cells import CELLS, LINEAR  # noqa: E402
from minrnn.ops.scan import scan  # noqa: E402
from tests.oracle import assert_each_is_alone, assert_matches_float64, end_to_end, evaluate  # noqa: E402

MINGRU, MINLSTM = CELLS["mingru_g"], CELLS["minlstm_g"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: too large for the interpreter")


@pytest.fixture(params=["whole", "split"])
def regime(request, monkeypatch):
    """Time walked by one program, or in chunks of 16 steps with the scan over chunks in tiles of two."""
    if request.param == "split":
        split_into(monkeypatch, 16)
        monkeypatch.setattr(triton_scan, "CARRY_CHUNKS", 2)
    return request.param


def split_into(monkeypatch, steps):
    monkeypatch.setattr(triton_scan, "_chunk_steps", lambda B, T, D, device: min(steps, T))


def make(cell, B, T, D, dtype=torch.float32, seed=0):
    """Inputs, h0, resets and the gradient of the states, on the device."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(B, T, D, generator=generator) for _ in cell.inputs]
    if cell == LINEAR:
        inputs[0] = inputs[0].tanh()
    h0, grad = torch.randn(B, D, generator=generator), torch.randn(B, T, D, generator=generator)
    resets = (torch.rand(B, T, generator=generator) < 0.15).to(DEVICE)
    return *([x.to(DEVICE, dtype) for x in group] for group in (inputs, [h0])), resets, grad.to(DEVICE, dtype)


def check(cell, inputs, h0, resets, reverse, grad):
    assert_matches_float64(cell, inputs, h0, resets, reverse, "triton", weight=grad)


@pytest.mark.parametrize("given, reverse", [("", False), ("h0", True), ("resets", False), ("h0 and resets", True)])
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_every_cell(cell, given, reverse, regime):
    inputs, (h0,), resets, grad = make(cell, 2, 63, 5)
    check(cell, inputs, h0 if "h0" in given else None, resets if "resets" in given else None, reverse, grad)


@pytest.mark.parametrize("cell, reverse", [(LINEAR, False), (MINGRU, True), (MINLSTM, False)], ids=str)
def test_sequences_end_to_end(cell, reverse, regime):
    """Shorter than a chunk, as long as one and as several: each as if it were alone, but for other chunks' rounding."""
    inputs, h0, resets, weight, lengths = end_to_end(cell, [1, 40, 20, 16, 32], 5, device=DEVICE)
    resets = resets if reverse else None
    assert_each_is_alone(cell, inputs, h0, resets, reverse, "triton", weight, lengths, 1e-6 * (regime == "split"))


@pytest.mark.parametrize("B, T, D", [(1, 1, 1), (3, 2, 33), (2, 15, 1), (1, 16, 100), (1, 17, 32), (1, 67, 33)])
def test_shapes(B, T, D, regime):
    inputs, (h0,), resets, grad = make(MINGRU, B, T, D)
    check(MINGRU, inputs, h0, resets, False, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", [LINEAR, MINGRU, MINLSTM, CELLS["minlstm_unnormalized_g"]], ids=lambda cell: cell.name)
def test_dtypes(cell, dtype, regime):
    if DEVICE == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")
    inputs, (h0,), resets, grad = make(cell, 2, 37, 5, dtype)
    check(cell, inputs, h0, resets, False, grad)


def layouts():
    B, T, D = 3, 21, 5
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    fused = randn(B, T, 2 * D)
    time_major = randn(T, B, 2 * D).transpose(0, 1)
    sparse = torch.rand(T, 2 * B, generator=generator).to(DEVICE) < 0.2
    plain = randn(B, T, D), randn(B, T, D)
    row, step, number = randn(1, T, D).expand(B, T, D), randn(B, 1, D).expand(B, T, D), randn(1, 1, 1).expand(B, T, D)
    h0 = randn(B, 2 * D)[:, D:]
    return {
        "halves of a projection": (fused[..., :D], fused[..., D:], h0, None, plain[0]),
        "time outermost": (time_major[..., D:], time_major[..., :D], h0, sparse.t()[::2], time_major[..., :D]),
        "one outermost": (plain[0], time_major[..., :D], h0, sparse.t()[:B], time_major[..., D:]),
        "expanded": (row, step, h0[:1].expand(B, D), sparse.t()[:1].expand(B, T), number),
        "every second step": (
            randn(B, 2 * T, D)[:, ::2], plain[1], randn(2 * B, D)[::2], None, randn(B, 2 * T, D)[:, ::2]
        ),
        "channels apart": (randn(B, D, T).mT, plain[1], randn(D, B).mT, None, randn(B, D, T).mT),
    }  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout, reverse, regime):
    gate, candidate, h0, resets, grad = layouts()[layout]
    check(MINGRU, (gate, candidate), h0, resets, reverse, grad)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_fills_what_it_is_given(reverse, regime):
    """Called as scan.py does, with outputs of odd strides inside larger memory that must stay as it is."""
    cell, (B, T, D) = MINLSTM, (2, 19, 5)
    inputs, (h0,), resets, grad = make(cell, B, T, D)
    memory = torch.full((5, T + 2, B, D + 3), torch.nan, device=DEVICE)
    out, *grads = memory[:4, 1:-1, :, 2:-1].transpose(1, 2)
    grad_h0 = torch.full_like(h0, torch.nan)
    triton_scan.forward(cell, tuple(inputs), h0, resets, None, reverse, out)
    triton_scan.backward(cell, tuple(inputs), h0, resets, None, reverse, out, grad, tuple(grads), grad_h0)
    expected = evaluate(cell, inputs, h0, resets, reverse, "reference", grad)
    for x, (name, y) in zip((out, *grads, grad_h0), expected.items(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda message, name=name: f"{name}: {message}")
    assert memory.isnan().sum() == memory.numel() - 4 * out.numel()


@pytest.mark.parametrize("cell", [cell for cell in CELLS.values() if cell != LINEAR], ids=lambda cell: cell.name)
def test_saturated_gates(cell, regime):
    inputs, (h0,), resets, grad = make(cell, 2, 37, 5)
    for x in inputs[:-1]:
        x.mul_(30)
        x[:, ::3] = 1e4 * x[:, ::3].sign()
    inputs[-1][:, ::4] *= 1e4
    check(cell, inputs, h0, resets, False, grad)


def same_special_values(cell, inputs, h0, resets, reverse, grad):
    got = evaluate(cell, inputs, h0, resets, reverse, "triton", grad)
    for name, x in evaluate(cell, inputs, h0, resets, reverse, "reference", grad).items():
        y = got[name]
        torch.testing.assert_close(
            y, x, rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("reverse", [False, True], ids=["with resets", "reverse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_special_values_travel_as_in_the_loop(cell, value, reverse, regime):
    """One special value a channel: in an input, in h0 or in the gradient; in time before or after a reset."""
    n = len(cell.inputs)
    inputs, (h0,), resets, grad = make(cell, 2, 53, 2 * n + 6)
    resets[:, 30:] = False
    resets[0, 40] = True
    for i, x in enumerate(inputs):
        x[:, 7, 2 * i] = x[:, 35, 2 * i + 1] = value
    h0[:, 2 * n] = value
    grad[:, 9, 2 * n + 1] = grad[:, 45, 2 * n + 2] = value
    same_special_values(cell, inputs, h0, None if reverse else resets, reverse, grad)


@pytest.mark.parametrize("regime", ["split"], indirect=True)
def test_products_beyond_the_range_of_floats(regime):
    """Where a chunk's product overflows or underflows, a zero or infinite state goes on as it does in the loop."""
    a = torch.tensor([1e4, 1e4, 1e-4, 1e-4, 1e-4, 0.0, -1e-4]).expand(1, 80, 7).to(DEVICE)
    h0 = torch.tensor([[0.0, 1.0, torch.inf, -torch.inf, 1.0, torch.inf, torch.inf]]).to(DEVICE)
    b, grad = torch.zeros(1, 80, 7, device=DEVICE), torch.zeros(1, 80, 7, device=DEVICE)
    for reverse in (False, True):
        same_special_values(LINEAR, (a, b), h0, None, reverse, grad)
        edge = grad.clone()
        edge[:, 0 if reverse else -1] = h0
        same_special_values(LINEAR, (a, b), torch.zeros_like(h0), None, reverse, edge)


def test_channels_do_not_touch(regime):
    """Not a bit of a channel changes because its neighbour is NaN."""
    inputs, (h0,), resets, grad = make(MINGRU, 1, 53, 4)
    clean = evaluate(MINGRU, inputs, h0, None, False, "triton", grad)
    for x in (*inputs, grad):
        x[:, 20, 1] = torch.nan
    dirty = evaluate(MINGRU, inputs, h0, None, False, "triton", grad)
    for name, x in clean.items():
        keep = [0, 2, 3]
        assert torch.equal(x[..., keep], dirty[name][..., keep]), name
    assert dirty["h"][:, 20:, 1].isnan().all()


def test_deterministic(regime):
    inputs, (h0,), resets, grad = make(MINLSTM, 2, 53, 5)
    first = evaluate(MINLSTM, inputs, h0, resets, False, "triton", grad)
    again = evaluate(MINLSTM, inputs, h0, resets, False, "triton", grad)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("B, T, D", [(1, 1024, 8), (1, 65536, 256), (64, 2048, 33), (2, 1_000_003, 1)])
def test_chunks_cover_time_and_fill_the_gpu(B, T, D, monkeypatch):
    class Properties:
        multi_processor_count = 100

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    steps = triton_scan._chunk_steps(B, T, D, torch.device("cuda"))
    assert triton_scan.MIN_CHUNK_STEPS <= steps < T and steps % triton_scan.FORWARD_STEPS == 0
    programs = B * -(-D // triton_scan.BLOCK_D) * -(-T // steps)
    assert programs <= 2 * triton_scan.WARPS_PER_SM * 100
    assert programs >= triton_scan.WARPS_PER_SM * 100 // 2 or steps == triton_scan.MIN_CHUNK_STEPS
    assert triton_scan._chunk_steps(B, 1000, D, torch.device("cuda")) == 1000
    assert triton_scan._chunk_steps(256, T, 1024, torch.device("cuda")) == T


@needs_gpu
@pytest.mark.parametrize("B, T, D", [(1, 65536, 33), (8, 512, 1000), (70000, 3, 33), (1, 4096, 1)])
@pytest.mark.parametrize("cell", [LINEAR, MINGRU, MINLSTM], ids=lambda cell: cell.name)
def test_large_shapes(cell, B, T, D):
    inputs, (h0,), resets, grad = make(cell, B, T, D)
    check(cell, inputs, h0, resets, False, grad)
    check(cell, inputs, h0, None, True, grad)


@needs_gpu
def test_offsets_beyond_32_bits():
    B, T, D = 3, 1100, 700_000  # 2.3e9 elements: 4.6 GB a tensor
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    gate = torch.randn(1, T, D, device=DEVICE, dtype=torch.float16).expand(B, T, D)
    out = scan(CELLS["mingru_identity"], (gate, gate), backend="triton")
    torch.testing.assert_close(
        out[-1, :, -5:], scan(CELLS["mingru_identity"], (gate[:1, :, -5:],) * 2, backend="triton")[0]
    )


@needs_gpu
def test_launched_kernels_stay_in_registers(regime, monkeypatch):
    """What the launches really compiled, for an aligned and an unaligned layout: no spills, no shared memory."""
    compiled = []

    def launch(kernel, programs, **arguments):
        compiled.append(kernel[(programs,)](**arguments, **triton_scan.LAUNCH))

    monkeypatch.setattr(triton_scan, "_launch", launch)
    for D in (64, 33):
        inputs, (h0,), resets, grad = make(MINGRU, 2, 64, D)
        evaluate(MINGRU, inputs, h0, resets, False, "triton", grad)
    kernels = {id(kernel): kernel for kernel in compiled}
    assert len(compiled) == 2 * len(kernels), "one binary must serve both layouts"
    for kernel in kernels.values():
        assert kernel.n_spills == 0 and kernel.metadata.shared == 0, kernel.name


# What is compiled ahead of time: cell, dtype, resets given, time split.
COMPILED = [
    *(("mingru_g", dtype, False, False) for dtype in ("float32", "float16", "bfloat16")),
    *(("mingru_g", dtype, True, True) for dtype in ("float32", "bfloat16")),
    *((cell, "float32", True, True) for cell in ("linear", "minlstm_g", "minlstm_unnormalized_g")),
    *((cell, "float32", False, False) for cell in CELLS if cell.endswith(("_identity", "_signed_g"))),
    ("minlstm_g", "float64", True, True),
]  # fmt: skip
ARCHITECTURES = (75, 80, 90)


def launches(cell, dtype, resets, split):
    """Kernel and arguments of every launch that a forward and a backward pass make, none of them run."""
    found = []
    triton_scan._launch = lambda kernel, programs, **arguments: found.append((kernel, arguments))
    triton_scan._chunk_steps = lambda B, T, D, device: 32 if split else T
    x = torch.empty(2, 64, 32, dtype=dtype)
    inputs = (x,) * len(cell.inputs)
    resets = torch.empty(2, 64, dtype=torch.bool) if resets else None
    triton_scan.forward(cell, inputs, x[:, 0], resets, None, False, x)
    triton_scan.backward(cell, inputs, x[:, 0], resets, None, False, x, x, inputs, x[:, 0])
    return found


def compile_ahead(kernel, arguments, architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    names[torch.uint8] = "u8"
    arguments = arguments | {"BLOCK_D": triton_scan.LAUNCH["BLOCK_D"]}
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = parameter.annotation_type
    options = {name: value for name, value in triton_scan.LAUNCH.items() if name != "BLOCK_D"}
    return compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", architecture, 32), options=options)


def resources(cubin):
    """Registers, stack and local memory of a kernel, as the cuobjdump that comes with Triton reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def compile_all():
    """Prints one line of JSON per compiled kernel."""
    for cell, dtype, resets, split in COMPILED:
        for kernel, arguments in launches(CELLS[cell], getattr(torch, dtype), resets, split):
            for architecture in ARCHITECTURES:
                if dtype == "bfloat16" and architecture < 80:
                    continue
                binary = compile_ahead(kernel, arguments, architecture)
                mode = "adjoint " * arguments.get("ADJOINT", False) + "summary" * (arguments.get("out", True) is None)
                if kernel is triton_scan._carry_kernel:
                    mode = mode.removesuffix("summary")
                line = {"cell": cell, "dtype": dtype, "resets": resets, "kernel": kernel.__name__, "mode": mode.strip()}
                line |= {"sm": architecture, "shared": binary.metadata.shared} | resources(binary.asm["cubin"])
                line["shuffles"] = len(re.findall(r"\bshfl\.", binary.asm["ptx"]))
                print(json.dumps(line), flush=True)


def test_kernels_compile_without_spills_shared_memory_or_shuffles(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    table = {}
    for line in lines:
        key = (line["kernel"], line["mode"], line["cell"], line["dtype"], "resets" if line["resets"] else "")
        table.setdefault(key, {})[line["sm"]] = line["REG"]
    print("\nregisters per thread on " + ", ".join(f"sm_{sm}" for sm in ARCHITECTURES))
    for key, registers in table.items():
        print("  ".join(f"{part:{width}}" for part, width in zip(key, (16, 15, 30, 8, 6), strict=True)), registers)
    modes = {(line["kernel"], line["mode"]) for line in lines}
    assert modes == {
        ("_scan_kernel", ""), ("_scan_kernel", "summary"), ("_scan_kernel", "adjoint summary"),
        ("_carry_kernel", ""), ("_carry_kernel", "adjoint"), ("_gradient_kernel", ""),
    }  # fmt: skip
    assert {line["sm"] for line in lines} == set(ARCHITECTURES)
    for line in lines:
        assert line["shared"] == 0 and line["STACK"] == 0 and line["LOCAL"] == 0, line
        if line["kernel"] != "_carry_kernel":
            assert line["shuffles"] == 0, line
            if line["cell"] == "mingru_g" and not line["resets"]:
                assert line["REG"] <= 168, line  # 12 warps on every multiprocessor


if __name__ == "__main__":
    compile_all()
