"""The style of all figures."""

from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers tell them apart without any.
STYLES = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": (0, (5, 2)), "marker": "s"},
    {"color": "#009E73", "linestyle": (0, (1, 1.2)), "marker": "^"},
    {"color": "#CC79A7", "linestyle": (0, (6, 2, 1, 2)), "marker": "D"},
    {"color": "#555555", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#E69F00", "linestyle": (0, (8, 2, 1, 2, 1, 2)), "marker": "P"},
)
SETTINGS = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.title_fontsize": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
}


def head(ax: Axes, title: str, columns: int = 3) -> None:
    """Puts title and legend above the axes, where no line can run through them."""
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
    ax.legend(title=title, ncols=columns, alignment="left", columnspacing=1.2, **place)
