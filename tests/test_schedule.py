"""Steps of a whole mesh: every slab once, every part on one host and in order, and nobody idle without need."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from jax_extract.extraction.accounting import StepCounts
from jax_extract.extraction.loop import rows_of_part
from jax_extract.extraction.schedule import Taker, Work, steps
from jax_extract.inputs.planning.slabs import PlanSettings, Slab, SlabShape
from jax_extract.inputs.planning.windows import Arrangement, Part, plan_windows
from jax_extract.inputs.token_table import TokenizedSample, TokenTable
from models.positions import Positions

SHAPES = [SlabShape(64, 4, 8), SlabShape(32, 4, 8)]


def _table(lengths: Any) -> TokenTable:
    return TokenTable.of(
        TokenizedSample(i, f"s{i}", np.full(n, i, np.int32), int(n), {}) for i, n in enumerate(lengths)
    )


def _arrangement(slabs: int, of_second: int = 0) -> Arrangement:
    """Slabs of five samples of 10 tokens, in rows of 3 and 2; the last ones of the second shape."""
    made = [Slab(SHAPES[i >= slabs - of_second], 5 * i, (3, 2)) for i in range(slabs)]
    return Arrangement(_table([10] * 5 * slabs), np.arange(5 * slabs), tuple(made))


def _parts(arrangement: Arrangement, size: int) -> list[Part]:
    ends = range(0, len(arrangement.order), size)
    return [Part(i, 1, 1, arrangement, s, min(s + size, len(arrangement.order)), 2) for i, s in enumerate(ends, 1)]


@pytest.mark.parametrize("size", [1, 4, 5, 7, 30])
@pytest.mark.parametrize(("hosts", "travel"), [(1, False), (4, True), (4, False)])
def test_every_part_is_whole_on_one_host_and_in_order_whatever_slabs_it_shares(
    size: int, hosts: int, travel: bool
) -> None:
    parts = _parts(_arrangement(40, of_second=11), size)
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    owners: dict[tuple[int, int], set[int]] = defaultdict(set)
    for step in steps(parts, hosts, 2, travel):
        assert len(step.work) == hosts
        for host, works in enumerate(step.work):
            assert len(works) <= 2
            for work in works:
                assert work.slab.shape == step.shape
                for taker in work.takers:
                    assert hosts == 1 or travel or taker.host == host, "rows that stay are taken where they are made"
                    owners[taker.part.key].add(taker.host)
                    first = max(taker.part.start, work.slab.first)
                    places[taker.part.key] += range(first, min(taker.part.stop, work.slab.first + work.slab.count))
    assert all(places[part.key] == list(range(part.start, part.stop)) for part in parts)
    assert all(len(hosts) == 1 for hosts in owners.values())


@pytest.mark.parametrize(("hosts", "travel"), [(1, False), (4, True)])
def test_a_slab_that_parts_share_is_computed_once_and_only_a_shapes_last_step_has_idle_devices(
    hosts: int, travel: bool
) -> None:
    parts = _parts(_arrangement(40, of_second=11), 7)
    made = list(steps(parts, hosts, 2, travel))
    works = [work for step in made for of_host in step.work for work in of_host]
    assert len(works) == 40 == len({id(work.slab) for work in works})
    full = hosts * 2
    idle = [sum(map(len, step.work)) < full for step in made]
    last_of_shape = [a.shape != b.shape for a, b in itertools.pairwise(made)] + [True]
    assert not any(idle and not last for idle, last in zip(idle, last_of_shape, strict=True))
    counts = StepCounts.of(made, full)
    assert counts.tokens == 40 * 50
    assert counts.slab_tokens == full * sum(step.shape.tokens for step in made)
    assert sum(counts.shares) == pytest.approx(1)


def test_parts_whose_rows_stay_are_shared_out_so_that_no_host_sits_out_more_than_a_step_of_a_shape() -> None:
    for size in (5, 10):
        made = list(steps(_parts(_arrangement(120, of_second=32), size), 4, 2, rows_travel=False))
        assert len(made) == 120 / 8
        assert all(of_host for step in made for of_host in step.work)


def test_only_what_is_pending_is_computed_and_of_shared_slabs_only_its_rows_are_taken() -> None:
    parts = _parts(_arrangement(40), 7)
    (step,) = steps([parts[3]], 1, 8, False)  # places 21 to 28, of slabs 4 and 5
    assert [work.slab.first for work in step.work[0]] == [20, 25]
    assert [work.tokens for work in step.work[0]] == [40, 30]
    pieces = [rows_of_part(parts[3], work, Positions.parse("last")) for work in step.work[0]]
    assert pieces == [[(0, 1, 2), (1, 0, 2)], [(0, 0, 3)]]
    pieces = [rows_of_part(parts[3], work, Positions.parse("first:4")) for work in step.work[0]]
    assert pieces == [[(0, 4, 8), (1, 0, 8)], [(0, 0, 12)]]


def test_samples_too_short_for_a_position_give_no_rows_and_the_others_follow_without_a_gap() -> None:
    table = _table([3, 9, 2, 9])
    arrangement = Arrangement(table, np.arange(4), (Slab(SHAPES[0], 0, (2, 2)),))
    part = Part(1, 1, 1, arrangement, 0, 4, 2)
    work = Work(arrangement, arrangement.slabs[0], (Taker(part, 0),))
    assert rows_of_part(part, work, Positions.parse("at:5")) == [(0, 0, 1), (1, 0, 1)]
    assert rows_of_part(part, work, Positions.parse("at:50")) == []


def test_what_attention_computes_of_two_samples_is_counted() -> None:
    (step,) = steps(_parts(_arrangement(2), 10), 1, 2, False)
    counts = StepCounts.of([step], 2, pair_cost=0.1)
    assert counts.computed_pairs == 2 * 4 * 128 * 128, "a row of 64 tokens is a square of 128"
    assert counts.seen_pairs == 10 * 55
    assert counts.useful_share == pytest.approx((100 + 0.1 * 550) / (512 + 0.1 * 131_072))
    assert counts.unseen_share == pytest.approx(0.1 * (131_072 - 550) / (512 + 0.1 * 131_072))
    assert StepCounts.of([step], 2).unseen_share == 0
    assert StepCounts.of([step], 2).useful_share == counts.shares.real


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_plans_of_runs_begun_before_are_scheduled_too(hosts: int) -> None:
    lengths = np.random.default_rng(1).integers(10, 500, 500)
    settings = PlanSettings(16, 4, 4_096, 16, 512, Positions.parse("last"), 64, 200, 16, hosts)
    samples = list(_table(lengths))
    parts = [part for window in plan_windows(samples, settings) for part in window.parts]
    slabs = sum(len(part.slabs) for part in parts)
    for travel in (True, False):
        works = [w for step in steps(parts, hosts, 2, travel) for of_host in step.work for w in of_host]
        assert len(works) == slabs
        assert all(len(work.takers) == 1 for work in works)
        assert sum(work.tokens for work in works) == lengths.sum()
