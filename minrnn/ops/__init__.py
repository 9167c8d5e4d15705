"""h_t = a_t h_{t-1} + b_t and its gated forms, on every backend behind one signature."""

from .scan import available_backends, linear_scan, mingru_scan, minlstm_scan

__all__ = ["available_backends", "linear_scan", "mingru_scan", "minlstm_scan"]
