"""The wandb dashboard as code: `python -m scripts.dashboard --entity NAME [--project minrnn]` saves it, given a key.

The key is wandb's own (`wandb login`, or WANDB_API_KEY). Runs made offline are sent with `wandb sync outputs/wandb/*`.
"""

import argparse
import sys

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

GROUPED = {"groupby": "group", "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}


def panels() -> dict[str, list]:
    """The dashboard's panels by section. A line is the mean over a group of seeds, in a band from least to largest."""

    def line(title: str, name: str, x: str = "Step", **options) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=x, y=[name], **GROUPED, **options)

    return {
        "Selective copying": [
            line("Validation accuracy", "val_accuracy", range_y=(0, 1)),
            line("Validation accuracy by tokens seen", "val_accuracy", x="tokens", range_y=(0, 1)),
            line("Validation loss", "val_loss"),
            line("Training loss", "train_loss", smoothing_factor=0.6, smoothing_type="exponential"),
            wr.BarPlot(title="Test accuracy, last", metrics=["last/test_accuracy"], **GROUPED),
            wr.BarPlot(title="Test accuracy, best", metrics=["best/test_accuracy"], **GROUPED),
        ],
        "Character model": [
            line("Validation loss, random blocks", "val_loss"),
            line("Validation loss by wall time", "val_loss", x="Relative Time (Process)"),
            wr.BarPlot(title="Loss of all validation text, last", metrics=["last/test_loss"], **GROUPED),
            wr.BarPlot(title="Loss of all validation text, best", metrics=["best/test_loss"], **GROUPED),
        ],
        "Training": [line("Learning rate", "learning_rate"), wr.RunComparer(diff_only="split")],
    }


def workspace(entity: str, project: str) -> ws.Workspace:
    sections = [ws.Section(name=name, panels=found, is_open=True) for name, found in panels().items()]
    return ws.Workspace(entity=entity, project=project, name="minrnn", sections=sections)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="minrnn", help="(minrnn)")
    arguments = parser.parse_args()
    if not wandb.login(prompt=False):
        print("error: no wandb key; set WANDB_API_KEY or `wandb login`, then run this again", file=sys.stderr)
        return 1
    print(workspace(arguments.entity, arguments.project).save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
