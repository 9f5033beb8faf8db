"""Rows, slabs and steps: every sample once, few shapes, devices that do not wait."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.pod_plan import DISTRIBUTIONS, Mesh, settings_of
from jax_extract.devices.platform import CPU, GPU, TPU
from jax_extract.inputs.planning.lanes import pack_for_all
from jax_extract.inputs.planning.rows import Packed, pack
from jax_extract.inputs.planning.slabs import PlanSettings, Shapes, SlabShape
from models.accelerated_attention import computed_pairs, seen_pairs
from models.positions import Positions

MAX_LENGTH = 1_024


class Counted(NamedTuple):
    """Of a plan: tokens of samples; tokens that all devices compute; and the share of FLOPs that samples need."""

    shapes: int
    slabs: int
    steps: int
    real: int
    computed: int
    useful: float


def accelerators(devices: int, positions: str = "last") -> PlanSettings:
    return replace(settings_of(TPU, Mesh.of_tpus(devices), positions), devices=devices)


def count(lengths: np.ndarray, settings: PlanSettings, shapes: Shapes = ()) -> Counted:
    """What as many devices compute as the plan is made for."""
    packed = pack(lengths, settings, shapes)
    steps = {shape: -(-len(list(same)) // settings.devices) for shape, same in itertools.groupby(shapes_of(packed))}
    rows = {shape: count * settings.devices * shape.rows for shape, count in steps.items()}
    own = seen_pairs(lengths)
    block = settings.attention_block
    pairs = sum(n * computed_pairs(shape.length, min(block, shape.length)) for shape, n in rows.items())
    real, computed = int(lengths.sum()), sum(n * shape.length for shape, n in rows.items())
    useful = (real + settings.pair_cost * own) / (computed + settings.pair_cost * pairs)
    return Counted(len(steps), len(packed.slabs), sum(steps.values()), real, computed, useful)


def shapes_of(packed: Packed) -> list[SlabShape]:
    return [slab.shape for slab in packed.slabs]


def plan_settings(**changes: Any) -> PlanSettings:
    values: dict[str, Any] = {
        "samples_per_batch": 8,
        "rows": 8,
        "slab_tokens": 1_024,
        "length_multiple": 16,
        "max_length": MAX_LENGTH,
        "positions": Positions.parse("last"),
        "bytes_per_row": 128,
        "compile_tokens": 500,
        "version": 2,
    }
    return PlanSettings(**{**values, **changes})


def lengths_of(name: str, samples: int, seed: int = 0) -> np.ndarray:
    return DISTRIBUTIONS[name](np.random.default_rng(seed), samples)


def check(packed: Packed, lengths: np.ndarray, chosen: PlanSettings, given_shapes: Shapes = ()) -> None:
    """What holds of every plan."""
    assert packed.order.dtype == np.int64
    assert np.array_equal(np.sort(packed.order), np.arange(len(lengths)))
    assert [slab.first for slab in packed.slabs] == [
        0,
        *itertools.accumulate(slab.count for slab in packed.slabs[:-1]),
    ]
    assert sum(slab.count for slab in packed.slabs) == len(lengths)
    assert list(packed.shapes) == sorted(set(packed.shapes))
    assert len(packed.shapes) <= chosen.max_shapes
    shapes = shapes_of(packed)
    assert set(shapes) <= set(packed.shapes)
    runs = [shape for shape, _ in itertools.groupby(shapes)]
    assert len(runs) == len(set(runs))
    assert [shape.length for shape in runs] == sorted((shape.length for shape in runs), reverse=True)

    longest = chosen.padded(int(lengths.max()))
    for shape in set(shapes) - set(given_shapes):
        assert shape.length % chosen.length_multiple == 0
        assert shape.rows <= (1 if chosen.packed else chosen.rows)
        assert shape.tokens <= max(chosen.slab_tokens, longest)
        assert shape.tokens <= chosen.rows * longest
        assert chosen.samples_a_row in {0, shape.samples}
    placed = lengths[packed.order]
    before = np.concatenate([[0], np.cumsum(placed)])
    at = 0
    for slab in packed.slabs:
        assert 1 <= len(slab.counts) <= slab.shape.rows
        assert min(slab.counts) >= 1
        assert max(slab.counts) <= slab.shape.samples
        for samples in slab.counts:
            assert before[at + samples] - before[at] <= slab.shape.length
            at += samples
        rows = sum(chosen.positions.rows(int(n)) for n in placed[slab.first : slab.first + slab.count])
        assert (
            slab.count == 1
            or chosen.positions.one_row_per_sample
            or rows * chosen.bytes_per_row <= chosen.max_shard_bytes
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.lists(st.integers(1, 300), min_size=1, max_size=90),
        st.lists(st.sampled_from([7, 150, 151, 900]), min_size=1, max_size=90),
        st.builds(lambda length, samples: [length] * samples, st.integers(1, MAX_LENGTH), st.integers(1, 90)),
    ),
    st.fixed_dictionaries(
        {
            "rows": st.sampled_from([1, 3, 8]),
            "devices": st.sampled_from([1, 4, 64, 256]),
            "slab_tokens": st.sampled_from([10, 64, 1_000, 4_096]),
            "positions": st.sampled_from([Positions.parse("last"), Positions.parse("all")]),
            "max_shard_bytes": st.sampled_from([60_000, 256_000_000]),
            "pair_cost": st.sampled_from([0.0, 0.001]),
            "attention_block": st.sampled_from([1, 64]),
            "max_shapes": st.sampled_from([2, 8]),
        }
    ),
    st.sampled_from([{}, {"packed": True}, {"samples_a_row": 1}]),
)
def test_every_sample_is_placed_once_within_all_limits(
    lengths: list[int], values: dict[str, Any], kind: dict[str, Any]
) -> None:
    chosen = plan_settings(**values, **kind)
    of = np.array(lengths, np.int64)
    check(pack(of, chosen), of, chosen)
    stream = pack(of, chosen, more_to_come=True)
    check(stream, of, chosen)
    assert stream.shapes[-1].length >= MAX_LENGTH
    later = np.array([MAX_LENGTH, *lengths[::2], 1], np.int64)
    following = pack(later, chosen, stream.shapes, more_to_come=True)
    assert following.shapes == stream.shapes
    check(following, later, chosen, stream.shapes)


def test_the_plan_is_a_function_of_lengths_alone_and_samples_of_one_length_keep_their_order() -> None:
    chosen = accelerators(8)
    lengths = lengths_of("arc-like", 1_000)
    first, again = pack(lengths, chosen), pack(lengths.astype(np.int32).astype(np.int64), chosen)
    assert np.array_equal(first.order, again.order)
    assert (first.slabs, first.shapes) == (again.slabs, again.shapes)
    places = np.argsort(first.order)
    for length in np.unique(lengths)[:200]:
        same = places[lengths == length]
        assert (np.diff(same) > 0).all()
    shuffled = np.random.default_rng(1).permutation(lengths)
    other = pack(shuffled, chosen)
    assert other.slabs == first.slabs
    assert np.array_equal(shuffled[other.order], lengths[first.order])


def test_the_longest_samples_are_computed_first() -> None:
    lengths = lengths_of("arc-like", 2_000)
    packed = pack(lengths, replace(accelerators(64), compile_tokens=0))
    assert lengths[packed.order[0]] == lengths.max()
    assert len(packed.shapes) > 2
    for (longer, _), (shorter, _) in itertools.pairwise(itertools.groupby(packed.slabs, key=lambda s: s.shape)):
        assert longer.length > shorter.length


@pytest.mark.parametrize(
    ("samples", "chosen", "real"),
    [
        (50_000, accelerators(64), 0.96),
        (5_000, accelerators(64), 0.90),
        (800, accelerators(64), 0.60),
        (600, replace(settings_of(CPU, Mesh(8, 1)), devices=8), 0.93),
    ],
    ids=["50000", "5000", "800", "600_cpu"],
)
def test_a_pod_and_a_host_compute_little_but_tokens_of_samples(samples: int, chosen: PlanSettings, real: float) -> None:
    counted = count(lengths_of("arc-like", samples), chosen)
    assert counted.real / counted.computed >= real
    assert counted.shapes <= 8
    if samples == 50_000:
        assert counted.useful >= 0.92
        assert counted.steps - counted.slabs / 64 < 0.5


def test_positions_change_slabs_only_where_a_shard_would_be_too_large() -> None:
    lengths = lengths_of("arc-like", 1_000)
    last, every = (pack(lengths, accelerators(64, positions)) for positions in ("last", "all"))
    assert last.slabs == every.slabs
    small = replace(accelerators(64, "all"), max_shard_bytes=4_000 * accelerators(64).bytes_per_row)
    packed = pack(lengths, small)
    check(packed, lengths, small)
    assert packed.slabs != last.slabs


@pytest.mark.parametrize("devices", [1, 4, 8, 64, 256])
@pytest.mark.parametrize(("name", "samples"), [("gsm8k-like", 10_000), ("web", 3_000)])
def test_other_lengths_and_meshes_too(name: str, samples: int, devices: int) -> None:
    counted = count(lengths_of(name, samples), accelerators(devices))
    # A last step of 256 devices is a tenth of what so many short samples take.
    assert counted.real / counted.computed >= (0.9 if devices == 256 else 0.95)
    assert counted.useful >= 0.8


def test_rows_of_one_sample_are_padded_to_eight_lengths() -> None:
    counted = count(lengths_of("arc-like", 20_000), replace(settings_of(GPU, Mesh(8, 1)), devices=8))
    assert counted.shapes <= 8
    assert counted.real / counted.computed >= 0.78


def test_samples_of_one_length_have_rows_that_they_fill() -> None:
    contexts = np.full(4_096, 2_048)
    assert count(contexts, accelerators(64)).real == count(contexts, accelerators(64)).computed
    # Whole blocks of attention: two of them would fill 1,408 tokens, and five fill 3,584.
    counted = count(np.full(20_000, 700), accelerators(8))
    assert counted.real / counted.computed >= 0.9


def test_one_long_sample_does_not_make_rows_of_the_others_long() -> None:
    lengths = np.append(np.full(50_000, 100), 8_192)
    counted = count(lengths, accelerators(64))
    assert counted.real / counted.computed >= 0.95
    assert counted.useful >= 0.85


def test_few_samples_are_spread_over_all_devices() -> None:
    for samples in (1, 40, 64):
        packed = pack(np.full(samples, 500), accelerators(64))
        assert len(packed.slabs) == samples
    lengths = lengths_of("gsm8k-like", 1_000)
    counted = count(lengths, accelerators(64))
    assert counted.steps == 1
    assert counted.slabs >= 56


def test_less_memory_with_fewer_rows() -> None:
    lengths = lengths_of("gsm8k-like", 2_000)
    plans = [pack(lengths, replace(accelerators(8), rows=rows)) for rows in (8, 4, 2, 1)]
    largest = [max(shape.tokens for shape in plan.shapes) for plan in plans]
    assert largest == sorted(largest, reverse=True)
    assert largest[-1] == 256


def test_a_further_shape_is_used_only_where_it_saves_a_compilation() -> None:
    lengths = lengths_of("arc-like", 2_000)
    prices = (50_000, 500_000, 10_000_000)
    shapes = [count(lengths, replace(accelerators(8), compile_tokens=price)).shapes for price in prices]
    assert shapes[0] > shapes[1] > shapes[2] == 1


def test_later_windows_of_a_stream_fit_the_shapes_of_the_first() -> None:
    chosen = accelerators(8)
    first = pack(lengths_of("arc-like", 10_000, seed=1), chosen, more_to_come=True)
    for seed in (2, 3):
        counted = count(lengths_of("arc-like", 10_000, seed), chosen, first.shapes)
        assert counted.real / counted.computed >= 0.97
    short = lengths_of("gsm8k-like", 5_000)  # than all of the first, whose rows have room for few samples
    check(pack(short, chosen, first.shapes), short, chosen, first.shapes)


@pytest.mark.parametrize(
    ("name", "samples", "most"),
    [("arc-like", 5_000, 256), ("arc-like", 800, 64), ("gsm8k-like", 600, 32), ("web", 8, 1)],
)
def test_a_plan_is_made_for_as_many_devices_as_its_samples_keep_busy(name: str, samples: int, most: int) -> None:
    lengths = lengths_of(name, samples)
    packed = pack_for_all(lengths, accelerators(1))
    check(packed, lengths, accelerators(1))
    slabs = [(shape, len(list(same))) for shape, same in itertools.groupby(shapes_of(packed))]
    for mesh in (2**i for i in range(most.bit_length())):
        computed = sum(-(-count // mesh) * mesh * shape.tokens for shape, count in slabs)
        assert lengths.sum() / computed >= 0.85, mesh
