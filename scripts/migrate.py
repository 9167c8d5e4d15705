"""Rewrites records of schema 1, whose settings had other names: `python -m scripts.migrate --results-dir results`.

The numbers stay, the settings get their present names, the id becomes the hash of these, and the folder follows.
Where a definition of schema 1 can't be said in today's settings, the record is left as it is and named with the reason:
it is then to be removed, and the run to be done again.
"""

import argparse
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments import records
from experiments.config import EXPERIMENTS, FORMER, MODELS, run_id
from experiments.launch import command


def unsayable(config: dict[str, Any]) -> str | None:
    """The reason why this run of schema 1 cannot be expressed today, or None."""
    model = config.get("model", {})
    inner, wrapping = model.get("inner"), model.get("wrapping")
    if config["experiment"] == "decision":
        return "its scores are of 10 episodes, its model of Decision Transformer's block with other initial values"
    if inner in ("s4", "s4d") or wrapping in ("none", "h3"):
        return "S4's initial B, its block and H3's shift were others than the published ones"
    if model.get("name") in ("mingru", "minlstm") and config["train"].get("decay") == "matrices":
        return "the gates did not decay, which train.decay=matrices now has them do"
    return None


def migrated(record: dict[str, Any]) -> dict[str, Any]:
    """The record in schema 2."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in record["config"].items()}
    for section in set(config) & {"train", "eval", "data"}:
        config[section] = {
            FORMER.get(f"{section}.{key}", f"{section}.{key}").partition(".")[2]: value
            for key, value in config[section].items()
        }
    if config["experiment"] != "efficiency":
        kinds = {"model": MODELS[config["model"]["name"]]}
        for section in ("model", "train", "data", "eval"):
            default = kinds[section]() if section in kinds else getattr(EXPERIMENTS[config["experiment"]](), section)
            config[section] = {f.name: config[section].get(f.name, getattr(default, f.name)) for f in fields(default)}
        config["model"]["mixer_dropout"] = True  # what schema 1 did; without dropout it changes nothing
        if config["model"]["name"] != "attention" and not config["model"]["dropout"]:
            config["model"]["mixer_dropout"] = False
    return record | {"schema_version": records.SCHEMA_VERSION, "config": config, "run_id": run_id(config)}


def migrate(results_dir: Path) -> Iterator[str]:
    """Migrates the records of schema 1, and yields a line for each."""
    for path in sorted(results_dir.glob("runs/*/*/record.json")):
        record = records.read_json(path)
        if record.get("schema_version") != 1:
            continue
        reason = unsayable(record["config"])
        if reason is not None:
            yield f"{path}: left, it can't be said in today's settings ({reason}); remove it to have the run done again"
            continue
        new = migrated(record)
        records.write_json(records.record_path(results_dir, new["experiment"], new["run_id"]), new)
        if new["run_id"] != record["run_id"]:
            path.unlink()
            path.parent.rmdir()
        yield f"{path}: now {new['run_id']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    for line in migrate(parser.parse_args().results_dir):
        print(line)


if __name__ == "__main__":
    command(main)
