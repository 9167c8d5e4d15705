"""What the scans are held to: the reference loop in float64, output and every gradient by name."""

import torch

from minrnn.ops.cells import LINEAR
from minrnn.ops.scan import scan

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def draw(cell, B, T, D, dtype=torch.float32, device="cpu", scale=1.0):
    """Inputs of a cell: normal pre-activations; coefficients in (0, 1) for the linear scan."""
    inputs = [torch.randn(B, T, D) * scale for _ in cell.inputs]
    if cell == LINEAR:
        inputs[0] = torch.rand(B, T, D)
    return [x.to(device, dtype) for x in inputs]


def evaluate(cell, inputs, h0, resets, reverse, backend, weight, cu_seqlens=None):
    """{name: tensor} of the states, the last state and the gradients of sum(weight * states)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h0 = h0 if h0 is None else h0.detach().requires_grad_()
    h = scan(cell, tuple(leaves), h0, resets, reverse, backend, cu_seqlens)
    wanted = leaves + ([h0] if h0 is not None else [])
    grads = torch.autograd.grad(h, wanted, weight)
    names = [f"grad of input {i}" for i in range(len(leaves))] + ["grad of h0"]
    return {"h": h.detach()} | dict(zip(names, grads, strict=False))


def assert_matches_float64(
    cell, inputs, h0=None, resets=None, reverse=False, backend="cpu", tolerance=None, weight=None
):
    """Runs `backend` and the float64 reference on the same numbers; relative error in the Frobenius norm.

    `weight` is the gradient of the states (drawn where it is not given).

    Where the reference is NaN or infinite, the result must be so too, with the same sign; those elements are
    left out of the norm.
    """
    if weight is None:
        weight = torch.randn(*inputs[0].shape[:2], _width(cell, inputs)).to(inputs[0])
    got = evaluate(cell, inputs, h0, resets, reverse, backend, weight)
    wide = [x.double().cpu() for x in inputs]
    expected = evaluate(
        cell,
        wide,
        None if h0 is None else h0.double().cpu(),
        None if resets is None else resets.cpu(),
        reverse,
        "reference",
        weight.double().cpu(),
    )
    assert got.keys() == expected.keys()
    tolerance = tolerance or TOLERANCE[inputs[0].dtype]
    for name, e in expected.items():
        g = got[name].double().cpu()
        assert g.shape == e.shape, name
        assert got[name].dtype == inputs[0].dtype, name
        assert torch.equal(g.isnan(), e.isnan()), f"{name}: NaN in other places"
        assert torch.equal(g.isinf(), e.isinf()) and torch.equal(g[e.isinf()], e[e.isinf()]), f"{name}: infinities"
        finite = e.isfinite()
        norm = e[finite].norm().item()
        error = (g[finite] - e[finite]).norm().item()
        assert error <= tolerance * norm, f"{cell.name} {name}: relative error {error / norm if norm else error:.1e}"


def end_to_end(cell, lengths, D, dtype=torch.float32, device="cpu"):
    """Inputs (1, sum of the lengths, D), h0 of each sequence, resets, and a gradient of the states."""
    inputs = draw(cell, 1, sum(lengths), D, dtype, device)
    h0, weight = torch.randn(len(lengths), D).to(inputs[0]), torch.randn(1, sum(lengths), D).to(inputs[0])
    return inputs, h0, (torch.rand(1, sum(lengths)) < 0.2).to(device), weight, lengths


def assert_each_is_alone(cell, inputs, h0, resets, reverse, backend, weight, lengths, tolerance=0.0):
    """States and gradients of sequences that lie end to end are those of each by itself."""
    whole = evaluate(cell, inputs, h0, resets, reverse, backend, weight, torch.tensor([0, *lengths]).cumsum(0))
    parts = zip(*(x.split(lengths, 1) for x in (*inputs, weight)), strict=True)
    states = [None] * len(lengths) if h0 is None else h0.split(1)
    clear = [None] * len(lengths) if resets is None else resets.split(lengths, 1)
    alone = [
        evaluate(cell, part, state, reset, reverse, backend, grad)
        for (*part, grad), state, reset in zip(parts, states, clear, strict=True)
    ]
    for name, got in whole.items():
        want = torch.cat([x[name] for x in alone], 0 if name == "grad of h0" else 1)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def _width(cell, inputs):
    return inputs[0].shape[2] // (len(cell.inputs) if len(inputs) == 1 else 1)
