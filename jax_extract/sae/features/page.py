"""The page: one HTML file with everything in it, which asks no network for anything.

In: features, the texts of tokens. Out: the file's text. Data lie in it as JSON, and the page's script puts every text
of a token, of a sample or of a name in as text, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from jax_extract.sae.features.contexts import Context
from jax_extract.sae.features.feature import Feature, Neighbour

_DIGITS = 4


class _Numbers:
    """Numbers for things that are named often."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}

    def __call__(self, thing: int) -> int:
        return self.of.setdefault(thing, len(self.of))


def page(
    title: str,
    facts: Sequence[str],
    features: Sequence[Feature],
    density: tuple[np.ndarray, np.ndarray],
    sample_ids: Sequence[str],
    token_texts: Any,
) -> str:
    """Args:
    density: edges (log10 of a share) and counts, over all latents.
    token_texts: a function of token ids int32 [n] that gives their texts.
    """
    tokens, samples = _Numbers(), _Numbers()
    told = [_feature(feature, tokens, samples) for feature in features]
    edges, counts = density
    data = {
        "title": title,
        "facts": list(facts),
        "density": {"edges": edges.tolist(), "counts": counts.tolist()},
        "matched": any(feature.matches for feature in features),
        "features": told,
        "tokens": list(token_texts(np.array(list(tokens.of), np.int32))),
        "samples": [sample_ids[place] for place in samples.of],
    }
    template = (files("jax_extract.sae.features") / "page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", as_json(data))


def as_json(data: Any) -> str:
    """JSON that may lie in a script element."""
    said = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return said.replace("<", "\\u003c")


def rounded(value: float) -> float:
    """To so many digits as are read."""
    return float(f"{value:.{_DIGITS}g}")


def _feature(feature: Feature, tokens: _Numbers, samples: _Numbers) -> dict[str, Any]:
    logits = feature.logits

    def of_context(context: Context) -> list[Any]:
        active = [[int(i), rounded(float(context.values[i]))] for i in np.flatnonzero(context.values)]
        return [
            *(samples(context.sample), context.begin, [tokens(int(token)) for token in context.tokens]),
            *(active, context.peak),
        ]

    def of_logits(ids: np.ndarray, values: np.ndarray) -> list[list[Any]]:
        return [[tokens(int(i)), rounded(float(value))] for i, value in zip(ids, values, strict=True)]

    return {
        "i": feature.latent,
        "d": rounded(feature.density),
        "m": rounded(feature.largest),
        "h": feature.counts.tolist(),
        "m0": rounded(float(feature.edges[-1])),
        "pos": [] if logits is None else of_logits(logits.most, logits.most_values),
        "neg": [] if logits is None else of_logits(logits.least, logits.least_values),
        "near": _pairs(feature.nearest),
        "co": _pairs(feature.together),
        "seeds": [[each.of, each.latent, rounded(each.value)] for each in feature.matches],
        "top": [of_context(context) for context in feature.top],
        "groups": [
            [rounded(group.least), rounded(group.most), [of_context(context) for context in group.contexts]]
            for group in feature.groups
        ],
    }


def _pairs(neighbours: Sequence[Neighbour]) -> list[list[Any]]:
    return [[each.latent, rounded(each.value)] for each in neighbours]
