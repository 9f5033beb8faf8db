"""Samples to token ids: chat template, special tokens, truncation, counted and never silent.

A sample that is tokenized already is taken as it is.

In: `Sample`s and a transformers tokenizer. Out: `TokenizedSample`s in input order, and counts of what
was cut or left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.chat import ChatTemplate, first_line
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.wrapping import Wrapping

_EMPTY_NAMED = 20  # how many samples without a token are named; the rest are counted
_LARGEST_TOKEN = 2**31 - 1
_CHUNK = 256  # texts handed to the tokenizer at once, so that it can use all cores


Continued = Callable[[TokenizedSample], TokenizedSample]


@dataclass
class InputCounts:
    """What happened to the input on its way; filled while the samples are read.

    `dataset_hash` chains sha256 over the ids and texts in input order. `opened_samples` are texts that began with
    `opening`, which the tokenizer puts before every text, and got no second one. `clock_text` is what the chat template
    was told when it asked for the time. `closed_samples` are conversations in which the assistant has the last word, so
    that nothing is asked at their end.
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

    def as_json(self) -> dict[str, Any]:
        """What a plan keeps of them: what is newer than the first plans, only where there is any of it."""
        said = dataclasses.asdict(self)
        del said["opening"], said["clock_text"], said["closed_samples"]
        if not self.opened_samples:
            del said["opened_samples"]
        return said

    def add(self, sample: TokenizedSample, text: str) -> None:
        """`text` is whatever the source gave."""
        chained = f"{self.dataset_hash}\n{sample.sample_id}\n{text}"
        self.dataset_hash = hashlib.sha256(chained.encode("utf-8", "surrogatepass")).hexdigest()
        self.samples += 1
        self.tokens += sample.length
        self.truncated_samples += sample.truncated
        self.truncated_tokens += sample.full_length - sample.length
        self.longest_sample = max(self.longest_sample, sample.full_length)

    def leave_out(self, sample_id: str) -> None:
        self.empty_samples += 1
        if len(self.first_empty_samples) < _EMPTY_NAMED:
            self.first_empty_samples.append(sample_id)


def tokenize(
    samples: Iterable[Sample],
    tokenizer: Any,
    max_length: int,
    wrapping: Wrapping,
    counts: InputCounts,
    vocab_size: int | None = None,
    continued: Continued | None = None,
) -> Iterator[TokenizedSample]:
    """Tokenises lazily; texts without a single token are left out and named in `counts`.

    Args:
      max_length: of a text; longer ones are cut.
      continued: gives a sample with what follows its text.

    Raises:
      UserError: two samples with one id; a chat template asked for that the tokenizer lacks, or that lacks what is
        asked of it; a conversation without a chat template; a token that is not among the `vocab_size` of the model.
    """
    encoder = _Encoder(tokenizer, wrapping, counts)
    seen: set[str] = set()
    numbered = enumerate(samples)
    while chunk := list(itertools.islice(numbered, _CHUNK)):
        for (index, sample), token_ids in zip(chunk, encoder.encode([s for _, s in chunk]), strict=True):
            if sample.sample_id in seen:
                raise UserError(f"sample id {sample.sample_id!r} occurs twice in the input; ids must be unique")
            seen.add(sample.sample_id)
            if not len(token_ids):
                counts.leave_out(sample.sample_id)
                continue
            kept = np.asarray(token_ids[:max_length], np.int32)
            if vocab_size is not None and kept.max() >= vocab_size:
                token = int(kept.max())
                mend = (
                    "use the tokenizer that was saved with these weights"
                    if sample.token_ids is None
                    else "use data that were tokenized for this model"
                )
                raise UserError(
                    f"sample {sample.sample_id!r} has the token id {token}{encoder.name_of(token)} but the model knows "
                    f"0 to {vocab_size - 1}; {mend}"
                )
            tokenized = TokenizedSample(index, sample.sample_id, kept, len(token_ids), sample.meta)
            if continued:
                tokenized = continued(tokenized)
            counts.add(tokenized, _content(sample))
            yield tokenized


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


class _Encoder:
    """What a tokenizer makes of samples under a wrapping."""

    def __init__(self, tokenizer: Any, wrapping: Wrapping, counts: InputCounts) -> None:
        self._tokenizer = tokenizer
        self._wrapping = wrapping
        self._counts = counts
        self._template = ChatTemplate(tokenizer, wrapping) if wrapping.chat_template else None
        # A chat template writes the special tokens itself.
        asked = wrapping.add_special_tokens
        self._adds = not wrapping.chat_template if asked is None else asked
        self._opens_once = asked is None and wrapping.kept.one_opening and self._adds

    def encode(self, samples: Sequence[Sample]) -> list[list[int] | np.ndarray]:
        """Token ids of each."""
        given = {i: self._as_given(sample) for i, sample in enumerate(samples) if sample.token_ids is not None}
        given |= {i: np.zeros(0, np.int64) for i, sample in enumerate(samples) if sample.turns == ()}
        texts = [self._text(sample) for i, sample in enumerate(samples) if i not in given]
        try:
            encoded = iter(self._encode_texts(texts) if texts else ())
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (a vocabulary without an unknown token fails in its library's own way)
            raise UserError(
                f"this model's tokenizer fails on a text from {samples[0].sample_id!r} to {samples[-1].sample_id!r} "
                f"({first_line(error)}); give texts of its vocabulary"
            ) from None
        if self._template is not None:
            self._counts.clock_text = self._template.clock_text
            self._counts.closed_samples = self._template.closed_samples
        return [given[i] if i in given else next(encoded) for i in range(len(samples))]

    def name_of(self, token: int) -> str:
        """` ('<call>')`, where the tokenizer has a name for it."""
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except Exception:  # noqa: BLE001 (each tokenizer has its own way to say that it has none)
            return ""
        return f" ({name!r:.60})" if isinstance(name, str) else ""

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
        """int64 [tokens] of a sample that is tokenized already."""
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
        return ids

    # ---------------------------------------------------------------------------------- special tokens

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        encoded = self._plain(texts, self._adds)
        opening = self._opening
        if opening and (begun := [i for i, text in enumerate(texts) if text.startswith(opening)]):
            for i, own in zip(begun, self._plain([texts[i] for i in begun], False), strict=True):
                encoded[i] = self._once(encoded[i], own)
        return encoded

    def _plain(self, texts: list[str], special: bool) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    @cached_property
    def _opening(self) -> str:
        """The token that the tokenizer puts before every text, where one may be there already."""
        if not self._opens_once:
            return ""
        try:
            around = self._plain([""], True)[0]
        except Exception:  # noqa: BLE001 (a tokenizer that fails on no text at all puts nothing around others)
            return ""
        if not around:
            return ""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        name = (backend.id_to_token if backend else self._tokenizer.convert_ids_to_tokens)(around[0])
        return name if isinstance(name, str) else ""

    def _once(self, encoded: list[int], own: list[int]) -> list[int]:
        """`encoded` is `own` between what the tokenizer adds; without what of that is there already."""
        before = next((i for i in range(1, len(encoded)) if encoded[i : i + len(own)] == own), 0)
        opening, closing = encoded[:before], encoded[before + len(own) :]
        if not opening or own[:before] != opening:
            return encoded
        self._counts.opened_samples += 1
        self._counts.opening = self._opening
        return own if closing and own[-len(closing) :] == closing else [*own, *closing]


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
