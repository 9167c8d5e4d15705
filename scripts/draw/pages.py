"""The pages for readers, README.md and docs/*.md, and the one function that renews what is generated in them.

A generated block stands between `<!-- NAME -->` and `<!-- /NAME -->`, each mark on a line of its own. `scripts.tables`
makes `table:...`, `scripts.report` makes `found:...` and `figure:...`. CONTRIBUTING.md says
how to add one. Needs no torch.
"""

import argparse
import re
from pathlib import Path
from types import ModuleType

from experiments import files

MARK = re.compile(r"^<!-- ([\w:]+) -->$", re.MULTILINE)


def pages() -> list[Path]:
    """The pages in the working directory."""
    return [path for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))) if path.exists()]


def marks(text: str) -> list[str]:
    """The names of a page's blocks, in order."""
    return MARK.findall(text)


def renew(name: str, text: str) -> None:
    """Puts the text between the marks of this name, in every page that has them."""
    block = re.compile(rf"(^<!-- {re.escape(name)} -->\n).*?(^<!-- /{re.escape(name)} -->$)", re.DOTALL | re.MULTILINE)
    content = text.strip() + "\n" if text.strip() else ""
    for path in pages():
        write(path, block.sub(lambda match: match[1] + content + match[2], path.read_text()))


def write(path: Path, content: str) -> None:
    """Writes a file atomically, and only if it changes, as several planners renew the same files."""
    if path.exists() and path.read_text() == content:
        return
    files.write(path, content)


def main(drawn: ModuleType) -> None:
    """Runs the command of tables, figures or report."""
    parser = argparse.ArgumentParser(description=drawn.__doc__.splitlines()[0])
    parser.add_argument("--results-dir", default="results", help="holds runs/; files are written here (results)")
    draw(drawn, parser.parse_args().results_dir)


def draw(drawn: ModuleType, results_dir: str) -> None:
    """Writes all files, and renews the pages if the results folder is theirs."""
    for path in drawn.write_all(results_dir):
        print(path)
    if results_dir == "results" and hasattr(drawn, "blocks"):
        for name, text in drawn.blocks(results_dir).items():
            renew(name, text)
