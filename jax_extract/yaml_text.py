"""YAML as people write it: options, and edits.

In: text. Out: plain values; or one sentence, where the text is no YAML, names a key twice (of which YAML would keep the
last one), or holds a number or a date that is none.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from jax_extract.errors import UserError

_MOST_VALUES = 1_000_000


class _Loader(yaml.SafeLoader):
    """Plain values alone, as `yaml.safe_load` makes them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"names {key.value!r:.60} twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _written_out(value: Any, known: dict[int, float]) -> float:
    """How many values it is without aliases, by which a few lines can stand for billions; infinity in a circle."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inside = value if isinstance(value, list) else value.values()
        known[id(value)] = 1 + sum(_written_out(each, known) for each in inside)
    return known[id(value)]


def parsed(text: str, what: str, mend: str) -> Any:
    """Its values.

    Args:
      what: what the sentence begins with, such as `configuration 'run.yaml'`.
      mend: what it ends with.

    Raises:
      UserError: see above.
    """
    try:
        found = yaml.load(text, _Loader)
        values = _written_out(found, {})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        said = getattr(error, "problem", None) or ""
        wrong = said if said.endswith("twice") else "is not valid YAML"
        raise UserError(f"{what}{line} {wrong}; {mend}") from None
    except (ValueError, KeyError, RecursionError) as error:  # of dates and numbers that are none, and of deep lists
        raise UserError(f"{what} cannot be read ({type(error).__name__}: {error!s:.60}); {mend}") from None
    if values > _MOST_VALUES:
        raise UserError(f"{what} names itself so often that it stands for over {_MOST_VALUES:,} values; {mend}")
    return found
