"""Export to ONNX: what torch.onnx needs to know about this library's scan.

    program = torch.onnx.export(
        rnn, (x, h_0), dynamo=True, custom_translation_table=minrnn.onnx.translations()
    )

The gates become ordinary ONNX operators over the whole sequence, the recurrence the operator Scan. Sequence length
and batch size may be dynamic. A module that calls `rnn.step` exports without any of this.

float16: onnxruntime 1.31 on a CPU crashes while it loads some models with several layers, unless
SessionOptions.graph_optimization_level is ORT_ENABLE_EXTENDED or lower; bfloat16 it does not run on a CPU.
"""

from collections.abc import Callable

import torch

from .ops import scan as _scan_module  # noqa: F401  registers torch.ops.minrnn.scan
from .ops.cells import CELLS, Cell

try:
    from onnxscript import graph, ir, script
    from onnxscript import opset18 as op
    from onnxscript.onnx_types import TensorType
    from onnxscript.values import Opset
except ImportError as error:
    raise ImportError("minrnn.onnx needs onnxscript: pip install minrnn[onnx]") from error


def translations() -> dict[Callable, Callable]:
    """For torch.onnx.export(..., dynamo=True, custom_translation_table=translations())."""
    return {torch.ops.minrnn.scan.default: _scan}


def _scan(
    cell: str,
    x0: TensorType,
    x1: TensorType | None,
    x2: TensorType | None,
    h0: TensorType | None,
    resets: TensorType | None,
    reverse: bool,
    backend: str,
) -> TensorType:
    """torch.ops.minrnn.scan in ONNX, whatever the backend: fp16 and bf16 accumulate in float32 here too."""
    cell = CELLS[cell]
    half = x0.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

    def wide(x):
        return op.Cast(x, to=ir.DataType.FLOAT) if half else x

    if x1 is None:
        inputs = op.Split(x0, axis=-1, num_outputs=len(cell.inputs))
    else:
        inputs = (x0, x1, x2)[: len(cell.inputs)]
    a, b = _coefficients(cell, [wide(x) for x in inputs])
    if resets is not None:
        a = op.Where(op.Unsqueeze(resets, op.Constant(value_ints=[2])), op.CastLike(0.0, a), a)
    if h0 is None:
        B_D = op.Concat(op.Shape(b, start=0, end=1), op.Shape(b, start=2, end=3), axis=0)
        h0 = op.Expand(op.CastLike(0.0, b), B_D)
    else:
        h0 = wide(h0)
    direction = int(reverse)
    h = _recurrence(a, b, h0, input_directions=[direction, direction], output_directions=[direction])
    return op.CastLike(h, x0) if half else h


def _coefficients(cell: Cell, inputs: list):
    """`minrnn.ops.cells.coefficients` in ONNX, as stable as there."""
    if cell.kind == "linear":
        return inputs
    *gates, candidate = inputs
    if cell.activation == "g":
        positive = op.GreaterOrEqual(candidate, op.CastLike(0.0, candidate))
        candidate = op.Where(positive, op.Add(candidate, op.CastLike(0.5, candidate)), op.Sigmoid(candidate))
    if cell.kind == "mingru":
        (gate,) = gates
    else:
        forget_gate, input_gate = gates
        if not cell.normalize:
            return op.Sigmoid(forget_gate), op.Mul(op.Sigmoid(input_gate), candidate)
        gate = op.Sub(_log_sigmoid(input_gate), _log_sigmoid(forget_gate))  # i / (f + i) = sigmoid(log i - log f)
    return op.Sigmoid(op.Neg(gate)), op.Mul(op.Sigmoid(gate), candidate)


def _log_sigmoid(x):
    """min(x, 0) - log(1 + exp(-|x|)); not by the operator Softplus, which onnxruntime lacks in float64."""
    one = op.CastLike(1.0, x)
    return op.Sub(op.Neg(op.Relu(op.Neg(x))), op.Log(op.Add(one, op.Exp(op.Neg(op.Abs(x))))))


@script(Opset("minrnn", 1), default_opset=op)
def _recurrence(
    a: TensorType, b: TensorType, h0: TensorType, input_directions: list[int], output_directions: list[int]
) -> TensorType:
    """All states (B, T, D) of h_t = a_t h_{t-1} + b_t; h0 is (B, D). A direction is 1 where time runs backwards."""

    @graph()
    def step(h, a_t, b_t):
        new = a_t * h + b_t
        return new, op.Identity(new)

    last, states = op.Scan(
        h0,
        a,
        b,
        body=step,
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
        scan_input_directions=input_directions,
        scan_output_directions=output_directions,
    )
    return states
