"""The name that was probably meant, where one is near.

In: a word, and the names there are. Out: one of them, or None: a suggestion from afar is worse than none.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Of the letters of both: a slip or two in a word leaves 0.8 and more, words that only look alike reach 0.6.
_NEAR = 0.7


def nearest(word: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=_NEAR)), None)
