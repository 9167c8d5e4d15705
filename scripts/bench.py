"""`make bench`: scans, layers, training steps and a policy on this machine, beside others' and beside a copy.

    python -m scripts.bench [key=value ...]      settings of experiments.efficiency: profile=paper device=cpu budget=600

Each part is an ordinary run of experiments.efficiency (profile paper on a GPU, else cpu), done once for a machine;
tables and figures are then drawn anew. What is removed from results/runs/efficiency is measured again.
"""

import argparse
import subprocess
import sys

from experiments.launch import UNFINISHED
from scripts import tables
from scripts.efficiency import BENCH
from scripts.reproduce import has_gpu


def command(settings: list[str], profile: str, parts: tuple[str, ...] = BENCH) -> list[str]:
    """What measures these parts; settings come last and win."""
    chosen = [] if any(setting.startswith("profile=") for setting in settings) else [f"profile={profile}"]
    return [sys.executable, "-m", "experiments.efficiency", "-m", f"part={','.join(parts)}", *chosen, *settings]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", default="results", help="holds runs/; files are written here (results)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of experiments.efficiency")
    arguments = parser.parse_args()
    settings = [f"results_dir={arguments.results_dir}", *arguments.settings]
    code = subprocess.run(command(settings, "paper" if has_gpu() else "cpu")).returncode
    if code in (0, UNFINISHED):
        for module in ("tables", "figures"):
            subprocess.run(
                [sys.executable, "-m", f"scripts.{module}", "--results-dir", arguments.results_dir], check=True
            )
    return code


if __name__ == "__main__":
    tables.command(main)
