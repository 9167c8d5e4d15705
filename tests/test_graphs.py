"""What graph capture can and cannot do with the layers: each line of the list in docs/library.md."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from minrnn import MinGRU, MinLSTM

IN, H = 3, 5
DYNAMIC = torch.export.Dim.DYNAMIC
LENGTHS = ([5, 2, 1], [5, 1], [3, 7, 7, 2], [4], [1, 1])
each_layer = pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
with_and_without_state = pytest.mark.parametrize("given", [False, True], ids=["", "hx"])


class Packed(nn.Module):
    """Takes a PackedSequence's parts, as every tracer wants tensors."""

    def __init__(self, layer):
        super().__init__()
        self.rnn = layer(IN, H, 2, bidirectional=True)

    def forward(self, rows, batch_sizes, sorted_indices, unsorted_indices, hx=None):
        out, h_n = self.rnn(PackedSequence(rows, batch_sizes, sorted_indices, unsorted_indices), hx)
        return out.data, h_n


def parts(lengths, given):
    packed = pack_sequence([torch.randn(n, IN) for n in lengths], enforce_sorted=False)
    return (*packed, torch.randn(4, len(lengths), H)) if given else tuple(packed)


def assert_same(graph, model, arguments):
    for got, want in zip(graph(*arguments), model(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@each_layer
@with_and_without_state
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_padded_at_any_length_and_batch(layer, given):
    for T_traced in (4, 1):
        rnn = layer(IN, H, 2, bidirectional=True, batch_first=True)

        def arguments(B, T):
            return (torch.randn(B, T, IN), torch.randn(4, B, H))[: 1 + given]

        traced = torch.jit.trace(rnn, arguments(2, T_traced))
        for B, T in ((3, 7), (1, 1), (2, 40)):
            assert_same(traced, rnn, arguments(B, T))


@each_layer
@with_and_without_state
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_packed_at_any_lengths(layer, given):
    model = Packed(layer)
    traced = torch.jit.trace(model, parts(LENGTHS[0], given))
    for lengths in LENGTHS:
        assert_same(traced, model, parts(lengths, given))


@with_and_without_state
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compile_packed_at_any_lengths(given, fullgraph):
    torch.compiler.reset()  # what earlier tests compiled counts towards the limit of compilations
    model = Packed(MinGRU)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    for lengths in LENGTHS:
        arguments = parts(lengths, given)
        assert_same(compiled, model, arguments)
        grads = [
            torch.autograd.grad(f(*arguments)[0].square().sum(), list(model.parameters())) for f in (compiled, model)
        ]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


@each_layer
@with_and_without_state
def test_export_packed_at_any_lengths(layer, given):
    model = Packed(layer)
    shapes = ({0: DYNAMIC},) * 4 + (({1: DYNAMIC},) if given else ())
    exported = torch.export.export(model, parts(LENGTHS[0], given), dynamic_shapes=shapes).module()
    for lengths in LENGTHS[1:3]:
        assert_same(exported, model, parts(lengths, given))


def test_log_space_has_no_packed_graph():
    model = Packed(MinGRU)
    model.rnn.backend = "log"
    with pytest.raises(ValueError, match="backend: 'log' takes packed sequences one by one"):
        torch.jit.trace(model, parts([3, 2], False))


@each_layer
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_and_symbolic_trace_say_what_to_do(layer):
    model = nn.Sequential(layer(IN, H))
    with pytest.raises(NotImplementedError, match="torch.jit.script: .* use torch.jit.trace or torch.export.export"):
        torch.jit.script(model)
    with pytest.raises(TypeError, match="torch.fx.symbolic_trace: .* is_leaf_module says so, or use torch.export"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, layer) or super().is_leaf_module(module, name)

    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    assert_same(graph, model, (torch.randn(4, 2, IN),))
