"""The report from records alone: `python -m scripts.report`. Needs no torch."""

from experiments.launch import command
from scripts.draw import pages, report

if __name__ == "__main__":
    command(pages.main, report)
