"""MinGRU and MinLSTM against a plain float64 loop, against torch.nn.GRU's interface, and against themselves."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, unpack_sequence

from minrnn import MinGRU, MinLSTM

IN, H = 3, 5
LAYERS = [MinGRU, MinLSTM]
VARIANTS = [
    pytest.param(MinGRU, {}, id="gru"),
    pytest.param(MinGRU, {"activation": "identity"}, id="gru-identity"),
    pytest.param(MinLSTM, {}, id="lstm"),
    pytest.param(MinLSTM, {"activation": "identity"}, id="lstm-identity"),
    pytest.param(MinLSTM, {"normalize_gates": False}, id="lstm-unnormalized"),
    pytest.param(MinLSTM, {"normalize_gates": False, "activation": "identity"}, id="lstm-unnormalized-identity"),
    pytest.param(MinGRU, {"signed": True}, id="gru-signed"),
    pytest.param(MinLSTM, {"signed": True, "activation": "identity"}, id="lstm-signed-identity"),
]
each_layer = pytest.mark.parametrize("layer", LAYERS)
each_variant = pytest.mark.parametrize("layer, options", VARIANTS)
each_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def one_step(rnn, projection, h):
    """The paper's equations, section 3, on one step of one layer: (B, n * H) and (B, H) -> (B, H)."""
    *gates, candidate = projection.chunk(projection.shape[-1] // H, -1)
    if rnn.activation == "g":
        candidate = torch.where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
    if isinstance(rnn, MinGRU):
        z = sigmoid(gates[0])
        f, i = 1 - z, z
    else:
        f, i = map(sigmoid, gates)
        if rnn.normalize_gates:
            f, i = f / (f + i), i / (f + i)
    if rnn.signed:
        assert isinstance(rnn, MinGRU) or rnn.normalize_gates
        f, i = 2 * f - 1, 1 - (2 * f - 1).abs()
    return f * h + i * candidate


def plain_loop(rnn, parameters, x, h_0):
    """(T, B, IN), (L * D, B, H) -> out (T, B, D * H), h_n (L * D, B, H), from the parameters' names alone."""
    h_n, suffixes = [], ["", "_reverse"] if rnn.bidirectional else [""]
    for k in range(rnn.num_layers):
        outs = []
        for suffix in suffixes:
            h, states = h_0[len(h_n)], {}
            for t in range(len(x))[:: -1 if suffix else 1]:
                projection = x[t] @ parameters[f"weight_ih_l{k}{suffix}"].T
                projection = projection + parameters.get(f"bias_ih_l{k}{suffix}", 0.0)
                states[t] = h = one_step(rnn, projection, h)
            h_n.append(h)
            outs.append(torch.stack([states[t] for t in range(len(x))]))
        x = torch.cat(outs, -1)
    return x, torch.stack(h_n)


def double(shape, *more, **options):
    return torch.randn(shape, *more, dtype=torch.float64, **options)


def close(actual, expected, tolerance=1e-12, name=""):
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{name}: off by {error}"


# --- values and gradients ----------------------------------------------------------------------------------


@each_variant
@each_direction
@pytest.mark.parametrize("num_layers, bias", [(1, True), (2, True), (3, False)])
def test_values_and_every_gradient_equal_the_plain_loop(layer, options, bidirectional, num_layers, bias):
    rnn = layer(IN, H, num_layers, bias=bias, bidirectional=bidirectional, dtype=torch.float64, **options)
    x, h_0 = double(7, 2, IN, requires_grad=True), double(num_layers * (1 + bidirectional), 2, H, requires_grad=True)
    expected = plain_loop(rnn, dict(rnn.named_parameters()), x, h_0)
    actual = rnn(x, h_0)
    weights = [torch.randn_like(y) for y in expected]
    names = ["x", "h_0", *(name for name, _ in rnn.named_parameters())]

    def gradients(outputs):
        return torch.autograd.grad(outputs, [x, h_0, *rnn.parameters()], weights)

    for name, got, want in zip(["out", "h_n"], actual, expected, strict=True):
        close(got, want, name=name)
    for name, got, want in zip(names, gradients(actual), gradients(expected), strict=True):
        close(got, want, name=f"gradient of {name}")


@each_layer
def test_no_initial_state_is_a_state_of_zeros(layer):
    rnn = layer(IN, H, 2, bidirectional=True)
    x = torch.randn(6, 2, IN)
    for got, want in zip(rnn(x), rnn(x, torch.zeros(4, 2, H)), strict=True):
        assert torch.equal(got, want)


@each_variant
def test_first_and_second_derivatives_are_right(layer, options):
    rnn = layer(2, 2, 2, bidirectional=True, dtype=torch.float64, **options)
    arguments = double(3, 2, 2, requires_grad=True), double(4, 2, 2, requires_grad=True)
    names = [name for name, _ in rnn.named_parameters()]

    def forward(x, h_0, *parameters):
        return torch.func.functional_call(rnn, dict(zip(names, parameters, strict=True)), (x, h_0))

    everything = (*arguments, *rnn.parameters())
    assert torch.autograd.gradcheck(forward, everything, fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, everything, fast_mode=True)


# --- the law: parallel = stepwise = in chunks --------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_parallel_equals_stepwise_equals_chunked(layer, options, dtype, tolerance):
    rnn = layer(IN, H, 2, dtype=dtype, **options)
    x, h_0 = torch.randn(11, 4, IN).to(dtype), torch.randn(2, 4, H).to(dtype)
    out, h_n = rnn(x, h_0)

    h, steps = h_0, []
    for x_t in x:
        h = rnn.step(x_t, h)
        steps.append(h[-1])
    close(torch.stack(steps), out, tolerance, "stepwise out")
    close(h, h_n, tolerance, "stepwise state")
    assert h.dtype == dtype

    h, chunks = h_0, []
    for chunk in x.split([1, 4, 6]):
        part, h = rnn(chunk, h)
        chunks.append(part)
    close(torch.cat(chunks), out, tolerance, "chunked out")
    close(h, h_n, tolerance, "chunked state")


@each_layer
def test_a_step_without_a_state_starts_from_zeros(layer):
    rnn = layer(IN, H, 2)
    x_t = torch.randn(4, IN)
    assert torch.equal(rnn.step(x_t), rnn.step(x_t, torch.zeros(2, 4, H)))


@each_layer
def test_gradients_flow_through_steps(layer):
    rnn = layer(IN, H, 2, dtype=torch.float64)
    x, h_0 = double(4, 2, IN, requires_grad=True), double(2, 2, H, requires_grad=True)
    inputs = [x, h_0, *rnn.parameters()]
    h = h_0
    for x_t in x:
        h = rnn.step(x_t, h)
    for got, want in zip(
        torch.autograd.grad(h.sum(), inputs), torch.autograd.grad(rnn(x, h_0)[1].sum(), inputs), strict=True
    ):
        close(got, want)


# --- torch.nn.GRU's shapes ---------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("form", ["batched", "batch of one", "unbatched", "packed"])
def test_every_shape_is_that_of_torch_gru(layer, form):
    for num_layers, two_way, batch_first, given, T in itertools.product((1, 3), *[(False, True)] * 3, (1, 6)):
        options = {"num_layers": num_layers, "bidirectional": two_way, "batch_first": batch_first}
        B = 1 if form == "batch of one" else 4
        x = torch.randn(T, IN) if form == "unbatched" else torch.randn(*((B, T) if batch_first else (T, B)), IN)
        h_0 = torch.randn(num_layers * (1 + two_way), *(() if form == "unbatched" else (B,)), H)
        if form == "packed":
            x = pack_sequence([torch.randn(n, IN) for n in (T, 1, T, 1)], enforce_sorted=False)
        arguments = (x, h_0) if given else (x,)
        (out, h_n), (gru_out, gru_h_n) = layer(IN, H, **options)(*arguments), nn.GRU(IN, H, **options)(*arguments)
        if form == "packed":
            assert all(torch.equal(a, b) for a, b in zip(out[1:], gru_out[1:], strict=True))
            out, gru_out = out.data, gru_out.data
        assert (out.shape, h_n.shape) == (gru_out.shape, gru_h_n.shape), options


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_last_state_is_the_output_at_each_directions_last_step(layer, batch_first):
    rnn = layer(IN, H, 2, bidirectional=True, batch_first=batch_first)
    out, h_n = rnn(torch.randn(6, 6, IN))
    last, first = (out[:, -1], out[:, 0]) if batch_first else (out[-1], out[0])
    assert torch.equal(h_n[2], last[:, :H])  # layer 1 forward: layer * D + direction
    assert torch.equal(h_n[3], first[:, H:])


@each_layer
@each_direction
def test_layouts_agree_and_the_output_is_contiguous_in_its_own(layer, bidirectional):
    time_first = layer(IN, H, 2, bidirectional=bidirectional)
    batch_first = layer(IN, H, 2, bidirectional=bidirectional, batch_first=True)
    batch_first.load_state_dict(time_first.state_dict())
    x, h_0 = torch.randn(9, 4, IN), torch.randn(2 * (1 + bidirectional), 4, H)
    out, h_n = time_first(x, h_0)
    out_b, h_n_b = batch_first(x.transpose(0, 1), h_0)
    out_1, h_n_1 = time_first(x[:, 1], h_0[:, 1])
    assert out.is_contiguous() and out_b.is_contiguous() and h_n.is_contiguous()
    close(out_b.transpose(0, 1), out, 1e-6)
    close(h_n_b, h_n, 1e-6)
    close(out_1, out[:, 1], 1e-6)
    close(h_n_1, h_n[:, 1], 1e-6)


@each_layer
def test_an_empty_batch_gives_empty_results(layer):
    out, h_n = layer(IN, H, 2)(torch.randn(4, 0, IN))
    assert out.shape == (4, 0, H) and h_n.shape == (2, 0, H)


@pytest.fixture
def one_thread():
    """torch's threads spin at each of nn.GRU's small steps: seconds where test processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("layer", [nn.GRU, *LAYERS])
def test_a_program_written_for_torch_gru_trains(layer, one_thread):
    """Which end of a padded sequence holds the larger number? Only the class's name differs between the runs."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(1, 16, 2, batch_first=True, dropout=0.1, bidirectional=True)
            self.head = nn.Linear(32, 2)

        def forward(self, x, lengths):
            self.rnn.flatten_parameters()
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, hidden = self.rnn(packed)
            pad_packed_sequence(out, batch_first=True)
            return self.head(torch.cat([hidden[-2], hidden[-1]], -1))

    lengths = torch.randint(2, 9, (32,))
    x = torch.randn(32, 8, 1)
    target = (x[:, 0, 0] > x[torch.arange(32), lengths - 1, 0]).long()
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x, lengths), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- packed sequences --------------------------------------------------------------------------------------


@each_variant
@each_direction
@pytest.mark.parametrize("lengths", [(6, 4, 4, 1), (2, 7, 1, 7, 3)], ids=["sorted", "unsorted"])
def test_packed_sequences_run_as_if_each_were_alone(layer, options, bidirectional, lengths):
    in_order = list(lengths) == sorted(lengths, reverse=True)
    rnn = layer(IN, H, 2, bidirectional=bidirectional, dtype=torch.float64, **options)
    sequences = [double(n, IN, requires_grad=True) for n in lengths]
    h_0 = double(2 * (1 + bidirectional), len(lengths), H, requires_grad=True)
    out, h_n = rnn(pack_sequence(sequences, enforce_sorted=in_order), h_0)
    assert isinstance(out, PackedSequence)
    alone = [rnn(x, h_0[:, k]) for k, x in enumerate(sequences)]
    for k, (got, (want, state)) in enumerate(zip(unpack_sequence(out), alone, strict=True)):
        close(got, want, name=f"out of sequence {k}")
        close(h_n[:, k], state, name=f"state of sequence {k}")

    inputs = [*sequences, h_0, *rnn.parameters()]
    names = [*(f"sequence {k}" for k in range(len(lengths))), "h_0", *(name for name, _ in rnn.named_parameters())]
    packed_loss = out.data.square().sum() + h_n.sum()
    loss = sum(o.square().sum() + h.sum() for o, h in alone)
    for name, got, want in zip(
        names, torch.autograd.grad(packed_loss, inputs), torch.autograd.grad(loss, inputs), strict=True
    ):
        close(got, want, name=f"gradient of {name}")


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_passes_a_padded_step_unchanged(layer, dtype):
    rnn = layer(IN, H, dtype=dtype)
    long, short = torch.randn(50, IN, dtype=dtype), torch.randn(2, IN, dtype=dtype)
    out, h_n = rnn(pack_sequence([long, short]))
    assert torch.equal(h_n[0, 1], unpack_sequence(out)[1][-1])


# --- dropout -----------------------------------------------------------------------------------------------


@each_layer
def test_dropout_stands_between_layers_only(layer):
    rnn = layer(IN, H, 2, dropout=1.0)
    x = torch.randn(6, 4, IN)
    first = layer(IN, H)
    first.load_state_dict({name: p for name, p in rnn.state_dict().items() if "l0" in name})
    second = layer(H, H)
    second.load_state_dict({name.replace("l1", "l0"): p for name, p in rnn.state_dict().items() if "l1" in name})
    out, h_n = rnn(x)
    assert torch.equal(out, second(torch.zeros(6, 4, H))[0]) and out.abs().max() > 0
    assert torch.equal(h_n[0], first(x)[1][0])
    close(rnn.step(x[0]), rnn(x[:1])[1], 1e-6)
    rnn.eval()
    assert torch.equal(rnn(x)[0], second(first(x)[0])[0])


@each_layer
def test_dropout_drops_at_its_rate_and_keeps_the_mean(layer):
    rnn = layer(IN, 64, 2, bias=False, dropout=0.25, activation="identity")
    with torch.no_grad():  # layer 1 hands its input on: every gate is half, the candidate is the input
        rnn.weight_ih_l1.zero_()
        rnn.weight_ih_l1[-64:] = torch.eye(64)
    x = torch.randn(1, 500, IN)
    dropped, kept = rnn(x)[0], rnn.eval()(x)[0]
    assert abs((dropped == 0).float().mean() - 0.25) < 0.01
    close(dropped[dropped != 0], kept[dropped != 0] / 0.75, 1e-5)


# --- a citizen of torch ------------------------------------------------------------------------------------


@each_layer
def test_parameters_names_shapes_and_initialisation(layer):
    n = 2 if layer is MinGRU else 3
    rnn = layer(16, 400, 2, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in rnn.named_parameters()}
    assert shapes == {
        f"{kind}_ih_l{k}{suffix}": (n * 400,) + ((800 if k else 16,) if kind == "weight" else ())
        for k in (0, 1)
        for suffix in ("", "_reverse")
        for kind in ("weight", "bias")
    }
    assert [len(pair) for pair in rnn.all_weights] == [2] * 4
    assert rnn.all_weights[1][0] is rnn.weight_ih_l0_reverse
    for name, bound in {"weight_ih_l0": 1 / 4, "bias_ih_l0": 1 / 4, "weight_ih_l1": 800**-0.5}.items():
        parameter = getattr(rnn, name)  # uniform in ±1/sqrt(fan-in), as torch.nn.Linear
        assert 0.98 * bound < parameter.abs().max() <= bound
        assert abs(parameter.std() / (bound / 3**0.5) - 1) < 0.05
    assert [len(pair) for pair in layer(2, 3, 1, False).all_weights] == [1]


def test_forget_bias_is_added_to_the_forget_gate_only():
    torch.manual_seed(3)
    plain = MinLSTM(IN, H, 2, bidirectional=True)
    torch.manual_seed(3)
    biased = MinLSTM(IN, H, 2, bidirectional=True, forget_bias=3.0)
    for (weight, bias), (weight_b, bias_b) in zip(plain.all_weights, biased.all_weights, strict=True):
        assert torch.equal(weight, weight_b)
        assert torch.equal(bias_b, bias + torch.tensor([3.0, 0, 0]).repeat_interleave(H))


@each_layer
def test_arguments_stand_in_torch_grus_order(layer):
    arguments = (IN, H, 2, False, True, 0.5, True)
    rnn, gru = layer(*arguments, "cpu", torch.float64), nn.GRU(*arguments)
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(rnn, name) == getattr(gru, name)
    assert rnn.weight_ih_l0.dtype == torch.float64
    assert repr(rnn) == repr(gru).replace("GRU", layer.__name__)


@each_layer
def test_copies_and_saved_states_compute_the_same(layer):
    rnn = layer(IN, H, 2, bidirectional=True)
    x = torch.randn(4, 2, IN)
    file = io.BytesIO()
    torch.save(rnn.state_dict(), file)
    file.seek(0)
    loaded = layer(IN, H, 2, bidirectional=True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(other(x)[0], rnn(x)[0])
        with torch.no_grad():
            other.weight_ih_l0 += 1
        assert not torch.equal(other(x)[0], rnn(x)[0])


@each_layer
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_other_dtypes(layer, dtype, tolerance):
    rnn = layer(IN, H, 2, bidirectional=True)
    x, h_0 = torch.randn(6, 4, IN), torch.randn(4, 4, H)
    expected = rnn(x, h_0)
    for got, want in zip(rnn.to(dtype)(x.to(dtype), h_0.to(dtype)), expected, strict=True):
        assert got.dtype == dtype
        close(got.float(), want, tolerance)


@each_layer
def test_frozen_parameters_get_no_gradient_and_disturb_no_other(layer):
    rnn = layer(IN, H, 2)
    x = torch.randn(6, 2, IN)
    rnn(x)[0].sum().backward()
    expected = rnn.weight_ih_l1.grad.clone()
    rnn.zero_grad()
    rnn.weight_ih_l0.requires_grad_(False)
    rnn.bias_ih_l1.requires_grad_(False)
    rnn(x)[0].sum().backward()
    assert rnn.weight_ih_l0.grad is None and rnn.bias_ih_l1.grad is None
    assert torch.equal(rnn.weight_ih_l1.grad, expected)


@each_layer
def test_parametrizations_are_used(layer):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    rnn = layer(IN, H)
    twice = copy.deepcopy(rnn)
    with torch.no_grad():
        twice.weight_ih_l0 *= 2
    parametrize.register_parametrization(rnn, "weight_ih_l0", Doubled())
    x = torch.randn(4, 2, IN)
    assert torch.equal(rnn(x)[0], twice(x)[0])
    assert torch.equal(rnn.step(x[0]), twice.step(x[0]))


@each_layer
@each_direction
def test_compiles_into_one_graph(layer, bidirectional):
    rnn = layer(IN, H, 2, bidirectional=bidirectional)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    for T, B in [(6, 4), (9, 3)]:
        x = torch.randn(T, B, IN, requires_grad=True)
        h_0 = torch.randn(2 * (1 + bidirectional), B, H, requires_grad=True)
        inputs = [x, h_0, *rnn.parameters()]
        expected, actual = rnn(x, h_0), compiled(x, h_0)
        for got, want in zip(actual, expected, strict=True):
            close(got, want, 1e-6)
            assert got.stride() == want.stride()
        gradients = [torch.autograd.grad(out.square().sum() + h_n.sum(), inputs) for out, h_n in (actual, expected)]
        for got, want in zip(*gradients, strict=True):
            close(got, want, 1e-5)


@each_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_exports_with_dynamic_length_and_batch(layer, batch_first):
    rnn = layer(IN, H, 2, bidirectional=True, batch_first=batch_first).eval()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"input": {0: dynamic, 1: dynamic}, "hx": {1: dynamic}}
    batch_dim = 0 if batch_first else 1
    x = torch.randn(6, 4, IN)
    exported = torch.export.export(rnn, (x, torch.randn(4, x.shape[batch_dim], H)), dynamic_shapes=shapes).module()
    x = torch.randn(9, 3, IN)
    h_0 = torch.randn(4, x.shape[batch_dim], H)
    for got, want in zip(exported(x, h_0), rnn(x, h_0), strict=True):
        close(got, want, 1e-6)


@each_layer
def test_a_step_exports(layer):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer(IN, H, 2)

        def forward(self, x_t, h):
            return self.rnn.step(x_t, h)

    step, arguments = Step(), (torch.randn(4, IN), torch.randn(2, 4, H))
    exported = torch.export.export(step, arguments)
    close(exported.module()(*arguments), step(*arguments), 1e-6)
    assert not [node for node in exported.graph.nodes if "minrnn" in str(node.target)]


@each_layer
def test_autocast_projects_in_bf16_and_keeps_a_float32_state(layer):
    rnn = layer(IN, H, 2, bidirectional=True)
    x, h_0 = torch.randn(6, 4, IN), torch.randn(4, 4, H, requires_grad=True)
    expected = rnn(x, h_0)
    with torch.autocast("cpu", torch.bfloat16):
        actual = rnn(x, h_0)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32 and not torch.equal(got, want)
        close(got, want, 0.05)
    actual[0].sum().backward()
    assert rnn.weight_ih_l0.grad.dtype == torch.float32 and h_0.grad.dtype == torch.float32


@each_layer
def test_autocast_takes_mixed_dtypes_compiled_too(layer):
    rnn = layer(IN, H)
    x, h_0 = torch.randn(6, 4, IN).bfloat16(), torch.randn(1, 4, H)
    with torch.autocast("cpu", torch.bfloat16):
        expected = rnn(x, h_0)[0]
        actual = torch.compile(rnn, fullgraph=True, backend="aot_eager")(x, h_0)[0]
    assert torch.equal(actual, expected)


@each_layer
def test_shapes_are_known_without_data(layer):
    with torch.device("meta"):
        out, h_n = layer(IN, H, 2, bidirectional=True)(torch.randn(6, 4, IN))
        packed = PackedSequence(torch.randn(5, IN), torch.tensor([3, 2], device="cpu"))
        packed_out, _ = layer(IN, H)(packed)
    assert (out.shape, h_n.shape) == ((6, 4, 2 * H), (4, 4, H))
    assert packed_out.data.shape == (5, H)


# --- errors ------------------------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dropout": 1.5}, ValueError, r"dropout: .*\[0, 1\], got 1.5"),
        ({"dropout": True}, ValueError, "dropout"),
        ({"hidden_size": 0}, ValueError, "hidden_size: .*positive.* got 0"),
        ({"input_size": -1}, ValueError, "input_size"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"num_layers": 1.5}, TypeError, "num_layers: .*int.*float"),
        ({"hidden_size": "5"}, TypeError, "hidden_size: .*int.*str"),
        ({"bias": 1}, TypeError, "bias: .*bool.*int"),
        ({"batch_first": None}, TypeError, "batch_first"),
        ({"activation": "tanh"}, ValueError, "activation: .*'g' or 'identity', got 'tanh'"),
        ({"backend": "cudnn"}, ValueError, "backend: .*'cpu'.* got 'cudnn'"),
        ({"proj_size": 2}, TypeError, "proj_size"),
        ({"nonlinearity": "relu"}, TypeError, "nonlinearity"),
    ],
)
def test_wrong_constructor_arguments(layer, options, error, message):
    with pytest.raises(error, match=message):
        layer(**{"input_size": IN, "hidden_size": H} | options)


def test_forget_bias_needs_a_bias():
    with pytest.raises(ValueError, match="forget_bias: .*bias=False, got 3"):
        MinLSTM(IN, H, bias=False, forget_bias=3.0)


@each_layer
def test_dropout_without_a_place_warns_where_it_was_written(layer):
    with pytest.warns(UserWarning, match="dropout=0.5 and num_layers=1") as caught:
        layer(IN, H, dropout=0.5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(IN, H, 2, dropout=0.5)


@each_layer
@pytest.mark.parametrize(
    "x, hx, error, message",
    [
        (torch.zeros(4), None, ValueError, r"input: .*2.*3 dimensions, got shape \(4,\)"),
        (torch.zeros(4, 2, 7), None, RuntimeError, "input: expected input_size=3 features, got 7"),
        (torch.zeros(0, 2, IN), None, RuntimeError, "input: .*at least one time step"),
        (torch.zeros(4, 2, IN).double(), None, ValueError, "input: .*float32, got torch.float64"),
        ([[1.0]], None, TypeError, "input: .*got list"),
        (torch.zeros(4, 2, IN), torch.zeros(1, 3, H), RuntimeError, r"hx: .*\(1, 2, 5\), got \(1, 3, 5\)"),
        (torch.zeros(4, 2, IN), torch.zeros(1, H), RuntimeError, r"hx: .*\(1, 2, 5\), got \(1, 5\)"),
        (torch.zeros(4, IN), torch.zeros(1, 1, H), RuntimeError, r"hx: .*\(1, 5\), got \(1, 1, 5\)"),
        (torch.zeros(4, 2, IN), torch.zeros(1, 2, H).double(), RuntimeError, "hx: .*float32, got torch.float64"),
        (torch.zeros(4, 2, IN), torch.zeros(1, 2, H, device="meta"), RuntimeError, "hx: .*device cpu, got meta"),
        (torch.zeros(4, 2, IN), (torch.zeros(1, 2, H),) * 2, TypeError, r"carries one state.*\(h_0, c_0\)"),
        (torch.zeros(4, 2, IN), 0.5, TypeError, "hx: .*got float"),
        (pack_sequence([torch.zeros(4, 2)]), None, RuntimeError, "input_size=3 features, got 2"),
        (pack_sequence([torch.zeros(4, IN)]), torch.zeros(1, 2, H), RuntimeError, r"hx: .*\(1, 1, 5\)"),
    ],
)
def test_wrong_arguments(layer, x, hx, error, message):
    with pytest.raises(error, match=message):
        layer(IN, H)(x, hx)


@each_layer
@pytest.mark.parametrize(
    "x_t, h, error, message",
    [
        (torch.zeros(IN), None, RuntimeError, r"x_t: expected shape \(B, 3\), got \(3,\)"),
        (torch.zeros(2, 7), None, RuntimeError, "x_t: expected input_size=3 features, got 7"),
        (torch.zeros(2, IN), torch.zeros(2, H), RuntimeError, r"h: expected shape \(1, 2, 5\), got \(2, 5\)"),
        (torch.zeros(2, IN), (torch.zeros(1, 2, H),) * 2, TypeError, "h: .*carries one state"),
        (torch.zeros(2, IN).half(), None, ValueError, "x_t: .*float32, got torch.float16"),
    ],
)
def test_wrong_step_arguments(layer, x_t, h, error, message):
    with pytest.raises(error, match=message):
        layer(IN, H).step(x_t, h)


@each_layer
def test_a_bidirectional_layer_has_no_step(layer):
    with pytest.raises(RuntimeError, match="step: a bidirectional layer needs the whole sequence"):
        layer(IN, H, bidirectional=True).step(torch.zeros(2, IN))
