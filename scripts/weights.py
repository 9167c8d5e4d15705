"""Turns a run's checkpoint into weights for the repository: `python -m scripts.weights charlm run=<id>`.

Writes results/weights/<experiment>-<model>/: model.safetensors in half precision, config.json and the model card. The
losses in it are those of the written weights, beside the run's own. A policy's scores are the run's, as episodes cost
minutes, and the card says so.
"""

import hashlib
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from experiments import charlm, files, records, trained
from experiments.config import SECTIONS, run_id
from experiments.decision import normalization
from experiments.launch import CommandError, command, settings_of
from experiments.records import read_record, record_path

EXPERIMENTS = ("charlm", "decision")


@dataclass
class Settings:
    run: str = ""
    name: str = ""  # of the folder, after the experiment; empty: the model's
    results_dir: str = "results"
    output_dir: str = "outputs"

    def __post_init__(self):
        if not self.run:
            raise ValueError("run: expected a run's id")


def of_text(found: trained.Trained) -> dict[str, Any]:
    """Facts and metrics of a character model."""
    text = charlm.read(found.cfg, "cpu")
    model = found.fill(charlm.model(found.cfg, len(text.vocabulary)))
    with torch.inference_mode():
        return {"facts": found.facts, "metrics": {"test_loss": charlm.whole_loss(found.cfg, text.val, model)}}


def of_policy(found: trained.Trained) -> dict[str, Any]:
    """Facts and metrics of a policy."""
    scores = {key: value for key, value in found.stated.items() if key.startswith("test_")}
    return {"facts": found.facts | normalization(found), "metrics": scores}


def card(config: dict[str, Any], record: dict[str, Any]) -> str:
    """README.md, with the front matter that the Hub reads."""
    experiment, metrics, settings = config["config"]["experiment"], config["metrics"], record["config"]
    title = f"{config['name']}, {experiment}, profile {record['profile']}"
    if experiment == "charlm":
        data = f"the first 90 % of Tiny Shakespeare ({config['facts']['characters']:,} characters in all)"
        result = (
            f"Loss {metrics['test_loss']:.4f} nats per character on the whole validation text (the last 10 %), in "
            f"blocks of {settings['data']['block_size']}; {record['metrics'][config['weights']]['test_loss']:.4f} "
            "before rounding to half precision. The step was chosen by this text: there is no third part."
        )
        commands = (
            f'python -m experiments.charlm.sample model={config["name"]} prompt="ROMEO:"\n'
            f"python -m experiments.charlm.evaluate model={config['name']}"
        )
        limits = "It writes text in Shakespeare's manner, without sense, for study of the model."
    else:
        data = f"{settings['data']['dataset']}: {config['facts']['dataset'].get('source', 'D4RL')}"
        result = (
            f"Score {metrics['test_score']:.1f} (D4RL's normalisation, mean of {settings['eval']['episodes']} test "
            "episodes), measured before rounding to half precision."
        )
        commands = f"python -m experiments.decision.strip model={config['name']} target=80"
        limits = "It moves one simulated robot; scores of single policies differ by several points between seeds."
    train, hardware = settings["train"], record["hardware"]
    step = record["metrics"][config["weights"]]["step"]
    points = (
        f"Data: {data}.",
        f"Training: {record['steps']} of {train['steps']} steps, weights of step {step}; batch {train['batch_size']}, "
        f"learning rate {train['learning_rate']:g}, seed {record['seed']}; config.json has all settings.",
        f"Parameters: {record['parameters']:,}.",
        f"Run {record['run_id']}, commit {record['git']['commit']}, on {hardware['cpu']} ({hardware['vector']}), torch "
        f"{record['versions']['torch']}. Another processor rounds differently, and its run ends with another loss.",
        f"Limits: {limits}",
    )
    listed = "\n".join(textwrap.fill(f"- {point}", 120, subsequent_indent="  ") for point in points)
    return f"""---
license: mit
library_name: minrnn
---
# {title}

{textwrap.fill(result, 120)}

{listed}

```bash
{commands}
```
"""


def export(experiment: str, given: Settings) -> Path:
    """Writes the weights and returns their folder."""
    which = "best" if experiment == "charlm" else "last"
    found = trained.of_run(experiment, given.run, which, given.results_dir, given.output_dir)
    record = read_record(record_path(given.results_dir, experiment, given.run))
    found.weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).clone().contiguous()
        for name, tensor in found.weights.items()
    }
    content = safetensors.torch.save(found.weights)
    name = given.name or found.cfg.model.name
    settings = {key: record["config"][key] for key in ("experiment", "profile", "seed", *SECTIONS)}  # not folders
    config = {
        "run_id": run_id(record["config"]),
        "name": name,
        "weights": which,
        "config": settings | {"data": settings["data"] | ({"path": None} if experiment == "charlm" else {})},
        **(of_text if experiment == "charlm" else of_policy)(found),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    folder = Path(given.results_dir) / "weights" / f"{experiment}-{name}"
    files.write(folder / "model.safetensors", content)
    files.write(folder / "README.md", card(config, record))
    records.write_json(folder / "config.json", config)
    return folder


def main(arguments: list[str]) -> None:
    experiment, *settings = arguments or ("--help",)
    if experiment not in (*EXPERIMENTS, "-h", "--help"):
        raise CommandError(f"expected one of {', '.join(EXPERIMENTS)} first, got {experiment!r}")
    folder = export(experiment, settings_of(Settings, __doc__, settings if experiment in EXPERIMENTS else [experiment]))
    print(f"{folder}: {(folder / 'model.safetensors').stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    command(main, sys.argv[1:], refusals=(ValueError, OSError))
