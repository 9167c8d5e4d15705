"""The one protocol of every sequence mixer: what a residual block puts between its norm and its sum.

B batch, T time, D features, the same in and out.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# A mixer's state: one tensor, or a tuple of states, always with the batch as the first dimension.
State: TypeAlias = Any


class Mixer(nn.Module):
    """Causal: the output at t depends on the inputs up to t alone. Every mixer is built as `Kind(dim, **settings)`.

    The law that tests hold for each: forward over a sequence = forward over its chunks with the state carried =
    `step` over its tokens.
    """

    dim: int

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """A whole sequence, or its next chunk.

        Args:
            x: (B, T, D).
            state: what `initial_state` or an earlier call gave. None starts anew and asks for no state in return,
                as in training: some mixers (convolutions) would pay for it.

        Returns:
            (B, T, D), and the state after the last step, or None where none was given.
        """
        raise NotImplementedError

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One token at a cost that does not grow with those before it: (B, D) and the state after it.

        Raises NotImplementedError for a mixer that has no recurrent form.
        """
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> State:
        """The state before the first token, on the parameters' device and in their dtype.

        Raises NotImplementedError for a mixer that has no recurrent form.
        """
        raise NotImplementedError


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Marks parameters that the optimiser must not decay (see `minrnn.models.parameter_groups`)."""
    for parameter in parameters:
        parameter.no_weight_decay = True


def state_map(f: Callable[[Tensor], Tensor], state: State) -> State:
    """`f` of every tensor of a state."""
    return tuple(state_map(f, part) for part in state) if isinstance(state, tuple) else f(state)


def like(parameter: nn.Parameter, *shape: int) -> Tensor:
    """Zeros on the parameter's device, in its dtype."""
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)


def causal_convolution(u: Tensor, k: Tensor, dim: int = -1) -> Tensor:
    """Along `dim`, where u has T steps and k as many taps, by FFT."""
    T = u.shape[dim]
    unit = 1 << max(0, (2 * T).bit_length() - 4)  # only factors up to 15 beside twos: 2T itself may have a slow FFT
    n = -(-2 * T // unit) * unit  # at least 2 T - 1, so that nothing wraps round
    y = torch.fft.irfft(torch.fft.rfft(u, n, dim=dim) * torch.fft.rfft(k, n, dim=dim), n, dim=dim)
    return y.narrow(dim, 0, T)
