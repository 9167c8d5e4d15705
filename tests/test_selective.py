"""The selective scan against a numpy loop in float64, output and every gradient by name, on every backend."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from minrnn.ops import selective
from minrnn.ops.selective import selective_scan

CUDA = torch.cuda.is_available()
DEVICE = {"reference": "cpu", "cpu": "cpu", "triton": "cuda" if CUDA else "cpu"}
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
COMPILED = ("cpu", pytest.param("triton", marks=NO_TRITON))
backends = pytest.mark.parametrize("backend", COMPILED)
NAMES = ("u", "dt", "A", "B", "C", "h0")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


def draw(batch, T, D, N, dtype=torch.float32, device="cpu", h0=True):
    """Steps dt between 1e-3 and 1, -A between 0 and N: exponents from none to several times e."""
    shapes = {"u": (batch, T, D), "dt": (batch, T, D), "A": (D, N), "B": (batch, T, N), "C": (batch, T, N)}
    shapes |= {"h0": (batch, D, N)} if h0 else {}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["dt"] = 10 ** (-3 * torch.rand_like(inputs["dt"]))
    inputs["A"] = -torch.rand_like(inputs["A"]) * N
    return {name: x.to(device, dtype) for name, x in inputs.items()}


def numpy_loop(u, dt, A, B, C, h0, grad, grad_last):
    """{name: array} of the outputs, and of the gradients of sum(grad * y) + sum(grad_last * last), step by step."""
    T = u.shape[1]
    h = [h0]
    for t in range(T):
        h.append(np.exp(dt[:, t, :, None] * A) * h[t] + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :])
    out = {"y": np.zeros_like(u), "last": h[T]} | {f"grad of {name}": np.zeros_like(x) for name, x in
           zip(NAMES, (u, dt, A, B, C, h0), strict=True)}  # fmt: skip
    s = grad_last
    for t in reversed(range(T)):
        out["y"][:, t] = np.einsum("bn,bdn->bd", C[:, t], h[t + 1])
        s = s + grad[:, t, :, None] * C[:, t, None, :]
        a = np.exp(dt[:, t, :, None] * A)
        out["grad of C"][:, t] = np.einsum("bd,bdn->bn", grad[:, t], h[t + 1])
        out["grad of B"][:, t] = np.einsum("bdn,bd->bn", s, dt[:, t] * u[:, t])
        out["grad of u"][:, t] = np.einsum("bdn,bn->bd", s, B[:, t]) * dt[:, t]
        out["grad of dt"][:, t] = np.einsum("bdn,bn->bd", s, B[:, t]) * u[:, t] + np.einsum(
            "bdn,bdn,dn->bd", s, a * h[t], A
        )
        out["grad of A"] += np.einsum("bdn,bd->dn", s * a * h[t], dt[:, t])
        s = s * a
    return out | {"grad of h0": s}


def evaluate(inputs, weights, backend):
    """{name: tensor}, as `numpy_loop`; a weight that is None leaves its output out of the loss."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, last = selective_scan(**leaves, backend=backend)
    loss = sum((x * w).sum() for x, w in zip((y, last), weights, strict=True) if w is not None)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {f"grad of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return {"y": y.detach(), "last": last.detach()} | grads


def assert_matches_loop(inputs, backend, weights=None, tolerance=None):
    """Relative error in the Frobenius norm, each output and gradient by itself."""
    (batch, T, D), N = inputs["u"].shape, inputs["A"].shape[1]
    if weights is None:
        weights = torch.randn(batch, T, D).to(inputs["u"]), torch.randn(batch, D, N).to(inputs["u"])
    got = evaluate(inputs, weights, backend)
    wide = {name: x.detach().double().cpu().numpy() for name, x in inputs.items()}
    wide.setdefault("h0", np.zeros((batch, D, N)))
    shapes = (batch, T, D), (batch, D, N)
    wide_weights = [
        np.zeros(shape) if w is None else w.double().cpu().numpy() for w, shape in zip(weights, shapes, strict=True)
    ]
    expected = numpy_loop(**wide, grad=wide_weights[0], grad_last=wide_weights[1])
    if "h0" not in inputs:
        del expected["grad of h0"]
    assert got.keys() == expected.keys()
    for name, e in expected.items():
        g = got[name]
        assert g.dtype == inputs["u"].dtype and g.shape == e.shape, name
        error, norm = np.linalg.norm(g.double().cpu().numpy() - e), np.linalg.norm(e)
        # within the tolerance of what the numbers are sums of, where these cancel or there are few
        assert error <= (tolerance or TOLERANCE[g.dtype]) * norm, f"{name}: relative error {error / norm:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_shapes(backend, dtype):
    for T in (1, 2, 63, 64, 65, 200):
        for D, N in ((1, 16), (5, 3), (128, 16), (16, 1)):
            assert_matches_loop(draw(2, T, D, N, dtype), backend)
            assert_matches_loop(draw(1, T, D, N, dtype, h0=False), backend)
    assert_matches_loop(draw(3, 33, 150, 5, dtype), backend)


@NO_TRITON
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shapes_in_triton(dtype):
    shapes = [(2, 1, 5, 3), (1, 2, 1, 1), (2, 8, 3, 16), (1, 9, 33, 4), (2, 23, 40, 3)]
    if CUDA:
        shapes += [(2, 200, 128, 16), (3, 65, 100, 64), (2, 63, 7, 200)]
    for shape in shapes:
        assert_matches_loop(draw(*shape, dtype, DEVICE["triton"]), "triton")
        assert_matches_loop(draw(*shape, dtype, DEVICE["triton"], h0=False), "triton")


@pytest.mark.parametrize("batch, D", [(1, 400), (3, 260), (70, 17)])
def test_sequences_divided_into_groups_of_channels(batch, D):
    assert_matches_loop(draw(batch, 40, D, 4), "cpu")


@backends
def test_each_output_alone(backend):
    inputs = draw(2, 19, 5, 3, torch.float64, DEVICE[backend])
    y, last = torch.randn(2, 19, 5).to(inputs["u"]), torch.randn(2, 5, 3).to(inputs["u"])
    assert_matches_loop(inputs, backend, (y, None))
    only_last = evaluate(inputs, (None, last), backend)
    assert not only_last.pop("grad of C").any()
    both = evaluate(inputs, (torch.zeros_like(y), last), backend)
    assert all(torch.equal(x, both[name]) for name, x in only_last.items())


@backends
def test_layouts(backend):
    """Time outermost, every second step, channels outermost, expanded; parts of one projection; h0 transposed."""
    contiguous = draw(3, 21, 18, 4, torch.float64, DEVICE[backend])
    time_first = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in contiguous.items() if x.dim() > 2}
    channels_first = {name: x.mT.contiguous().mT for name, x in contiguous.items()}
    apart = {name: torch.stack([x, x.new_full(x.shape, torch.nan)], 2).flatten(1, 2)[:, ::2]
             for name, x in contiguous.items() if name in ("u", "dt", "B", "C")}  # fmt: skip
    joined = torch.cat([contiguous["B"], contiguous["dt"], contiguous["C"]], -1)
    B, dt, C = joined.split([4, 18, 4], -1)
    weights = torch.randn(3, 21, 18).to(joined), torch.randn(3, 18, 4).to(joined)
    strided_weights = weights[0].mT.contiguous().mT, weights[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expected = evaluate(contiguous, weights, backend)
    for other in (time_first, channels_first, apart, {"B": B, "dt": dt, "C": C}):
        got = evaluate(contiguous | other, strided_weights, backend)
        for name, x in expected.items():
            assert torch.equal(x, got[name]), name
    steady = {name: contiguous[name][:, :1].expand_as(contiguous[name]) for name in ("u", "dt", "B", "C")}
    assert_matches_loop(contiguous | steady | {"h0": contiguous["h0"][:1].expand(3, 18, 4)}, backend)
    number = weights[0].new_ones(()).expand(3, 21, 18)
    assert_matches_loop(contiguous, backend, (number, None))


@backends
def test_exponents_beyond_the_range(backend):
    """exp(dt A) that underflows, steps of zero, and A > 0."""
    inputs = draw(2, 40, 5, 4, device=DEVICE[backend])
    inputs["dt"][:, 10:20] *= 1e4
    inputs["dt"][:, 25:30] = 0
    assert_matches_loop(inputs, backend)
    inputs = draw(2, 12, 5, 4, device=DEVICE[backend])
    inputs["A"] = -inputs["A"]
    assert_matches_loop(inputs, backend, tolerance=1e-5)
    inputs["A"] *= 1e4
    y, last = selective_scan(**inputs, backend=backend)
    assert not (y.isfinite().all() or last.isfinite().all())


@backends
def test_channels_and_sequences_do_not_touch(backend):
    """NaN in a channel, or in a sequence's B, stays there."""
    inputs = draw(2, 11, 18, 4, device=DEVICE[backend])
    inputs["u"][0, 5, 3] = inputs["B"][1, 7, 2] = torch.nan
    y, last = selective_scan(**inputs, backend=backend)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0, 5:, 3] = expected[1, 7:] = True
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(last.isnan().all(-1), expected[:, -1]) is False  # NaN of B stays in its n, that of u does not
    assert last[0, 3].isnan().all() and torch.equal(
        last[1].isnan().any(0).cpu(), torch.tensor([False, False, True, False])
    )


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("h0", (True, False))
def test_first_and_second_derivatives(backend, h0):
    inputs = draw(2, 3, 2, 2, torch.float64, h0=h0)
    leaves = [x.requires_grad_() for x in inputs.values()]
    scan = lambda *x: selective_scan(*x, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)


def test_gradcheck_across_saved_states():
    leaves = [x.requires_grad_() for x in draw(1, 2 * selective.STEPS["cpu"] + 2, 2, 2, torch.float64).values()]
    assert torch.autograd.gradcheck(selective_scan, leaves)


def test_second_derivative_where_inputs_depend_on_each_other():
    inputs = draw(2, 5, 3, 2, torch.float64)
    x = inputs["dt"].requires_grad_()

    def derivatives(backend):
        y, last = selective_scan(**inputs | {"u": (1 - x) * x.cos(), "dt": x}, backend=backend)
        first = torch.autograd.grad(y.sum() + last.square().sum(), x, create_graph=True)[0]
        return first.detach(), *torch.autograd.grad(first.square().sum(), x)

    for actual, expected in zip(derivatives("cpu"), derivatives("reference"), strict=True):
        torch.testing.assert_close(actual, expected)


@backends
def test_whole_is_chunked(backend):
    inputs = draw(2, 23, 5, 3, torch.float64, DEVICE[backend])
    h0 = inputs.pop("h0")
    y, last = selective_scan(**inputs, h0=h0, backend=backend)
    A, state, parts = inputs.pop("A"), h0, []
    for chunk in zip(*(x.split(7, 1) for x in inputs.values()), strict=True):
        part, state = selective_scan(**dict(zip(inputs, chunk, strict=True)), A=A, h0=state, backend=backend)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=1e-13, atol=1e-13)


@backends
@pytest.mark.parametrize("batch, T, D, N", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2), (2, 5, 3, 0)])
def test_empty(backend, batch, T, D, N):
    inputs = draw(batch, T, D, N, torch.float64, DEVICE[backend])
    for given in (inputs, {name: x for name, x in inputs.items() if name != "h0"}):
        assert_matches_loop(given, backend)


def test_results_do_not_depend_on_threads(monkeypatch):
    from minrnn.ops import selective_cpu

    monkeypatch.setattr(selective_cpu, "MIN_STATES_PER_THREAD", 1)
    threads = torch.get_num_threads()
    try:
        for batch, D in ((5, 70), (1, 300), (67, 20)):
            inputs = draw(batch, 50, D, 4)
            weights = torch.randn(batch, 50, D), torch.randn(batch, D, 4)
            results = []
            for n in (1, 1, 2, 3):
                torch.set_num_threads(n)
                results.append(evaluate(inputs, weights, "cpu"))
            for other in results[1:]:
                assert all(torch.equal(x, other[name]) for name, x in results[0].items())
    finally:
        torch.set_num_threads(threads)


@NO_TRITON
def test_deterministic_in_triton():
    inputs = draw(2, 19, 40, 3, device=DEVICE["triton"])
    weights = torch.randn(2, 19, 40).to(inputs["u"]), torch.randn(2, 40, 3).to(inputs["u"])
    first, again = (evaluate(inputs, weights, "triton") for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("backend", ("reference", *COMPILED))
@pytest.mark.parametrize("T", (0, 5))
def test_results_are_their_own_memory_and_inputs_stay(backend, T):
    inputs = draw(2, T, 5, 3, device=DEVICE[backend])
    before = {name: x.clone() for name, x in inputs.items()}
    weights = torch.randn(2, T, 5).to(inputs["u"]), torch.randn(2, 5, 3).to(inputs["u"])
    results = evaluate(inputs, weights, backend)
    if backend != "reference":
        places = [x.untyped_storage().data_ptr() for x in (*inputs.values(), *results.values()) if x.numel()]
        assert len(set(places)) == len(places)
    results["last"].add_(1)
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


def test_nothing_of_all_states_is_allocated():
    batch, T, D, N = 4, 512, 32, 16
    leaves = {name: x.requires_grad_() for name, x in draw(batch, T, D, N).items()}
    with torch.profiler.profile(profile_memory=True) as profile:
        y, last = selective_scan(**leaves)
        (y.sum() + last.sum()).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < batch * T * D * N * 4 / 2


def test_torch_func():
    inputs = {name: x.double() for name, x in draw(2, 7, 5, 3).items()}

    def loss(inputs, backend="cpu"):
        y, last = selective_scan(**inputs, backend=backend)
        return y.square().sum() + last.sum()

    got, want = (torch.func.grad(lambda x, b=b: loss(x, b))(inputs) for b in ("cpu", "reference"))
    for name in inputs:
        torch.testing.assert_close(got[name], want[name])
    batch = {name: torch.stack([x, x / 2]) for name, x in inputs.items()}
    each = torch.vmap(torch.func.grad(loss))(batch)
    for name in inputs:
        torch.testing.assert_close(each[name][0], want[name])


@backends
def test_registration_with_torch(backend):
    inputs = draw(2, 11, 18, 3, device=DEVICE[backend])
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(torch.ops.minrnn.selective_scan.default, (*leaves, backend))
    torch.library.opcheck(torch.ops.minrnn.selective_scan.default, (*leaves[:5], None, backend))
    with torch.no_grad():
        y, last, saved = torch.ops.minrnn.selective_scan(*leaves, backend)
        for given in ((y, last), (y, None), (None, last)):
            arguments = (*given, saved, *(x.detach() for x in leaves[:5]), given[1] is None, backend)
            torch.library.opcheck(
                torch.ops.minrnn.selective_scan_backward.default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )


def test_compile_and_export():
    def f(u, dt, A, B, C, h0):
        y, last = selective_scan(u.tanh(), dt, A, B, C, h0)
        return y.sin() + last.sum()

    arguments = [x.requires_grad_() for x in draw(2, 40, 18, 3).values()]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for T in (40, 35):  # the second length makes the time dimension symbolic
        x = [v[:, :T] if i in (0, 1, 3, 4) else v for i, v in enumerate(arguments)]
        torch.testing.assert_close(compiled(*x), f(*x))
    expected = torch.autograd.grad(f(*arguments).sum(), arguments)
    torch.testing.assert_close(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected)

    class Module(torch.nn.Module):
        def forward(self, *x):
            return f(*x)

    time = {1: torch.export.Dim("time", min=2, max=4096)}
    shapes = {"x": (time, time, None, time, time, None)}
    program = torch.export.export(Module(), tuple(x.detach() for x in arguments), dynamic_shapes=shapes)
    longer = list(draw(2, 70, 18, 3).values())
    torch.testing.assert_close(program.module()(*longer), f(*longer))


def test_autocast_computes_in_float32():
    inputs = draw(2, 9, 5, 3)
    narrow = inputs | {"u": inputs["u"].bfloat16(), "B": inputs["B"].half()}
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(**narrow)
    expected = selective_scan(**{name: x.float() for name, x in narrow.items()})
    assert torch.equal(y, expected[0]) and torch.equal(last, expected[1]) and y.dtype == torch.float32
    leaves = {name: x.requires_grad_() for name, x in narrow.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(**leaves)
    (y.sum() + last.sum()).backward()
    assert all(x.grad.dtype == x.dtype and x.grad.abs().max() > 0 for x in leaves.values())


def test_forward_mode_is_refused_by_name():
    inputs = draw(2, 5, 3, 2)
    with pytest.raises(NotImplementedError, match="'cpu' has no forward-mode derivative; use backend='reference'"):
        torch.func.jvp(lambda u: selective_scan(**inputs | {"u": u}), (inputs["u"],), (inputs["u"],))


GOOD = draw(2, 5, 3, 4)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"u": [1.0]}, TypeError, "u: expected a tensor, got list"),
        ({"h0": 0.0}, TypeError, "h0: expected a tensor, got float"),
        ({"u": GOOD["u"].half()}, TypeError, "u: expected a tensor of float64 or float32, got torch.float16"),
        ({"A": GOOD["A"].long()}, TypeError, "A: expected a tensor of float64 or float32, got torch.int64"),
        ({"B": GOOD["B"].double()}, TypeError, "B: expected u's dtype torch.float32, got torch.float64"),
        ({"u": GOOD["u"][0]}, ValueError, r"u: expected shape \(B, T, D\), got \(5, 3\)"),
        ({"dt": GOOD["dt"][:, :4]}, ValueError, r"dt: expected shape \(2, 5, 3\) .*got \(2, 4, 3\)"),
        ({"A": GOOD["A"][:2]}, ValueError, r"A: expected shape \(D, N\) with D = 3 to fit u, got \(2, 4\)"),
        ({"A": GOOD["A"][0]}, ValueError, r"A: expected shape \(D, N\)"),
        ({"B": GOOD["B"][..., :3]}, ValueError, r"B: expected shape \(2, 5, 4\) .*got \(2, 5, 3\)"),
        ({"C": GOOD["u"]}, ValueError, r"C: expected shape \(2, 5, 4\) .*got \(2, 5, 3\)"),
        ({"h0": GOOD["h0"].mT}, ValueError, r"h0: expected shape \(2, 3, 4\) .*got \(2, 4, 3\)"),
        ({"C": GOOD["C"].to("meta")}, ValueError, "C: expected u's device cpu, got meta"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of .*got 'cuda'"),
        ({"backend": "log"}, ValueError, "backend: 'log' has no selective scan"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    with pytest.raises(error, match=words):
        selective_scan(**GOOD | change)


# --- ahead of time -----------------------------------------------------------------------------------------


def compile_all():
    """Prints one line of JSON per compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from minrnn.ops import selective_triton
    from tests.test_triton import ARCHITECTURES, resources

    class Recorder:
        """Stands for a kernel: takes the launch and compiles it."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *, num_warps, num_stages, enable_fp_fusion, **arguments):
            signature, constants = {}, {}
            for parameter in self.kernel.params:
                value = arguments[parameter.name]
                if isinstance(value, torch.Tensor):
                    signature[parameter.name] = "*fp64" if value.dtype == torch.float64 else "*fp32"
                elif parameter.is_constexpr or value is None:
                    signature[parameter.name], constants[parameter.name] = "constexpr", value
                else:
                    signature[parameter.name] = parameter.annotation_type
            options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
            source = ASTSource(self.kernel, signature, constants)
            for architecture in ARCHITECTURES:
                binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
                line = {"kernel": self.kernel.__name__, "dtype": str(arguments["u"].dtype), "N": arguments["N"]}
                line |= {"sm": architecture, "warps": num_warps, "shared": binary.metadata.shared}
                line["shuffles"] = binary.asm["ptx"].count("shfl.")
                line["barriers"] = binary.asm["ptx"].count("bar.sync")
                print(json.dumps(line | resources(binary.asm["cubin"])), flush=True)

    for name in ("_forward_kernel", "_backward_kernel"):
        setattr(selective_triton, name, Recorder(getattr(selective_triton, name)))
    dtype = torch.float32  # float64 spills a few registers, and is not made to be fast
    for N in (16, 4):
        x, A, B, h0 = (torch.empty(shape, dtype=dtype) for shape in ((2, 20, 64), (64, N), (2, 20, N), (2, 64, N)))
        saved = torch.empty(2 * 3 * N * 64, dtype=dtype)
        steps = selective.STEPS["triton"]
        selective_triton.forward(x, x, A, B, B, h0, x, h0, saved, steps)
        selective_triton.backward(x, x, A, B, B, saved, x, h0, x, x, A, B.clone(), B.clone(), h0, steps)


@NO_TRITON
def test_kernels_compile_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    print("\n" + "\n".join(map(str, lines)))
    assert {(line["kernel"], line["sm"]) for line in lines} == {
        (kernel, sm) for kernel in ("_forward_kernel", "_backward_kernel") for sm in (75, 80, 90)
    }
    for line in lines:
        assert line["STACK"] == 0 and line["LOCAL"] == 0 and line["shared"] <= 16384, line
        if line["kernel"] == "_forward_kernel" and line["N"] == 16:
            assert line["REG"] <= 128, line  # 16 warps on every multiprocessor


if __name__ == "__main__":
    compile_all()
