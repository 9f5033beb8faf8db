"""Each process of a program tokenises its share of the chunks, and all of them hold every token.

In: chunks, of which this process has encoded every n-th, and an exchange of bytes. Out: chunks, all encoded. All
processes read the whole input, for ids and hashes; they must read the same.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.tokenizing.encoder import Encoded
from jax_extract.inputs.tokenizing.pipeline import Chunk

_HEAD = struct.Struct("<q")  # bytes of the JSON that follows


@dataclass(frozen=True)
class Share:
    """Attributes:
    index: of this process, from 0.
    count: of processes.
    exchange: gives what every process has given to it, in their order; all call it together.
    """

    index: int
    count: int
    exchange: Callable[[bytes], list[bytes]]

    def owns(self, number: int) -> bool:
        """Whether this process encodes a chunk, by its number from 0."""
        return number % self.count == self.index


def exchanged(chunks: Iterator[tuple[Chunk, Encoded | None]], share: Share) -> Iterator[tuple[Chunk, Encoded]]:
    """Takes as many chunks as there are processes, and exchanges what became of them; once more at the end.

    Raises:
      UserError: a process has failed on its share, all then with its sentence; or they do not read the same input.
    """
    while True:
        group: list[tuple[Chunk, Encoded | None]] = []
        told = ""
        try:
            group.extend(itertools.islice(chunks, share.count))
        except UserError as error:
            told, group = str(error) or "refused", []
        own = group[share.index][1] if share.index < len(group) else None
        said = [_read(data) for data in share.exchange(_written(_checksum(group), own, told))]
        for head, _ in said:
            if head["error"]:
                raise UserError(head["error"])
        if len({head["input"] for head, _ in said}) > 1:
            raise UserError("the processes do not read the same input; make it the same on every host")
        if not group:
            return
        for (chunk, _), (_, encoded) in zip(group, said, strict=False):
            assert encoded is not None, "the checksum says how many chunks there are"
            yield chunk, encoded


def _checksum(group: list[tuple[Chunk, Encoded | None]]) -> int:
    """Of the ids and texts of a group."""
    total = len(group)
    for chunk, _ in group:
        for pieces in ([s.sample_id for s in chunk], [s.text or repr(s.turns or s.token_ids) for s in chunk]):
            total = zlib.crc32("\n".join(pieces).encode("utf-8", "surrogatepass"), total)
    return total


def _written(checksum: int, own: Encoded | None, told: str) -> bytes:
    head = {"input": checksum, "error": told, "samples": None}
    if own is None:
        return _framed(head)
    head |= {"samples": len(own.full_lengths), "opened": own.opened, "opening": own.opening}
    head |= {"closed": own.closed, "clock_text": own.clock_text}
    return _framed(head) + own.full_lengths.astype("<i8").tobytes() + own.token_ids.astype("<i4").tobytes()


def _framed(head: dict[str, object]) -> bytes:
    data = json.dumps(head).encode()
    return _HEAD.pack(len(data)) + data


def _read(data: bytes) -> tuple[dict[str, object], Encoded | None]:
    (size,) = _HEAD.unpack_from(data)
    head = json.loads(data[_HEAD.size : _HEAD.size + size])
    if head["samples"] is None:
        return head, None
    at = _HEAD.size + size
    lengths = np.frombuffer(data, "<i8", head["samples"], at)
    token_ids = np.frombuffer(data, "<i4", offset=at + lengths.nbytes)
    said = (head[name] for name in ("opened", "opening", "closed", "clock_text"))
    return head, Encoded(token_ids.astype(np.int32, copy=False), lengths.astype(np.int64, copy=False), *said)
