"""All settings: the typed schemas behind `configs/`, and the id of a run. Needs no torch.

The experiment, `model`, `data`, `train`, `eval` and the seed define a run; the other settings say where and how it is
run, and do not enter its id.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from .files import nearest
from .seeds import RUNS, STEPS

PROFILES = ("smoke", "cpu", "paper")
SECTIONS = ("model", "data", "train", "eval")  # these define a run, with the experiment and the seed
NO_ID = {"id": False}  # marks a setting in them that does not enter the id
TEXTS = ("tinyshakespeare", "python_docs")
LRA_DATASETS = {  # None: Long Range Arena's own
    "listops": (None,),
    "image": (None, "local/digits"),
    "retrieval": (None, "local/pydoc_pairs"),
}
FORMER = {  # names of settings in records of schema 1, and their present names
    "train.lr": "train.learning_rate",
    "train.warmup": "train.warmup_steps",
    "train.clip": "train.grad_clip",
    "eval.every": "eval.interval",
    "eval.batches": "eval.iters",
    "data.block": "data.block_size",
    "data.context": "data.context_length",
    "data.time_std": "data.timestep_std",
    "eval.context": "eval.context_length",
}


@dataclass
class Model:
    """A residual backbone of `layers` mixers, `dim` wide."""

    name: str = "mingru"
    dim: int = 64
    layers: int = 3
    conv: int = 0  # size of a causal depthwise convolution before each mixer
    pointwise: bool = False  # a convolution of size 1 after that one
    mlp: float = 0  # hidden width of an MLP after each mixer, as a multiple of dim
    activation: str = "gelu"  # of the MLP; or relu, geglu
    bias: bool = False  # of LayerNorms, attention, and an MLP with gelu or relu
    dropout: float = 0
    mixer_dropout: bool = False  # also on a mixer's output
    norm: str = "rms"  # or layer
    init: str = "torch"  # or gpt2, dt
    tied: bool = False  # head and embedding share weights
    positions: bool = False  # learned, one for each place in a sequence; decision models have timesteps instead
    attention_at: int | None = None  # the layer, from 0, whose mixer is attention
    attention_heads: int | None = None  # of that layer; None: as for attention

    def __post_init__(self):
        positive(self, "model", "dim", "layers")
        between(self, "model", 0, None, "conv", "mlp")
        between(self, "model", 0, 1, "dropout")
        for name in ("expansion", "heads", "state_size", "window", "attention_heads"):
            if getattr(self, name, None) is not None:
                positive(self, "model", name)
        if hasattr(self, "gate_layers"):
            one_of(self, "model", "gate_layers", (1, 2))
            one_of(self, "model", "backend", ("auto", "cpu", "triton", "reference", "log"))
        if self.attention_at is not None:
            between(self, "model", 0, self.layers - 1, "attention_at")
        elif self.attention_heads is not None:
            raise ValueError(f"model.attention_heads: expected null without attention_at, got {self.attention_heads}")
        if hasattr(self, "forget_bias"):
            between(self, "model", None, None, "forget_bias")
        one_of(self, "model", "activation", ("gelu", "relu", "geglu"))
        one_of(self, "model", "norm", ("rms", "layer"))
        one_of(self, "model", "init", ("torch", "gpt2", "dt"))
        if not isinstance(self, MODELS.get(self.name, ())):
            raise ValueError(
                f"model.name: chosen by model=<a file of configs/<experiment>/model>, got {self.name!r} here"
            )

    @property
    def label(self) -> str:
        return self.name

    def mixer(self, length: int) -> dict[str, Any]:
        """The arguments of `minrnn.mixers.make`, for sequences of this length."""
        return {key: value for key, value in asdict(self).items() if key == "name" or key not in MODEL_KEYS}

    def backbone(self, length: int) -> dict[str, Any]:
        """The arguments of `minrnn.models.TokenModel` beside the vocabularies and the mixer."""
        settings = {key: getattr(self, key) for key in MODEL_KEYS if key != "name"}
        return settings | {"positions": length if self.positions else None}

    def classifier(self, length: int) -> dict[str, Any]:
        """The arguments of `minrnn.models.ClassifierModel` beside the vocabulary, the classes and the mixer."""
        if self.tied:
            raise ValueError("model.tied: expected false, a classifier's head has classes and no vocabulary")
        return {key: value for key, value in self.backbone(length).items() if key != "tied"}

    def decision(self) -> dict[str, Any]:
        """The arguments of `minrnn.models.DecisionModel` beside sizes, tokens and the mixer."""
        if self.positions or self.tied:
            raise ValueError(
                "model.positions, model.tied: expected false, a decision model has times and no vocabulary"
            )
        return {key: value for key, value in self.backbone(0).items() if key not in ("positions", "tied")}


MODEL_KEYS = tuple(f.name for f in fields(Model))


@dataclass
class MinGRU(Model):
    expansion: float = 6  # units of the RNN, as a multiple of dim
    signed: bool = False  # coefficients in (-1, 1)
    gate_layers: int = 1  # or 2: an MLP for the gates
    backend: str = "auto"  # of the scan; log is the paper's form


@dataclass
class MinLSTM(MinGRU):
    name: str = "minlstm"
    normalize_gates: bool = True  # False, with a forget bias of 3, is what the authors' public code does
    forget_bias: float = 0


@dataclass
class RNN(Model):
    """torch.nn.GRU or torch.nn.LSTM."""

    name: str = "gru"
    expansion: float = 1


@dataclass
class Attention(Model):
    name: str = "attention"
    heads: int | None = None  # None: one for each 64 channels, at least 4, as in nanoGPT's settings

    def mixer(self, length: int) -> dict[str, Any]:
        return super().mixer(length) | {"dropout": self.dropout, "bias": self.bias}  # on the weights too, as in nanoGPT


@dataclass
class SSM(Model):
    """An inner layer (s4, s4d, s6, hyena) in a wrapping (none, h3, mamba), as in Mamba's Table 1."""

    name: str = "ssm"
    layers: int = 2
    inner: str = "s6"
    wrapping: str = "mamba"
    state_size: int | None = None  # None: the published one, 64 for S4 and 16 for S6

    def __post_init__(self):
        super().__post_init__()
        one_of(self, "model", "inner", ("s4", "s4d", "s6", "hyena"))
        one_of(self, "model", "wrapping", ("none", "h3", "mamba"))

    @property
    def label(self) -> str:
        return self.inner if self.wrapping == "none" else f"{self.wrapping}_{self.inner}"

    def mixer(self, length: int) -> dict[str, Any]:
        return super().mixer(length) | ({"max_len": length} if self.inner == "hyena" else {})


@dataclass
class Aaren(Model):
    """Attention with a learned query, as a recurrence."""

    name: str = "aaren"
    heads: int | None = None  # as for attention


@dataclass
class QRNN(Model):
    """The recurrence of minGRU behind a short convolution, with an output gate."""

    name: str = "qrnn"
    expansion: float = 1
    window: int = 2  # of the convolution


@dataclass
class SRU(Model):
    """Gates that see the previous state through one weight per unit."""

    name: str = "sru"
    expansion: float = 1


MODELS = {
    "mingru": MinGRU, "minlstm": MinLSTM, "gru": RNN, "lstm": RNN, "attention": Attention, "aaren": Aaren, "ssm": SSM,
    "qrnn": QRNN, "sru": SRU,
}  # fmt: skip


@dataclass
class Train:
    steps: int = 400_000
    batch_size: int = 64
    learning_rate: float = 3e-4
    schedule: str = "constant"  # or cosine, to min_lr at the last step
    warmup_steps: int = 0  # linear
    min_lr: float = 0
    weight_decay: float = 0.05
    beta2: float = 0.999
    decay: str = "all"  # all parameters but the gates of minimal RNNs; or matrices: only what has two dimensions
    grad_clip: float | None = 1.0  # largest norm of the whole gradient
    precision: str = "fp32"  # or bf16, fp16 (with loss scaling), by autocast
    patience: int | None = None  # stop after this many evaluations without a new best
    target: float | None = None  # stop when validation accuracy (loss, score) is this good

    def __post_init__(self):
        positive(self, "train", "steps", "batch_size", "learning_rate")
        between(self, "train", 0, None, "warmup_steps", "min_lr", "weight_decay")
        between(self, "train", 0, 1, "beta2")
        for name in ("grad_clip", "patience"):
            if getattr(self, name) is not None:
                positive(self, "train", name)
        if self.beta2 == 1:
            raise ValueError("train.beta2: expected less than 1, got 1")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"train.min_lr: expected at most learning_rate={self.learning_rate}, got {self.min_lr}")
        one_of(self, "train", "decay", ("all", "matrices"))
        one_of(self, "train", "schedule", ("constant", "cosine"))
        one_of(self, "train", "precision", ("fp32", "bf16", "fp16"))
        if self.steps > STEPS:
            raise ValueError(f"train.steps: expected at most {STEPS}, got {self.steps}")


@dataclass
class Eval:
    interval: int = 1000  # steps
    iters: int = 200  # batches of an evaluation
    batch_size: int = 64

    def __post_init__(self):
        positive(self, "eval", "interval", "iters", "batch_size")


@dataclass
class EvalAtLengths(Eval):
    lengths: list[int] = field(default_factory=list)  # additional lengths at which the last weights are tested


@dataclass
class Wandb:
    mode: str = "offline"  # or online
    project: str = "minrnn"
    entity: str | None = None


@dataclass
class Run:
    """The settings that every experiment has. Each experiment's own schema adds `data`."""

    experiment: str = ""
    profile: str = "cpu"
    seed: int = 0
    model: Model = MISSING
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    # Nothing below changes the result.
    results_dir: str = "results"
    output_dir: str = "outputs"
    device: str = "auto"
    threads: int | None = None  # of torch on a CPU; None: all cores
    micro_batches: int = 1  # split a step's batch into this many parts, one after another, to save memory
    compile: bool = False  # torch.compile the model
    logger: str = "none"  # or wandb
    wandb: Wandb = field(default_factory=Wandb)
    progress: bool = True
    checkpoint_every: float = 60  # seconds
    budget: float | None = None  # seconds; the run then stops at a checkpoint, and the same command resumes it

    def __post_init__(self):
        one_of(self, "", "logger", ("wandb", "none"))
        one_of(self.wandb, "wandb", "mode", ("offline", "online"))
        where(self)
        between(self, "", 0, None, "checkpoint_every")
        if not 0 <= self.seed < RUNS:
            raise ValueError(f"seed: expected 0 to {RUNS - 1}, got {self.seed}")
        if self.micro_batches < 1 or self.train.batch_size % self.micro_batches:
            raise ValueError(
                f"micro_batches: expected a divisor of train.batch_size={self.train.batch_size}, "
                f"got {self.micro_batches}"
            )


@dataclass
class SelectiveCopyData:
    length: int = 4096  # of the body, which the markers follow
    tokens: int = 16  # to be copied
    vocab: int = 16  # marker, data symbols, noise

    def __post_init__(self):
        if self.vocab < 3:
            raise ValueError(f"data.vocab: expected a marker, noise and one symbol at least (3), got {self.vocab}")
        if not 1 <= self.tokens <= self.length:
            raise ValueError(f"data.tokens: expected 1 to data.length={self.length}, got {self.tokens}")


@dataclass
class SelectiveCopy(Run):
    experiment: str = "selective_copy"
    data: SelectiveCopyData = field(default_factory=SelectiveCopyData)
    eval: EvalAtLengths = field(default_factory=EvalAtLengths)

    def __post_init__(self):
        super().__post_init__()
        if min(self.eval.lengths, default=self.data.tokens) < self.data.tokens:
            raise ValueError(
                f"eval.lengths: expected data.tokens={self.data.tokens} or more each, got {self.eval.lengths}"
            )


SYNTHETIC = {  # each task and its shortest length
    "parity": 1, "even_pairs": 1, "cycle_navigation": 1, "majority": 1, "majority_count": 1, "bucket_sort": 1,
    "missing_duplicate": 1, "missing_duplicate_original": 2, "modular_arithmetic": 1,
    "s3": 1, "s5": 1, "a5": 1, "z60": 1, "associative_recall": 4, "induction_heads": 3,
}  # fmt: skip


@dataclass
class SyntheticData:
    task: str = "parity"  # see experiments/synthetic/tasks.py
    lengths: list[int] = field(default_factory=lambda: [1, 40])  # of training sequences, the shortest and the longest
    test_lengths: list[int] = field(default_factory=lambda: [40, 256])  # of validation and test
    every: bool = False  # parity of each prefix, not of the whole
    symbols: int = 10  # to sort, or the vocabulary of a recall
    pairs: int = 4  # to recall

    def __post_init__(self):
        one_of(self, "data", "task", tuple(SYNTHETIC))
        if self.every and self.task != "parity":
            raise ValueError(f"data.every: expected false, only parity has both forms; got true with {self.task}")
        positive(self, "data", "pairs")
        recall = self.task == "associative_recall"
        fewest = 2 * self.pairs + 2 if recall else 3 if self.task == "induction_heads" else 2
        if self.symbols < fewest:
            raise ValueError(f"data.symbols: expected {fewest} or more for {self.task}, got {self.symbols}")
        for name in ("lengths", "test_lengths"):
            bounds = getattr(self, name)
            if len(bounds) != 2:
                raise ValueError(f"data.{name}: expected the shortest and the longest, got {bounds}")
            self.check_lengths(f"data.{name}", bounds)

    def check_lengths(self, setting: str, lengths: list[int]) -> None:
        """Raises ValueError if sequences of these lengths cannot be drawn."""
        least = 4 * self.pairs if self.task == "associative_recall" else SYNTHETIC[self.task]
        if list(lengths) != sorted(lengths) or any(n < least for n in lengths):
            raise ValueError(f"{setting}: expected ascending numbers from {least} up for {self.task}, got {lengths}")


@dataclass
class Synthetic(Run):
    experiment: str = "synthetic"
    data: SyntheticData = field(default_factory=SyntheticData)
    eval: EvalAtLengths = field(default_factory=EvalAtLengths)

    def __post_init__(self):
        super().__post_init__()
        self.data.check_lengths("eval.lengths", self.eval.lengths)


@dataclass
class CharLMData:
    block_size: int = 256  # characters of a sequence
    text: str = "tinyshakespeare"  # or python_docs, the text of Python's help() on the language
    path: str | None = field(default=None, metadata=NO_ID)  # any UTF-8 text instead; its checksum identifies it
    sha256: str | None = None  # of the file at path; None: any

    def __post_init__(self):
        positive(self, "data", "block_size")
        one_of(self, "data", "text", TEXTS)


@dataclass
class CharLMEval(Eval):
    whole: bool = False  # select by the loss on all validation text, not on iters random batches


@dataclass
class CharLM(Run):
    experiment: str = "charlm"
    data: CharLMData = field(default_factory=CharLMData)
    eval: CharLMEval = field(default_factory=CharLMEval)


@dataclass
class DecisionData:
    dataset: str = "local/hopper-medium"  # or d4rl/..., D4RL's own file; or minari/...
    context_length: int = 20  # steps of a training window, Decision Transformer's K
    tokens: int = 3  # per step: return-to-go, state, action one after another; or 1, all joined, as in Decision S4
    padding: str = "right"  # no model sees it; or left, which runs through a recurrence, as in Decision Mamba's code
    timestep_std: float = 1.0  # timestep embeddings start from N(0, timestep_std)

    def __post_init__(self):
        positive(self, "data", "context_length", "timestep_std")
        one_of(self, "data", "tokens", (1, 3))
        one_of(self, "data", "padding", ("right", "left"))


@dataclass
class DecisionEval:
    interval: int = 10_000  # steps
    episodes: int = 100  # per evaluation, all with the same target return
    context_length: int | None = 20  # steps that the policy sees; None: all, through a recurrent state

    def __post_init__(self):
        positive(self, "eval", "interval", "episodes")
        if self.context_length is not None:
            positive(self, "eval", "context_length")


@dataclass
class Decision(Run):
    experiment: str = "decision"
    data: DecisionData = field(default_factory=DecisionData)
    eval: DecisionEval = field(default_factory=DecisionEval)


@dataclass
class LRAData:
    """The sizes apply to generated data, ListOps and local/pydoc_pairs; files have their own."""

    task: str = "listops"  # or image, retrieval
    dataset: str | None = None  # Long Range Arena's own: ListOps by its rule, CIFAR-10, AAN; or local/digits (image),
    # local/pydoc_pairs (retrieval)
    length: int = 2000  # retrieval: bytes of a document, at most; ListOps: fewer tokens than this
    min_length: int = 500  # ListOps: and more than this
    depth: int = 10  # of a ListOps expression, at most
    arguments: int = 10  # of a ListOps operator, at most
    train_size: int = 96_000
    eval_size: int = 2_000  # of validation, and of test

    def __post_init__(self):
        one_of(self, "data", "task", (*LRA_DATASETS,))
        one_of(self, "data", "dataset", LRA_DATASETS[self.task])
        positive(self, "data", "length", "train_size", "eval_size")
        between(self, "data", 0, None, "min_length")
        between(self, "data", 2, 100, "arguments", "depth")
        if self.task == "listops":
            longest = 1
            for _ in range(self.depth - 1):
                longest = 2 + self.arguments * longest
            if max(self.min_length + 1, 4) > min(self.length - 1, longest):
                raise ValueError(
                    "data.min_length, data.length: expected a number of tokens between them from 4 to "
                    f"{longest if longest < 10**9 else 'a billion'}, the longest expression of "
                    f"data.depth={self.depth} and data.arguments={self.arguments}, "
                    f"got {self.min_length} and {self.length}"
                )


@dataclass
class LRAEval:
    """An evaluation covers all validation or test examples."""

    interval: int = 1000  # steps
    batch_size: int = 64

    def __post_init__(self):
        positive(self, "eval", "interval", "batch_size")


@dataclass
class LRA(Run):
    experiment: str = "lra"
    data: LRAData = field(default_factory=LRAData)
    eval: LRAEval = field(default_factory=LRAEval)


LAYER_TASKS = ("train", "forward", "context", "step")
MODEL_TASKS = ("copying", "language", "policy")
TASKS = (*LAYER_TASKS, "parameters", "kernels", "precision", *MODEL_TASKS)
DTYPES = ("float32", "bfloat16", "float16", "half")


@dataclass
class EfficiencyData:
    """What is measured: every layer at every length, batch size and width, and how long.

    Tasks: `train` is forward, loss and backward; `forward` is the forward pass alone; `context` reads a sequence and
    then one more token; `step` reads one token after `length` others; `parameters` counts parameters. `kernels` times
    the scans alone, `precision` measures their error; `copying` and `language` are training steps of whole models;
    `policy` is a decision model in use.
    """

    part: str = "train"  # its name, chosen by part=<a file of configs/efficiency/part>
    task: str = "train"
    lengths: list[int] = field(default_factory=lambda: [2**i for i in range(6, 17)])
    batch_sizes: list[int] = field(default_factory=lambda: [64])
    widths: list[int] = field(default_factory=lambda: [128])
    shapes: list[list[int]] | None = None  # [batch, length, width], for layers optionally the input's width too; None:
    # all combinations of the three lists above
    dtype: str = "float32"  # or bfloat16, float16; half: bfloat16, and float16 on a GPU older than sm_80
    dtypes: list[str] | None = None  # several, one after another, instead of dtype
    memory: bool = False  # measure peak memory too; on a CPU, each layer in a process of its own
    layers: list[str] | None = None  # None: all that are installed
    limit: float = 10.0  # seconds: a longer run is recorded as a time-out, and longer sequences are skipped
    seconds: float = 1.0  # at most, for a layer at a point, but at least `least` runs
    least: int = 5
    spread: float = 0.03  # a point is done once its interquartile range over the median is below this
    machine: str | None = None  # None: detected, with its instruction set; a measurement belongs to one machine

    def __post_init__(self):
        one_of(self, "data", "task", TASKS)
        one_of(self, "data", "dtype", DTYPES)
        for name in self.dtypes or ():
            if name not in DTYPES:
                raise ValueError(f"data.dtypes: expected some of {DTYPES}, got {name!r}")
        if self.task in MODEL_TASKS and (self.dtypes or [self.dtype]) != ["float32"]:
            raise ValueError(f"data.dtype: task {self.task} is measured in float32, got {self.dtypes or self.dtype}")
        if self.task not in LAYER_TASKS and self.layers is not None:
            raise ValueError(f"data.layers: task {self.task} has none to choose, got {self.layers}")
        if self.task == "policy" and (self.shapes or len(self.widths) > 1 or len(self.batch_sizes) > 1):
            raise ValueError("data: task policy is measured at one width and one batch size, against the length")
        for shape in self.shapes or ():
            if len(shape) not in ((3, 4) if self.task == "train" else (3,)) or min(shape) < 1:
                raise ValueError(f"data.shapes: expected each as [batch, length, width] from 1 up, got {shape}")
        positive(self, "data", "limit", "seconds", "least")
        for name in ("lengths", "batch_sizes", "widths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"data.{name}: expected numbers from 1 up, got {getattr(self, name)}")
        if self.task == "context" and min(self.lengths) < 2:
            raise ValueError(f"data.lengths: a context has 2 tokens at least, got {min(self.lengths)}")


@dataclass
class Efficiency:
    """The settings of a measurement. It trains nothing, so it shares with Run only where and how it is run."""

    experiment: str = "efficiency"
    profile: str = "cpu"
    seed: int = 0  # of weights and inputs
    data: EfficiencyData = field(default_factory=EfficiencyData)
    results_dir: str = "results"
    output_dir: str = "outputs"
    device: str = "auto"
    threads: int | None = None
    progress: bool = True
    budget: float | None = None  # seconds from the start of the process; a sweep shares them

    def __post_init__(self):
        where(self)


EXPERIMENTS = {
    "selective_copy": SelectiveCopy, "charlm": CharLM, "decision": Decision, "synthetic": Synthetic,
    "lra": LRA, "efficiency": Efficiency,
}  # fmt: skip


@cache
def register() -> None:
    """Makes the schemas known to Hydra, as `schema` of each experiment and of each model."""
    store = ConfigStore.instance()
    for name, node in EXPERIMENTS.items():
        store.store(group="schema", name=name, node=node, package="_global_")
    for name, node in MODELS.items():
        store.store(group="schema/model", name=name, node=node(name=name), package="model")


def typed(config: dict[str, Any]) -> Run:
    """A record's configuration as the object that a runner takes. Settings added since then have their defaults."""
    found = EXPERIMENTS[config["experiment"]]()
    parts: dict[str, Any] = {"model": MODELS[config["model"]["name"]](**config["model"]), "wandb": Wandb()}
    for section in ("data", "train", "eval"):
        parts[section] = type(getattr(found, section))(**config[section])
    return type(found)(**(config | parts))


THREADS = 1024  # more than any machine has; torch's pool crashes with a hundred thousand


def where(config: Any) -> None:
    """Checks the settings that say where and how a run is done."""
    for name in ("results_dir", "output_dir"):
        if not str(getattr(config, name)).strip():
            raise ValueError(f"{name}: expected a folder, got nothing; . is this one")
    if config.threads is not None and not 1 <= config.threads <= THREADS:
        raise ValueError(f"threads: expected 1 to {THREADS}, got {config.threads}")
    if config.budget is not None and not 0 <= config.budget < math.inf:
        raise ValueError(f"budget: expected seconds from 0 up, got {config.budget}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", config.device):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:<number>, got {config.device!r}")


def between(config: Any, section: str, low: float | None, high: float | None, *names: str) -> None:
    """Checks that the named settings are finite and lie from low to high where these are given."""
    for name in names:
        value = getattr(config, name)
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            expected = "a finite number"
            if low is not None:
                expected = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"{f'{section}.{name}'.strip('.')}: expected {expected}, got {value}")


def positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{section}.{name}: expected more than 0, got {getattr(config, name)}")


def one_of(config: Any, section: str, name: str, values: tuple[Any, ...]) -> None:
    value = getattr(config, name)
    if value not in values:
        near = f"; the nearest is {nearest(str(value), map(str, values))}" if value else ""
        raise ValueError(f"{f'{section}.{name}'.strip('.')}: expected one of {values}, got {value!r}{near}")


def run_id(config: dict[str, Any]) -> str:
    """Twelve hex digits that name a run: a hash of its experiment, its seed and every setting that is not the default.

    Defaults are left out so that a setting added later, off by default, leaves the ids of earlier runs as they are.
    """
    identity = {"experiment": config["experiment"], "seed": config["seed"]}
    defaults = EXPERIMENTS[config["experiment"]]()
    for section in set(SECTIONS) & set(config):
        default = MODELS[config["model"]["name"]]() if section == "model" else getattr(defaults, section)
        places = {f.name for f in fields(default) if f.metadata == NO_ID}
        identity[section] = {
            k: _plain(v)
            for k, v in config[section].items()
            if k == "name" or (k not in places and _plain(v) != _plain(getattr(default, k)))
        }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def group_id(config: dict[str, Any]) -> str:
    """An id that all seeds of a run share."""
    return run_id({**config, "seed": None})


def _plain(value: Any) -> Any:
    """The value in the form that is hashed: 6 and 6.0 are one setting, 1 and true are not."""
    if isinstance(value, bool):
        return str(value)
    return float(value) if isinstance(value, int) else value
