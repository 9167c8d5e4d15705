"""The residual backbone that all experiments share, and models of tokens built on it."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixers.base import Mixer, State
from .mixers.wrappings import CausalConv


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + gamma), gamma 0 at first: so weight decay draws the scale to 1, as in the authors' code.

    (BorealisAI/minRNNs ff52e9d, models/model.py; torch.nn.RMSNorm's weight would be drawn to 0.)
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gamma + 1)


NORMS = {"rms": RMSNorm, "layer": partial(nn.LayerNorm, bias=False)}


class MLP(nn.Sequential):
    """norm, Linear to width * dim, GELU, Linear back, dropout; without biases, as in nanoGPT."""

    def __init__(self, dim: int, width: float, dropout: float, norm: Callable[[int], nn.Module]):
        hidden = int(width * dim)
        super().__init__(
            norm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False),
            nn.Dropout(dropout),
        )  # fmt: skip


class Backbone(nn.Module):
    """Residual layers, then a norm. (B, T, D) in and out; a state is the tuple of its layers'.

    Each layer adds to x, in this order: a causal depthwise convolution of x (without a norm before it, as in the
    authors' code; only with `conv`), the mixer of norm(x), and an MLP of norm(x) (only with `mlp`).

    Args:
        dim: D.
        layers: how many.
        mixer: makes one mixer of width dim.
        conv: the convolution's size; 0 for none.
        mlp: the MLP's hidden width over dim; 0 for none.
        dropout: on what the mixer and the MLP add.
        norm: "rms" or "layer" (without a bias).
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        mixer: Callable[[int], Mixer],
        conv: int = 0,
        mlp: float = 0,
        dropout: float = 0.0,
        norm: str = "rms",
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: expected a positive int, got {layers}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {(*NORMS,)}, got {norm!r}")
        make_norm = NORMS[norm]
        self.convs = nn.ModuleList(CausalConv(dim, conv) for _ in range(layers if conv else 0))
        self.norms = nn.ModuleList(make_norm(dim) for _ in range(layers))
        self.mixers = nn.ModuleList(mixer(dim) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(dim, mlp, dropout, make_norm) for _ in range(layers if mlp else 0))
        self.dropout = nn.Dropout(dropout)
        self.norm = make_norm(dim)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        return self._mix(x, state, lambda mixer: mixer)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, D) and the state after it."""
        return self._mix(x_t, state, lambda mixer: mixer.step)

    def _mix(self, x: Tensor, state: State | None, call: Callable) -> tuple[Tensor, State | None]:
        states = []
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            mixer_state = conv_state = None
            if state is not None:
                mixer_state, conv_state = state[i] if self.convs else (state[i], None)
            if self.convs:
                y, conv_state = call(self.convs[i])(x, conv_state)
                x = x + y
            y, mixer_state = call(mixer)(norm(x), mixer_state)
            x = x + self.dropout(y)
            if self.mlps:
                x = x + self.mlps[i](x)
            states.append((mixer_state, conv_state) if self.convs else mixer_state)
        return self.norm(x), None if state is None else tuple(states)

    def initial_state(self, batch_size: int) -> State:
        states = tuple(mixer.initial_state(batch_size) for mixer in self.mixers)
        if not self.convs:
            return states
        return tuple((s, conv.initial_state(batch_size)) for s, conv in zip(states, self.convs, strict=True))


def init_as_gpt2(model: nn.Module, layers: int) -> None:
    """Linears and embeddings from N(0, 0.02), less for those that add to the residual stream of `model.backbone`."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and ".inner." not in name:  # S6 has an order of its own
            adds = name.endswith((".out", ".out_proj")) or (".mlps." in name and name.endswith(".3"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class TokenModel(nn.Module):
    """Embedding, backbone, and a linear head without a bias: token ids in, logits out.

    With the defaults the paper's model for selective copying (arXiv 2410.01201, appendix C): embeddings from N(0, 1),
    no convolution, no MLP. With positions, tied and init="gpt2" around attention it is nanoGPT.

    Args:
        vocab_in, vocab_out: numbers of input ids and of classes.
        dim, layers, mixer, settings: see `Backbone`.
        positions: how many learned positions are added to the embeddings; None for none. Longer input is an error.
        tied: the head's weight is the embedding's.
        init: "torch", or "gpt2": Linears and embeddings from N(0, 0.02), those that add to the residual stream from
            N(0, 0.02 / sqrt(2 layers)), biases 0; recurrent layers keep their own.

    A state is the backbone's, or (the number of steps so far (B,), the backbone's) with positions.
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
        if init not in ("torch", "gpt2"):
            raise ValueError(f"init: expected 'torch' or 'gpt2', got {init!r}")
        if tied and vocab_in != vocab_out:
            raise ValueError(f"tied: expected vocab_in = vocab_out, got {vocab_in} and {vocab_out}")
        self.embedding = nn.Embedding(vocab_in, dim)
        self.backbone = Backbone(dim, layers, mixer, **settings)
        self.head = nn.Linear(dim, vocab_out, bias=False)
        self.positions = nn.Embedding(positions, dim) if positions else None
        if init == "gpt2":
            init_as_gpt2(self, layers)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens: Tensor, state: State | None = None, last: int | None = None
    ) -> tuple[Tensor, State | None]:
        """Logits (B, T, vocab_out) of ids (B, T), of the last `last` steps only where given, and the state."""
        x, state = self._embed(tokens, state)
        x, inner = self.backbone(x, None if state is None else state[-1])
        return self.head(x if last is None else x[:, -last:]), None if state is None else self._join(state, inner)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, vocab_out) of ids (B,), and the state."""
        x, state = self._embed(token[:, None], state)
        x, inner = self.backbone.step(x[:, 0], state[-1])
        return self.head(x), self._join(state, inner)

    def initial_state(self, batch_size: int) -> State:
        inner = self.backbone.initial_state(batch_size)
        if self.positions is None:
            return inner
        return torch.zeros(batch_size, dtype=torch.long, device=self.head.weight.device), inner

    def _embed(self, tokens: Tensor, state: State | None) -> tuple[Tensor, tuple[State, ...] | None]:
        """Embeddings, and the state as (steps after these tokens if counted, the backbone's)."""
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


class DecisionModel(nn.Module):
    """The next action from returns-to-go, states and the actions before it.

    With 3 tokens a step Decision Transformer (arXiv 2106.01345, section 3; https://github.com/kzl/decision-transformer/
    blob/e2d82e68f330c00f763507b3b01d774740bee53f/gym/decision_transformer/models/decision_transformer.py) around any
    backbone: a Linear each for return-to-go, state and action, plus a learned embedding of the timestep, LayerNorm and
    dropout; the action is read after the state by a Linear and tanh. Its heads for states and returns, which nothing
    trains, are left out.

    With 1 token Decision S4's input (arXiv 2306.05167, figure 1): tanh of a Linear each of state, action before and
    return-to-go, beside one another, and a Linear of them all; it knows no timesteps.

    Args:
        state_dim, act_dim: S and A.
        dim, layers, mixer, settings: see `Backbone`.
        max_ep_len: steps of an episode, each of which has an embedding.
        tokens: of a step, 3 or 1.
        init: as for `TokenModel`.
        timestep_std: the timestep embeddings start from N(0, timestep_std), in the published code from N(0, 1). That
            drowns the state, which a Linear makes half as large, until it is unlearned: short training may not suffice.
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
        if init not in ("torch", "gpt2"):
            raise ValueError(f"init: expected 'torch' or 'gpt2', got {init!r}")
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
        if init == "gpt2":
            init_as_gpt2(self, layers)
        if tokens == 3:
            nn.init.normal_(self.embed_timestep.weight, std=timestep_std)

    def forward(self, returns_to_go: Tensor, states: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        """Actions (B, K, A) for K steps in a row, each from those before it.

        Args:
            returns_to_go: (B, K, 1).
            states: (B, K, S).
            actions: (B, K, A); the last step's is not looked at.
            timesteps: (B, K) int64, of each step in its episode.
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
        """The actions (B, A) of one step, and the hidden state after what was read.

        Args:
            returns_to_go: (B, 1).
            states: (B, S).
            actions: (B, A), of the step before; None at the first step that is read.
            timestep: of this step, the same in all episodes.
            hidden: of `initial_state` or the step before.
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
        x, hidden = self.backbone(x, hidden)  # at once: three steps are three times the calls
        return self.predict_action(x[:, -1]), hidden

    def initial_state(self, batch_size: int) -> State:
        return self.backbone.initial_state(batch_size)

    def _joined(self, returns_to_go: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        parts = self.embed_state(states), self.embed_action(actions), self.embed_return(returns_to_go)
        return self.drop(self.input_projection(torch.cat(parts, -1).tanh()))


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, only_matrices: bool = False) -> list[dict]:
    """An optimiser's groups: everything decays, but for what a mixer has marked (`mixers.base.no_weight_decay`).

    So do embeddings, norms, biases and initial states, as in the authors' code (BorealisAI/minRNNs ff52e9d, main.py);
    with only_matrices nothing of one dimension does, as in nanoGPT.
    A mixer may also bound a parameter's learning rate by `parameter.lr_max` (S4's published training does).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trainable(model):
        kept = getattr(parameter, "no_weight_decay", False) or (only_matrices and parameter.dim() < 2)
        decay = 0.0 if kept else weight_decay
        groups.setdefault((min(lr, getattr(parameter, "lr_max", lr)), decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
