"""What a run will write, from its plan: rows, shards, files and bytes.

In: parts, sites, a stored dtype and a format. Out: an `Output`. The bytes of shards are exact; those of records and
plans are of what is made here to be measured, or of the usual size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jax_extract.extraction.loop import part_content
from jax_extract.extraction.model_fields import model_fields
from jax_extract.extraction.pending import plan_json
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.planning.windows import Part, Window
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.store.formats import SUFFIXES, ShardHeader, shard_bytes
from jax_extract.store.ledger import PLAN, Ledger, to_json
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.row_sums import FEWEST_ROWS, RowSums
from jax_extract.store.sidecar import BLOCK_BYTES, Sidecar, StoredArray
from models.positions import Positions

# Of files whose content is not known before the run, in bytes; together far less than their shards.
_RECORD, _RECORD_A_FILE = 420, 140
_RUN_FILES = ("run.json", "config.yaml", "metadata.json")
_RUN_FILE, _METADATA_A_SHARD, _SESSION = 2_700, 50, 700


@dataclass(frozen=True)
class Output:
    """What is still to be written.

    Attributes:
      rows: of one site.
      parts: units of work.
      row_bytes: of the rows alone, over all sites.
      site_bytes: of the shards, with their heads, in file order.
      shards, largest_shard: how many, and bytes of the largest.
      other_files: sidecars, commit records, plans and the like.
      file_bytes: of all files.
    """

    samples: int
    tokens: int
    rows: int
    parts: int
    row_bytes: int
    site_bytes: Mapping[Site, int]
    shards: int
    largest_shard: int
    other_files: int
    file_bytes: int

    @property
    def shard_bytes(self) -> int:
        """Of all shards."""
        return sum(self.site_bytes.values())

    @property
    def objects(self) -> int:
        return self.shards + self.other_files

    def times(self, factor: float) -> Output:
        """So many times as much, in shards of the same size."""
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        counts |= {name: round(value * factor) for name, value in counts.items() if isinstance(value, int)}
        site_bytes = {site: round(value * factor) for site, value in self.site_bytes.items()}
        return Output(**{**counts, "site_bytes": site_bytes, "largest_shard": self.largest_shard})


def output_of(
    parts: Iterable[Part], sites: Sequence[Site], positions: Positions, dtype: str, shard_format: str
) -> Output:
    """Shards, sidecars and records of these parts. Everything but the rows is made to be measured; rows are counted."""
    values = 4 if dtype == "float32" else 2
    counted = {"samples": 0, "tokens": 0, "rows": 0, "parts": 0, "largest_shard": 0, "file_bytes": 0}
    site_bytes = dict.fromkeys(sites, 0)
    for part in parts:
        content = part_content(part, positions)
        shards = {site: shard_bytes(shard_format, _header(content, site, dtype)) for site in sites}
        records = _sidecar_bytes(content, sites, values, shard_format) + _RECORD + _RECORD_A_FILE * (len(sites) + 1)
        counted["samples"] += len(content.sample_ids)
        counted["tokens"] += content.tokens
        counted["rows"] += content.rows
        counted["parts"] += 1
        counted["largest_shard"] = max(counted["largest_shard"], *shards.values())
        counted["file_bytes"] += sum(shards.values()) + records
        for site in sites:
            site_bytes[site] += shards[site]
    return Output(
        **counted,
        row_bytes=counted["rows"] * sum(site.width for site in sites) * values,
        site_bytes=site_bytes,
        shards=counted["parts"] * len(sites),
        other_files=2 * counted["parts"],
    )


def _header(content: PartContent, site: Site, dtype: str) -> ShardHeader:
    return ShardHeader(content.rows, site.width, dtype, site.hook, site.layer, content.sample_ids, content.row_offsets)


def _sidecar_bytes(content: PartContent, sites: Sequence[Site], values: int, shard_format: str) -> int:
    def stored(site: Site) -> StoredArray:
        name = site.shard_name(content.batch, content.part, content.parts_in_batch, SUFFIXES[shard_format])
        blocks = (0,) * -(-content.rows * site.width * values // BLOCK_BYTES)
        sums = RowSums.none(site.width) if content.rows >= FEWEST_ROWS else None
        return StoredArray(site, name, 1_000, blocks, sums)

    return len(Sidecar(content, tuple(map(stored, sites))).to_bytes())


def with_plans(output: Output, windows: Iterable[Window], counts: InputCounts, found: Ledger | None) -> Output:
    """Adds the plans that are not stored yet."""
    stored = set(found.names(PLAN)) if found else set()
    new = [window for window in windows if f"{window.number:06d}.json" not in stored]
    sizes = [len(to_json(plan_json(window, counts.as_json()))) for window in new]
    return _with(output, len(sizes), sum(sizes))


def with_run_files(output: Output, job: Job, sessions: int, is_new: bool) -> Output:
    """Adds what a session writes, and what a new run has once."""
    size = sessions * _SESSION + output.shards * _METADATA_A_SHARD
    if not is_new:
        return _with(output, sessions, size)
    fields = 2 * len(to_json(model_fields(job.model, job.max_length)))  # in metadata.json too
    return _with(output, len(_RUN_FILES) + sessions, size + len(_RUN_FILES) * _RUN_FILE + fields)


def _with(output: Output, files: int, size: int) -> Output:
    return dataclasses.replace(output, other_files=output.other_files + files, file_bytes=output.file_bytes + size)
