"""The one exception that means "the caller asked for something that cannot be done".

Raised with one sentence that names the value, what was expected and the mend.
Commands print the sentence and leave with exit code 2; a notebook sees a ValueError.
"""


class UserError(ValueError):
    """A request that its author can mend: a wrong flag, file, key, layer, hook point or shape."""


class NotComputedHere(UserError):
    """A model that no port computes: another architecture, a modified one, or one under another kind of adapter."""
