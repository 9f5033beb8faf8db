"""How the tokens of a text become one row: a mean, without the first token unless it is asked for, or the last token.

In: a word, as the user gave it; folders that hold representations already. Out: the positions that are kept, in words
too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.ledger import RUN_FILE, Ledger
from jax_extract.store.storage.opening import open_storage
from models.positions import Positions

# The first token of a decoder is an attention sink: its residual stream may be a hundred times as long as that of any
# other token, and next to the same for every text, so that a mean with it in it says little of the text.
DEFAULT_POOLING = "mean_from:1"

_POOLINGS = "mean_from:k (from token k on, counted from 0), mean, last"


def pooling_of(word: str) -> str:
    """`mean`, `last`, `mean_from:1`, as it is written everywhere; UserError for what gives no row a text."""
    try:
        positions = Positions.parse(word)
    except UserError:
        positions = None
    if positions is None or not positions.one_row_per_sample:
        raise UserError(f"pooling {word!r} is none of {_POOLINGS}")
    return str(positions)


def pooling_text(pooling: str) -> str:
    """In words, for metadata.json."""
    if pooling == "last":
        return "the last token of the text"
    left_out = Positions.parse(pooling).begins
    but = {0: "", 1: " but the first"}.get(left_out, f" but the first {left_out:,}")
    return f"mean over the tokens of the text{but}, special ones included, padding never"


def begun_with(folders: Iterable[str | Path]) -> str | None:
    """The pooling of what lies in these folders, finished or not, where all of it has the same; else None.

    What cannot be read is passed over: whoever needs it tells it.
    """
    found: set[str] = set()
    for folder in folders:
        storage = open_storage(folder)
        with contextlib.suppress(UserError), damage_is_told(str(folder), ""):
            if storage.exists(RUN_FILE):
                found.add(pooling_of(Ledger.open(storage).run["identity"]["positions"]))
    return found.pop() if len(found) == 1 else None
