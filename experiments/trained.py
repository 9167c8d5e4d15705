"""Loads trained models, from a run's checkpoint or from the weights that come with the repository.

`results/weights/<experiment>-<model>/` is laid out as on Hugging Face's Hub: model.safetensors, config.json (the run's
settings, facts of its data, its losses, the checksum of the weights) and README.md, the model card. `python -m
scripts.weights` writes all three.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import checkpoints, files, records
from .config import Run, run_id, typed

MOST_BYTES = 2**30


class WeightsError(files.Refusal, ValueError):
    """Weights that are not what they should be; the text names the file and says what to do."""


@dataclass
class Trained:
    """Attributes:
    file: what the weights came from; for messages.
    cfg: the run's settings.
    facts: about its training data: vocabulary, or normalisation and environment.
    weights: by name; floating tensors of any precision.
    stated: the metrics that its record or card states for these weights.
    """

    file: Path
    cfg: Run
    facts: dict[str, Any]
    weights: dict[str, Tensor]
    stated: dict[str, float]

    def fill(self, model: nn.Module) -> nn.Module:
        """The model with these weights, in its own precision, for evaluation. Raises WeightsError: they do not fit."""
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise WeightsError(f"{self.file}: not the weights of this model ({text:.200})") from None
        return model.eval()


@dataclass
class Choice:
    """The settings by which a command finds a trained model."""

    run: str = ""
    model: str = "mingru"  # of the weights that come with the repository, if no run is given
    results_dir: str = "results"
    output_dir: str = "outputs"

    def find(self, experiment: str, which: str, device: str = "cpu") -> Trained:
        """The run's best or last weights, or those of `model`."""
        if self.run:
            return of_run(experiment, self.run, which, self.results_dir, self.output_dir, device)
        return shipped(experiment, self.model, self.results_dir, device)


def of_run(experiment: str, run: str, which: str, results_dir: str, output_dir: str, device: str = "cpu") -> Trained:
    """A run's best or last weights. Raises ValueError: no such run, or its checkpoint is not here."""
    path = records.record_path(results_dir, experiment, run)
    record = records.read_record(path)
    if record is None:
        known = [each.parent.name for each in (Path(results_dir) / "runs" / experiment).glob("*/record.json")]
        made = f"there is none: python -m experiments.{experiment} makes one"
        hint = f"the nearest is {files.nearest(run, known)}" if known else made
        raise ValueError(f"run: no run {run!r} in {results_dir}/runs/{experiment}; {hint}")
    if record["status"] != "done":
        raise ValueError(f"run: expected one that is done, {run} is {record['status']} ({record['reason']})")
    folder = records.work_dir(output_dir, experiment, run)
    saved = checkpoints.load(folder, device, {"run_id": run})
    if saved is None:
        raise ValueError(
            f"run: {run} has a record, but no weights in {folder} (they stay where it was run); give output_dir=, or "
            f"do it again with the settings that {path} holds: python -m experiments.{experiment} results_dir=mine "
            "output_dir=mine ..."
        )
    if saved["state"]["step"] != record["steps"]:
        raise ValueError(
            f"run: the weights in {folder} are those after step {saved['state']['step']}, the record is of "
            f"{record['steps']}: the run was finished elsewhere; give its output_dir="
        )
    weights = saved["best_weights" if which == "best" else "model"]
    return Trained(folder, typed(record["config"]), record["facts"], weights, record["metrics"][which])


def shipped(experiment: str, name: str, results_dir: str, device: str = "cpu") -> Trained:
    """Weights that come with the repository.

    Raises ValueError: there are none of this name. Raises WeightsError: a file is damaged, or belongs to another model.
    """
    folder = Path(results_dir) / "weights" / f"{experiment}-{name}"
    if not folder.is_dir():
        known = [path.name.removeprefix(f"{experiment}-") for path in folder.parent.glob(f"{experiment}-*")]
        hint = f"expected one of {', '.join(sorted(known))}" if known else "there are none; give run=<id>"
        raise ValueError(f"model: no weights of {name!r} in {folder.parent} ({hint})")
    file, again = folder / "model.safetensors", "get it anew: git checkout"
    try:
        card = records.read_json(folder / "config.json", f"{again} {folder / 'config.json'}")
        content = files.read(file, WeightsError, MOST_BYTES)
    except FileNotFoundError as error:
        raise WeightsError(f"{error.filename}: missing; {again} {error.filename}") from error
    except records.RecordError as error:
        raise WeightsError(error) from error
    try:
        found = run_id(card["config"])
        cfg, facts, stated = typed(card["config"]), dict(card["facts"]), dict(card["metrics"])
        expected, experiment_of = card["sha256"], card["config"]["experiment"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"expected a run's settings, facts and metrics ({type(error).__name__}: {error})"
        raise WeightsError(f"{folder / 'config.json'}: {text:.200}; {again} {folder / 'config.json'}") from error
    if (experiment_of, found) != (experiment, card.get("run_id")):
        raise WeightsError(
            f"{folder / 'config.json'}: expected the settings of {experiment} {card.get('run_id')}, got those of "
            f"{experiment_of} {found}; {again} {folder / 'config.json'}"
        )
    if (sha256 := hashlib.sha256(content).hexdigest()) != expected:
        raise WeightsError(f"{file}: expected sha256 {expected}, got {sha256}; {again} {file}")
    try:
        weights = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{file}: not a safetensors file ({error}); {again} {file}") from error
    return Trained(file, cfg, facts, {name: tensor.to(device) for name, tensor in weights.items()}, stated)
