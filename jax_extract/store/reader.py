"""Reads a run back, from disk, bucket or memory, lazily and in bounded memory.

In: a run directory, or parts in memory. Out: `Run`, whose samples and rows are read when they are asked for.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.budget import machine_bytes
from jax_extract.store.documents import Documents
from jax_extract.store.file_part import FilePart, Sidecars, StoredPart
from jax_extract.store.ledger import Key, Ledger, Record, part_name
from jax_extract.store.metadata import metadata_of
from jax_extract.store.parts import PartContent, Site, offsets
from jax_extract.store.row_sums import RowStatistics, RowSums, SummedRows
from jax_extract.store.rows_in_memory import RowsInMemory
from jax_extract.store.sample import DEFAULT_HOOK_POINT, ActivationBatch, RunRows, SampleActivations, asked
from jax_extract.store.saving import Provenance, save
from jax_extract.store.shuffled.rows import ShuffledRows, ShuffleSettings
from jax_extract.store.shuffled.rows_wanted import PositionFilter, RowsWanted, SampleFilter
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Storage
from jax_extract.store.torch_tensors import require_torch, tensor_of
from jax_extract.store.upload import open_noted
from models.hooks import GATED, is_hook_point, resolve_hook_points
from models.nearest import nearest

_READ_VALUES = 1 << 22  # of a part whose rows are summed


class Run:
    """The activations of one extraction, finished or not.

    Attributes:
      metadata: what metadata.json says.
      sites: what was captured: hook point, layer, width.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        sites: Sequence[Site],
        parts: Sequence[StoredPart],
        provenance: Provenance | None = None,
    ) -> None:
        """`provenance`: of a run in memory, what is needed to save it."""
        self.metadata = metadata
        self.sites = tuple(sites)
        self._parts = parts
        self._provenance = provenance
        self._statistics: dict[tuple[str, int | None], RowStatistics] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_provenance": None}  # it holds the open model, which other processes cannot have

    def __repr__(self) -> str:
        samples = self.metadata.get("total_samples")  # to count them would take reading every sidecar
        layers = f", layers {_layers_text(self.layers)}" if self.layers else ""
        return f"Run({self.metadata.get('model_name')!r}, {samples} samples, {', '.join(self.hook_points)}{layers})"

    def __len__(self) -> int:
        """How many samples."""
        return len(self._places)

    def __iter__(self) -> Iterator[SampleActivations]:
        return self.samples()

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._places

    @overload
    def __getitem__(self, which: int | str) -> SampleActivations: ...

    @overload
    def __getitem__(self, which: slice) -> list[SampleActivations]: ...

    def __getitem__(self, which: int | str | slice) -> SampleActivations | list[SampleActivations]:
        """`run[0]` and `run[-1]` by place in the order of the input, `run["id"]` by id, `run[2:5]` a list."""
        if isinstance(which, str):
            return self.sample(which)
        if isinstance(which, slice):
            return [self.sample(sample_id) for sample_id in self._ids[which]]
        try:
            place = operator.index(which)
        except TypeError:
            raise UserError(f"{which!r} is no sample; give run[0], run['its id'] or run[0:10]") from None
        try:
            return self.sample(self._ids[place])
        except IndexError:  # also what ends a loop over places
            raise IndexError(f"run[{place}]: this run holds {len(self)} samples") from None

    @property
    def layers(self) -> list[int]:
        return sorted({site.layer for site in self.sites if site.layer is not None})

    @property
    def hook_points(self) -> list[str]:
        return list(dict.fromkeys(site.hook for site in self.sites))

    @property
    def sample_ids(self) -> list[str]:
        """In the order of the input."""
        return list(self._ids)

    def site(self, layer: int | None, hook: str = DEFAULT_HOOK_POINT) -> Site:
        """The site of a hook point, by name or TransformerLens name, at a layer; UserError where it was not captured.

        The layer can be left out where the hook point has none, or where only one was captured.
        """
        hook, named = self.hook_point(hook)
        if named and layer not in (None, *named):
            raise UserError(f"a hook point of layer {next(iter(named))} is named, and layer={layer}; give one of both")
        layer = next(iter(named)) if named else self._from_start(layer)
        found = [site for site in self.sites if site.hook == hook]
        if not found:
            raise UserError(f"this run holds no {hook!r}; it holds: {', '.join(self.hook_points)}")
        for site in found:
            if site.layer in (layer, None) or (layer is None and len(found) == 1):
                return site
        layers = [site.layer for site in found]
        if layer is None:
            raise UserError(f"say which layer of {hook!r}, as in get(layer={layers[0]}); this run holds {layers}")
        raise UserError(f"this run holds no layer {layer} of {hook!r}; it holds the layers {layers}")

    def hook_point(self, name: str) -> tuple[str, Set[int] | None]:
        """What a name means, TransformerLens' or ours, and the layers that it says; UserError where that is several."""
        (hook, named), *others = resolve_hook_points([name], self.metadata.get("model_hook_points", GATED)).items()
        if others:
            raise UserError(f"{hook!r} and {others[0][0]!r} are both meant; name one hook point")
        return hook, named

    def _from_start(self, layer: int | None) -> int | None:
        """A layer counted from 0, where it was counted from the end of the model."""
        blocks = self.metadata.get("num_hidden_layers")
        return layer + blocks if blocks and layer is not None and -blocks <= layer < 0 else layer

    def sample(self, sample_id: str) -> SampleActivations:
        """One sample by its id; UserError (with an id that is near) where the run does not hold it."""
        if not isinstance(sample_id, str):
            raise UserError(f"sample ids are strings, {sample_id!r} is none; by place: run[{sample_id!r}]")
        if sample_id not in self._places:
            near = nearest(sample_id, list(self._places)[:10_000])
            meant = f"; the nearest is {near!r}" if near else ""
            if is_hook_point(sample_id):
                meant = f"; the rows of a hook point are run.get({sample_id!r})"
            raise UserError(f"this run holds no sample {sample_id!r}{meant}")
        number, place = self._places[sample_id]
        part = self._parts[number]
        content = part.content
        return SampleActivations(
            sample_id=sample_id,
            sample_index=int(content.sample_indices[place]),
            token_ids=content.token_ids[place],
            positions=content.positions[place],
            meta=content.meta[place],
            truncated_tokens=int(content.full_lengths[place]) - len(content.token_ids[place]),
            _site=self.site,
            _part=part,
            _rows=(int(content.row_offsets[place]), int(content.row_offsets[place + 1])),
        )

    def samples(self) -> Iterator[SampleActivations]:
        """All samples in the order of the input."""
        return map(self.sample, self._ids)

    def get(
        self,
        where: int | str | None = None,
        /,
        hook: str | None = None,
        *,
        layer: int | None = None,
        torch: bool = False,
    ) -> Any:
        """All rows of a site, [rows, width], sample after sample in the order of the input; `rows` says whose they are.

        They are in memory all at once, rows x width x 4 bytes (2 where 16-bit floats are stored), and one part beside
        them: `batches` and `shuffled` are for runs that are larger.

        Args:
          where, hook, layer, torch: as of `SampleActivations.get`, as in `run.get("blocks.12.hook_resid_post")`.

        Raises:
          UserError: the run does not hold that layer or hook point, its bytes are damaged, or this machine's memory is
            less than its rows.
        """
        site = self.site(*asked(where, hook, layer))
        if torch:
            require_torch("torch=True")
        order = self._order
        dtype = self._parts[0].rows(site, 0, 0).dtype if self._parts else np.dtype(np.float32)
        total = int(order.row_offsets[-1])
        if (nbytes := total * site.width * dtype.itemsize) > machine_bytes():
            raise UserError(
                f"all {total:,} rows of this site take {nbytes / 1e9:,.0f} GB, which is more than this machine's "
                "memory; read them part by part (run.batches) or in random order (run.shuffled)"
            )
        rows = np.empty((total, site.width), dtype)
        for number, part in enumerate(self._parts):
            content = part.content
            found = part.rows(site, 0, content.rows)
            for place, (start, stop) in enumerate(itertools.pairwise(content.row_offsets.tolist())):
                first = order.first_row[number, place]
                rows[first : first + stop - start] = found[start:stop]
        return tensor_of(rows) if torch else rows

    @property
    def sample_indices(self) -> np.ndarray:
        """int64 [samples], places in the input, in its order: those of `run[0]`, `run[1]`, ….  The rows are not
        read."""
        found = [part.content.sample_indices for part in self._parts]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))

    @property
    def rows(self) -> RunRows:
        """Whose the rows are that `get` gives: 20 bytes each, read from the sidecars."""
        order = self._order
        total = int(order.row_offsets[-1])
        samples, positions, tokens = np.empty(total, np.int64), np.empty(total, np.int32), np.empty(total, np.int32)
        for number, part in enumerate(self._parts):
            content = part.content
            of_rows = content.row_positions, content.row_token_ids
            for place, (start, stop) in enumerate(itertools.pairwise(content.row_offsets.tolist())):
                to = slice(first := order.first_row[number, place], first + stop - start)
                samples[to] = content.sample_indices[place]
                positions[to], tokens[to] = of_rows[0][start:stop], of_rows[1][start:stop]
        return RunRows(tuple(self._ids), order.row_offsets, samples, positions, tokens)

    def with_rows(self, rows: Mapping[Site, np.ndarray]) -> Run:
        """A run in memory of the same samples with other rows: what `Edit(…, "patch", source=run)` can put in their
        place.

        Args:
          rows: of sites, [rows, width] in the order of `get`.

        Raises:
          UserError: they have another shape.
        """
        for site, each in rows.items():
            if each.shape != (len(self.rows), site.width):
                raise UserError(
                    f"rows of {site.hook} have the shape {list(each.shape)}; expected {[len(self.rows), site.width]}"
                )
        parts = []
        for number, part in enumerate(self._parts):
            content = part.content
            order = np.zeros(content.rows, np.int64)
            for place, (start, stop) in enumerate(itertools.pairwise(content.row_offsets.tolist())):
                order[start:stop] = np.arange(stop - start) + self._order.first_row[number, place]
            parts.append(RowsInMemory(content, {site: each[order] for site, each in rows.items()}))
        return Run(self.metadata, tuple(rows), parts)

    def batches(
        self,
        where: int | str | None = None,
        /,
        hook: str | None = None,
        *,
        layer: int | None = None,
        torch: bool = False,
    ) -> Iterator[ActivationBatch]:
        """Every row of a site, a part at a time, in storage order; one part is in memory at once.

        Args:
          where, hook, layer: as of `SampleActivations.get`.
          torch: `activations` are tensors, which share the memory of the arrays; all else stays NumPy.
        """
        site = self.site(*asked(where, hook, layer))
        if torch:
            require_torch("torch=True")
        return (_batch(part, site, torch) for part in self._parts)

    def shuffled(
        self,
        layers: int | str | Iterable[int | str | Site] | None = None,
        hook: str | None = None,
        rows: int = 4096,
        seed: int = 0,
        *,
        positions: str | PositionFilter | None = None,
        without_tokens: Any = None,
        samples: SampleFilter | None = None,
        epochs: int | None = None,
        drop_remainder: bool = True,
        shard: tuple[int, int] = (0, 1),
        buffer_bytes: int = 1 << 30,
        read_bytes: int = 8 << 20,
        torch: bool = False,
    ) -> ShuffledRows:
        """Batches of rows from all over the run, in random order, for training; docs/training_data.md.

        Args:
          layers: one layer for batches [rows, width]; several for [rows, layers, width]. A name such as
            `blocks.12.hook_resid_post` says layer and hook point at once, and so does one of `run.sites`; all must be
            of one width.
          hook: hook point; `after_block` where none is named.
          rows: of a batch.
          seed: equal seeds give equal orders; every epoch has another.
          positions: only rows at these positions of their samples, spelled as `--positions` is (`from:1` leaves first
            tokens out), or a function that is given positions, int32 [rows], and says which are wanted, bool [rows].
          without_tokens: no rows of these tokens: token ids, or a tokenizer for all its special tokens. With this or
            `positions` the sidecar of every part is read at once, to know how many rows there are.
          samples: only rows of some samples: a function that is given sample indices, int64 [samples], and says which
            are wanted, bool [samples]; so that what is held out shares no sample with what is trained on.
          epochs: how many times through the run; without end where left out.
          drop_remainder: leave out what is too little for a batch at the end of an epoch.
          shard: (index, count): of `count` readers each gets its own rows, together all.
          buffer_bytes: memory to shuffle in; the more, the nearer to uniform.
          read_bytes: how much of a layer is read at once, about.
          torch: `activations` are tensors, bfloat16 included; for a `DataLoader` there is `for_torch()`.
        """
        several = None if isinstance(layers, str) or not isinstance(layers, Iterable) else [*layers]
        wanted: list[Any] = [layers] if several is None else several
        sites = tuple(
            self.site(where.layer, where.hook) if isinstance(where, Site) else self.site(*asked(where, hook, None))
            for where in wanted
        )
        settings = ShuffleSettings(
            sites,
            several is not None,
            rows,
            seed,
            epochs,
            drop_remainder,
            shard,
            buffer_bytes,
            read_bytes,
            RowsWanted.of(positions, without_tokens, samples),
        )
        return ShuffledRows(self._parts, settings, torch)

    def statistics(
        self, where: int | str | None = None, /, hook: str | None = None, *, layer: int | None = None
    ) -> RowStatistics:
        """Mean, variance and norms of all rows of a site, in float64.

        They are made from sums that were stored with the parts; the rows themselves are read, in bounded memory, where
        the run was begun before there were such, is in memory, or has parts of few rows. Either way the numbers are the
        same to the last bit, however often the run was resumed.

        Args:
          where, hook, layer: as of `SampleActivations.get`.
        """
        site = self.site(*asked(where, hook, layer))
        if site.key not in self._statistics:
            sums, rows = [], 0
            for part in self._parts:
                sums.append(_sums(part, site))
                rows += part.record["rows"] if isinstance(part, FilePart) else part.content.rows
            self._statistics[site.key] = RowStatistics.of(sums, rows, site.width)
        return self._statistics[site.key]

    def documents(self, sample_indices: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which document each row is of, and which of its tokens, as of the rows of a shuffled batch.

        Of a run without --context_tokens every sample is a document. The first call reads the sidecar of every part.

        Args:
          sample_indices: [rows], the place of each row's sample in the input.
          positions: [rows], the token position of each row in it; -1 is a mean.

        Returns:
          Strings [rows], empty where a row is of no document (a BOS between two, the mean over several); and int32
          [rows], from 0, -1 where there is none.

        Raises:
          UserError: the run holds no sample with such an index.
        """
        return self._documents.of(sample_indices, positions)

    def save(self, place: str | Path, shard_format: str = "safetensors") -> None:
        """Writes a run in memory as a run directory, which `open_activations`, `inspect` and `verify` read.

        Args:
          place: a new folder, or `gs://bucket/prefix`.
          shard_format: `pickle`, `npz`, `safetensors` or `pt`.

        Raises:
          UserError: there is a run already, there is no room, or this run is in files.
        """
        if self._provenance is None:
            raise UserError("only a run in memory is saved, in the process that made it; copy the folder of any other")
        save(self._provenance, self.sites, self._parts, place, shard_format)

    @property
    def parts(self) -> Sequence[StoredPart]:
        """In storage order."""
        return self._parts

    @cached_property
    def _documents(self) -> Documents:
        return Documents.of_parts(part.content for part in self._parts)

    @cached_property
    def _order(self) -> _Order:
        counts = {
            (number, place): int(count)
            for number, part in enumerate(self._parts)
            for place, count in enumerate(np.diff(part.content.row_offsets))
        }
        row_offsets = offsets([counts[place] for place in self._places.values()])
        return _Order(row_offsets, dict(zip(self._places.values(), row_offsets.tolist(), strict=False)))

    @cached_property
    def _ids(self) -> list[str]:
        return list(self._places)

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Sample id -> (part number, place in it), in the order of the input."""
        found = [
            (int(index), sample_id, number, place)
            for number, part in enumerate(self._parts)
            for place, (index, sample_id) in enumerate(_names(part.content))
        ]
        return {sample_id: (number, place) for _, sample_id, number, place in sorted(found)}


class _Order(NamedTuple):
    """Where the rows of each sample go, when all are in the order of the input.

    Attributes:
      row_offsets: int64 [samples + 1].
      first_row: by (part number, place in it).
    """

    row_offsets: np.ndarray
    first_row: Mapping[tuple[int, int], int]


def _sums(part: StoredPart, site: Site) -> RowSums:
    """Of a part's rows: those that it keeps, or the same made anew."""
    if isinstance(part, FilePart) and (kept := part.sums(site)) is not None:
        return kept
    rows = part.content.rows
    summed = SummedRows(site.width, part.rows(site, 0, 0).itemsize)
    at_once = max(1, _READ_VALUES // site.width)
    for start in range(0, rows, at_once):
        summed.add(part.rows(site, start, min(start + at_once, rows)))
    return summed.sums()


def _batch(part: StoredPart, site: Site, torch: bool) -> ActivationBatch:
    content = part.content
    rows = part.rows(site, 0, content.rows)
    return ActivationBatch(
        content.batch,
        content.part,
        content.sample_ids,
        content.row_offsets,
        content.row_positions,
        content.row_token_ids,
        tensor_of(rows) if torch else rows,
        content.sample_indices,
    )


def _layers_text(layers: list[int]) -> str:
    """`10-23`, or `2, 5, 7`."""
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def _names(content: PartContent) -> Iterator[tuple[int, str]]:
    return zip(content.sample_indices, content.sample_ids, strict=True)


def open_activations(path: str | Path) -> Run:
    """Opens a run; it may still be going on, and then holds what is committed so far.

    Args:
      path: a run directory, or `gs://bucket/prefix`, which is read by ranges of its objects. Parts whose shards were
        uploaded and deleted in the directory are read from their bucket.

    Raises:
      UserError: there is no run, or its records are damaged, or that bucket does not hold the same run.
    """
    ledger = Ledger.open(open_storage(path))
    with damage_is_told(f"the run in {ledger.storage}", "restore its _run folder from a copy"):
        committed = ledger.committed()
        identity = ledger.run["identity"]
        sites = [Site(str(s["hook"]), s["layer"], int(s["width"])) for s in identity["sites"]]
        parts = _parts(ledger, committed, identity["capture_dtype"])
    return Run(metadata_of(ledger, committed), sites, parts)


@dataclass(frozen=True)
class _Home:
    """A place that holds parts, with its own records, which name its files."""

    storage: Storage
    committed: Mapping[Key, Record]
    sidecars: Sidecars


def _parts(ledger: Ledger, committed: Mapping[Key, Record], dtype: str) -> list[FilePart]:
    """Each where its shards are: here, or in the bucket to which they were uploaded before they were deleted here."""
    homes: dict[str | None, _Home] = {None: _Home(ledger.storage, committed, Sidecars(ledger.storage))}
    parts = []
    here = ledger.storage.entries() if any("uploaded_to" in record for record in committed.values()) else {}
    for key, record in committed.items():
        place = record.get("uploaded_to")
        if place is not None and all(file["path"] in here for file in record["files"]):
            place = None  # not deleted here yet
        if place is not None and place not in homes:
            homes[place] = _bucket_of(ledger, place)
        home = homes[place]
        if key not in home.committed:
            raise UserError(
                f"part {part_name(key)} of {ledger.storage} was uploaded to {place}, which holds no record of it; "
                "restore the bucket from a copy, or give the command that started the run again"
            )
        parts.append(FilePart(home.storage, home.committed[key], dtype, home.sidecars))
    return parts


def _bucket_of(ledger: Ledger, place: str) -> _Home:
    """The bucket that a note beside the records names, if it holds the same run; the note may be anybody's."""
    there = open_noted(ledger, place)
    return _Home(there.storage, there.committed(), Sidecars(there.storage))
