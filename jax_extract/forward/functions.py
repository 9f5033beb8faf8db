"""Functions that a user wrote: what they are called in a sentence, and whether they can be called at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def takes(function: Callable[..., Any], arguments: int) -> bool:
    """Whether so many can be given; True of callables of which nobody knows."""
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
