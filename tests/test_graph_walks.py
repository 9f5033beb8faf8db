"""Graphs are what they are called, walks keep to their edges, and the entropy is the walk's own."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from stage02 import make_walks
from transformers import AutoTokenizer

from jax_extract.errors import UserError
from jax_extract.inputs.graph_walks import bigram_entropy, random_walks, step_off_edges, transition_entropy
from jax_extract.inputs.graphs import Graph, make_graph
from jax_extract.inputs.walk_dataset import WalkDataset
from jax_extract.inputs.walk_tokenizer import write_tokenizer
from jax_extract.store.folders import write_file, write_folder

PATH = Graph.of("a path of 4 nodes", 4, [(0, 1), (1, 2), (2, 3)])


def _next_to(graph: Graph, node: int) -> set[int]:
    return set(graph.neighbours[graph.offsets[node] : graph.offsets[node + 1]].tolist())


def test_a_torus_has_the_moves_of_a_king() -> None:
    graph = make_graph("torus", 100, 8, seed=0)
    assert _next_to(graph, 0) == {1, 9, 10, 11, 19, 90, 91, 99}
    assert _next_to(make_graph("torus", 100, 4, seed=0), 55) == {45, 54, 56, 65}
    assert graph.hops().max() == 5 and graph.hops()[0, 55] == 5


@pytest.mark.parametrize("kind", ["torus", "ring", "random_regular"])
def test_regular_graphs_have_equal_degrees_and_the_entropy_of_them(kind: str) -> None:
    graph = make_graph(kind, 36, 8, seed=3)
    assert set(graph.degrees.tolist()) == {8}
    assert graph.entropy_rate == pytest.approx(math.log(8), abs=1e-12)


def test_a_random_graph_may_be_cubic() -> None:
    graph = make_graph("random_regular", 10, 3, seed=0)
    assert set(graph.degrees.tolist()) == {3}
    assert set(make_graph("random_regular", 6, 5, seed=0).degrees.tolist()) == {5}


@pytest.mark.parametrize("kind", ["random_regular", "erdos_renyi"])
def test_a_random_graph_is_its_seeds(kind: str) -> None:
    first, again, other = (make_graph(kind, 30, 6, seed=seed) for seed in (1, 1, 2))
    assert first.edges == again.edges != other.edges
    assert Graph.from_json(json.loads(json.dumps(first.as_json()))).edges == first.edges


def test_the_entropy_rate_weighs_each_node_by_how_often_a_walk_is_there() -> None:
    # Of 6 ends of edges, 4 are at the two inner nodes, where a step is a choice between two.
    assert PATH.entropy_rate == pytest.approx(4 / 6 * math.log(2), abs=1e-12)
    assert PATH.hops()[0].tolist() == [0, 1, 2, 3]


def test_walks_keep_to_edges_and_begin_as_they_go_on() -> None:
    graph = make_graph("erdos_renyi", 20, 5, seed=0)
    walks = random_walks(graph, 4_000, 10, np.random.default_rng(0))
    there = {(a, b) for a, b in zip(walks[:, :-1].ravel().tolist(), walks[:, 1:].ravel().tolist(), strict=True)}
    assert there == {pair for a, b in graph.edges for pair in ((a, b), (b, a))}
    for column in (0, 9):
        often = np.bincount(walks[:, column], minlength=20) / len(walks)
        assert np.abs(often - graph.stationary).max() < 0.025  # five standard deviations of the most frequent node


def test_the_entropy_of_an_evaluation_is_that_of_its_very_transitions() -> None:
    tokens, lengths = np.array([[0, 1, 0, 1], [1, 2, 1, 0]], np.int32), np.array([4, 3], np.int32)
    # Left are 0, 1, 0 and 1, 2: two choices are none, three are between two.
    assert transition_entropy(PATH, tokens, lengths) == pytest.approx(3 / 5 * math.log(2), abs=1e-12)


def test_a_walk_that_leaves_its_graph_is_found_and_padding_is_no_step() -> None:
    tokens = np.array([[0, 1, 0, 0], [1, 2, 0, 3]], np.int32)
    assert step_off_edges(PATH, tokens, np.array([3, 2])) is None
    assert step_off_edges(PATH, tokens, np.array([3, 3])) == (1, 1)
    assert step_off_edges(PATH, tokens, np.array([4, 3])) == (0, 2)


def test_without_a_graph_the_entropy_is_estimated_from_transitions() -> None:
    walks = random_walks(PATH, 5_000, 10, np.random.default_rng(1))
    estimated = bigram_entropy(4, walks, np.full(len(walks), 10))
    assert estimated == pytest.approx(PATH.entropy_rate, rel=0.01)


def test_an_estimate_needs_no_room_for_all_pairs_of_words() -> None:
    tokens, words = np.array([[59_999, 7, 59_999, 8]], np.int32), 60_000
    # Of three transitions, two leave the last word, each for another one.
    tracemalloc.start()
    try:
        assert bigram_entropy(words, tokens, np.array([4])) == pytest.approx(2 / 3 * math.log(2), abs=1e-12)
        assert tracemalloc.get_traced_memory()[1] < 100 * words
    finally:
        tracemalloc.stop()


def test_more_walks_than_are_made_in_memory_are_refused(tmp_path: Path) -> None:
    for options in ({"train_walks": 2**31 - 1}, {"walk_length": 2**31 - 1}, {"validation_walks": 2**31 - 1}):
        with pytest.raises(UserError, match="give fewer or shorter walks"):
            make_walks(tmp_path / "walks", **options)


def test_a_dataset_is_made_where_a_link_leads_and_not_where_nothing_can_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert WalkDataset.open(make_walks(tmp_path / "link")).vocabulary
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name, said in (("astray", "is no folder"), ("file/sub", "is no folder"), ("/proc/x/y", "cannot be written to")):
        with pytest.raises(UserError, match=rf"--dataset_dir .* {said}"):
            make_walks(tmp_path / name)


def test_what_a_killed_attempt_left_is_removed_by_the_next_and_what_another_writes_is_not(tmp_path: Path) -> None:
    left, other = (tmp_path / f".unfinished-{name}-0123456789ab" for name in ("dataset", "dataset-2"))
    for folder in (left, other):
        folder.mkdir()
        (folder / "train.jsonl").write_text("half")

    def fill(folder: Path) -> None:
        make_walks(tmp_path / "dataset")
        assert folder.is_dir()

    with pytest.raises(UserError, match="dataset cannot be written"):  # by then the other one has the name
        write_folder(tmp_path / "dataset", fill)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "dataset"]
    left.write_text("half of a file")
    write_file(tmp_path / "dataset-3", lambda path: path.write_text("whole") and None)
    assert left.exists()


def test_a_graph_that_no_walk_can_cover_is_refused() -> None:
    with pytest.raises(UserError, match="not connected"):
        Graph.of("two pairs", 4, [(0, 1), (2, 3)])


@pytest.mark.parametrize(
    ("kind", "nodes", "neighbours", "said"),
    [
        ("torsu", 100, 8, "unknown graph 'torsu'; the graphs are: torus"),
        ("torus", 90, 8, "90 nodes is no square"),
        ("torus", 100, 6, "cannot have 6 neighbours; give --neighbours 8 or 4"),
        ("ring", 10, 3, "needs an even number"),
        ("random_regular", 11, 3, "no graph of 11 nodes has 3 neighbours of each"),
        ("ring", 10, 10, "give from 1 to 9"),
        ("erdos_renyi", 100, 1, "not connected"),
    ],
)
def test_a_graph_that_cannot_be_is_refused(kind: str, nodes: int, neighbours: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_graph(kind, nodes, neighbours, seed=0)


def test_the_same_options_give_the_same_bytes_and_others_are_refused(tmp_path: Path) -> None:
    first, second = make_walks(tmp_path / "a"), make_walks(tmp_path / "b")
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert before == {path.name: path.read_bytes() for path in second.iterdir()}
    assert set(before) == {"train.jsonl", "validation.jsonl", "vocab.json", "graph.json"}
    make_walks(tmp_path / "a")  # finds it made
    with pytest.raises(UserError, match=r"its train.jsonl is not what was asked for"):
        make_walks(tmp_path / "a", seed=1)
    assert before == {path.name: path.read_bytes() for path in first.iterdir()}
    assert not list(tmp_path.glob(".unfinished*"))


def test_transformers_reads_walks_as_training_does(tmp_path: Path) -> None:
    dataset = WalkDataset.open(make_walks(tmp_path / "walks"))
    write_tokenizer(tmp_path, dataset.vocabulary, 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = json.loads((tmp_path / "walks" / "train.jsonl").read_text().splitlines()[0])["text"]
    assert tokenizer(text)["input_ids"] == dataset.train.tokens[0].tolist()
    assert tokenizer.decode(dataset.train.tokens[0]) == text
    assert len(tokenizer) == 25  # the nodes, and nothing else
