"""A part of a run whose rows are arrays that are there already.

In: the content of a part, rows by site. Out: `RowsInMemory`, which the reader treats like a part on disk.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jax_extract.store.parts import PartContent, Site


class RowsInMemory:
    """See the module."""

    def __init__(self, content: PartContent, rows: Mapping[Site, np.ndarray]) -> None:
        """`rows`: [rows of the content, width] by site."""
        self.content = content
        self._rows = {site.key: each for site, each in rows.items()}

    def rows(self, site: Site, start: int, stop: int) -> np.ndarray:
        return self._rows[site.key][start:stop]
