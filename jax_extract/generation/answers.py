"""Answers, and the files that keep them: one a batch, whole or not there, so that a killed command goes on.

In: prompts as token ids. Out: `Answer`s by sample, and `answers/batch_000001.jsonl` and so on in the place of the run,
each line one answer. Which prompts are in which batch depends on the input and the frozen settings alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.store.ledger import to_json
from jax_extract.store.storage.verbs import Storage

FOLDER = "answers"
SIZE = "samples_per_batch"  # the setting that says which prompts are in which batch
KEPT = "kept"  # the setting that says what the answers keep from their start
NUMERICS = "numerics"  # the setting that a resumption may change, where the user allows it
SETTINGS_FILE = f"{FOLDER}/settings.json"
ANSWERS_FILE, SUBMISSION_FILE, SCORE_FILE = DERIVED = ("answers.jsonl", "submission.json", "score.json")

BEGIN_ANEW = "remove the folder to begin anew"
_BATCH = re.compile(r"batch_\d{6,}\.jsonl")
_SHORTEST = 64  # columns of a batch of prompts


class AnswersBegunMeanwhile(Exception):
    """Another worker has just begun the same answers: look again at what is there."""


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt.

    Attributes:
      sample_index, sample_id: of the prompt.
      prompt_tokens: how many tokens it has.
      token_ids: of the answer, the token that ended it included.
      ended: whether the model ended it; else it was as long as it may be.
      text: the answer's, without special tokens.
    """

    sample_index: int
    sample_id: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    ended: bool
    text: str

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"  # ASCII alone: some characters of others end a line

    @classmethod
    def of_line(cls, line: str) -> Answer:
        fields = json.loads(line)
        return cls(**{**fields, "token_ids": tuple(fields["token_ids"])})

    def require_of(self, prompt: TokenizedSample, most_tokens: int, vocab_size: int) -> None:
        """ValueError where it is no answer to this prompt: somebody has edited it."""
        if (self.sample_index, self.sample_id, self.prompt_tokens) != (
            *(prompt.sample_index, prompt.sample_id),
            prompt.length,
        ):
            raise ValueError("it holds answers to other prompts")
        if not all(type(token) is int and 0 <= token < vocab_size for token in self.token_ids):
            raise ValueError(f"the answer to {self.sample_id!r} has tokens that the model does not know")
        if len(self.token_ids) > most_tokens or type(self.ended) is not bool or type(self.text) is not str:
            raise ValueError(f"the answer to {self.sample_id!r} is none that was written here")


@dataclass(frozen=True)
class Batch:
    """Prompts that are answered together.

    Attributes:
      number: from 1.
      columns: room for the longest of the prompts; one of few numbers, as each is compiled for.
    """

    number: int
    samples: tuple[TokenizedSample, ...]
    columns: int

    @property
    def name(self) -> str:
        return f"{FOLDER}/batch_{self.number:06d}.jsonl"


def batches_of(samples: Sequence[TokenizedSample], size: int, most_columns: int) -> list[Batch]:
    """Batches of `size` prompts of about one length, the longest first; what does not fit memory shows at once.

    Args:
      most_columns: that a batch may have: a prompt is no longer.
    """
    ordered = sorted(samples, key=lambda sample: (-sample.length, sample.sample_index))
    return [
        Batch(i // size + 1, tuple(some), min(most_columns, _columns(some[0].length)))
        for i in range(0, len(ordered), size)
        if (some := ordered[i : i + size])
    ]


def _columns(length: int) -> int:
    """A power of two or the number halfway to the next, so that few numbers are compiled for."""
    columns = _SHORTEST
    while columns < length:
        columns = columns * 3 // 2 if columns & (columns - 1) == 0 else columns // 3 * 4
    return columns


def own_first(batches: Sequence[Batch], worker: int, workers: int) -> list[Batch]:
    """An independent worker's own batches, then those of others, from the end and each worker from another one.

    Others answer theirs from the beginning, so that what is met last was left.
    """
    own = [batch for batch in batches if batch.number % workers == worker]
    rest = [batch for batch in reversed(batches) if batch.number % workers != worker]
    start = len(rest) * worker // workers
    return [*own, *rest[start:], *rest[:start]]


class AnswerFiles:
    """The answers that are there already, and those that are added."""

    def __init__(self, storage: Storage, most_tokens: int, vocab_size: int) -> None:
        """An answer has at most so many tokens, out of a vocabulary of that size."""
        self._storage = storage
        self._most_tokens = most_tokens
        self._vocab_size = vocab_size

    def settings(self) -> dict[str, Any] | None:
        """With which the answers here are given; None where there are none yet."""
        if not self._storage.exists(SETTINGS_FILE):
            return None
        with damage_is_told(self._storage.where(SETTINGS_FILE), BEGIN_ANEW):
            found = dict(json.loads(self._storage.read(SETTINGS_FILE)))
            if type(found[SIZE]) is not int or found[SIZE] < 1:
                raise ValueError(f"its {SIZE} is no number of prompts")
            return found

    def start(self, settings: Mapping[str, Any], allow_numeric_change: bool) -> bool:
        """Keeps the settings; True where another worker has just begun, and keeps something else from that start.

        Raises:
          UserError: answers are here that were given with other settings, or files of others.
        """
        self._storage.make(FOLDER)
        self._storage.require_plain(FOLDER)
        ours = [f"{FOLDER}/{name}" for name in self._storage.entries(FOLDER) if _BATCH.fullmatch(name)]
        ours += [name for name in DERIVED if self._storage.exists(name)]
        if ours and not self._storage.exists(SETTINGS_FILE):
            raise UserError(
                f"{self._storage.where(ours[0])} is there, and no answers were begun here ({SETTINGS_FILE} is "
                "missing); move it away, or choose another --activations_dir"
            )
        try:
            self._storage.write(SETTINGS_FILE, to_json(settings))
        except FileExistsError:
            there = self.settings() or {}
            if there.get(KEPT) != settings.get(KEPT):
                return True
            may_differ = {NUMERICS} if allow_numeric_change else set()
            if differing := [name for name in settings if there.get(name) != settings[name] and name not in may_differ]:
                name, was, asked = _difference(differing[0], there.get(differing[0]), settings[differing[0]])
                raise UserError(
                    f"{self._storage.where(FOLDER)} holds answers of another run: their {name} is {was!r:.60} and not "
                    f"{asked!r:.60}; choose another --activations_dir, or remove them with --overwrite"
                ) from None
        return False

    def read(self, batch: Batch) -> list[Answer] | None:
        """None where the batch is still to be answered."""
        try:
            content = self._storage.read(batch.name)
        except FileNotFoundError:
            return None
        with damage_is_told(self._storage.where(batch.name), "remove it, and its prompts are answered again"):
            found = [Answer.of_line(line) for line in content.decode("utf-8").splitlines()]
            for answer, prompt in zip(found, batch.samples, strict=True):
                answer.require_of(prompt, self._most_tokens, self._vocab_size)
        return found

    def write(self, batch: Batch, answers: list[Answer]) -> list[Answer]:
        """Returns those that are there now: another worker's, where it was faster."""
        try:
            self._storage.write(batch.name, "".join(answer.to_line() for answer in answers).encode())
        except FileExistsError:
            return self.read(batch) or answers
        return answers

    def erase(self) -> None:
        """Removes answers and what was derived from them, and nothing else; the settings last.

        Raises:
          UserError: the folder is a link.
        """
        if not self._storage.exists(SETTINGS_FILE):
            return
        self._storage.require_plain(FOLDER)
        for name in self._storage.entries(FOLDER):
            if _BATCH.fullmatch(name):
                self._storage.delete(f"{FOLDER}/{name}")
        for name in (*DERIVED, SETTINGS_FILE):
            self._storage.delete(name)

    def put(self, name: str, content: bytes | None) -> None:
        """What can be derived from the answers again; None where there is nothing of the kind."""
        if content is None:
            self._storage.delete(name)
        else:
            self._storage.replace(name, content)


def _difference(name: str, was: Any, asked: Any) -> tuple[str, Any, Any]:
    """Of two settings, the first value that differs, where they have several."""
    if isinstance(was, dict) and isinstance(asked, dict):
        name = next((key for key in asked if was.get(key) != asked[key]), name)
        return name, was.get(name), asked.get(name)
    return name, was, asked


def inputs_digest(samples: Sequence[TokenizedSample]) -> str:
    """`sha256:…` over the names and token ids of the prompts, in order."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(json.dumps([sample.sample_id, sample.length]).encode())
        total.update(np.ascontiguousarray(sample.token_ids, "<i4").data)
    return f"sha256:{total.hexdigest()}"


def in_order(answers: Mapping[int, Answer]) -> Iterator[Answer]:
    """As the input was."""
    return (answers[index] for index in sorted(answers))
