"""What is exported to ONNX computes in onnxruntime what it computes here."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

onnxruntime = pytest.importorskip("onnxruntime", reason="needs minrnn[onnx]: onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="needs minrnn[onnx]: onnxscript is not installed")

from minrnn import MinGRU, MinLSTM  # noqa: E402
from minrnn.ops.cells import CELLS  # noqa: E402
from minrnn.ops.scan import scan  # noqa: E402

IN, H = 3, 5
DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def exported(model, arguments, dynamic_shapes=None):
    """A function that runs the exported model in onnxruntime on torch tensors."""
    program = torch.onnx.export(
        model.eval(),
        arguments,
        dynamo=True,
        verbose=False,
        dynamic_shapes=dynamic_shapes,
    )
    # one level below the default: with it onnxruntime 1.31 crashes on some models of several layers in float16
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.intra_op_num_threads = 1  # its threads spin between calls, beside torch's
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), settings)
    names = [entry.name for entry in session.get_inputs()]

    def run(*tensors):
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(np.asarray(y)) for y in session.run(None, feed)]

    return run


def close(actual, expected, tolerance=1e-5):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Scans(nn.Module):
    """One cell in both directions, with and without an initial state and resets."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, inputs, h0, resets):
        return [
            scan(self.cell, tuple(inputs), state, clear, reverse)
            for state, clear, reverse in [
                (h0, resets, False),
                (h0, resets, True),
                (None, None, False),
                (h0, None, True),
            ]
        ]


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_every_cell(cell):
    def arguments(B, T):
        inputs = [torch.randn(B, T, H) * 30 for _ in cell.inputs]  # gates far into saturation
        if cell.kind == "linear":
            inputs[0] = inputs[0].tanh()
        return inputs, torch.randn(B, H), torch.rand(B, T) < 0.3

    model = Scans(cell)
    both = {0: DYNAMIC, 1: DYNAMIC}
    run = exported(model, arguments(3, 4), {"inputs": [both] * len(cell.inputs), "h0": {0: DYNAMIC}, "resets": both})
    inputs, h0, resets = arguments(2, 7)
    for got, want in zip(run(*inputs, h0, resets), model(inputs, h0, resets), strict=True):
        close(got, want)


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
@pytest.mark.parametrize(
    "batch_first, bidirectional, given", [(False, True, True), (True, False, True), (True, True, False)]
)
def test_whole_sequences_of_any_length_and_batch(layer, batch_first, bidirectional, given):
    rnn = layer(IN, H, 2, batch_first=batch_first, bidirectional=bidirectional)

    def arguments(B, T):
        x = torch.randn(*((B, T) if batch_first else (T, B)), IN)
        return (x, torch.randn(2 * (1 + bidirectional), B, H)) if given else (x,)

    shapes = {"input": {0: DYNAMIC, 1: DYNAMIC}} | ({"hx": {1: DYNAMIC}} if given else {})
    run = exported(rnn, arguments(3, 4), shapes)
    for B, T in [(2, 50), (5, 3), (1, 1)]:
        tensors = arguments(B, T)
        for got, want in zip(run(*tensors), rnn(*tensors), strict=True):
            close(got, want)


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
def test_one_step(layer):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(IN, H, 2)

        def forward(self, x_t, h):
            return self.rnn.step(x_t, h)

    model = Step()
    shapes = {"x_t": {0: DYNAMIC}, "h": {1: DYNAMIC}}
    run = exported(model, (torch.randn(3, IN), torch.randn(2, 3, H)), shapes)
    tensors = torch.randn(6, IN), torch.randn(2, 6, H)
    close(run(*tensors)[0], model(*tensors))


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.float64, 1e-12)])
def test_other_dtypes_keep_their_precision_over_long_sequences(layer, dtype, tolerance):
    rnn = layer(IN, H, dtype=dtype)
    x, h_0 = torch.randn(500, 2, IN).to(dtype), torch.randn(1, 2, H).to(dtype)
    for got, want in zip(exported(rnn, (x, h_0))(x, h_0), rnn(x, h_0), strict=True):
        close(got, want, tolerance)


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
def test_what_has_no_onnx_is_refused_by_name(layer):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(IN, H)

        def forward(self, rows, batch_sizes):
            return self.rnn(PackedSequence(rows, batch_sizes))[1]

    with pytest.raises(Exception, match="a PackedSequence cannot be exported to ONNX; export a call with a padded"):
        exported(Packed(), (torch.randn(5, IN), torch.tensor([3, 2])))
    with pytest.raises(RuntimeError, match="TorchScript has no operator for this scan; use dynamo=True"):
        torch.onnx.export(layer(IN, H), (torch.randn(4, 2, IN),), io.BytesIO(), dynamo=False)
