"""A training step of selective copying at the paper's width and depth: ours, and a peer's layer in the same backbone.

Forward, loss, backward of two micro-batches of 32, clipping and AdamW; random tokens of the task's shape.
"""

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from experiments.machine import keep_freed_memory
from minrnn.mixers import Mixer, make
from minrnn.models import TokenModel, parameter_groups
from minrnn.ops.scan import scan

from .measure import relative_error, seconds, summary

BATCH, MICRO_BATCHES, MARKERS, VOCAB = 64, 2, 16, 16
DIM, LAYERS, EXPANSION = 64, 3, 6
LENGTHS = (512, 4096)  # of the body


class Peer(Mixer):
    """minGRU-pytorch's layer (log-space scan) where ours stands."""

    def __init__(self, dim: int):
        super().__init__()
        from minGRU_pytorch import minGRU

        self.rnn = minGRU(dim, expansion_factor=EXPANSION)

    def forward(self, x: torch.Tensor, state=None):
        return self.rnn(x), None


def model(mixer: Callable[[int], Mixer], device: str) -> TokenModel:
    return TokenModel(VOCAB, VOCAB, DIM, LAYERS, mixer).to(device)


def training_step(net: TokenModel, T: int, device: str) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(parameter_groups(net, 3e-4, 0.05), fused=True)
    inputs = torch.randint(VOCAB, (BATCH, T), device=device).chunk(MICRO_BATCHES)
    targets = torch.randint(VOCAB, (BATCH, MARKERS), device=device).chunk(MICRO_BATCHES)

    def step() -> torch.Tensor:
        for x, y in zip(inputs, targets, strict=True):
            loss = F.cross_entropy(net(x, last=MARKERS)[0].flatten(0, 1), y.flatten()) / MICRO_BATCHES
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def scans(T: int, device: str) -> Callable[[], object]:
    """What a step spends in the scan: forward and backward, every layer and micro-batch."""
    width = DIM * EXPANSION
    x = torch.randn(BATCH // MICRO_BATCHES, T, 2 * width, device=device, requires_grad=True)
    weight = torch.randn(BATCH // MICRO_BATCHES, T, width, device=device)

    def run() -> None:
        for _ in range(LAYERS * MICRO_BATCHES):
            torch.autograd.grad(scan("mingru_g", (x,)), x, weight)

    return run


def check(device: str) -> None:
    """The logits of our model in float32 are those of the float64 loop."""
    net = model(make("mingru", expansion=EXPANSION), device)
    exact = model(make("mingru", expansion=EXPANSION), "cpu").double()
    exact.load_state_dict(net.state_dict())
    for mixer in exact.backbone.mixers:
        mixer.rnn.backend = "reference"
    tokens = torch.randint(VOCAB, (2, 100))
    error = relative_error(net(tokens.to(device))[0].detach().cpu(), exact(tokens)[0].detach())
    if not error <= (1e-5 if device == "cpu" else 1e-3):  # a GPU may multiply matrices in tf32
        raise SystemExit(f"training: the model's logits are off by {error:.1e}; not measured")


def training(device: str) -> list[dict]:
    keep_freed_memory()
    check(device)
    rows = []
    for length in LENGTHS:
        T = length + MARKERS
        runs = (3, 5) if device == "cpu" and length > 1000 else (7, 20)
        row = {"shape": (BATCH, T), "micro_batches": MICRO_BATCHES, "dtype": "float32"}
        ours = training_step(model(make("mingru", expansion=EXPANSION), device), T, device)
        row["minrnn"] = summary(seconds(ours, device, runs=runs))
        row["scans"] = summary(seconds(scans(T, device), device, runs=runs))
        row["minrnn, minLSTM"] = summary(
            seconds(training_step(model(make("minlstm", expansion=EXPANSION), device), T, device), device, runs=runs)
        )
        if importlib.util.find_spec("minGRU_pytorch"):
            peer = training_step(model(Peer, device), T, device)
            if not math.isfinite(peer().item()):
                raise SystemExit("training: minGRU-pytorch's loss is not finite; not measured")
            row["minGRU-pytorch"] = summary(seconds(peer, device, runs=(3, 5) if length > 1000 else (5, 7)))
        rows.append(row)
        shown = {name: f"{t['min_ms']:.0f} / {t['median_ms']:.0f} ms" for name, t in row.items() if type(t) is dict}
        print(f"{tuple(row['shape'])}: {shown}", flush=True)
    return rows
