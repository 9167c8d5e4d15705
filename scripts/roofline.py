"""The least time of every training run of the grid, beside what was measured: `python -m scripts.roofline`

    python -m scripts.roofline --profile paper      results/tables/roofline_paper.{md,csv}

A run's work is counted from its configuration (`experiments.cost`), without its data and without computing anything.
Limits are those of a T4's datasheet and those of this machine, measured here.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from experiments import charlm, decision, grid, machine, selective_copy
from experiments.config import CharLM, Decision, Run, SelectiveCopy, group_id, typed
from experiments.cost import T4, Cost, Machine, count, here, total
from experiments.decision.data import ENVIRONMENTS, split_name
from experiments.engine import Trainer
from experiments.launch import command
from scripts.draw.cells import load, machines
from scripts.draw.grids import as_csv, as_markdown, number
from scripts.draw.pages import write
from scripts.planner.agenda import cores, has_gpu

CHARACTERS, VALIDATION = 65, 111_540  # of Tiny Shakespeare: kinds, and how many validate
COLUMNS = (
    *("runs", "groups", "machine", "bandwidth", "matrix_rate", "launch", "steps", "operators", "operations", "bytes"),
    *("step_seconds", "evaluation_seconds", "total_seconds", "measured_step_seconds", "n", "measured_on", "run_ids"),
)

Batch = tuple[Any, ...]
Work = tuple[nn.Module, Callable, Batch, list[tuple[int, Batch]]]  # model, loss, a part of a step, (times, evaluated)


@dataclass
class Row:
    """Runs that cost the same (they differ in datasets of the same sizes or in rates), on one kind of machine."""

    runs: list[grid.Run]
    step: Cost
    evaluations: list[tuple[int, Cost]]
    records: list[dict[str, Any]] = field(default_factory=list)  # of one kind of machine

    @property
    def steps(self) -> int:
        return self.runs[0].config["train"]["steps"]

    @property
    def label(self) -> str:
        cell, more = self.runs[0].cells[0], len(self.runs) - 1
        return f"{cell.table}: {grid.TABLES[cell.table].label(cell)}" + (f", {more} more" if more else "")

    @property
    def measured(self) -> float | None:
        """Seconds of a step, mean over the records: without evaluations and checkpoints, with the batch's making."""
        found = [_tokens(record["config"]) / record["tokens_per_second"] for record in self.records]
        return statistics.fmean(found) if found else None

    def evaluating(self, limits: Machine) -> float:
        return sum(times * limits.seconds(cost) for times, cost in self.evaluations)

    def whole(self, limits: Machine) -> float:
        return self.steps * limits.seconds(self.step) + self.evaluating(limits)


def _tokens(config: dict[str, Any]) -> int:
    """The tokens of a step, as the experiments count them."""
    data, batch = config["data"], config["train"]["batch_size"]
    lengths = {
        "selective_copy": lambda: data["length"] + data["tokens"],
        "charlm": lambda: data["block_size"],
        "decision": lambda: data["context_length"] * data["tokens"],
    }
    return batch * lengths[config["experiment"]]()


# -- what a run does, from its configuration


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def copying_work(cfg: SelectiveCopy) -> Work:
    def batch(size: int) -> Batch:
        return _ids(size, cfg.data.length + cfg.data.tokens), _ids(size, cfg.data.tokens)

    evaluated = (_evaluations(cfg) + 2) * cfg.eval.iters  # val, and test at the end of last and best
    part = batch(cfg.train.batch_size // cfg.micro_batches)
    return selective_copy.model(cfg), selective_copy.loss, part, [(evaluated, batch(cfg.eval.batch_size))]


def language_work(cfg: CharLM) -> Work:
    if cfg.data.text != "tinyshakespeare" or cfg.data.path is not None:
        raise ValueError(f"data.text, data.path: expected tinyshakespeare, whose size is known, got {cfg.data}")

    def batch(size: int, block: int = cfg.data.block_size) -> Batch:
        return _ids(size, block), _ids(size, block)

    count, rest = divmod(VALIDATION - 1, cfg.data.block_size)  # all of the text, as charlm.whole_loss cuts it, twice
    most = max(1, 2**14 // cfg.data.block_size)
    times = 2 + (_evaluations(cfg) if cfg.eval.whole else 0)
    whole = [(times * (count // most), batch(most)), (times, batch(count % most)), (times, batch(1, rest))]
    estimates = (2 if cfg.eval.whole else _evaluations(cfg)) * cfg.eval.iters
    evaluated = [(estimates, batch(cfg.eval.batch_size)), *whole]
    part = batch(cfg.train.batch_size // cfg.micro_batches)
    return charlm.model(cfg, CHARACTERS), charlm.loss, part, [(n, b) for n, b in evaluated if b[0].numel()]


def decision_work(cfg: Decision) -> Work:
    states, actions = _sizes(cfg)
    shape = (cfg.train.batch_size // cfg.micro_batches, cfg.data.context_length)
    # The mask `...` selects all, as a boolean mask's result has no size before it is computed.
    part = (torch.zeros(*shape, 1), torch.zeros(*shape, states), torch.zeros(*shape, actions), _ids(*shape), ...)
    return decision.model(cfg, states, actions), decision.loss, part, []


WORK = {"selective_copy": copying_work, "charlm": language_work, "decision": decision_work}


def _sizes(cfg: Decision) -> tuple[int, int]:
    return ENVIRONMENTS[split_name(cfg.data.dataset)[1]].sizes


def _evaluations(cfg: Run) -> int:
    return math.ceil(cfg.train.steps / cfg.eval.interval)


def costs(cfg: Run) -> tuple[Cost, list[tuple[int, Cost]]]:
    """The costs of a training step as `experiments.engine` does it, and of the forward passes of its evaluations."""
    if cfg.train.precision != "fp32":
        raise ValueError(f"train.precision: expected fp32, whose rate the limits hold, got {cfg.train.precision}")
    with FakeTensorMode():
        model, loss, part, evaluated = WORK[cfg.experiment](cfg)
        trainer = Trainer(model, cfg.train, cfg.micro_batches)

        def step() -> None:
            trainer.step(0, loss, [part] * cfg.micro_batches)

        step()  # the optimiser makes its state
        trained = count(step)
        model.eval()
        with torch.inference_mode():
            return trained, [(times, count(partial(loss, model, batch))) for times, batch in evaluated]


def _alike(cfg: Run) -> str:
    """A key that configurations of equal cost share; only the sizes of a dataset's environment matter."""
    if isinstance(cfg, Decision):
        cfg = replace(cfg, data=replace(cfg.data, dataset=str(_sizes(cfg))))
    return repr(replace(cfg, train=replace(cfg.train, learning_rate=1.0)))


def rows(runs: list[grid.Run], records: Iterable[dict[str, Any]], device: str) -> list[Row]:
    """The rows in the grid's order: one for each cost and each kind of machine that has records of it."""
    recorded: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["status"] == "done" and record["hardware"]["device"] == device:
            recorded.setdefault(group_id(record["config"]), []).append(record)
    alike: dict[str, list[grid.Run]] = {}
    for run in runs:
        if run.experiment in WORK:
            alike.setdefault(_alike(typed(run.config)), []).append(run)
    found = []
    for same in tqdm(alike.values(), desc="counting", leave=False):
        counted = costs(typed(same[0].config))
        own = [record for run in same for record in recorded.get(run.group, [])]
        for name in machines(own) if own else [None]:
            found.append(Row(same, *counted, [record for record in own if machines([record]) == [name]]))
    return found


# -- limits


def limits(device: str, threads: int) -> tuple[Machine, int]:
    """The limits of this machine for one run while processes as large keep the other cores busy, and their number."""
    machine.keep_freed_memory()
    if device == "cuda":
        return here(device), 0
    load = os.getloadavg()[0]
    if load > 1.5:  # one is this process
        print(f"warning: load {load:.1f}, others work here too: the limits will be too low", file=sys.stderr)
    torch.set_num_threads(threads)
    others = max(0, cores() // threads - 1)
    context = multiprocessing.get_context("spawn")
    ready = [context.Event() for _ in range(others)]
    processes = [context.Process(target=_keep_busy, args=(threads, event), daemon=True) for event in ready]
    try:
        for process in processes:
            process.start()
        for event in ready:
            if not event.wait(60):
                raise RuntimeError("a process that is to keep another core busy did not come up within a minute")
        return here(device), others
    finally:
        for process in processes:
            process.kill()


def _keep_busy(threads: int, ready: Any) -> None:
    """Copies memory for ever."""
    torch.set_num_threads(threads)
    source = torch.ones(1 << 25)
    target = source.clone()
    ready.set()
    while True:
        target.copy_(source)


# -- what a reader sees


def comparable(row: Row, device: str, threads: int) -> bool:
    """Whether the records are from a machine like this, so that its limits apply."""
    mine = machine.hardware(device)
    names = ("gpu",) if device == "cuda" else ("cpu", "cores", "vector")
    same = all(r["hardware"].get(name) == mine[name] for r in row.records for name in names)
    return bool(row.records) and same and (device == "cuda" or row.records[0]["hardware"]["threads"] == threads)


def markdown(found: list[Row], mine: Machine, others: int, device: str, threads: int) -> str:
    hardware = machines([record for row in found for record in row.records]) if any(r.records for r in found) else []
    header = ["run", "steps", "Gop a step", "MB a step", "T4, ms a step", "T4, h", "here, ms a step", "here, h"]
    header += ["measured, ms a step", "measured / least", "n"] if hardware else []
    header += ["measured on"] if len(hardware) > 1 else []
    lines = []
    for row in found:
        operations, moved = total(row.step)
        line = [row.label, f"{row.steps:,}", _short(operations / 1e9), _short(moved / 1e6)]
        for limit in (T4, mine):
            line += [_short(1e3 * limit.seconds(row.step)), _short(row.whole(limit) / 3600)]
        if row.records:
            line += [_short(1e3 * row.measured)]
            line += [f"{row.measured / mine.seconds(row.step):.2f}" if comparable(row, device, threads) else ""]
            line += [str(len(row.records)), *machines(row.records)]
        lines.append((line + [""] * len(header))[: len(header)])
    return f"{caption(hardware, mine, others, device, threads)}\n\n{as_markdown(header, lines)}\n"


def caption(hardware: list[str], mine: Machine, others: int, device: str, threads: int) -> str:
    def said(limit: Machine) -> str:
        return (
            f"{limit.bandwidth / 1e9:.3g} GB/s read plus written, {limit.matrix_rate / 1e12:.3g} TFLOP/s of float32 "
            f"matrix products, {limit.launch * 1e6:.2g} µs an operator"
        )

    neighbours = f" while {others} more cop{'y' if others > 1 else 'ies'}" if others else ""
    setting = f", in a process of {threads} thread{'s' * (threads > 1)}{neighbours}" if device == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    text = (
        "Least time of each training run: every operator at the limit that binds it, one after another. A step is "
        "forward, loss, backward, clipping and AdamW; hours are those of all steps and of the evaluations' forward "
        "passes, but for decision runs, whose evaluations play environments. Counted: bytes, each operand of an "
        "operator read once and each result written once, and operations of matrix products and attention (a "
        "multiply-add is two; of causal attention half). Not counted: the making of batches, checkpoints, and the "
        "arithmetic of scans, FFTs and all else that is no matrix product. Scans, attention, norms and each time step "
        "of GRU and LSTM are one operator each, the others those of torch without compilation. What stays in a cache "
        "between two operators moves faster than memory's limit, so a small model may beat its least time. "
        f"T4: {said(T4)} (datasheet; the last assumed). "
        f"Here: {mine.name}, {said(mine)} (measured{setting}; {versions})."
    )
    if hardware:
        text += f" Measured on {'; '.join(hardware)}: tokens of a step over tokens a second, mean over n runs; "
        text += "compared with the least time here where that machine is like this one."
    return text


def long(found: list[Row], mine: Machine) -> str:
    """The csv's text: one line per run and machine, in bytes, operations and seconds."""
    lines = []
    for row in found:
        for limit in (T4, mine):
            line = ["; ".join(run.label for run in row.runs), " ".join(run.group for run in row.runs), limit.name]
            line += map(number, (limit.bandwidth, limit.matrix_rate, limit.launch))
            line += [row.steps, sum(row.step.values()), *total(row.step)]
            line += map(number, (limit.seconds(row.step), row.evaluating(limit), row.whole(limit), row.measured))
            line += [len(row.records), "; ".join(machines(row.records)) if row.records else ""]
            lines.append([*line, " ".join(record["run_id"] for record in row.records)])
    return as_csv(COLUMNS, lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=("paper", "cpu"), default="paper")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, for the limits of a CPU (those of the records, or all)")
    parser.add_argument("--results-dir", default="results", help="holds runs/; files are written here (results)")
    arguments = parser.parse_args()
    records = load(arguments.results_dir).values()
    found = rows(grid.runs(arguments.profile, 1), records, arguments.device)
    recorded = [record["hardware"]["threads"] for row in found for record in row.records]
    threads = arguments.threads or (statistics.mode(recorded) if recorded else cores())
    mine, others = limits(arguments.device, threads)
    path = Path(arguments.results_dir) / "tables" / f"roofline_{arguments.profile}.md"
    text = markdown(found, mine, others, arguments.device, threads)
    write(path, text)
    write(path.with_suffix(".csv"), long(found, mine))
    print(text, path, sep="\n")


if __name__ == "__main__":
    command(main)
