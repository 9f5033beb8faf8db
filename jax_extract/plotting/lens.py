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

from jax_extract.plotting.style import COLOURS, INK, LINE, new_figure, shown, styled

_CELL = (0.68, 0.27)  # inches
_LETTERS = 9
_DARKEST = 0.5  # of the greys, so that words can be read on each


@dataclass(frozen=True, eq=False)
class Lens:
    """Attributes:
    layers: ascending.
    positions: int32 [tokens].
    token_ids: int32 [tokens], of the sample.
    likeliest: int32 [layers, tokens].
    probabilities: float64 [layers, tokens], of the likeliest.
    follows: bool [layers, tokens], whether it is the token that follows in the sample.
    """

    layers: tuple[int, ...]
    positions: np.ndarray
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
        positions: np.ndarray,
        sample_tokens: np.ndarray,
    ) -> Lens:
        """A layer at a time: `rows_of` a layer [tokens, width], `logits_of` rows [tokens, vocabulary].

        Args:
          positions: of the rows, in the sample.
          sample_tokens: all token ids of the sample.
        """
        likeliest, probabilities = [], []
        for layer in layers:
            logits = logits_of(np.asarray(rows_of(layer), np.float32)).astype(np.float64)
            best = logits.argmax(axis=1)
            likeliest.append(best)
            probabilities.append(1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
        following = np.append(sample_tokens, -1)[positions + 1]
        found = np.array(likeliest, np.int32)
        return cls(
            tuple(layers), positions, sample_tokens[positions], found, np.array(probabilities), found == following
        )


def draw_lens(lens: Lens, token_texts: Callable[[np.ndarray], Sequence[str]], caption: str) -> Figure:
    across, up = len(lens.positions), len(lens.layers)
    words = token_texts(lens.likeliest.ravel())
    tokens = [shown(text, _LETTERS) for text in token_texts(lens.token_ids)]
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
                *(column, row, shown(str(words[row * across + column]), _LETTERS)),
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
        axes.set_xticks(range(across), [f"{token}\n{at}" for token, at in zip(tokens, lens.positions, strict=True)])
        axes.set_yticks(range(up), [str(layer) for layer in lens.layers])
        axes.tick_params(length=0, labelcolor=INK, labelsize=7.5)
        axes.set_xlabel(
            "token of the sample, and its position; framed where the likeliest token is the one that follows"
        )
        axes.set_ylabel("layer")
        for edge in axes.spines.values():
            edge.set_visible(False)
        figure.colorbar(mesh, ax=axes, label="probability of the likeliest token", fraction=0.03, pad=0.01)
    return figure
