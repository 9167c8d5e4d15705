"""One run from its configuration to its record: claim, train, evaluate, checkpoint, resume. Every experiment uses it.

Everything that a step depends on is its configuration, its seed and its number, so that a run that was killed ends
with the numbers of one that was not (bit for bit on a CPU with the same number of threads).
"""

import contextlib
import copy
import dataclasses
import gc
import math
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minrnn.models import parameter_groups

from . import checkpoints, files, machine, records, tracking
from .config import Run, Train, run_id
from .seeds import noise_seed

DATA_FACTS = ("dataset_sha256", "vocabulary", "characters")  # of a task's facts
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Task:
    """What an experiment brings.

    Attributes:
        model: on the device, initialised.
        batch: of a step, all its sequences, on the device: tensors with the batch as first dimension.
        loss: of the model (perhaps wrapped) and a part of such a batch; the mean over what it holds.
        evaluate: of the model and "val" or "test"; finite numbers by name.
        evaluate_last: what "test" says beside these of the last weights alone.
        tokens: of one step.
        select: the number of "val" by which the best step is chosen, the larger the better with `maximize`.
        facts: what else the record is to say, of the data for instance.
    """

    model: nn.Module
    batch: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    evaluate: Callable[[nn.Module, str], dict[str, float]]
    tokens: int
    select: str = "accuracy"
    maximize: bool = True
    evaluate_last: Callable[[nn.Module, str], dict[str, float]] = lambda model, split: {}
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class SettingError(files.Refusal, ValueError):
    """Settings of which no model or task can be made."""


class Diverged(Exception):
    """The loss is no longer a finite number. The second argument is the run's state."""


class Paused(Exception):
    """The run is at a checkpoint, and the same command goes on from there. Arguments: a text, and its outcome."""


def execute(cfg: Run, build: Callable[[Run, torch.device], Task]) -> str:
    """Does the run unless it is done, and writes its record.

    Returns "done" or "diverged" (there is a record), "paused" (out of budget), "stopped" (told to) or "busy" (another
    process has it). An exception is recorded as "failed", and raised.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = run_id(dataclasses.asdict(cfg))
    path = records.record_path(cfg.results_dir, cfg.experiment, name)
    device = device_of(cfg)
    if (outcome := _final(path)) and world == 1:  # of a folder that cannot be written too
        _say(rank, f"{cfg.experiment} {name}: {outcome} already, see {path}")
        return outcome
    with files.claim(path.parent) if rank == 0 else contextlib.nullcontext() as mine, _processes(cfg, device, world):
        outcome = _from_first(_final(path) or (None if mine else "busy"), world)
        if outcome == "busy":
            _say(rank, f"{cfg.experiment} {name}: another process is at it (it holds {path.parent / '.lock'})")
        elif outcome is not None:
            _say(rank, f"{cfg.experiment} {name}: {outcome} already, see {path}")
        return outcome or _run(cfg, name, path, device, rank, world, build)


def _final(path: Path) -> str | None:
    """The status of a record of which nothing is left to do."""
    found = records.read_record(path)
    return found["status"] if records.is_final(found) else None


def _run(cfg: Run, name: str, path: Path, device: torch.device, rank: int, world: int, build) -> str:
    products = machine.fast_products() if device.type == "cpu" else "torch"
    record = {
        "schema_version": records.SCHEMA_VERSION,
        "run_id": name,
        "experiment": cfg.experiment,
        "profile": cfg.profile,
        "config": dataclasses.asdict(cfg),
        "seed": cfg.seed,
        "git": machine.commit("minrnn", "experiments", "configs"),
        "versions": machine.versions("numpy", "triton", "numba", "mamba-ssm", "gymnasium", "mujoco"),
        "hardware": machine.hardware(device.type) | {"processes": world, "products": products},
        "started": time.time(),
    }
    folder = records.work_dir(cfg.output_dir, cfg.experiment, name)
    try:
        machine.keep_freed_memory()
        torch.manual_seed(noise_seed(cfg.seed, 0))
        try:
            task = build(cfg, device)
        except files.Refusal:
            raise
        except ValueError as error:  # settings that do not go together
            raise SettingError(error) from error
        record |= {"facts": task.facts} if task.facts else {}
        state = _train(cfg, task, name, folder, device, rank, world)
        outcome = {"status": "done", "reason": None, "metrics": {"last": state.last, "best": state.best}}
    except Paused as stop:
        text, outcome = stop.args
        _say(rank, f"{cfg.experiment} {name}: {text}; the same command goes on from there")
        return outcome
    except Diverged as reason:
        text, state = reason.args
        outcome = {"status": "diverged", "reason": text, "metrics": {}}
    except files.Refusal:
        raise
    except Exception as error:
        reason = "".join(traceback.format_exception_only(error)).strip()
        if rank == 0:
            failed = {"status": "failed", "reason": reason, "metrics": {}, "ended": time.time()}
            records.write_json(path, record | failed)
        raise
    record |= outcome | {
        "curves": {key: records.thin(points) for key, points in state.curves.items()},
        "steps": state.step,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.train_seconds if state.train_seconds else None,
        "peak_memory": machine.peak_memory(device.type),
        "parameters": state.parameters,
        "ended": time.time(),
    }
    if rank == 0:
        records.write_json(path, record)
    _say(rank, f"{cfg.experiment} {name}: {_summary(record)}, see {path}")
    return record["status"]


@dataclasses.dataclass
class _State:
    """What a checkpoint holds beside model and optimiser."""

    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0  # less evaluation and checkpoints
    tokens: int = 0
    loss_sum: float = 0.0  # since the last point of the curve, which was at
    loss_since: int = 0
    parameters: int = 0
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    since_best: int = 0  # evaluations
    curves: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.curves.setdefault(key, []).append([self.step, round(self.seconds, 2), value])


class Trainer:
    """One training step: forward, loss and backward of each part of a batch, clipping, AdamW.

    Args:
        model: on its device.
        train: the settings.
        micro_batches: parts of a step's batch, one after another.
        compile: whether the model is compiled.
        world: processes that share a batch.
    """

    def __init__(self, model: nn.Module, train: Train, micro_batches: int = 1, compile: bool = False, world: int = 1):
        self.raw, self.train, self.micro_batches, self.world = model, train, micro_batches, world
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, train.learning_rate, train.weight_decay, train.decay),
            betas=(0.9, train.beta2),
            fused=True,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.model = torch.compile(model) if compile else model
        if world > 1:
            self.model = DistributedDataParallel(self.model)

    def step(self, number: int, loss: Callable[[nn.Module, Any], Tensor], parts: Iterable[Any]) -> Tensor:
        """The mean loss over the parts, which are micro_batches many; the parameters change.

        Args:
            number: of the step, from 0; the learning rate follows from it.
            loss: of the model and a part.
        """
        factor = lr_factor(self.train, number)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            wait = self.world > 1 and i + 1 < self.micro_batches
            with self.model.no_sync() if wait else contextlib.nullcontext():
                with self.autocast():
                    value = loss(self.model, part) / self.micro_batches
                self.scaler.scale(value).backward()
            total += value.detach()
        if self.train.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.raw.parameters(), self.train.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def autocast(self) -> torch.autocast:
        precision = PRECISIONS[self.train.precision]
        return torch.autocast(self.device.type, precision, enabled=precision is not None)

    def state_dict(self) -> dict[str, Any]:
        parts = {"model": self.raw, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.raw.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])


def _train(cfg: Run, task: Task, name: str, folder: Path, device: torch.device, rank: int, world: int) -> _State:
    raw, train, steps = task.model, cfg.train, cfg.train.steps
    trainer = Trainer(raw, train, cfg.micro_batches, cfg.compile, world)

    state, best_weights = _State(parameters=sum(p.numel() for p in raw.parameters())), None
    if rank == 0:
        checkpoints.clean(folder)
    _from_first(None, world)  # the others look only now
    # The data too: with another file under the same name a record would name one and be trained on both.
    belongs_to = {"run_id": name} | {key: task.facts[key] for key in DATA_FACTS if key in task.facts}
    saved = checkpoints.load(folder, device, belongs_to, steps)
    if saved is not None:
        trainer.load_state_dict(saved)
        state, best_weights = _State(**saved["state"]), saved["best_weights"]
    del saved

    def save(needed: bool) -> None:
        """Where none is needed, a disk that is full for a while ends no run."""
        if rank == 0:
            parts = {"state": dataclasses.asdict(state), "best_weights": best_weights}
            try:
                checkpoints.save(folder, state.step, trainer.state_dict() | parts, belongs_to)
            except (OSError, RuntimeError) as error:  # torch's writer has RuntimeError for a full disk
                if needed:
                    raise
                warnings.warn(f"{folder}: no checkpoint at step {state.step} ({error}); the run goes on", stacklevel=2)

    def evaluate(split: str, function: Callable = task.evaluate) -> dict[str, float]:
        """On the first process, for all."""
        values = {}
        if rank == 0:
            raw.eval()
            with torch.inference_mode(), trainer.autocast():
                values = {f"{split}_{key}": float(value) for key, value in function(raw, split).items()}
            raw.train()
        return _from_first(values, world)

    def check(values: dict[str, float]) -> None:
        for key, value in values.items():
            if not math.isfinite(value):
                raise Diverged(f"{key} was {value} at step {state.step}", state)

    log_every = max(1, min(50, steps // 200))
    batch = train.batch_size // (cfg.micro_batches * world)
    log = tracking.start(cfg, name) if rank == 0 else tracking.Tracker()
    progress = _Progress(cfg, folder, state.step, rank)
    deadline = math.inf if cfg.budget is None else time.monotonic() + cfg.budget
    began, clock = time.monotonic() - state.seconds, time.perf_counter()
    saved_at, total = time.monotonic(), torch.full((), state.loss_sum, device=device)
    raw.train()
    with stop_signals() as stop, log, progress:
        while state.step < steps and not (train.patience and state.since_best >= train.patience):
            torch.manual_seed(noise_seed(cfg.seed, state.step, rank))
            parts = [part.split(batch)[rank::world] for part in task.batch(state.step)]
            total += trainer.step(state.step, task.loss, zip(*parts, strict=True))
            state.step += 1
            state.tokens += task.tokens

            evaluating = state.step % cfg.eval.interval == 0 or state.step == steps
            logging = evaluating or state.step % log_every == 0
            over = stop.is_set or time.monotonic() > deadline
            if not logging and (world > 1 or not over):
                continue
            # From here on the host waits for the device.
            state.seconds = time.monotonic() - began
            state.train_seconds += time.perf_counter() - clock
            if logging:
                mean = _mean(total, world) / (state.step - state.loss_since)
                total.zero_()
                state.loss_since = state.step
                values = {"train_loss": mean} | (evaluate("val") if evaluating else {})
                check(values)
                if evaluating:
                    state.last = {"step": state.step} | {k: v for k, v in values.items() if k != "train_loss"}
                    value, best = (v.get(f"val_{task.select}") for v in (values, state.best))
                    state.since_best += 1
                    if best is None or (value > best if task.maximize else value < best):
                        state.best, state.since_best = dict(state.last), 0
                        best_weights = copy.deepcopy(raw.state_dict())
                state.add(values)
                log.log(
                    state.step,
                    values | {"learning_rate": trainer.optimizer.param_groups[0]["lr"], "tokens": state.tokens},
                )
                progress.show(state.step, values)
            over, due = _from_first((over, time.monotonic() - saved_at > cfg.checkpoint_every), world)
            if over or due:
                state.loss_sum = total.item()
                save(needed=over)
                saved_at = time.monotonic()
            if over and state.step < steps:
                text = "told to stop" if stop.is_set else "out of budget"
                outcome = "stopped" if stop.is_set else "paused"
                raise Paused(f"{text} at step {state.step} of {steps}", outcome)
            clock = time.perf_counter()
        save(needed=False)
        values = evaluate("test")
        state.last |= values | evaluate("test", task.evaluate_last)
        check(state.last)
        if state.best["step"] != state.last["step"]:
            weights = copy.deepcopy(raw.state_dict())
            raw.load_state_dict(best_weights)
            values = evaluate("test")
            raw.load_state_dict(weights)
        state.best |= values
        check(state.best)
        state.seconds = time.monotonic() - began
        log.finish(state.last, state.best)
    return state


def lr_factor(train: Any, step: int) -> float:
    """Of the learning rate at a step: linear warm-up, then constant or a cosine down to min_lr at the last step."""
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    low = train.min_lr / train.learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def device_of(cfg: Run) -> torch.device:
    """This process's, set as the current one; and the number of threads."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected one that is here, got {cfg.device!r} without a CUDA GPU")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    return device


@contextlib.contextmanager
def _processes(cfg: Run, device: torch.device, world: int) -> Iterator[None]:
    """The group of processes that torchrun started."""
    if world == 1:
        yield
        return
    if cfg.train.batch_size % (cfg.micro_batches * world):
        raise ValueError(
            f"train.batch_size: expected a multiple of micro_batches={cfg.micro_batches} times {world} processes, "
            f"got {cfg.train.batch_size}"
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        # What still refers to the group, such as DistributedDataParallel in a cycle, would else be freed after the
        # interpreter, where gloo's threads abort the process.
        gc.collect()
        dist.destroy_process_group()


def _from_first(value: Any, world: int) -> Any:
    """The first process's value, in all of them."""
    if world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _mean(total: Tensor, world: int) -> float:
    """Over the processes."""
    if world > 1:
        dist.all_reduce(total)
    return total.item() / world


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """SIGTERM and SIGINT ask for a stop at the next checkpoint; a second SIGINT stops at once."""

    class Stop:
        is_set = False

    def ask(number, frame):
        if Stop.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        Stop.is_set = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone may set handlers
        yield Stop
        return
    try:
        yield Stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A bar for a person, and progress.json for a planner."""

    def __init__(self, cfg: Run, folder: Path, step: int, rank: int):
        self.steps, self.path, self.rank = cfg.train.steps, folder / "progress.json", rank
        self.bar = tqdm(
            total=cfg.train.steps, initial=step, desc=f"{cfg.model.label} seed {cfg.seed}", unit="step",
            disable=not cfg.progress or rank > 0, dynamic_ncols=True,
        )  # fmt: skip
        self.first, self.began, self.shown, self.written = step, time.monotonic(), {}, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def show(self, step: int, values: dict[str, float]) -> None:
        self.shown |= values
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in self.shown.items()}, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if self.rank > 0 or (now - self.written < 2 and step < self.steps):
            return
        self.written, speed = now, (step - self.first) / (now - self.began)
        left = {"steps_per_second": speed, "seconds_left": (self.steps - step) / speed if speed else None}
        progress = {"step": step, "steps": self.steps, "loss": self.shown["train_loss"]}
        with contextlib.suppress(OSError):  # of a disk that is full: the run does not need it
            records.write_json(self.path, progress | left)


def _say(rank: int, text: str) -> None:
    if rank == 0:
        tqdm.write(text)


def _summary(record: dict[str, Any]) -> str:
    if record["status"] != "done":
        return f"{record['status']}, {record['reason']}"
    last = ", ".join(
        f"{k} {v:.4f}" for k, v in record["metrics"]["last"].items() if k.startswith("test_") and "_at_" not in k
    )
    return f"done in {record['seconds']:.0f} s, {last}"
