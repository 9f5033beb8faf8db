"""What a tokenizer makes of samples under a wrapping, a chunk at a time.

In: a transformers tokenizer, a `Wrapping`, lists of `Sample`s. Out: `Encoded`: arrays of token ids, and what was done
to the texts. The work is cut in two: `prepare` makes the texts (the chat template is a program in Python), and what the
tokenizer makes of them may come from another process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.chat import ChatTemplate, first_line
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.tokenizing import worker
from jax_extract.inputs.tokenizing.worker import Plain, Tokens
from jax_extract.inputs.tokenizing.workers import Setup
from jax_extract.inputs.wrapping import Wrapping

_LARGEST_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Encoded:
    """Attributes:
    token_ids: int32 [tokens] of all samples one behind the other, each cut at the maximum length.
    full_lengths: int64 [samples], tokens of each before that.
    opened: texts that had the opening already.
    opening: which that is, where there are any.
    closed: conversations in which the assistant has the last word.
    clock_text: what the chat template was told when it asked for the time; None where it has not asked.
    """

    token_ids: np.ndarray
    full_lengths: np.ndarray
    opened: int = 0
    opening: str = ""
    closed: int = 0
    clock_text: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A chunk before the tokenizer.

    Attributes:
      samples: of the chunk.
      given: [tokens] of those that need no tokenizer, by their place.
      texts: of the others.
      closed, clock_text: see `Encoded`.
    """

    samples: Sequence[Sample]
    given: dict[int, np.ndarray]
    texts: list[str]
    closed: int
    clock_text: str | None


class Encoder:
    def __init__(self, tokenizer: Any, wrapping: Wrapping, most: int) -> None:
        """`most`: tokens that are kept of a sample.

        Raises:
          UserError: see `ChatTemplate`.
        """
        self._tokenizer = tokenizer
        self._wrapping = wrapping
        self._most = most
        self._template = ChatTemplate(tokenizer, wrapping) if wrapping.chat_template else None
        # A chat template writes the special tokens itself.
        asked = wrapping.add_special_tokens
        self._adds = not wrapping.chat_template if asked is None else asked
        self._opens_once = asked is None and wrapping.kept.one_opening and self._adds

    def prepare(self, samples: Sequence[Sample]) -> Prepared:
        """UserError where a sample cannot be put to the tokenizer."""
        if self._template is None and are_texts(samples):
            return Prepared(samples, {}, [sample.text for sample in samples], 0, None)
        given = {i: self._as_given(sample) for i, sample in enumerate(samples) if sample.token_ids is not None}
        given |= {i: np.zeros(0, np.int32) for i, sample in enumerate(samples) if sample.turns == ()}
        closed = self._template.closed_samples if self._template else 0
        texts = [self._text(sample) for i, sample in enumerate(samples) if i not in given]
        if self._template is None:
            return Prepared(samples, given, texts, 0, None)
        return Prepared(samples, given, texts, self._template.closed_samples - closed, self._template.clock_text)

    def encode(self, prepared: Prepared) -> Encoded:
        """In this process; UserError where the tokenizer fails."""
        try:
            opening = self.opening if prepared.texts else ""
            plain = self._plain if prepared.texts else _nothing
            tokens = worker.encode(plain, prepared.texts, self._adds, opening, self._most)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (a vocabulary without an unknown token fails in its library's own way)
            raise self.failure(prepared, first_line(error)) from None
        return self.encoded(prepared, tokens)

    def encoded(self, prepared: Prepared, tokens: Tokens) -> Encoded:
        """With the tokens of its texts."""
        token_ids = np.frombuffer(tokens.token_ids, np.int32)
        lengths = np.frombuffer(tokens.full_lengths, np.int64)
        if prepared.given:
            token_ids, lengths = self._with_given(prepared, token_ids, lengths)
        opening = self.opening if tokens.opened else ""
        return Encoded(token_ids, lengths, tokens.opened, opening, prepared.closed, prepared.clock_text)

    def failure(self, prepared: Prepared, said: str) -> UserError:
        """What the user is told where the tokenizer fails on a text of the chunk and says `said`."""
        first, last = prepared.samples[0].sample_id, prepared.samples[-1].sample_id
        return UserError(
            f"this model's tokenizer fails on a text from {first!r} to {last!r} ({said}); give texts of its vocabulary"
        )

    def setup(self) -> Setup | None:
        """What another process needs to encode the same; None where the tokenizer is a program in Python."""
        backend = self._backend
        if backend is None:
            return None
        return Setup(backend.to_str(), backend.encode_special_tokens, self._adds, self.opening, self._most)

    def name_of(self, token: int) -> str:
        """` ('<call>')`, where the tokenizer has a name for it."""
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except Exception:  # noqa: BLE001 (each tokenizer has its own way to say that it has none)
            return ""
        return f" ({name!r:.60})" if isinstance(name, str) else ""

    def _with_given(
        self, prepared: Prepared, token_ids: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and full lengths of all samples of a chunk, from those of its texts."""
        of_texts: Iterator[np.ndarray] = iter(np.split(token_ids, np.cumsum(np.minimum(lengths, self._most))))
        full = np.zeros(len(prepared.samples), np.int64)
        is_given = np.zeros(len(full), bool)
        is_given[list(prepared.given)] = True
        full[~is_given] = lengths
        full[is_given] = [len(prepared.given[i]) for i in np.flatnonzero(is_given).tolist()]
        pieces = [prepared.given[i][: self._most] if i in prepared.given else next(of_texts) for i in range(len(full))]
        return np.concatenate(pieces), full

    def _text(self, sample: Sample) -> str:
        if self._template is not None:
            return self._template.text_of(sample)
        if sample.turns is not None:
            raise UserError(
                f"sample {sample.sample_id!r} is a conversation, which needs the chat template; add "
                "--chat_template True"
            )
        return sample.text

    def _as_given(self, sample: Sample) -> np.ndarray:
        """int32 [tokens] of a sample that is tokenized already."""
        where = f"sample {sample.sample_id!r} is tokenized already"
        if self._template is not None:
            raise UserError(f"{where}, and a chat template is for texts; leave --chat_template out")
        if self._wrapping.add_special_tokens:
            raise UserError(f"{where}, and special tokens are added only to texts; leave --add_special_tokens out")
        ids = np.asarray(sample.token_ids if sample.token_ids else np.zeros(0, np.int64))
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(
                f"{where}, but not as whole numbers ({str(sample.token_ids)[:60]}); give a list of token ids"
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() <= _LARGEST_TOKEN:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"{where} and has the token id {wrong}; token ids are from 0 to {_LARGEST_TOKEN}")
        return ids.astype(np.int32)

    # ------------------------------------------------------------------------------------ the tokenizer

    @cached_property
    def _plain(self) -> Plain:
        return self._in_python if self._backend is None else worker.of_backend(self._backend)

    def _in_python(self, texts: list[str], special: bool) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer of the tokenizers library that does all of the work; None where there is more to it."""
        tokenizer = self._tokenizer
        if not getattr(type(tokenizer), "encodes_as_backend", False):
            transformers = sys.modules.get("transformers")
            if transformers is None or not _is_unchanged(tokenizer, transformers.PreTrainedTokenizerFast):
                return None
            try:
                self._in_python([""], False)  # takes back what an earlier call has set of truncation and padding
            except Exception:  # noqa: BLE001 (each tokenizer fails in its own way; texts will show it)
                return None
        backend = tokenizer.backend_tokenizer
        return backend if backend.truncation is None and backend.padding is None else None

    @cached_property
    def opening(self) -> str:
        """The token that the tokenizer puts before every text, where one may be there already."""
        if not self._opens_once:
            return ""
        try:
            around = self._in_python([""], True)[0]
        except Exception:  # noqa: BLE001 (a tokenizer that fails on no text at all puts nothing around others)
            return ""
        if not around:
            return ""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        name = (backend.id_to_token if backend else self._tokenizer.convert_ids_to_tokens)(around[0])
        return name if isinstance(name, str) else ""


def are_texts(samples: Sequence[Sample]) -> bool:
    """Whether none of them is a conversation or is tokenized already."""
    return all(sample.turns is None and sample.token_ids is None for sample in samples)


def _is_unchanged(tokenizer: Any, base: Any) -> bool:
    """Whether a class of transformers leaves the way to the tokenizers library as it is."""
    if not isinstance(tokenizer, base):
        return False
    ways = ("__call__", "_encode_plus", "set_truncation_and_padding", "backend_tokenizer")
    return all(getattr(type(tokenizer), way) is getattr(base, way) for way in ways)


def _nothing(_: list[str], __: bool) -> list[list[int]]:
    return []
