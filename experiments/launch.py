"""From a command line to a run: `python -m experiments.<experiment> key=value ...`, `-m` for a sweep. Needs no torch.

Exit codes: 0 the run has its record, 1 it failed, 2 the command is wrong, 75 it stopped before its end (out of
budget, told to stop, or another process is at it) and the same command goes on.
"""

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import config

CONFIGS = Path(__file__).parent.parent / "configs"
SEARCH = f"hydra.searchpath=[file://{CONFIGS}]"
GROUPS = ("model", "profile", "launcher")
WRONG, UNFINISHED = 2, 75
_outcomes: list[str] = []


def main(experiment: str) -> None:
    """The command line of an experiment; ends the process."""
    config.register()
    arguments = [a for a in sys.argv[1:] if "=" in a.lstrip("-") and not a.startswith("-")]
    try:
        check(experiment, arguments)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {error}", *filter(None, [error.__cause__]), sep=": ", file=sys.stderr)
        sys.exit(WRONG)
    # Hydra takes the flag for a sweep before the settings only.
    sys.argv[1:] = sorted([*sys.argv[1:], SEARCH], key=lambda a: a not in ("-m", "--multirun"))
    hydra.main(version_base="1.3", config_path=str(CONFIGS / experiment), config_name="config")(_task)()
    sys.exit(UNFINISHED if set(_outcomes) & {"paused", "busy"} else 0)


def _task(cfg: DictConfig) -> str:
    # Found by name, so that launchers can send it to another process.
    _outcomes.append(importlib.import_module(f"experiments.{cfg.experiment}").run(OmegaConf.to_object(cfg)))
    return _outcomes[-1]


def compose(experiment: str, overrides: list[str]) -> dict[str, Any]:
    """The whole configuration that a command line of these overrides gives, as records hold it."""
    return OmegaConf.to_container(_compose(experiment, overrides), resolve=True)


def resolve(experiment: str, overrides: list[str]) -> config.Run:
    """The same as the typed object that a runner takes, its values checked."""
    return OmegaConf.to_object(_compose(experiment, overrides))


def _compose(experiment: str, overrides: list[str]) -> DictConfig:
    config.register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS / experiment)):
        return hydra.compose("config", [SEARCH, *overrides])


def check(experiment: str, overrides: list[str]) -> None:
    """ValueError for a key that does not exist, with the nearest that does, and for a value out of range.

    Hydra refuses such a key too, without a hint.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    chosen, settings = [], []
    for override in parsed:
        if not override.key_or_group.startswith("hydra"):
            (chosen if override.key_or_group in GROUPS else settings).append(override)
    first = [o.input_line if not o.is_sweep_override() else f"{o.key_or_group}={_first(o)}" for o in chosen]
    known = _keys(OmegaConf.to_container(_compose(experiment, first)))
    for override in settings:
        key = override.key_or_group
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *GROUPS], n=1, cutoff=0)[0]
            raise ValueError(f"{key}: no such setting; the nearest is {near}")
    if not any(override.is_sweep_override() for override in parsed):
        resolve(experiment, overrides)


def _first(override: Any) -> str:
    return next(iter(override.sweep_string_iterator()))


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
