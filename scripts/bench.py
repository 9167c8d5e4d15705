"""`make bench`: times scans, layers, training steps and a policy here, beside other libraries' and beside a copy.

    python -m scripts.bench [key=value ...]      settings of experiments.efficiency: profile=paper device=cpu budget=600

Each part is an ordinary run of experiments.efficiency (profile paper on a GPU, else cpu), done once per machine;
tables and figures are then drawn anew. A record removed from results/runs/efficiency is measured again.
"""

import argparse
import subprocess

from experiments import launch
from experiments.grid import efficiency
from scripts.draw import figures, pages, tables
from scripts.planner.agenda import has_gpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", default="results", help="holds runs/; files are written here (results)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of experiments.efficiency")
    arguments = parser.parse_args()
    settings = [f"results_dir={arguments.results_dir}", *arguments.settings]
    command = efficiency.command(efficiency.BENCH, "paper" if has_gpu() else "cpu", settings)
    code = subprocess.run(command).returncode
    if code in (0, launch.UNFINISHED):
        for drawn in (tables, figures):
            pages.draw(drawn, arguments.results_dir)
    return code


if __name__ == "__main__":
    launch.command(main)
