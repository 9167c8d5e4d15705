"""The grid: the paper's tables as data, the runs that fill their cells, and their order. Needs no torch.

Each experiment has a file with its METRICS, TABLES and CELLS, from which planner, tables, figures and report follow.
"""

from collections.abc import Iterable

from ..config import group_id, run_id
from . import charlm, decision, selective_copy, synthetic
from .core import CHOICE_SEED, SCALES, Cell, Metric, Run, Table

__all__ = ["CELLS", "CHOICE_SEED", "METRICS", "SCALES", "TABLES", "Cell", "Metric", "Run", "Table", "runs"]

EXPERIMENTS = (charlm, decision, selective_copy, synthetic)  # in the order of the report
METRICS = {name: metric for each in EXPERIMENTS for name, metric in each.METRICS.items()}
TABLES = {name: table for each in EXPERIMENTS for name, table in each.TABLES.items()}
TABLES |= charlm.RATES | selective_copy.RATES | decision.RATES | selective_copy.FINALS
# In the order in which a table shows them.
CELLS = (
    *(cell for each in EXPERIMENTS for cell in each.CELLS),
    *(cell for each in (charlm, selective_copy, decision) for cell in each.RATE_CELLS),
)


def runs(profile: str, seeds: int, cells: Iterable[Cell] = CELLS) -> list[Run]:
    """Every run once, most wanted first, seed 0 before seed 1; runs of cells with their own seeds come last."""
    groups: dict[tuple[str, tuple[int, ...] | None], list[Cell]] = {}  # cells with one configuration and the same seeds
    for cell in sorted((cell for cell in cells if profile in cell.profiles), key=lambda cell: cell.order):
        groups.setdefault((group_id(cell.config(profile)), cell.seeds), []).append(cell)
    found = []
    for seed in (*range(seeds), CHOICE_SEED):
        for (group, own), filled in groups.items():
            if seed not in (range(seeds) if own is None else own):
                continue
            first, config = filled[0], {**filled[0].config(profile), "seed": seed}
            labels = tuple(f"{cell.experiment}: {TABLES[cell.table].label(cell)}" for cell in filled)
            overrides = first.settings(profile)
            found.append(Run(first.experiment, overrides, seed, config, run_id(config), group, tuple(filled), labels))
    return found
