"""Times training steps of whole models: ours, another library's layer in the same backbone, and other models.

A step is forward, loss, backward, clipping and AdamW, on random tokens of the task's shape, at the paper's depth. Our
models are first checked against themselves in float64 on plain loops; a wrong one stops the measurement.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minrnn.mixers import Mixer, make
from minrnn.models import TokenModel
from minrnn.ops.cells import CELLS
from minrnn.ops.scan import scan

from .. import measure, selective_copy
from ..config import EfficiencyData, Train
from ..engine import Trainer
from ..measure import Call
from .timer import Build, Case, Point, Timer, sizes

LAYERS = 3
MICRO_BATCHES, MARKERS, VOCAB, EXPANSION = 2, 16, 16, 6  # of selective copying
CHARACTERS, CHECKED_BLOCK = 65, 256
PEER = "minGRU-pytorch"
NEAR = {"cpu": 1e-5, "cuda": 1e-3}  # a GPU may multiply matrices in TF32
# The candidate's activation has a kink at 0, where the gradient jumps, and rounding moves a few values across it.
NEAR_GRADIENT = 1e-2

Models = dict[str, Callable[[], nn.Module]]


class Peer(Mixer):
    """minGRU-pytorch's layer (log-space scan) in place of ours."""

    def __init__(self, dim: int, expansion: float):
        super().__init__()
        from minGRU_pytorch import minGRU

        self.rnn = minGRU(dim, expansion_factor=expansion)

    def forward(self, x: Tensor, state=None) -> tuple[Tensor, None]:
        return self.rnn(x), None


def check(name: str, build: Callable[[], nn.Module], inputs: list[Tensor], device: torch.device) -> float:
    """The error of a model's output in float32, after a check of it and the parameters' gradients against float64."""
    net, exact = build().to(device), build().double()
    exact.load_state_dict(net.state_dict())
    for module in exact.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    found = []
    for model, taken in (
        (net, [x.to(device) for x in inputs]),
        (exact, [x.double() if x.is_floating_point() else x for x in inputs]),
    ):
        out = model(*taken)
        out = out[0] if isinstance(out, tuple) else out
        found.append([out.detach(), *torch.autograd.grad(out.square().mean(), list(model.parameters()))])
    names = ["result", *(f"gradient of {name}" for name, _ in net.named_parameters())]
    limits = [NEAR[device.type], *[NEAR_GRADIENT] * (len(names) - 1)]
    errors = [
        measure.check(f"{name}, {what}", *pair, most)
        for what, pair, most in zip(names, zip(*found, strict=True), limits, strict=True)
    ]
    return errors[0]


def training_step(net: nn.Module, inputs: Tensor, targets: Tensor, micro_batches: int = 1) -> Callable[[], Tensor]:
    """A training step on ids (B, T) and the classes of the last steps, or of all."""
    trainer = Trainer(net, Train(), micro_batches)
    parts = [*zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True)]
    return lambda: trainer.step(0, selective_copy.loss, parts)


def step_of(name: str, build: Callable[[], nn.Module], tokens: tuple[Tensor, Tensor], micro_batches: int = 1) -> Call:
    """A training step of the model; the other library's is only checked for a finite loss."""
    step = training_step(build().to(tokens[0].device), *tokens, micro_batches)
    if name == PEER and not math.isfinite(step().item()):
        raise ArithmeticError("its loss is no finite number")
    return step


def copying_models(width: int) -> Models:
    build = partial(TokenModel, VOCAB, VOCAB, width, LAYERS)
    models: Models = {
        "minGRU": lambda: build(make("mingru", expansion=EXPANSION)),
        "minLSTM": lambda: build(make("minlstm", expansion=EXPANSION)),
    }
    if importlib.util.find_spec("minGRU_pytorch"):
        models[PEER] = lambda: build(partial(Peer, expansion=EXPANSION))
    return models


def language_models(block: int, width: int) -> Models:
    """The paper's language models, minRNNs in its block and nanoGPT's Transformer, without dropout."""
    build = partial(TokenModel, CHARACTERS, CHARACTERS, width, LAYERS)
    nanogpt = {"norm": "layer", "tied": True, "init": "gpt2"}
    block_of_paper = {"conv": 4, "pointwise": True, "mlp": 2, "activation": "geglu"} | nanogpt
    models: Models = {
        "minGRU": lambda: build(make("mingru", expansion=2), **block_of_paper),
        "minLSTM": lambda: build(make("minlstm", expansion=2), **block_of_paper),
        "Mamba": lambda: build(make("ssm", inner="s6", wrapping="mamba"), **nanogpt),
        "Transformer": lambda: build(make("attention"), mlp=4, positions=block, **nanogpt),
    }
    if importlib.util.find_spec("minGRU_pytorch"):
        models[PEER] = lambda: build(partial(Peer, expansion=2), **block_of_paper)
    return models


def scans_of(batch: int, T: int, width: int, device: torch.device) -> Call:
    """The minGRU scans of one step of copying: forward and backward, for every layer and micro-batch."""
    x = torch.randn(batch // MICRO_BATCHES, T, 2 * width * EXPANSION, device=device, requires_grad=True)
    weight = torch.randn(batch // MICRO_BATCHES, T, width * EXPANSION, device=device)

    def run() -> None:
        for _ in range(LAYERS * MICRO_BATCHES):
            torch.autograd.grad(scan(CELLS["mingru_g"], (x,)), x, weight)

    return run


def _cases(
    data: EfficiencyData, device: torch.device, models: Callable[[Point], Models], builds: Callable, vocab: int
) -> tuple[list[Case], dict[str, Any]]:
    """The cases and the models' errors; from a size, `models` gives what is checked and `builds` what is timed."""
    errors = {}
    for width in sorted({size["width"] for size in sizes(data)}):
        for name, build in models({"width": width, "length": CHECKED_BLOCK}).items():
            if name != PEER:
                error = check(name, build, [torch.randint(vocab, (2, 100))], device)
                errors[name] = max(error, errors.get(name, 0.0))

    def case(size: Point, before: list[Point]) -> list[Point]:
        return Timer(data, device, size).measure(builds(size))

    found = [size | {"dtype": "float32"} for size in sizes(data)]
    return [(size, partial(case, size)) for size in found], {"errors": errors, "dtype": "float32"}


def prepare_copying(
    data: EfficiencyData, device: torch.device, stack: contextlib.ExitStack
) -> tuple[list[Case], dict[str, Any]]:
    def models(size: Point) -> Models:
        return copying_models(size["width"])

    def builds(size: Point) -> dict[str, Build]:
        batch, T, width = size["batch"], size["length"], size["width"]
        tokens = tuple(torch.randint(VOCAB, (batch, n), device=device) for n in (T, MARKERS))
        found = {name: partial(step_of, name, build, tokens, MICRO_BATCHES) for name, build in models(size).items()}
        return found | {"scans": partial(scans_of, batch, T, width, device)}

    return _cases(data, device, models, builds, VOCAB)


def prepare_language(
    data: EfficiencyData, device: torch.device, stack: contextlib.ExitStack
) -> tuple[list[Case], dict[str, Any]]:
    def models(size: Point) -> Models:
        return language_models(size["length"], size["width"])

    def builds(size: Point) -> dict[str, Build]:
        tokens = tuple(torch.randint(CHARACTERS, (size["batch"], size["length"]), device=device) for _ in range(2))
        return {name: partial(step_of, name, build, tokens) for name, build in models(size).items()}

    return _cases(data, device, models, builds, CHARACTERS)
