"""Errors of the whole package; `UserError` is shared with `models`, which stands below it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from models.errors import UserError

__all__ = ["UserError", "damage_is_told", "user_path"]

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError)


@contextlib.contextmanager
def damage_is_told(what: str, mend: str) -> Iterator[None]:
    """Turns whatever damaged content makes a parser raise into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGE, RecursionError, StopIteration) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{what} is damaged ({reason}); {mend}") from None


def user_path(text: str, flag: str) -> Path:
    """A path that a user wrote, `~` expanded; UserError where the system could not even look for it."""
    if not text:
        raise UserError(f"{flag} is empty; give a path")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag} {text[:80]!r} is not a usable path ({error.args[-1]}); check it") from None
    return path
