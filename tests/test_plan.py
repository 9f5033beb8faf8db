"""The batch plan: a pure function, every sample exactly once, few shapes, little padding."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_extract.inputs.planning.slabs import PlanSettings, SlabShape
from jax_extract.inputs.planning.windows import Window, plan_windows
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.tokenize import InputCounts, tokenize
from jax_extract.inputs.tokenizing import pipeline
from jax_extract.inputs.wrapping import Wrapping
from models.positions import Positions

few_examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
lengths_of_samples = st.lists(st.integers(1, 300), min_size=1, max_size=70)


def plan_settings(**changes: Any) -> PlanSettings:
    values: dict[str, Any] = {
        "samples_per_batch": 8,
        "rows": 8,
        "slab_tokens": 1024,
        "length_multiple": 16,
        "max_length": 1024,
        "positions": Positions.parse("all"),
        "bytes_per_row": 128,
        "packed": False,
    }
    return PlanSettings(**{**values, **changes})


def tokenized(lengths: list[int]) -> list[TokenizedSample]:
    return [TokenizedSample(i, f"s{i}", np.full(n, i, np.int32), n, {}) for i, n in enumerate(lengths)]


def plan(lengths: list[int], chosen: PlanSettings | None = None, **options: Any) -> list[Window]:
    return list(plan_windows(tokenized(lengths), chosen or plan_settings(), **options))


def shapes_used(windows: list[Window]) -> set[SlabShape]:
    return {slab.shape for window in windows for part in window.parts for slab in part.slabs}


def waste(windows: list[Window]) -> float:
    parts = [part for window in windows for part in window.parts]
    return 1 - sum(p.tokens for p in parts) / sum(s.shape.tokens for p in parts for s in p.slabs)


def check(windows: list[Window], chosen: PlanSettings, count: int) -> None:
    """What holds of every plan."""
    parts = [part for window in windows for part in window.parts]
    assert sorted(s.sample_index for part in parts for s in part.table) == list(range(count))
    assert len({part.key for part in parts}) == len(parts)
    assert [part.key for part in parts] == sorted(part.key for part in parts)
    batches = {key: list(group) for key, group in itertools.groupby(parts, lambda part: part.batch)}
    assert list(batches) == list(range(1, len(batches) + 1))
    for batch in batches.values():
        assert [part.part for part in batch] == list(range(1, len(batch) + 1))
        assert {part.parts_in_batch for part in batch} == {len(batch)}
        assert sum(len(part) for part in batch) <= chosen.samples_per_batch
    longest = max(s.length for part in parts for s in part.table)
    most = chosen.most_tokens(longest if len(windows) == 1 else chosen.max_length)
    for part in parts:
        following, samples = 0, list(part.table)
        for slab in part.slabs:
            assert slab.first == following
            shape = slab.shape
            assert 1 <= slab.count <= chosen.rows
            assert len(slab.counts) <= shape.rows
            assert 1 <= max(slab.counts) <= shape.samples
            assert shape.rows == 1 if chosen.packed else shape.samples == 1
            inside = samples[slab.first : slab.first + slab.count]
            assert len(inside) == slab.count
            if chosen.packed:
                assert sum(s.length for s in inside) <= most or slab.count == 1
            else:
                assert shape.tokens <= chosen.padded(chosen.slab_tokens) or slab.count == 1
            rest = iter(inside)
            assert all(sum(s.length for s in itertools.islice(rest, n)) <= shape.length for n in slab.counts)
            following += slab.count
        assert following == len(part)
        size = sum(chosen.positions.rows(s.length) for s in part.table) * chosen.bytes_per_row
        assert size <= chosen.max_shard_bytes or len(part) == 1 or chosen.positions.one_row_per_sample
    assert len(shapes_used(windows)) <= chosen.max_shapes


@few_examples
@given(
    lengths_of_samples,
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 2]),
    st.sampled_from([64, 512, 4096]),
    st.booleans(),
)
def test_every_sample_is_in_exactly_one_slab_and_the_limits_hold(
    lengths: list[int], rows: int, devices: int, slab_tokens: int, packed: bool
) -> None:
    chosen = plan_settings(
        rows=rows,
        samples_per_batch=rows * devices,
        slab_tokens=slab_tokens,
        max_shard_bytes=60_000,
        packed=packed,
    )
    check(plan(lengths, chosen), chosen, len(lengths))


@few_examples
@given(
    lengths_of_samples,
    st.sampled_from([5, 16, 64]),
    st.sampled_from(["all", "last", "from:40", "mean_from:40", "every:7", "at:0,250"]),
    st.booleans(),
)
def test_a_stream_of_several_windows_covers_every_sample_once(
    lengths: list[int], window_samples: int, positions: str, packed: bool
) -> None:
    chosen = plan_settings(max_length=300, positions=Positions.parse(positions), packed=packed)
    windows = plan(lengths, chosen, window_samples=window_samples)
    assert [w.number for w in windows] == list(range(-(-len(lengths) // window_samples)))
    check(windows, chosen, len(lengths))


@few_examples
@given(lengths_of_samples, st.booleans())
def test_the_plan_is_a_pure_function_of_samples_and_settings(lengths: list[int], packed: bool) -> None:
    chosen = plan_settings(packed=packed)
    first, second = plan(lengths, chosen), plan(lengths, chosen)
    assert [w.digest for w in first] == [w.digest for w in second]
    assert [[p.slabs for p in w.parts] for w in first] == [[p.slabs for p in w.parts] for w in second]


def test_the_plan_does_not_depend_on_how_the_input_is_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    samples = [Sample(f"s{i}", "x" * int(n)) for i, n in enumerate(random.integers(1, 200, 90))]

    def tokenizer(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    def digests(chunk: int) -> list[str]:
        monkeypatch.setattr(pipeline, "CHUNK_SAMPLES", chunk)
        stream = tokenize(iter(samples), tokenizer, 150, Wrapping(), InputCounts())
        return [w.digest for w in plan_windows(stream, plan_settings(), window_samples=32)]

    as_list = list(tokenize(samples, tokenizer, 150, Wrapping(), InputCounts()))
    expected = [w.digest for w in plan_windows(as_list, plan_settings(), window_samples=32)]
    assert digests(1) == digests(7) == digests(256) == expected


def test_every_token_id_name_and_setting_changes_the_digest() -> None:
    base = tokenized([20, 30, 40])
    digest = next(iter(plan_windows(base, plan_settings()))).digest
    changed = [
        [TokenizedSample(0, "s0", np.full(20, 7, np.int32), 20, {}), *base[1:]],
        [TokenizedSample(0, "other", base[0].token_ids, 20, {}), *base[1:]],
        [TokenizedSample(0, "s0", base[0].token_ids, 21, {}), *base[1:]],
        base[:2],
    ]
    digests = {next(iter(plan_windows(samples, plan_settings()))).digest for samples in changed}
    digests |= {next(iter(plan_windows(base, plan_settings(**c)))).digest for c in ({"rows": 4}, {"slab_tokens": 512})}
    assert len(digests | {digest}) == 7


def test_windows_chain_their_digests() -> None:
    lengths = [20, 30, 40, 50, 60, 70]
    whole = plan(lengths, window_samples=2)
    other = plan([21, *lengths[1:]], window_samples=2)
    assert len(whole) == 3
    assert all(a.digest != b.digest for a, b in zip(whole, other, strict=True))
    assert [p.digest for p in whole[2].parts] == [p.digest for p in other[2].parts]


def test_one_vector_a_sample_makes_one_part_a_batch_however_large() -> None:
    chosen = plan_settings(positions=Positions.parse("last"), max_shard_bytes=1)
    assert {part.parts_in_batch for part in plan([50] * 20, chosen)[0].parts} == {1}


def test_a_batch_is_cut_into_parts_below_the_shard_limit_between_whole_slabs() -> None:
    chosen = plan_settings(rows=2, samples_per_batch=16, max_shard_bytes=5 * 100 * 128)
    parts = plan([100] * 16, chosen)[0].parts
    assert [len(part) for part in parts] == [4, 4, 4, 4]


def test_samples_longer_than_all_of_the_first_window_fit_later() -> None:
    chosen = plan_settings(max_length=1000)
    windows = plan([40] * 16 + [1000, 999, 41] + [40] * 13, chosen, window_samples=16)
    check(windows, chosen, 32)
    assert {part.table[0].length for part in windows[1].parts} >= {1000}
    assert windows[0].shapes == windows[1].shapes


def test_batches_go_on_counting_across_windows() -> None:
    windows = plan([40] * 20, window_samples=10)
    assert [part.batch for window in windows for part in window.parts] == [1, 2, 3, 4]


MIXED = [int(n) for n in np.random.default_rng(0).integers(55, 1025, 64)]


def test_padding_of_a_mixed_length_distribution_is_at_most_a_tenth_where_every_sample_has_a_row() -> None:
    chosen = plan_settings(slab_tokens=4096)
    windows = plan(MIXED, chosen)
    check(windows, chosen, 64)
    assert waste(windows) <= 0.10


@pytest.mark.parametrize("slab_tokens", [2048, 4096, 8192])
def test_padding_of_packed_slabs_is_at_most_three_percent_with_few_shapes(slab_tokens: int) -> None:
    chosen = plan_settings(slab_tokens=slab_tokens, packed=True, compile_tokens=1_000)
    windows = plan(MIXED, chosen)
    check(windows, chosen, 64)
    assert waste(windows) <= 0.03
    assert len(shapes_used(windows)) <= 3


@pytest.mark.parametrize(("rows", "length"), [(512, 2_100), (4_096, 300), (1, 700)])
def test_large_hands_and_samples_that_fill_half_a_slab_are_planned_at_once(rows: int, length: int) -> None:
    chosen = plan_settings(rows=rows, samples_per_batch=rows, slab_tokens=4_096, max_length=4_096, packed=True)
    lengths = [length] * 8_192
    lengths[77] = 4_000  # one hand is uneven, whatever is swapped
    started = time.process_time()
    windows = plan(lengths, chosen)
    assert time.process_time() - started < 20
    check(windows, chosen, len(lengths))


def test_long_samples_among_short_ones_are_packed_with_them() -> None:
    random = np.random.default_rng(1)
    lengths = [int(n) for n in np.exp(random.normal(6.5, 0.9, 64)).clip(55, 8192)]
    chosen = plan_settings(slab_tokens=4096, max_length=8192, packed=True, compile_tokens=500)
    windows = plan(lengths, chosen)
    check(windows, chosen, 64)
    assert waste(windows) <= 0.06


def test_later_windows_of_a_packed_stream_fit_the_shapes_of_the_first() -> None:
    random = np.random.default_rng(2)
    lengths = [int(n) for n in random.integers(55, 1025, 4 * 512)]
    chosen = plan_settings(slab_tokens=4096, packed=True, compile_tokens=1_000)
    windows = plan(lengths, chosen, window_samples=512)
    check(windows, chosen, len(lengths))
    assert {w.shapes for w in windows} == {windows[0].shapes}
    assert waste(windows) <= 0.06
