import importlib.util
import os

# With a test process on every core, threads of torch's only wait for each other, up to five times as long, here and in
# every process that a test starts. Read when torch is loaded, hence before.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# The Triton kernels run everywhere: compiled on a GPU, in Triton's interpreter elsewhere. Triton reads this
# when a kernel is defined, hence before minrnn is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch fills new tensors with NaN, so that a result that was never written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fast_interpreter(monkeypatch):
    """The interpreter's scan combines element by element, 0.1 ms each. By whole rows it is the same, and faster."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import ScanOps

    def generic_scan(self, inputs):
        assert self.axis == 0
        outputs = [np.empty_like(x.handle.data) for x in inputs]
        previous = ()
        for i in range(len(outputs[0])):
            row = tuple(self.to_tensor(x.handle.data[i], x.dtype) for x in inputs)
            if i > 0:
                row = self.combine_fn.fn(*previous, *row)
            previous = row
            for output, value in zip(outputs, row, strict=True):
                output[i] = value.handle.data
        return [self.to_tensor(y, x.dtype) for y, x in zip(outputs, inputs, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", generic_scan)
    with np.errstate(all="ignore"):
        yield
