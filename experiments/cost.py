"""What a computation must do at least, counted without doing it, and the least time that a machine needs for that."""

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
OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")  # what they change they do not read
SAME = {  # formulas that torch has under another name
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        operations: of matrix products, convolutions and attention, a multiply-add being two; 0 for all others.
        bytes: each tensor that it takes read once, each that it makes or changes written once.
    """

    name: str
    operations: int
    bytes: int


Cost = Counter[Operation]  # and how often each is called


def total(cost: Cost) -> tuple[int, int]:
    """Operations and bytes."""
    return tuple(sum(times * getattr(call, key) for call, times in cost.items()) for key in ("operations", "bytes"))


def count(step: Callable[[], object]) -> Cost:
    """What `step` does: a forward pass, or one with loss, backward pass and optimiser.

    Meant for tensors made under `torch._subclasses.FakeTensorMode`, entered here too: nothing is computed and any size
    costs nothing. (Not for the device "meta", on which the scans have only their time loop.)

    Operators of torch as it runs without compilation, with formulas from its `flop_counter`, of causal attention half
    of that, the rest being masked. Views cost nothing. Fused, whatever torch does on this device:
    - minrnn's scans, whose arithmetic hides behind what they read and write: no operations;
    - attention, which with dropout has no fused kernel on a CPU: counted without;
    - the RMS norm, as a layer norm: they read and write the same;
    - torch.nn.GRU and LSTM: the projection of all inputs at once, then one operator a time step, which is what a
      recurrence needs at least and what cuDNN comes near. Their results have the right shapes only.
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
            with self:  # under inference mode what is made of others comes whole, a Linear for one
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
    """GRU's or LSTM's after its projection (B, T, 3H or 4H), one operator a step; gives something of (B, T, H)."""

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
    """Each once."""
    return {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Of an expanded tensor those that exist."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.itemsize


@dataclass(frozen=True)
class Machine:
    """Limits of a machine.

    Attributes:
        bandwidth: bytes a second to and from memory, read plus written.
        matrix_rate: operations a second of a matrix product, by the fastest library at hand.
        launch: seconds that an operator takes at least.
    """

    name: str
    bandwidth: float
    matrix_rate: float
    launch: float

    def seconds(self, cost: Cost) -> float:
        """The least time: every operator at the limit that binds it, one after another, nothing between them.

        All operations at one rate, also the few of S4 in double precision. What stays in a cache from one
        operator to the next can be faster.
        """
        return sum(times * self._one(call) for call, times in cost.items())

    def _one(self, call: Operation) -> float:
        return max(call.operations / self.matrix_rate, call.bytes / self.bandwidth, self.launch)


# NVIDIA's T4 datasheet: 320 GB/s, 8.1 TFLOP/s in single precision. A program reaches neither, the bandwidth least, so
# a time is a least time. The launch is not from there but assumed, at the low end of what one small kernel after
# another takes.
T4 = Machine("T4", 320e9, 8.1e12, 2e-6)


def here(device: str, dtype: torch.dtype = torch.float32) -> Machine:
    """This machine, measured: a copy, a matrix product, and additions of one number; about 4 s on a CPU."""
    size = 8192 if device == "cuda" else 512  # on a core 3 ms, which nothing else interrupts every time
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    x = torch.ones(1, device=device)
    products = [lambda: a @ b]
    if device == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # oneDNN, which torch takes for its LSTM and 16 bits but not for this: on AMD's processors twice as fast as MKL.
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    with torch.inference_mode():
        product = min(min(seconds(f, device, runs=(7, 300))) for f in products)
    tiny = min(seconds(lambda: [x.add_(1.0) for _ in range(1000)], device))
    name = torch.cuda.get_device_name() if device == "cuda" else hardware("cpu")["cpu"]
    return Machine(name, copy_bandwidth(device), 2 * size**3 / product, tiny / 1000)
