"""Samples to token ids: chat template, special tokens, truncation, counted and never silent.

A sample that is tokenized already is taken as it is.

In: `Sample`s and a transformers tokenizer. Out: `TokenTable`s in input order, a chunk each, and counts of what was cut
or left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.columns import Texts, json_column, offsets_of
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenizedSample, TokenTable
from jax_extract.inputs.tokenizing.ahead import ahead
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.tokenizing.encoder import Encoded, Encoder, are_texts
from jax_extract.inputs.tokenizing.names import Names
from jax_extract.inputs.tokenizing.passing import Known, pass_over
from jax_extract.inputs.tokenizing.pipeline import Chunk, chunks_of, encoded_chunks
from jax_extract.inputs.tokenizing.share import Share, exchanged
from jax_extract.inputs.wrapping import Wrapping

__all__ = ["Continued", "InputCounts", "MissingTokenizer", "tokenize", "tokenized_tables", "tokenizer_digest"]

_AHEAD = 2  # chunks of each process

Continued = Callable[[TokenizedSample], TokenizedSample]


def tokenized_tables(
    samples: Iterable[Sample],
    tokenizer: Any,
    max_length: int,
    wrapping: Wrapping,
    counts: InputCounts,
    vocab_size: int | None = None,
    continued: Continued | None = None,
    share: Share | None = None,
    known: Known | None = None,
) -> Iterator[TokenTable]:
    """Tokenises lazily, a chunk at a time; texts without a single token are left out and named in `counts`.

    Args:
      max_length: tokens of a text; longer ones are cut.
      counts: of what has been given so far; filled before a table is.
      continued: gives a sample with what follows its text.
      share: of this process, where several make the same tables together; all must then take them to the same point.
      known: samples from the first one on, which are read and counted, and neither tokenised nor given.

    Raises:
      UserError: two samples with one id; a chat template asked for that the tokenizer lacks, or that lacks what is
        asked of it; a conversation without a chat template; a token that is not among the `vocab_size` of the model.
    """
    encoder = Encoder(tokenizer, wrapping, max_length)
    names = Names()
    stream = iter(samples)
    first = 0
    if known is not None:
        first = pass_over(stream, known, encoder, names, counts, _content)
        stream = known.rest(stream)
    with contextlib.closing(_encoded(stream, encoder, share)) as chunks:
        for chunk, encoded in chunks:
            ids = [sample.sample_id for sample in chunk]
            lengths = np.minimum(encoded.full_lengths, max_length)
            _require_sound(chunk, encoded, lengths, names.first_repeated(ids), encoder, vocab_size)
            table = TokenTable(
                encoded.token_ids,
                offsets_of(lengths),
                np.arange(first, first + len(chunk)),
                encoded.full_lengths,
                Texts.of(ids),
                json_column([sample.meta for sample in chunk]),
            )
            first += len(chunk)
            contents = [s.text for s in chunk] if are_texts(chunk) else [_content(s) for s in chunk]
            counts.take(encoded)
            if not lengths.all():
                for place in np.flatnonzero(lengths == 0).tolist():
                    counts.leave_out(ids[place])
                there = np.flatnonzero(lengths).tolist()
                ids, contents = [ids[i] for i in there], [contents[i] for i in there]
                table = table.with_tokens()
            if continued:
                table = TokenTable.of(map(continued, table))
            counts.add_samples(table.lengths, table.full_lengths, ids, contents)
            if len(table):
                yield table


def tokenize(
    samples: Iterable[Sample],
    tokenizer: Any,
    max_length: int,
    wrapping: Wrapping,
    counts: InputCounts,
    vocab_size: int | None = None,
    continued: Continued | None = None,
) -> Iterator[TokenizedSample]:
    """The samples of `tokenized_tables` one by one, for those who want few or look at each."""
    for table in tokenized_tables(samples, tokenizer, max_length, wrapping, counts, vocab_size, continued):
        yield from table


def _encoded(
    samples: Iterable[Sample], encoder: Encoder, share: Share | None
) -> Generator[tuple[Chunk, Encoded], None, None]:
    chunks = chunks_of(samples)
    if share is None or share.count == 1:
        with contextlib.closing(encoded_chunks(chunks, encoder)) as alone:
            for chunk, encoded in alone:
                assert encoded is not None, "all chunks are this process's own"
                yield chunk, encoded
        return
    # The exchange is this thread's: what processes do together they do in one order. What comes before it is not.
    with contextlib.closing(ahead(encoded_chunks(chunks, encoder, share.owns), _AHEAD * share.count)) as under_way:
        yield from exchanged(under_way, share)


def _require_sound(
    chunk: Chunk,
    encoded: Encoded,
    lengths: np.ndarray,
    repeated: int | None,
    encoder: Encoder,
    vocab_size: int | None,
) -> None:
    """UserError of the first sample whose id was there before, or that has a token which the model does not know."""
    wrong = None
    if vocab_size is not None and encoded.token_ids.max(initial=0) >= vocab_size:
        ends = np.cumsum(lengths)
        wrong = int(np.searchsorted(ends, np.argmax(encoded.token_ids >= vocab_size), side="right"))
    if repeated is not None and (wrong is None or repeated <= wrong):
        raise UserError(f"sample id {chunk[repeated].sample_id!r} occurs twice in the input; ids must be unique")
    if wrong is None:
        return
    sample = chunk[wrong]
    end = int(lengths[: wrong + 1].sum())
    token = int(encoded.token_ids[end - int(lengths[wrong]) : end].max())
    mend = (
        "use the tokenizer that was saved with these weights"
        if sample.token_ids is None
        else "use data that were tokenized for this model"
    )
    raise UserError(
        f"sample {sample.sample_id!r} has the token id {token}{encoder.name_of(token)} but the model knows "
        f"0 to {int(vocab_size or 0) - 1}; {mend}"
    )


class MissingTokenizer:
    """Stands for the tokenizer of a model that has none, which data that are tokenized already do not need."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UserError(self.reason)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by Python itself
            raise AttributeError(name)
        raise UserError(self.reason)


def _content(sample: Sample) -> str:
    """What the source gave, whichever way."""
    if sample.turns is not None:
        return json.dumps(list(sample.turns), sort_keys=True, default=str)
    return sample.text if sample.token_ids is None else json.dumps([int(token) for token in sample.token_ids])


def tokenizer_digest(tokenizer: Any) -> str:
    """`sha256:…` over everything that decides how text becomes tokens; `none` where nothing does."""
    if isinstance(tokenizer, MissingTokenizer):
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = getattr(tokenizer, "chat_template", None) or ""
    return f"sha256:{hashlib.sha256((content + json.dumps(template)).encode()).hexdigest()}"
