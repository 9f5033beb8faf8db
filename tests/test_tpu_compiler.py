"""The production program on a pod of 64 chips, as the pod's own compiler makes it: no TPU is needed for that.

Guarded, for Qwen2.5 of 0.5 (layers 10-23) and 7 billion parameters (all layers) in bfloat16, 2,048 tokens,
parameters gathered over `model`, and for Gemma 2 (with EVERY_FAMILY, a model of every other port): it fits a chip's
16 GB with a margin; nothing but parameters crosses chips, and as many bytes as were counted beforehand; no two chips
hold the same captures; and all chips together do no more work than one would. The first of them has sixteen samples a
row, and its captures travel: they cross chips too, and every chip holds all.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from compiled_elsewhere import facts_of

from jax_extract.compilation.config import CompileConfig
from jax_extract.compilation.hlo import collectives
from jax_extract.compilation.programs import foreign_collectives
from jax_extract.devices import libtpu
from jax_extract.errors import UserError

CHIPS = 64
MARGIN = 0.08

needs_compiler = pytest.mark.skipif(
    not libtpu.is_installed(), reason="libtpu is not installed: pip install -e '.[tpu]'"
)


@pytest.fixture(scope="module")
def programs() -> dict[str, dict[str, Any]]:
    """Case -> facts; from a process of its own, which the compiler of another platform shares with nothing."""
    found = facts_of("tpu_compiler_worker.py")
    assert len(found) == (6 if os.environ.get("EVERY_FAMILY") else 3)
    assert [facts["slab"] for facts in found.values()] == [
        [facts["tokens"], 8, 16 if facts["travels"] else 1] for facts in found.values()
    ]
    assert sum(facts["travels"] for facts in found.values()) == 1
    return found


@needs_compiler
def test_every_program_fits_a_chip_with_a_margin(programs: dict[str, dict[str, Any]]) -> None:
    for case, facts in programs.items():
        assert facts["memory"] <= (1 - MARGIN) * facts["chip_memory"], (case, facts["memory"])
        assert facts["chip_memory"] == 16e9


@needs_compiler
def test_the_memory_counted_beforehand_is_near_what_the_compiler_takes(programs: dict[str, dict[str, Any]]) -> None:
    for case, facts in programs.items():
        assert facts["foretold_memory"] == pytest.approx(facts["memory"], rel=0.15), case


@needs_compiler
def test_nothing_but_gathered_parameters_crosses_chips_and_as_much_as_was_counted(
    programs: dict[str, dict[str, Any]],
) -> None:
    for case, facts in programs.items():
        assert not facts["foreign"], case
        assert {collective["kind"] for collective in facts["moved"]} == {"all-gather"}, case
        groups = {collective["group"] for collective in facts["moved"]}
        assert groups == ({8, CHIPS} if facts["travels"] else {8}), case
        assert {collective["times"] for collective in facts["moved"]} == {1, facts["blocks"]}, case
        assert facts["received"] == pytest.approx(facts["foretold_received"]), case


@needs_compiler
def test_no_two_chips_hold_the_same_captures_unless_they_travel(programs: dict[str, dict[str, Any]]) -> None:
    for case, facts in programs.items():
        assert facts["output_shards"] == CHIPS, case
        assert facts["unique_shards"] == (1 if facts["travels"] else CHIPS), case


@needs_compiler
def test_the_chips_together_do_no_more_work_than_one_alone(programs: dict[str, dict[str, Any]]) -> None:
    assert sum(facts["work_of_one"] is not None for facts in programs.values()) == 1
    for case, facts in programs.items():
        assert facts["attention"] == "splash", case
        assert 0.99 <= facts["work"] <= 1.05, (case, facts["work"])  # of what was counted for the rows
        if facts["work_of_one"]:
            assert facts["work"] / facts["work_of_one"] <= 1.05, case


# ----------------------------------------------------------------------------------------- without a compiler

PROGRAM = """HloModule two_loops

%condition.1 (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(24)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%started (x: bf16[1,112,8]) -> bf16[1,896,8] {
  ROOT %all-gather.1 = bf16[1,896,8]{2,1,0} all-gather(%x), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
}

%went_on (x: bf16[1,112,8]) -> bf16[1,896,8] {
  ROOT %all-gather.2 = bf16[1,896,8]{2,1,0} all-gather(%x), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
}

%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = bf16[1,896,8] fusion(%p), kind=kCustom, calls=%started
  %b = bf16[1,896,8] fusion(%a), kind=kCustom, calls=%went_on
  %c = f32[16] all-reduce(%b), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%sum
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%p), condition=%condition.1, body=%body.1
  %g = (bf16[100,8], bf16[400,8]) all-gather-start(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""


def test_collectives_are_counted_once_a_channel_and_as_often_as_their_loop_runs() -> None:
    gathered, reduced, first = sorted(collectives(PROGRAM), key=lambda c: (-c.times, c.kind))
    assert (gathered.kind, gathered.times, gathered.group, gathered.bytes) == ("all-gather", 24, 4, 896 * 8 * 2)
    assert gathered.received == 24 * gathered.bytes * 3 / 4
    assert (reduced.kind, reduced.times, reduced.group, reduced.bytes) == ("all-reduce", 24, 4, 64)
    assert (first.kind, first.times, first.shape) == ("all-gather", 1, (400, 8))


def test_whatever_is_no_gathered_parameter_is_named_as_foreign() -> None:
    structure = {"embedding": np.zeros((400, 8)), "blocks": {"qkv": np.zeros((24, 896, 8))}}
    assert foreign_collectives(collectives(PROGRAM), structure) == ("all-reduce of (16,)",)
    activations = PROGRAM.replace("(bf16[100,8], bf16[400,8])", "(bf16[100,9], bf16[400,9])")
    assert "all-gather of (400, 9)" in foreign_collectives(collectives(activations), structure)
    captures = np.zeros((1, 400, 1, 9))
    assert foreign_collectives(collectives(activations), [structure, captures]) == ("all-reduce of (16,)",)


def test_collectives_of_one_computation_count_each_though_their_channel_is_the_same() -> None:
    first = (
        "  %g = (bf16[100,8], bf16[400,8]) all-gather-start(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}\n"
    )
    twice = PROGRAM.replace(first, first + first.replace("%g", "%h"))
    assert sum(c.shape == (400, 8) for c in collectives(twice)) == 2
    other = PROGRAM.replace(first, first + first.replace("400,8", "400,9"))
    assert {c.shape for c in collectives(other) if c.times == 1} == {(400, 8), (400, 9)}


def test_a_loop_that_does_not_say_how_often_it_runs_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="how often a loop runs"):
        collectives(PROGRAM.replace("direction=LT", "direction=GT"))


@pytest.mark.parametrize(("options", "words"), [
    ({"topology": "h100"}, "v5e:8x8"),
    ({"model_path": "nothing"}, "qwen2.5-7b"),
    ({"max_seq_length": 1_000_000}, "32768 positions"),
    ({"share_of_peak": 2.0}, "above 0 and at most 1"),
    ({"tokens": 0}, "--tokens 0"),
    ({"layers_to_extract": ()}, "--layers_to_extract is empty"),
    ({"batch_size": 3_000_000_000}, "--batch_size 3000000000 must be from 1 to"),
    ({"topology": "v5e:8x9"}, "there are 1x1, 2x2"),
    ({"topology": "v5e:16x32"}, "is no slice of v5e"),
    pytest.param({"mesh_shape": "4,4"}, "64 chips", marks=needs_compiler),
])  # fmt: skip
def test_what_cannot_be_compiled_is_refused_in_one_sentence(options: dict[str, Any], words: str) -> None:
    from jax_extract.compilation.command import compile_for

    with pytest.raises(UserError, match=words) as refused:
        compile_for(CompileConfig(**{"model_path": "qwen2.5-0.5b", "max_seq_length": 2_048, **options}))
    assert "\n" not in str(refused.value)


def test_without_the_compiler_the_sentence_says_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax_extract.compilation.topology import open_slice

    monkeypatch.setattr(libtpu, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        open_slice("v5e:8x8")
