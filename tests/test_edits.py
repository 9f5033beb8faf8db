"""An edit changes what Hugging Face with an equivalent forward hook changes, and nothing else.

Guarded: every kind of change at every hook point of every family, in one padded and in packed batches, on one device and
on a mesh; several that act on one another; named samples and positions; that what does not exist is refused by name
before anything runs; and that another layer, position or value compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, random_ids, row_errors, run_rows, tiny_folder, tiny_model
from torch_hooks import TorchChange, truth_of

from jax_extract import Edit, Model, UserError, load_model
from models.hooks import HOOK_POINTS

LENGTHS = (23, 9, 40)
LOGITS_BOUND = 2e-5
SCALE = 3.0


def doubled(rows: Any, operand: Any) -> Any:
    """A change of one's own: it depends on the rows, and on an operand with structure."""
    return rows * operand["factor"] + operand["bias"]


KINDS = ("zero", "add", "mean", "replace", "rows", "patch", doubled)


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "long"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def bound(hook: str) -> float:
    return 1e-5 if HOOK_POINTS[hook].residual_stream else 5e-5


def width_of(model: Model, hook: str) -> int:
    return model.config.hidden_size if HOOK_POINTS[hook].width == "d_model" else model.config.intermediate_size


class Case:
    """One change at one hook point, as an edit of a sample and as torch's hook."""

    def __init__(self, model: Model, hook: str, kind: Any, layer: int | None, sample: int, source: Any) -> None:
        random = np.random.default_rng(sample)
        vector = random.standard_normal(width_of(model, hook)).astype(np.float32)
        at = [2, -1]
        here: dict[str, Any] = {"layer": layer, "samples": sample}
        t = torch.from_numpy
        self.where = (hook, layer)
        if kind == "zero":
            self.edit, change = Edit(hook, "zero", **here), torch.zeros_like
        elif kind == "add":
            self.edit = Edit(hook, "add", value=vector, scale=SCALE, **here)
            change = lambda x: x + t(vector) * SCALE  # noqa: E731
        elif kind == "mean":
            given = random.standard_normal((7, len(vector))).astype(np.float32)
            self.edit = Edit(hook, "mean", value=given, **here)
            change = lambda x: t(given.mean(axis=0)).expand_as(x).clone()  # noqa: E731
        elif kind == "replace":
            self.edit = Edit(hook, "replace", value=vector, positions=at, **here)
            change = at_positions(at, t(vector))
        elif kind == "rows":
            given = random.standard_normal((2, len(vector))).astype(np.float32)
            self.edit = Edit(hook, "replace", value=given, positions=at, **here)
            change = at_positions(at, t(given))
        elif kind == "patch":
            self.edit = Edit(hook, "patch", positions=at, source=source, **here)
            change = at_positions(at, t(source.sample("source").get(layer, hook)[at].copy()))
        else:
            operand = {"factor": 2.0, "bias": vector}
            self.edit = Edit(hook, kind, value=operand, **here)
            change = lambda x: x * 2.0 + t(vector)  # noqa: E731
        self.change = TorchChange(hook, layer, change)


def at_positions(positions: list[int], rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[positions] = rows
        return x

    return change


def everything(model: Model) -> dict[str, Any]:
    return {hook: "all" if HOOK_POINTS[hook].per_layer else None for hook in model.hook_points}


def require_equal(out: Any, sample: int, truth: Any, what: str) -> None:
    rows, logits = truth
    got = run_rows(out.run, str(sample))
    for (name, layer), expected in rows.items():
        worst = row_errors(got[name, layer], expected).max()
        assert worst <= bound(name), f"{what}: {name} of layer {layer} is off by {worst}"
    assert row_errors(out.logits[sample], logits).max() <= LOGITS_BOUND, f"{what}: logits"


@pytest.fixture(scope="module")
def model(family: str) -> Model:
    return load_model(tiny_folder(family), mesh_shape="1,1")


def cases_of(model: Model, source: Any) -> list[Case]:
    layers = model.config.num_hidden_layers
    found: list[Case] = []
    for hook in model.hook_points:
        for kind in KINDS:
            layer = len(found) % layers if HOOK_POINTS[hook].per_layer else None
            found.append(Case(model, hook, kind, layer, len(found), source))
    return found


def test_every_change_at_every_hook_point_is_hugging_faces_with_such_a_hook(family: str, model: Model) -> None:
    """One program: every sample has an edit of its own, so that samples are kept apart too."""
    torch_model = tiny_model(family)
    [other] = random_ids([31], seed=5)
    source = model.run({"source": other}, capture=everything(model)).run
    cases = cases_of(model, source)
    texts = random_ids([LENGTHS[i % len(LENGTHS)] for i in range(len(cases))], seed=3)
    out = model.run(texts, capture=everything(model), edits=[case.edit for case in cases], logits="all")
    for i, (case, text) in enumerate(zip(cases, texts, strict=True)):
        truth = truth_of(torch_model, text, [case.change])
        require_equal(out, i, truth, repr(case.edit))
        plain = truth_of(torch_model, text, [])
        assert row_errors(truth[1], plain[1]).max() > 1e-3, f"{case.edit!r} must act"
