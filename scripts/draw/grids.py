"""A grid of cells, header and lines, as text in markdown, csv and LaTeX. Needs no torch."""

import csv
import io
import re
from collections.abc import Iterable, Sequence

Grid = tuple[list[str], list[list[str]]]


def as_markdown(header: list[str], lines: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """The grid in markdown, aligned in the source too: to the right, except for the columns `left`."""
    widths = [max(2, *(len(line[i]) for line in (header, *lines))) for i in range(len(header))]
    pad = [str.ljust if i in left else str.rjust for i in range(len(header))]
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells):
        return "| " + " | ".join(f(cell, width) for f, cell, width in zip(pad, cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(rule), *map(line, lines)])


def as_csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *lines])
    return out.getvalue()


def number(value: float | None) -> str:
    """The number as a csv has it, not rounded as for readers."""
    return "" if value is None else f"{value:.10g}"


def as_latex(header: list[str], lines: list[list[str]], caption: str, label: str) -> str:
    rows = [" & ".join(map(_escape, line)) + r" \\" for line in (header, *lines)]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape(caption)}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {char: "\\" + char for char in "&%$#_{}"} | {"±": r"$\pm$", "†": r"$^\dagger$"}
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", "".join(special.get(char, char) for char in text))
