"""The gated forms of h_t = a_t h_{t-1} + b_t, written once in torch.

A *cell* names how the inputs of a scan become the coefficients (a, b). The compiled backends fuse these
formulas with the scan; the reference and log-space backends, double backward and `step` use them as they
stand here.

Source: "Were RNNs All We Needed?", arXiv 2410.01201, sections 3.1 (minGRU), 3.2 (minLSTM) and appendix B
(the activation g and the log-space forms).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Cell name -> how many inputs it takes.
CELLS = {
    "linear": 2,
    "mingru_g": 2,
    "mingru_identity": 2,
    "minlstm_g": 3,
    "minlstm_identity": 3,
    "minlstm_unnormalized_g": 3,
    "minlstm_unnormalized_identity": 3,
}


def g(x: Tensor) -> Tensor:
    """The paper's positive activation: x + 0.5 where x >= 0, else sigmoid(x). Any shape, any float dtype."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def log_g(x: Tensor) -> Tensor:
    """log g(x), accurate where g(x) is small."""
    return torch.where(x >= 0, torch.log(F.relu(x) + 0.5), F.logsigmoid(x))


def coefficients(cell: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(a, b) of the recurrence, each of the inputs' shape and dtype.

    linear: inputs (a, b). minGRU: (gate, candidate). minLSTM: (forget_gate, input_gate, candidate).
    """
    if cell == "linear":
        return inputs
    *gates, candidate = inputs
    if cell.endswith("_g"):
        candidate = g(candidate)
    if cell.startswith("mingru"):
        (gate,) = gates
        return torch.sigmoid(-gate), torch.sigmoid(gate) * candidate
    forget_gate, input_gate = gates
    if cell.startswith("minlstm_unnormalized"):
        return torch.sigmoid(forget_gate), torch.sigmoid(input_gate) * candidate
    # f / (f + i) = sigmoid(log f - log i): defined also where both gates underflow.
    balance = F.logsigmoid(forget_gate) - F.logsigmoid(input_gate)
    return torch.sigmoid(balance), torch.sigmoid(-balance) * candidate


def log_coefficients(cell: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(log a, log b), as the paper's appendix B computes them. The inputs' shape and dtype."""
    if cell == "linear":
        a, b = inputs
        return a.log(), b.log()
    *gates, candidate = inputs
    log_candidate = log_g(candidate) if cell.endswith("_g") else candidate.log()
    if cell.startswith("mingru"):
        (gate,) = gates
        return F.logsigmoid(-gate), F.logsigmoid(gate) + log_candidate
    forget_gate, input_gate = gates
    log_f, log_i = F.logsigmoid(forget_gate), F.logsigmoid(input_gate)
    if cell.startswith("minlstm_unnormalized"):
        return log_f, log_i + log_candidate
    balance = log_f - log_i
    return F.logsigmoid(balance), F.logsigmoid(-balance) + log_candidate
