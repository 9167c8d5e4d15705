import os

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
