"""Examples as token ids: a prompt, then an answer, which alone is learned.

In: benchmark `Example`s and a tokenizer. Out: `Tokens` for training and for scoring, and padded batches of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jax_extract.errors import UserError
from jax_extract.inputs.benchmarks import UNANSWERABLE, Benchmark, Example
from jax_extract.inputs.benchmarks_prompts import fitted_texts, prompt_ids

_IGNORED = -100  # what torch's cross entropy passes over


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt and an answer to it.

    Attributes:
      ids: int32 [length], of both; arrays, because SQuAD v2 has some 10^7 of them.
      prompt: how many of them are the prompt's.
    """

    ids: np.ndarray
    prompt: int

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int]) -> Tokens:
        return cls(np.array([*prompt, *answer], np.int32), len(prompt))

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Scored:
    """A validation example: its prompt, and each label word as an answer (none for SQuAD v2)."""

    example: Example
    prompt: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrainingExamples:
    """What is learned, and how many examples were left out.

    Attributes:
      cut_answers: their answer is in the part of the text that did not fit; to learn it would be to learn guessing.
      long_answers: their answer alone is too long.
    """

    tokens: tuple[Tokens, ...]
    cut_answers: int
    long_answers: int


class Encoder:
    """Texts of one task as token ids of one tokenizer."""

    def __init__(self, tokenizer: Any, benchmark: Benchmark, max_length: int) -> None:
        """UserError where the tokenizer has no token that could end an answer."""
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the model's tokenizer has no end-of-text token, with which answers end; add eos_token to "
                "tokenizer_config.json"
            )
        self._tokenizer, self._benchmark, self._max_length = tokenizer, benchmark, max_length
        self._last: tuple[str, tuple[int, ...]] = ("", ())
        self.end: int = tokenizer.eos_token_id
        self.padding: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def training(self, examples: Iterable[Example]) -> TrainingExamples:
        kept: list[Tokens] = []
        cut = long = 0
        for example in examples:
            texts = self._texts(example)
            if self._was_cut(example, texts):
                cut += 1
                continue
            prompt = self._benchmark.prompt(texts)
            ids = self._ids(prompt)
            tokens = Tokens.of(ids, self._answer(prompt, ids, example.answers[0]))
            if tokens.length > self._max_length:
                long += 1
                continue
            kept.append(tokens)
        if not kept:
            raise UserError(
                f"no training example of {self._benchmark.name} fits {self._max_length} tokens; raise --max_length"
            )
        return TrainingExamples(tuple(kept), cut, long)

    def scored(self, examples: Iterable[Example]) -> list[Scored]:
        found = []
        for example in examples:
            prompt = self._benchmark.prompt(self._texts(example))
            ids = self._ids(prompt)
            words = self._benchmark.label_words
            found.append(Scored(example, ids, tuple(self._answer(prompt, ids, word) for word in words)))
        return found

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _texts(self, example: Example) -> Mapping[str, str]:
        return fitted_texts(self._benchmark, example, lambda text: len(self._ids(text)), self._max_length)

    def _was_cut(self, example: Example, texts: Mapping[str, str]) -> bool:
        """Whether the answer is in the part of the text that did not fit."""
        answer = example.answers[0]
        if self._benchmark.label_words or answer == UNANSWERABLE or texts == example.texts:
            return False
        return answer not in texts[self._benchmark.long_text]

    def _ids(self, text: str) -> tuple[int, ...]:
        if self._last[0] != text or not text:  # a prompt is counted first, and wanted then
            self._last = text, prompt_ids(self._tokenizer, text)
        return self._last[1]

    def _answer(self, prompt: str, prompt_ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
        whole = self._ids(f"{prompt} {answer}")
        if whole[: len(prompt_ids)] == prompt_ids:
            return (*whole[len(prompt_ids) :], self.end)
        # The end of the prompt and the start of the answer became one token: the prompt's own tokens stay as they are.
        return (*self._tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], self.end)


class Collator:
    """Examples of different lengths as one batch, padded on the right."""

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def __call__(self, batch: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels, int64 [batch, longest]; labels only where there is an answer."""
        shape = len(batch), max(tokens.length for tokens in batch)
        ids = torch.full(shape, self._padding)
        labels = torch.full(shape, _IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, tokens in enumerate(batch):
            ids[row, : tokens.length] = torch.from_numpy(tokens.ids)
            labels[row, tokens.prompt : tokens.length] = torch.from_numpy(tokens.ids[tokens.prompt :])
            mask[row, : tokens.length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def digest_of(training: TrainingExamples, validation: Iterable[Scored]) -> str:
    """`sha256:…` over every token that is learned or scored, in order."""
    total = hashlib.sha256()
    for tokens in training.tokens:
        total.update(f"{tokens.prompt} {tokens.length}\n".encode())
        total.update(tokens.ids.astype("<i4").data)
    for scored in validation:
        total.update(
            json.dumps([scored.example.sample_id, scored.prompt, scored.labels, scored.example.answers]).encode()
        )
    return f"sha256:{total.hexdigest()}"
