"""Chunks of samples through the tokenizer in the order of the input, in this process or in others beside it.

In: samples and an `Encoder`. Out: chunks with what they became. A small input stays here; for a large one processes are
started, and a bounded number of chunks is under way.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from jax_extract.inputs.chat import first_line
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.tokenizing.collection import no_collection
from jax_extract.inputs.tokenizing.encoder import Encoded, Encoder, Prepared
from jax_extract.inputs.tokenizing.workers import Failed, Workers, worth_starting

Chunk = list[Sample]

CHUNK_SAMPLES = 2_048
CHUNK_CHARACTERS = 1 << 20
# What is encoded before processes are started, each of which takes a quarter of a second of a core to begin.
LARGE_SAMPLES = 32_768
LARGE_CHARACTERS = 1 << 23
# On few cores threads are faster with texts as long as this (`benchmarks/tokenizing.py`); with short ones they wait for
# one another, to allocate memory.
FEW_CORES = 4
LONG_CHARACTERS = 1_000


def chunks_of(samples: Iterable[Sample]) -> Iterator[Chunk]:
    """Samples in lists, cut by what they are alone, so that every process cuts them alike."""
    stream = iter(samples)
    while True:
        chunk: Chunk = []
        size = 0
        with no_collection():
            for sample in itertools.islice(stream, CHUNK_SAMPLES):
                chunk.append(sample)
                size += len(sample.text) or _size(sample)
                if size >= CHUNK_CHARACTERS:
                    break
        if not chunk:
            return
        yield chunk


def encoded_chunks(
    chunks: Iterable[Chunk], encoder: Encoder, owns: Callable[[int], bool] = lambda _: True
) -> Generator[tuple[Chunk, Encoded | None], None, None]:
    """Each chunk, in order; None for those whose number, from 0, is not this process's own.

    What fails while a chunk is read or prepared is raised after the chunks before it.

    Raises:
      UserError: see `tokenize`.
    """
    stage = _Stage(encoder)
    failure: Exception | None = None
    numbered = enumerate(chunks)
    try:
        while failure is None:
            try:
                if (item := next(numbered, None)) is None:
                    break
                number, chunk = item
                prepared = encoder.prepare(chunk) if owns(number) else None
            except Exception as error:  # noqa: BLE001 (raised below, in its place)
                failure = error
                break
            stage.begin(chunk, prepared)
            yield from stage.finished(stage.most)
        yield from stage.finished(0)
        if failure is not None:
            raise failure
    finally:
        stage.close()


class _Stage:
    """Chunks that are under way."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._under_way: deque[tuple[Chunk, Prepared | None, Any]] = deque()
        self._workers: Workers | None = None
        self._may_start = True
        self._samples = self._characters = 0

    @property
    def most(self) -> int:
        return self._workers.most if self._workers else 0

    def begin(self, chunk: Chunk, prepared: Prepared | None) -> None:
        if prepared is None or not prepared.texts:
            self._under_way.append((chunk, prepared, None))
            return
        is_large = self._samples >= LARGE_SAMPLES or self._characters >= LARGE_CHARACTERS
        self._samples += len(prepared.texts)
        self._characters += sum(map(len, prepared.texts))
        if self._may_start and is_large:
            self._start()
        self._under_way.append((chunk, prepared, self._workers and self._workers.send(prepared.texts)))

    def finished(self, most: int) -> Iterator[tuple[Chunk, Encoded | None]]:
        """Those that came first, until `most` are left under way."""
        while len(self._under_way) > most:
            chunk, prepared, sent = self._under_way.popleft()
            yield chunk, None if prepared is None else self._finish(prepared, sent)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def _start(self) -> None:
        self._may_start = False
        count = worth_starting()
        if count <= FEW_CORES and self._characters >= LONG_CHARACTERS * self._samples:
            return
        if count and (setup := self._encoder.setup()) is not None:
            self._workers = Workers(setup, count)

    def _finish(self, prepared: Prepared, sent: Any) -> Encoded:
        if sent is not None:
            assert self._workers is not None
            try:
                tokens = self._workers.receive(sent)
            except Failed as error:
                raise self._encoder.failure(prepared, first_line(error)) from None
            if tokens is not None:
                return self._encoder.encoded(prepared, tokens)
        return self._encoder.encode(prepared)


def _size(sample: Sample) -> int:
    """Of a conversation or of token ids, about as many characters."""
    if sample.turns:
        return sum(len(str(turn.get("content", ""))) for turn in sample.turns)
    return 4 * len(sample.token_ids or ())
