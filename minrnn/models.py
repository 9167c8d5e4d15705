"""The residual backbone that all experiments share, and models of tokens built on it."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixers.base import Mixer, State


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + gamma), gamma 0 at first: so weight decay draws the scale to 1, as in the authors' code.

    (BorealisAI/minRNNs ff52e9d, models/model.py; torch.nn.RMSNorm's weight would be drawn to 0.)
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gamma + 1)


class Backbone(nn.Module):
    """x + mixer(norm(x)) for every layer, then a norm. (B, T, D) in and out; a state is the tuple of its mixers'.

    Args:
        dim: D.
        layers: how many.
        mixer: makes one mixer of width dim.
    """

    def __init__(self, dim: int, layers: int, mixer: Callable[[int], Mixer]):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: expected a positive int, got {layers}")
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(layers))
        self.mixers = nn.ModuleList(mixer(dim) for _ in range(layers))
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        states = []
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            y, s = mixer(norm(x), None if state is None else state[i])
            x = x + y
            states.append(s)
        return self.norm(x), None if state is None else tuple(states)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, D) and the state after it."""
        states = []
        for norm, mixer, s in zip(self.norms, self.mixers, state, strict=True):
            y, s = mixer.step(norm(x_t), s)
            x_t = x_t + y
            states.append(s)
        return self.norm(x_t), tuple(states)

    def initial_state(self, batch_size: int) -> State:
        return tuple(mixer.initial_state(batch_size) for mixer in self.mixers)


class TokenModel(nn.Module):
    """Embedding, backbone, and a linear head without a bias: token ids in, logits out.

    The paper's model for selective copying (arXiv 2410.01201, appendix C): embeddings from N(0, 1), no convolution,
    no MLP.

    Args:
        vocab_in, vocab_out: numbers of input ids and of classes.
        dim, layers, mixer: see `Backbone`.
    """

    def __init__(self, vocab_in: int, vocab_out: int, dim: int, layers: int, mixer: Callable[[int], Mixer]):
        super().__init__()
        self.embedding = nn.Embedding(vocab_in, dim)
        self.backbone = Backbone(dim, layers, mixer)
        self.head = nn.Linear(dim, vocab_out, bias=False)

    def forward(
        self, tokens: Tensor, state: State | None = None, last: int | None = None
    ) -> tuple[Tensor, State | None]:
        """Logits (B, T, vocab_out) of ids (B, T), of the last `last` steps only where given, and the state."""
        x, state = self.backbone(self.embedding(tokens), state)
        return self.head(x if last is None else x[:, -last:]), state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, vocab_out) of ids (B,), and the state."""
        x, state = self.backbone.step(self.embedding(token), state)
        return self.head(x), state

    def initial_state(self, batch_size: int) -> State:
        return self.backbone.initial_state(batch_size)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """An optimiser's groups: everything decays, but for what a mixer has marked (`mixers.base.no_weight_decay`).

    So do embeddings, norms, biases and initial states, as in the authors' code (BorealisAI/minRNNs ff52e9d, main.py).
    A mixer may also bound a parameter's learning rate by `parameter.lr_max` (S4's published training does).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trainable(model):
        decay = 0.0 if getattr(parameter, "no_weight_decay", False) else weight_decay
        groups.setdefault((min(lr, getattr(parameter, "lr_max", lr)), decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
