"""The public scans, their checks, the one resolver of backends, and the registration with torch."""

import importlib.util
import os
from types import ModuleType
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import log_space, onnx_scan, reference
from .cells import CELLS, LINEAR, Activation, Cell, coefficients
from .memory import empty
from .operators import below_autograd, define, is_transformed, load

Backend: TypeAlias = Literal["auto", "reference", "log", "cpu", "triton"]
BACKENDS = get_args(Backend)[1:]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, resets: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Returns the states h_t = a_t h_{t-1} + b_t along the second dimension, for each sequence and channel.

    Args:
        a: (B, T, D) coefficients, any sign; float64, float32, float16 or bfloat16.
        b: (B, T, D) inputs, a's dtype and device.
        h0: (B, D) state before the first step, any sign, same dtype; None means zeros.
        resets: (B, T) bool; where true, the state entering that step is zero (at the first step h0 is dropped).
        backend: "auto", "reference", "log", "cpu" or "triton" (see `available_backends`).

    Returns:
        (B, T, D) states in the inputs' dtype; the last state is `h[:, -1]`. Compiled backends accumulate in
        float32 (float64 for float64). Their memory order follows the first input's: time is outermost if it
        is so there. Differentiable in a, b and h0, any number of times, by reverse mode; for
        forward mode use backend="reference".

    Raises:
        TypeError: an argument is not a tensor of the expected dtype.
        ValueError: a shape or device does not fit, or the backend is unknown or cannot run here.
    """
    return _checked_scan(LINEAR, (a, b), h0, resets, backend)


def mingru_scan(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    activation: Activation = "g",
    signed: bool = False,
    resets: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Returns minGRU's states h_t = (1 - z_t) h_{t-1} + z_t c_t; z = sigmoid(gate), c = activation(candidate).

    arXiv 2410.01201, section 3.1 (activation="identity") and appendix B (activation="g"). With signed=True
    h_t = s_t h_{t-1} + (1 - |s_t|) c_t, s = 1 - 2 z: coefficients in (-1, 1), which let a state count modulo 2
    (arXiv 2411.12537).

    Args:
        gate, candidate: (B, T, D) pre-activations. Two halves of one (B, T, 2D) projection are read in place.
        activation: "g" (x + 0.5 for x >= 0, else sigmoid(x)) or "identity".
        signed: whether the state's coefficient may be negative; not with backend="log".

    h0, resets, backend, the result and the errors are those of `linear_scan`.
    """
    return _checked_scan(Cell("mingru", activation, signed=signed), (gate, candidate), h0, resets, backend)


def minlstm_scan(
    forget_gate: Tensor,
    input_gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    activation: Activation = "g",
    normalize: bool = True,
    signed: bool = False,
    resets: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Returns minLSTM's states h_t = f_t h_{t-1} + i_t c_t with c = activation(candidate).

    With f, i the sigmoids of the gates, normalize=True divides both by f + i (arXiv 2410.01201, section 3.2);
    normalize=False leaves them independent, as the authors' public code does by default. With signed=True
    h_t = s_t h_{t-1} + (1 - |s_t|) c_t, s = f - i; with normalize=False as well h_t = (2 f_t - 1) h_{t-1} + i_t c_t.

    Args:
        forget_gate, input_gate, candidate: (B, T, D) pre-activations.
        activation, signed: as in `mingru_scan`.

    h0, resets, backend, the result and the errors are those of `linear_scan`.
    """
    cell = Cell("minlstm", activation, normalize, signed)
    return _checked_scan(cell, (forget_gate, input_gate, candidate), h0, resets, backend)


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Returns the backends that can run on tensors of this device in this process."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return ()
    return tuple(name for name in BACKENDS if _unusable(name, device, torch.float32) is None)


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the backend's name; "auto" is "cpu" on a CPU, "triton" on a CUDA device, "reference" elsewhere.

    Raises ValueError with the reason if the choice cannot run; there is no fallback.
    """
    if backend == "auto":
        backend = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = _unusable(backend, device, dtype)
    if reason:
        raise ValueError(f"backend: {backend!r} cannot run on {device} with {dtype}: {reason}")
    return backend


def _unusable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "cpu" and device.type != "cpu":
        return "it works on CPU tensors"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it works on CUDA tensors (on CPU tensors only with TRITON_INTERPRET=1, slowly)"
        if device.type not in ("cpu", "cuda"):
            return "it works on CUDA tensors"
        if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
            return "this GPU has no bfloat16 (it needs compute capability 8.0); use float16 or float32"
    return None


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on; False, not an error, on the meta device, which has no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_onnx_exporting() -> bool:
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


# torch.compiler.assume_constant_result does this too, but loads the compiler. Dynamo takes is_in_onnx_export as False.
is_onnx_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked_scan(
    cell: Cell, inputs: tuple[Tensor, ...], h0: Tensor | None, resets: Tensor | None, backend: str
) -> Tensor:
    floats = dict(zip(cell.inputs, inputs, strict=True))
    if h0 is not None:
        floats["h0"] = h0
    first_name, first = cell.inputs[0], inputs[0]
    for name, x in floats.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a tensor of float64, float32, float16 or bfloat16, got {x.dtype}")
    if first.dim() != 3:
        raise ValueError(f"{first_name}: expected shape (B, T, D), got {tuple(first.shape)}")
    B, T, D = first.shape
    if is_autocast_enabled(first.device):  # the widest dtype wins, as in torch's own ops that mix dtypes
        dtype = first.dtype
        for x in floats.values():
            dtype = torch.promote_types(dtype, x.dtype)
        floats = {name: x.to(dtype) for name, x in floats.items()}
        first = floats[first_name]
    for name, x in floats.items():
        shape = (B, D) if name == "h0" else (B, T, D)
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)} to fit {first_name}, got {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first_name}'s dtype {first.dtype}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{name}: expected {first_name}'s device {first.device}, got {x.device}")
    if resets is not None:
        if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
            got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
            raise TypeError(f"resets: expected a bool tensor, got {got}")
        if resets.shape != (B, T):
            raise ValueError(f"resets: expected shape {(B, T)} to fit {first_name}, got {tuple(resets.shape)}")
        if resets.device != first.device:
            raise ValueError(f"resets: expected {first_name}'s device {first.device}, got {resets.device}")
    h0 = floats.get("h0")
    return scan(cell, tuple(floats[name] for name in cell.inputs), h0, resets, False, backend)


def scan(
    cell: Cell,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None = None,
    resets: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Returns the states (B, T, D) of any cell, without checking the arguments.

    `inputs` are the cell's, or one tensor (B, T, n D) that holds all n side by side, as a fused projection does:
    its gradient is then one tensor too, without a copy. `reverse` runs from the last step to the first: h0 is the
    state after the last step, and a reset clears the state that enters its step from there. `cu_seqlens`, int64
    (S + 1,) on the CPU, packs S sequences end to end into inputs of B = 1: it holds the start of each and the end of
    the last. h0 is then (S, D), and each sequence has at least one step.
    """
    backend = resolve(backend, inputs[0].device, inputs[0].dtype)
    if backend in ("cpu", "triton") and not torch.compiler.is_compiling():
        if any(unpack_dual(x).tangent is not None for x in _present(*inputs, h0)):  # torch would drop it in silence
            raise NotImplementedError(f"backend: {backend!r} has no forward-mode derivative; use backend='reference'")
    if is_onnx_exporting():
        backend = "onnx"
    if backend in ("reference", "log", "onnx"):
        loop = {"reference": reference.scan, "log": log_space.scan, "onnx": onnx_scan.scan}[backend]
        return loop(cell, _separate(cell, inputs), h0, resets, cu_seqlens, reverse)
    x0, x1, x2 = _pad(inputs)
    op = _Scan.apply if is_transformed() else torch.ops.minrnn.scan
    return op(cell.name, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend)


def _separate(cell: Cell, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0].chunk(len(cell.inputs), -1) if len(inputs) == 1 else inputs


def _pad(inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return (*inputs, *(None,) * (3 - len(inputs)))


def _present(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x for x in inputs if x is not None)


def _kernels(backend: str) -> ModuleType:
    return load("cpu" if backend == "cpu" else "triton_scan")


def _empty_like(x: Tensor, D: int, new=empty) -> Tensor:
    """Returns an empty (B, T, D) with D contiguous, and time outermost if it is so in `x`."""
    B, T, width = x.shape
    rows = width == 1 or x.stride(2) == 1
    if B > 1 and T > 1 and rows and 0 < x.stride(0) < x.stride(1):
        return new((T, B, D), x).transpose(0, 1)
    return new((B, T, D), x)


def _empty_fake(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(shape)


def _empty_states(cell: Cell, inputs: tuple[Tensor, ...], new=empty) -> Tensor:
    width = inputs[0].shape[2]
    return _empty_like(inputs[0], width // len(cell.inputs) if len(inputs) == 1 else width, new)


def _rows(x: Tensor | None) -> Tensor | None:
    """Returns x with D contiguous, as the kernels read it, in any layout otherwise. Copies only if D is not."""
    if x is None or x.shape[-1] == 1 or x.stride(-1) == 1:
        return x
    return x.contiguous()


def _scan(cell, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend):
    cell, inputs = CELLS[cell], _present(x0, x1, x2)
    out = _empty_states(cell, inputs)
    if out.numel():
        rows = _separate(cell, tuple(_rows(x) for x in inputs))
        _kernels(backend).forward(cell, rows, _rows(h0), resets, cu_seqlens, reverse, out)
    return out


def _scan_fake(cell, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend):
    return _empty_states(CELLS[cell], _present(x0, x1, x2), _empty_fake)


def _empty_gradients(x0, x1, x2, h0, new):
    """Returns empty gradients of x0, x1, x2 and h0, without elements for those that are None.

    Their number is fixed because torch cannot batch gradients (is_grads_batched) of an operator that returns a list.
    """
    absent = new((0,), x0)
    inputs = (absent if x is None else _empty_like(x, x.shape[2], new) for x in (x0, x1, x2))
    return *inputs, absent if h0 is None else new(h0.shape, h0)


def _scan_backward(cell, grad, h, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend):
    cell, inputs = CELLS[cell], _present(x0, x1, x2)
    results = _empty_gradients(x0, x1, x2, h0, empty)
    grads, grad_h0 = results[: len(inputs)], None if h0 is None else results[3].zero_()
    if h.numel():
        rows = _separate(cell, tuple(_rows(x) for x in inputs))
        _kernels(backend).backward(
            cell, rows, _rows(h0), resets, cu_seqlens, reverse, _rows(h), _rows(grad), _separate(cell, grads), grad_h0
        )
    return results


def _scan_backward_fake(cell, grad, h, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend):
    return _empty_gradients(x0, x1, x2, h0, _empty_fake)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(cell, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend):
        with below_autograd():
            return torch.ops.minrnn.scan(cell, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, *tensors, ctx.reverse, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx, grad):
        *inputs, resets, cu_seqlens, h = ctx.saved_tensors
        options = (resets, cu_seqlens, ctx.reverse, ctx.backend)
        if torch.is_grad_enabled():  # create_graph=True: the same gradients from differentiable parts
            grads = _composite_backward(CELLS[ctx.cell], *inputs, *options, h, grad)
        else:
            results = torch.ops.minrnn.scan_backward(ctx.cell, grad, h, *inputs, *options)
            grads = (None if x is None else g for x, g in zip(inputs, results, strict=True))
        return None, *grads, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, cell, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend):
        """Folds examples into the batch; packed examples are scanned one after the other."""
        V = info.batch_size

        def examples(x, dim):
            return x if x is None else x.expand(V, *x.shape) if dim is None else x.movedim(dim, 0)

        tensors = [examples(x, dim) for x, dim in zip((x0, x1, x2, h0, resets), in_dims[1:6], strict=True)]
        if cu_seqlens is None:
            folded = (None if x is None else x.flatten(0, 1) for x in tensors)
            h = _Scan.apply(cell, *folded, None, reverse, backend)
            return h.unflatten(0, (V, h.shape[0] // V)), 0
        each = zip(*((None,) * V if x is None else x.unbind(0) for x in tensors), strict=True)
        return torch.stack([_Scan.apply(cell, *xs, cu_seqlens, reverse, backend) for xs in each]), 0


define(
    "scan(str cell, Tensor x0, Tensor? x1, Tensor? x2, Tensor? h0, Tensor? resets, Tensor? cu_seqlens, bool reverse,"
    " str backend) -> Tensor",
    _scan, _scan_fake, _Scan,
)  # fmt: skip
define(
    "scan_backward(str cell, Tensor grad, Tensor h, Tensor x0, Tensor? x1, Tensor? x2, Tensor? h0, Tensor? resets,"
    " Tensor? cu_seqlens, bool reverse, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _scan_backward, _scan_backward_fake,
)  # fmt: skip


def _composite_backward(cell, x0, x1, x2, h0, resets, cu_seqlens, reverse, backend, h, grad):
    """Returns the gradients of x0, x1, x2 and h0 from differentiable operations, among them the linear scan.

    The gradient s_t that reaches state t is s_t = grad_t + a_{t+1} s_{t+1}, a scan in the other direction.
    """
    # Views, so that a path from one input to another is not counted both here and in the outer graph.
    inputs = tuple(x.view_as(x) for x in _present(x0, x1, x2))
    compute = torch.promote_types(h.dtype, torch.float32)
    a, b = coefficients(cell, tuple(x.to(compute) for x in _separate(cell, inputs)))
    if cu_seqlens is None:
        steps = torch.arange(h.shape[1], device=h.device)
        starts, stops = steps[:1], steps[-1:]
        initial = (h.new_zeros(h.shape[0], h.shape[2]) if h0 is None else h0)[:, None][:, : h.shape[1]]
    else:
        starts, stops = cu_seqlens[:-1].to(h.device), cu_seqlens[1:].to(h.device) - 1
        initial = (h.new_zeros(starts.shape[0], h.shape[2]) if h0 is None else h0)[None]
    first, last = (stops, starts) if reverse else (starts, stops)
    previous = _shift(h.to(compute), reverse).index_copy(1, first, initial.to(compute))
    carried = a
    if resets is not None:
        carried = torch.where(resets[..., None], 0.0, a)
        previous = torch.where(resets[..., None], 0.0, previous)
    following = _shift(carried, not reverse).index_fill(1, last, 0.0)
    s = scan(LINEAR, (following, grad.to(compute)), None, None, not reverse, backend, cu_seqlens)
    grad_h0 = None
    if h0 is not None:
        grad_h0 = (carried * s).index_select(1, first).sum(1 if cu_seqlens is None else 0).to(h0.dtype)
    reached = [(y, dy) for y, dy in ((a, s * previous), (b, s)) if y.requires_grad]
    differentiable = [x for x in inputs if x.requires_grad]
    if not differentiable:
        return None, None, None, grad_h0
    outputs, grad_outputs = zip(*reached, strict=True)
    found = iter(torch.autograd.grad(outputs, differentiable, grad_outputs, create_graph=True))
    return *_pad(tuple(next(found) if x.requires_grad else None for x in inputs)), grad_h0


def _shift(x: Tensor, back: bool) -> Tensor:
    """Returns each step's predecessor, or its successor if `back`; zeros beyond the ends."""
    return F.pad(x, (0, 0, 0, 1))[:, 1:] if back else F.pad(x, (0, 0, 1, 0))[:, :-1]
