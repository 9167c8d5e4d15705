"""Where the results of CPU scans are allocated."""

import torch
from torch import Tensor


def empty_cpu(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(shape)
