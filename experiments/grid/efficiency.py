"""The parts of the efficiency experiment by profile, in the order in which they are wanted."""

import sys
from collections.abc import Iterable

PARTS = {
    "smoke": ("train", "step", "parameters"),
    "cpu": ("train", "parameters", "context", "step", "forward", "batch", "width"),
    "paper": ("train", "parameters", "context", "step", "long", "half", "forward", "batch", "width"),
}
ASKED = {"cpu": ("long",)}  # in addition, only on request
BENCH = ("kernels", "layers", "precision", "copying", "language", "policy")  # of `make bench`, and of `make gpu` first


def command(parts: Iterable[str], profile: str, settings: list[str]) -> list[str]:
    """The command that measures these parts; `settings` come last and win."""
    chosen = [] if any(setting.startswith("profile=") for setting in settings) else [f"profile={profile}"]
    return [sys.executable, "-m", "experiments.efficiency", "-m", f"part={','.join(parts)}", *chosen, *settings]
