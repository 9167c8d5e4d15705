"""minGRU and minLSTM, the RNNs of "Were RNNs All We Needed?" (arXiv 2410.01201), and the scans they run on."""

from .rnn import MinGRU, MinLSTM

__all__ = ["MinGRU", "MinLSTM", "__version__"]
__version__ = "0.1.0"
