"""Figures from records alone: `python -m scripts.figures`. Needs no torch."""

from experiments.launch import command
from scripts.draw import figures, pages

if __name__ == "__main__":
    command(pages.main, figures)
