"""Layers as people write them: `12`, `-1` (the last one), `10-23` (both ends among them), `all`, and several of these.

In: a word, a number or a list of them, from a flag, a YAML file or a notebook. Out: the words one by one, checked as
far as they can be without a model, and for a model of so many layers the numbers that they mean.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable

from jax_extract.errors import UserError

LayerWord = int | str  # a number, "all" or a range; numbers below 0 count from the end
Layers = Iterable[LayerWord] | LayerWord

OPTION = "layers_to_extract"
ALIASES = (OPTION, "layers", "layer")  # of the option, in flags and files
_ALL = "all"
_NUMBER = r"-?\d{1,9}"
_RANGE = re.compile(rf"({_NUMBER})-({_NUMBER})")
_LONGEST_RANGE = 100_000  # layers; no model is near it


def layer_words(said: object, option: str = f"--{OPTION}") -> tuple[LayerWord, ...] | None:
    """Each layer or range by itself; None, which is the default, stays None.

    Raises:
      UserError: a word that can mean no layer of any model.
    """
    if said is None:
        return None
    several = said if isinstance(said, Iterable) and not isinstance(said, str) else (said,)
    return tuple(word for each in several for word in _words(each, option))


def layers_of(words: Iterable[LayerWord], num_layers: int) -> tuple[int, ...]:
    """The layers that the words mean, ascending, each once; one above the last is not refused here."""
    found: set[int] = set()
    for word in words:
        if word == _ALL:
            found.update(range(num_layers))
        elif isinstance(word, int):
            found.add(_from_start(word, num_layers))
        else:
            first, last = (_from_start(end, num_layers) for end in _ends(word))
            if first > last:
                raise UserError(f"layers {word} run backwards; write the lower layer first")
            if last - first >= _LONGEST_RANGE:
                raise UserError(missing_text(last, num_layers))
            found.update(range(first, last + 1))
    return tuple(sorted(found))


def layers_there(words: Iterable[LayerWord], num_layers: int) -> tuple[int, ...]:
    """As `layers_of`; UserError where one is above the last."""
    found = layers_of(words, num_layers)
    for layer in found:
        if layer >= num_layers:
            raise UserError(missing_text(layer, num_layers))
    return found


def missing_text(layer: int, num_layers: int) -> str:
    """Of a layer that the model lacks."""
    counted = f", or -{num_layers} to -1 from the end" if layer < 0 else ""
    return f"layer {layer} does not exist; the model has layers 0 to {num_layers - 1}{counted}"


def _words(said: object, option: str) -> list[LayerWord]:
    if isinstance(said, str):
        return [_word(word, option) for word in re.split(r"[,\s]+", said) if word]
    if isinstance(said, bool) or not hasattr(said, "__index__"):
        raise _no_layer(said, option)
    return [operator.index(said)]  # type: ignore[arg-type] (NumPy's numbers too)


def _word(word: str, option: str) -> LayerWord:
    if re.fullmatch(_NUMBER, word):
        return int(word)
    if word.lower() == _ALL:
        return _ALL
    if not _RANGE.fullmatch(word):
        raise _no_layer(word, option)
    first, last = _ends(word)
    if first > last and (first < 0) == (last < 0):
        raise UserError(f"{option} {word} runs backwards; write {last}-{first}")
    return word


def _no_layer(said: object, option: str) -> UserError:
    return UserError(f"{option} {said!r:.60} names no layer; write 12, -1 (the last), 10-23, all, or several of these")


def _ends(word: str) -> tuple[int, int]:
    found = _RANGE.fullmatch(word)
    assert found is not None, "layer_words sees to it"
    return int(found[1]), int(found[2])


def _from_start(layer: int, num_layers: int) -> int:
    """A layer counted from 0; UserError where one counted from the end lies before the first."""
    if layer < -num_layers:
        raise UserError(missing_text(layer, num_layers))
    return layer + num_layers if layer < 0 else layer
