"""The layers that are compared, under one interface, and what each is checked against before it is timed.

B batch, T time, D width: each maps (B, T, D) to the same shape; minimal RNNs and torch's layers also take inputs of
another width. minGRU and minLSTM have no recurrent matrix, and Mamba and attention have projections before and after,
so equal widths do not mean equal numbers of parameters.
"""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minrnn
from minrnn.mixers import make

from .. import measure

State = Any  # each layer has its own type


class LoopGRU(nn.GRU):
    """torch.nn.GRU, computed step by step in plain PyTorch, as the paper times its GRU."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps (B, T, D) and a state (B, D) to (B, T, D) and (B, D)."""
        h = x.new_zeros(x.shape[0], self.hidden_size) if h is None else h
        states = []
        for x_t in x.unbind(1):
            h = self.step(x_t, h)
            states.append(h)
        return torch.stack(states, 1), h

    def step(self, x_t: Tensor, h: Tensor) -> Tensor:
        from_x = F.linear(x_t, self.weight_ih_l0, self.bias_ih_l0).chunk(3, -1)
        from_h = F.linear(h, self.weight_hh_l0, self.bias_hh_l0).chunk(3, -1)
        reset, keep = (torch.sigmoid(a + b) for a, b in zip(from_x[:2], from_h[:2], strict=True))
        return torch.lerp(torch.tanh(from_x[2] + reset * from_h[2]), h, keep)


class LoopLSTM(nn.LSTM):
    """torch.nn.LSTM, computed step by step in plain PyTorch."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Maps (B, T, D) and a state of two (B, D) to (B, T, D) and two (B, D)."""
        state = (x.new_zeros(x.shape[0], self.hidden_size),) * 2 if state is None else state
        states = []
        for x_t in x.unbind(1):
            state = self.step(x_t, state)
            states.append(state[0])
        return torch.stack(states, 1), state

    def step(self, x_t: Tensor, state: State) -> State:
        h, c = state
        gates = F.linear(x_t, self.weight_ih_l0, self.bias_ih_l0) + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
        add, keep, new, show = gates.chunk(4, -1)
        c = torch.sigmoid(keep) * c + torch.sigmoid(add) * torch.tanh(new)
        return torch.sigmoid(show) * torch.tanh(c), c


@dataclass(frozen=True)
class Layer:
    """A layer that is compared.

    Attributes:
        build: from D, and the input's width if the layer takes another, to a module in float32 on the CPU.
        read: from the module and (B, T, D) to the output and the state after it.
        step: from the module, (B, D) and a state to the output and the next state. None: another layer has this step.
        exact: from the module to another function from (B, T, D) to the output, in float64 on the CPU.
        tolerance: the largest relative errors against `exact` of float32 and of 16 bits.
        square: whether inputs must have width D.
    """

    build: Callable[..., nn.Module]
    read: Callable[[nn.Module, Tensor], tuple[Tensor, State]]
    step: Callable[[nn.Module, Tensor, State], tuple[Tensor, State]] | None
    exact: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    tolerance: tuple[float, float] = (1e-5, 5e-2)
    square: bool = True

    def takes(self, inputs: int, width: int) -> bool:
        return inputs == width or not self.square

    def made(self, inputs: int, width: int) -> nn.Module:
        return self.build(width) if inputs == width else self.build(width, inputs)


def _of(cls: type[nn.Module], net: nn.Module, **settings: Any) -> nn.Module:
    """A layer of class `cls` with the weights of `net`, in float64 on the CPU."""
    weights = {name: value.double().cpu() for name, value in net.state_dict().items()}
    found = cls(net.input_size, net.hidden_size, batch_first=True, dtype=torch.float64, **settings)
    found.load_state_dict(weights)
    return found


def _first(net: Callable[[Tensor], tuple[Tensor, State]]) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x)[0]


def _minimal(cls: type[nn.Module], backend: str, other: str = "reference", **limits: Any) -> Layer:
    """A minimal RNN on `backend`, checked against the `other` backend."""

    def step(net: nn.Module, x_t: Tensor, h: State) -> tuple[Tensor, State]:
        h = net.step(x_t, h)
        return h[-1], h

    return Layer(
        build=lambda dim, inputs=None: cls(inputs or dim, dim, batch_first=True, backend=backend),
        read=lambda net, x: net(x),
        step=step if backend == "auto" else None,
        exact=lambda net: _first(_of(cls, net, backend=other)),
        square=False,
        **limits,
    )


def _peer(dim: int) -> nn.Module:
    from minGRU_pytorch import minGRU

    return minGRU(dim)


def _peer_step(net: nn.Module, x_t: Tensor, h: State) -> tuple[Tensor, State]:
    out, h = net(x_t[:, None], h, return_next_prev_hidden=True)
    return out[:, 0], h


def _peer_exact(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Our loop with minGRU-pytorch's weights, which have no bias and stack candidate before gate."""
    candidate, gate = net.to_hidden_and_gate.weight.detach().double().cpu().chunk(2)
    width = len(gate)
    loop = minrnn.MinGRU(width, width, bias=False, batch_first=True, dtype=torch.float64, backend="reference")
    loop.load_state_dict({"weight_ih_l0": torch.cat([gate, candidate])})
    return _first(loop)


def _recurrent(cls: type[nn.Module], other: type[nn.Module]) -> Layer:
    """torch's layer or its loop, checked against the `other`."""

    def step(net: nn.Module, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        if hasattr(net, "step"):
            state = net.step(x_t, state)
            return state[0] if isinstance(state, tuple) else state, state
        out, state = net(x_t[:, None], state)
        return out[:, 0], state

    return Layer(
        build=lambda dim, inputs=None: cls(inputs or dim, dim, batch_first=True),
        read=lambda net, x: net(x),
        step=step,
        exact=lambda net: _first(_of(other, net)),
        square=False,
    )


def _mixer(name: str, **settings: Any) -> Layer:
    def read(net: nn.Module, x: Tensor) -> tuple[Tensor, State]:
        # Training asks for no state, which costs some layers time.
        return net(x, None if torch.is_grad_enabled() else net.initial_state(x.shape[0]))

    def exact(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return partial(_token_by_token, copy.deepcopy(net).cpu().double())

    return Layer(make(name, **settings), read, lambda net, x_t, state: net.step(x_t, state), exact)


def _token_by_token(net: nn.Module, x: Tensor) -> Tensor:
    state, outs = net.initial_state(x.shape[0]), []
    for x_t in x.unbind(1):
        out, state = net.step(x_t, state)
        outs.append(out)
    return torch.stack(outs, 1)


def _mamba_ssm() -> Layer:
    """state-spaces/mamba's own layer, in float32 and 16 bits, checked against its own single steps."""

    def step(net: nn.Module, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        out, *state = net.step(x_t[:, None], *state)
        return out[:, 0], tuple(state)

    def read(net: nn.Module, x: Tensor) -> tuple[Tensor, State]:
        # An empty cache serves, as a step costs the same after any sequence.
        return net(x), None if torch.is_grad_enabled() else net.allocate_inference_cache(len(x), 1)

    def exact(net: nn.Module) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()  # its steps are not differentiable
        def run(x: Tensor) -> Tensor:
            x_here = x.to(next(net.parameters()))
            state, outs = net.allocate_inference_cache(len(x), 1), []
            for x_t in x_here.unbind(1):
                out, state = step(net, x_t, state)
                outs.append(out)
            return torch.stack(outs, 1).to(x)

        return run

    def build(dim: int) -> nn.Module:
        from mamba_ssm import Mamba

        return Mamba(dim)

    return Layer(build, read, step, exact, (1e-3, 5e-2))


# Log space in float32 is off by 1e-5 at T = 512 and by 1e-3 at 65536; in 16 bits it is wrong throughout (part
# precision has the numbers), but timed all the same, as it is what a user would run.
LOG = {"tolerance": (2e-3, float("inf"))}
LAYERS: dict[str, Layer] = {
    "minGRU": _minimal(minrnn.MinGRU, "auto"),
    "minLSTM": _minimal(minrnn.MinLSTM, "auto"),
    "minGRU, log-space": _minimal(minrnn.MinGRU, "log", **LOG),
    "minLSTM, log-space": _minimal(minrnn.MinLSTM, "log", **LOG),
    # One step after another in plain PyTorch, the gates of all steps projected at once.
    "minGRU, loop": _minimal(minrnn.MinGRU, "reference", "cpu"),
    "minLSTM, loop": _minimal(minrnn.MinLSTM, "reference", "cpu"),
    "minGRU-pytorch": Layer(_peer, lambda net, x: net(x, return_next_prev_hidden=True), _peer_step, _peer_exact, **LOG),
    "GRU, loop": _recurrent(LoopGRU, nn.GRU),
    "LSTM, loop": _recurrent(LoopLSTM, nn.LSTM),
    "GRU, torch": _recurrent(nn.GRU, LoopGRU),
    "LSTM, torch": _recurrent(nn.LSTM, LoopLSTM),
    "Mamba": _mixer("ssm", inner="s6", wrapping="mamba"),
    "mamba-ssm": _mamba_ssm(),
    "attention": _mixer("attention"),
}
NEEDS = {"minGRU-pytorch": "minGRU_pytorch", "mamba-ssm": "mamba_ssm"}  # modules


def available(device: str) -> dict[str, Layer]:
    """The layers whose packages are installed and that run on this device."""
    here = {name: name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None for name in LAYERS}
    here["mamba-ssm"] &= device == "cuda"
    return {name: layer for name, layer in LAYERS.items() if here[name]}


def check(name: str, layer: Layer, net: nn.Module, x: Tensor) -> float:
    """The larger of the relative errors of the output and the input's gradient against float64, for a short (B, T, D).

    Raises ArithmeticError: an error is too large.
    """
    x = x.detach().requires_grad_()
    wide = x.detach().double().cpu().requires_grad_()
    exact = layer.exact(net)(wide)
    weight = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view_as(exact)
    expected = [exact.detach()]
    if exact.requires_grad:
        expected += torch.autograd.grad(exact, wide, weight)
    # torch's recurrent layers multiply in TF32 on a GPU by default. They are timed so, but checked without it.
    with torch.enable_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        out = layer.read(net, x)[0]
        found = [out.detach(), *torch.autograd.grad(out, x, weight.to(out))]
    most = layer.tolerance[x.dtype != torch.float32]
    return max(measure.check(name, a, e, most) for a, e in zip(found, expected, strict=False))
