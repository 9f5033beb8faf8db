"""Documents joined into contexts of equal length, as sparse autoencoders are trained on them.

In: tokenized documents in the order of the input. Out: contexts of N tokens in place of them, each of which knows
which tokens are whose. Documents follow one another without a gap: a long one goes on in the next context, and none
is cut. What is left at the end is a shorter context.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.columns import Texts, joined, offsets_of
from jax_extract.inputs.token_table import TokenTable
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.tokenizing.passing import KnownDocuments

Token = Literal["bos", "eos", "none"]
_COUNTED_HERE = ("samples", "tokens", "longest_sample")


@dataclass(frozen=True)
class ContextForm:
    """What contexts are like.

    Attributes:
      tokens: of a context.
      start: the token id before every context; None for none.
      separator: the token id between two documents of one context; None for none.
    """

    tokens: int
    start: int | None
    separator: int | None

    @classmethod
    def of(cls, tokens: int, start: Token | None, separator: Token | None, tokenizer: Any) -> ContextForm:
        """The form that was asked for; where nothing was, BOS in both places, if the tokenizer has one.

        Raises:
          UserError: a token was asked for that the tokenizer lacks.
        """
        return cls(tokens, _token_id("start", start, tokenizer), _token_id("separator", separator, tokenizer))

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _token_id(place: str, wanted: Token | None, tokenizer: Any) -> int | None:
    if wanted == "none":
        return None
    found = getattr(tokenizer, "eos_token_id" if wanted == "eos" else "bos_token_id", None)
    if wanted is not None and found is None:
        others = "eos or none" if wanted == "bos" else "bos or none"
        raise UserError(
            f"--context_{place} {wanted} needs a tokenizer with such a token, and this model's has none; give {others}"
        )
    return None if found is None else int(found)


@dataclass
class ContextCounts(InputCounts):
    """Counts of contexts (`samples`, `tokens`, `longest_sample`), and of what they were made of (the rest).

    `added_tokens` are those that are of no document.
    """

    documents: int = 0
    added_tokens: int = 0

    def add_contexts(self, contexts: TokenTable, added: int) -> None:
        """`added`: how many of their tokens are of no document."""
        self.samples += len(contexts)
        self.tokens += len(contexts.token_ids)
        self.longest_sample = max(self.longest_sample, int(contexts.lengths.max(initial=0)))
        self.added_tokens += added

    def follow(self, documents: InputCounts) -> None:
        """Takes over what was counted of the documents that were read so far."""
        for entry in dataclasses.fields(InputCounts):
            if entry.name not in _COUNTED_HERE:
                setattr(self, entry.name, getattr(documents, entry.name))
        self.documents = documents.samples


class KnownContexts:
    """Contexts from the first one on that were made before; at least one.

    Attributes:
      count: of them.
      passed: tokens of the document in which the last one ends, up to there.
      documents: those before that document; counted while they are read.
    """

    def __init__(self, tables: Sequence[TokenTable]) -> None:
        self._tables = tables
        self._tokens = 0  # of pieces of documents
        self.count = sum(map(len, tables))
        last = json.loads(tables[-1].meta[len(tables[-1]) - 1])["pieces"][-1]
        self.passed: int = last["first"] + last["tokens"]
        self.documents = KnownDocuments(self._names(), last["document"])

    def _names(self) -> Iterator[str]:
        """Of the documents, each once, the last one left out."""
        before = None
        for meta in itertools.chain.from_iterable(table.meta for table in self._tables):
            for piece in json.loads(meta)["pieces"]:
                self._tokens += piece["tokens"]
                if piece["document"] != before and before is not None:
                    yield before
                before = piece["document"]

    def count_in(self, counts: ContextCounts) -> None:
        """Adds them, when the documents have been passed over."""
        for table in self._tables:
            counts.samples += len(table)
            counts.tokens += int(table.offsets[-1])
            counts.longest_sample = max(counts.longest_sample, int(table.lengths.max()))
        counts.added_tokens = counts.tokens - self._tokens


def join(
    documents: Iterable[TokenTable],
    form: ContextForm,
    counts: ContextCounts,
    read: InputCounts,
    known: KnownContexts | None = None,
) -> Iterator[TokenTable]:
    """Joins documents lazily: what a table of them fills is given before the next is read.

    A start or separator is left out where the next token of the document is the same token.

    Args:
      counts: of what is made.
      read: of the documents, filled while they are read.
      known: contexts with which they begin, which are not given again; `documents` begin with the one in which the
        last of these ends.

    Returns:
      Contexts `context:000001` and so on, with `pieces` in `meta`: for each piece of a document its id, where in the
      document it begins, how many tokens it has, where in the context they begin, and the document's own `meta`.
    """
    joiner = _Joiner(form, known.count, known.passed) if known else _Joiner(form)
    for table in documents:
        if known:
            known.count_in(counts)
            known = None
        made, added = joiner.take(table)
        counts.add_contexts(made, added)
        counts.follow(read)
        if len(made):
            yield made
    made, added = joiner.rest()
    counts.add_contexts(made, added)
    counts.follow(read)
    if len(made):
        yield made


class _Joiner:
    """What is held is of the context that is being filled."""

    def __init__(self, form: ContextForm, made: int = 0, passed: int = 0) -> None:
        self._form = form
        self._made = made  # contexts
        self._passed = passed  # tokens of the first document that are in these
        self._length = self._added = 0
        self._ids = np.zeros(0, np.int32)
        self._pieces = array("q")  # document, first, tokens and at of each
        self._names: Sequence[str] = Texts.of(())  # of their documents
        self._meta: Sequence[str] = Texts.of(())

    def take(self, documents: TokenTable) -> tuple[TokenTable, int]:
        """The contexts that become whole with these, and how many of their tokens are of no document."""
        whole, ids = self._form.tokens, documents.token_ids
        ends: list[int] = []  # pieces up to the end of each context
        places, between = array("q"), array("q")  # of what is put before which of the documents' tokens
        added = 0
        passed, self._passed = self._passed, 0
        for row, (start, end) in enumerate(itertools.pairwise(documents.offsets.tolist()), len(self._names)):
            at = start if start else passed
            while at < end:
                put = self._form.separator if self._length else self._form.start
                if put is not None and (at == start or not self._length) and put != ids[at]:
                    places.append(at)
                    between.append(put)
                    self._length += 1
                    self._added += 1
                if count := min(whole - self._length, end - at):
                    self._pieces.extend((row, at - start, count, self._length))
                    self._length += count
                    at += count
                if self._length == whole:
                    ends.append(len(self._pieces) // 4)
                    added += self._added
                    self._length = self._added = 0
        filled = np.insert(ids, np.array(places, np.int64), np.array(between, np.int32)) if places else ids
        self._ids = np.concatenate([self._ids, filled[passed:]])
        self._names = joined([self._names, documents.sample_ids])
        self._meta = joined([self._meta, documents.meta])
        return self._give([whole] * len(ends), ends), added

    def rest(self) -> tuple[TokenTable, int]:
        """The last context, which is shorter, as a table of one; an empty one where nothing is left."""
        ends = [len(self._pieces) // 4] if self._length else []
        return self._give([self._length] * len(ends), ends), self._added

    def _give(self, lengths: list[int], ends: list[int]) -> TokenTable:
        """The first contexts of what is held, with so many tokens, and pieces up to these ends."""
        offsets, tokens, count = offsets_of(np.array(lengths, np.int64)), sum(lengths), len(ends)
        pieces = np.array(self._pieces, np.int64).reshape(-1, 4)
        given, kept = np.split(pieces, ends[-1:] or [0])
        numbers = range(self._made, self._made + count)
        table = TokenTable(
            self._ids[:tokens].copy(),
            offsets,
            np.array(numbers, np.int64),
            np.diff(offsets),
            Texts.of(f"context:{number + 1:06d}" for number in numbers),
            Pieces(given, np.array([0, *ends], np.int64), self._names, self._meta),
        )
        first = int(kept[0, 0]) if len(kept) else len(self._names)
        self._pieces = array("q", (kept - [first, 0, 0, 0]).ravel().tolist())
        self._names, self._meta = self._names[first:], self._meta[first:]
        self._ids = self._ids[tokens:].copy()
        self._made += count
        return table


@dataclass(frozen=True, eq=False)
class Pieces(Sequence[str]):
    """The `meta` of contexts, written out when it is asked for: a plan keeps many contexts of many short texts.

    Attributes:
      places: int64 [pieces, 4]: of each its document, `first`, `tokens` and `at`.
      offsets: int64 [contexts + 1]: context i has the pieces offsets[i] to offsets[i + 1].
      names: of documents.
      meta: of documents, as JSON; empty where there is none.
    """

    places: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]
    meta: Sequence[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, last, _ = index.indices(len(self))
            return dataclasses.replace(self, offsets=self.offsets[first : max(first, last) + 1])
        if not 0 <= index < len(self):
            raise IndexError(index)
        return json.dumps(
            {
                "pieces": [
                    {
                        **{"document": self.names[document], "first": first, "tokens": tokens, "at": at},
                        **({"meta": json.loads(meta)} if (meta := self.meta[document]) else {}),
                    }
                    for document, first, tokens, at in self._of(index)
                ]
            }
        )

    def _of(self, index: int) -> list[list[int]]:
        return self.places[self.offsets[index] : self.offsets[index + 1]].tolist()
