"""The protocol of all sequence mixers, the part of a residual block between its norm and its sum.

B batch, T time, D features, the same in and out.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# A mixer's state: one tensor, or a tuple of states, always with the batch as the first dimension.
State: TypeAlias = Any


class Mixer(nn.Module):
    """A causal map of sequences: the output at t depends only on the inputs up to t.

    Every mixer is built as `Kind(dim, **settings)`. The tests check that forward over a sequence, forward over its
    chunks with the state carried, and `step` over its tokens are equal.
    """

    dim: int

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Returns the output for a whole sequence, or for its next chunk, and the state after it.

        Args:
            x: (B, T, D).
            state: from `initial_state` or an earlier call. None starts a sequence and returns no state, as in
                training, because computing it costs some mixers (convolutions) extra.

        Returns:
            (B, T, D), and the state after the last step, or None if state is None.
        """
        raise NotImplementedError

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the output (B, D) for one token, and the state after it. Recurrent mixers do so at a constant cost.

        Raises NotImplementedError for a mixer that has no recurrent form.
        """
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> State:
        """Returns the state before the first token, on the parameters' device and in their dtype.

        Raises NotImplementedError for a mixer that has no recurrent form.
        """
        raise NotImplementedError


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Marks parameters that weight decay must leave alone (see `minrnn.models.parameter_groups`)."""
    for parameter in parameters:
        parameter.no_weight_decay = True


def state_map(f: Callable[[Tensor], Tensor], state: State) -> State:
    """Applies `f` to every tensor of a state."""
    return tuple(state_map(f, part) for part in state) if isinstance(state, tuple) else f(state)


def like(parameter: nn.Parameter, *shape: int) -> Tensor:
    """Returns zeros on the parameter's device, in its dtype."""
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)


def causal_convolution(u: Tensor, k: Tensor, dim: int = -1) -> Tensor:
    """Convolves u with k along `dim`, where both have T elements, by FFT."""
    T = u.shape[dim]
    unit = 1 << max(0, (2 * T).bit_length() - 4)  # apart from 2, only factors up to 15: 2 T itself may have a slow FFT
    n = -(-2 * T // unit) * unit  # at least 2 T - 1, so that nothing wraps round
    y = torch.fft.irfft(torch.fft.rfft(u, n, dim=dim) * torch.fft.rfft(k, n, dim=dim), n, dim=dim)
    return y.narrow(dim, 0, T)
