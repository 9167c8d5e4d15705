"""What the grid is made of: a table, its cells, and the runs that fill them. Needs no torch."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..config import PROFILES
from ..launch import compose

SCALES = ("cpu", "paper")  # profiles that measure something
CHOICE_SEED = 1000  # of the runs that choose a learning rate


@dataclass(frozen=True)
class Metric:
    key: str  # in a record's metrics
    label: str
    unit: str = ""
    scale: float = 1  # from the record's unit to that of tables and paper.csv; nothing else converts
    digits: int = 1
    higher_is_better: bool = True

    def format(self, value: float, std: float | None = None) -> str:
        return f"{value:.{self.digits}f}" + ("" if std is None else f" ± {std:.{self.digits}f}")


@dataclass(frozen=True)
class Cell:
    table: str
    row: str
    column: str
    metric: str
    experiment: str
    overrides: tuple[str, ...]  # the command line of its runs, without profile and seed
    order: int  # the smaller, the more wanted
    profiles: tuple[str, ...] = PROFILES  # that have it
    asked: tuple[str, ...] = ()  # profiles that run it only on request, as it takes long
    seeds: tuple[int, ...] | None = None  # None: as many as are wanted, from 0

    def config(self, profile: str) -> dict[str, Any]:
        return _compose(self.experiment, self.settings(profile))

    def settings(self, profile: str) -> tuple[str, ...]:
        named = any(setting.startswith("profile=") for setting in self.overrides)
        return (*self.overrides, *(() if named else (f"profile={profile}",)))

    def command(self, profile: str, seed: int | str) -> str:
        """The command line of one of its runs, for readers."""
        return f"python -m experiments.{self.experiment} {shlex.join(self.settings(profile))} seed={seed}"

    def paper_scale(self) -> dict[str, Any]:
        task = [setting for setting in self.overrides if setting.startswith("task=")]
        return _compose(self.experiment, (*task, "profile=paper"))


@cache
def _compose(experiment: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose(experiment, list(overrides))


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    settings: tuple[tuple[str, str], ...]  # (key of a run's configuration, name): the scale, stated in the caption
    column: str | None = None  # what its columns are; None where there is but one
    chance: Callable[[dict[str, Any]], float] | None = None  # of a configuration, in the metric's unit
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()  # of the figure of curves: title, rows
    more: tuple[tuple[str, str, str], ...] = ()  # further columns: head, metric, of "last" or "best"
    published: str = "paper"  # whose values it is compared with ...
    published_scale: tuple[str, ...] = ("paper",)  # ... in these profiles, whose scale they have
    wide: bool = False  # a reader's table has its rows side by side

    def label(self, cell: Cell) -> str:
        return f"{cell.row}, {self.column} {cell.column}" if self.column else cell.row


@dataclass(frozen=True)
class Run:
    experiment: str
    overrides: tuple[str, ...]
    seed: int
    config: dict[str, Any]
    run_id: str
    group: str  # the same for all seeds
    cells: tuple[Cell, ...]
    labels: tuple[str, ...]  # one for each cell that it fills

    @property
    def label(self) -> str:
        return self.labels[0]

    @property
    def asked(self) -> bool:
        """Whether it is run only on request."""
        return all(self.config["profile"] in cell.asked for cell in self.cells)


# -- learning rates

SHORT = (
    "Each model trains for a part of its steps, on a schedule of that length and on one seed that no other table uses."
)
CHOSEN = "The tables above use the best rate of each row."


def rate_table(title: str, caption: str, settings: tuple[tuple[str, str], ...]) -> Table:
    return Table(title, caption, settings, "learning rate", wide=True)


def rate_cells(
    table: str, experiment: str, metric: str, rows: dict[str, tuple[str, ...]], rates: dict[str, tuple[str, ...]],
    *settings: str,
) -> tuple[Cell, ...]:  # fmt: skip
    """A cell for every row (with its settings) at each of its rates, in profile cpu."""
    return tuple(
        Cell(
            table, row, rate, metric, experiment, (*rows[row], f"train.learning_rate={rate}", *settings), 0,
            ("cpu",), ("cpu",), (CHOICE_SEED,),
        )
        for row, tried in rates.items()
        for rate in tried
    )  # fmt: skip
