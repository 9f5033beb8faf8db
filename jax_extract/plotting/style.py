"""How every picture looks: paper, ink, colours that the colour-blind and a grey printer tell apart, and the files.

In: a title, a caption, sizes in inches. Out: a matplotlib `Figure`, of no window and no global state; PNG and SVG.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, LogLocator

INK, QUIET, LINE = "#202020", "#5c5c5c", "#dcdcdc"
# Okabe and Ito (2008), in an order in which neighbours differ in lightness; a marker each, for print without colour.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#d55e00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OTHERS = "#c4c4c4"
DEPTH = "cividis"  # its lightness grows evenly, so that it is read in grey as in colour
_LIGHTEST = 0.92  # of DEPTH, on white paper
_DPI = 160
_HEAD = 0.84  # inches above the axes
_NARROWEST, _CAPTION_LETTERS = 6.2, 15  # inches, letters of the caption to an inch
_FONT = "DejaVu Sans"  # comes with matplotlib, so that files are the same everywhere
_SETTINGS: Any = {
    "font.family": _FONT,
    "font.size": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a token may be a dollar
    "svg.hashsalt": "jax_extract",
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    with mpl.rc_context(_SETTINGS):
        yield


def new_figure(title: str, caption: str, width: float, height: float) -> Figure:
    """A figure with a title, what it is of, and room for axes below; no narrower than its title is."""
    width = max(width, _NARROWEST)
    figure = Figure(figsize=(width, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - _HEAD / height), w_pad=0.1, h_pad=0.08)
    figure.text(0.12 / width, 1 - 0.16 / height, title, size=12, weight="bold", color=INK, va="top")
    wrapped = textwrap.fill(caption, int(width * _CAPTION_LETTERS))
    figure.text(0.12 / width, 1 - 0.44 / height, wrapped, size=8, color=QUIET, va="top", linespacing=1.5)
    return figure


def grid(axes: Axes, axis: Any = "both") -> None:
    axes.grid(axis=axis, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def log_axis(axes: Axes, which: str, values: Any, room: float = 1.15) -> None:
    """A logarithmic axis whose numbers are written out, around `values`."""
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found) & (found > 0)]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    if not len(found):
        return
    low, high = found.min() / room, found.max() * room
    axes.set(**{f"{which}lim": (low, high)})
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))  # noqa: PLR2004
    axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def number_text(value: float) -> str:
    """`0.02`, `5`, `24,000`."""
    return f"{value:,.0f}" if value >= 1 else f"{value:.6f}".rstrip("0").rstrip(".")


def depth_colours(count: int) -> list[Any]:
    """From the first layer, dark, to the last, light."""
    return list(mpl.colormaps[DEPTH](np.linspace(0, _LIGHTEST, count)))


def depth_bar(figure: Figure, axes: Any, layers: Sequence[str]) -> None:
    """Beside the axes: which colour of `depth_colours` is which layer."""
    colours = ListedColormap(depth_colours(len(layers)))
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="layer", fraction=0.04, pad=0.02)
    bar.set_ticks(list(range(len(layers))), labels=list(layers))
    bar.ax.tick_params(length=0)


def token_text(text: str, most: int = 24) -> str:
    """A token as it can be seen: as a label, with spaces as ␣."""
    return label_text(text.replace(" ", "␣"), most)


def label_text(text: str, most: int = 24) -> str:
    """On one line and no longer than `most`: line breaks as \\n, letters that the font lacks as \\u…."""
    seen = text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    cut = seen if len(seen) <= most else f"{seen[: most - 1]}…"
    return "".join(letter if ord(letter) in _letters() else f"\\u{ord(letter):04x}" for letter in cut)


@cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(findfont(FontProperties(family=_FONT))).get_charmap())


def save_picture(figure: Figure, path: Path) -> list[Path]:
    """Writes `path`.png and `path`.svg; the same picture gives the same bytes, with the same matplotlib."""
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file, metadata in zip(files, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        with styled():
            figure.savefig(file, dpi=_DPI, facecolor="white", metadata=metadata)
    return files
