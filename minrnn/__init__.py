"""minGRU and minLSTM, the RNNs of "Were RNNs All We Needed?" (arXiv 2410.01201), and the scans they run on."""

import importlib

from .rnn import MinGRU, MinLSTM

__all__ = ["MinGRU", "MinLSTM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "onnx":  # on first use: it needs onnxscript, which nothing else does
        return importlib.import_module(".onnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
