"""Allocation of results, in huge pages if they are large and on a CPU.

glibc returns every freed block above 32 MiB to the system, so each new one is faulted in again page by page, which
takes ten times as long as writing it. Huge pages for the library's own results make the faults rare (512 times
fewer) without changing the program's allocator.
"""

import ctypes
import sys

from torch import Tensor

MIN_BYTES = 32 << 20
HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # <sys/mman.h> of Linux

_madvise = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns an uninitialised contiguous tensor of `like`'s dtype and device."""
    x = like.new_empty(shape)
    if _madvise is not None and x.device.type == "cpu" and x.nbytes >= MIN_BYTES:
        start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        stop = (x.data_ptr() + x.nbytes) // HUGE_PAGE * HUGE_PAGE
        _madvise(start, stop - start, _MADV_HUGEPAGE)  # only advice: a system without huge pages may decline it
    return x
