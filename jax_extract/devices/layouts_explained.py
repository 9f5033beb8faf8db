"""What the planner counted, as lines for a person.

In: a `Decision` and the counts it rests on. Out: text: a line a layout, of one device and step, and what would turn
the choice.
"""

from __future__ import annotations

from jax_extract.devices.planner import Decision, ModelCounts, tensor_wins_below
from jax_extract.terminal import bytes_text, milliseconds_text, share_text


def explain(decision: Decision, counts: ModelCounts, model: int, share_of_peak: float) -> list[str]:
    """`model` is how many places that axis of the mesh has."""
    lines = [f"{'layout':<14} {'stored':>9} {'memory':>9} {'arrives':>9} {'compute':>9} {'HBM':>9} {'moving':>9}  step"]
    for cost in decision.costs:
        sizes = [bytes_text(size) for size in (cost.stored, cost.memory, cost.moved)]
        moving = cost.moving_seconds + cost.waiting_seconds
        times = [milliseconds_text(t) for t in (cost.compute_seconds, cost.memory_seconds, moving, cost.seconds)]
        why = "; ".join(filter(None, ("" if cost.fits else "does not fit", cost.refused)))
        lines.append(
            f"{cost.name:<14} "
            + " ".join(f"{text:>9}" for text in (*sizes, *times[:3]))
            + f"  {times[3]}"
            + (f"; {why}" if why else "")
        )
    lines.append(f"counted before compiling, at {share_text(share_of_peak)} of the peak")
    if model > 1:
        below = tensor_wins_below(counts, model)
        lines.append(f"tensor would move less than gathered below {below:,.0f} tokens a device and step")
    return lines
