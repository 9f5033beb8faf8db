"""Picture: the logit lens, the likeliest next token of what each layer holds at each token (nostalgebraist, 2020).

In: residual streams of one sample, final norm and head. Out: `Lens`, and a figure: layers over tokens, in each cell the
likeliest token, as dark as it is likely, in bold where it is the one that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jax_extract.plotting.style import COLOURS, INK, LINE, label_text, new_figure, styled, token_text

_CELL = (0.68, 0.27)  # inches
_LETTERS = 9
_DARKEST = 0.5  # of the greys, so that words can be read on each


@dataclass(frozen=True, eq=False)
class Lens:
    """Attributes:
    layers: ascending.
    places: of each token, to be read below it: its position, or its sample.
    token_ids: int32 [tokens].
    likeliest: int32 [layers, tokens].
    probabilities: float64 [layers, tokens], of the likeliest.
    follows: bool [layers, tokens], whether it is the token that follows in the sample.
    """

    layers: tuple[int, ...]
    places: tuple[str, ...]
    token_ids: np.ndarray
    likeliest: np.ndarray
    probabilities: np.ndarray
    follows: np.ndarray

    @classmethod
    def of(
        cls,
        layers: Sequence[int],
        rows_of: Callable[[int], np.ndarray],
        logits_of: Callable[[np.ndarray], np.ndarray],
        places: Sequence[str],
        token_ids: np.ndarray,
        following: np.ndarray,
    ) -> Lens:
        """A layer at a time: `rows_of` a layer [tokens, width], `logits_of` rows [tokens, vocabulary].

        Args:
          following: int32 [tokens], the token behind each; -1 where there is none.
        """
        likeliest, probabilities = [], []
        for layer in layers:
            logits = logits_of(np.asarray(rows_of(layer), np.float32)).astype(np.float64)
            best = logits.argmax(axis=1)
            likeliest.append(best)
            probabilities.append(1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
        found = np.array(likeliest, np.int32)
        return cls(tuple(layers), tuple(places), token_ids, found, np.array(probabilities), found == following)


def following(token_ids: np.ndarray, position: int) -> int:
    """The token behind a position of a sample; -1 where there is none."""
    return int(token_ids[position + 1]) if position + 1 < len(token_ids) else -1


def draw_lens(
    lens: Lens, token_texts: Callable[[np.ndarray], Sequence[str]], caption: str, below: str = "position"
) -> Figure:
    """`below`: what `places` are."""
    across, up = len(lens.places), len(lens.layers)
    words = token_texts(lens.likeliest.ravel())
    tokens = [token_text(text, _LETTERS) for text in token_texts(lens.token_ids)]
    with styled():
        size = max(across * _CELL[0] + 1.9, 6.4), up * _CELL[1] + 2.0
        figure = new_figure("Logit lens: the likeliest next token at every layer", caption, *size)
        axes = figure.add_subplot()
        greys = ListedColormap(mpl.colormaps["Greys"](np.linspace(0, _DARKEST, 256)))
        mesh = axes.pcolormesh(
            np.arange(across + 1) - 0.5, np.arange(up + 1) - 0.5, lens.probabilities, cmap=greys, vmin=0, vmax=1
        )
        mesh.set(edgecolor=LINE, linewidth=0.5)
        for row, column in np.ndindex(up, across):
            follows = bool(lens.follows[row, column])
            axes.text(
                *(column, row, token_text(str(words[row * across + column]), _LETTERS)),
                ha="center",
                va="center",
                fontsize=7,
                weight="bold" if follows else "normal",
                color=INK,
                gid="likeliest",
            )
            if follows:
                axes.add_patch(
                    Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor=COLOURS[0], linewidth=1.4)
                )
        below_each = [f"{token}\n{label_text(at, _LETTERS)}" for token, at in zip(tokens, lens.places, strict=True)]
        axes.set_xticks(range(across), below_each)
        axes.set_yticks(range(up), [str(layer) for layer in lens.layers])
        axes.tick_params(length=0, labelcolor=INK, labelsize=7.5)
        framed = "; framed where the likeliest token is the one that follows" if lens.follows.any() else ""
        axes.set_xlabel(f"token, and its {below}{framed}")
        axes.set_ylabel("layer")
        for edge in axes.spines.values():
            edge.set_visible(False)
        figure.colorbar(mesh, ax=axes, label="probability of the likeliest token", fraction=0.03, pad=0.01)
    return figure
