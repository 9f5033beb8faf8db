"""An edit, as a user writes it.

In: a hook point, a change, layers, positions, samples, values. Out: `Edit`, with everything refused that can be known
to be wrong without a model.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from jax_extract.errors import UserError
from jax_extract.forward.functions import name_of, takes
from jax_extract.layer_words import Layers, layer_words

if TYPE_CHECKING:
    from jax_extract.store.reader import Run

    class HoldsRun(Protocol):
        @property
        def run(self) -> Run: ...


CHANGES = ("zero", "add", "mean", "replace", "patch")
VECTOR, ROWS = 1, 2  # axes


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
        a pure JAX function `change(rows, operand)` of rows float32 [1, width] and of `value`, any pytree: they become
          its result. It is given each token by itself, so that nothing depends on what else is computed with it, and is
          compiled anew where it is another function: define it once and give what varies as `value`.
      layer: one layer or several, counted from 0, or from the end if negative; "2-5" and "all" too; None where the
        hook point has none.
      value: [width], or [positions, width] with a row for each of `positions` (of each token, where these are None).
      scale: of `add`.
      positions: token positions of the sample; if negative, from the end of its prompt, behind which answers follow;
        None is all. In `source` they count from the end there.
      samples: ids, or places in the input; None is all.
      source: a run that holds the hook point, or what `Model.run` gave.

    Raises:
      UserError: an unknown change, or one that lacks what it needs or is given what it does not take.
    """

    hook: str
    change: str | Callable[[Any, Any], Any]
    layer: Layers | None = None
    value: Any = None
    scale: float = 1.0
    positions: int | Iterable[int] | None = None
    samples: str | int | Iterable[str | int] | None = None
    source: Run | HoldsRun | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str):
            raise UserError(f"an edit's hook point is a name such as 'after_block', not {self.hook!r:.60}")
        if not callable(self.change) and not (isinstance(self.change, str) and self.change in CHANGES):
            raise UserError(
                f"unknown change {self.change!r:.60} at {self.hook!r}; expected {', '.join(CHANGES)}, or a function "
                "change(rows, operand)"
            )
        _set(self, "layer", layer_words(self.layer, f"the layer of the edit at {self.hook!r}:"))
        if self.layer == ():
            raise UserError(f"the edit at {self.hook!r} names no layer; give one, or 'all'")
        _set(self, "positions", _whole_numbers(self.positions, f"positions of the edit at {self.hook!r}"))
        _set(self, "samples", _samples(self.samples, self.hook))
        if self.source is not None:
            _set(self, "source", getattr(self.source, "run", self.source))
            if not hasattr(self.source, "sample_ids"):
                raise UserError(f"the source of the edit at {self.hook!r} is no run: {self.source!r:.60}")
        if callable(self.change):
            if not takes(self.change, 2):
                raise UserError(
                    f"the function {name_of(self.change)!r} at {self.hook!r} must take rows and an operand, as "
                    "change(rows, operand)"
                )
            if self.scale != 1.0 or self.source is not None:
                raise UserError(
                    f"the function {name_of(self.change)!r} at {self.hook!r} takes neither scale nor source; give what "
                    "it needs as value="
                )
        else:
            self._check_what_it_takes()

    @property
    def run(self) -> Run | None:
        """Its source."""
        return self.source  # type: ignore[return-value] (a run by now)

    def _check_what_it_takes(self) -> None:
        here = f"the change {self.change!r} at {self.hook!r}"
        scale = _float(self.scale)
        if not math.isfinite(scale):
            raise UserError(f"the scale of {here} is {self.scale!r:.60}; expected a finite number")
        _set(self, "scale", scale)
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
            _set(self, "value", _array(self.value, here, (ROWS,) if self.change == "mean" else (VECTOR, ROWS)))
            with np.errstate(over="ignore"):
                if not np.isfinite(np.float32(scale) * self.value).all():
                    raise UserError(f"the scale {scale:g} of {here} makes its value larger than float32 holds")

    def __repr__(self) -> str:
        said = [repr(self.hook), repr(self.change) if isinstance(self.change, str) else name_of(self.change)]
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


def _whole_numbers(given: Any, what: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    several: Any = given if _is_several(given) else (given,)
    try:
        found = tuple(_index(each) for each in several)
    except TypeError:
        raise UserError(f"the {what} must be whole numbers, not {given!r:.60}") from None
    if not found:
        raise UserError(f"the {what} name nothing; leave them out for all")
    if len(set(found)) != len(found):
        raise UserError(f"the {what} name one twice: {list(found)!r:.60}")
    return found


def _samples(given: Any, hook: str) -> tuple[str | int, ...] | None:
    """Ids and places."""
    if given is None:
        return None
    try:
        several: Any = given if _is_several(given) else (given,)
        found = tuple(each if isinstance(each, str) else _index(each) for each in several)
    except TypeError:
        raise UserError(
            f"the samples of the edit at {hook!r} must be ids, or places in the input, not {given!r:.60}"
        ) from None
    if not found:
        raise UserError(f"the samples of the edit at {hook!r} name none; leave them out for all")
    return found


def _is_several(given: Any) -> bool:
    """Whether it can be iterated, as an array without axes cannot."""
    return isinstance(given, Iterable) and not isinstance(given, str) and getattr(given, "ndim", 1) > 0


def _index(given: Any) -> int:
    if isinstance(given, bool | np.bool_):
        raise TypeError("a truth value is no number")
    return operator.index(given)


def _float(given: Any) -> float:
    """Of a number; NaN of what is none, or too large."""
    if isinstance(given, bool | np.bool_) or not isinstance(given, Real):
        return math.nan
    try:
        return float(given)
    except OverflowError:
        return math.nan


def _array(value: Any, here: str, axes: tuple[int, ...]) -> np.ndarray:
    """float32 of an array or torch tensor; UserError where it is none, has other axes, or is not finite."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    try:
        given = np.asarray(value)
        if given.dtype.kind not in "iuf" and given.dtype != ml_dtypes.bfloat16:
            raise TypeError(given.dtype)
        array = np.array(given, np.float32)
    except Exception:  # noqa: BLE001 (whatever nested lists of strangers raise)
        raise UserError(f"the value of {here} is no array of numbers: {type(value).__name__} {value!r:.60}") from None
    if array.ndim not in axes or not array.size:
        expected = " or ".join({VECTOR: "[width]", ROWS: "[rows, width]"}[n] for n in axes)
        raise UserError(f"the value of {here} has the shape {list(array.shape)}; expected {expected}")
    if not np.isfinite(array).all():
        raise UserError(f"the value of {here} holds numbers that are not finite")
    return array
