#!/usr/bin/env python3
"""docs/performance.md and its plot, from the results that are committed.

    python benchmarks/report.py              writes the page and the plot (pip install -e '.[plots]' first)
    python benchmarks/report.py --no_plot    the page alone
    python benchmarks/report.py --results F  prints the tables of the results in folder F, and writes nothing

In: benchmarks/results/*.json and benchmarks/performance.template.md, where the words are. Out: docs/performance.md,
where nobody writes by hand, and docs/performance/speed.svg. `table` is what `extraction.py` prints of one case.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import BARE, OURS, PEERS, SIDES
from machine import title

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jax_extract.terminal import plural, ranges_text

RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = ROOT / "benchmarks" / "performance.template.md"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance" / "speed.svg"

Result = Mapping[str, Any]

_LABELS = {
    OURS: "jax_extract",
    BARE: "  bare forward",
    "huggingface": "Hugging Face",
    "nnsight": "nnsight",
    "transformer_lens": "TransformerLens",
    "sae_lens": "SAELens",
}
_NONE = "-"  # what was not measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_plot", action="store_true", help="leave the plot as it is")
    parser.add_argument("--results", type=Path, help="print the tables of another folder's results instead")
    args = parser.parse_args()
    if args.results:
        print("\n\n".join(table(result) for result in read_results(args.results)))
        return 0
    results = read_results(RESULTS)
    PAGE.write_text(page(TEMPLATE.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(results)} cases")
    if not args.no_plot:
        plot(results, PLOT)
        print(PLOT.relative_to(ROOT))
    return 0


def read_results(folder: Path) -> list[Result]:
    """By model and workload, float32 first; all positions before the last ones, many layers before one."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(results, key=_place)


def _place(result: Result) -> tuple[Any, ...]:
    case = result["case"]
    return (
        case["model"],
        case["workload"],
        case["dtype"] != "float32",
        case["positions"] != "all",
        -len(case["layers"]),
        not case["writes"],
    )


def headline(result: Result) -> str:
    """`arc1024, qwen2.5-0.5b, float32, layers 10-23, positions all`."""
    case = result["case"]
    layers = case["layers"]
    kept = f"layer{'s' if len(layers) > 1 else ''} {ranges_text(layers)}, positions {case['positions']}"
    unwritten = "" if case["writes"] else ", nothing written"
    return f"{case['workload']}, {case['model']}, {case['dtype']}, {kept}{unwritten}"


# -------------------------------------------------------------------------------------------- a table


def table(result: Result) -> str:
    """One case as text: who, how fast, of what, and the rest in sentences."""
    figures = result["figures"]
    longest = f", longest {result['longest']:,}" if "longest" in result else ""
    lines = [
        f"{headline(result)}: {result['case']['prompts']} prompts, {result['tokens']:,} real tokens{longest}",
        f"{title(result['machine'])}; " + ", ".join(f"{name} {v}" for name, v in result["versions"].items()),
        _limits(result),
        "",
        f"{'':<17}{'tokens/s':>9}{'of peak':>9}{'padding':>9}{'memory':>9}{'others':>8}{'row error':>11}"
        f"{'ours is':>9}   by round",
    ]
    lines += [_line(result, side) for side in SIDES if side in figures["tokens_per_second"]]
    lines += [f"{_LABELS[side]:<17} cannot: {reason}" for side, reason in sorted(result.get("cannot", {}).items())]
    return "\n".join([*lines, "", *_sentences(result)])


def _limits(result: Result) -> str:
    peaks = result["figures"]["peak"]
    named = {"xla": "XLA", "torch": "torch"}
    said = "peak of matrix products: " + ", ".join(f"{named[k]} {v / 1e9:.0f} GFLOP/s" for k, v in peaks.items())
    disk = result.get("disk_bytes_per_second")
    return said + (f"; raw disk {disk / 1e9:.2f} GB/s" if disk else "")


def _line(result: Result, side: str) -> str:
    figures = result["figures"]
    memory = _of(figures, "peak_memory", side)
    error = result.get("row_errors", {}).get(side, {}).get("max")
    ratio = figures["ratio"].get(side)
    rounds = ", ".join(f"{value:.2f}" for value in figures["ratio_by_round"].get(side, []))
    line = (
        f"{_LABELS[side]:<17}{figures['tokens_per_second'][side]:>9.1f}"
        f"{_share(figures['share_of_peak']['xla'].get(side)):>9}{_share(_of(figures, 'padding', side)):>9}"
        f"{_NONE if memory is None else f'{memory / 1e9:.2f}GB':>9}{_whole(_of(figures, 'others', side)):>8}"
        f"{_NONE if error is None else f'{error:.1e}':>11}"
    )
    return line if ratio is None else f"{line}{ratio:>9.2f}   {rounds}"


def _sentences(result: Result) -> list[str]:
    figures = result["figures"]
    said = []
    if best := figures["best_peer"]:
        said.append(f"best peer: {_LABELS[best]}; jax_extract is {figures['ratio'][best]:.2f} times as fast")
    if (cost := figures.get("cost_over_bare")) is not None:
        said.append(f"capturing, copying and writing cost {cost:.1%} over the bare forward")
    if "torch" in figures["peak"]:
        share = figures["share_of_peak"]["torch"][OURS]
        said.append(f"of torch's own peak, jax_extract reaches {share:.1%}")
    if (seconds := result.get("compile_seconds")) is not None:
        shapes = plural(result["shapes"], "slab shape") if "shapes" in result else "the slab shapes"
        said.append(f"compiling {shapes} took {seconds:.1f} s, once")
    if first := result.get("first_batch"):
        cold, warm = first["cold"], first["warm"]
        said += [
            f"first batch on its way {_start(cold, 'on_its_way')} after the process began, captured after "
            f"{_start(cold, 'captured')} (others: {cold['others']:.0%})",
            f"with a warm compilation cache {_start(warm, 'on_its_way')} and {_start(warm, 'captured')} "
            f"(others: {warm['others']:.0%})",
        ]
    return said


def _start(first: Mapping[str, float], moment: str) -> str:
    return f"{first[moment]:.1f} s"


def _of(figures: Mapping[str, Any], name: str, side: str) -> float | None:
    return figures.get(name, {}).get(side)


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1%}"


def _whole(value: float | None) -> str:
    return _NONE if value is None else f"{value:.0%}"


# --------------------------------------------------------------------------------------------- the page


def page(template: str, results: Sequence[Result]) -> str:
    """The template with its figures; UserError is not for it: a name that it lacks is a mistake of ours."""
    parts = {"summary": summary(results), "tables": "\n\n".join(map(_section, results))}
    for name, text in parts.items():
        mark = f"{{{{{name}}}}}"
        if template.count(mark) != 1:
            raise ValueError(f"the template must have {mark} once")
        template = template.replace(mark, text)
    return template


def summary(results: Sequence[Result]) -> str:
    """A Markdown table, a line a case."""
    head = (
        "| case | prompts | jax_extract | best peer | times its speed | of XLA's peak | padding | over bare forward |"
    )
    lines = [head, "|---|--:|--:|---|--:|--:|--:|--:|"]
    for result in results:
        figures = result["figures"]
        best = figures["best_peer"]
        peer = f"{_LABELS[best]}, {figures['tokens_per_second'][best]:,.0f}" if best else _NONE
        ratio = f"**{figures['ratio'][best]:.2f}**" if best else _NONE
        cells = (
            headline(result),
            result["case"]["prompts"],
            f"{figures['tokens_per_second'][OURS]:,.0f}",
            peer,
            ratio,
            _share(figures["share_of_peak"]["xla"][OURS]),
            _share(_of(figures, "padding", OURS)),
            _share(figures.get("cost_over_bare")),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _section(result: Result) -> str:
    parts = [f"### {headline(result)}"]
    if "note" in result:
        parts.append(result["note"])
    parts.append(f"On {result['date']}:")
    if "command" in result:
        parts.append(f"```bash\n.venv/bin/python {result['command']}\n```")
    return "\n\n".join([*parts, f"```\n{table(result)}\n```"])


# --------------------------------------------------------------------------------------------- the plot

_INK, _QUIET, _LINE = "#1f2328", "#57606a", "#d0d7de"
_COLOURS = {OURS: "#0969da", BARE: "#b6d4fb"} | dict.fromkeys(PEERS, "#afb8c1")
_BAR, _GAP = 0.26, 0.5  # inches: of a bar with its space, between cases
_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH = 1.6, 0.4, 0.9, 0.65, 9.0


def plot(results: Sequence[Result], path: Path) -> None:
    """Horizontal bars, a group a case: the share of XLA's own peak that real tokens reach, the peak as a line."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    groups = [(result, [s for s in SIDES if s in result["figures"]["share_of_peak"]["xla"]]) for result in results]
    inches = sum(len(sides) * _BAR + _GAP for _, sides in groups)
    height = inches + _TOP + _BOTTOM
    with mpl.rc_context({"svg.hashsalt": "jax_extract", "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        width = (_WIDTH - _LEFT - _RIGHT) / _WIDTH
        axes = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / height, width, inches / height))
        at = 0.0
        for result, sides in groups:
            at += _GAP
            axes.text(0, at - 0.12, headline(result), weight="bold", color=_INK, va="bottom")
            for side in sides:
                _bar(axes, result, side, at)
                at += _BAR
        top = max((max(r["figures"]["share_of_peak"]["xla"].values()) for r, _ in groups), default=1.0)
        axes.set_xlim(0, max(112, 100 * top + 22))
        axes.set_ylim(inches, 0)
        axes.axvline(100, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(100, -0.04, "the machine's own matrix products", color=_QUIET, ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(0, 101, 20), [f"{share} %" for share in range(0, 101, 20)], color=_QUIET)
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.grid(axis="x", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        for edge in axes.spines.values():
            edge.set_visible(False)
        axes.set_xlabel("share of XLA's matrix-product peak that real tokens reach, files written", color=_QUIET)
        figure.text(0.02, 1 - 0.38 / height, "Real tokens a second, side by side", weight="bold", size=13, color=_INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def _bar(axes: Any, result: Result, side: str, at: float) -> None:
    figures = result["figures"]
    share = 100 * figures["share_of_peak"]["xla"][side]
    speed = f"{figures['tokens_per_second'][side]:,.0f} tokens/s"
    ratio = figures["ratio"].get(side)
    text = f"{speed}   ours ×{ratio:.2f}" if ratio is not None and side != BARE else speed
    axes.barh(at, share, height=_BAR * 0.78, align="edge", color=_COLOURS[side])
    middle = at + _BAR * 0.39
    weight = "bold" if side == OURS else "normal"
    axes.text(-1.2, middle, _LABELS[side].strip(), ha="right", va="center", color=_INK, weight=weight)
    axes.text(share + 1, middle, text, va="center", color=_INK if side == OURS else _QUIET, fontsize=8, weight=weight)


if __name__ == "__main__":
    sys.exit(main())
