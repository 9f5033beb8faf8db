"""What drawing hands to who writes: pictures by name, and those that could not be drawn."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from jax_extract.plotting.config import Picture


@dataclass(frozen=True, eq=False)
class Drawn:
    """Attributes:
    name: of the files, without suffix.
    """

    name: str
    figure: Figure


@dataclass(frozen=True)
class LeftOut:
    """A picture that nobody asked for by name, and why it cannot be drawn."""

    picture: Picture
    why: str
