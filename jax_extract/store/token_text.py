"""The text of each token by itself, as one reads it beside a row or on an axis.

In: a tokenizer and token ids. Out: strings. Spaces and line breaks are kept, so that the strings of a text, joined,
are the text; a piece of a character is written as its bytes are in Python, as in `\\xe2\\x80`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from jax_extract.errors import UserError
from jax_extract.store.parts import NO_TOKEN

MEAN = "mean"  # in place of the token of a row that is one
_SENTENCE_PIECE_SPACE = "\u2581"
_REPLACED = "\ufffd"  # what decoders make of bytes that are no character
_LENGTH_OF_BYTE = len("<0x0A>")


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> list[str]:
    """One string for each token id, `mean` for -1.

    Args:
      tokenizer: of the model, as transformers has it.

    Raises:
      UserError: it is no tokenizer.
    """
    if not (hasattr(tokenizer, "convert_ids_to_tokens") and hasattr(tokenizer, "decode")):
        raise UserError(
            f"{type(tokenizer).__name__} {tokenizer!r:.60} is no tokenizer; give the model's, as "
            "AutoTokenizer.from_pretrained(folder) makes it"
        )
    wanted = [int(token) for token in token_ids]
    known = [token for token in dict.fromkeys(wanted) if token != NO_TOKEN]
    special = {int(token) for token in tokenizer.all_special_ids}
    pieces = tokenizer.convert_ids_to_tokens(known)
    texts = {NO_TOKEN: MEAN}
    for token, piece in zip(known, pieces, strict=True):
        if piece is None:
            texts[token] = f"[{token}]"  # beyond the vocabulary
        else:
            texts[token] = piece if token in special else _text(tokenizer, token, piece)
    return [texts[token] for token in wanted]


def _text(tokenizer: Any, token: int, piece: str) -> str:
    if len(piece) == _LENGTH_OF_BYTE and piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's fallback
        return bytes([int(piece[3:5], 16)]).decode("utf-8", "backslashreplace")
    if _SENTENCE_PIECE_SPACE in piece:  # its decoder takes the space in front away
        return piece.replace(_SENTENCE_PIECE_SPACE, " ")
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if _REPLACED in text and _REPLACED not in piece and all(letter in _byte_of() for letter in piece):
        return bytes(_byte_of()[letter] for letter in piece).decode("utf-8", "backslashreplace")
    return text or piece


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: itself where it can be printed (GPT-2)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}
