"""The selective scan of Mamba's S6: its checks, its loop, and the registration with torch."""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .memory import empty
from .operators import below_autograd, define, is_transformed, load
from .scan import _empty_fake, _empty_like, _rows, is_autocast_enabled, resolve

DTYPES = (torch.float64, torch.float32)
BACKENDS = ("reference", "cpu", "triton")


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Returns y_t = sum over n of C_t[n] h_t[n], h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t per channel, and the last h.

    arXiv 2312.00752, section 3.2, algorithm 2, without its softplus of dt and its term D u. A state has N numbers per
    channel and is never stored for all steps: the compiled backends keep the states of every few steps for the backward
    pass, which recomputes the others.

    Args:
        u, dt: (B, T, D); float64 or float32. Autocast widens narrower ones to float32, as for `torch.exp`.
        A: (D, N), the same for all steps.
        B, C: (B, T, N), the same for all channels.
        h0: (B, D, N), the state before the first step; None means zeros.
        backend: "auto", "reference", "cpu" or "triton" (see `minrnn.ops.available_backends`).

    Returns:
        y (B, T, D) and the last state (B, D, N), in the inputs' dtype. Both are differentiable in all inputs, by
        reverse mode; higher derivatives use the plain loop. For forward mode use backend="reference".

    Raises:
        TypeError: an argument is not a tensor of the expected dtype.
        ValueError: a shape or device does not fit, or the backend is unknown or cannot run here.
    """
    tensors = {"u": u, "dt": dt, "A": A, "B": B, "C": C} | ({} if h0 is None else {"h0": h0})
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if is_autocast_enabled(u.device):
        dtype = torch.float32
        for x in tensors.values():
            dtype = torch.promote_types(dtype, x.dtype)
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        u = tensors["u"]
    if u.dim() != 3:
        raise ValueError(f"u: expected shape (B, T, D), got {tuple(u.shape)}")
    batch, T, D = u.shape
    if tensors["A"].dim() != 2 or tensors["A"].shape[0] != D:
        raise ValueError(f"A: expected shape (D, N) with D = {D} to fit u, got {tuple(tensors['A'].shape)}")
    N = tensors["A"].shape[1]
    shapes = {"dt": (batch, T, D), "B": (batch, T, N), "C": (batch, T, N), "h0": (batch, D, N)}
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a tensor of float64 or float32, got {x.dtype}")
        if x.shape != shapes.get(name, x.shape):
            raise ValueError(f"{name}: expected shape {tuple(shapes[name])} to fit u and A, got {tuple(x.shape)}")
        if x.dtype != u.dtype:
            raise TypeError(f"{name}: expected u's dtype {u.dtype}, got {x.dtype}")
        if x.device != u.device:
            raise ValueError(f"{name}: expected u's device {u.device}, got {x.device}")
    backend = resolve(backend, u.device, u.dtype)
    if backend == "log":
        raise ValueError("backend: 'log' has no selective scan; use 'reference', 'cpu' or 'triton'")
    if backend == "reference":
        return _reference(**tensors)
    if not torch.compiler.is_compiling():
        if any(unpack_dual(x).tangent is not None for x in tensors.values()):  # torch would drop it in silence
            raise NotImplementedError(f"backend: {backend!r} has no forward-mode derivative; use backend='reference'")
    op = _SelectiveScan.apply if is_transformed() else torch.ops.minrnn.selective_scan
    y, last, _ = op(*(tensors.get(name) for name in ("u", "dt", "A", "B", "C", "h0")), backend)
    return y, last


def _reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns y and the last state from the plain time loop, differentiable any number of times."""
    h = u.new_zeros(u.shape[0], *A.shape) if h0 is None else h0.clone()  # a result must not be an argument itself
    y = []
    # unbind, because the gradient of u[:, t] is a tensor as large as u
    for u_t, dt_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, dt, B, C)), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t[:, None]
        y.append((h @ C_t[..., None]).squeeze(-1))
    return torch.stack(y, 1) if y else u * dt, h


def _kernels(backend: str) -> ModuleType:
    return load("selective_cpu" if backend == "cpu" else "selective_triton")


# A state is saved every so many steps. On a CPU the states of these steps and their exponentials fit into the L2 cache
# for 16 channels; on a GPU they fit into registers.
STEPS = {"cpu": 64, "triton": 8}


def _empty_results(u, A, backend, new):
    """Returns empty y, last state, and states entering each stretch of STEPS: (B, stretches, N, D), flat.

    Channels are contiguous in states, as the kernels work on neighbouring ones together. The saved states are flat
    because torch.export would fix the size of a dimension that may be 1.
    """
    (batch, T, D), N = u.shape, A.shape[1]
    stretches = (T + STEPS[backend] - 1) // STEPS[backend]
    return _empty_like(u, D, new), new((batch, N, D), u).mT, new((batch * stretches * N * D,), u)


def _scan(u, dt, A, B, C, h0, backend):
    """Returns y, the last state and the saved states, which have no gradient."""
    y, last, saved = _empty_results(u, A, backend, empty)
    if y.numel() and A.numel():
        inputs = (_rows(u), _rows(dt), A, _rows(B), _rows(C), h0)
        _kernels(backend).forward(*inputs, y, last, saved, STEPS[backend])
    else:
        y.zero_()
        last.zero_() if h0 is None else last.copy_(h0)
    return y, last, saved


def _scan_fake(u, dt, A, B, C, h0, backend):
    return _empty_results(u, A, backend, _empty_fake)


def _empty_gradients(u, dt, A, B, C, has_h0, new):
    """Returns empty gradients of u, dt, A, B, C and h0, the last without elements if there is no h0."""
    N = A.shape[1]
    grads = _empty_like(u, u.shape[2], new), _empty_like(dt, u.shape[2], new), new(A.shape, A)
    grad_h0 = new((u.shape[0], N, u.shape[2]), u).mT if has_h0 else new((0,), u)
    return *grads, _empty_like(B, N, new), _empty_like(C, N, new), grad_h0


def _scan_backward(grad, grad_last, saved, u, dt, A, B, C, has_h0, backend):
    """Returns the gradients of the inputs; either of the given gradients may be None."""
    grads = _empty_gradients(u, dt, A, B, C, has_h0, empty)
    if u.numel() and A.numel():
        inputs = (_rows(u), _rows(dt), A, _rows(B), _rows(C))
        given = (saved, _rows(grad), grad_last)
        _kernels(backend).backward(*inputs, *given, *grads[:5], grads[5] if has_h0 else None, STEPS[backend])
    else:
        for x in grads:
            x.zero_()
        if has_h0 and grad_last is not None:
            grads[5].copy_(grad_last)
    return grads


def _scan_backward_fake(grad, grad_last, saved, u, dt, A, B, C, has_h0, backend):
    return _empty_gradients(u, dt, A, B, C, has_h0, _empty_fake)


class _SelectiveScan(torch.autograd.Function):
    # torch.func.vmap goes through the operator, example after example
    generate_vmap_rule = True

    @staticmethod
    def forward(u, dt, A, B, C, h0, backend):
        with below_autograd():
            return torch.ops.minrnn.selective_scan(u, dt, A, B, C, h0, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    def backward(ctx, grad, grad_last, _):
        *inputs, saved = ctx.saved_tensors
        if grad is None and grad_last is None:
            return (None,) * 7
        if torch.is_grad_enabled():  # create_graph=True: the same gradients from differentiable parts
            return *_composite_backward(inputs, grad, grad_last), None
        has_h0 = inputs[5] is not None
        *grads, grad_h0 = torch.ops.minrnn.selective_scan_backward(
            grad, grad_last, saved, *inputs[:5], has_h0, ctx.backend
        )
        return *grads, grad_h0 if has_h0 else None, None


define(
    "selective_scan(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? h0, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _scan, _scan_fake, _SelectiveScan,
)  # fmt: skip
define(
    "selective_scan_backward(Tensor? grad, Tensor? grad_last, Tensor saved, Tensor u, Tensor dt, Tensor A, Tensor B,"
    " Tensor C, bool has_h0, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward, _scan_backward_fake,
)  # fmt: skip


def _composite_backward(inputs, grad, grad_last):
    """Returns the gradients from differentiable operations, those of the plain loop."""
    # Views, so that a path from one input to another is not counted both here and in the outer graph.
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    outputs = [(x, g) for x, g in zip(_reference(*inputs), (grad, grad_last), strict=True) if g is not None]
    outputs = [(x, g) for x, g in outputs if x.requires_grad]
    differentiable = [x for x in inputs if x is not None and x.requires_grad]
    if not outputs or not differentiable:
        return [None] * 6
    results, weights = zip(*outputs, strict=True)
    found = iter(torch.autograd.grad(results, differentiable, weights, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]
