"""The two tables of README.md, speed and reproduction, from records and results/paper.csv alone. Needs no torch.

A verdict follows from one rule:

- `not yet run`: no run of the row is done.
- `not at this scale`: the runs have a smaller setting than the paper's (profile cpu), so the numbers do not compare.
- `reproduced`, in the paper's setting (profile paper): ours is as good as the paper's value, or better, within both
  standard deviations. The paper gives none for a loss, which may be 0.02 nats higher.
- `contradicted`, in the paper's setting: it is not.

Speed depends on the machine, so it has a rule of its own. It is judged by the paper's form, log space against
hand-written loops in plain PyTorch: `reproduced` where the ratio reaches the paper's, `contradicted` where it does not
on the paper's GPU, a T4, and `not at this scale` where it does not on another machine.

A value of the paper that no source confirms gives no verdict, and neither does a single run in the paper's setting.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.grid import METRICS, Metric
from experiments.grid.decision import DATASETS

from . import efficiency, grids
from .cells import PAPER, Entry, Published, Records, common_seeds, entries, judged_by, load, read_paper, scale
from .efficiency import tables as efficiency_tables

TOLERANCE = 0.02  # nats, for a loss
RULE = (
    "A fixed rule gives the verdict. *Reproduced* and *contradicted* need the paper's setting: ours is as good as the "
    f"paper's value within both standard deviations ({TOLERANCE} nats for a loss), or it is not; one seed is too "
    "few for either. A smaller setting gives *not at this scale*. Speed is judged in log space against hand-written "
    "loops, as in the paper: *reproduced* if it reaches the paper's ratio, *contradicted* if it does not on the "
    "paper's GPU, a T4."
)
UNCONFIRMED = "† Unconfirmed: recalled, and not found in any source we could reach. Such a value gives no verdict."
DETAILS = {  # text and section of docs/results.md
    name: f"[{name}](docs/results.md#{name.lower().replace(' ', '-')})"
    for name in ("selective copying", "character model", "decision RNNs", "efficiency")
}


@dataclass(frozen=True)
class Line:
    claim: str
    paper: str
    ours: str
    scale: str
    verdict: str
    details: str

    def cells(self) -> list[str]:
        return [self.claim, self.paper, self.ours, self.scale, self.verdict, DETAILS[self.details]]


HEADER = ["claim", "paper", "ours", "scale", "verdict", "details"]


def verdict(value: float | None, spread: float | None, paper: Published | None, own: bool, metric: Metric) -> str:
    """The verdict on a trained model, by this module's rule."""
    if value is None:
        return "not yet run"
    if paper is None or not paper.confirmed:
        return "none (†)"
    if not own:
        return "not at this scale"
    if spread is None:
        return "none (n = 1)"
    behind = (paper.value - value) * (1 if metric.higher_is_better else -1)
    allowed = spread + (TOLERANCE if paper.std is None and not metric.higher_is_better else paper.std or 0)
    return "reproduced" if round(behind - allowed, 6) <= 0 else "contradicted"


def speed_verdict(value: float | None, paper: float, machine: str) -> str:
    """The verdict on a ratio of times, by this module's rule."""
    if value is None:
        return "not yet run"
    if value >= paper:
        return "reproduced"
    return "contradicted" if "T4" in machine.split() else "not at this scale"


def trained(table: str, row: str, column: str, claim: str, details: str, records: Records, paper: dict) -> Line:
    """A line on a trained model, in the paper's setting where it was run, else in profile cpu."""
    found = {}
    for profile in ("paper", "cpu"):
        for entry in entries(table, profile, records, paper):
            if (entry.cell.row, entry.cell.column) == (row, column):
                found[profile] = entry
    profile, entry = next(((p, e) for p, e in found.items() if e.done), ("cpu", found["cpu"]))
    which = judged_by(entry)
    value, spread = (entry.mean(which), entry.std(which)) if entry.done else (None, None)
    return Line(
        claim,
        published(entry.paper, entry.metric),
        "" if value is None else f"{entry.metric.format(value, spread)} {entry.metric.unit}",
        "" if value is None else f"`{profile}`, n = {len(entry.done)}",
        verdict(value, spread, entry.paper, profile == "paper", entry.metric),
        details,
    )


def decision(row: str, records: Records, paper: dict) -> Line:
    """A line on the mean over D4RL's sets, once all of them have a seed in common."""
    metric = METRICS["score"]
    mine = [entry for entry in entries("table3_d4rl", "paper", records, paper) if entry.cell.row == row]
    values = mean_scores(mine)
    value = statistics.fmean(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    value_of_paper = mean_published([entry.paper for entry in mine])
    return Line(
        f"D4RL: mean score of {row}, {len(DATASETS)} datasets",
        published(value_of_paper, metric),
        "" if value is None else f"{metric.format(value, spread)} {metric.unit}",
        "" if value is None else f"`paper`, n = {len(values)}",
        verdict(value, spread, value_of_paper, True, metric),
        "decision RNNs",
    )


def mean_scores(of_datasets: list[Entry]) -> list[float]:
    """The mean score for each seed that every dataset has; empty where a dataset has none."""
    if not all(entry.done for entry in of_datasets):
        return []
    seeds = common_seeds(of_datasets)
    return [statistics.fmean(entry.of_seeds([seed]).mean() for entry in of_datasets) for seed in seeds]


def mean_published(values: list[Published | None]) -> Published | None:
    if None in values:
        return None
    mean = statistics.fmean(value.value for value in values)
    return Published(mean, None, all(value.confirmed for value in values), values[0].source)


def speeds(machines: efficiency.Machines, paper: dict) -> list[Line]:
    """Lines on the machine nearest to the paper's: a T4, another GPU, or a CPU."""
    claims = [c for c in efficiency_tables.CLAIMS if c.part == "train" and c.key == "median" and c.unit == "x"]
    chosen = next(iter(by_nearness(machines)), None)
    lines = []
    for claim in claims:
        theirs_said = next(v for (table, row, _, _), v in paper.items() if (table, row) == ("efficiency", claim.row))
        theirs, ours = claim.row.split(", ")[0].split(" takes longer than ")
        forms = {form: claim.measured(chosen[1], form) for form in ("log space", "fused")} if chosen else {}
        texts = [f"{claim.text(value)} ({form})" for form, value in forms.items() if value is not None]
        lines.append(
            Line(
                f"Training speed: {ours} over {theirs}, T = {claim.length}",
                claim.text(theirs_said.value),
                ", ".join(texts),
                chosen[0] if texts else "",
                speed_verdict(forms.get("log space"), theirs_said.value, chosen[0] if chosen else ""),
                "efficiency",
            )
        )
    return lines


def by_nearness(machines: efficiency.Machines) -> list[tuple[str, dict[str, efficiency.Part]]]:
    """Machines whose training was timed, the one most like the paper's first."""
    timed = [(name, parts) for (profile, name), parts in machines.items() if profile != "smoke" and "train" in parts]

    def far(item: tuple[str, dict[str, efficiency.Part]]) -> tuple[bool, bool, str]:
        name, parts = item
        return "T4" not in name.split(), "gpu" not in parts["train"].record["hardware"], name

    return sorted(timed, key=far)


def reproduction(results_dir: str | Path, paper: Path = PAPER) -> str:
    values, records = read_paper(paper), load(results_dir)
    lines = []
    for row in ("minGRU", "minLSTM"):
        claim = f"Selective copying: accuracy of {row}, 3 layers"
        lines.append(trained("table1_layers", row, "3", claim, "selective copying", records, values))
    for row in ("minGRU", "minLSTM", "Mamba", "Transformer"):
        claim = f"Tiny Shakespeare: loss of {row}"
        lines.append(trained("charlm", row, "loss", claim, "character model", records, values))
    lines += [decision(row, records, values) for row in ("minGRU", "minLSTM")]
    lines += speeds(efficiency.load(results_dir), values)
    table = grids.as_markdown(HEADER, [line.cells() for line in lines], left=(0, 3, 4, 5))
    notes = [RULE, scaled_down(records, values), UNCONFIRMED if any("†" in line.paper for line in lines) else ""]
    return f"{table}\n\n{' '.join(filter(None, notes))}\n"


def scaled_down(records: Records, paper: dict) -> str:
    """The settings that profile cpu makes smaller, for the tables that have runs of it."""
    said = []
    for table, name in (("table1_layers", "selective copying"), ("charlm", "the character model")):
        found = [entry for entry in entries(table, "cpu", records, paper) if entry.done]
        if found:
            sizes = [(size, ours, theirs) for size, ours, theirs in scale(table, found) if ours != theirs]
            said.append(f"{name} has {', '.join(f'{size} {ours} (paper: {theirs})' for size, ours, theirs in sizes)}")
    return f"In profile `cpu`, {'; '.join(said)}." if said else ""


def published(paper: Published | None, metric: Metric) -> str:
    if paper is None:
        return ""
    return f"{metric.format(paper.value, paper.std)} {metric.unit}{'' if paper.confirmed else ' †'}"


LENGTHS = (512, 4096)
SHOWN = {  # by family: heads and layers
    ours: {ours: ours, f"torch.nn.{theirs}": f"{theirs}, torch", f"{ours} in log space": f"{ours}, log-space"}
    for ours, theirs in efficiency.BASELINES.items()
}


def speed(results_dir: str | Path) -> str:
    """Times of training a layer at two lengths on each machine, and the first machine's figure."""
    machines = by_nearness(efficiency.load(results_dir))
    if not machines:
        return ""
    header = ["machine and length", *(head for family in SHOWN.values() for head in family)]
    lines = []
    for name, parts in machines:
        for length in LENGTHS:
            cells = [cell for ours in SHOWN for cell in _times(parts["train"], ours, length)]
            if any(cells):
                lines.append([f"{name}, T = {length:,}", *cells])
    point = machines[0][1]["train"].points[0]
    caption = (
        f"Time of one training step of one layer (forward, loss, backward): batch {point['batch']}, width "
        f"{point['width']}, {machines[0][1]['train'].record['dtype']}, median. In brackets: how many times as long as "
        "minGRU or minLSTM."
    )
    shown = [caption, grids.as_markdown(header, lines)]
    for name, parts in machines:
        path = Path(results_dir) / f"figures/efficiency_speedup_{efficiency.slug(parts['train'].profile, name)}.png"
        if path.exists():
            shown.append(f"![Speed of training against sequence length, {name}]({path.as_posix()})")
            break
    return "\n\n".join(shown) + "\n"


def _times(part: efficiency.Part, ours: str, length: int) -> list[str]:
    """The times of a family's layers."""
    times = [part.of(layer).get(length) for layer in SHOWN[ours].values()]
    first, cells = times[0], []
    for point in times:
        text = "" if point is None else f"{efficiency.milliseconds(point['median'])} ms"
        compared = point is not None and first is not None and point is not first
        cells.append(text + (f" ({point['median'] / first['median']:.1f} x)" if compared else ""))
    return cells


def blocks(results_dir: str | Path, paper: Path = PAPER) -> dict[str, str]:
    """The blocks of README.md, by the names of their marks."""
    return {"table:speed": speed(results_dir), "table:reproduction": reproduction(results_dir, paper)}
