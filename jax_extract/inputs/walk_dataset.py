"""A dataset of walks in a folder: train.jsonl and validation.jsonl with `text`, vocab.json, and graph.json if known.

In: a folder. Out: `WalkDataset`: token ids as arrays, and the entropy that a loss is to be compared with. Words stand
between spaces; the word of node i is its number. A folder of the user's own walks needs no graph.json: then the entropy
is estimated from the transitions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.graph_walks import bigram_entropy, step_off_edges, transition_entropy
from jax_extract.inputs.graphs import Graph
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.text import jsonl_samples
from jax_extract.inputs.walk_tokenizer import VOCABULARY_FILE

TRAIN_FILE, VALIDATION_FILE, GRAPH_FILE = "train.jsonl", "validation.jsonl", "graph.json"
TEXT_COLUMN = "text"


@dataclass(frozen=True, eq=False)
class Walks:
    """Token ids of walks, int32 [walks, longest], of which the first `lengths` [walks] of each row are real."""

    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def transitions(self) -> int:
        """What a model predicts of them: every token but the first of each walk."""
        return int(np.maximum(self.lengths - 1, 0).sum())

    def predicted(self) -> Walks:
        """Those with something to predict, which takes two tokens."""
        some = self.lengths > 1
        return self if some.all() else Walks(self.tokens[some], self.lengths[some])

    def cut(self, most: int) -> Walks:
        """The same, none longer than so many tokens."""
        return Walks(self.tokens[:, :most], np.minimum(self.lengths, most))


@dataclass(frozen=True, eq=False)
class WalkDataset:
    """Attributes:
    vocabulary: word -> token id, 0 to its size - 1.
    graph: what was walked on, where the folder says.
    """

    folder: Path
    vocabulary: Mapping[str, int]
    graph: Graph | None
    text_column: str = TEXT_COLUMN

    @classmethod
    def open(cls, folder: Path, text_column: str = TEXT_COLUMN) -> WalkDataset:
        """Finds what the folder must have, and reads what is small; UserError."""
        if not folder.is_dir():
            raise UserError(
                f"there is no dataset folder {folder}; make one with jax-extract walks --dataset_dir {folder}"
            )
        for name in (TRAIN_FILE, VALIDATION_FILE, VOCABULARY_FILE):
            if not (folder / name).is_file():
                raise UserError(f"the dataset {folder} lacks {name}; make it anew with jax-extract walks")
        vocabulary = _read_vocabulary(folder / VOCABULARY_FILE)
        return cls(folder, vocabulary, read_graph(folder, vocabulary), text_column)

    @cached_property
    def train(self) -> Walks:
        return self._walks(TRAIN_FILE)

    @cached_property
    def validation(self) -> Walks:
        return self._walks(VALIDATION_FILE)

    @cached_property
    def digest(self) -> str:
        """`sha256:…` over everything that training depends on."""
        total = hashlib.sha256()
        for name in (TRAIN_FILE, VALIDATION_FILE, VOCABULARY_FILE):
            with (self.folder / name).open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{total.hexdigest()}"

    def entropy(self, walks: Walks) -> tuple[float, str]:
        """Nats a transition of these walks, and what it was computed from."""
        if self.graph is not None:
            return transition_entropy(self.graph, walks.tokens, walks.lengths), "of a simple random walk on its graph"
        train = self.train
        estimated = bigram_entropy(len(self.vocabulary), train.tokens, train.lengths)
        return estimated, "of a first-order walk with the transitions of train.jsonl"

    def _walks(self, name: str) -> Walks:
        path = self.folder / name
        rows, lines = [], []
        for sample in self._samples(path):
            lines.append(sample.meta["line"])
            rows.append(self._ids(sample.text, f"{path}, line {lines[-1]}"))
        if not rows:
            raise UserError(f"{path} holds no walk; make the dataset anew with jax-extract walks")
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        walks = Walks(tokens, lengths)
        if not walks.transitions:
            raise UserError(f"no walk of {path} has two words, so there is nothing to predict; give longer walks")
        if self.graph is not None and (off := step_off_edges(self.graph, tokens, lengths)) is not None:
            here, there = tokens[off[0], off[1] : off[1] + 2]
            raise UserError(
                f"{path}, line {lines[off[0]]}, goes from {here} to {there}, which are no neighbours in {GRAPH_FILE}; "
                f"make the dataset anew with jax-extract walks, or remove {GRAPH_FILE} if the walks are your own"
            )
        return walks

    def _samples(self, path: Path) -> Iterator[Sample]:
        return jsonl_samples(path, self.text_column)

    def _ids(self, text: str, where: str) -> list[int]:
        words = text.split()
        try:
            return [self.vocabulary[word] for word in words]
        except KeyError as error:
            raise UserError(
                f"{where}, has the word {error.args[0][:40]!r}, which is not among the {len(self.vocabulary)} of "
                f"{VOCABULARY_FILE}; dataset and vocabulary do not belong together: make the dataset anew"
            ) from None


def read_graph(folder: Path, vocabulary: Mapping[str, int]) -> Graph | None:
    """The graph of a dataset; None where the folder does not have it. UserError where it is of other nodes."""
    path = folder / GRAPH_FILE
    if not path.is_file():
        return None
    with damage_is_told(f"the graph in {path}", "make the dataset anew with jax-extract walks"):
        graph = Graph.from_json(json.loads(path.read_text(encoding="utf-8")))
    if vocabulary != node_vocabulary(graph):
        raise UserError(
            f"{path} has {graph.nodes} nodes and {VOCABULARY_FILE} {len(vocabulary)} words that are not those nodes; "
            "they do not belong together: make the dataset anew"
        )
    return graph


def node_vocabulary(graph: Graph) -> dict[str, int]:
    return {str(node): node for node in range(graph.nodes)}


def _is_word(text: str) -> bool:
    """Whether a text can have it between two spaces; half of a surrogate pair is in JSON, but no text."""
    return text.split() == [text] and not any("\ud800" <= character <= "\udfff" for character in text)


def _read_vocabulary(path: Path) -> dict[str, int]:
    mend = "make the dataset anew with jax-extract walks"
    with damage_is_told(f"the vocabulary {path}", mend):
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict) or not said:
            raise ValueError("it is no object of words")
        ids = sorted(token if type(token) is int else -1 for token in said.values())
        if ids != list(range(len(said))):
            raise ValueError(f"its token ids are not 0 to {len(said) - 1}, each once")
        if others := [word for word in said if not _is_word(word)]:
            raise ValueError(f"{others[0]!a:.40} is no word: it is empty, has a space in it or is not Unicode")
    return said
