"""`jax-extract inspect`: what is in a run, or in one shard, as a person reads it.

In: a run directory or a shard file. Out: text: what was extracted, and per site the shape, the mean
norm of a row and the root mean square of a value, with a bar to see how the norm grows with depth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.formats import load_shard
from jax_extract.store.parts import Site
from jax_extract.store.reader import Run, open_activations
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.terminal import bytes_text, plural, ranges_text, share_text

_BAR = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_CHUNK_ROWS = 65_536


@dataclass
class SiteStatistics:
    """Running sums over rows, in float64; rows that are not finite are counted and left out of the sums."""

    rows: int = 0
    values: int = 0
    norms: float = 0.0
    squares: float = 0.0
    not_finite: int = 0

    def add(self, rows: np.ndarray) -> None:
        """rows [n, width], any float dtype."""
        squares = np.square(rows.astype(np.float64)).sum(axis=1)
        finite = np.isfinite(squares)
        self.not_finite += int((~finite).sum())
        self.rows += len(rows)
        self.values += int(finite.sum()) * rows.shape[1]
        self.norms += float(np.sqrt(squares[finite]).sum())
        self.squares += float(squares[finite].sum())

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        finite = self.rows - self.not_finite
        return self.norms / finite if finite else 0.0

    @property
    def rms(self) -> float:
        """Root mean square of a value."""
        return float(np.sqrt(self.squares / self.values)) if self.values else 0.0


def statistics(arrays: Iterable[np.ndarray]) -> SiteStatistics:
    """Over arrays [rows, width], in bounded memory."""
    result = SiteStatistics()
    for array in arrays:
        for start in range(0, len(array), _CHUNK_ROWS):
            result.add(array[start : start + _CHUNK_ROWS])
    return result


def inspect(path: str) -> None:
    """Prints the summary of a run, in a directory or a bucket, or of one shard; UserError where it is neither."""
    if path.startswith(BUCKET_SCHEME) or Path(path).is_dir():
        _inspect_run(open_activations(path), path)
    elif Path(path).is_file():
        _inspect_shard(path)
    else:
        raise UserError(f"{path!r} is neither a run directory nor a shard; give what --activations_dir named")


def _inspect_run(run: Run, path: str) -> None:
    meta = run.metadata
    print(f"{path}: {meta['model_name']}, {meta['model_type']}, {meta['num_hidden_layers']} layers")
    print(
        f"  {plural(meta['total_samples'], 'sample')}, {plural(meta['total_tokens'], 'token')}, "
        f"{plural(meta['total_rows'], 'row')} a site (positions {meta['positions']}), {bytes_text(meta['total_bytes'])}"
    )
    print(
        f"  {', '.join(run.hook_points)}" + (f" at layers {ranges_text(run.layers)}" if run.layers else "") + f"; "
        f"computed in {meta['numerics']['dtype']}, stored as {meta['capture_dtype']} in {meta['shard_format']}"
    )
    if meta["tokens_per_second"]:
        print(f"  {meta['tokens_per_second']:,.0f} tokens/s, padding {share_text(meta['padding_waste'])}")
    print()
    _table([(site, statistics(b.activations for b in run.batches(site.layer, site.hook))) for site in run.sites])


def _inspect_shard(path: str) -> None:
    shard = load_shard(path)
    activations: np.ndarray = shard["activations"]
    print(f"{path}: {plural(len(shard['sample_ids']), 'sample')}, stored as {shard['dtype']}")
    print()
    _table([(Site(shard["hook"], shard["layer"], activations.shape[1]), statistics([activations]))])


def _table(rows: list[tuple[Site, SiteStatistics]]) -> None:
    """One line a site; bars are relative to the largest mean norm of the same hook point."""
    print(f"  {'hook point':<16} {'layer':>5}  {'shape':>16}  {'mean norm':>10}  {'rms':>9}")
    for site, stats in rows:
        largest = max((other.mean_norm for s, other in rows if s.hook == site.hook), default=0.0)
        shape = f"{stats.rows} x {site.width}"
        layer = "" if site.layer is None else str(site.layer)
        warning = f"  {stats.not_finite} rows are not finite" if stats.not_finite else ""
        print(
            f"  {site.hook:<16} {layer:>5}  {shape:>16}  {stats.mean_norm:>10.4g}  {stats.rms:>9.4g}  "
            f"{_bar(stats.mean_norm / largest if largest else 0.0)}{warning}"
        )


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
