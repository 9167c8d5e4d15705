"""A training step at the paper's width and depth: ours, a peer's layer in the same backbone, and other models.

Forward, loss, backward, clipping and AdamW, on random tokens of the shape of the task. Selective copying in two
micro-batches of 32; the character model at blocks from the paper's up.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from experiments import selective_copy
from experiments.config import Train
from experiments.engine import Trainer
from experiments.machine import keep_freed_memory
from experiments.measure import relative_error, seconds, summary
from minrnn.mixers import Mixer, make
from minrnn.models import TokenModel
from minrnn.ops.cells import CELLS
from minrnn.ops.scan import scan

BATCH, MICRO_BATCHES, MARKERS, VOCAB = 64, 2, 16, 16
DIM, LAYERS, EXPANSION = 64, 3, 6
LENGTHS = (512, 4096)  # of the body
CHARACTERS, LANGUAGE_DIM = 65, 384
NEAR = {"cpu": 1e-5, "cuda": 1e-3}  # a GPU may multiply matrices in tf32
LANGUAGE_SHAPES = {"cpu": [(12, 256), (4, 1024), (2, 2048), (1, 4096)], "cuda": [(64, 256), (16, 1024), (4, 4096)]}


class Peer(Mixer):
    """minGRU-pytorch's layer (log-space scan) where ours stands."""

    def __init__(self, dim: int, expansion: float = EXPANSION):
        super().__init__()
        from minGRU_pytorch import minGRU

        self.rnn = minGRU(dim, expansion_factor=expansion)

    def forward(self, x: torch.Tensor, state=None):
        return self.rnn(x), None


def model(mixer: Callable[[int], Mixer], device: str) -> TokenModel:
    return TokenModel(VOCAB, VOCAB, DIM, LAYERS, mixer).to(device)


def copying_step(net: TokenModel, T: int, device: str) -> Callable[[], torch.Tensor]:
    inputs, targets = (torch.randint(VOCAB, (BATCH, n), device=device) for n in (T, MARKERS))
    return training_step(net, inputs, targets, MICRO_BATCHES)


def training_step(
    net: TokenModel, inputs: torch.Tensor, targets: torch.Tensor, micro_batches: int = 1
) -> Callable[[], torch.Tensor]:
    """Of ids (B, T) and the classes of the last steps, perhaps of all."""
    trainer = Trainer(net, Train(), micro_batches)
    parts = [*zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True)]
    return lambda: trainer.step(0, selective_copy.loss, parts)


def scans(T: int, device: str) -> Callable[[], object]:
    """What a step spends in the scan: forward and backward, every layer and micro-batch."""
    width = DIM * EXPANSION
    x = torch.randn(BATCH // MICRO_BATCHES, T, 2 * width, device=device, requires_grad=True)
    weight = torch.randn(BATCH // MICRO_BATCHES, T, width, device=device)

    def run() -> None:
        for _ in range(LAYERS * MICRO_BATCHES):
            torch.autograd.grad(scan(CELLS["mingru_g"], (x,)), x, weight)

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
    if not error <= NEAR[device]:
        raise SystemExit(f"training: the model's logits are off by {error:.1e}; not measured")


def check_language(name: str, build: Callable[[], TokenModel], device: str) -> None:
    """Logits and gradients of the parameters in float32 are those of the float64 model on plain loops."""
    net, exact = build().to(device), build().double()
    exact.load_state_dict(net.state_dict())
    for module in exact.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    tokens = torch.randint(CHARACTERS, (2, 101))
    found = []
    for model, x in ((net, tokens.to(device)), (exact, tokens)):
        logits = model(x[:, :-1])[0]
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        found.append([logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for i, (actual, expected) in enumerate(zip(*found, strict=True)):
        error = relative_error(actual.cpu(), expected)
        # The candidate's activation has a kink at 0, and rounding puts a few values on its other side: there the
        # gradient jumps.
        if not error <= (NEAR[device] if i == 0 else 1e-2):
            what = "logits" if i == 0 else f"gradient of {list(dict(net.named_parameters()))[i - 1]}"
            raise SystemExit(f"language: {name}: the {what} is off by {error:.1e}; not measured")


def training(device: str) -> list[dict]:
    keep_freed_memory()
    check(device)
    rows = []
    for length in LENGTHS:
        T = length + MARKERS
        runs = (3, 5) if device == "cpu" and length > 1000 else (7, 20)
        row = {"shape": (BATCH, T), "micro_batches": MICRO_BATCHES, "dtype": "float32"}
        ours = copying_step(model(make("mingru", expansion=EXPANSION), device), T, device)
        row["minrnn"] = summary(seconds(ours, device, runs=runs))
        row["scans"] = summary(seconds(scans(T, device), device, runs=runs))
        row["minrnn, minLSTM"] = summary(
            seconds(copying_step(model(make("minlstm", expansion=EXPANSION), device), T, device), device, runs=runs)
        )
        if importlib.util.find_spec("minGRU_pytorch"):
            peer = copying_step(model(Peer, device), T, device)
            if not math.isfinite(peer().item()):
                raise SystemExit("training: minGRU-pytorch's loss is not finite; not measured")
            row["minGRU-pytorch"] = summary(seconds(peer, device, runs=(3, 5) if length > 1000 else (5, 7)))
        rows.append(row)
        shown = {name: f"{t['min_ms']:.0f} / {t['median_ms']:.0f} ms" for name, t in row.items() if type(t) is dict}
        print(f"{tuple(row['shape'])}: {shown}", flush=True)
    return rows


def language_models(block: int) -> dict[str, Callable[[], TokenModel]]:
    """The paper's models: 3 layers, 384 wide, minRNNs in its block, nanoGPT's with 6 heads; without dropout."""
    build = partial(TokenModel, CHARACTERS, CHARACTERS, LANGUAGE_DIM, 3)
    nanogpt = {"norm": "layer", "tied": True, "init": "gpt2"}
    block_of_paper = {"conv": 4, "pointwise": True, "mlp": 2, "activation": "geglu"} | nanogpt
    models = {
        "minrnn": lambda: build(make("mingru", expansion=2), **block_of_paper),
        "minLSTM": lambda: build(make("minlstm", expansion=2), **block_of_paper),
        "Mamba": lambda: build(make("ssm", inner="s6", wrapping="mamba"), **nanogpt),
        "Transformer": lambda: build(make("attention"), mlp=4, positions=block, **nanogpt),
    }
    if importlib.util.find_spec("minGRU_pytorch"):
        models["minGRU-pytorch"] = lambda: build(partial(Peer, expansion=2), **block_of_paper)
    return models


def language(device: str) -> list[dict]:
    keep_freed_memory()
    for name, build in language_models(256).items():
        if name != "minGRU-pytorch":  # a peer; a loss that is finite must do
            check_language(name, build, device)
    rows = []
    for batch, block in LANGUAGE_SHAPES[device]:
        row = {"shape": (batch, block), "dtype": "float32"}
        inputs, targets = (torch.randint(CHARACTERS, (batch, block), device=device) for _ in range(2))
        for name, build in language_models(block).items():
            step = training_step(build().to(device), inputs, targets)
            if not math.isfinite(step().item()):
                raise SystemExit(f"language: the loss of {name} is not finite; not measured")
            row[name] = summary(seconds(step, device, at_least=5.0, runs=(5, 20)))
        rows.append(row)
        shown = {name: f"{t['min_ms']:.0f} / {t['median_ms']:.0f} ms" for name, t in row.items() if type(t) is dict}
        print(f"{tuple(row['shape'])}: {shown}", flush=True)
    return rows
