"""Texts to token ids, in this process and as the program of another.

In: texts, and one function that encodes. Out: token ids one behind the other, and lengths. As a program: chunks from
standard input, their tokens to standard output. It is run by its path and imports the tokenizers library alone, so that
it starts in a blink, and never JAX, whose devices belong to one process. It ends with the pipe of its parent.
"""

from __future__ import annotations

import array
import gc
import marshal
import os
import queue
import signal
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

FRAME = struct.Struct("<q")  # bytes of the message that follows
REPLY = struct.Struct("<?qqq")  # whether it is an error's text (then its bytes), samples, tokens, opened samples

Plain = Callable[[list[str], bool], list[list[int]]]  # texts, with special tokens or without, to token ids


class Tokens(NamedTuple):
    """Attributes:
    token_ids: int32 of all texts one behind the other, at most so many of each as were asked for.
    full_lengths: int64 of each text, before it was cut.
    opened: how many texts had the opening already.
    """

    token_ids: array.array[int]
    full_lengths: array.array[int]
    opened: int


def encode(plain: Plain, texts: list[str], special: bool, opening: str, most: int) -> Tokens:
    """Args:
    special: whether the tokenizer's special tokens are added.
    opening: the one that it puts before every text, where one may be there already; else "".
    most: tokens of a text.
    """
    encoded = plain(texts, special)
    opened = 0
    if opening and (begun := [i for i, text in enumerate(texts) if text.startswith(opening)]):
        for i, own in zip(begun, plain([texts[i] for i in begun], False), strict=True):
            once = _once(encoded[i], own)
            if once is not None:
                encoded[i] = once
                opened += 1
    token_ids = array.array("i")
    for ids in encoded:
        token_ids.fromlist(ids if len(ids) <= most else ids[:most])
    return Tokens(token_ids, array.array("q", map(len, encoded)), opened)


def _once(encoded: list[int], own: list[int]) -> list[int] | None:
    """`encoded` is `own` between what the tokenizer adds; without what of that is there already, if any is."""
    before = next((i for i in range(1, len(encoded)) if encoded[i : i + len(own)] == own), 0)
    opening, closing = encoded[:before], encoded[before + len(own) :]
    if not opening or own[:before] != opening:
        return None
    return own if closing and own[-len(closing) :] == closing else [*own, *closing]


def of_backend(backend: Any) -> Plain:
    """As a tokenizer of the tokenizers library encodes."""

    def plain(texts: list[str], special: bool) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]

    return plain


def _read(stream: BinaryIO) -> Any:
    """The next message; None at the end."""
    head = stream.read(FRAME.size)
    if len(head) < FRAME.size:
        return None
    body = stream.read(size := FRAME.unpack(head)[0])
    return marshal.loads(body) if len(body) == size else None


def main() -> None:
    for name in ("SIGINT", "SIGTERM"):  # both go to whole groups of processes; this one ends when its parent does
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    given = sys.stdin.buffer
    if (setup := _read(given)) is None:
        return
    backend_json, splits_special, special, opening, most = setup
    from tokenizers import Tokenizer

    gc.disable()  # nothing here is in a circle

    def take() -> None:
        # Reads on while texts are encoded, so that whoever sends never waits; nobody waits for tokens at the end.
        while (texts := _read(given)) is not None:
            requests.put(texts)
        os._exit(0)

    threading.Thread(target=take, daemon=True).start()
    backend = Tokenizer.from_str(backend_json)
    backend.encode_special_tokens = splits_special
    plain = of_backend(backend)
    while True:
        texts = requests.get()
        try:
            made = encode(plain, texts, special, opening, most)
        except Exception as error:  # noqa: BLE001 (a vocabulary without an unknown token fails in its own way)
            said = (str(error).strip() or type(error).__name__).encode("utf-8", "replace")
            reply = [REPLY.pack(True, len(said), 0, 0), said]
        else:
            sizes = REPLY.pack(False, len(texts), len(made.token_ids), made.opened)
            reply = [sizes, made.full_lengths, made.token_ids]
        try:
            for piece in reply:
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        except OSError:
            os._exit(0)


if __name__ == "__main__":
    main()
