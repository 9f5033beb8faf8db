"""`jax-extract inspect`: what is in a run, or in one shard, as a person reads it.

In: a run or one shard, in a directory or a bucket. Out: text: what was extracted, and per site the shape, the mean
norm of a row and the root mean square of a value, with a bar to see how the norm grows with depth; of a shard also
whether it is as the run beside it has committed it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.file_part import FilePart
from jax_extract.store.formats import SUFFIXES, open_shard, read_shard
from jax_extract.store.ledger import COMMITS, RUN_FILE, Ledger
from jax_extract.store.parts import ShardName, Site
from jax_extract.store.reader import Run, open_activations
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import BUCKET_SCHEME, crc32c
from jax_extract.terminal import bytes_text, plural, ranges_text, share_text
from jax_extract.upkeep.status import Place

_BAR = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_CHUNK_ROWS = 65_536
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class InspectConfig:
    """Summarise a run, or one shard: shape, mean norm of a row, root mean square of a value.

    Exit code 1 when a shard is not what the run beside it has committed, else 0.

    Attributes:
      place: run directory or gs://bucket/prefix, or one shard file in either.
    """

    place: Place


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


def inspect(config: InspectConfig) -> int:
    """Prints the summary of a run or of one shard; 1 where a shard is not as its run committed it, else 0.

    Raises:
      UserError: the place holds neither, or what it holds is damaged.
    """
    place = config.place
    if place.startswith(BUCKET_SCHEME):
        is_shard = PurePosixPath(place).suffix.removeprefix(".") in SUFFIXES.values()
    else:
        is_shard = Path(place).is_file()
        if not is_shard and not Path(place).is_dir():
            raise UserError(f"{place!r} is neither a run directory nor a shard; give what --activations_dir named")
    if is_shard:
        return _inspect_shard(place)
    _inspect_run(open_activations(place), place)
    return 0


def _inspect_run(run: Run, path: str) -> None:
    meta = run.metadata
    print(f"{path}: {meta['model_name']}, {meta['model_type']}, {meta['num_hidden_layers']} layers")
    print(
        f"  {plural(meta['total_samples'], 'sample')}, {plural(meta['total_tokens'], 'token')}, "
        f"{plural(meta['total_rows'], 'row')} a site (positions {meta['positions']}), {bytes_text(meta['total_bytes'])}"
        + (", prompts with their answers" if meta.get("answers") else "")
    )
    everywhere = sorted({site.hook for site in run.sites if site.layer is None}, key=run.hook_points.index)
    layered = [hook for hook in run.hook_points if hook not in everywhere]
    captured = [f"{', '.join(layered)} at layers {ranges_text(run.layers)}"] if layered else []
    print(
        f"  {'; '.join(captured + everywhere)}; "
        f"computed in {meta['numerics']['dtype']}, stored as {meta['capture_dtype']} in {meta['shard_format']}"
    )
    for place, parts in Counter(str(part.storage) for part in run.parts if isinstance(part, FilePart)).items():
        if place.startswith(BUCKET_SCHEME) and not path.startswith(BUCKET_SCHEME):
            print(f"  {plural(parts, 'part')} uploaded and deleted here; read from {place}")
    if meta["tokens_per_second"]:
        idle = f", idle devices {share_text(meta['idle_devices'])}" if meta["idle_devices"] else ""
        padding = share_text(meta["padding_waste"])
        print(f"  {meta['tokens_per_second']:,.0f} tokens/s, padding within rows {padding}{idle}")
    print()
    _table([(site, statistics(b.activations for b in run.batches(site.layer, site.hook))) for site in run.sites])


def _inspect_shard(path: str) -> int:
    with open_shard(path) as file:
        shard = read_shard(file, path)
        as_committed, said = _as_committed(path, file)
    activations: np.ndarray = shard["activations"]
    print(f"{path}: {plural(len(shard['sample_ids']), 'sample')}, stored as {shard['dtype']}")
    print(f"  {said}\n")
    _table([(Site(shard["hook"], shard["layer"], activations.shape[1]), statistics([activations]))])
    return 0 if as_committed else 1


def _as_committed(path: str, file: BinaryIO) -> tuple[bool, str]:
    """Whether a shard is what the run in its place has committed, and that in words; no run has nothing against it."""
    place, _, name = path.rpartition("/")
    storage = open_storage(place or ("/" if path.startswith("/") else "."))
    if not storage.exists(RUN_FILE):
        return True, "no run lies beside it, so its checksum is not known"
    ledger = Ledger.open(storage)
    entry = next((file for file in _committed_files(ledger, name) if file["path"] == name), None)
    of = f"of run {str(ledger.run['run_id'])[:12]}"
    if entry is None:
        return False, f"{of}, but no record names it: an attempt was killed, or is still writing it"
    file.seek(0)
    checksum = 0
    while chunk := file.read(_CHUNK_BYTES):
        checksum = crc32c(chunk, checksum)
    if checksum == entry["crc32c"]:
        return True, f"{of}, and matches the checksum of its record"
    return False, f"{of}, but DAMAGED: it does not match the checksum of its record; see jax-extract verify {place}"


def _committed_files(ledger: Ledger, name: str) -> list[dict[str, Any]]:
    """What the records of a shard's batch name."""
    if not (shard := ShardName.parse(name)):
        return []
    of_batch = f"{shard.batch:06d}_"
    parts = [record[len(of_batch) :] for record in ledger.names(COMMITS) if record.startswith(of_batch)]
    keys = [(shard.batch, int(part.removesuffix(".json"))) for part in parts]
    return [file for key in keys for file in ledger.record(key)["files"]]


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
