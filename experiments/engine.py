"""Does a run from its configuration to its record: claim, train, evaluate, checkpoint, resume, for every experiment.

A step depends only on the configuration, the seed and its number, so that a resumed run ends with the same numbers as
an uninterrupted one (bit for bit on a CPU with the same number of threads).
"""

import contextlib
import copy
import dataclasses
import math
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minrnn.models import parameter_groups

from . import checkpoints, files, machine, processes, records, tracking
from .config import Run, Train, run_id
from .seeds import noise_seed

PACKAGES = ("numpy", "triton", "numba", "mamba-ssm", "gymnasium", "mujoco")
DATA_FACTS = ("dataset_sha256", "vocabulary", "characters")  # of a task's facts
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Task:
    """The parts that an experiment supplies.

    Attributes:
        model: on the device, initialised.
        batch: from a step's number to its whole batch, tensors on the device with the batch as first dimension.
        loss: from the model (perhaps wrapped) and a part of a batch to the mean loss over that part.
        evaluate: from the model and "val" or "test" to finite numbers by name.
        evaluate_last: as `evaluate`; additional "test" numbers for the last weights only.
        tokens: the number of tokens in one step.
        select: the "val" number that chooses the best step; larger is better with `maximize`.
        facts: other entries of the record, for instance about the data.
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
    """Settings from which no model or task can be made."""


class Diverged(Exception):
    """The loss is no longer a finite number. The second argument is the run's state."""


class Paused(Exception):
    """The run stopped at a checkpoint; the same command resumes it. Arguments: a text and the outcome."""


def execute(cfg: Run, build: Callable[[Run, torch.device], Task]) -> str:
    """Does the run unless it is done, writes its record, and returns the outcome.

    It is "done" or "diverged" (there is a record), "paused" (out of budget), "stopped" (by a signal) or "busy" (another
    process has the run). An exception is recorded as "failed" and raised.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = run_id(dataclasses.asdict(cfg))
    path = records.record_path(cfg.results_dir, cfg.experiment, name)
    device = processes.device_of(cfg)
    if (outcome := _final(path)) and world == 1:  # first, as it serves a read-only folder too
        _say(rank, f"{cfg.experiment} {name}: {outcome} already, see {path}")
        return outcome
    with (
        files.claim(path.parent) if rank == 0 else contextlib.nullcontext() as mine,
        processes.group(cfg, device, world),
    ):
        outcome = processes.from_first(_final(path) or (None if mine else "busy"), world)
        if outcome == "busy":
            _say(rank, f"{cfg.experiment} {name}: another process is at it (it holds {path.parent / '.lock'})")
        elif outcome is not None:
            _say(rank, f"{cfg.experiment} {name}: {outcome} already, see {path}")
        return outcome or _run(cfg, name, path, device, rank, world, build)


def _final(path: Path) -> str | None:
    """The status of a final record, else None."""
    found = records.read_record(path)
    return found["status"] if records.is_final(found) else None


def _run(cfg: Run, name: str, path: Path, device: torch.device, rank: int, world: int, build) -> str:
    products = machine.fast_products() if device.type == "cpu" else "torch"
    record = records.header(dataclasses.asdict(cfg), **machine.made_with(device.type, *PACKAGES))
    record["hardware"] |= {"processes": world, "products": products}
    folder = records.work_dir(cfg.output_dir, cfg.experiment, name)
    try:
        machine.keep_freed_memory()
        torch.manual_seed(noise_seed(cfg.seed, 0))
        try:
            task = build(cfg, device)
        except files.Refusal:
            raise
        except ValueError as error:  # incompatible settings
            raise SettingError(error) from error
        record |= {"facts": task.facts} if task.facts else {}
        state = _Training(cfg, task, name, folder, device, rank, world).run()
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
    """The state in a checkpoint beside model and optimiser."""

    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0  # without evaluation and checkpoints
    tokens: int = 0
    loss_sum: float = 0.0  # since the curve's last point, at step loss_since
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
        """Updates the parameters and returns the mean loss over the parts, of which there are micro_batches.

        Args:
            number: of the step, from 0; the learning rate follows from it.
            loss: from the model and a part to the mean loss over the part.
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


class _Training:
    """A run's steps, evaluations and checkpoints, from wherever its last checkpoint left it."""

    def __init__(self, cfg: Run, task: Task, name: str, folder: Path, device: torch.device, rank: int, world: int):
        self.cfg, self.task, self.folder, self.device, self.rank, self.world = cfg, task, folder, device, rank, world
        self.trainer = Trainer(task.model, cfg.train, cfg.micro_batches, cfg.compile, world)
        self.state = _State(parameters=sum(p.numel() for p in task.model.parameters()))
        self.best_weights: dict[str, Tensor] | None = None
        # Data facts guard against a run that resumes on another file of the same name.
        self.belongs_to = {"run_id": name} | {key: task.facts[key] for key in DATA_FACTS if key in task.facts}
        self._resume()
        self.log = tracking.start(cfg, name) if rank == 0 else tracking.Tracker()
        self.progress = _Progress(cfg, folder, self.state.step, rank)

    def _resume(self) -> None:
        if self.rank == 0:
            checkpoints.clean(self.folder)
        processes.from_first(None, self.world)  # the others look for checkpoints only now
        saved = checkpoints.load(self.folder, self.device, self.belongs_to, self.cfg.train.steps)
        if saved is not None:
            self.trainer.load_state_dict(saved)
            self.state, self.best_weights = _State(**saved["state"]), saved["best_weights"]

    def run(self) -> _State:
        """Trains to the end and returns the state. Raises Paused and Diverged."""
        with processes.stop_signals() as stop, self.log, contextlib.closing(self.progress.bar):
            self._steps(stop)
            self._save(needed=False)
            self._test()
            self.state.seconds = time.monotonic() - self.began
            self.log.finish(self.state.last, self.state.best)
        return self.state

    def _steps(self, stop: Any) -> None:
        cfg, state, train, steps = self.cfg, self.state, self.cfg.train, self.cfg.train.steps
        log_every = max(1, min(50, steps // 200))
        batch = train.batch_size // (cfg.micro_batches * self.world)
        deadline = math.inf if cfg.budget is None else time.monotonic() + cfg.budget
        self.began, clock = time.monotonic() - state.seconds, time.perf_counter()
        saved_at, total = time.monotonic(), torch.full((), state.loss_sum, device=self.device)
        self.task.model.train()
        while state.step < steps and not self._enough():
            torch.manual_seed(noise_seed(cfg.seed, state.step, self.rank))
            parts = [part.split(batch)[self.rank :: self.world] for part in self.task.batch(state.step)]
            total += self.trainer.step(state.step, self.task.loss, zip(*parts, strict=True))
            state.step += 1
            state.tokens += self.task.tokens

            evaluating = state.step % cfg.eval.interval == 0 or state.step == steps
            logging = evaluating or state.step % log_every == 0
            over = stop.is_set or time.monotonic() > deadline
            if not logging and (self.world > 1 or not over):
                continue
            # Only from here on does the host wait for the device.
            state.seconds = time.monotonic() - self.began
            state.train_seconds += time.perf_counter() - clock
            if logging:
                self._log(processes.mean(total, self.world), evaluating)
                total.zero_()
            due = time.monotonic() - saved_at > cfg.checkpoint_every
            over, due = processes.from_first((over, due), self.world)
            if over or due:
                state.loss_sum = total.item()
                self._save(needed=over)
                saved_at = time.monotonic()
            if over and state.step < steps:
                text = "told to stop" if stop.is_set else "out of budget"
                raise Paused(f"{text} at step {state.step} of {steps}", "stopped" if stop.is_set else "paused")
            clock = time.perf_counter()

    def _enough(self) -> bool:
        """Whether patience has run out or the target is reached."""
        train, best = self.cfg.train, self.state.best.get(f"val_{self.task.select}")
        if train.patience and self.state.since_best >= train.patience:
            return True
        if train.target is None or best is None:
            return False
        return best >= train.target if self.task.maximize else best <= train.target

    def _log(self, loss_sum: float, evaluating: bool) -> None:
        """Logs the loss since the last call, and an evaluation, which may be a new best."""
        state = self.state
        values = {"train_loss": loss_sum / (state.step - state.loss_since)}
        state.loss_since = state.step
        if evaluating:
            values |= self._evaluate("val", self.task.evaluate)
        self._check(values)
        if evaluating:
            state.last = {"step": state.step} | {k: v for k, v in values.items() if k != "train_loss"}
            value, best = (v.get(f"val_{self.task.select}") for v in (values, state.best))
            state.since_best += 1
            if best is None or (value > best if self.task.maximize else value < best):
                state.best, state.since_best = dict(state.last), 0
                self.best_weights = copy.deepcopy(self.task.model.state_dict())
        state.add(values)
        rate = self.trainer.optimizer.param_groups[0]["lr"]
        self.log.log(state.step, values | {"learning_rate": rate, "tokens": state.tokens})
        self.progress.show(state.step, values)

    def _test(self) -> None:
        """Tests the last and the best weights."""
        state, model = self.state, self.task.model
        values = self._evaluate("test", self.task.evaluate)
        state.last |= values | self._evaluate("test", self.task.evaluate_last)
        self._check(state.last)
        if state.best["step"] != state.last["step"]:
            weights = copy.deepcopy(model.state_dict())
            model.load_state_dict(self.best_weights)
            values = self._evaluate("test", self.task.evaluate)
            model.load_state_dict(weights)
        state.best |= values
        self._check(state.best)

    def _evaluate(self, split: str, function: Callable) -> dict[str, float]:
        """The numbers of an evaluation, done by the first process for all."""
        values = {}
        if self.rank == 0:
            self.task.model.eval()
            with torch.inference_mode(), self.trainer.autocast():
                values = {f"{split}_{key}": float(value) for key, value in function(self.task.model, split).items()}
            self.task.model.train()
        return processes.from_first(values, self.world)

    def _check(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            if not math.isfinite(value):
                raise Diverged(f"{key} was {value} at step {self.state.step}", self.state)

    def _save(self, needed: bool) -> None:
        """Saves a checkpoint. A failure, as with a full disk, ends the run only if the checkpoint is needed."""
        if self.rank > 0:
            return
        parts = {"state": dataclasses.asdict(self.state), "best_weights": self.best_weights}
        try:
            checkpoints.save(self.folder, self.state.step, self.trainer.state_dict() | parts, self.belongs_to)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            if needed:
                raise
            text = f"{self.folder}: no checkpoint at step {self.state.step} ({error}); the run goes on"
            warnings.warn(text, stacklevel=2)


def lr_factor(train: Any, step: int) -> float:
    """The factor of the learning rate: linear warm-up, then constant or a cosine down to min_lr at the last step."""
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    low = train.min_lr / train.learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


class _Progress:
    """Shows a progress bar, and writes progress.json for the planner."""

    def __init__(self, cfg: Run, folder: Path, step: int, rank: int):
        self.steps, self.path, self.rank = cfg.train.steps, folder / "progress.json", rank
        self.bar = tqdm(
            total=cfg.train.steps, initial=step, desc=f"{cfg.model.label} seed {cfg.seed}", unit="step",
            disable=not cfg.progress or rank > 0, dynamic_ncols=True,
        )  # fmt: skip
        self.first, self.began, self.shown, self.written = step, time.monotonic(), {}, 0.0

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
        with contextlib.suppress(OSError):  # the run does not need the file, so a full disk is no error
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
