"""MinGRU and MinLSTM ("Were RNNs All We Needed?", arXiv 2410.01201) with torch.nn.GRU's constructor and shapes.

B batch, T time, I input_size, H hidden_size, L num_layers, D directions (2 if bidirectional, else 1).
"""

import math
import numbers
import re
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .ops.cells import Activation, Cell, coefficients
from .ops.scan import BACKENDS, Backend, is_autocast_enabled, is_onnx_exporting, resolve, scan


class _MinRNN(nn.Module):
    """The base of both layers: everything but the cell."""

    # Programs for torch.nn.GRU read this too.
    proj_size = 0

    @property
    def mode(self) -> str:
        """The class's name, not "GRU" or "LSTM", which would promise a weight_hh or a cell state."""
        return type(self).__name__

    def __init__(
        self, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
        cell, backend,
    ):  # fmt: skip
        super().__init__()
        for name, value in {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}.items():
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value <= 0:
                raise ValueError(f"{name}: expected a positive int, got {value}")
        for name, value in {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout!r}")
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout acts between layers and not after the last, so it does nothing here: "
                f"got dropout={dropout} and num_layers={num_layers}",
                stacklevel=3,
            )
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
        self.input_size = input_size = int(input_size)
        self.hidden_size = hidden_size = int(hidden_size)
        self.num_layers = num_layers = int(num_layers)
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.backend = backend
        self._cell = cell
        rows = len(cell.inputs) * hidden_size
        for layer in range(num_layers):
            columns = self._columns(layer)
            for direction in self._directions:
                weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
                setattr(self, f"weight_ih_l{layer}{direction}", weight)
                bias_ih = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
                if bias:
                    setattr(self, f"bias_ih_l{layer}{direction}", bias_ih)

    @property
    def activation(self) -> str:
        return self._cell.activation

    @property
    def signed(self) -> bool:
        return self._cell.signed

    @property
    def _directions(self) -> tuple[str, ...]:
        """The suffixes of the parameters' names, in the order of the output's features."""
        return ("", "_reverse") if self.bidirectional else ("",)

    def _columns(self, layer: int) -> int:
        """Returns the number of features that a layer takes."""
        return self.input_size if layer == 0 else self.hidden_size * len(self._directions)

    def _parameters_of(self, layer: int, direction: str) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self, f"bias_ih_l{layer}{direction}") if self.bias else None
        return getattr(self, f"weight_ih_l{layer}{direction}"), bias

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """[weight_ih, bias_ih] of every layer and direction, or [weight_ih] without a bias."""
        every = (self._parameters_of(layer, d) for layer in range(self.num_layers) for d in self._directions)
        return [[p for p in pair if p is not None] for pair in every]

    def reset_parameters(self) -> None:
        """Draws all parameters as torch.nn.Linear does: uniform in ±1/sqrt(fan-in).

        The gates depend on the layer's input alone, so the layer is a Linear followed by a scan. torch.nn.GRU's
        ±1/sqrt(hidden_size) comes from the fan-in of the recurrent matrix, which this layer does not have.
        """
        with torch.no_grad():
            for _, layer, parameter in self._drawn():
                bound = 1 / math.sqrt(self._columns(layer))
                parameter.uniform_(-bound, bound)

    def _drawn(self) -> Iterator[tuple[str, int, nn.Parameter]]:
        """Yields "weight" or "bias", the layer, and the parameter that is learned for it.

        That is the weight or bias itself, or what pruning, weight_norm or a parametrization computes it from.
        """
        for name, parameter in self.named_parameters():
            if match := re.fullmatch(r"(?:parametrizations\.)?(weight|bias)_ih_l(\d+)(?:_reverse)?(?:[._]\w+)?", name):
                yield match[1], int(match[2]), parameter

    def flatten_parameters(self) -> None:
        """Does nothing, as each layer is one matrix already; programs written for torch.nn.GRU call it."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Returns the states of the last layer at every step, and the last state of every layer.

        Args:
            input: (T, B, I), or (B, T, I) with batch_first, or (T, I) unbatched, or a PackedSequence; the
                parameters' dtype (any float dtype under autocast).
            hx: (L * D, B, H), or (L * D, H) unbatched: the states before the first step of each direction, any
                sign, the input's dtype; layer k's directions begin at k * D. For a PackedSequence they are in the
                sequences' order before packing, and only the packed rows are computed. None means zeros.

        Returns:
            out: the input's form with D * H features, forward then reverse, contiguous; the input's dtype, but under
                autocast hx's dtype on a CPU if hx is given, and the autocast dtype on other devices. The backward
                pass reads out, so an in-place operation on it (nn.ReLU(inplace=True)) is an error, as with cuDNN.
            h_n: hx's shape; the state after the last step of each direction (the reverse one's is at step 0).

        Raises:
            TypeError: an argument is not a tensor (a pair (h_0, c_0) included).
            ValueError: the input is neither 2-D nor 3-D, or not of the parameters' dtype.
            RuntimeError: any other shape, dtype or device does not fit, or T is 0.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if not isinstance(input, Tensor):
            if isinstance(input, torch.fx.Proxy):
                raise TypeError(
                    f"torch.fx.symbolic_trace: {type(self).__name__} is one step of a graph; give fx a Tracer whose "
                    "is_leaf_module says so, or use torch.export.export"
                )
            raise TypeError(f"input: expected a tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected 2 (unbatched) or 3 dimensions, got shape {tuple(input.shape)}")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if x.shape[1 - batch_dim] == 0:
            raise RuntimeError(f"input: expected at least one time step, got shape {tuple(input.shape)}")
        self._check("input", "hx", input, hx, (x.shape[batch_dim],) if batched else (), len(self._directions))
        if hx is not None and not batched:
            hx = hx.unsqueeze(1)
        out, h_n = self._layers(x, hx, self.batch_first)
        return (out, h_n) if batched else (out.squeeze(batch_dim), h_n.squeeze(1))

    def _forward_packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """Rearranges packed sequences end to end, without padding, runs all layers, and packs the result again."""
        if is_onnx_exporting():
            raise RuntimeError("input: a PackedSequence cannot be exported to ONNX; export a call with a padded tensor")
        rows, batch_sizes, sorted_indices, unsorted_indices = packed
        if rows.dim() != 2:
            raise RuntimeError(f"input: expected packed rows (N, {self.input_size}), got shape {tuple(rows.shape)}")
        # Only torch's operators, so that a traced graph takes the lengths from its input. batch_sizes is on the CPU, so
        # none of them waits for an accelerator.
        step = torch.repeat_interleave(batch_sizes, output_size=rows.shape[0])
        packed_rows = torch.arange(step.shape[0], device=step.device)
        sequence = packed_rows - (batch_sizes.cumsum(0) - batch_sizes)[step]
        cu_seqlens = F.pad(torch.bincount(sequence).cumsum(0), (1, 0))
        place = cu_seqlens[sequence] + step  # where each packed row goes
        row = torch.empty_like(place).index_copy(0, place, packed_rows)
        place, row = place.to(rows.device), row.to(rows.device)
        self._check("input", "hx", rows, hx, (cu_seqlens.shape[0] - 1,), len(self._directions))
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)

        def move(x: Tensor, to: Tensor) -> Tensor:  # a copy's gradient is a selection, without sums
            return x.new_empty(x.shape).index_copy(0, to, x)

        out, h_n = self._layers(move(rows, place)[None], hx, True, cu_seqlens)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(move(out.squeeze(0), row), batch_sizes, sorted_indices, unsorted_indices), h_n

    def _layers(
        self,
        x: Tensor,
        hx: Tensor | None,
        batch_first: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs all layers on x, (T, B, .), or (B, T, .) with batch_first, or (1, N, .) with cu_seqlens."""
        # torch.nn.GRU's rule on a CPU under autocast: projections are bfloat16, states are not. Otherwise both agree.
        states_dtype = x.dtype if hx is None else hx.dtype
        T = x.shape[1 if batch_first else 0]
        one_step = isinstance(T, int) and T == 1 and not torch.jit.is_tracing()  # so in every call
        last: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            outs = []
            for direction in self._directions:
                reverse = direction == "_reverse"
                projection = F.linear(x, *self._parameters_of(layer, direction))
                if x.device.type == "cpu":
                    projection = projection.to(states_dtype)
                h0 = None if hx is None else hx[len(last)].to(projection.dtype)
                # The scan reads any strides and writes in its input's order, so nothing moves here.
                projection = projection if batch_first else projection.transpose(0, 1)
                if one_step:
                    h = self._one_step(projection, h0)
                else:
                    h = scan(self._cell, (projection,), h0, None, reverse, self.backend, cu_seqlens)
                if cu_seqlens is None:
                    last.append(h[:, 0 if reverse else -1])
                else:
                    ends = cu_seqlens[:-1] if reverse else cu_seqlens[1:] - 1
                    last.append(h.squeeze(0).index_select(0, ends.to(h.device)))
                outs.append(h if batch_first else h.transpose(0, 1))
            x = torch.cat(outs, -1) if self.bidirectional else outs[0].contiguous()
        return x, torch.stack(last)

    def _one_step(self, projection: Tensor, h0: Tensor | None) -> Tensor:
        """Scans a single step, (B, 1, D), with torch's operators: faster, and exports do not need this library."""
        resolve(self.backend, projection.device, projection.dtype)
        wide = projection.to(torch.promote_types(projection.dtype, torch.float32))  # as the scan accumulates
        a, b = coefficients(self._cell, wide.chunk(len(self._cell.inputs), -1))
        return (b if h0 is None else a * h0[:, None].to(wide.dtype) + b).to(projection.dtype)

    def step(self, x_t: Tensor, h: Tensor | None = None) -> Tensor:
        """Returns the states after one token. The output for that token is the last layer's new state, `h[-1]`.

        It calls the module with a sequence of one step, so that hooks (pruning, weight_norm, FSDP) act as usual.

        Args:
            x_t: (B, I), the parameters' dtype (any float dtype under autocast).
            h: (L, B, H), the states before this token, x_t's dtype; None means zeros.

        Returns:
            (L, B, H), the states after the token, which are the next call's h.

        Raises:
            TypeError, ValueError: as `forward`.
            RuntimeError: a shape, dtype or device does not fit, or the layer is bidirectional.
        """
        if self.bidirectional:
            raise RuntimeError("step: a bidirectional layer needs the whole sequence; call forward")
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t: expected a tensor, got {type(x_t).__name__}")
        if x_t.dim() != 2:
            raise RuntimeError(f"x_t: expected shape (B, {self.input_size}), got {tuple(x_t.shape)}")
        self._check("x_t", "h", x_t, h, (x_t.shape[0],), 1)
        return self(x_t.unsqueeze(1 if self.batch_first else 0), h)[1]

    def _check(
        self, input_name: str, state_name: str, x: Tensor, state: Tensor | None, batch: tuple[int, ...], D: int
    ) -> None:
        weight = self.weight_ih_l0
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"{input_name}: expected input_size={self.input_size} features, got {x.shape[-1]}")
        if x.dtype != weight.dtype and not is_autocast_enabled(x.device):
            raise ValueError(f"{input_name}: expected the parameters' dtype {weight.dtype}, got {x.dtype}")
        if state is None:
            return
        if isinstance(state, tuple):
            raise TypeError(
                f"{state_name}: {type(self).__name__} carries one state, so it takes h_0 alone (and returns h_n "
                "alone), got a tuple like torch.nn.LSTM's (h_0, c_0)"
            )
        if not isinstance(state, Tensor):
            raise TypeError(f"{state_name}: expected a tensor, got {type(state).__name__}")
        expected = (self.num_layers * D, *batch, self.hidden_size)
        if torch.compiler.is_compiling() and state.dim() == len(expected):  # a compiled size may depend on data
            for actual, size in zip(state.shape, expected, strict=True):
                torch._check(actual == size, lambda: f"{state_name}: a shape that does not fit {input_name}'s")
        elif state.shape != expected:
            raise RuntimeError(f"{state_name}: expected shape {expected}, got {tuple(state.shape)}")
        if state.dtype != x.dtype and not is_autocast_enabled(x.device):
            raise RuntimeError(f"{state_name}: expected {input_name}'s dtype {x.dtype}, got {state.dtype}")
        if state.device != x.device:
            raise RuntimeError(f"{state_name}: expected {input_name}'s device {x.device}, got {state.device}")

    def __prepare_scriptable__(self):  # torch.jit.script asks for it
        raise NotImplementedError(
            f"torch.jit.script: {type(self).__name__} cannot be scripted; use torch.jit.trace or torch.export.export"
        )

    def extra_repr(self) -> str:
        defaults: dict[str, object] = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0}
        defaults |= {
            "bidirectional": False,
            "activation": "g",
            "normalize_gates": True,
            "signed": False,
            "backend": "auto",
        }
        changed = (f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k, v) != v)
        return ", ".join((str(self.input_size), str(self.hidden_size), *changed))


class MinGRU(_MinRNN):
    """minGRU as a replacement of torch.nn.GRU: the same constructor, the same `out, h_n = rnn(input, hx)`.

    arXiv 2410.01201, section 3.1, with the activation g of its appendix B:

        h_t = (1 - z_t) * h_{t-1} + z_t * g(W_h x_t + b_h),   z_t = sigmoid(W_z x_t + b_z)

    `weight_ih_l{k}` stacks (W_z, W_h) and is (2H, I), or (2H, D * H) for k > 0; `bias_ih_l{k}` is (2H,); those
    of the reverse direction end in `_reverse`. There is no weight_hh: gate and candidate depend on x_t alone, which
    makes the recurrence linear in h and parallel in time. All are initialised as torch.nn.Linear's.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
            torch.nn.GRU. Dropout acts between layers, not after the last, and only in training.
        activation: the candidate's, "g" (x + 0.5 for x >= 0, else sigmoid(x)) or "identity" (as in section 3.1).
        signed: h_t = (1 - 2 z_t) * h_{t-1} + (1 - |1 - 2 z_t|) * g(W_h x_t + b_h) in place of the above: the state
            can flip its sign, and so count modulo 2 (arXiv 2411.12537). Not with backend="log".
        backend: the scan's, see `minrnn.ops.available_backends`; "auto" picks by device.

    Raises:
        TypeError: an argument has another type or is unknown (proj_size and nonlinearity do not exist here).
        ValueError: a size is below 1, dropout is outside [0, 1], or activation or backend is unknown.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "g",
        signed: bool = False,
        backend: Backend = "auto",
    ):
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            Cell("mingru", activation, signed=signed), backend,
        )  # fmt: skip
        self.reset_parameters()


class MinLSTM(_MinRNN):
    """minLSTM with torch.nn.GRU's constructor and shapes: its one state is h, without a cell state c.

    arXiv 2410.01201, section 3.2, with the activation g of its appendix B:

        h_t = f'_t * h_{t-1} + i'_t * g(W_h x_t + b_h),   f'_t = f_t / (f_t + i_t),   i'_t = i_t / (f_t + i_t),
        f_t = sigmoid(W_f x_t + b_f),   i_t = sigmoid(W_i x_t + b_i)

    `weight_ih_l{k}` stacks (W_f, W_i, W_h) and is (3H, I), or (3H, D * H) for k > 0; `bias_ih_l{k}` is (3H,); those
    of the reverse direction end in `_reverse`. There is no weight_hh: gates and candidate depend on x_t alone, which
    makes the recurrence linear in h and parallel in time. All are initialised as torch.nn.Linear's.

    Args:
        normalize_gates: False leaves f and i independent, as the authors' public code does by default.
        forget_bias: added to b_f at initialisation, to forget slowly at first (the authors' code uses 3).
        signed: h_{t-1} is multiplied by s_t = f'_t - i'_t and the candidate by 1 - |s_t|, as in `MinGRU`; with
            normalize_gates=False the factors are 2 f_t - 1 and i_t.

        Other arguments and errors are those of `MinGRU`; forget_bias without a bias is a ValueError.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "g",
        normalize_gates: bool = True,
        forget_bias: float = 0.0,
        signed: bool = False,
        backend: Backend = "auto",
    ):
        if not isinstance(normalize_gates, bool):
            raise TypeError(f"normalize_gates: expected a bool, got {type(normalize_gates).__name__}")
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype,
            Cell("minlstm", activation, normalize_gates, signed), backend,
        )  # fmt: skip
        if forget_bias and not bias:
            raise ValueError(f"forget_bias: expected 0 where bias=False, got {forget_bias}")
        self.forget_bias = forget_bias
        self.reset_parameters()

    @property
    def normalize_gates(self) -> bool:
        return self._cell.normalize

    def reset_parameters(self) -> None:
        """Draws all parameters as `MinGRU.reset_parameters` does, and adds forget_bias to b_f."""
        super().reset_parameters()
        with torch.no_grad():
            for kind, _, parameter in self._drawn():
                if kind == "bias":
                    parameter[: self.hidden_size] += self.forget_bias
