"""Hooks of mkdocs (see mkdocs.yml), as pages link to the repository as it lies on disk.

Figures of results/ come into the site; links to other files outside docs/ go to the public repository.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = "https://github.com/minrnn/minrnn/blob/main/"
FIGURES = Path("results/figures")
OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")  # of docs/


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(FIGURES.glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path.resolve())))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    return OUTSIDE.sub(_inside, _apart(markdown))


def _inside(match: re.Match) -> str:
    path = Path(match[1])
    return f"](figures/{path.name})" if path.parent == FIGURES else f"]({SOURCE}{match[1]})"


def _apart(markdown: str) -> str:
    """The page with the blank lines that Python-Markdown needs between a comment and a table or list."""
    return re.sub(r"^(<!-- /?[\w:]+ -->)$", r"\n\1\n", markdown, flags=re.MULTILINE)
