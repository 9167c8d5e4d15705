"""The least work of a computation, counted without running it, and the least time that a machine needs for it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .machine import hardware
from .measure import copy_bandwidth, seconds

aten = torch.ops.aten
EMPTY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")  # they write their first argument without reading it
SAME = {  # operators whose formula torch has under another name
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        operations: in matrix products, convolutions and attention, where a multiply-add is two; 0 for all others.
        bytes: moved if each input is read once, and each tensor that it makes or changes is written once.
    """

    name: str
    operations: int
    bytes: int


Cost = Counter[Operation]  # how often each is called


def total(cost: Cost) -> tuple[int, int]:
    """The total operations and bytes of a cost."""
    return tuple(sum(times * getattr(call, key) for call, times in cost.items()) for key in ("operations", "bytes"))


def count(step: Callable[[], object]) -> Cost:
    """The cost of `step`, a forward pass alone or with loss, backward pass and optimiser.

    Tensors should be made under `torch._subclasses.FakeTensorMode`, which is entered here too: nothing is computed, so
    any size is free. (The device "meta" does not serve: on it the scans have only their time loop.)

    Operators are those of torch without compilation, with formulas from its `flop_counter`; causal attention counts
    half, as the rest is masked. Views cost nothing. These count as fused, whatever torch does on this device:
    - minrnn's scans, with no operations: their arithmetic hides behind what they read and write;
    - attention, counted without dropout, with which it has no fused kernel on a CPU;
    - the RMS norm, as a layer norm, which reads and writes the same;
    - torch.nn.GRU and LSTM: the projection of all inputs at once, then one operator per time step, which is the least
      that a recurrence needs and which cuDNN comes near. Only the shapes of their results are right.
    """
    counter = _Counter()
    with _Fused(counter), counter:
        step()
    return counter.cost


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.cost: Cost = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # under inference mode composite operators, such as Linear, arrive undivided
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        name, schema, packet = func._schema.name, func._schema.arguments, func.overloadpacket
        taken = _tensors((args, kwargs))
        places = [i for i, argument in enumerate(schema) if argument.alias_info and argument.alias_info.is_write]
        changed = _tensors([args[i] if i < len(args) else kwargs.get(schema[i].name) for i in places])
        storages = {_storage(x) for x in taken.values()}
        made = {} if name in EMPTY else {k: x for k, x in _tensors(out).items() if _storage(x) not in storages}
        if changed or made:
            read = {k: x for k, x in taken.items() if not (name in OVERWRITES and k in changed)}
            formula = flop_registry.get(SAME.get(packet, packet))
            operations = formula(*args, **kwargs, out_val=out) if formula else 0
            given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
            if given.get("is_causal"):
                operations //= 2
            self.note(name, operations, *read.values(), *changed.values(), *made.values())
        return out

    def note(self, name: str, operations: int, *moved: Tensor, times: int = 1) -> None:
        self.cost[Operation(name, operations, sum(map(_bytes, moved)))] += times


class _Fused(TorchFunctionMode):
    def __init__(self, counter: _Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            return func(**dict(zip(names, args, strict=False)) | kwargs | {"dropout_p": 0.0})
        if func is F.rms_norm:
            return F.layer_norm(*args, kwargs["weight"])
        if func in (torch._VF.gru, torch._VF.lstm):
            x, state, weights, _, layers, _, _, bidirectional, batch_first = args
            if layers > 1 or bidirectional or len(weights) != 4 or not batch_first:
                raise NotImplementedError("cost: expected torch.nn.GRU or LSTM of one layer, with bias and batch_first")
            weight_ih, weight_hh, bias_ih, bias_hh = weights
            h = _Recurrence.apply(F.linear(x, weight_ih, bias_ih), weight_hh, bias_hh, self.counter)
            return h, *(state if isinstance(state, tuple) else (state,))
        return func(*args, **kwargs)


class _Recurrence(torch.autograd.Function):
    """The recurrence of a GRU or LSTM after its projection (B, T, 3H or 4H), one operator per step.

    It returns an uninitialised (B, T, H).
    """

    @staticmethod
    def forward(ctx, gates, weight, bias, counter):
        h = gates.new_empty(*gates.shape[:2], weight.shape[1])
        ctx.counter = counter
        ctx.save_for_backward(gates, weight, h)
        states = [h[:, 0]] * (gates.shape[2] // h.shape[2] - 2)  # LSTM has two
        operations = flop_registry[aten.mm](h[:, 0], weight.t())
        counter.note("recurrence", operations, gates[:, 0], weight, bias, *states, *states, times=h.shape[1])
        return h

    @staticmethod
    def backward(ctx, grad):
        gates, weight, h = ctx.saved_tensors
        grad_gates, states = torch.empty_like(gates), [h[:, 0]] * (gates.shape[2] // h.shape[2] - 2)
        operations = flop_registry[aten.mm](gates[:, 0], weight)
        moved = (grad[:, 0], gates[:, 0], grad_gates[:, 0], weight, *states, *states, *states)  # and their gradients
        ctx.counter.note("recurrence_backward", operations, *moved, times=h.shape[1])
        return grad_gates, grad_gates.flatten(0, 1).t() @ h.flatten(0, 1), grad_gates.sum((0, 1)), None


def _tensors(tree: object) -> dict[int, Tensor]:
    """The distinct tensors of a tree, by their Python id."""
    return {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """The bytes of a tensor; expanded dimensions count once."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.itemsize


@dataclass(frozen=True)
class Machine:
    """Limits of a machine.

    Attributes:
        bandwidth: bytes a second to and from memory, read plus written.
        matrix_rate: operations a second of a matrix product, by the fastest available library.
        launch: the least seconds that an operator takes.
    """

    name: str
    bandwidth: float
    matrix_rate: float
    launch: float

    def seconds(self, cost: Cost) -> float:
        """The least seconds: operators run one after another, without gaps, each at the limit that binds it.

        All operations count at one rate, also the few of S4 in double precision. Data that stays in a cache from one
        operator to the next can be faster.
        """
        return sum(times * self._one(call) for call, times in cost.items())

    def _one(self, call: Operation) -> float:
        return max(call.operations / self.matrix_rate, call.bytes / self.bandwidth, self.launch)


# NVIDIA's T4 datasheet: 320 GB/s, 8.1 TFLOP/s in single precision. No program reaches either, least of all the
# bandwidth, so the times are lower bounds. The launch time is not from the datasheet but assumed, at the low end of
# what small consecutive kernels take.
T4 = Machine("T4", 320e9, 8.1e12, 2e-6)


def here(device: str, dtype: torch.dtype = torch.float32) -> Machine:
    """The limits of this machine, measured by a copy, a matrix product and scalar additions; about 4 s on a CPU."""
    size = 8192 if device == "cuda" else 512  # 3 ms on a core, short enough that some runs are not interrupted
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    x = torch.ones(1, device=device)
    products = [lambda: a @ b]
    if device == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # torch uses oneDNN for its LSTM and 16 bits but not here, where on AMD's processors it is twice as fast as MKL.
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    with torch.inference_mode():
        product = min(min(seconds(f, device, runs=(7, 300))) for f in products)
    tiny = min(seconds(lambda: [x.add_(1.0) for _ in range(1000)], device))
    name = torch.cuda.get_device_name() if device == "cuda" else hardware("cpu")["cpu"]
    return Machine(name, copy_bandwidth(device), 2 * size**3 / product, tiny / 1000)
