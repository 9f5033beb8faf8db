"""Errors of the whole package; `UserError` is shared with `models`, which stands below it."""

from models.errors import UserError

__all__ = ["UserError"]
