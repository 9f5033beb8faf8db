"""Documents joined into contexts of equal length, as sparse autoencoders are trained on them.

In: tokenized documents in the order of the input. Out: contexts of N tokens in place of them, each of which knows
which tokens are whose. Documents follow one another without a gap: a long one goes on in the next context, and none
is cut. What is left at the end is a shorter context.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.tokenize import InputCounts

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

    def add_context(self, context: TokenizedSample, added: int) -> None:
        self.samples += 1
        self.tokens += context.length
        self.longest_sample = max(self.longest_sample, context.length)
        self.added_tokens += added

    def follow(self, documents: InputCounts) -> None:
        """Takes over what was counted of the documents that were read so far."""
        for entry in dataclasses.fields(InputCounts):
            if entry.name not in _COUNTED_HERE:
                setattr(self, entry.name, getattr(documents, entry.name))
        self.documents = documents.samples


def join(
    documents: Iterable[TokenizedSample], form: ContextForm, counts: ContextCounts, read: InputCounts
) -> Iterator[TokenizedSample]:
    """Joins documents lazily; one context is in memory at a time, and the document that is being cut up.

    A start or separator is left out where the next token of the document is the same token.

    Args:
      counts: of what is made.
      read: of the documents, filled while they are read.

    Returns:
      Contexts `context:000001` and so on, with `pieces` in `meta`: for each piece of a document its id, where in the
      document it begins, how many tokens it has, where in the context they begin, and the document's own `meta`.
    """
    context = _Context(form)
    number = 0
    for document in documents:
        at = 0
        while at < document.length:
            at += context.take(document, at)
            if context.length == form.tokens:
                made = context.finish(number)
                counts.add_context(made, context.added)
                counts.follow(read)
                yield made
                number, context = number + 1, _Context(form)
    if context.length:
        made = context.finish(number)
        counts.add_context(made, context.added)
        counts.follow(read)
        yield made
    counts.follow(read)


class _Context:
    """One that is being filled."""

    def __init__(self, form: ContextForm) -> None:
        self.length = self.added = 0
        self._form = form
        self._ids = np.empty(form.tokens, np.int32)
        self._pieces = _Pieces()

    def take(self, document: TokenizedSample, at: int) -> int:
        """Takes as many of the document's tokens from `at` on as there is room for; says how many."""
        if not self.length:
            self._add(self._form.start, document.token_ids[at])
        elif at == 0:
            self._add(self._form.separator, document.token_ids[at])
        count = min(self._form.tokens - self.length, document.length - at)
        if count:
            self._ids[self.length : self.length + count] = document.token_ids[at : at + count]
            self._pieces.add(document, at, count, self.length)
            self.length += count
        return count

    def _add(self, token: int | None, following: int) -> None:
        if token is not None and token != following:
            self._ids[self.length] = token
            self.length += 1
            self.added += 1

    def finish(self, number: int) -> TokenizedSample:
        name = f"context:{number + 1:06d}"
        return TokenizedSample(number, name, self._ids[: self.length], self.length, self._pieces)


class _Pieces(Mapping[str, Any]):
    """The `meta` of a context, written out when it is asked for: a plan keeps many contexts of many short texts."""

    def __init__(self) -> None:
        self._documents: list[tuple[str, Mapping[str, Any]]] = []
        self._places = array("q")  # first, tokens and at of each

    def add(self, document: TokenizedSample, first: int, tokens: int, at: int) -> None:
        self._documents.append((document.sample_id, document.meta))
        self._places.extend((first, tokens, at))

    def __getitem__(self, key: str) -> list[dict[str, Any]]:
        if key != "pieces":
            raise KeyError(key)
        places = np.frombuffer(self._places, np.int64).reshape(-1, 3).tolist()
        return [
            {"document": name, "first": first, "tokens": tokens, "at": at, **({"meta": dict(meta)} if meta else {})}
            for (name, meta), (first, tokens, at) in zip(self._documents, places, strict=True)
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(("pieces",))

    def __len__(self) -> int:
        return 1
