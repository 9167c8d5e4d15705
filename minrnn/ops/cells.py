"""The gated forms of h_t = a_t h_{t-1} + b_t, written once in torch.

A *cell* says how the inputs of a scan become the coefficients (a, b). The compiled backends fuse these
formulas with the scan; the reference and log-space backends, double backward and `step` use the functions
below.

Source: "Were RNNs All We Needed?", arXiv 2410.01201, sections 3.1 (minGRU), 3.2 (minLSTM) and appendix B
(the activation g and the log-space forms).

*Signed* cells have coefficients in (-1, 1), with which a linear recurrence can count modulo 2 (arXiv 2411.12537). Plain
cells multiply the state by a and the candidate by 1 - a. Signed ones multiply the state by a - (1 - a) = 2 a - 1 and
the candidate by the rest, 1 - |2 a - 1|: they keep the state at a = 1, replace it at 1/2, flip its sign at 0. minLSTM
with independent gates multiplies the state by 2 f - 1, and its input gate is unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Activation: TypeAlias = Literal["g", "identity"]
INPUTS = {
    "linear": ("a", "b"),
    "mingru": ("gate", "candidate"),
    "minlstm": ("forget_gate", "input_gate", "candidate"),
}


@dataclass(frozen=True)
class Cell:
    kind: str  # a key of INPUTS
    activation: Activation = "identity"  # the candidate's
    normalize: bool = False  # whether minLSTM's gates are divided by their sum
    signed: bool = False  # whether a is in (-1, 1) instead of (0, 1)

    def __post_init__(self):
        if self.activation not in ("g", "identity"):
            raise ValueError(f"activation: expected 'g' or 'identity', got {self.activation!r}")
        for name in ("normalize", "signed"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(getattr(self, name)).__name__}")

    @property
    def inputs(self) -> tuple[str, ...]:
        return INPUTS[self.kind]

    @property
    def name(self) -> str:
        """The key in CELLS, a string because torch's operators take strings."""
        if self.kind == "linear":
            return "linear"
        independent = self.kind == "minlstm" and not self.normalize
        return (
            f"{self.kind}_{'unnormalized_' if independent else ''}{'signed_' if self.signed else ''}{self.activation}"
        )


LINEAR = Cell("linear")
CELLS = {
    cell.name: cell
    for cell in (
        LINEAR,
        *(
            Cell(kind, activation, normalize, signed)
            for signed in (False, True)
            for kind, normalize in (("mingru", False), ("minlstm", True), ("minlstm", False))
            for activation in ("g", "identity")
        ),
    )
}


def g(x: Tensor) -> Tensor:
    """Returns the paper's positive activation: x + 0.5 where x >= 0, else sigmoid(x). Any shape, any float dtype."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def log_g(x: Tensor) -> Tensor:
    """Returns log g(x), accurate where g(x) is small."""
    return torch.where(x >= 0, torch.log(F.relu(x) + 0.5), F.logsigmoid(x))


def coefficients(
    cell: Cell, inputs: tuple[Tensor, ...], log_sigmoid: Callable[[Tensor], Tensor] = F.logsigmoid
) -> tuple[Tensor, Tensor]:
    """Returns the recurrence's (a, b), each of the inputs' shape and dtype; INPUTS names the inputs."""
    if cell.kind == "linear":
        return inputs
    *gates, candidate = inputs
    if cell.activation == "g":
        candidate = g(candidate)
    if cell.kind == "minlstm" and not cell.normalize:
        forget_gate, input_gate = gates
        a, take = torch.sigmoid(forget_gate), torch.sigmoid(input_gate)
        return (a - torch.sigmoid(-forget_gate) if cell.signed else a), take * candidate
    if cell.kind == "mingru":
        balance = -gates[0]
    else:  # f / (f + i) = sigmoid(log f - log i), defined even where both gates underflow.
        balance = log_sigmoid(gates[0]) - log_sigmoid(gates[1])
    a, take = torch.sigmoid(balance), torch.sigmoid(-balance)
    if cell.signed:
        a, take = a - take, 2 * torch.minimum(a, take)
    return a, take * candidate


def log_coefficients(cell: Cell, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Returns (log a, log b) as the paper's appendix B computes them, in the inputs' shape and dtype."""
    if cell.kind == "linear":
        a, b = inputs
        return a.log(), b.log()
    *gates, candidate = inputs
    log_candidate = log_g(candidate) if cell.activation == "g" else candidate.log()
    if cell.kind == "mingru":
        (gate,) = gates
        return F.logsigmoid(-gate), F.logsigmoid(gate) + log_candidate
    forget_gate, input_gate = gates
    log_f, log_i = F.logsigmoid(forget_gate), F.logsigmoid(input_gate)
    if not cell.normalize:
        return log_f, log_i + log_candidate
    balance = log_f - log_i
    return F.logsigmoid(balance), F.logsigmoid(-balance) + log_candidate
