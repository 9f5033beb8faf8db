"""What happened to the input on its way: counts, and a hash of what was given.

In: samples, a chunk at a time. Out: `InputCounts`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.tokenizing.encoder import Encoded

_EMPTY_NAMED = 20  # how many samples without a token are named; the rest are counted


@dataclass
class InputCounts:
    """Filled while the samples are read.

    `dataset_hash` is over the ids and texts of the samples with tokens, in input order: `chained`, sha256 again for
    each sample, as the first runs have it; else see `DatasetHash`. `opened_samples` are texts that began with
    `opening`, which the tokenizer puts before every text, and got no second one. `clock_text` is what the chat
    template was told when it asked for the time. `closed_samples` are conversations in which the assistant has the
    last word, so that nothing is asked at their end.
    """

    samples: int = 0
    tokens: int = 0
    truncated_samples: int = 0
    truncated_tokens: int = 0
    longest_sample: int = 0
    empty_samples: int = 0
    first_empty_samples: list[str] = field(default_factory=list)
    dataset_hash: str = ""
    opened_samples: int = 0
    opening: str = ""
    clock_text: str | None = None
    closed_samples: int = 0
    chained: bool = True

    def __post_init__(self) -> None:
        self._hash = DatasetHash()

    def as_json(self) -> dict[str, Any]:
        """What a plan keeps of them: what is newer than the first plans, only where there is any of it."""
        said = dataclasses.asdict(self)
        del said["opening"], said["clock_text"], said["closed_samples"], said["chained"]
        if not self.opened_samples:
            del said["opened_samples"]
        return said

    def add(self, sample: TokenizedSample, text: str) -> None:
        """`text` is whatever the source gave."""
        self.add_samples(np.array([sample.length]), np.array([sample.full_length]), [sample.sample_id], [text])

    def add_samples(
        self, lengths: np.ndarray, full_lengths: np.ndarray, names: Sequence[str], contents: Sequence[str]
    ) -> None:
        """Of samples with tokens.

        Args:
          lengths: [samples] tokens of each.
          full_lengths: [samples] tokens of each before truncation.
          names: their ids.
          contents: whatever the source gave.
        """
        if not len(lengths):
            return
        self.samples += len(lengths)
        self.tokens += int(lengths.sum())
        self.truncated_samples += int((lengths < full_lengths).sum())
        self.truncated_tokens += int((full_lengths - lengths).sum())
        self.longest_sample = max(self.longest_sample, int(full_lengths.max()))
        if self.chained:
            for name, content in zip(names, contents, strict=True):
                chained = f"{self.dataset_hash}\n{name}\n{content}"
                self.dataset_hash = hashlib.sha256(chained.encode("utf-8", "surrogatepass")).hexdigest()
        else:
            self._hash.add(names, contents)
            self.dataset_hash = self._hash.hexdigest()

    def take(self, encoded: Encoded) -> None:
        """Of a chunk: what was done to its texts."""
        self.opened_samples += encoded.opened
        self.opening = self.opening or encoded.opening
        self.closed_samples += encoded.closed
        self.clock_text = self.clock_text or encoded.clock_text

    def leave_out(self, sample_id: str) -> None:
        self.empty_samples += 1
        if len(self.first_empty_samples) < _EMPTY_NAMED:
            self.first_empty_samples.append(sample_id)


class DatasetHash:
    """sha256 over what was given, however it is cut into chunks.

    It is of three others: of the lengths in characters (int64, little-endian, of the id and of the text of each
    sample), of the ids and of the texts (UTF-8, one behind the other).
    """

    def __init__(self) -> None:
        self._of = [hashlib.sha256() for _ in range(3)]

    def add(self, names: Sequence[str], contents: Sequence[str]) -> None:
        lengths = np.empty((len(names), 2), "<i8")
        lengths[:, 0] = np.fromiter(map(len, names), np.int64, len(names))
        lengths[:, 1] = np.fromiter(map(len, contents), np.int64, len(contents))
        pieces = [lengths.tobytes(), *("".join(texts).encode("utf-8", "surrogatepass") for texts in (names, contents))]
        for total, piece in zip(self._of, pieces, strict=True):
            total.update(piece)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(total.digest() for total in self._of)).hexdigest()
