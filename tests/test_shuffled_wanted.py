"""Shuffled reading of some rows only: by position and by token. What is left comes exactly once an epoch, in an order
that depends on the choice and the seed alone, in shards of equal size, and goes on at the exact next row.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_shuffled import BUFFER, SITES, _all_rows, _epochs, _in_memory, _parts, _require_own_rows, _rows, _same, _write

from jax_extract.errors import UserError
from jax_extract.store.parts import Site
from jax_extract.store.reader import open_activations
from jax_extract.store.shuffled.rows import ShuffledRows
from jax_extract.store.sidecar import BLOCK_BYTES

Choice = Callable[[int, int, int], bool]  # position, tokens of the sample, token id
LENGTHS = [len(positions) for part in _parts() for positions in part][::-1]  # by sample index


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("small"), _parts())


def far(positions: np.ndarray) -> np.ndarray:
    return positions >= 30


def even(samples: np.ndarray) -> np.ndarray:
    return samples % 2 == 0


class Tokenizer:
    all_special_ids = (3_000, 3_005, 5_001)


CHOICES: dict[str, tuple[dict[str, Any], Choice]] = {
    "from": ({"positions": "from:1"}, lambda p, n, t: p >= 1),
    "far from": ({"positions": "from:50"}, lambda p, n, t: p >= 50),
    "first": ({"positions": "first:3"}, lambda p, n, t: p < 3),
    "every": ({"positions": "every:7"}, lambda p, n, t: p % 7 == 0),
    "at": ({"positions": "at:2,40"}, lambda p, n, t: p in (2, 40)),
    "last": ({"positions": "last"}, lambda p, n, t: p == n - 1),
    "function": ({"positions": far}, lambda p, n, t: p >= 30),
    "tokens": ({"without_tokens": [2_000, 2_001, np.int64(9_003)]}, lambda p, n, t: t not in (2_000, 2_001, 9_003)),
    "tokenizer": ({"without_tokens": Tokenizer()}, lambda p, n, t: t not in Tokenizer.all_special_ids),
    "samples": ({"samples": even}, lambda p, n, t: t // 1_000 % 2 == 0),
    "samples and positions": ({"samples": even, "positions": "from:3"}, lambda p, n, t: t // 1_000 % 2 == 0 and p >= 3),
    "both": (
        {"positions": "from:2", "without_tokens": [2_010]},
        lambda p, n, t: p >= 2 and t != 2_010,
    ),
}
every_choice = pytest.mark.parametrize(("options", "is_wanted"), CHOICES.values(), ids=list(CHOICES))


def chosen(is_wanted: Choice) -> list[tuple[int, int]]:
    return [(s, p) for s, p in _all_rows(_parts()) if is_wanted(p, LENGTHS[s], 1_000 * s + p)]


@every_choice
@pytest.mark.parametrize("buffer", [BUFFER, 1 << 22])
def test_what_is_wanted_comes_once_an_epoch_and_nothing_else(
    small: Path, options: dict[str, Any], is_wanted: Choice, buffer: int
) -> None:
    run = open_activations(small)
    with run.shuffled(
        [9, 3], rows=50, seed=5, epochs=2, drop_remainder=False, buffer_bytes=2 * buffer, **options
    ) as batches:
        assert batches.batches_per_epoch == -(-len(chosen(is_wanted)) // 50)
        epochs = _epochs(batches)
    assert list(epochs) == [0, 1]
    for epoch in epochs.values():
        assert sorted(_rows(epoch)) == chosen(is_wanted)
        for batch in epoch:
            _require_own_rows(batch, [9, 3], "float32")
    assert _rows(epochs[0]) != _rows(epochs[1])


def test_all_rows_chosen_by_name_are_the_order_and_the_state_of_no_choice(small: Path) -> None:
    run = open_activations(small)
    plain = run.shuffled(3, rows=100, epochs=1, buffer_bytes=BUFFER)
    for options in ({"positions": "all"}, {"without_tokens": []}, {"without_tokens": None}):
        other = run.shuffled(3, rows=100, epochs=1, buffer_bytes=BUFFER, **options)
        assert other.get_state() == plain.get_state()
    assert "rows_wanted" not in plain.get_state()  # as states that are stored already have it


def test_a_choice_made_otherwise_gives_the_same_order_where_it_keeps_the_same_rows(small: Path) -> None:
    run = open_activations(small)
    options: dict[str, Any] = {"layers": 3, "rows": 100, "epochs": 1, "buffer_bytes": BUFFER}
    orders = [_rows(list(run.shuffled(**options, positions=way))) for way in ("from:30", far)]
    assert orders[0] == orders[1]
    again = _in_memory(_parts()).shuffled(**options, positions="from:30")
    assert _rows(list(again)) == orders[0]


@pytest.mark.parametrize("count", [2, 5])
def test_shards_of_what_is_wanted_are_disjoint_together_all_and_equally_large(small: Path, count: int) -> None:
    run = open_activations(small)
    options: dict[str, Any] = {"rows": 100, "epochs": 1, "positions": "every:3", "buffer_bytes": BUFFER}
    shards = [
        _rows(list(run.shuffled(3, shard=(index, count), drop_remainder=False, **options))) for index in range(count)
    ]
    assert sorted(row for shard in shards for row in shard) == chosen(lambda p, n, t: p % 3 == 0)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    batches = [run.shuffled(3, shard=(index, count), **options).batches_per_epoch for index in range(count)]
    assert len(set(batches)) == 1


@pytest.mark.parametrize("buffer", [BUFFER, 1 << 22])
def test_a_new_reader_of_some_rows_goes_on_at_the_exact_next_row(small: Path, buffer: int) -> None:
    def reader() -> ShuffledRows:
        run = open_activations(small)
        return run.shuffled(3, rows=300, epochs=2, positions="from:1", without_tokens=[2_004], buffer_bytes=buffer)

    batches, states = [], []
    with reader() as first:
        for batch in first:
            batches.append(batch)
            states.append(json.dumps(first.get_state()))
    for number in range(0, len(states), 5):
        with reader() as again:
            again.set_state(json.loads(states[number]))
            rest = [next(again) for _ in range(min(2, len(batches) - number - 1))]
        assert all(_same(one, other) for one, other in zip(rest, batches[number + 1 :], strict=False))


def test_a_state_of_other_rows_is_refused_with_both_choices(small: Path) -> None:
    def reader(**options: Any) -> ShuffledRows:
        return open_activations(small).shuffled(3, rows=100, buffer_bytes=BUFFER, **options)

    state = reader(positions="from:1").get_state()
    for options, told in (
        ({}, "this reader has all"),
        ({"positions": "from:2"}, "positions='from:1'.* this reader has positions='from:2'"),
        ({"positions": "from:1", "without_tokens": [5]}, r"without_tokens=\[5\]"),
        ({"positions": far}, "positions='a function'"),
    ):
        with pytest.raises(UserError, match=told):
            reader(**options).set_state(state)
    with pytest.raises(UserError, match="taken with the rows all"):
        reader(positions="from:1").set_state(reader().get_state())
    of_function = reader(positions=far).get_state()
    with pytest.raises(UserError, match="kept="):  # another function
        reader(positions=lambda positions: positions >= 31).set_state(of_function)
    reader(positions=lambda positions: positions >= 30).set_state(of_function)


def test_rows_that_straddle_checksum_blocks_come_whole_and_stretches_that_nobody_wants_are_not_read(
    tmp_path: Path,
) -> None:
    parts = [[np.arange(4_000 + 700 * i)] * 2 for i in range(4)]
    run = open_activations(_write(tmp_path, parts, sites=[Site("after_block", 3, 250)]))
    options: dict[str, Any] = {"rows": 100, "epochs": 1, "drop_remainder": False, "buffer_bytes": 12 << 20}
    reader = run.shuffled(3, positions="from:3900", read_bytes=BLOCK_BYTES, **options)
    whole = run.shuffled(3, read_bytes=BLOCK_BYTES, **options)
    assert len(reader._layout.pieces) < len(whole._layout.pieces) // 2
    batches = list(reader)
    assert sorted(_rows(batches)) == [row for row in _all_rows(parts) if row[1] >= 3_900]
    for batch in batches:
        _require_own_rows(batch, [3], "float32")


def test_torch_and_jax_get_the_same_choice(small: Path) -> None:
    torch = pytest.importorskip("torch")
    import jax

    run = open_activations(small)
    options: dict[str, Any] = {"rows": 100, "epochs": 1, "positions": "from:1", "buffer_bytes": BUFFER}
    expected = list(run.shuffled(3, **options))
    dataset = pickle.loads(pickle.dumps(run.shuffled(3, **options).for_torch()))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    on_devices = run.shuffled(3, **options).on_devices(sharding)
    for batch, tensors, on_device in zip(expected, loader, on_devices, strict=True):
        assert tensors["token_ids"].tolist() == on_device.token_ids.tolist() == batch.token_ids.tolist()
        assert np.asarray(on_device.activations).tobytes() == batch.activations.tobytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"positions": "from"}, "positions='from' is no choice of positions; expected one of: all, last, first:n"),
        ({"positions": "mean"}, "positions='mean' is no choice"),
        ({"positions": "first:0"}, "positions='first:0' is no choice"),
        ({"positions": "every:0"}, "is no choice"),
        ({"positions": 3}, "positions=3 is no choice"),
        ({"positions": lambda p: p}, r"one truth value for each of \d+ positions; the function gave int32"),
        ({"positions": lambda p: True}, r"the function gave bool of shape \[\]"),
        ({"without_tokens": "pad"}, "without_tokens='pad' must be token ids, or a tokenizer"),
        ({"without_tokens": 3}, "without_tokens=3 must be token ids"),
        ({"without_tokens": [1.5]}, r"without_tokens holds 1\.5, which is no token id"),
        ({"without_tokens": [-1]}, "without_tokens holds -1"),
        ({"positions": "from:1000"}, r"has 0 rows of \d+ left by positions and without_tokens"),
    ],
)
def test_choices_that_cannot_be_made_are_refused_by_name(small: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        open_activations(small).shuffled(3, rows=100, **options)


def test_means_have_no_positions_to_choose_by(tmp_path: Path) -> None:
    run = open_activations(_write(tmp_path, [[np.array([-1])] * 9], sites=SITES[:1]))
    with pytest.raises(UserError, match="has no meaning for this run: its rows are means"):
        run.shuffled(3, rows=2, positions="from:1")
    assert len(list(run.shuffled(3, rows=3, epochs=1, without_tokens=[0]))) == 3
