"""Shuffled reading: every row once an epoch and whose it is, the same order again, the exact next row after a stop."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gcs_server import running
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_extract.errors import UserError
from jax_extract.store.ledger import Ledger
from jax_extract.store.memory import MemorySink
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.reader import Run, open_activations
from jax_extract.store.shuffled import source
from jax_extract.store.shuffled.order import Epoch, Layout, random_order
from jax_extract.store.shuffled.rows import ShuffledBatch, ShuffledRows
from jax_extract.store.shuffled.source import Who
from jax_extract.store.sidecar import BLOCK_BYTES
from jax_extract.store.storage.direct import PAGE, DirectDirectory, page_memory
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.writer import PartSink, PartWriter, RowPiece

WIDTH = 64
LAYERS = (3, 7, 9)
SITES = [Site("after_block", layer, WIDTH) for layer in LAYERS]
BUFFER = 400_000  # a third of the small run at one layer


def _values(samples: np.ndarray, positions: np.ndarray, layer: int, width: int, dtype: str) -> np.ndarray:
    """[rows, width]: every row says in its bits whose it is; small whole numbers are exact in every dtype."""
    rows = np.zeros((len(samples), width), np.float32)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = samples // 100, samples % 100, positions // 100, positions % 100
    rows[:, 4] = layer
    rows[:, 5:] = (samples * 31 + positions * 7 + layer)[:, None] % 101
    return rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _tokens(sample: int, positions: np.ndarray) -> np.ndarray:
    """int32, every token of a sample that reaches up to these positions."""
    return (1_000 * sample + np.arange(int(positions.max(initial=0)) + 1)).astype(np.int32)


def _fill(sink: PartSink, sites: Sequence[Site], dtype: str, parts: Sequence[Sequence[np.ndarray]]) -> None:
    """Parts of samples whose rows have these positions; sample indices run backwards, as the longest come first."""
    sample = sum(map(len, parts))
    for number, positions in enumerate(parts, 1):
        samples = np.arange(sample - 1, sample - 1 - len(positions), -1)
        sample -= len(positions)
        lengths = [len(p) for p in positions]
        part = sink.begin(
            PartContent(
                batch=number,
                part=1,
                parts_in_batch=1,
                sample_indices=samples,
                sample_ids=tuple(f"s{i}" for i in samples),
                token_ids=tuple(_tokens(i, p) for i, p in zip(samples, positions, strict=True)),
                positions=tuple(p.astype(np.int32) for p in positions),
                full_lengths=np.array(lengths, np.int64),
                meta=tuple({} for _ in lengths),
                plan=f"plan {number}",
            )
        )
        for index, places in zip(samples, positions, strict=True):
            rows = {
                site.key: _values(np.full(len(places), index), places, site.layer or 0, site.width, dtype)[None]
                for site in sites
            }
            part.append(rows, [RowPiece(0, 0, len(places))], lambda: None)
        part.commit()
    sink.close()


def _write(
    root: Any,
    parts: Sequence[Sequence[np.ndarray]],
    dtype: str = "float32",
    sites: Sequence[Site] = SITES,
    shard_format: str = "safetensors",
) -> Path:
    storage = open_storage(root)
    storage.make()
    identity = {
        "sites": [{"hook": s.hook, "layer": s.layer, "width": s.width} for s in sites],
        "capture_dtype": dtype,
    }
    run = {"identity": identity, "numerics": {}, "description": {"model_name": "m", "hidden_dim": sites[0].width}}
    ledger = Ledger.start(storage, run)
    _fill(PartWriter(ledger, sites, shard_format, dtype, "abc"), sites, dtype, parts)
    return root


def _in_memory(parts: Sequence[Sequence[np.ndarray]]) -> Run:
    sink = MemorySink(SITES, "float32")
    _fill(sink, SITES, "float32", parts)
    return Run({}, SITES, sink.parts)


def _parts(count: int = 60, seed: int = 0) -> list[list[np.ndarray]]:
    """About 4,800 rows: samples of 20 to 59 tokens, one to three of them a part."""
    random = np.random.default_rng(seed)
    return [[np.arange(random.integers(20, 60)) for _ in range(1 + i % 3)] for i in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("small"), _parts())


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of several checksum blocks, one layer; rows of 1,000 bytes straddle every block."""
    parts = [[np.arange(1, 4_000 + 700 * i, 2)] * 2 for i in range(6)]
    return _write(tmp_path_factory.mktemp("blocks"), parts, sites=[Site("after_block", 3, 250)])


def _epochs(batches: Iterator[ShuffledBatch]) -> dict[int, list[ShuffledBatch]]:
    return {epoch: list(group) for epoch, group in itertools.groupby(batches, lambda batch: batch.epoch)}


def _rows(batches: Sequence[ShuffledBatch]) -> list[tuple[int, int]]:
    """(sample, position) of every row, in order."""
    return [
        (int(sample), int(position))
        for batch in batches
        for sample, position in zip(batch.sample_indices, batch.positions, strict=True)
    ]


def _all_rows(parts: Sequence[Sequence[np.ndarray]]) -> list[tuple[int, int]]:
    samples = [positions for part in parts for positions in part]
    return sorted((len(samples) - 1 - i, int(p)) for i, positions in enumerate(samples) for p in positions)


def _require_own_rows(batch: ShuffledBatch, layers: Sequence[int], dtype: str) -> None:
    """Every row's values are those of the sample and position that the batch gives."""
    told = np.where(batch.positions < 0, -1, 1_000 * batch.sample_indices + batch.positions)
    assert batch.token_ids.tolist() == told.tolist()
    rows = batch.activations if batch.activations.ndim == 3 else batch.activations[:, None]
    for number, layer in enumerate(layers):
        expected = _values(batch.sample_indices, batch.positions, layer, rows.shape[2], dtype)
        assert rows[:, number].tobytes() == expected.tobytes()


def _same(one: ShuffledBatch, other: ShuffledBatch) -> bool:
    return one.epoch == other.epoch and all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for name in ("activations", "sample_indices", "positions", "token_ids")
    )


# -------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize(("dtype", "shard_format"), [("float32", "pickle"), ("bfloat16", "npz"), ("float16", "pickle")])
@pytest.mark.parametrize("layers", [7, (9, 3), ()])
def test_every_row_comes_once_an_epoch_and_is_the_row_of_its_sample_and_position(
    tmp_path: Path, dtype: str, shard_format: str, layers: Any
) -> None:
    parts = [*_parts(45), [], [np.zeros(0)] * 2]  # and parts without a row
    sites = SITES if layers != () else [Site("final_norm", None, WIDTH)]
    hook, wanted = ("final_norm", None) if layers == () else ("after_block", layers)
    run = open_activations(_write(tmp_path, parts, dtype, sites, shard_format))
    with run.shuffled(
        wanted, hook, rows=100, seed=5, epochs=2, drop_remainder=False, buffer_bytes=2 * BUFFER
    ) as batches:
        epochs = _epochs(batches)
    assert list(epochs) == [0, 1]
    for epoch in epochs.values():
        assert sorted(_rows(epoch)) == _all_rows(parts)
        assert [len(batch) for batch in epoch[:-1]] == [100] * (len(epoch) - 1)
    first = epochs[0][0]
    assert first.activations.shape == ((100, 2, WIDTH) if layers == (9, 3) else (100, WIDTH))
    assert (str(first.activations.dtype), first.sample_indices.dtype, first.positions.dtype) == (dtype, "i8", "i4")
    for batch in epochs[0] + epochs[1]:
        named = [layers] if isinstance(layers, int) else layers
        _require_own_rows(batch, named or [0], dtype)


def test_rows_that_straddle_checksum_blocks_come_once_and_whole(blocks: Path) -> None:
    parts = [[np.arange(1, 4_000 + 700 * i, 2)] * 2 for i in range(6)]
    batches = list(
        open_activations(blocks).shuffled(
            rows=1000, epochs=1, drop_remainder=False, buffer_bytes=12 << 20, read_bytes=1
        )
    )
    assert sorted(_rows(batches)) == _all_rows(parts)
    for batch in batches:
        _require_own_rows(batch, [3], "float32")


def test_positions_in_no_even_steps_and_means_are_kept(tmp_path: Path) -> None:
    parts = [[np.array([0, 3, 4]), np.array([-1]), np.array([0, 3])], [np.array([9, 3, 5, 6])]]
    run = open_activations(_write(tmp_path, parts))
    (batch,) = run.shuffled(3, rows=100, epochs=1, drop_remainder=False)
    assert sorted(_rows([batch])) == _all_rows(parts)
    _require_own_rows(batch, [3], "float32")


def test_token_ids_that_there_is_no_room_for_are_read_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_TOKENS_KEPT", 400)  # of one part or two
    with open_activations(small).shuffled(3, rows=100, epochs=1, buffer_bytes=BUFFER) as batches:
        for batch in batches:
            _require_own_rows(batch, [3], "float32")
        assert len(batches._source._tokens._kept) <= 2


def test_positions_in_even_steps_take_no_memory_a_row() -> None:
    (part,) = _in_memory([[np.arange(0, 900, 3), np.arange(5), np.array([7])]]).parts
    who = Who(part.content)
    assert who._positions is None
    assert who.of(298, 306)[1].tolist() == [894, 897, 0, 1, 2, 3, 4, 7]
    assert who.of(298, 306)[0].tolist() == [2, 2, 1, 1, 1, 1, 1, 0]


def test_a_run_in_memory_gives_the_batches_of_the_run_on_disk(small: Path) -> None:
    options: dict[str, Any] = {"layers": [3, 7], "rows": 100, "epochs": 1, "buffer_bytes": 2 * BUFFER}
    pairs = zip(_in_memory(_parts()).shuffled(**options), open_activations(small).shuffled(**options), strict=True)
    assert all(_same(one, other) for one, other in pairs)


def test_a_batch_may_be_larger_than_the_buffer(small: Path) -> None:
    (batch,) = open_activations(small).shuffled(3, rows=4_000, epochs=1, buffer_bytes=BUFFER)
    assert len(set(_rows([batch]))) == 4_000


def test_a_batch_is_its_owners_to_change(small: Path) -> None:
    with open_activations(small).shuffled(3, rows=100, buffer_bytes=BUFFER) as batches:
        kept = [next(batches) for _ in range(5)]
        before = [batch.activations.copy() for batch in kept]
        kept[0].activations[:] = 0
        for _ in range(100):
            next(batches)
    assert all(np.array_equal(batch.activations, was) for batch, was in zip(kept[1:], before[1:], strict=True))


# -------------------------------------------------------------------------------------------------- the order


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(small: Path) -> None:
    def order(seed: int, **options: Any) -> dict[int, list[tuple[int, int]]]:
        run = open_activations(small)
        found = _epochs(run.shuffled(3, rows=100, seed=seed, epochs=2, buffer_bytes=BUFFER, **options))
        return {epoch: _rows(batches) for epoch, batches in found.items()}

    first = order(1)
    assert order(1) == first
    assert first[0] != first[1]
    assert order(2)[0] not in first.values()


def test_the_order_of_a_seed_is_the_same_for_ever(small: Path) -> None:
    """A changed order makes every stored state worthless: it wants another `version` in the state."""
    batches = _epochs(open_activations(small).shuffled(3, rows=100, seed=1, epochs=1, buffer_bytes=BUFFER))[0]
    digest = hashlib.sha256(json.dumps(_rows(batches)).encode()).hexdigest()
    assert digest[:16] == "8fc808a7b53490a0"
    assert random_order(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]


def test_random_orders_are_permutations_and_every_place_is_equally_likely() -> None:
    for count in (0, 1, 2, 3, 7, 8, 9, 1000):
        assert sorted(random_order(count, 3)) == list(range(count))
    first = Counter(int(random_order(5, seed)[0]) for seed in range(5000))
    assert all(abs(first[i] - 1000) < 150 for i in range(5))


part_sizes = st.lists(st.integers(0, 3000), min_size=1, max_size=30).filter(any)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(part_sizes, st.integers(1, 1500), st.integers(1, 3), st.integers(18, 23), st.integers(20, 26), st.integers(1, 4))
def test_rows_in_memory_never_pass_the_bound_and_each_comes_once(
    part_rows: list[int], values: int, sites: int, read: int, buffer: int, shards: int
) -> None:
    try:
        layout = Layout.of(part_rows, 2 * values, sites, 1 << buffer, 1 << read, shards)
    except UserError as error:
        least = int(str(error).rpartition(" ")[2])  # what the sentence says is enough
        layout = Layout.of(part_rows, 2 * values, sites, least, 1 << read, shards)
        buffer_bytes = least
    else:
        buffer_bytes = 1 << buffer
    assert layout.pool_rows * sites * 2 * values <= buffer_bytes * 7 // 8
    covered: list[tuple[int, int, int]] = []
    for shard in range(shards):
        epoch = Epoch(layout, 1, 0, (shard, shards))
        assert abs(epoch.rows * shards - sum(part_rows)) <= shards
        held, read_groups, waiting = 0, 0, Counter[int]()
        for window in range(epoch.windows):
            while read_groups <= epoch.last_group(window):
                dealt = list(epoch.deal(read_groups))
                assert all(epoch.first_group(w) <= read_groups <= epoch.last_group(w) and w >= window for w, _ in dealt)
                rows = sorted(int(row) for _, rows in dealt for row in rows)
                assert rows == list(range(epoch.group_rows(read_groups)))
                for due, some in dealt:
                    waiting[due] += len(some)
                held += len(rows)
                read_groups += 1
            assert held <= layout.pool_rows
            held -= waiting.pop(window, 0)
        assert (held, len(waiting), read_groups) == (0, 0, epoch.groups)
        covered += [tuple(piece) for group in range(epoch.groups) for piece in epoch.pieces(group).tolist()]
    for part, rows in enumerate(part_rows):
        ranges = sorted((start, stop) for number, start, stop in covered if number == part)
        assert [start for start, _ in ranges] + [rows] == [0, *(stop for _, stop in ranges)] or not rows


def _same_sample_pairs(batches: Sequence[ShuffledBatch]) -> float:
    """Pairs of one sample within a batch over what a uniform shuffle has, on average."""
    samples = np.concatenate([batch.sample_indices for batch in batches])
    sizes = np.bincount(samples)
    uniform = (sizes * (sizes - 1)).sum() / (len(samples) * (len(samples) - 1))
    pairs = total = 0
    for batch in batches:
        counts = np.bincount(batch.sample_indices)
        pairs += (counts * (counts - 1)).sum()
        total += len(batch) * (len(batch) - 1)
    return pairs / total / uniform


def test_a_run_that_fits_into_the_buffer_is_shuffled_uniformly(small: Path) -> None:
    batches = list(open_activations(small).shuffled(3, rows=100, epochs=4, buffer_bytes=1 << 22))
    assert 0.9 < _same_sample_pairs(batches) < 1.1


def test_rows_that_come_out_together_were_read_over_a_longer_stretch_than_the_buffer() -> None:
    """A buffer filled, shuffled and emptied has pairs in the ratio of the run's rows to its own."""
    run = _in_memory([[np.arange(25)] * 2 for _ in range(600)])
    buffer_rows = 3_000
    batches = list(run.shuffled(3, rows=100, epochs=1, buffer_bytes=buffer_rows * (4 * WIDTH + 12)))
    assert 1 < _same_sample_pairs(batches) < 0.8 * 30_000 / buffer_rows


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize(("drop_remainder", "buffer"), [(True, BUFFER), (False, BUFFER), (False, 1 << 22)])
def test_a_new_reader_goes_on_at_the_exact_next_row_from_every_state(
    small: Path, drop_remainder: bool, buffer: int
) -> None:
    def reader() -> ShuffledRows:
        run = open_activations(small)
        return run.shuffled(3, rows=300, seed=3, epochs=2, drop_remainder=drop_remainder, buffer_bytes=buffer)

    batches, states = [], []
    with reader() as first:
        states.append(json.dumps(first.get_state()))
        for batch in first:
            batches.append(batch)
            states.append(json.dumps(first.get_state()))
    assert len(batches) == 2 * first.batches_per_epoch
    for number, state in enumerate(states):
        with reader() as again:
            again.set_state(json.loads(state))
            assert again.get_state() == json.loads(state)
            rest = list(itertools.islice(again, 3))
        assert len(rest) == min(3, len(batches) - number)
        assert all(_same(one, other) for one, other in zip(rest, batches[number:], strict=False))


def test_the_buffer_is_as_large_after_going_on_as_before(small: Path) -> None:
    def reader() -> ShuffledRows:
        return open_activations(small).shuffled(3, rows=130, epochs=1, drop_remainder=False, buffer_bytes=BUFFER)

    with reader() as batches:
        for _ in range(10):
            next(batches)
        state = batches.get_state()
        assert state["taken"] > 0
    with reader() as batches:
        batches.set_state(state)
        for _ in range(batches.batches_per_epoch - 10):
            next(batches)
        assert batches._flow is not None
        assert batches._flow._pool.free == batches._layout.pool_rows


def test_a_state_of_another_run_or_of_other_settings_is_refused_by_its_key(small: Path, tmp_path: Path) -> None:
    def reader(path: Path = small, **changes: Any) -> ShuffledRows:
        options = {"layers": 3, "rows": 100, "seed": 3, "buffer_bytes": BUFFER, **changes}
        return open_activations(path).shuffled(**options)

    state = reader().get_state()
    for key, changes in {
        "rows": {"rows": 101},
        "seed": {"seed": 4},
        "sites": {"layers": 7},
        "stacked": {"layers": [3]},
        "shard": {"shard": (0, 2)},
        "buffer_bytes": {"buffer_bytes": 2 * BUFFER},
        "read_bytes": {"read_bytes": 1 << 20},
        "drop_remainder": {"drop_remainder": False},
    }.items():
        with pytest.raises(UserError, match=f"taken with {key} "):
            reader(**changes).set_state(state)
    other = _write(tmp_path / "other", _parts())
    with pytest.raises(UserError, match="'run' is of another run"):
        reader(other).set_state(state)
    for damaged in ({}, {**state, "more": 1}, [], {k: v for k, v in state.items() if k != "taken"}):
        with pytest.raises(UserError, match="no state of a shuffled reader"):
            reader().set_state(damaged)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="taken with version"):
        reader().set_state({**state, "version": 0})
    for damaged in ({**state, "row": -1}, {**state, "taken": 0.5}, {**state, "epoch": None}):
        with pytest.raises(UserError, match="damaged"):
            reader().set_state(damaged)
    with pytest.raises(UserError, match="damaged"), reader() as batches:
        batches.set_state({**state, "window": 10**6})
        next(batches)
    reader(epochs=7).set_state(state)  # how long to go on is free


def test_a_state_taken_before_further_parts_were_committed_is_refused(small: Path, tmp_path: Path) -> None:
    for path in small.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(small)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(small)).write_bytes(path.read_bytes())
    (tmp_path / "_run/commits/000060_001.json").unlink()
    state = open_activations(tmp_path).shuffled(3, rows=100, buffer_bytes=BUFFER).get_state()
    with pytest.raises(UserError, match="other parts"):
        open_activations(small).shuffled(3, rows=100, buffer_bytes=BUFFER).set_state(state)


def test_after_a_failed_read_nothing_is_missed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or bucket fails for a moment: the caller sees it, and `next` again gives the batch it asked for."""
    expected = list(open_activations(small).shuffled(3, rows=100, epochs=1, buffer_bytes=BUFFER))
    read_into, calls = DirectDirectory.read_into, itertools.count()

    def failing(self: DirectDirectory, *words: Any) -> int:
        if next(calls) % 10 == 9:
            raise OSError(5, "Input/output error")
        return read_into(self, *words)

    monkeypatch.setattr(DirectDirectory, "read_into", failing)
    found, failures = [], 0
    with open_activations(small).shuffled(3, rows=100, epochs=1, buffer_bytes=BUFFER) as batches:
        while len(found) < len(expected):
            try:
                found.append(next(batches))
            except UserError as error:
                assert "cannot be read" in str(error)
                failures += 1
                if failures == 3:
                    monkeypatch.setattr(DirectDirectory, "read_into", read_into)
    assert failures == 3
    assert all(_same(one, other) for one, other in zip(found, expected, strict=True))


# --------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_are_disjoint_together_all_and_equally_large(small: Path, count: int) -> None:
    options: dict[str, Any] = {"rows": 100, "seed": 2, "epochs": 1, "buffer_bytes": BUFFER}
    run = open_activations(small)
    shards = [
        _rows(list(run.shuffled(3, shard=(index, count), drop_remainder=False, **options))) for index in range(count)
    ]
    assert sorted(row for shard in shards for row in shard) == _all_rows(_parts())
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_shard_gets_other_rows_in_every_epoch(small: Path) -> None:
    run = open_activations(small)
    epochs = _epochs(run.shuffled(3, rows=100, shard=(0, 2), epochs=2, buffer_bytes=BUFFER))
    assert len(set(_rows(epochs[0])) & set(_rows(epochs[1]))) < 0.8 * len(_rows(epochs[0]))


def test_all_shards_have_equally_many_batches_where_remainders_are_dropped(tmp_path: Path) -> None:
    run = open_activations(_write(tmp_path, [[np.arange(39)]], sites=SITES[:1]))
    readers = [run.shuffled(3, rows=10, shard=(index, 2), epochs=1) for index in range(2)]
    assert [reader.batches_per_epoch for reader in readers] == [1, 1]  # 19 and 20 rows
    assert [len(list(reader)) for reader in readers] == [1, 1]


# ------------------------------------------------------------------------------------------- what is read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[list[int], Counter[str]]]:
    """Sizes of the range reads so far, and how often each whole file was read."""
    ranges: list[int] = []
    whole: Counter[str] = Counter()
    read = Directory.read

    def count(storage: type[Directory]) -> None:
        read_into = storage.read_into

        def counted(self: Directory, name: str, offset: int, buffer: memoryview, *words: Any) -> int:
            if type(self) is storage:
                ranges.append(len(buffer))
            return read_into(self, name, offset, buffer, *words)

        monkeypatch.setattr(storage, "read_into", counted)

    def counted(self: Directory, name: str, *words: Any, **named: Any) -> bytes:
        whole[name] += 1
        return read(self, name, *words, **named)

    count(DirectDirectory)
    count(Directory)
    monkeypatch.setattr(Directory, "read", counted)
    return lambda: (ranges, whole)


@pytest.mark.parametrize(("width", "most"), [(256, 1.0), (192, 1.0), (250, 1.13)])
def test_checksum_blocks_are_hardly_read_twice_and_files_never_whole(
    tmp_path: Path, reads: Callable[[], tuple[list[int], Counter[str]]], width: int, most: float
) -> None:
    parts = [[np.arange(9 * BLOCK_BYTES // (4 * width) + 100)] * 2 for _ in range(2)]
    run = open_activations(_write(tmp_path, parts, sites=[Site("after_block", 3, width)]))
    total = sum(len(p) for part in parts for p in part) * 4 * width
    batches = run.shuffled(rows=1000, epochs=1, drop_remainder=False, buffer_bytes=100 << 20, read_bytes=4 << 20)
    assert sum(len(batch) for batch in batches) * 4 * width == total
    ranges, whole = reads()
    assert total <= sum(ranges) <= most * total
    assert max(ranges) <= 9 << 20
    assert not [name for name in whole if name.startswith("layer_")]


def test_a_bucket_gives_the_same_batches_by_ranges_of_its_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"layers": [3, 7], "rows": 100, "epochs": 1, "buffer_bytes": 2 * BUFFER}
    parts = [[np.arange(40)] * 3 for _ in range(25)]
    with running() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.make_bucket("shuffled")
        run = open_activations(_write("gs://shuffled/run", parts))
        server.forget_log()
        batches = list(run.shuffled(**options))
        reads = server.log("read", "layer_")
    local = open_activations(_write(tmp_path, parts)).shuffled(**options)
    assert all(_same(one, other) for one, other in zip(batches, local, strict=True))
    assert len(reads) == 2 * 25
    assert all(read["range"] for read in reads)


@pytest.mark.parametrize("refused", [False, True])
def test_reads_past_the_page_cache_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """At every alignment, at the end of the file and behind it; and where the file system does not have such reads."""
    content = np.random.default_rng(0).integers(0, 256, 10 * PAGE + 123, dtype=np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    memory, pread, opened = page_memory(20 * PAGE), os.preadv, []

    def preadv(file: int, buffers: Any, offset: int) -> int:
        opened.append(offset)
        if refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pread(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    storage = DirectDirectory(tmp_path)
    for offset, size in itertools.product((0, 1, PAGE - 1, PAGE, 3 * PAGE + 77), (0, 1, PAGE, 3 * PAGE, 5 * PAGE + 9)):
        for more in (0, 10 * PAGE):
            for lies in (offset % PAGE, (offset + 1) % PAGE):  # as in the file, and not
                memory[:] = 0
                buffer = memory[lies : lies + size].data
                expected = content[offset + more : offset + more + size]
                assert storage.read_into("file", offset + more, buffer) == len(expected)
                assert bytes(buffer[: len(expected)]) == expected.tobytes()
                assert not memory[:lies].any()
                assert not memory[lies + size :].any()
    assert len(opened) > 10


def test_shuffled_reads_pass_the_page_cache_by(blocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_pages, got = DirectDirectory._read_pages, []

    def counted(*words: Any) -> int:
        got.append(read_pages(*words))
        return got[-1]

    monkeypatch.setattr(DirectDirectory, "_read_pages", counted)
    batches = open_activations(blocks).shuffled(
        rows=1000, epochs=1, drop_remainder=False, buffer_bytes=12 << 20, read_bytes=1
    )
    assert sum(batch.activations.nbytes for batch in batches) <= sum(got)


def test_a_run_that_fits_into_the_buffer_is_read_once_for_all_epochs(
    small: Path, reads: Callable[[], tuple[list[int], Counter[str]]]
) -> None:
    run = open_activations(small)
    with run.shuffled(3, rows=100, epochs=3, shard=(1, 2), buffer_bytes=1 << 22) as batches:
        epochs = _epochs(batches)
    assert sorted(_rows(epochs[0])) != sorted(_rows(epochs[1]))  # the remainders are others
    assert len({tuple(_rows(epoch)) for epoch in epochs.values()}) == 3
    assert len({row for epoch in epochs.values() for row in _rows(epoch)}) <= len(_all_rows(_parts())) // 2
    assert sum(reads()[0]) <= 0.6 * 256 * len(_all_rows(_parts()))


def test_every_sidecar_is_read_once_however_many_parts_there_are(
    small: Path, reads: Callable[[], tuple[list[int], Counter[str]]]
) -> None:
    run = open_activations(small)
    with run.shuffled(3, rows=100, epochs=3, buffer_bytes=BUFFER) as batches:
        for _ in batches:
            pass
    sidecars = {name: times for name, times in reads()[1].items() if "parts/" in name}
    assert len(sidecars) == 60
    assert max(sidecars.values()) <= 2  # by two threads at the same moment
    assert sum(sidecars.values()) <= 80


def test_one_sample_of_a_run_that_is_being_shuffled_is_one_small_read(
    small: Path, reads: Callable[[], tuple[list[int], Counter[str]]]
) -> None:
    run = open_activations(small)
    with run.shuffled(3, rows=100, buffer_bytes=BUFFER) as batches:
        batch = next(batches)
        batches.close()
        sample = run.sample(f"s{batch.sample_indices[0]}")
        before = len(reads()[0])
        row = sample.get(3)[list(sample.positions).index(batch.positions[0])]
    assert row.tobytes() == batch.activations[0].tobytes()
    assert len(reads()[0]) - before == 1


def test_a_record_and_a_sidecar_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, _parts(3), sites=SITES[:1])
    path = tmp_path / "_run/commits/000002_001.json"
    record = json.loads(path.read_text())
    for rows in (record["rows"] + 5, record["rows"] - 5):
        path.write_text(json.dumps({**record, "rows": rows}))
        with pytest.raises(UserError, match="by its sidecar and"):
            list(open_activations(tmp_path).shuffled(3, rows=20, epochs=1))


def test_a_damaged_byte_is_found_and_the_file_named(small: Path, tmp_path: Path) -> None:
    _write(tmp_path, _parts(3), sites=SITES[:1])
    path = next(tmp_path.glob("layer_3_batch_000002*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with (
        pytest.raises(UserError, match=f"{path.name} is damaged"),
        open_activations(tmp_path).shuffled(3, rows=100, epochs=1) as batches,
    ):
        list(batches)


# ----------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "rows=0 must be a whole number of at least 1"),
        ({"rows": 2.5}, r"rows=2\.5 must be a whole number"),
        ({"rows": True}, "rows=True must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"epochs": 0}, "epochs=0 must be"),
        ({"buffer_bytes": None}, "buffer_bytes=None must be"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\) must be \(index, count\)"),
        ({"shard": 1}, r"shard=1 must be \(index, count\)"),
        ({"layers": []}, "layers must name at least one layer"),
        ({"layers": [3, 3]}, "none twice"),
        ({"layers": 4}, "no layer 4"),
        ({"layers": None}, "say which layer"),
        ({"rows": 100_000}, "makes no batch of 100000"),
        ({"buffer_bytes": 100_000}, "buffer_bytes=100000 is too small .* at least [0-9]+"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_read(
    small: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        open_activations(small).shuffled(**{"layers": 3, "rows": 100, **options})


def test_a_run_without_rows_is_refused(tmp_path: Path) -> None:
    for parts in ([], [[np.zeros(0)]]):
        run = open_activations(_write(tmp_path / str(len(parts)), parts))
        with pytest.raises(UserError, match="has 0 rows"):
            run.shuffled(3, drop_remainder=False)


# ------------------------------------------------------------------------------------------ JAX and torch


def test_batches_on_devices_are_the_same_and_the_state_is_that_of_the_batch_in_hand(small: Path) -> None:
    import jax

    def reader() -> ShuffledRows:
        return open_activations(small).shuffled([3, 7], rows=400, epochs=1, buffer_bytes=2 * BUFFER)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    expected = list(reader())
    with reader().on_devices(sharding) as batches:
        found = [next(batches) for _ in range(4)]
        state = json.loads(json.dumps(batches.get_state()))
    assert all(isinstance(batch.activations, jax.Array) for batch in found)
    again = reader().on_devices(sharding)
    again.set_state(state)
    found += list(again)
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert _same(dataclasses.replace(batch, activations=np.asarray(batch.activations)), other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_gets_tensors_of_the_same_bits(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")

    run = open_activations(_write(tmp_path, _parts(5), dtype))
    options: dict[str, Any] = {"layers": [3, 9], "rows": 100, "epochs": 1}
    loader = torch.utils.data.DataLoader(run.shuffled(**options).for_torch(), batch_size=None)
    for tensors, batch in zip(loader, run.shuffled(**options), strict=True):
        assert tensors["activations"].dtype == getattr(torch, dtype)
        bits = tensors["activations"].view(torch.uint8).numpy()
        assert bits.tobytes() == batch.activations.tobytes()
        assert tensors["sample_indices"].tolist() == batch.sample_indices.tolist()
        assert tensors["positions"].tolist() == batch.positions.tolist()
        assert tensors["token_ids"].tolist() == batch.token_ids.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batches_may_have_tensors_in_place_of_arrays(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")

    run = open_activations(_write(tmp_path, _parts(5), dtype))
    options: dict[str, Any] = {"layers": [3, 9], "rows": 100, "epochs": 1}
    batches = run.shuffled(**options, torch=True)
    for batch, other in zip(batches, run.shuffled(**options), strict=True):
        assert batch.activations.dtype == getattr(torch, dtype)
        assert batch.activations.view(torch.uint8).numpy().tobytes() == other.activations.tobytes()
    with pytest.raises(UserError, match="leave torch=True out"):
        batches.on_devices(None)


def test_torch_workers_divide_a_shard_and_each_goes_on_where_it_was(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from torch.utils.data import _utils

    dataset = (
        open_activations(small)
        .shuffled(3, rows=100, epochs=1, drop_remainder=False, shard=(1, 2), buffer_bytes=4 * BUFFER)
        .for_torch()
    )
    rows: list[tuple[int, int]] = []
    for number in range(3):  # what a DataLoader of three workers does in each of them
        info = _utils.worker.WorkerInfo(id=number, num_workers=3, seed=0, dataset=dataset)
        monkeypatch.setattr(_utils.worker, "_worker_info", info)
        worker = pickle.loads(pickle.dumps(dataset))
        batches = iter(worker)
        found = [next(batches) for _ in range(5)]
        again = iter(worker)
        again.load_state_dict(json.loads(json.dumps(batches.state_dict())))
        found += list(again)
        rows += [
            (int(sample), int(position))
            for batch in found
            for sample, position in zip(batch["sample_indices"], batch["positions"], strict=True)
        ]
        batches.close()
    monkeypatch.setattr(_utils.worker, "_worker_info", None)
    with open_activations(small).shuffled(
        3, rows=100, epochs=1, drop_remainder=False, shard=(1, 2), buffer_bytes=4 * BUFFER
    ) as whole:
        assert sorted(rows) == sorted(_rows(list(whole)))
