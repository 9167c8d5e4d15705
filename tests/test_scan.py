"""Every backend against the float64 loop, and the laws that all of them obey."""

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minrnn.ops import available_backends, linear_scan, mingru_scan, minlstm_scan
from minrnn.ops.cells import CELLS, LINEAR
from minrnn.ops.scan import scan
from tests.oracle import assert_each_is_alone, assert_matches_float64, draw, end_to_end, evaluate

CUDA = torch.cuda.is_available()
DEVICE = {"cpu": "cpu", "triton": "cuda" if CUDA else "cpu"}
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
COMPILED = ("cpu", pytest.param("triton", marks=NO_TRITON))
INTERPRETED = () if CUDA else ("triton",)  # 20 thousand elements a second: small shapes only
MINGRU, MINLSTM = CELLS["mingru_g"], CELLS["minlstm_g"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

NO_BFLOAT16 = CUDA and torch.cuda.get_device_capability() < (8, 0)
backends = pytest.mark.parametrize("backend", COMPILED)
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
# Where what is tested does not hang on the formula. Each cell and dtype is a kernel more to compile, for seconds.
PLAIN = {name: cell for name, cell in CELLS.items() if not cell.signed}
FORMS = PLAIN | {name: CELLS[name] for name in ("mingru_signed_g", "minlstm_signed_identity")}
plain_cells = pytest.mark.parametrize("cell", PLAIN.values(), ids=PLAIN)
forms = pytest.mark.parametrize("cell", FORMS.values(), ids=FORMS)


def skip_without_bfloat16(backend, dtype):
    if NO_BFLOAT16 and backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("this GPU has no bfloat16")


def plain_loop(cell, inputs, h0):
    """The paper's equations, one number at a time, in Python's floats."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def g(x):
        return x + 0.5 if x >= 0 else sigmoid(x)

    B, T, D = inputs[0].shape
    h = torch.empty(B, T, D, dtype=torch.float64)
    for b in range(B):
        for d in range(D):
            state = float(h0[b, d])
            for t in range(T):
                x = [float(v[b, t, d]) for v in inputs]
                if cell == LINEAR:
                    state = x[0] * state + x[1]
                    h[b, t, d] = state
                    continue
                if cell.kind == "mingru":
                    f, i = 1 - sigmoid(x[0]), sigmoid(x[0])
                else:
                    f, i = sigmoid(x[0]), sigmoid(x[1])
                    if cell.normalize:
                        f, i = f / (f + i), i / (f + i)
                if cell.signed and cell.kind == "minlstm" and not cell.normalize:
                    f = math.tanh(x[0] / 2)
                elif cell.signed:
                    f, i = f - i, 1 - abs(f - i)
                state = f * state + i * (g(x[-1]) if cell.activation == "g" else x[-1])
                h[b, t, d] = state
    return h


@cells
def test_reference_is_the_papers_equations(cell):
    inputs = draw(cell, 2, 9, 3, torch.float64, scale=3)
    h0 = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(scan(cell, tuple(inputs), h0, backend="reference"), plain_loop(cell, inputs, h0))


def test_signed_state_counts_modulo_two():
    """Gates at one end keep the state and at the other flip it: exact parity after any number of steps."""
    bits = torch.randint(2, (3, 100_000), generator=torch.Generator().manual_seed(0))
    gate = torch.where(bits == 1, 40.0, -40.0)[..., None]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        h = mingru_scan(gate.to(dtype), torch.randn(3, 100_000, 1).to(dtype), torch.ones(3, 1).to(dtype), signed=True)
        assert torch.equal(h[..., 0].double(), 1.0 - 2 * (bits.cumsum(1) % 2))


@plain_cells
def test_log_space_agrees_where_it_is_defined(cell):
    inputs = draw(cell, 2, 33, 5, torch.float64)
    inputs[-1] = inputs[-1].abs() + 0.1
    assert_matches_float64(cell, inputs, torch.rand(2, 5).double() + 0.1, backend="log", tolerance=1e-10)
    assert_matches_float64(cell, inputs, backend="log", tolerance=1e-10)


@backends
@pytest.mark.parametrize(
    "cell, dtype",
    [
        pytest.param(cell, dtype, id=f"{name}-{dtype}")
        for name, cell in CELLS.items()
        for dtype in DTYPES
        if name in FORMS or dtype == torch.float32
    ],
)
def test_outputs_and_gradients(cell, dtype, backend):
    skip_without_bfloat16(backend, dtype)
    for B, T, D in ((2, 7, 33), (1, 19, 5)) if backend in INTERPRETED else ((3, 63, 100), (2, 67, 5), (5, 33, 129)):
        device = DEVICE[backend]
        inputs = draw(cell, B, T, D, dtype, device, scale=2)
        h0 = torch.randn(B, D).to(device, dtype)
        resets = (torch.rand(B, T) < 0.1).to(device)
        assert_matches_float64(cell, inputs, backend=backend)
        assert_matches_float64(cell, inputs, h0, backend=backend)
        assert_matches_float64(cell, inputs, h0, resets, backend=backend)
        assert_matches_float64(cell, inputs, h0, resets, reverse=True, backend=backend)
        assert_matches_float64(cell, [torch.cat(inputs, -1)], h0, resets, backend=backend)


@backends
@pytest.mark.parametrize("B, T, D", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 1, 1), (3, 1, 17), (1, 2, 16)])
def test_empty_and_short(B, T, D, backend):
    inputs = draw(MINGRU, B, T, D, device=DEVICE[backend])
    h0 = torch.randn(B, D, device=DEVICE[backend])
    assert_matches_float64(MINGRU, inputs, h0, backend=backend)
    assert_matches_float64(MINGRU, inputs, backend=backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@plain_cells
def test_long_sequences(cell, dtype):
    backend = "triton" if CUDA else "cpu"
    skip_without_bfloat16(backend, dtype)
    for B, T, D in ((1, 65536, 3), (2, 4097, 33)):
        inputs = draw(cell, B, T, D, dtype, DEVICE[backend])
        h0 = torch.randn(B, D).to(inputs[0])
        assert_matches_float64(cell, inputs, h0, torch.rand(B, T, device=h0.device) < 1e-3, backend=backend)


@backends
@cells
def test_saturated_gates(cell, backend):
    """Pre-activations of ±1e4 among ordinary ones."""
    inputs = draw(cell, 2, 41, 19, device=DEVICE[backend])
    for x in inputs[cell == LINEAR :]:
        x[torch.rand_like(x) < 0.3] = 1e4
        x[torch.rand_like(x) < 0.3] = -1e4
    assert_matches_float64(cell, inputs, torch.randn(2, 19).to(inputs[0]), backend=backend)
    if cell != LINEAR:
        assert_matches_float64(cell, [torch.full_like(x, -1e4) for x in inputs], backend=backend)


@backends
@cells
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")), ids=str)
def test_nan_and_infinity_travel(cell, value, backend):
    for place in range(len(cell.inputs)):
        inputs = draw(cell, 2, 23, 18, device=DEVICE[backend])
        inputs[place][0, 7, 3] = inputs[place][1, 11, 17] = value
        h0 = torch.randn(2, 18).to(inputs[0])
        h0[0, 5] = value
        resets = torch.zeros(2, 23, dtype=torch.bool, device=h0.device)
        resets[0, 15] = resets[1, 0] = True
        assert_matches_float64(cell, inputs, h0, resets, backend=backend)
    inputs, weight = draw(cell, 2, 23, 18, device=DEVICE[backend]), torch.randn(2, 23, 18).to(h0)
    weight[0, 12, 3] = weight[1, 5, 17] = value
    assert_matches_float64(cell, inputs, torch.randn(2, 18).to(h0), resets, backend=backend, weight=weight)


LAYOUTS = (
    "contiguous",
    "time first",
    "channels first",
    "channels outermost",
    "half of a projection",
    "same for all t",
    "same for all b",
)


def laid_out(x, layout):
    """The numbers of x (or, for an expanded layout, some of them) in another place in memory."""
    B, T, D = x.shape
    if layout == "time first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels outermost":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "half of a projection":
        return torch.cat([torch.full_like(x, float("nan")), x], -1)[..., D:]
    if layout == "same for all t":
        return x[:, :1].expand(B, T, D)
    if layout == "same for all b":
        return x[:1].expand(B, T, D)
    return x.contiguous()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@backends
def test_any_shape_layout_and_dtype(backend, data):
    cell = data.draw(st.sampled_from(list(PLAIN.values())), "cell")
    missing = (torch.bfloat16,) if NO_BFLOAT16 and backend == "triton" else ()
    dtype = data.draw(st.sampled_from([d for d in DTYPES if d not in missing]), "dtype")
    small = backend in INTERPRETED
    B, T, D = (data.draw(st.integers(1, n), name) for n, name in ((3, "B"), (9 if small else 40, "T"), (40, "D")))
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    layouts = [data.draw(st.sampled_from(LAYOUTS), "layout") for _ in range(len(cell.inputs))]
    inputs = [
        laid_out(x, layout) for x, layout in zip(draw(cell, B, T, D, dtype, DEVICE[backend]), layouts, strict=True)
    ]
    h0 = torch.randn(B, D).to(inputs[0]) if data.draw(st.booleans(), "h0") else None
    if h0 is not None and data.draw(st.booleans(), "h0 strided"):
        h0 = torch.stack([h0, h0], -1)[..., 1]
    resets = torch.rand(T, B).to(h0.device if h0 is not None else inputs[0].device).T < 0.2
    resets = resets if data.draw(st.booleans(), "resets") else None
    reverse = data.draw(st.booleans(), "reverse")
    # Towards a candidate that stays the same the state converges, and the gates' gradients are the difference of the
    # two: of numbers that the output holds in 16 bits.
    converges = layouts[-1] == "same for all t" and dtype in (torch.bfloat16, torch.float16)
    assert_matches_float64(cell, inputs, h0, resets, reverse, backend, 3e-2 if converges else None)


def test_views_of_a_projection_are_read_in_place():
    projection = torch.randn(2, 5, 40)
    with torch.profiler.profile() as profile:
        mingru_scan(*projection.chunk(2, -1))
    copies = [e.key for e in profile.key_averages() if e.key in ("aten::copy_", "aten::contiguous", "aten::clone")]
    assert copies == []


@backends
def test_output_follows_the_inputs_memory_order(backend):
    time_first = [x.transpose(0, 1) for x in draw(MINGRU, 9, 4, 33, device=DEVICE[backend])]
    h = scan(MINGRU, tuple(time_first), backend=backend)
    assert h.shape == (4, 9, 33) and h.transpose(0, 1).is_contiguous()
    assert scan(MINGRU, tuple(x.contiguous() for x in time_first), backend=backend).is_contiguous()


@backends
@forms
def test_whole_is_stepwise_is_chunked(cell, backend):
    inputs = draw(cell, 2, 23, 19, torch.float64, DEVICE[backend])
    whole = scan(cell, tuple(inputs), backend=backend)
    for size in (1, 7):
        state, parts = None, []
        for chunk in zip(*(x.split(size, 1) for x in inputs), strict=True):
            parts.append(scan(cell, chunk, state, backend=backend))
            state = parts[-1][:, -1]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-14, atol=1e-14)


@backends
def test_resets_are_sequences_of_their_own(backend):
    inputs = draw(MINLSTM, 1, 24, 17, torch.float64, DEVICE[backend])
    lengths = (5, 1, 11, 7)
    resets = torch.zeros(1, 24, dtype=torch.bool, device=inputs[0].device)
    resets[0, [0, 5, 6, 17]] = True
    h0 = torch.full((1, 17), float("nan")).to(inputs[0])
    packed = scan(MINLSTM, tuple(inputs), h0, resets, backend=backend)
    parts = zip(*(x.split(lengths, 1) for x in inputs), strict=True)
    alone = [scan(MINLSTM, part, backend=backend) for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-14, atol=1e-14)


@backends
@plain_cells
@pytest.mark.parametrize("reverse", (False, True))
def test_sequences_end_to_end_run_as_if_each_were_alone(cell, backend, reverse):
    for dtype, D, has_h0, has_resets in (
        (torch.float64, 5, True, False),
        (torch.float32, 33, True, True),
        (torch.bfloat16, 20, False, False),
    ):
        inputs, h0, resets, weight, lengths = end_to_end(cell, [1, 5, 9, 2], D, dtype, DEVICE[backend])
        h0, resets = h0 if has_h0 else None, resets if has_resets else None
        assert_each_is_alone(cell, inputs, h0, resets, reverse, backend, weight, lengths)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_sequences_end_to_end_are_divided_among_threads(threads):
    lengths = [3000, 2, 2, 700, 1, 5000]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    inputs, h0 = draw(MINLSTM, 1, sum(lengths), 100), torch.randn(len(lengths), 100)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = scan(MINLSTM, tuple(inputs), h0, cu_seqlens=cu_seqlens)
    finally:
        torch.set_num_threads(before)
    parts = zip(*(x.split(lengths, 1) for x in inputs), h0.split(1), strict=True)
    for got, (*part, state) in zip(whole.split(lengths, 1), parts, strict=True):
        assert torch.equal(got, scan(MINLSTM, tuple(part), state))


@plain_cells
def test_results_do_not_depend_on_threads(cell):
    inputs = draw(cell, 5, 300, 1100)
    h0, weight = torch.randn(5, 1100), torch.randn(5, 300, 1100)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(evaluate(cell, inputs, h0, None, False, "cpu", weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_few_wide_rows_are_divided_among_threads():
    from minrnn.ops import cpu

    def _shares(B, T, D):
        return cpu._shares(np.arange(B + 1) * T, D)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert len(_shares(1, 100, 20000)) == 2
        torch.set_num_threads(8)
        for B, T, D in ((1, 100, 30001), (3, 100, 50000), (64, 512, 384), (2, 65536, 64), (1, 1, 1)):
            shares = _shares(B, T, D)
            assert sum((b1 - b0) * (d1 - d0) for b0, b1, d0, d1 in shares) == B * D
            assert len(set(shares)) == len(shares) <= 8
    finally:
        torch.set_num_threads(threads)
    assert_matches_float64(MINGRU, draw(MINGRU, 1, 30, 20001), torch.randn(1, 20001))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@forms
@pytest.mark.parametrize(
    "options", ({}, {"resets": True}, {"reverse": True}, {"packed": True}, {"packed": True, "reverse": True}), ids=str
)
def test_first_and_second_derivatives(cell, backend, options):
    B, T = (1, 8) if options.get("packed") else (2, 4)
    inputs = [x.requires_grad_() for x in draw(cell, B, T, 3, torch.float64)]
    h0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(B, T) < 0.3 if options.get("resets") else None
    cu_seqlens = torch.tensor([0, 3, 8]) if options.get("packed") else None

    def f(h0, *inputs):
        return scan(cell, inputs, h0, resets, options.get("reverse", False), backend, cu_seqlens)

    assert torch.autograd.gradcheck(f, (h0, *inputs))
    assert torch.autograd.gradgradcheck(f, (h0, *inputs))


@backends
@pytest.mark.parametrize("packed", (False, True))
def test_second_derivatives_of_compiled_backends(backend, packed):
    inputs = [x.requires_grad_() for x in draw(MINGRU, 1, 3, 2, torch.float64, DEVICE[backend])]
    leaves = [torch.cat(inputs, -1).detach().requires_grad_()] if packed else inputs
    assert torch.autograd.gradgradcheck(lambda *x: scan(MINGRU, x, backend=backend), leaves)


def test_gradients_only_where_asked():
    gate, candidate = draw(MINGRU, 2, 5, 3, torch.float64)
    candidate.requires_grad_()
    h = mingru_scan(gate, candidate)
    first = torch.autograd.grad(h.sum(), candidate, create_graph=True)[0]
    torch.autograd.grad(first.square().sum(), candidate)
    h.sum().backward()
    assert gate.grad is None and candidate.grad is not None


DEPENDENT = {
    "the same twice": lambda x: (x, x),
    "one from the other": lambda x: (x, (1 - x) * x.cos()),
    "the other from the one": lambda x: ((1 - x) * x.cos(), x),
}


@pytest.mark.parametrize("inputs", DEPENDENT.values(), ids=DEPENDENT)
@pytest.mark.parametrize("cell", (LINEAR, MINGRU), ids=("linear", "mingru_g"))
def test_derivatives_where_one_input_depends_on_the_other(cell, inputs):
    x = torch.rand(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 3, dtype=torch.float64)

    def derivatives(backend):
        h = scan(cell, inputs(x), backend=backend)
        first = torch.autograd.grad((h * weight).sum(), x, create_graph=True)[0]
        return first.detach(), *torch.autograd.grad(first.square().sum(), x)

    for actual, expected in zip(derivatives("cpu"), derivatives("reference"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_forward_mode_is_refused_by_name():
    x = torch.rand(2, 5, 3)
    with pytest.raises(NotImplementedError, match="'cpu' has no forward-mode derivative; use backend='reference'"):
        torch.func.jvp(lambda x: linear_scan(x, x), (x,), (x,))
    value, tangent = torch.func.jvp(lambda x: linear_scan(x, x, backend="reference"), (x,), (x,))
    assert tangent.abs().min() > 0


@backends
@pytest.mark.parametrize("packed", (False, True))
def test_registration_with_torch(backend, packed):
    inputs = draw(MINLSTM, 2, 5, 17, device=DEVICE[backend])
    if packed:
        inputs = [torch.cat(inputs, -1), None, None]
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    h0 = torch.randn(2, 17, device=leaves[0].device, requires_grad=True)
    resets = torch.rand(2, 5, device=h0.device) < 0.3
    torch.library.opcheck(torch.ops.minrnn.scan.default, ("minlstm_g", *leaves, h0, resets, None, False, backend))
    torch.library.opcheck(
        torch.ops.minrnn.scan.default, ("minlstm_g", *leaves, None, None, None, True, backend), test_utils="test_schema"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_strides_are_those_of_the_operator(layout):
    gate = laid_out(torch.randn(3, 5, 18), layout).detach().requires_grad_()
    candidate = torch.randn(3, 5, 18, requires_grad=True)
    torch.library.opcheck(
        torch.ops.minrnn.scan.default, ("mingru_g", gate, candidate, None, None, None, None, False, "cpu")
    )
    compiled = torch.compile(lambda *x: mingru_scan(*x).flatten(1).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, candidate), mingru_scan(gate, candidate).flatten(1).sin())


def test_compile_and_export():
    def f(gate, candidate, h0):
        return mingru_scan(gate.tanh(), candidate, h0).sin()

    arguments = [x.requires_grad_() for x in (*draw(MINGRU, 2, 9, 18), torch.randn(2, 18))]
    expected = f(*arguments)
    expected_grads = torch.autograd.grad(expected.sum(), arguments)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for T in (9, 12):  # the second length makes the time dimension symbolic
        x = [v.repeat(1, 2, 1)[:, :T] if v.dim() == 3 else v for v in arguments]
        torch.testing.assert_close(compiled(*x), f(*x))
    grads = torch.autograd.grad(compiled(*arguments).sum(), arguments)
    torch.testing.assert_close(grads, expected_grads)

    class Module(torch.nn.Module):
        def forward(self, gate, candidate, h0):
            return f(gate, candidate, h0)

    time = torch.export.Dim("time", min=2, max=4096)
    program = torch.export.export(
        Module(), tuple(x.detach() for x in arguments), dynamic_shapes=({1: time}, {1: time}, None)
    )
    longer = [torch.randn(2, 30, 18), torch.randn(2, 30, 18), torch.randn(2, 18)]
    torch.testing.assert_close(program.module()(*longer), f(*longer))


def test_autocast_takes_the_widest_dtype():
    gate, candidate = draw(MINGRU, 2, 9, 18)
    h0 = torch.randn(2, 18)
    with torch.autocast("cpu", torch.bfloat16):
        assert mingru_scan(gate.bfloat16(), candidate.bfloat16()).dtype == torch.bfloat16
        h = mingru_scan(gate.bfloat16(), candidate.bfloat16(), h0)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, mingru_scan(gate.bfloat16().float(), candidate.bfloat16().float(), h0))


def test_public_scans_name_their_cells():
    x = draw(MINLSTM, 2, 5, 3)
    for activation in ("g", "identity"):
        for actual, cell in (
            (mingru_scan(*x[:2], activation=activation), f"mingru_{activation}"),
            (minlstm_scan(*x, activation=activation), f"minlstm_{activation}"),
            (minlstm_scan(*x, activation=activation, normalize=False), f"minlstm_unnormalized_{activation}"),
        ):
            assert torch.equal(actual, scan(CELLS[cell], tuple(x[: len(CELLS[cell].inputs)])))


x = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: linear_scan([1.0], x), TypeError, "a: expected a tensor, got list"),
        (lambda: linear_scan(x.long(), x), TypeError, "a: expected a tensor of float64, .* got torch.int64"),
        (lambda: linear_scan(x.to(torch.float8_e5m2), x), TypeError, "a: expected .* got torch.float8_e5m2"),
        (lambda: minlstm_scan(x, x, x, normalize="no"), TypeError, "normalize: expected a bool, got str"),
        (lambda: mingru_scan(x, x, signed=1), TypeError, "signed: expected a bool, got int"),
        (lambda: mingru_scan(x, x, signed=True, backend="log"), ValueError, "signed: not defined in log space"),
        (lambda: linear_scan(x[0], x), ValueError, r"a: expected shape \(B, T, D\), got \(5, 3\)"),
        (lambda: mingru_scan(x, x[:, :4]), ValueError, r"candidate: expected shape \(2, 5, 3\) .*got \(2, 4, 3\)"),
        (lambda: mingru_scan(x, x.double()), TypeError, "candidate: expected gate's dtype torch.float32"),
        (lambda: mingru_scan(x, x, x[:, 0].double()), TypeError, "h0: expected gate's dtype torch.float32"),
        (lambda: mingru_scan(x, x, x), ValueError, r"h0: expected shape \(2, 3\)"),
        (lambda: mingru_scan(x, x.to("meta")), ValueError, "candidate: expected gate's device cpu, got meta"),
        (lambda: mingru_scan(x, x, resets=x[..., 0]), TypeError, "resets: expected a bool tensor, got torch.float32"),
        (lambda: mingru_scan(x, x, resets=x[0] > 0), ValueError, r"resets: expected shape \(2, 5\)"),
        (lambda: mingru_scan(x, x, activation="tanh"), ValueError, "activation: .*'g' or 'identity', got 'tanh'"),
        (lambda: mingru_scan(x, x, backend="cuda"), ValueError, "backend: expected one of .*got 'cuda'"),
        (lambda: mingru_scan(x, x, -torch.ones(2, 3), backend="log"), ValueError, "h0: the log-space scan .*positive"),
        (lambda: mingru_scan(x, x, torch.zeros(2, 3), backend="log"), ValueError, "h0: .*minimum of 0"),
        (lambda: linear_scan(x, x, backend="log"), ValueError, "a: the log-space scan"),
        (lambda: mingru_scan(x, x, activation="identity", backend="log"), ValueError, "candidate: the log-space"),
        (lambda: mingru_scan(x, x, resets=x[..., 0] > 0, backend="log"), ValueError, "resets: not defined in log"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_backends_that_cannot_run_say_why(monkeypatch):
    assert {"reference", "log", "cpu"} <= set(available_backends("cpu"))
    assert CUDA == ("triton" in available_backends("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "triton" not in available_backends("cpu")
    with pytest.raises(ValueError, match="'triton' cannot run on cpu .*CUDA"):
        linear_scan(x, x, backend="triton")
    from minrnn.ops.scan import resolve

    assert resolve("auto", torch.device("cuda"), torch.float16) == "triton"
    assert resolve("auto", torch.device("mps"), torch.float16) == "reference"
    with pytest.raises(ValueError, match="'cpu' cannot run on cuda"):
        resolve("cpu", torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="no bfloat16 .*use float16 or float32"):
        resolve("auto", torch.device("cuda"), torch.bfloat16)


def test_without_a_folder_to_cache_in_it_warns_and_works():
    program = """
import warnings, numba.core.caching, torch
numba.core.caching.CacheImpl._locator_classes = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from minrnn.ops import linear_scan
    x = torch.rand(2, 5, 18)
    assert torch.allclose(linear_scan(x, x), linear_scan(x, x, backend="reference"))
assert any("NUMBA_CACHE_DIR" in str(w.message) for w in caught), caught
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_forked_child_scans():
    """Threads do not survive a fork; a child must not wait for its parent's."""
    program = """
import os, torch
from minrnn.ops import mingru_scan
torch.set_num_threads(2)
x = torch.randn(4, 600, 512)
expected = mingru_scan(x, x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(mingru_scan(x, x), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=os.environ)
