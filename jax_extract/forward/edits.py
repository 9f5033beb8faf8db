"""What edits come to for a model and its samples.

In: `Edit`s, a model, tokenised samples. Out: `Edits`, which names everything that does not exist before anything
runs, and gives the `Intervention`s of a batch. Positions count the tokens of a sample, never the columns of a batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jax_extract.errors import UserError
from jax_extract.forward.batches import rounded
from jax_extract.forward.edit import VECTOR, Edit
from jax_extract.inputs.token_table import PROMPT_TOKENS, TokenizedSample
from jax_extract.layer_words import layers_there
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import PATTERN_TOKENS, CapturePlan
from models.hooks import HOOK_POINTS, PATTERN, depth, resolve_hook_points
from models.interventions import UNCHANGED, Intervention, Kind
from models.ports import hook_width

if TYPE_CHECKING:
    from jax_extract.store.reader import Run, SampleActivations


class Placed(NamedTuple):
    """Where a sample lies in a batch: row and column of its first token."""

    row: int
    column: int
    sample: TokenizedSample


@dataclass(frozen=True)
class Resolved:
    """An edit of some layers of a model, all of which have the same operand.

    Attributes:
      rows: what is put or added, [1, width] or [positions, width]; None where it is of the sample, or of no array.
      room: tokens of an answer that may follow a sample.
    """

    edit: Edit
    hook: str
    layers: tuple[int, ...]
    width: int
    rows: np.ndarray | None
    room: int = 0

    @property
    def kind(self) -> Kind:
        change: Any = self.edit.change
        return "replace" if change in ("mean", "patch") else change

    @property
    def names_tokens(self) -> bool:
        """Whether some samples may not do."""
        edit = self.edit
        some = edit.positions is not None or edit.samples is not None or self.gives_each_its_own
        return some or self.hook == PATTERN

    def concerns(self, sample: TokenizedSample) -> bool:
        samples: Any = self.edit.samples
        return samples is None or sample.sample_id in samples or sample.sample_index in samples

    def positions(self, sample: TokenizedSample) -> np.ndarray:
        """int64, from 0; UserError where the sample has no such token, or more than a row of the pattern has."""
        given: Any = self.edit.positions
        if self.hook == PATTERN and (length := sample.length + self.room) > PATTERN_TOKENS:
            behind = " with its answer" if self.room else ""
            raise UserError(
                f"{self.edit!r} has rows of {PATTERN_TOKENS} weights a head, and sample {sample.sample_id!r} {length} "
                f"tokens{behind}; shorten it, or leave it out with samples="
            )
        if given is None:  # a source, and rows for each token, are of a prompt
            return np.arange(sample.prompt_length if self.gives_each_its_own else sample.length)
        end = sample.prompt_length
        for position in given:
            if not -end <= position < sample.length + self.room:
                raise UserError(
                    f"{self.edit!r} names position {position}, and sample {sample.sample_id!r} has the positions 0 to "
                    f"{sample.length + self.room - 1}; name others, or leave the sample out with samples="
                )
        found = np.array([position if position >= 0 else end + position for position in given])
        if len(np.unique(found)) != len(found):
            raise UserError(f"{self.edit!r} names a token of sample {sample.sample_id!r} twice; name each once")
        return found

    @property
    def gives_each_its_own(self) -> bool:
        """Whether every position has a row of the operand."""
        return self.edit.change == "patch" or (self.rows is not None and len(self.rows) > 1)

    def most_rows(self, shape: tuple[int, int], samples: int) -> int:
        """Of its operand, of one device's batch of that shape with so many samples a row."""
        positions: Any = self.edit.positions
        rows, columns = shape
        return rows * (columns if positions is None else min(columns, samples * len(positions)))

    def of_answer(self, sample: TokenizedSample, tokens: int) -> np.ndarray:
        """int32 [tokens]: which row of the operand each token of the answer to this prompt gets."""
        numbers = np.full(tokens, UNCHANGED, np.int32)
        if self.edit.positions is None:
            if not self.gives_each_its_own:
                numbers[:] = 0
            return numbers
        positions = self.positions(sample)
        each = np.arange(len(positions)) if self.gives_each_its_own else np.zeros(len(positions), np.int32)
        there = (positions >= sample.length) & (positions < sample.length + tokens)
        numbers[positions[there] - sample.length] = each[there]
        return numbers

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
        return there.get(layer=self.layer, hook=self.hook)[chosen].astype(np.float32)

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
    def layer(self) -> int | None:
        """The one layer of an edit that has a source."""
        return self.layers[0] if HOOK_POINTS[self.hook].per_layer else None

    def _source_rows(self, sample: TokenizedSample) -> tuple[SampleActivations, np.ndarray]:
        """The sample in the source, and which of its rows are put."""
        source = self.edit.run
        assert source is not None, "Edit sees to it"
        source.site(self.layer, self.hook)
        ids = source.sample_ids
        there = source.sample(ids[0] if len(ids) == 1 else sample.sample_id)
        tokens = len(there.token_ids)
        end = int(there.meta.get(PROMPT_TOKENS, tokens))
        wanted = self.positions(sample)
        given: Any = self.edit.positions
        if given is None and end != sample.prompt_length:
            raise UserError(
                f"{self.edit!r} puts all rows of a sample of {end} tokens into sample {sample.sample_id!r}, which "
                f"has {sample.prompt_length}; name the positions"
            )
        if given is not None:
            wanted = np.array([position if position >= 0 else end + position for position in given])
            if outside := [p for p, at in zip(given, wanted.tolist(), strict=True) if not 0 <= at < tokens]:
                raise UserError(
                    f"{self.edit!r} names position {outside[0]}, and sample {there.sample_id!r} of its source has the "
                    f"positions 0 to {tokens - 1}"
                )
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
    def of(cls, edits: Edit | Iterable[Edit] | None, model: OpenModel, room: int = 0) -> Edits:
        """Of a model that may answer with so many tokens.

        Raises:
          UserError: it lacks a hook point or a layer, or a value has another width.
        """
        if isinstance(edits, Edit):
            edits = (edits,)
        if not isinstance(edits, Iterable):
            if edits is not None:
                raise UserError(f"edits are a list of Edit(…), not {edits!r:.60}")
            edits = ()
        found: list[Resolved] = []
        for edit in edits:
            if not isinstance(edit, Edit):
                raise UserError(f"edits are Edit(…), not {edit!r:.60}")
            found += [dataclasses.replace(one, room=room) for one in _at_layers(edit, model)]
        return cls(tuple(found), model.config.num_hidden_layers)

    @cached_property
    def digest(self) -> str:
        """`sha256:…` over what they change: equal where they are equal, whatever files they come from."""
        total = hashlib.sha256()
        for one in self.each:
            edit = one.edit
            said = [one.hook, str(edit.change), one.layers, edit.positions, edit.samples]
            total.update(json.dumps(said).encode())
            if one.rows is not None:
                total.update(repr(one.rows.shape).encode() + one.rows.astype("<f4").tobytes())
            if edit.change == "patch" and edit.run is not None:
                total.update(_rows_digest(edit.run, one.hook, one.layer))
        return f"sha256:{total.hexdigest()}"

    @property
    def described(self) -> list[str]:
        """For records."""
        return list(dict.fromkeys(repr(one.edit) for one in self.each))

    def __bool__(self) -> bool:
        return bool(self.each)

    def check(self, samples: Iterable[TokenizedSample]) -> None:
        """UserError where an edit names a sample or position that does not exist; samples are looked at once."""
        picky = [one for one in self.each if one.names_tokens]
        if not picky:
            return
        ids: set[str | int] = set()
        for sample in samples:
            ids |= {sample.sample_id, sample.sample_index}
            for one in picky:
                if one.concerns(sample):
                    one.check(sample)
        for one in picky:
            named: Any = one.edit.samples or ()
            if lacking := [each for each in named if each not in ids]:
                raise UserError(
                    f"{one.edit!r} names sample {lacking[0]!r}, which is not there; the samples are "
                    f"{', '.join(map(repr, sorted(each for each in ids if isinstance(each, str))[:5]))} and so on"
                )

    def require_seen(self, plan: CapturePlan, has_logits: bool) -> None:
        """UserError where nothing that is kept could show an edit."""
        if plan.pattern_tokens != PATTERN_TOKENS and any(one.hook == PATTERN for one in self.each):
            raise UserError(
                f"edits at {PATTERN} are of rows with {PATTERN_TOKENS} weights a head, and --attention_pattern_tokens "
                f"is {plan.pattern_tokens}; leave it out"
            )
        if has_logits:
            return
        deepest = max((depth(hook, layer) for hook, layer in plan.sites()), default=None)
        lowest: dict[int, tuple[int, int]] = {}  # of all layers of an edit, which may be several here
        for one in self.each:
            places = [depth(one.hook, layer) for layer in one.layers or (None,)]
            lowest[id(one.edit)] = min([*places, *filter(None, [lowest.get(id(one.edit))])])
        for one in self.each:
            if deepest is None or lowest[id(one.edit)] > deepest:
                raise UserError(
                    f"{one.edit!r} changes nothing that is kept: keep a hook point behind it, or ask for logits"
                )

    def interventions(
        self, placed: Iterable[Placed], shape: tuple[int, int], devices: int = 1, samples: int | None = None
    ) -> tuple[Intervention, ...]:
        """Of a batch of so many rows and columns, on the host.

        Args:
          devices: that have an equal share of the rows each.
          samples: most of a row. Given, any two batches of one shape have interventions of equal shapes; else those
            that put rows which differ by sample are as large as they must be.
        """
        placed = tuple(placed)
        return tuple(self._intervention(one, placed, shape, devices, samples) for one in self.each)

    def _intervention(
        self, one: Resolved, placed: Sequence[Placed], shape: tuple[int, int], devices: int, samples: int | None
    ) -> Intervention:
        rows = np.full(shape, UNCHANGED, np.int32)
        of_device = shape[0] // devices
        given: list[list[np.ndarray]] = [[] for _ in range(devices)]
        for place in placed:
            if not one.concerns(place.sample):
                continue
            positions = one.positions(place.sample)
            numbers = np.arange(len(positions)) if one.gives_each_its_own else np.zeros(len(positions), np.int32)
            if one.edit.change == "patch":
                mine = given[place.row // of_device]
                numbers = numbers + sum(map(len, mine))
                mine.append(one.operand_of(place.sample))
            there = positions < place.sample.length  # others are of an answer that is not there yet
            rows[place.row, place.column + positions[there]] = numbers[there]
        layers = self.at(one.layers)
        if one.edit.change == "patch":
            size = max(sum(map(len, mine)) for mine in given)
            if samples is not None:
                size = one.most_rows((of_device, shape[1]), samples)
            operand = np.concatenate([_padded(mine, rounded(max(2, size)), one.width) for mine in given])
            return Intervention(one.hook, one.kind, layers, rows, operand, by_device=True)
        operand = one.operand_of_function if callable(one.edit.change) else one.rows
        return Intervention(one.hook, one.kind, layers, rows, operand)

    def while_answering(self, placed: Iterable[Placed], rows: int, tokens: int) -> tuple[Intervention, ...]:
        """Of the tokens of answers, whose `rows` are int32 [rows, tokens]: those of one step are a column of it.

        Args:
          placed: of each prompt its row of answers.
          tokens: of each answer.
        """
        placed = tuple(placed)
        found = []
        for one in self.each:
            if one.edit.change == "patch":  # of a source, which ends with the prompt
                continue
            numbers = np.full((rows, tokens), UNCHANGED, np.int32)
            for place in placed:
                if one.concerns(place.sample):
                    numbers[place.row] = one.of_answer(place.sample, tokens)
            operand = one.operand_of_function if callable(one.edit.change) else one.rows
            found.append(Intervention(one.hook, one.kind, self.at(one.layers), numbers, operand))
        return tuple(found)

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
        if layers is None and named is None:
            raise UserError(f"{edit!r} needs layer=, one of 0 to {blocks - 1}")
        try:
            chosen = layers_there(layers or tuple(named or ()), blocks)
        except UserError as error:
            raise UserError(f"{edit!r}: {error}") from None
        if named is not None and set(named) != set(chosen):
            raise UserError(f"{edit!r} names two layers; leave layer= out, or name the hook point {hook!r}")
    if isinstance(edit.value, np.ndarray) and not callable(edit.change) and edit.value.shape[-1] != width:
        raise UserError(f"{edit!r} has a value {edit.value.shape[-1]} wide; {hook!r} of this model is {width} wide")
    if edit.source is None:
        return [Resolved(edit, hook, chosen, width, _rows(edit))]
    several = [(layer,) for layer in chosen] or [()]
    return [Resolved(edit, hook, one, width, _source_mean(edit, hook, one, width)) for one in several]


def _rows(edit: Edit) -> np.ndarray | None:
    if callable(edit.change) or edit.value is None:
        return None
    if edit.change == "mean":
        return edit.value.mean(axis=0, dtype=np.float64).astype(np.float32)[None]
    rows = np.float32(edit.scale) * edit.value
    return rows[None] if rows.ndim == VECTOR else rows


def _source_mean(edit: Edit, hook: str, layers: tuple[int, ...], width: int) -> np.ndarray | None:
    """Over all rows of the source there; None where its rows are put one by one."""
    assert edit.run is not None, "Edit sees to it"
    layer = layers[0] if layers else None
    site = edit.run.site(layer, hook)
    if site.width != width:
        raise UserError(f"the source of {edit!r} has rows {site.width} wide; {hook!r} of this model is {width} wide")
    if edit.change == "patch":
        return None
    total, rows = np.zeros(site.width), 0
    for batch in edit.run.batches(layer=layer, hook=hook):
        total += batch.activations.astype(np.float64).sum(axis=0)
        rows += len(batch.activations)
    if not rows:
        raise UserError(f"the source of {edit!r} holds no row to take a mean of")
    return (total / rows).astype(np.float32)[None]


def _rows_digest(run: Run, hook: str, layer: int | None) -> bytes:
    """Of all rows of a site, a part at a time; the same however they are divided into parts."""
    each: dict[str, bytes] = {}
    for batch in run.batches(layer=layer, hook=hook):
        offsets = batch.row_offsets.tolist()
        for sample, start, stop in zip(batch.sample_ids, offsets[:-1], offsets[1:], strict=True):
            rows = batch.activations[start:stop].astype("<f4").tobytes()
            each[sample] = hashlib.sha256(batch.positions[start:stop].astype("<i4").tobytes() + rows).digest()
    return hashlib.sha256(b"".join(sample.encode() + each[sample] for sample in sorted(each))).digest()


def _padded(given: Sequence[np.ndarray], size: int, width: int) -> np.ndarray:
    """[size, width]; a single row would be taken for all tokens alike."""
    rows = np.concatenate([np.zeros((0, width), np.float32), *given])
    return np.concatenate([rows, np.zeros((size - len(rows), width), np.float32)])


def _as_operand(leaf: Any) -> Any:
    """Arrays as JAX takes them; Python's numbers in its own dtypes, so that they are traced and never constants."""
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().cpu()
        leaf = leaf.float().numpy() if leaf.is_floating_point() else leaf.numpy()
    if isinstance(leaf, bool):
        return np.bool_(leaf)
    if isinstance(leaf, float):
        return np.float32(leaf)
    if isinstance(leaf, jax.Array) and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    if isinstance(leaf, jax.Array):
        raise UserError("the value of a function of one's own holds a random key; give jax.random.key_data(key) of it")
    array = np.asarray(leaf)
    if array.dtype.kind not in "biuf" and array.dtype != jax.numpy.bfloat16:
        raise UserError(f"the value of a function of one's own holds {leaf!r:.60}; give arrays and numbers")
    wide = array.dtype.kind in "iu" and array.dtype.itemsize > np.dtype(np.int32).itemsize
    if wide and array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise UserError(f"the value of a function of one's own holds {leaf!r:.60}, and JAX computes with 32 bits")
    return np.int32(leaf) if isinstance(leaf, int) else array
