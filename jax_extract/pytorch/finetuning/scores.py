"""Scores of answers: accuracy against the commonest class, exact match and F1.

In: answers that were given and right ones. Out: numbers. Exact match and F1 are those of SQuAD (Rajpurkar et al.,
"Know What You Don't Know", 2018): words without capitals, punctuation and articles; the best over the right answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from jax_extract.inputs.benchmarks import UNANSWERABLE

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def majority_share(labels: Sequence[int]) -> float:
    """How many of the labels are the commonest one: what always giving that one scores."""
    return max(Counter(labels).values()) / len(labels)


def p_value(right: int, samples: int, chance: float) -> float:
    """The probability that so many or more of the samples are right by chance: an exact binomial test, one-sided."""
    from scipy.stats import binomtest

    return float(binomtest(right, samples, chance, alternative="greater").pvalue)


def exact_match(given: str, answers: Sequence[str]) -> float:
    return max(float(_words(given) == _words(answer)) for answer in answers)


def f1(given: str, answers: Sequence[str]) -> float:
    return max(_f1(_words(given), _words(answer)) for answer in answers)


def _f1(given: list[str], answer: list[str]) -> float:
    if not given or not answer:  # nothing, as "unanswerable" counts, matches nothing but nothing
        return float(given == answer)
    if not (common := sum((Counter(given) & Counter(answer)).values())):
        return 0.0
    precision, recall = common / len(given), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    """None for "unanswerable"."""
    words = _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
    return [] if words == [UNANSWERABLE] else words
