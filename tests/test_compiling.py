"""Programs are made beside what else is done, on TPUs all at once.

Guarded: which are made ahead, and that a step finds them; that they are made at the same time; what a failure while the
weights are read leaves behind. No TPU is here: CPU programs are compiled as a TPU's would be.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import jax
import pytest
from tiny_models import tiny_folder

from jax_extract.devices.mesh import make_mesh
from jax_extract.devices.platform import TPU
from jax_extract.extraction import program as module
from jax_extract.extraction.capture import capture_plan
from jax_extract.extraction.program import CaptureProgram
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.layers import Numerics

SHAPES = [SlabShape(length, 1, 1) for length in (48, 32, 16)]


@pytest.fixture
def program() -> CaptureProgram:
    model, mesh = OpenModel.open(str(tiny_folder("qwen2_tied"))), make_mesh((1, 1))
    plan = capture_plan(model, (0,), ("after_block",), "last", "float32")
    params = Weights(model.checkpoint, model.port, model.config, 1).load(mesh, "float32")
    return CaptureProgram(model.port, model.config, params, plan, mesh, Numerics())


def _made(program: CaptureProgram, monkeypatch: pytest.MonkeyPatch, together: int) -> list[SlabShape]:
    """Shapes in the order in which programs for them were begun; from now on, and each begun with so many others."""
    made: list[SlabShape] = []
    meet = threading.Barrier(together)
    compile_one = program._compile

    def compile_noted(shape: SlabShape) -> Any:
        made.append(shape)
        meet.wait(30)
        return compile_one(shape)

    monkeypatch.setattr(program, "_compile", compile_noted)
    return made


def test_on_tpus_all_programs_are_made_at_once(program: CaptureProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "platform_defaults", lambda: TPU)
    monkeypatch.setattr(os, "cpu_count", lambda: len(SHAPES))
    made = _made(program, monkeypatch, len(SHAPES))
    with program.compiling(SHAPES):
        pass
    assert all(isinstance(program.compiled(shape), jax.stages.Compiled) for shape in SHAPES)
    assert sorted(made, reverse=True) == SHAPES, "each is made once"


def test_elsewhere_the_first_is_made_ahead_and_the_others_when_they_are_needed(
    program: CaptureProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _made(program, monkeypatch, 1)
    with program.compiling(SHAPES):
        pass
    assert made == SHAPES[:1]
    program.compiled(SHAPES[2])
    assert made == [SHAPES[0], SHAPES[2]]


@pytest.mark.parametrize("fails", [True, False])
def test_what_was_not_begun_when_the_computation_ends_or_fails_never_is(
    program: CaptureProgram, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(module, "platform_defaults", lambda: TPU)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    made = _made(program, monkeypatch, 1)
    if fails:
        with pytest.raises(OSError, match="weights"), program.compiling(SHAPES):
            raise OSError("the weights cannot be read")
    else:
        with program.compiling(SHAPES):
            pass
        program.close()
    for thread in threading.enumerate():
        if thread.name.startswith("jax_extract-compile"):
            thread.join(30)
    assert SHAPES[-1] not in made


def test_a_program_of_nothing_is_closed_too(program: CaptureProgram) -> None:
    with program.compiling([]):
        pass
    program.close()
