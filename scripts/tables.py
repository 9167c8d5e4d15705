"""Tables from records alone: `python -m scripts.tables`. Needs no torch."""

from experiments.launch import command
from scripts.draw import pages, tables

if __name__ == "__main__":
    command(pages.main, tables)
