"""Positions and stored dtypes keep exactly what slicing and casting the whole run would keep.

Guarded: from:k, last, mean, mean_from:k, first:n, every:k and at:i,j against `all` on the host, with samples shorter
than the positions; which positions the rows are said to be; what is told of positions that mean nothing and of samples
that give no row; and that bfloat16 and float16 are the cast float32 rows.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from small_run import Told
from tiny_models import random_ids, row_errors, text_of, tiny_folder

from jax_extract import extract
from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.command import extract_to_directory
from models.positions import Positions

LENGTHS = (1, 2, 5, 9, 17, 33, 40)
KINDS = ("all", "from:1", "from:5", "last", "mean", "mean_from:2", "first:3", "every:4", "at:0,5,9", "at:3,7")
SITES = (("after_block", 1), ("ffn_hidden", 2), ("final_norm", None))


@functools.cache
def run_of(positions: str, capture_dtype: str = "float32") -> Any:
    return extract(
        str(tiny_folder("llama")),
        [text_of(ids) for ids in random_ids(LENGTHS)],
        layers=(1, 2),
        hook_points=("after_block", "ffn_hidden", "final_norm"),
        positions=positions,
        capture_dtype=capture_dtype,
        batch_size=len(LENGTHS),
    )


@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        ("last", slice(-1, None)),
        ("from:1", slice(1, None)),
        ("from:9", slice(9, None)),
        ("first:1", slice(0, 1)),
        ("first:6", slice(0, 6)),
        ("first:100", slice(0, 100)),
        ("every:4", slice(0, None, 4)),
        ("every:1", slice(None)),
        ("every:1000", slice(0, 1)),
        ("at:0", slice(0, 1)),
        ("at:3,4,5", slice(3, 6)),
        ("at:16,0,32", slice(0, 33, 16)),
    ],
)
def test_positions_keep_exactly_the_rows_of_the_whole_run_at_those_positions(positions: str, kept: slice) -> None:
    whole, chosen = run_of("all"), run_of(positions)
    for i, length in enumerate(LENGTHS):
        one, all_rows = chosen.sample(str(i)), whole.sample(str(i))
        np.testing.assert_array_equal(one.positions, np.arange(length)[kept])
        for hook, layer in SITES:
            np.testing.assert_array_equal(one.get(layer, hook), all_rows.get(layer, hook)[kept], err_msg=hook)


def test_a_sample_shorter_than_every_position_gives_no_row() -> None:
    run = run_of("at:16,0,32"), run_of("at:3,4,5")
    of_some = [run_of(text) for text in ("from:9", "mean_from:9")]
    for some, wanted in zip(of_some, ([0, 0, 0, 0, 8, 24, 31], [0, 0, 0, 0, 1, 1, 1]), strict=True):
        assert [some.sample(str(i)).get(1).shape[0] for i in range(len(LENGTHS))] == wanted
    assert [run[1].sample(str(i)).get(1).shape[0] for i in range(len(LENGTHS))] == [0, 0, 2, 3, 3, 3, 3]
    assert [run[0].sample(str(i)).get(1).shape[0] for i in range(len(LENGTHS))] == [1, 1, 1, 1, 2, 3, 3]


def test_all_keeps_one_row_for_each_token() -> None:
    for i, length in enumerate(LENGTHS):
        sample = run_of("all").sample(str(i))
        np.testing.assert_array_equal(sample.positions, np.arange(length))
        assert sample.get(1).shape == (length, 54)


@pytest.mark.parametrize(("positions", "first"), [("mean", 0), ("mean_from:1", 1), ("mean_from:9", 9)])
def test_a_mean_is_the_mean_over_real_tokens_alone_from_the_first_one_that_is_asked_for(
    positions: str, first: int
) -> None:
    whole, mean = run_of("all"), run_of(positions)
    for i, length in enumerate(LENGTHS):
        sample = mean.sample(str(i))
        np.testing.assert_array_equal(sample.positions, [-1] if length > first else [])
        for hook, layer in SITES:
            rows = whole.sample(str(i)).get(layer, hook).astype(np.float64)[first:]
            if len(rows):
                assert row_errors(sample.get(layer, hook), rows.mean(axis=0, keepdims=True)).max() <= 1e-6, (hook, i)


@pytest.mark.parametrize("positions", ["all", "last", "mean"])
@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_a_stored_dtype_is_the_cast_of_the_float32_rows(positions: str, name: str, dtype: Any) -> None:
    exact, small = run_of(positions), run_of(positions, name)
    for i in range(len(LENGTHS)):
        for hook, layer in SITES:
            rows = small.sample(str(i)).get(layer, hook)
            assert rows.dtype == dtype
            wanted = exact.sample(str(i)).get(layer, hook).astype(dtype)
            np.testing.assert_array_equal(rows.view(np.uint16), wanted.view(np.uint16), err_msg=hook)


@pytest.mark.parametrize("text", KINDS)
def test_positions_are_written_as_they_are_read(text: str) -> None:
    assert str(Positions.parse(text)) == text


@pytest.mark.parametrize(("text", "same"), [("from:0", "all"), ("mean_from:0", "mean"), ("from:007", "from:7")])
def test_what_means_the_same_is_the_same(text: str, same: str) -> None:
    assert Positions.parse(text) == Positions.parse(same)
    assert str(Positions.parse(text)) == same


@pytest.mark.parametrize(
    "text",
    [
        "",
        "All",
        "some",
        "first",
        "first:",
        "first:-1",
        "every:x",
        "at:",
        "at:1,",
        "at:-1",
        "at:1;2",
        "last:2",
        "from",
        "from:",
        "from:-1",
        "mean:1",
        "mean_from",
        "mean_from:x",
        "all_from:1",
    ],
)
def test_words_that_are_no_positions_are_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(
        UserError, match=r"unknown positions .*all, from:k, last, mean, mean_from:k, first:n, every:k, at:i,j"
    ):
        Positions.parse(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [("first:0", "at least 1"), ("every:0", "at least 1"), ("at:3,1,3", "twice"), ("at:3,03", "twice")],
)
def test_positions_that_keep_nothing_or_one_twice_are_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Positions.parse(text)


@pytest.mark.parametrize("text", KINDS)
def test_the_rows_counted_beforehand_are_the_rows_given(text: str) -> None:
    positions = Positions.parse(text)
    for length in range(1, 14):
        assert positions.rows(length) == len(positions.of(length)) == positions.rows_of(np.array([length]))[0]
        assert positions.keeps_first == (0 in positions.of(length)) or (text, length) == ("last", 1)
        assert (positions.of(length) < 0).any() or (positions.of(length) >= positions.begins).all()
    assert positions.one_row_per_sample == (text in ("last", "mean", "mean_from:2"))


@pytest.mark.parametrize(
    ("positions", "told"),
    [
        ("from:9", ["note 4 samples have no token at positions from:9 and give no row"]),
        ("mean_from:1", ["note 1 sample has no token at positions mean_from:1 and gives no row"]),
        ("first:2", []),
    ],
)
def test_how_many_samples_give_no_row_is_told(positions: str, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("".join(f"{text_of(ids)}\n" for ids in random_ids(LENGTHS)))
    terminal = Told()
    config = ExtractConfig(
        model_path=str(tiny_folder("llama")),
        tasks_file=str(tmp_path / "in.txt"),
        activations_dir=str(tmp_path / "run"),
        layers_to_extract=(1,),
        positions=positions,
    )
    extract_to_directory(config, terminal)
    assert [line for line in terminal.lines if line.startswith("note")] == told


def test_texts_without_a_token_are_refused_in_the_notebook_too() -> None:
    with pytest.raises(UserError, match="none of the texts has a token"):
        extract(str(tiny_folder("llama")), [""])
