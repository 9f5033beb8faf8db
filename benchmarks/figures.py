"""From the rounds of a case to the figures that are told: medians, ratios, shares of the machine's peak.

In: a result as `extraction.py` measured it, with its rounds. Out: its `figures`; pure arithmetic. A ratio is one of
medians; the same ratio in every round says how sure it is. Sides are the names of `SIDES`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from work import padding_waste

OURS, BARE = "jax_extract", "bare_forward"
PEERS = ("huggingface", "nnsight", "transformer_lens", "sae_lens")
SIDES = (OURS, BARE, *PEERS)
PEAKS = ("xla", "torch")


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Speeds are real tokens a second; shares, padding and `others` from 0 to 1; memory in bytes; peaks in FLOP/s."""
    rounds = result["rounds"]
    sides = [side for side in SIDES if all(side in r["sides"] for r in rounds)]
    told = {side: [r["sides"][side] for r in rounds] for side in sides}
    by_round = {side: [a["tokens"] / a["seconds"] for a in answers] for side, answers in told.items()}
    speed = {side: statistics.median(values) for side, values in by_round.items()}
    peaks = {peak: statistics.median(r["peaks"][peak] for r in rounds) for peak in PEAKS if peak in rounds[0]["peaks"]}
    flops_per_token = result["flops"] / result["tokens"]
    others = [side for side in sides if side != OURS]
    figures: dict[str, Any] = {
        "tokens_per_second": speed,
        "tokens_per_second_by_round": by_round,
        "ratio": {side: speed[OURS] / speed[side] for side in others},
        "ratio_by_round": {
            side: [ours / other for ours, other in zip(by_round[OURS], by_round[side], strict=True)] for side in others
        },
        "peak": peaks,
        "share_of_peak": {
            peak: {side: value * flops_per_token / flops for side, value in speed.items()}
            for peak, flops in peaks.items()
        },
        "padding": {side: padding_waste(a[0]["tokens"], a[0]["slab_tokens"]) for side, a in told.items()},
        "peak_memory": {side: max(a["peak_memory"] for a in answers) for side, answers in told.items()},
        "others": {side: statistics.median(a["others"] for a in answers) for side, answers in told.items()},
        "best_peer": max((side for side in sides if side in PEERS), key=lambda side: speed[side], default=None),
    }
    if BARE in sides:
        figures["cost_over_bare"] = speed[BARE] / speed[OURS] - 1
        # It shares our process, and takes less than we do.
        del figures["peak_memory"][BARE]
    return figures
