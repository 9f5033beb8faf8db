"""Edits: what a forward is asked to change, in the user's words, and what that comes to for given samples.

In: `Edit`s, a model, tokenised samples. Out: `Edits`, which names everything that does not exist before anything
runs, and gives the `Intervention`s of a batch. Positions count the tokens of a sample, never the columns of a batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jax_extract.errors import UserError
from jax_extract.inputs.token_table import PROMPT_TOKENS, TokenizedSample
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan
from models.hooks import HOOK_POINTS, depth, resolve_hook_points
from models.interventions import UNCHANGED, Intervention, Kind
from models.ports import hook_width

if TYPE_CHECKING:
    from jax_extract.store.reader import Run, SampleActivations

CHANGES = ("zero", "add", "mean", "replace", "patch")
_VECTOR, _ROWS = 1, 2  # axes


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """A change of the activations at a hook point.

    Attributes:
      hook: a hook point, by its name or its TransformerLens name (`blocks.12.hook_resid_post` names the layer too).
      change: what is done with the rows there:
        `zero`: they become zero.
        `add`: `scale` times `value` is added.
        `mean`: they become the mean of the rows `value`, or of all rows that `source` holds there.
        `replace`: they become `value`.
        `patch`: they become the rows of the same sample and positions in `source`; of its only one, if it holds one.
        a pure JAX function `change(rows, operand)` of rows float32 [tokens, width] and of `value`, any pytree: they
          become its result. It is called once for each row of a batch, and compiled anew where it is another function,
          so define it once and give what varies as `value`.
      layer: one layer or several, counted from 0, or from the end if negative; None where the hook point has none.
      value: [width], or [positions, width] with a row for each of `positions` (of each token, where these are None).
      scale: of `add`.
      positions: token positions of the sample; if negative, from the end of its prompt, behind which answers follow;
        None is all. In `source` they count from the end there.
      samples: ids, or places in the input; None is all.
      source: a run that holds the hook point.

    Raises:
      UserError: an unknown change, or one that lacks what it needs or is given what it does not take.
    """

    hook: str
    change: str | Callable[[Any, Any], Any]
    layer: int | Iterable[int] | None = None
    value: Any = None
    scale: float = 1.0
    positions: int | Iterable[int] | None = None
    samples: str | int | Iterable[str | int] | None = None
    source: Run | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise UserError(f"an edit's hook point is a name such as 'after_block', not {self.hook!r:.60}")
        if not callable(self.change) and self.change not in CHANGES:
            raise UserError(
                f"unknown change {self.change!r:.60} at {self.hook!r}; expected {', '.join(CHANGES)}, or a function "
                "change(rows, operand)"
            )
        for name in ("layer", "positions"):
            _set(self, name, _whole_numbers(getattr(self, name), f"{name} of the edit at {self.hook!r}"))
        if isinstance(self.samples, str | int):
            _set(self, "samples", (self.samples,))
        elif self.samples is not None:
            _set(self, "samples", tuple(self.samples))
        if not callable(self.change):
            self._check_what_it_takes()

    def _check_what_it_takes(self) -> None:
        here = f"the change {self.change!r} at {self.hook!r}"
        if self.scale != 1.0 and self.change != "add":
            raise UserError(f"{here} takes no scale; multiply the value, or use 'add'")
        if self.change == "zero" and not (self.value is None and self.source is None):
            raise UserError(f"{here} takes neither value nor source; use 'replace' or 'patch' for them")
        if self.change == "patch" and (self.source is None or self.value is not None):
            raise UserError(f"{here} needs source=, a run that holds {self.hook!r}, and no value")
        if self.change in ("add", "replace") and (self.value is None or self.source is not None):
            raise UserError(f"{here} needs value=, a vector [width] or rows [positions, width], and no source")
        if self.change == "mean" and (self.value is None) == (self.source is None):
            raise UserError(
                f"{here} needs value=, the rows whose mean it puts there, or source=, a run that holds them"
            )
        if self.value is not None:
            _set(self, "value", _array(self.value, here, (_ROWS,) if self.change == "mean" else (_VECTOR, _ROWS)))

    def __repr__(self) -> str:
        said = [repr(self.hook), repr(self.change) if isinstance(self.change, str) else _name(self.change)]
        for name in ("layer", "positions", "samples"):
            if (given := getattr(self, name)) is not None:
                said.append(f"{name}={given[0] if name == 'layer' and len(given) == 1 else list(given)!r}")
        if self.value is not None:
            said.append(f"value={list(self.value.shape)}" if isinstance(self.value, np.ndarray) else "value=…")
        if self.scale != 1.0:
            said.append(f"scale={self.scale:g}")
        if self.source is not None:
            said.append("source=…")
        return f"Edit({', '.join(said)})"


def _set(edit: Edit, name: str, value: Any) -> None:
    object.__setattr__(edit, name, value)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _whole_numbers(given: Any, what: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    several: Any = given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    try:
        found = tuple(operator.index(each) for each in several)
    except TypeError:
        raise UserError(f"the {what} must be whole numbers, not {given!r:.60}") from None
    if not found:
        raise UserError(f"the {what} name nothing; leave them out for all")
    if len(set(found)) != len(found):
        raise UserError(f"the {what} name one twice: {list(found)!r:.60}")
    return found


def _array(value: Any, here: str, axes: tuple[int, ...]) -> np.ndarray:
    """float32 of an array or torch tensor; UserError where it is none, has other axes, or is not finite."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    try:
        array = np.array(value, np.float32)
    except (TypeError, ValueError):
        raise UserError(f"the value of {here} is no array of numbers: {value!r:.60}") from None
    if array.ndim not in axes or not array.size:
        expected = " or ".join({_VECTOR: "[width]", _ROWS: "[rows, width]"}[n] for n in axes)
        raise UserError(f"the value of {here} has the shape {list(array.shape)}; expected {expected}")
    if not np.isfinite(array).all():
        raise UserError(f"the value of {here} holds numbers that are not finite")
    return array


class Placed(NamedTuple):
    """Where a sample lies in a batch.

    Attributes:
      row, column: of its first token.
      first: the position of the token that lies there, where the sample's beginning does not.
    """

    row: int
    column: int
    sample: TokenizedSample
    first: int = 0


@dataclass(frozen=True)
class Resolved:
    """An edit of some layers of a model, all of which have the same operand.

    Attributes:
      rows: what is put or added, [1, width] or [positions, width]; None where it is of the sample, or of no array.
    """

    edit: Edit
    hook: str
    layers: tuple[int, ...]
    width: int
    rows: np.ndarray | None

    @property
    def kind(self) -> Kind:
        change: Any = self.edit.change
        return "replace" if change in ("mean", "patch") else change

    def concerns(self, sample: TokenizedSample) -> bool:
        samples: Any = self.edit.samples
        return samples is None or sample.sample_id in samples or sample.sample_index in samples

    def positions(self, sample: TokenizedSample) -> np.ndarray:
        """int64, from 0; UserError where the sample has no such token."""
        given: Any = self.edit.positions
        if given is None:
            return np.arange(sample.length)
        end = sample.prompt_length
        for position in given:
            if not -end <= position < sample.length:
                raise UserError(
                    f"{self.edit!r} names position {position}, and sample {sample.sample_id!r} has the positions 0 to "
                    f"{sample.length - 1}; name others, or leave the sample out with samples="
                )
        found = np.array([position if position >= 0 else end + position for position in given])
        if len(np.unique(found)) != len(found):
            raise UserError(f"{self.edit!r} names a token of sample {sample.sample_id!r} twice; name each once")
        return found

    def operand_of(self, sample: TokenizedSample) -> np.ndarray:
        """float32 [positions, width]: what each of its positions gets."""
        if self.rows is not None:
            count = len(self.positions(sample))
            if len(self.rows) not in (1, count):
                raise UserError(
                    f"{self.edit!r} has {len(self.rows)} rows for the {count} positions of sample "
                    f"{sample.sample_id!r}; give a row for each, or one for all"
                )
            return self.rows
        there, chosen = self._source_rows(sample)
        return there.get(layer=self._layer, hook=self.hook)[chosen].astype(np.float32)

    @cached_property
    def operand_of_function(self) -> Any:
        return jax.tree.map(_as_operand, self.edit.value)

    def check(self, sample: TokenizedSample) -> None:
        """UserError where the sample lacks a position, or the source lacks the sample or its rows."""
        if self.edit.change == "patch":
            self._source_rows(sample)
        elif self.rows is not None:
            self.operand_of(sample)
        else:
            self.positions(sample)

    @property
    def _layer(self) -> int | None:
        return self.layers[0] if HOOK_POINTS[self.hook].per_layer else None

    def _source_rows(self, sample: TokenizedSample) -> tuple[SampleActivations, np.ndarray]:
        """The sample in the source, and which of its rows are put."""
        source = self.edit.source
        assert source is not None, "Edit sees to it"
        source.site(self._layer, self.hook)
        ids = source.sample_ids
        there = source.sample(ids[0] if len(ids) == 1 else sample.sample_id)
        tokens = len(there.token_ids)
        end = int(there.meta.get(PROMPT_TOKENS, tokens))
        wanted = self.positions(sample)
        given: Any = self.edit.positions
        if given is None and tokens != sample.length:
            raise UserError(
                f"{self.edit!r} puts all rows of a sample of {tokens} tokens into sample {sample.sample_id!r}, which "
                f"has {sample.length}; name the positions"
            )
        if given is not None:
            wanted = np.array([position if position >= 0 else end + position for position in given])
        place = {int(position): row for row, position in enumerate(there.positions)}
        if lacking := [int(position) for position in wanted if int(position) not in place]:
            raise UserError(
                f"the source of {self.edit!r} holds no row of position {lacking[0]} of sample {there.sample_id!r}; "
                "capture it with positions='all'"
            )
        return there, np.array([place[int(position)] for position in wanted], np.int64)


@dataclass(frozen=True)
class Edits:
    """Edits of a model, in the order in which they were given; at one hook point that is the order in which they act.

    Attributes:
      each: one for each operand.
      blocks: of the model.
    """

    each: tuple[Resolved, ...]
    blocks: int

    @classmethod
    def of(cls, edits: Edit | Iterable[Edit], model: OpenModel) -> Edits:
        """UserError where the model lacks a hook point or a layer, or a value has another width."""
        if isinstance(edits, Edit):
            edits = (edits,)
        found: list[Resolved] = []
        for edit in edits:
            if not isinstance(edit, Edit):
                raise UserError(f"edits are Edit(…), not {edit!r:.60}")
            found += _at_layers(edit, model)
        return cls(tuple(found), model.config.num_hidden_layers)

    def __bool__(self) -> bool:
        return bool(self.each)

    def check(self, samples: Sequence[TokenizedSample]) -> None:
        """UserError where an edit names a sample or position that does not exist, or concerns none."""
        ids, count = {sample.sample_id for sample in samples}, len(samples)
        for one in self.each:
            for named in one.edit.samples or ():  # type: ignore[union-attr] (a tuple by now)
                if named not in ids and not (isinstance(named, int) and 0 <= named < count):
                    known = f"0 to {count - 1}" if isinstance(named, int) else "those of the input"
                    raise UserError(f"{one.edit!r} names sample {named!r}, which is not there; the samples are {known}")
            for sample in samples:
                if one.concerns(sample):
                    one.check(sample)

    def require_seen(self, plan: CapturePlan, has_logits: bool) -> None:
        """UserError where nothing that is kept could show an edit."""
        if has_logits:
            return
        deepest = max((depth(hook, layer) for hook, layer in plan.sites()), default=None)
        for one in self.each:
            if deepest is None or min(depth(one.hook, layer) for layer in one.layers or (None,)) > deepest:
                raise UserError(
                    f"{one.edit!r} changes nothing that is kept: keep a hook point behind it, or ask for logits"
                )

    def interventions(self, placed: Iterable[Placed], shape: tuple[int, int]) -> tuple[Intervention, ...]:
        """Of a batch of so many rows and columns, on the host.

        Those of any two batches of one shape have equal structures and shapes, as far as no edit is of rows that differ
        by sample.
        """
        placed = tuple(placed)
        return tuple(self._intervention(one, placed, shape) for one in self.each)

    def _intervention(self, one: Resolved, placed: Sequence[Placed], shape: tuple[int, int]) -> Intervention:
        rows = np.full(shape, UNCHANGED, np.int32)
        given: list[np.ndarray] = []
        for place in placed:
            if not one.concerns(place.sample):
                continue
            columns = one.positions(place.sample) - place.first + place.column
            numbers = np.zeros(len(columns), np.int32)
            if one.edit.change == "patch":
                numbers = np.arange(len(columns)) + sum(map(len, given))
                given.append(one.operand_of(place.sample))
            elif one.rows is not None and len(one.rows) > 1:
                numbers = np.arange(len(columns))
            rows[place.row, columns] = numbers
        operand = one.rows if one.edit.change != "patch" else _padded(given, one.width)
        if callable(one.edit.change):
            operand = one.operand_of_function
        return Intervention(one.hook, one.kind, self.at(one.layers), rows, operand)

    def at(self, layers: Iterable[int]) -> np.ndarray:
        """bool [1, blocks + 1]"""
        chosen = np.zeros((1, self.blocks + 1), bool)
        chosen[0, list(layers)] = True
        return chosen

    @cached_property
    def lowest(self) -> tuple[int, int] | None:
        """How deep the first of them is; see `depth`."""
        return min((depth(one.hook, layer) for one in self.each for layer in one.layers or (None,)), default=None)


def _at_layers(edit: Edit, model: OpenModel) -> list[Resolved]:
    (hook, named), *others = resolve_hook_points([edit.hook], model.family.hook_points(model.config)).items()
    if others:
        raise UserError(f"{edit!r} means {hook!r} and {others[0][0]!r}; name one hook point")
    blocks, width = model.config.num_hidden_layers, hook_width(model.config, hook)
    layers: Any = edit.layer
    if not HOOK_POINTS[hook].per_layer:
        if layers is not None:
            raise UserError(f"{edit!r} names a layer, and {hook!r} has none; leave it out")
        chosen: tuple[int, ...] = ()
    else:
        if named is not None and layers is not None and set(named) != {layer % blocks for layer in layers}:
            raise UserError(f"{edit!r} names two layers; leave layer= out, or name the hook point {hook!r}")
        layers = layers if named is None else tuple(named)
        if layers is None:
            raise UserError(f"{edit!r} needs layer=, one of 0 to {blocks - 1}")
        for layer in layers:
            if not -blocks <= layer < blocks:
                raise UserError(f"{edit!r} names layer {layer}; the model has layers 0 to {blocks - 1}")
        chosen = tuple(sorted({layer % blocks for layer in layers}))
    if isinstance(edit.value, np.ndarray) and not callable(edit.change) and edit.value.shape[-1] != width:
        raise UserError(f"{edit!r} has a value {edit.value.shape[-1]} wide; {hook!r} of this model is {width} wide")
    if edit.source is None:
        return [Resolved(edit, hook, chosen, width, _rows(edit))]
    several = [(layer,) for layer in chosen] or [()]
    return [Resolved(edit, hook, one, width, _source_mean(edit, hook, one)) for one in several]


def _rows(edit: Edit) -> np.ndarray | None:
    if callable(edit.change) or edit.value is None:
        return None
    if edit.change == "mean":
        return edit.value.mean(axis=0, dtype=np.float64).astype(np.float32)[None]
    rows = np.float32(edit.scale) * edit.value
    return rows[None] if rows.ndim == _VECTOR else rows


def _source_mean(edit: Edit, hook: str, layers: tuple[int, ...]) -> np.ndarray | None:
    """Over all rows of the source there; None where its rows are put one by one."""
    assert edit.source is not None
    layer = layers[0] if layers else None
    site = edit.source.site(layer, hook)
    if edit.change == "patch":
        return None
    total, rows = np.zeros(site.width), 0
    for batch in edit.source.batches(layer=layer, hook=hook):
        total += batch.activations.astype(np.float64).sum(axis=0)
        rows += len(batch.activations)
    if not rows:
        raise UserError(f"the source of {edit!r} holds no row to take a mean of")
    return (total / rows).astype(np.float32)[None]


def _padded(given: Sequence[np.ndarray], width: int) -> np.ndarray:
    """[n, width] with n a power of two, so that few numbers are compiled for."""
    rows = np.concatenate([np.zeros((0, width), np.float32), *given])
    size = 2  # one row would be taken for all tokens alike
    while size < len(rows):
        size *= 2
    return np.concatenate([rows, np.zeros((size - len(rows), width), np.float32)])


def _as_operand(leaf: Any) -> Any:
    """Arrays as JAX takes them; Python's numbers in its own dtypes, so that they are traced and never constants."""
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu().numpy()
    if isinstance(leaf, bool):
        return np.bool_(leaf)
    if isinstance(leaf, int):
        return np.int32(leaf)
    return np.float32(leaf) if isinstance(leaf, float) else leaf
