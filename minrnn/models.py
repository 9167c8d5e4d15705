"""The residual backbone that all experiments share, and the models built on it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixers.attention import Attention
from .mixers.base import Mixer, State
from .mixers.wrappings import CausalConv, Mamba
from .rnn import MinGRU, MinLSTM


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + gamma) with gamma initially 0: weight decay draws the scale to 1, as in the authors' code.

    (BorealisAI/minRNNs ff52e9d, models/model.py; torch.nn.RMSNorm's weight would be drawn to 0.)
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gamma + 1)


NORMS = ("rms", "layer")
ACTIVATIONS = ("gelu", "relu", "geglu")


class MLP(nn.Module):
    """Linear to width * dim, activation, Linear back, dropout. (B, ..., D) in and out.

    Args:
        dim: D.
        width: the hidden layer's width divided by dim.
        activation: "gelu" (nanoGPT's), "relu" (Decision Transformer's), or "geglu": gelu(gate) * x * scale, where one
            Linear gives gate and x, and scale is learned for each channel, as in the authors' code
            (BorealisAI/minRNNs ff52e9d, models/modules.py).
        dropout: on the output.
        bias: whether the Linears have biases. With "geglu" they always do.
    """

    def __init__(self, dim: int, width: float, activation: str = "gelu", dropout: float = 0.0, bias: bool = False):
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        hidden, gated = int(width * dim), activation == "geglu"
        self.activation = F.relu if activation == "relu" else F.gelu
        self.fc = nn.Linear(dim, 2 * hidden if gated else hidden, bias=bias or gated)
        self.scale = nn.Parameter(torch.ones(hidden)) if gated else None
        self.out = nn.Linear(hidden, dim, bias=bias or gated)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.scale is None:
            x = self.activation(x)
        else:
            gate, x = x.chunk(2, -1)
            x = self.activation(gate) * x * self.scale
        return self.dropout(self.out(x))


class Backbone(nn.Module):
    """Residual layers, then a norm. (B, T, D) in and out; a state is the tuple of the layers' states.

    Each layer adds to x, in this order: a causal convolution of x (without a norm before it, as in the authors' code;
    only with `conv`), the mixer of norm(x), and an MLP of norm(x) (only with `mlp`).

    Args:
        dim: D.
        layers: their number.
        mixer: makes one mixer of width dim.
        conv: the size of a depthwise convolution; 0 for none.
        pointwise: whether a D x D convolution of size 1 follows the depthwise one, as in the authors' code.
        mlp: the MLP's hidden width divided by dim; 0 for none.
        activation: of the MLP, see `MLP`.
        bias: whether LayerNorms and the MLP's Linears have one, as nanoGPT's setting of this name.
        dropout: on the MLP's output.
        mixer_dropout: whether dropout also acts on the mixer's output, as in nanoGPT and Decision Transformer. The
            authors' code and Decision Mamba have it in the MLP alone.
        norm: "rms" or "layer".
        attention_at: the layer, counted from 0, whose mixer is `Attention` with this dropout and bias; None for none.
            It has no positions of its own: earlier recurrent layers or the model's learned positions provide them.
        attention_heads: the heads of that layer, see `Attention`.

    Raises:
        ValueError: an argument is out of its range, or pointwise or attention_heads is set without its layer.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        mixer: Callable[[int], Mixer],
        conv: int = 0,
        pointwise: bool = False,
        mlp: float = 0,
        activation: str = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
        mixer_dropout: bool = False,
        norm: str = "rms",
        attention_at: int | None = None,
        attention_heads: int | None = None,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: expected a positive int, got {layers}")
        if attention_at is None and attention_heads is not None:
            raise ValueError(f"attention_heads: expected None where attention_at=None, got {attention_heads}")
        if attention_at is not None and not 0 <= attention_at < layers:
            raise ValueError(f"attention_at: expected 0 to {layers - 1} of layers={layers}, got {attention_at}")
        if pointwise and not conv:
            raise ValueError("pointwise: expected False where conv=0, got True")
        one_of("norm", norm, NORMS)

        def norms(count: int) -> nn.ModuleList:
            return nn.ModuleList(RMSNorm(dim) if norm == "rms" else nn.LayerNorm(dim, bias=bias) for _ in range(count))

        self.convs = nn.ModuleList(CausalConv(dim, conv) for _ in range(layers if conv else 0))
        self.pointwise = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers if pointwise else 0))
        self.norms = norms(layers)
        self.mixers = nn.ModuleList(
            Attention(dim, attention_heads, dropout, bias) if i == attention_at else mixer(dim) for i in range(layers)
        )
        self.mlp_norms = norms(layers if mlp else 0)
        self.mlps = nn.ModuleList(MLP(dim, mlp, activation, dropout, bias) for _ in range(layers if mlp else 0))
        self.dropout = nn.Dropout(dropout)
        self.mixer_dropout = nn.Dropout(dropout if mixer_dropout else 0.0)
        (self.norm,) = norms(1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        return self._mix(x, state, lambda mixer: mixer)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the output (B, D) for one token, and the state after it."""
        return self._mix(x_t, state, lambda mixer: mixer.step)

    def _mix(self, x: Tensor, state: State | None, call: Callable) -> tuple[Tensor, State | None]:
        states = []
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            mixer_state = conv_state = None
            if state is not None:
                mixer_state, conv_state = state[i] if self.convs else (state[i], None)
            if self.convs:
                y, conv_state = call(self.convs[i])(x, conv_state)
                x = x + (self.pointwise[i](y) if self.pointwise else y)
            y, mixer_state = call(mixer)(norm(x), mixer_state)
            x = x + self.mixer_dropout(y)
            if self.mlps:
                x = x + self.mlps[i](self.mlp_norms[i](x))
            states.append((mixer_state, conv_state) if self.convs else mixer_state)
        return self.norm(x), None if state is None else tuple(states)

    def initial_state(self, batch_size: int) -> State:
        states = tuple(mixer.initial_state(batch_size) for mixer in self.mixers)
        if not self.convs:
            return states
        return tuple((s, conv.initial_state(batch_size)) for s, conv in zip(states, self.convs, strict=True))


def init_as_gpt2(model: nn.Module) -> None:
    """Gives a model with a `backbone` nanoGPT's initial values (github.com/karpathy/nanoGPT 3adf61e, model.py).

    Linears and embeddings are drawn from N(0, 0.02), the Linears that add to the residual stream from
    N(0, 0.02 / sqrt(2 layers)), and biases are 0. Gates and candidates of minimal RNNs, QRNN and SRU count as
    Linears (a forget bias and SRU's v stay); convolutions and torch's recurrent layers do not and keep their values.
    Mamba's block has its own initial values for language models (github.com/state-spaces/mamba,
    mamba_ssm/models/mixer_seq_simple.py): its out_proj is divided by the root of the number of layers, and the rest
    stays as it is.
    """
    layers = len(model.backbone.mixers)
    theirs = {id(part) for mixer in model.backbone.mixers if isinstance(mixer, Mamba) for part in mixer.modules()}
    kept = theirs | {id(part) for part in model.backbone.pointwise}
    for name, module in model.named_modules():
        if id(module) in kept or ".inner." in name:
            continue
        if isinstance(module, (nn.Linear, nn.Embedding)):
            adds = name.startswith("backbone.") and name.endswith((".out", ".out_proj"))
            _normal(module.weight, getattr(module, "bias", None), 0.02 / math.sqrt(2 * layers) if adds else 0.02)
        elif isinstance(module, (MinGRU, MinLSTM)):
            _init_min_rnn(module)
    with torch.no_grad():
        for mixer in model.backbone.mixers:
            if isinstance(mixer, Mamba):
                mixer.out_proj.weight /= math.sqrt(layers)


def init_as_decision_transformer(model: nn.Module) -> None:
    """Gives a model Decision Transformer's initial values (kzl/decision-transformer e2d82e6, trajectory_gpt2.py).

    Linears of the `backbone`, a mixer's inner ones included, are drawn from N(0, 0.02), and their biases are 0.
    Everything around the backbone stays as torch draws it. Decision Mamba has the same initialiser
    (github.com/Toshihiro-Ota/decision-mamba 35f9944, gym/models/decision_mamba.py): it also makes the bias of S6's time
    step 0, so that each step is softplus(0) = 0.693.
    """
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear):
            _normal(module.weight, module.bias, 0.02)
        elif isinstance(module, (MinGRU, MinLSTM)):
            _init_min_rnn(module)


def _normal(weight: Tensor, bias: Tensor | None, std: float) -> None:
    nn.init.normal_(weight, std=std)
    if bias is not None:
        nn.init.zeros_(bias)


def _init_min_rnn(rnn: MinGRU | MinLSTM) -> None:
    _normal(rnn.weight_ih_l0, rnn.bias_ih_l0, 0.02)
    with torch.no_grad():
        rnn.bias_ih_l0[: rnn.hidden_size] += getattr(rnn, "forget_bias", 0.0)


def one_of(name: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name}: expected one of {values}, got {value!r}")


class TokenModel(nn.Module):
    """Embedding, backbone, and a linear head without a bias: token ids in, logits out.

    The defaults give the paper's model for selective copying (arXiv 2410.01201, appendix C): embeddings from N(0, 1),
    no convolution, no MLP. With attention, positions, tied, norm="layer" and init="gpt2" it is nanoGPT.

    Args:
        vocab_in, vocab_out: the numbers of input ids and of classes.
        dim, layers, mixer, settings: see `Backbone`.
        positions: how many learned positions are added to the embeddings; None for none. Longer input is an error.
        tied: whether the head's weight is the embedding's.
        init: "torch" keeps what torch draws; "gpt2" is nanoGPT's, see `init_as_gpt2`.

    A state is the backbone's, or with positions the pair of the number of steps so far, (B,), and the backbone's.
    """

    def __init__(
        self,
        vocab_in: int,
        vocab_out: int,
        dim: int,
        layers: int,
        mixer: Callable[[int], Mixer],
        positions: int | None = None,
        tied: bool = False,
        init: str = "torch",
        **settings: Any,
    ):
        super().__init__()
        one_of("init", init, ("torch", "gpt2"))
        if tied and vocab_in != vocab_out:
            raise ValueError(f"tied: expected vocab_in = vocab_out, got {vocab_in} and {vocab_out}")
        self.embedding = nn.Embedding(vocab_in, dim)
        self.backbone = Backbone(dim, layers, mixer, **settings)
        self.head = nn.Linear(dim, vocab_out, bias=False)
        self.positions = nn.Embedding(positions, dim) if positions else None
        if init == "gpt2":
            init_as_gpt2(self)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, state: State | None = None, last: int | None = None, marked: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Returns logits (B, T, vocab_out) of ids (B, T), and the state.

        If given, `last` limits the logits to that many last steps, `marked` (B, T) to its N true steps, (N, vocab_out).
        """
        x, state = self._embed(tokens, state)
        x, inner = self.backbone(x, None if state is None else state[-1])
        if last is not None:
            x = x[:, -last:]
        if marked is not None:
            x = x[marked]
        return self.head(x), None if state is None else self._join(state, inner)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns logits (B, vocab_out) of ids (B,), and the state."""
        x, state = self._embed(token[:, None], state)
        x, inner = self.backbone.step(x[:, 0], state[-1])
        return self.head(x), self._join(state, inner)

    def initial_state(self, batch_size: int) -> State:
        inner = self.backbone.initial_state(batch_size)
        if self.positions is None:
            return inner
        return torch.zeros(batch_size, dtype=torch.long, device=self.head.weight.device), inner

    def _embed(self, tokens: Tensor, state: State | None) -> tuple[Tensor, tuple[State, ...] | None]:
        """Returns embeddings, and the state as a tuple: the steps including these tokens if counted, the backbone's."""
        x = self.embedding(tokens)
        if self.positions is None:
            return self.dropout(x), None if state is None else (state,)
        T, most = tokens.shape[1], self.positions.num_embeddings
        place = torch.arange(T, device=tokens.device)
        if state is not None:
            place = state[0][:, None] + place
            state = (state[0] + T, state[1])
        if T > most or (state is not None and int(state[0].max()) > most):
            raise ValueError(f"tokens: expected at most {most} steps in all, the number of learned positions")
        return self.dropout(x + self.positions(place)), state

    @property
    def dropout(self) -> nn.Dropout:
        return self.backbone.dropout

    def _join(self, state: tuple[State, ...], inner: State) -> State:
        return inner if self.positions is None else (state[0], inner)


class ClassifierModel(nn.Module):
    """Classifies a sequence or a pair: embedding, backbone, mean over a sequence's steps, head.

    The mean is S4's in Long Range Arena (https://github.com/state-spaces/s4/blob/
    e757cef57d89e448c413de7325ed5601aceaac13/configs/experiment/lra/s4-listops.yaml, decoder mode pool). It is over the
    real steps, and every mixer is causal, so padding on the right has no effect. The head is a Linear; for a pair it is
    Linear, ReLU, Linear of [x1, x2, x1 * x2, x1 - x2], as "NLI" in Long Range Arena
    (https://github.com/google-research/long-range-arena/blob/cd31e5c6b8e5bceabd28de2d2afb23f7ae5d36d8/lra_benchmarks/
    models/layers/common_layers.py), with one hidden layer as in S4's src/tasks/decoders.py.

    Args:
        vocab: the number of input ids; None if inputs are numbers, which a Linear embeds.
        classes: C, their number.
        dim, layers, mixer, settings: see `Backbone`.
        parts: P, the number of sequences in an example, 1 or 2; one backbone reads both.
        positions, init: see `TokenModel`.
    """

    def __init__(
        self,
        vocab: int | None,
        classes: int,
        dim: int,
        layers: int,
        mixer: Callable[[int], Mixer],
        parts: int = 1,
        positions: int | None = None,
        init: str = "torch",
        **settings: Any,
    ):
        super().__init__()
        one_of("init", init, ("torch", "gpt2"))
        if parts not in (1, 2):
            raise ValueError(f"parts: expected 1 or 2, got {parts}")
        self.parts = parts
        self.embedding = nn.Linear(1, dim) if vocab is None else nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(positions, dim) if positions else None
        self.backbone = Backbone(dim, layers, mixer, **settings)
        pair = nn.Sequential(nn.Linear(4 * dim, dim), nn.ReLU(), nn.Linear(dim, classes))
        self.head = nn.Linear(dim, classes) if parts == 1 else pair
        if init == "gpt2":
            init_as_gpt2(self)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Returns logits (B, C).

        Args:
            inputs: (B, P, T), int64 ids or float numbers.
            lengths: (B, P) int64, from 1 to T; later steps are padding.

        Raises ValueError if T exceeds the number of positions.
        """
        x = inputs.flatten(0, 1)
        x = self.embedding(x if isinstance(self.embedding, nn.Embedding) else x[..., None])
        if self.positions is not None:
            T, most = inputs.shape[-1], self.positions.num_embeddings
            if T > most:
                raise ValueError(f"inputs: expected at most {most} steps, the number of learned positions, got {T}")
            x = x + self.positions.weight[:T]
        x, _ = self.backbone(self.backbone.dropout(x))
        lengths = lengths.flatten()[:, None]
        padding = torch.arange(x.shape[1], device=x.device) >= lengths
        x = x.masked_fill(padding[..., None], 0).sum(1) / lengths
        if self.parts == 2:
            x1, x2 = x.unflatten(0, inputs.shape[:2]).unbind(1)
            x = torch.cat((x1, x2, x1 * x2, x1 - x2), -1)
        return self.head(x)


class DecisionModel(nn.Module):
    """Predicts the next action from returns-to-go, states and earlier actions.

    With 3 tokens it is Decision Transformer (arXiv 2106.01345, section 3; https://github.com/kzl/decision-transformer/
    blob/e2d82e68f330c00f763507b3b01d774740bee53f/gym/decision_transformer/models/decision_transformer.py) with any
    backbone: a Linear each for return-to-go, state and action, plus a learned embedding of the timestep, LayerNorm and
    dropout; a Linear and tanh predict the action from the output at the state. Its heads for states and returns are
    left out, as nothing trains them.

    With 1 token it takes Decision S4's input (arXiv 2306.05167, figure 1): Linears of state, previous action and
    return-to-go, concatenated, then tanh and a Linear of all three; it has no timesteps.

    Args:
        state_dim, act_dim: S and A.
        dim, layers, mixer, settings: see `Backbone`.
        max_ep_len: the number of timestep embeddings, the most steps of an episode.
        tokens: the number of tokens per step, 3 or 1.
        init: "torch" keeps what torch draws; "dt" is Decision Transformer's, see `init_as_decision_transformer`.
        timestep_std: timestep embeddings start from N(0, timestep_std), in the published code from N(0, 1). That drowns
            the state, half as large after its Linear, until training corrects it: short training may not suffice.
    """

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
        dim: int,
        layers: int,
        mixer: Callable[[int], Mixer],
        max_ep_len: int = 1000,
        tokens: int = 3,
        init: str = "torch",
        timestep_std: float = 1.0,
        **settings: Any,
    ):
        super().__init__()
        if tokens not in (1, 3):
            raise ValueError(f"tokens: expected 1 or 3, got {tokens}")
        one_of("init", init, ("torch", "dt"))
        self.act_dim, self.tokens = act_dim, tokens
        self.embed_return = nn.Linear(1, dim)
        self.embed_state = nn.Linear(state_dim, dim)
        self.embed_action = nn.Linear(act_dim, dim)
        if tokens == 3:
            self.embed_timestep = nn.Embedding(max_ep_len, dim)
            self.embed_ln = nn.LayerNorm(dim)
        else:
            self.input_projection = nn.Linear(3 * dim, dim)
        self.drop = nn.Dropout(settings.get("dropout", 0.0))
        self.backbone = Backbone(dim, layers, mixer, **settings)
        self.predict_action = nn.Sequential(nn.Linear(dim, act_dim), nn.Tanh())
        if init == "dt":
            init_as_decision_transformer(self)
        if tokens == 3:
            nn.init.normal_(self.embed_timestep.weight, std=timestep_std)

    def forward(self, returns_to_go: Tensor, states: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Returns actions (B, K, A) for K steps in a row, each from the steps up to it.

        Args:
            returns_to_go: (B, K, 1).
            states: (B, K, S).
            actions: (B, K, A); the last one is not used.
            timesteps: (B, K) int64, each step's place in its episode.
        """
        if self.tokens == 1:
            x = self._joined(returns_to_go, states, F.pad(actions[:, :-1], (0, 0, 1, 0)))
            return self.predict_action(self.backbone(x)[0])
        time = self.embed_timestep(timesteps)
        parts = self.embed_return(returns_to_go) + time, self.embed_state(states) + time
        x = torch.stack([*parts, self.embed_action(actions) + time], 2).flatten(1, 2)
        return self.predict_action(self.backbone(self.drop(self.embed_ln(x)))[0][:, 1::3])

    def step(
        self, returns_to_go: Tensor, states: Tensor, actions: Tensor | None, timestep: int, hidden: State
    ) -> tuple[Tensor, State]:
        """Returns the actions (B, A) of one step, and the hidden state after the tokens read here.

        Args:
            returns_to_go: (B, 1).
            states: (B, S).
            actions: (B, A), of the previous step; None at the first step that is read.
            timestep: that of this step, the same in all episodes.
            hidden: from `initial_state` or the previous call.
        """
        if self.tokens == 1:
            actions = states.new_zeros(len(states), self.act_dim) if actions is None else actions
            x, hidden = self.backbone.step(self._joined(returns_to_go, states, actions), hidden)
            return self.predict_action(x), hidden
        time = self.embed_timestep.weight
        parts = [self.embed_return(returns_to_go) + time[timestep], self.embed_state(states) + time[timestep]]
        if actions is not None:
            parts.insert(0, self.embed_action(actions) + time[timestep - 1])
        x = self.drop(self.embed_ln(torch.stack(parts, 1)))
        x, hidden = self.backbone(x, hidden)  # all at once, because three steps need three times the calls
        return self.predict_action(x[:, -1]), hidden

    def initial_state(self, batch_size: int) -> State:
        return self.backbone.initial_state(batch_size)

    def _joined(self, returns_to_go: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        parts = self.embed_state(states), self.embed_action(actions), self.embed_return(returns_to_go)
        return self.drop(self.input_projection(torch.cat(parts, -1).tanh()))


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, decay: str = "all") -> list[dict]:
    """Returns an optimiser's parameter groups, which separate what decays from what does not.

    A mixer may mark parameters that never decay (`mixers.base.no_weight_decay`), and bound a parameter's learning rate
    by `parameter.lr_max`, as S4's published training does.

    Args:
        lr, weight_decay: those of all other parameters.
        decay: "all": everything decays, embeddings, norms, biases and initial states too, but not the gates and
            candidates of minimal RNNs (the authors' code, BorealisAI/minRNNs ff52e9d, main.py). "matrices": only
            parameters of two dimensions or more decay, gates too (nanoGPT).
    """
    one_of("decay", decay, ("all", "matrices"))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trainable(model):
        free = parameter.dim() < 2 if decay == "matrices" else getattr(parameter, "is_gate", False)
        free = free or getattr(parameter, "no_weight_decay", False)
        key = min(lr, getattr(parameter, "lr_max", lr)), 0.0 if free else weight_decay
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
