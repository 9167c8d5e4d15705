"""The layers where a program has torch.nn.GRU: torch's own inputs for it, transforms, hooks, threads, processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from minrnn import MinGRU, MinLSTM

IN, H = 3, 5
each_layer = pytest.mark.parametrize("layer", [MinGRU, MinLSTM])


def packed(lengths, dtype=torch.float32):
    return pack_sequence([torch.randn(n, IN, dtype=dtype) for n in lengths], enforce_sorted=False)


# --- torch's own inputs for nn.GRU, and derivatives of every kind --------------------------------------------


def grus_inputs():
    from torch.testing._internal.common_modules import module_inputs_torch_nn_RNN_GRU

    return module_inputs_torch_nn_RNN_GRU(
        None, "cpu", torch.float64, True, True, with_packed_sequence=True, is_rnn=False
    )


def derivatives_are_right(rnn, x, *hx):
    """First and second ones with respect to inputs and parameters, and batches of them."""
    names = [name for name, _ in rnn.named_parameters()]
    rows, rest = (x.data, x[1:]) if isinstance(x, PackedSequence) else (x, None)
    leaves = [y.detach().requires_grad_() for y in (rows, *hx, *rnn.parameters())]

    def f(rows, *others):
        states, parameters = others[: len(hx)], dict(zip(names, others[len(hx) :], strict=True))
        given = rows if rest is None else PackedSequence(rows, *rest)
        out, h_n = torch.func.functional_call(rnn, parameters, (given, *states))
        return (out if rest is None else out.data), h_n

    assert torch.autograd.gradcheck(f, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, leaves, check_batched_grad=True, fast_mode=True)


@each_layer
def test_torchs_own_inputs_for_gru(layer):
    inputs = grus_inputs()
    assert len(inputs) == 32
    seen = set()
    for sample in inputs:
        options, (x, *hx) = sample.constructor_input.kwargs, sample.forward_input.args
        rnn = layer(**options, dtype=torch.float64)
        out, h_n = rnn(x, *hx)
        like_out, like_h_n = nn.GRU(**options, dtype=torch.float64)(x, *hx)
        assert h_n.shape == like_h_n.shape
        if isinstance(x, PackedSequence):
            assert out.data.shape == like_out.data.shape
        else:
            for got, want in zip((out, h_n), sample.reference_fn(rnn, x, *hx), strict=True):
                torch.testing.assert_close(got, want)
        form = (type(x), rnn.bidirectional, bool(hx))
        if rnn.bias and form not in seen:  # the others differ in batch_first, which changes no derivative
            derivatives_are_right(rnn, x, *hx)
            seen.add(form)
    assert len(seen) == 6


@each_layer
def test_torch_func(layer):
    rnn = layer(2, 2, dtype=torch.float64)
    x, xs = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def loss(x):
        return rnn(x)[0].square().sum()

    close, func, functional = torch.testing.assert_close, torch.func, torch.autograd.functional
    close(func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])
    value, vjp = func.vjp(lambda x: rnn(x)[0], x.detach())
    close(vjp(torch.ones_like(value))[0], torch.autograd.grad(rnn(x)[0].sum(), x)[0])
    for vectorize in (False, True):
        close(
            func.jacrev(lambda x: rnn(x)[0])(x.detach()),
            functional.jacobian(lambda x: rnn(x)[0], x, vectorize=vectorize),
        )
        close(func.jacrev(func.jacrev(loss))(x.detach()), functional.hessian(loss, x, vectorize=vectorize))
    close(torch.vmap(lambda x: rnn(x)[0])(xs), torch.stack([rnn(x)[0] for x in xs]))

    parameters = {name: p.detach() for name, p in rnn.named_parameters()}

    def loss_of(parameters, x):
        return func.functional_call(rnn, parameters, (x,))[0].square().sum()

    each = torch.vmap(func.grad(loss_of), in_dims=(None, 0))(parameters, xs)
    for k, x in enumerate(xs):
        for got, want in zip(each.values(), torch.autograd.grad(loss(x), list(rnn.parameters())), strict=True):
            close(got[k], want)
    ensemble = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    close(torch.vmap(loss_of, in_dims=(0, None))(ensemble, xs[0])[0], loss(xs[0]))


def test_torch_func_of_packed_sequences():
    rnn = MinGRU(IN, H, bidirectional=True)
    first, second = packed([4, 1, 6]), packed([4, 1, 6])

    def loss(rows):
        out, h_n = rnn(PackedSequence(rows, *first[1:]))
        return out.data.square().sum() + h_n.sum()

    x = first.data.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(first.data), torch.autograd.grad(loss(x), x)[0])
    hessian = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(first.data), hessian)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative; use backend='reference'"):
        torch.func.jvp(loss, (first.data,), (first.data,))
    rnn.backend = "reference"
    _, tangent = torch.func.jvp(loss, (first.data,), (first.data,))
    torch.testing.assert_close(tangent, (torch.autograd.grad(loss(x), x)[0] * first.data).sum())
    rnn.backend = "auto"
    rows = torch.stack([first.data, second.data])
    got = torch.vmap(lambda rows: rnn(PackedSequence(rows, *first[1:]))[1])(rows)
    torch.testing.assert_close(got, torch.stack([rnn(first)[1], rnn(second)[1]]))


def test_forward_mode_is_refused_by_name_and_works_with_reference():
    x = torch.randn(3, 2, 2)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative; use backend='reference'"):
        torch.func.jvp(lambda x: MinGRU(2, 2)(x)[0], (x,), (x,))
    _, tangent = torch.func.jvp(lambda x: MinGRU(2, 2, backend="reference")(x)[0], (x,), (x,))
    assert tangent.abs().max() > 0


# --- what generic code reads and does ------------------------------------------------------------------------


@each_layer
def test_what_generic_code_reads(layer):
    rnn = layer(np.int64(IN), np.int32(H), num_layers=np.int64(2))
    assert (rnn.proj_size, rnn.mode, type(rnn.num_layers)) == (0, layer.__name__, int)
    with pytest.raises(TypeError, match="num_layers: expected an int, got float64"):
        layer(IN, H, np.float64(2))


@each_layer
@pytest.mark.parametrize("form", ["padded", "packed", "step"])
def test_cpu_autocast_gives_the_dtypes_of_torch_gru(layer, form):
    for x_dtype in (torch.float32, torch.bfloat16):
        for h_dtype in (None, torch.float32, torch.bfloat16):
            hx = () if h_dtype is None else (torch.zeros(2, 3, H, dtype=h_dtype),)
            x = packed([4, 2, 1], x_dtype) if form == "packed" else torch.randn(4, 3, IN, dtype=x_dtype)
            rnn, gru = layer(IN, H, 2), nn.GRU(IN, H, 2)
            with torch.autocast("cpu", torch.bfloat16):
                out, h_n = rnn(x, *hx)
                like_out, like_h_n = gru(x, *hx)
                if form == "step":
                    h_n = rnn.step(x[0], *hx)
            assert (out[0].dtype, h_n.dtype) == (like_out[0].dtype, like_h_n.dtype), (x_dtype, h_dtype)
            if h_n.dtype == torch.float32 and x_dtype == torch.float32:
                rnn(x, h_n)  # outside autocast it fits


def pruned(rnn):
    prune.random_unstructured(rnn, "weight_ih_l0", 0.5)


HOOKED = {
    "pruning": pruned,
    "weight_norm": lambda rnn: weight_norm(rnn, "weight_ih_l0"),
    "spectral_norm": lambda rnn: spectral_norm(rnn, "weight_ih_l0").eval(),
    "parametrized weight_norm": lambda rnn: parametrizations.weight_norm(rnn, "weight_ih_l0"),
    "parametrized orthogonal": lambda rnn: parametrizations.orthogonal(rnn, "weight_ih_l0"),
}
each_hook = pytest.mark.parametrize("hook", HOOKED.values(), ids=HOOKED)


@each_layer
@each_hook
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_step_uses_what_acts_in_a_call(layer, hook):
    """Streaming right after load_state_dict, without a forward before it."""
    trained, fresh = layer(IN, H, 2), layer(IN, H, 2)
    hook(trained), hook(fresh)
    fresh.load_state_dict(trained.state_dict())
    x, h = torch.randn(6, 4, IN), None
    for x_t in x:
        h = fresh.step(x_t, h)
    torch.testing.assert_close(h, trained(x)[1])


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_hooks_see_a_step_as_a_sequence_of_one(layer, batch_first):
    rnn, shapes = layer(IN, H, batch_first=batch_first), []
    rnn.register_forward_hook(lambda module, arguments, result: shapes.append((arguments[0].shape, result[0].shape)))
    rnn.step(torch.randn(4, IN))
    assert shapes == [((4, 1, IN), (4, 1, H)) if batch_first else ((1, 4, IN), (1, 4, H))]


@each_layer
@each_hook
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_reset_parameters_draws_anew(layer, hook):
    rnn = layer(IN, H, 2, bidirectional=True)
    hook(rnn)
    before = {name: p.clone() for name, p in rnn.named_parameters()}
    rnn.reset_parameters()
    for name, p in rnn.named_parameters():
        assert not torch.equal(p, before[name]), name
        assert p.abs().max() <= (IN if "_l0" in name else 2 * H) ** -0.5, name


def test_reset_parameters_adds_the_forget_bias_to_what_is_pruned():
    rnn = MinLSTM(IN, H, forget_bias=3.0)
    prune.random_unstructured(rnn, "bias_ih_l0", 0.2)
    rnn.reset_parameters()
    assert rnn.bias_ih_l0_orig[:H].min() > 2 and rnn.bias_ih_l0_orig[H:].max() < 1


def test_fully_sharded_data_parallel():
    """FSDP2 on one process: forward, steps, gradients, reset_parameters."""
    program = """
import os, tempfile, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from minrnn import MinGRU
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/meet", rank=0, world_size=1)
rnn, x, h = MinGRU(3, 5, 2), torch.randn(4, 2, 3), None
out, h_n = rnn(x)
fully_shard(rnn, mesh=init_device_mesh("cpu", (1,)))
for x_t in x:
    h = rnn.step(x_t, h)
torch.testing.assert_close(h, h_n)
torch.testing.assert_close(rnn(x)[0], out)
rnn(x)[0].sum().backward()
assert rnn.weight_ih_l0.grad.shape == (10, 3)
rnn.reset_parameters()
assert not torch.allclose(rnn(x)[0], out)
dist.destroy_process_group()
"""
    run(program)


# --- packed sequences cost what their rows cost --------------------------------------------------------------


@each_layer
def test_memory_of_packed_sequences_is_that_of_their_rows(layer):
    """One of 2000 steps and 63 of two: 2126 rows, where (T, B) would have 128,000."""
    rnn = layer(8, 32, 2, bidirectional=True)
    x = pack_sequence([torch.randn(n, 8) for n in (2000, *[2] * 63)])
    with torch.profiler.profile(profile_memory=True) as profile:
        out, h_n = rnn(x)
        (out.data.sum() + h_n.sum()).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 8 * len(x.data) * 3 * 32 * 4, largest / len(x.data)


# --- threads and processes -----------------------------------------------------------------------------------


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_scan_of_two_threads_runs_while_the_interpreter_ends():
    """In atexit, and in a thread that outlives the main one."""
    done = run(
        """
import atexit, threading, time, torch
from minrnn.ops import mingru_scan
torch.set_num_threads(2)
x = torch.randn(4, 600, 512)
expected = mingru_scan(x, x)
def check(name):
    assert torch.equal(mingru_scan(x, x), expected)
    print(name)
atexit.register(check, "atexit")
def late():
    threading.main_thread().join()
    time.sleep(0.2)
    check("thread")
threading.Thread(target=late).start()
"""
    )
    assert sorted(done.stdout.split()) == ["atexit", "thread"] and not done.stderr, done.stderr


def test_a_fork_while_another_thread_compiles_does_not_hang(tmp_path):
    run(
        """
import os, signal, threading, time, torch
from minrnn.ops import linear_scan
x = torch.rand(1, 4, 32)
thread = threading.Thread(target=linear_scan, args=(x, x))  # imports, then compiles: there is no cache
thread.start()
for wait in (0.05, 1.0):
    time.sleep(wait)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        y = x.double() if wait > 0.5 else x
        os._exit(0 if torch.allclose(linear_scan(y, y), linear_scan(y, y, backend="reference")) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, wait
thread.join()
""",
        NUMBA_CACHE_DIR=str(tmp_path),
    )


def test_the_first_call_loads_no_compiler_of_torch():
    """It took seconds of the first call in every process."""
    run(
        """
import sys, torch
before = set(sys.modules)
from minrnn import MinGRU
out, _ = MinGRU(3, 5)(torch.randn(4, 2, 3))
out.sum().backward()
new = {name for name in set(sys.modules) - before}
assert not {n for n in new if n.startswith(("torch._dynamo", "torch._inductor", "sympy", "torch.onnx"))}, new
"""
    )


# --- the kernels' cache --------------------------------------------------------------------------------------

SCAN = """
import torch, warnings, sys
from minrnn.ops import linear_scan
x = torch.rand(2, 5, 32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert torch.allclose(linear_scan(x, x), linear_scan(x, x, backend="reference"))
print(*(w.message for w in caught))
"""


def test_a_damaged_cache_is_named_and_renewed(tmp_path):
    assert run(SCAN, NUMBA_CACHE_DIR=str(tmp_path)).stdout.strip() == ""
    for ending in ("nbi", "nbc"):
        files = list(tmp_path.rglob(f"*.{ending}"))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        said = run(SCAN, NUMBA_CACHE_DIR=str(tmp_path)).stdout
        assert "a compiled CPU kernel there is damaged" in said and str(tmp_path) in said
    assert run(SCAN, NUMBA_CACHE_DIR=str(tmp_path)).stdout.strip() == ""


def test_a_kernel_that_cannot_be_kept_is_used(tmp_path):
    program = (
        """
from numba.core.caching import IndexDataCacheFile
def save(*arguments):
    raise OSError(28, "No space left on device")
IndexDataCacheFile.save = save
"""
        + SCAN
    )
    said = run(program, NUMBA_CACHE_DIR=str(tmp_path)).stdout
    assert "could not be kept there" in said and "No space left on device" in said


def test_kernels_depend_on_all_their_sources(tmp_path, monkeypatch):
    from minrnn.ops import compiled, cpu, selective_cpu

    stamp = compiled._sources()
    for kernel in (cpu._forward, cpu._backward, selective_cpu._forward, selective_cpu._backward):
        assert kernel._cache._cache_file._source_stamp == stamp
    folder = Path(compiled.__file__).parent
    users = {file.name for file in folder.glob("*.py") if ".compiled import" in file.read_text()}
    assert users < set(compiled.SOURCES)
    for name in compiled.SOURCES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    assert compiled._sources() == stamp
    for name in compiled.SOURCES:
        with open(tmp_path / name, "a") as file:
            file.write("\n")
        assert compiled._sources() != stamp
        stamp = compiled._sources()
