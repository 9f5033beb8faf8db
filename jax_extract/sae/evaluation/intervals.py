"""Confidence intervals by sample: tokens of one text are not independent, so texts are resampled, not rows.

In: how a number comes from samples that are taken so many times each. Out: `Interval`: the number, and the percentile
interval of the bootstrap (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Bootstrap:
    """Attributes:
    times: float64 [resamples, samples], how often each sample is taken.
    """

    times: np.ndarray
    confidence: float

    @classmethod
    def of(cls, samples: int, resamples: int, confidence: float, seed: int) -> Bootstrap:
        chance = np.full(samples, 1 / samples)
        return cls(np.random.default_rng(seed).multinomial(samples, chance, resamples).astype(np.float64), confidence)

    def intervals(self, values: Callable[[np.ndarray], np.ndarray]) -> list[Interval]:
        """Of each of m numbers that `values` gives, float64 [t, m], of samples taken `times` float64 [t, samples]."""
        outside = 50 * (1 - self.confidence)
        with np.errstate(invalid="ignore", divide="ignore"):
            [of_all], resampled = values(np.ones((1, self.times.shape[1]))), values(self.times)
        low, high = np.nanpercentile(resampled, [outside, 100 - outside], axis=0)
        return [Interval(*map(float, three)) for three in zip(of_all, low, high, strict=True)]
