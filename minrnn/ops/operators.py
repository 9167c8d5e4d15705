"""Registration of operators with torch; tracing, compiling, exporting and autograd see each as one step.

It uses plain definitions because `torch.library.custom_op` loads torch's compiler (2 seconds) at the first call.
"""

import importlib
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType

import torch

LIBRARY = torch.library.Library("minrnn", "DEF")  # definitions last as long as this object
below_autograd = torch._C._AutoDispatchBelowAutograd


def define(schema: str, kernel: Callable, fake: Callable, function: type[torch.autograd.Function] | None = None):
    """Defines torch.ops.minrnn.<name>, for any device.

    The schema is written out because what torch infers from annotations differs between its versions. `fake` returns
    empty results of the right shape and strides. `function` makes the operator differentiable: its forward calls the
    operator again with the same arguments, within `below_autograd`.
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minrnn::{name}", fake, lib=LIBRARY)
    if function is not None:
        LIBRARY.impl(name, lambda *arguments: function.apply(*arguments), "Autograd")


def is_transformed() -> bool:
    """Whether torch.func's grad, vmap etc. are active: they take the autograd.Function, not its operator."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_loading = threading.RLock()


def load(module: str) -> ModuleType:
    """Returns a module of kernels, imported at its first use because numba and Triton take a second."""
    with _loading:
        return importlib.import_module(f".{module}", __package__)


# A fork waits for other threads' imports and compilations, whose locks would never be released in the child.


def _hold() -> None:
    _loading.acquire()
    if numba := sys.modules.get("numba.core.compiler_lock"):
        numba.global_compiler_lock.acquire()
        _held.append(numba.global_compiler_lock)


def _release() -> None:
    while _held:
        _held.pop().release()
    _loading.release()


_held: list = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)
