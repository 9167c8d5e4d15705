"""The scan in a form that torch.onnx can export: gates over the whole sequence, then torch's own `scan` operator."""

import torch
from torch import Tensor

from .cells import Cell
from .reference import start


def scan(
    cell: Cell,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Returns states (B, T, D) in the inputs' dtype (bf16, fp16 accumulate in float32). Exports as ONNX's Scan."""
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.onnx.export(..., dynamo=False): TorchScript has no operator for this scan; use dynamo=True"
        )
    from torch._higher_order_ops.scan import scan as loop  # imported here because it loads torch's compiler

    a, b, h = start(cell, inputs, h0, cu_seqlens, reverse, _log_sigmoid)
    if resets is not None:
        a = torch.where(resets[..., None], 0.0, a)

    def step(h, coefficients):
        a_t, b_t = coefficients
        h = a_t * h + b_t
        return h, h.clone()

    return loop(step, h, (a, b), dim=1, reverse=reverse)[1].to(inputs[0].dtype)


def _log_sigmoid(x: Tensor) -> Tensor:
    """Returns log(sigmoid(x)), finite everywhere; the exporter's own form is not. Not for training: slope 0 at 0."""
    return -torch.relu(-x) - torch.log1p(torch.exp(-x.abs()))
