"""From a command line to a run: `python -m experiments.<experiment> key=value ...`, `-m` for a sweep. Needs no torch.

Exit codes: 0 the run has its record, 1 it failed, 2 the command is wrong, 75 it stopped before its end (out of
budget, told to stop, or claimed by another process) and the same command resumes it, 130 it was interrupted. Launchers
that start other processes count such a run as failed.
"""

import copy
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import config, files

CONFIGS = Path(__file__).parent.parent / "configs"
GROUPS = ("task", "model", "convention", "optimizer", "part", "profile", "launcher")
PATHS = ("results_dir", "output_dir", "data.path")
WRONG, UNFINISHED, INTERRUPTED = 2, 75, 130
_outcomes: list[str] = []
UNFINISHED_OUTCOMES = {"paused", "stopped", "busy"}


def quoted(text: str) -> str:
    """The text quoted for Hydra's grammar, as ordinary paths have brackets, commas and quotes."""
    text = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return "'" + text.replace("${", "\\${") + "'"


SEARCH = f"hydra.searchpath=[{quoted(f'file://{CONFIGS}')}]"


def _quote_paths(argument: str) -> str:
    """The argument with its path quoted for Hydra; the shell has removed the user's quotes."""
    key, found, value = argument.partition("=")
    if not found or key.lstrip("+") not in PATHS or value[:1] in ("'", '"', "") or value in ("null", "~"):
        return argument
    return f"{key}={quoted(value)}"


def main(experiment: str) -> None:
    """Runs the command line of an experiment, then ends the process."""
    config.register()
    # Hydra takes its flags before the settings only.
    sys.argv[1:] = sorted(map(_quote_paths, sys.argv[1:]), key=lambda a: a not in ("-m", "--multirun"))
    arguments = get_args_parser().parse_args()
    try:
        check(experiment, arguments.overrides, arguments.multirun)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(WRONG)
    first = next((i for i, a in enumerate(sys.argv) if a in arguments.overrides), len(sys.argv))
    sys.argv.insert(first, SEARCH)
    os.environ["MINRNN_MAIN_PROCESS"] = str(os.getpid())  # launchers' processes inherit it
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS / experiment), config_name="config")(_task)()
    except KeyboardInterrupt:  # the second, while training
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(UNFINISHED if set(_outcomes) & UNFINISHED_OUTCOMES else 0)


def in_one_line(error: Exception) -> str:
    """The error of a setting in one line; Hydra and OmegaConf add lines about their own types."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if first.startswith("LexerNoViableAltException: "):
        setting = first.partition(": ")[2]
        return f"{setting}: expected a value as Hydra reads it; quote what is not plain: key=\"'...'\""
    first = first.removeprefix("Error merging override ")
    key = getattr(error, "override", None) or getattr(error, "full_key", None)
    first = f"{key}: {first}" if key and key not in first else first
    cause = str(error.__cause__).strip().splitlines()[:1] if error.__cause__ else []
    return ": ".join([first, *(text for text in cause if text not in first)])


def _task(cfg: DictConfig) -> str:
    # Found by name, so that launchers can send it to another process.
    here = os.environ.get("MINRNN_MAIN_PROCESS") == str(os.getpid())
    try:
        outcome = importlib.import_module(f"experiments.{cfg.experiment}").run(OmegaConf.to_object(cfg))
    except files.Refusal as error:
        if here:
            sys.exit(f"error: {error}")  # it says what to do; a traceback would say no more
        raise
    _outcomes.append(outcome)
    if outcome in UNFINISHED_OUTCOMES and not here:
        raise RuntimeError(f"the run is {outcome}, not done; give the same command again")  # all that a launcher heeds
    if outcome == "stopped":
        sys.exit(UNFINISHED)  # the rest of a sweep too
    return outcome


def compose(experiment: str, overrides: list[str]) -> dict[str, Any]:
    """The whole configuration that these overrides give, as records hold it."""
    return OmegaConf.to_container(_composed(experiment, overrides), resolve=True)


def resolve(experiment: str, overrides: list[str]) -> config.Run:
    """The configuration as the typed object that a runner takes, its values checked."""
    return OmegaConf.to_object(_composed(experiment, overrides))


def _composed(experiment: str, overrides: list[str]) -> DictConfig:
    """The composed configuration. Hydra takes 0.1 s for each, so each choice of files is composed only once."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    found = copy.deepcopy(_chosen(experiment, tuple(o.input_line for o in parsed if o.key_or_group in GROUPS)))
    for override in parsed:
        if override.key_or_group not in GROUPS:
            value = override.value()
            OmegaConf.update(found, override.key_or_group, value.text if isinstance(value, QuotedString) else value)
    return found


@cache
def _chosen(experiment: str, choices: tuple[str, ...]) -> DictConfig:
    config.register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS / experiment)):
        return hydra.compose("config", [SEARCH, *choices])


def command(main: Callable, *arguments: Any, refusals: tuple[type[Exception], ...] = ()) -> None:
    """Ends the process with the result of `main`; a Refusal or one of `refusals` is printed in one line."""
    try:
        sys.exit(main(*arguments))
    except (files.Refusal, *refusals) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG if isinstance(error, CommandError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


class CommandError(files.Refusal, ValueError):
    """The command is wrong; the text says which argument, and what was expected."""


def settings_of(kind: type, doc: str, arguments: list[str]) -> Any:
    """A dataclass of plain fields, read from key=value, for commands that start no run; --help prints `doc` and ends.

    Raises CommandError.
    """
    if {"-h", "--help"} & set(arguments):
        shown = {f.name: "" if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(kind)}
        print(doc, *(f"    {name}={default}" for name, default in shown.items()), sep="\n")
        sys.exit()
    kinds, values = {f.name: f.type for f in dataclasses.fields(kind)}, {}
    for argument in arguments:
        key, found, value = argument.partition("=")
        if not found:
            raise CommandError(f"expected key=value of {', '.join(kinds)}, got {argument!r}")
        if key not in kinds:
            raise CommandError(f"{argument}: no such setting; the nearest is {files.nearest(key, kinds)}=")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise CommandError(f"{key}: expected {kinds[key].__name__}, got {value!r}") from None
    try:
        return kind(**values)
    except ValueError as error:
        raise CommandError(error) from error


def check(experiment: str, overrides: list[str], multirun: bool = False) -> None:
    """Raises ValueError for an unknown key, naming the nearest known one, and for a value out of range.

    Hydra also refuses unknown keys, but without a hint.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {name: found for name in GROUPS if (found := _files(experiment, name))}
    chosen = {o.key_or_group: o for o in parsed if o.key_or_group in groups}
    settings = [o for o in parsed if o.key_or_group not in groups and not o.key_or_group.startswith("hydra")]
    for override in (*chosen.values(), *settings):
        if override.is_delete():
            raise ValueError(f"{override.input_line}: a setting cannot be taken away; set it to null")
        if override.is_sweep_override() and not multirun:
            raise ValueError(f"{override.input_line}: several values are a sweep, which needs -m")
    for group, override in chosen.items():
        for value in map(str, _values(override)):
            if value not in groups[group]:
                near = files.nearest(value, groups[group])
                raise ValueError(
                    f"{group}: expected one of {', '.join(groups[group])}, got {value!r}; the nearest is {near}"
                )
    known = _keys(OmegaConf.to_container(_chosen(experiment, tuple(_one(o) for o in chosen.values()))))
    for override in settings:
        key = override.key_or_group
        if key not in known:
            near = config.FORMER.get(key) or files.nearest(key, [*known, *groups])
            raise ValueError(f"{key}: no such setting; the nearest is {near}")
    if not any(override.is_sweep_override() for override in parsed):
        resolve(experiment, overrides)


def _files(experiment: str, group: str) -> list[str]:
    """The choices of a group; empty where the experiment does not have the group."""
    folders = (CONFIGS / experiment / group, CONFIGS / group)
    return sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))


def _one(override: Override) -> str:
    """The choice of a group; in a sweep, the first."""
    return f"{override.key_or_group}={_values(override)[0]}"


def _values(override: Override) -> list[Any]:
    """The choices of a group."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_choice_sweep():
        return override.value().list
    raise ValueError(f"{override.input_line}: name the values, one after another with commas")


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
