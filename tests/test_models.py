"""Every model obeys the law of recurrence, and the paper's is the one written out by hand."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments.config import MODELS
from experiments.launch import resolve
from minrnn.mixers import GRUMixer, LSTMMixer, MinGRUMixer, MinLSTMMixer, make
from minrnn.mixers.base import state_map
from minrnn.models import Backbone, RMSNorm, TokenModel

CONFIGS = Path(__file__).parent.parent / "configs/selective_copy/model"
ELSEWHERE = {"attention": ("charlm", "transformer"), "aaren": ("decision", "aaren")}  # where their files are
WITHOUT_FILE = {"qrnn": "gru", "sru": "gru"}  # and whose they take
SETTINGS = {
    "mingru_mlp_gates": ("mingru", "model.gate_layers=2"),
    "minlstm_mlp_gates": ("minlstm", "model.gate_layers=2"),
    "hybrid": ("mingru", "model.attention_at=1", "model.attention_heads=2"),
}
BARE = (
    "model.mlp=0",
    "model.norm=rms",
    "model.init=torch",
    "model.tied=false",
    "model.positions=false",
    "model.dropout=0",
)
NAMES = sorted([*(path.stem for path in CONFIGS.glob("*.yaml")), *ELSEWHERE, *WITHOUT_FILE, *SETTINGS])
RECURRENT = [name for name in NAMES if "hyena" not in name]
TOKENS = torch.arange(2 * 23).view(2, 23) * 7 % 16


def model_of(name, dtype=torch.float64, layers=2, *settings):
    name, *own = SETTINGS.get(name, (name,))
    experiment, file = ELSEWHERE.get(name, ("selective_copy", WITHOUT_FILE.get(name, name)))
    overrides = [f"model={file}", f"model.layers={layers}", "model.dim=16", *own]
    overrides += [*(setting for setting in BARE if setting.split("=")[0] not in " ".join(settings)), *settings]
    model = resolve(experiment, overrides).model
    if name in WITHOUT_FILE:
        model = MODELS[name](**asdict(model) | {"name": name})
    return TokenModel(16, 16, mixer=make(**model.mixer(64)), **model.backbone(64)).to(dtype)


# What stands around the mixer: nothing, or all there is.
AROUND = {
    "bare": (),
    "full": (
        "model.conv=4",
        "model.pointwise=true",
        "model.mlp=2",
        "model.norm=layer",
        "model.positions=true",
        "model.tied=true",
    ),
    "geglu": ("model.conv=4", "model.mlp=2", "model.activation=geglu"),
}


def close(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"{error:.1e}"


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", RECURRENT)
def test_parallel_is_stepwise_is_chunks(name, around):
    model = model_of(name, torch.float64, 2, *AROUND[around])
    whole, none = model(TOKENS)
    assert none is None
    state, again = model.initial_state(2), []
    for token in TOKENS.unbind(1):
        logits, state = model.step(token, state)
        again.append(logits)
    close(torch.stack(again, 1), whole)
    chunks, carried = [], model.initial_state(2)
    for part in TOKENS.split([1, 9, 2, 11], 1):
        logits, carried = model(part, carried)
        chunks.append(logits)
    close(torch.cat(chunks, 1), whole)
    flat = [[], []]
    for found, parts in zip(flat, (state, carried), strict=True):
        state_map(lambda tensor, found=found: found.append(tensor) or tensor, parts)
    assert len(flat[0]) == len(flat[1]) > 0
    for one, other in zip(*flat, strict=True):
        if one.is_floating_point() or one.is_complex():
            close(one, other, 1e-8)
        else:
            assert one.tolist() == other.tolist() == [23, 23]  # how many steps were seen


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", NAMES)
def test_the_future_does_not_reach_the_past(name, around):
    model = model_of(name, torch.float64, 2, *AROUND[around])
    changed = TOKENS.clone()
    changed[:, 15:] = 3
    before, after = model(TOKENS)[0], model(changed)[0]
    close(after[:, :15], before[:, :15])
    assert (after[:, 15:] - before[:, 15:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if "hyena" in name])
def test_a_convolution_says_that_it_has_no_step(name):
    model = model_of(name)
    with pytest.raises(NotImplementedError, match="Hyena"):
        model.initial_state(2)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name, around):
    model = model_of(name, torch.float64, 2, *AROUND[around])
    F.cross_entropy(model(TOKENS)[0].flatten(0, 1), TOKENS.flatten()).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), parameter
        assert value.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_by_autocast(name):
    model = model_of(name, torch.float32)
    wide = model(TOKENS)[0]
    if name == "lstm":
        try:
            with torch.autocast("cpu", torch.bfloat16):
                torch.nn.LSTM(4, 4)(torch.randn(2, 2, 4))
        except RuntimeError as error:
            pytest.skip(f"torch.nn.LSTM in bfloat16 does not run on this processor: {error}")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(TOKENS)[0]
        if name in RECURRENT:
            chunk, state = model(TOKENS[:, :9], model.initial_state(2))
            close(chunk, narrow[:, :9], 2e-2)
            model.step(TOKENS[:, 9], state)
    assert narrow.dtype == torch.bfloat16
    close(narrow.float(), wide, 5e-2)


def test_logits_of_the_last_steps_only():
    model = model_of("mingru")
    close(model(TOKENS, last=5)[0], model(TOKENS)[0][:, -5:])


@pytest.mark.parametrize("name", ("mingru", "minlstm", "minlstm_unnormalized"))
def test_the_papers_model_written_out(name):
    """In float64, with loops, from arXiv 2410.01201 sections 3.1, 3.2, B and the layout in FACTS 1.5."""
    model = model_of(name, layers=3)

    def g(x):
        return torch.where(x >= 0, x + 0.5, x.sigmoid())

    def norm(x, gamma):
        return x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5 * (1 + gamma)

    with torch.no_grad():
        for parameter in model.parameters():  # away from where mistakes cancel
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = model.embedding.weight[TOKENS]
        for layer, mixer in zip(model.backbone.norms, model.backbone.mixers, strict=True):
            projected = norm(x, layer.gamma) @ mixer.rnn.weight_ih_l0.T + mixer.rnn.bias_ih_l0
            h, states = g(mixer.initial).expand(2, -1), []
            for now in projected.unbind(1):
                if name == "mingru":
                    gate, candidate = now.chunk(2, -1)
                    h = (1 - gate.sigmoid()) * h + gate.sigmoid() * g(candidate)
                else:
                    f, i, candidate = now.chunk(3, -1)
                    f, i = f.sigmoid(), i.sigmoid()
                    total = f + i if name == "minlstm" else 1
                    h = f / total * h + i / total * g(candidate)
                states.append(h)
            x = x + torch.stack(states, 1) @ mixer.out.weight.T + mixer.out.bias
        expected = norm(x, model.backbone.norm.gamma) @ model.head.weight.T
    close(model(TOKENS)[0], expected, 1e-6)  # RMSNorm's eps


def test_attention_and_mlp_are_nanogpts_written_out():
    """Pre-norm blocks, heads side by side, softmax over the past, GELU; float64, one query at a time."""
    model = model_of("attention", torch.float64, 2, "model.mlp=4", "model.norm=layer", "model.positions=true")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

        def norm(x, weight):
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

        x = model.embedding.weight[TOKENS] + model.positions.weight[: TOKENS.shape[1]]
        parts = (model.backbone.norms, model.backbone.mixers, model.backbone.mlp_norms, model.backbone.mlps)
        for before, attention, between, mlp in zip(*parts, strict=True):
            q, k, v = (norm(x, before.weight) @ attention.qkv.weight.T).split(16, -1)
            rows = []
            for t in range(TOKENS.shape[1]):
                heads = []
                for head in range(4):
                    part = slice(4 * head, 4 * head + 4)
                    scores = (k[:, : t + 1, part] * q[:, t : t + 1, part]).sum(-1) / 4**0.5
                    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                    heads.append((weights[..., None] * v[:, : t + 1, part]).sum(1))
                rows.append(torch.cat(heads, -1))
            x = x + torch.stack(rows, 1) @ attention.out.weight.T
            hidden = norm(x, between.weight) @ mlp.fc.weight.T
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            x = x + hidden @ mlp.out.weight.T
        expected = norm(x, model.backbone.norm.weight) @ model.head.weight.T
    close(model(TOKENS)[0], expected)


@pytest.mark.parametrize("name", ("attention", "hybrid", "mingru_mlp_gates", "qrnn", "sru"))
def test_gpt2s_initial_values(name):
    settings = ("model.mlp=4", "model.norm=layer", "model.positions=true", "model.tied=true", "model.init=gpt2")
    model = model_of(name, torch.float32, 8, *settings)
    assert model.head.weight is model.embedding.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.endswith((".v", ".bias")):  # of SRU, no Linear's
            adds = name.endswith("out.weight")
            expected = 0.02 / 4 if adds else 0.02
            assert 0.8 < parameter.std().item() / expected < 1.2, name


def test_more_steps_than_positions_are_refused():
    model = model_of("attention", torch.float64, 1, "model.positions=true")
    with pytest.raises(ValueError, match="tokens: expected at most 64 steps"):
        model(torch.zeros(1, 65, dtype=torch.long))
    _, state = model(torch.zeros(1, 64, dtype=torch.long), model.initial_state(1))
    with pytest.raises(ValueError, match="tokens: expected at most 64 steps"):
        model.step(torch.zeros(1, dtype=torch.long), state)


def test_dropout_acts_in_training_only():
    model = model_of("mingru", torch.float64, 2, "model.dropout=0.5", "model.mlp=2")
    model.eval()
    close(model(TOKENS)[0], model(TOKENS)[0])
    model.train()
    assert (model(TOKENS)[0] - model(TOKENS)[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ("mingru", "minlstm", "mingru_mlp_gates", "qrnn", "sru", "hybrid"))
def test_compiles_as_one_graph(name):
    model = model_of(name, torch.float32)
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(TOKENS, last=5)[0], model(TOKENS, last=5)[0], 1e-5)


def test_rms_norm_is_torchs_with_the_weight_around_one():
    norm, torchs = RMSNorm(8), torch.nn.RMSNorm(8)
    with torch.no_grad():
        norm.gamma.copy_(torch.randn(8))
        torchs.weight.copy_(norm.gamma + 1)
    x = torch.randn(3, 5, 8)
    close(norm(x), torchs(x), 1e-6)


def test_a_hybrid_has_attention_in_one_layer():
    settings = {"mixer": make("mingru"), "dropout": 0.1, "bias": True}
    mixers = Backbone(8, 3, attention_at=1, attention_heads=2, **settings).mixers
    assert [type(mixer).__name__ for mixer in mixers] == ["MinGRUMixer", "Attention", "MinGRUMixer"]
    assert (mixers[1].heads, mixers[1].dropout, mixers[1].out.bias is None) == (2, 0.1, False)
    assert Backbone(8, 3, attention_at=0, **settings).mixers[0].heads == 4
    for at in (-1, 3):
        with pytest.raises(ValueError, match=f"attention_at: expected 0 to 2 of layers=3, got {at}"):
            Backbone(8, 3, attention_at=at, **settings)
    with pytest.raises(ValueError, match="attention_heads: expected None where attention_at=None, got 2"):
        Backbone(8, 3, attention_heads=2, **settings)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="layers: expected a positive int, got 0"):
        Backbone(8, 0, MinGRUMixer)
    with pytest.raises(ValueError, match="expansion: expected expansion . dim to be a whole number, got 0.3 . 8 = 2.4"):
        MinGRUMixer(8, 0.3)
    with pytest.raises(ValueError, match="name: expected one of .*'mingru'.*, got 'gru2'"):
        make("gru2")
    with pytest.raises(ValueError, match="wrapping: expected one of .*'h3'.*, got 'h4'"):
        make("ssm", wrapping="h4", inner="s4")
    assert set(MODELS) == {"mingru", "minlstm", "gru", "lstm", "attention", "aaren", "ssm", "qrnn", "sru"}


@pytest.mark.parametrize("mixer", (GRUMixer, LSTMMixer, MinGRUMixer, MinLSTMMixer))
def test_any_layout_of_the_input(mixer):
    layer = mixer(8, 2).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    close(layer(x.transpose(0, 1))[0], layer(x.transpose(0, 1).contiguous())[0])
