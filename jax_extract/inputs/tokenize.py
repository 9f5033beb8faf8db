"""Samples to token ids: chat template, special tokens, truncation, counted and never silent.

In: `Sample`s and a transformers tokenizer. Out: `TokenizedSample`s in input order, and counts of what
was cut or left out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample

_EMPTY_NAMED = 20  # how many samples without a token are named; the rest are counted
_CHUNK = 256  # texts handed to the tokenizer at once, so that it can use all cores


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """A sample as the model sees it.

    Attributes:
      sample_index: place in the input, from 0, samples without tokens included.
      sample_id: the source's name for it.
      token_ids: int32 [length], special tokens included, at most the maximum length.
      full_length: how many tokens it had before truncation.
      meta: the source's JSON values.
    """

    sample_index: int
    sample_id: str
    token_ids: np.ndarray
    full_length: int
    meta: Mapping[str, Any]

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.length < self.full_length


Continued = Callable[[TokenizedSample], TokenizedSample]


@dataclass
class InputCounts:
    """What happened to the input on its way; filled while the samples are read.

    `dataset_hash` chains sha256 over the ids and texts in input order.
    """

    samples: int = 0
    tokens: int = 0
    truncated_samples: int = 0
    truncated_tokens: int = 0
    longest_sample: int = 0
    empty_samples: int = 0
    first_empty_samples: list[str] = field(default_factory=list)
    dataset_hash: str = ""

    def add(self, sample: TokenizedSample, text: str) -> None:
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
    chat_template: bool,
    counts: InputCounts,
    vocab_size: int | None = None,
    continued: Continued | None = None,
    special_tokens: bool | None = None,
) -> Iterator[TokenizedSample]:
    """Tokenises lazily; texts without a single token are left out and named in `counts`.

    Args:
      max_length: of a text; longer ones are cut.
      continued: gives a sample with what follows its text.
      special_tokens: whether the tokenizer adds them; by default to texts without a chat template.

    Raises:
      UserError: two samples with one id; a chat template asked for that the tokenizer lacks; a token that
        is not among the `vocab_size` of the model.
    """
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("--chat_template was asked for, but this model's tokenizer has none; leave the flag out")
    seen: set[str] = set()
    numbered = enumerate(samples)
    while chunk := list(itertools.islice(numbered, _CHUNK)):
        encoded = _encode(chunk, tokenizer, chat_template, special_tokens)
        for (index, sample), token_ids in zip(chunk, encoded, strict=True):
            if sample.sample_id in seen:
                raise UserError(f"sample id {sample.sample_id!r} occurs twice in the input; ids must be unique")
            seen.add(sample.sample_id)
            if not token_ids:
                counts.leave_out(sample.sample_id)
                continue
            kept = np.asarray(token_ids[:max_length], np.int32)
            if vocab_size is not None and kept.max() >= vocab_size:
                raise UserError(
                    f"sample {sample.sample_id!r} has the token id {kept.max()} but the model knows 0 to "
                    f"{vocab_size - 1}; the tokenizer is of another model"
                )
            tokenized = TokenizedSample(index, sample.sample_id, kept, len(token_ids), sample.meta)
            if continued:
                tokenized = continued(tokenized)
            counts.add(tokenized, sample.text)
            yield tokenized


def _encode(
    chunk: list[tuple[int, Sample]], tokenizer: Any, chat_template: bool, special_tokens: bool | None
) -> list[list[int]]:
    texts = [_in_template(sample, tokenizer) if chat_template else sample.text for _, sample in chunk]
    try:
        # A chat template writes the special tokens itself.
        special = not chat_template if special_tokens is None else special_tokens
        return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # noqa: BLE001 (a vocabulary without an unknown token fails in its library's own way)
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"this model's tokenizer fails on a text from {chunk[0][1].sample_id!r} to {chunk[-1][1].sample_id!r} "
            f"({first_line}); give texts of its vocabulary"
        ) from None


def _in_template(sample: Sample, tokenizer: Any) -> str:
    turns = [{"role": "user", "content": sample.text}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # noqa: BLE001 (a template is a program of the model's author)
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the chat template fails on sample {sample.sample_id!r} ({first_line}); leave --chat_template out"
        ) from None


def tokenizer_digest(tokenizer: Any) -> str:
    """`sha256:…` over everything that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = getattr(tokenizer, "chat_template", None) or ""
    return f"sha256:{hashlib.sha256((content + json.dumps(template)).encode()).hexdigest()}"
