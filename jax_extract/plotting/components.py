"""Principal components of rows.

In: rows [n, width]. Out: `Components`: how much of their variance each holds, and the rows along the first two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWN = 2


@dataclass(frozen=True, eq=False)
class Components:
    """Attributes:
    shares: float64 [components], of the variance, the largest first; they sum to 1, or are zero where nothing varies.
    along: float64 [rows, 2], the rows along the first two, from the mean; NaN for a row that is not finite.
    """

    shares: np.ndarray
    along: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Components:
        """Rows that are not finite are left out of the variance."""
        finite = np.isfinite(rows).all(axis=1)
        centred = rows[finite].astype(np.float64)
        centred -= centred.mean(axis=0) if len(centred) else 0.0
        few = centred.shape[0] < centred.shape[1]
        variances, vectors = np.linalg.eigh(centred @ centred.T if few else centred.T @ centred)
        variances, vectors = np.maximum(variances[::-1], 0.0), vectors[:, ::-1][:, :DRAWN]
        found = vectors * np.sqrt(variances[: vectors.shape[1]]) if few else centred @ vectors
        # The sign of a component is nobody's: the row farthest from the mean lies on its positive side.
        if len(found):
            found = found * np.where(found[np.abs(found).argmax(axis=0), range(found.shape[1])] < 0, -1, 1)
        along = np.full((len(rows), DRAWN), np.nan)
        along[finite, : found.shape[1]] = found
        total = variances.sum()
        return cls(variances / total if total else np.zeros_like(variances), along)

    def needed_for(self, share: float) -> int:
        """How many components hold that share of the variance."""
        return int(np.searchsorted(np.cumsum(self.shares), share - 1e-12)) + 1
