"""`jax-extract inspect`: what is in a run, or in one shard, as a person reads it.

In: a run or one shard, in a directory or a bucket. Out: text, at most 100 columns wide: what was extracted, and a line
a site: how the norms of its rows are distributed, the root mean square of a value and how much is the first tokens',
with a bar, where there is room, to see how the norm grows with depth; of a shard also whether it is as the run beside
it has committed it.
"""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
from jax_extract.upkeep.quantiles import Quantiles
from jax_extract.upkeep.status import Place
from models.positions import Positions

_WIDEST, _NARROWEST = 100, 40  # columns of what is printed, as far as words can be put on another line
_BAR, _SHORTEST_BAR = 30, 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SMALLEST, _THOUSAND, _LARGEST = 1e-3, 1e3, 1e7  # numbers between the first and the last are written out
_CHUNK_ROWS = 65_536
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class InspectConfig:
    """Summarise a run, or one shard: norms of rows, root mean square of a value, share of the first tokens.

    Exit code 1 when a shard is not what the run beside it has committed, else 0.

    Attributes:
      place: run directory or gs://bucket/prefix, or one shard file in either.
    """

    place: Place


@dataclass
class SiteStatistics:
    """Running sums over rows, in float64; rows that are not finite are counted and left out of all else."""

    rows: int = 0
    values: int = 0
    norm_sum: float = 0.0
    squares: float = 0.0
    squares_of_first: float = 0.0
    not_finite: int = 0
    norms: Quantiles = field(default_factory=Quantiles)

    def add(self, rows: np.ndarray, positions: np.ndarray | None = None) -> None:
        """rows [n, width], any float dtype; their token positions [n], where they are known."""
        squares = np.square(rows.astype(np.float64)).sum(axis=1)
        finite = np.isfinite(squares)
        norms = np.sqrt(squares[finite])
        self.not_finite += int((~finite).sum())
        self.rows += len(rows)
        self.values += int(finite.sum()) * rows.shape[1]
        self.norm_sum += float(norms.sum())
        self.norms.add(norms)
        self.squares += float(squares[finite].sum())
        if positions is not None:
            self.squares_of_first += float(squares[finite & (positions == 0)].sum())

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        finite = self.rows - self.not_finite
        return self.norm_sum / finite if finite else 0.0

    @property
    def rms(self) -> float:
        """Root mean square of a value."""
        return float(np.sqrt(self.squares / self.values)) if self.values else 0.0

    @property
    def first_share(self) -> float:
        """How much of the sum of squared norms is that of first tokens."""
        return self.squares_of_first / self.squares if self.squares else 0.0


def statistics(blocks: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> SiteStatistics:
    """Over rows [n, width] with their token positions [n], a block at a time, in bounded memory."""
    result = SiteStatistics()
    for rows, positions in blocks:
        for start in range(0, len(rows), _CHUNK_ROWS):
            some = slice(start, start + _CHUNK_ROWS)
            result.add(rows[some], None if positions is None else positions[some])
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
    _title(path, f"{meta['model_name']}, {meta['model_type']}, {meta['num_hidden_layers']} layers")
    _say(
        f"  {plural(meta['total_samples'], 'sample')}, {plural(meta['total_tokens'], 'token')}, "
        f"{plural(meta['total_rows'], 'row')} a site (positions {meta['positions']}), {bytes_text(meta['total_bytes'])}"
        + (", prompts with their answers" if meta.get("answers") else "")
    )
    everywhere = sorted({site.hook for site in run.sites if site.layer is None}, key=run.hook_points.index)
    layered = [hook for hook in run.hook_points if hook not in everywhere]
    captured = [f"{', '.join(layered)} at layers {ranges_text(run.layers)}"] if layered else []
    _say(
        f"  {'; '.join(captured + everywhere)}; "
        f"computed in {meta['numerics']['dtype']}, stored as {meta['capture_dtype']} in {meta['shard_format']}"
    )
    for place, parts in Counter(str(part.storage) for part in run.parts if isinstance(part, FilePart)).items():
        if place.startswith(BUCKET_SCHEME) and not path.startswith(BUCKET_SCHEME):
            _say(f"  {plural(parts, 'part')} uploaded and deleted here; read from {place}")
    if meta["tokens_per_second"]:
        idle = f", idle devices {share_text(meta['idle_devices'])}" if meta["idle_devices"] else ""
        padding = share_text(meta["padding_waste"])
        _say(f"  {meta['tokens_per_second']:,.0f} tokens/s, padding within rows {padding}{idle}")
    print()
    holds_first = Positions.parse(meta["positions"]).keeps_first

    def line_of(site: Site) -> _Line:
        batches = run.batches(site.layer, site.hook)
        return _Line.of(site, statistics((batch.activations, batch.positions) for batch in batches), holds_first)

    _table([line_of(site) for site in run.sites])


def _inspect_shard(path: str) -> int:
    with open_shard(path) as file:
        shard = read_shard(file, path)
        as_committed, said = _as_committed(path, file)
    activations: np.ndarray = shard["activations"]
    samples, rows = plural(len(shard["sample_ids"]), "sample"), plural(len(activations), "row")
    _title(path, f"{samples}, {rows}, stored as {shard['dtype']}")
    _say(f"  {said}")
    print()
    site = Site(shard["hook"], shard["layer"], activations.shape[1])
    _table([_Line.of(site, statistics([(activations, None)]), holds_first=False)])  # a shard does not say positions
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


_HEADINGS = ("hook point", "layer", "width", "mean", "median", "p1", "p99", "rms", "token")
_NORMS = slice(3, 7)  # of the headings


@dataclass(frozen=True)
class _Line:
    """What is told of a site, without what it was counted from.

    Attributes:
      cells: under the headings; without the last one where no first tokens are held.
      median: norm.
      warning: empty where there is none.
    """

    hook: str
    cells: tuple[str, ...]
    median: float
    warning: str

    @classmethod
    def of(cls, site: Site, found: SiteStatistics, holds_first: bool) -> _Line:
        median, low, high = found.norms.at([0.5, 0.01, 0.99])
        layer = "" if site.layer is None else str(site.layer)
        numbers = map(_number, (found.mean_norm, median, low, high, found.rms))
        share = (share_text(found.first_share),) if holds_first else ()
        warning = ""
        if found.not_finite:
            are, at = "is" if found.not_finite == 1 else "are", f" at layer {layer}" if layer else ""
            warning = f"{plural(found.not_finite, 'row')} of {site.hook}{at} {are} not finite, and left out"
        return cls(site.hook, (site.hook, layer, str(site.width), *numbers, *share), median, warning)


def _table(lines: Sequence[_Line]) -> None:
    """One line a site; bars are relative to the largest median norm of the same hook point."""
    headings = _HEADINGS[: len(lines[0].cells)]
    widths = [max(map(len, column)) for column in zip(headings, *(line.cells for line in lines), strict=True)]
    widths[_NORMS] = [max(widths[_NORMS])] * len(widths[_NORMS])
    bar = min(_BAR, _columns() - _across(widths) - 4)
    over = [" " * _across(widths[: _NORMS.start]), f"{'norm of a row':^{_across(widths[_NORMS])}}"]
    if len(headings) == len(_HEADINGS):
        over.append(f"{'first':>{_across(widths[_NORMS.stop :])}}")
    print(f"  {'  '.join(over)}".rstrip())
    print(f"  {_aligned(headings, widths)}")
    for line in lines:
        largest = max(other.median for other in lines if other.hook == line.hook)
        share = line.median / largest if largest and bar >= _SHORTEST_BAR else 0.0
        print(f"  {_aligned(line.cells, widths)}  {_bar(share, bar)}".rstrip())
    for line in lines:
        if line.warning:
            _say(f"  {line.warning}")


def _across(widths: Sequence[int]) -> int:
    """Of several columns, with what is between them."""
    return sum(widths) + 2 * (len(widths) - 1)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first to the left, numbers to the right."""
    numbers = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([f"{cells[0]:<{widths[0]}}", *numbers])


def _number(value: float) -> str:
    """Four digits or more: `5.310`, `127.5`, `23,946`."""
    if value and not _SMALLEST <= value < _LARGEST:
        return f"{value:.3e}"
    return f"{value:,.0f}" if value >= _THOUSAND else f"{value:#.4g}".rstrip(".")


def _bar(share: float, length: int) -> str:
    eighths = round(share * length * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _columns() -> int:
    """Of the terminal, or where this goes to a file."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns))


def _title(path: str, text: str) -> None:
    """A path is never cut: where it leaves no room for the text, that goes below it."""
    if len(path) + len(": ") + len(text) <= _columns():
        print(f"{path}: {text}")
    else:
        print(f"{path}:")
        _say(f"  {text}")


def _say(text: str) -> None:
    """A line, or several where it is too wide, cut between words."""
    indent = text[: len(text) - len(text.lstrip())]
    wrapped = textwrap.wrap(
        text, _columns(), subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False
    )
    print("\n".join(wrapped))
