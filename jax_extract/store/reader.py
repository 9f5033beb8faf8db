"""Reads a run back, from disk, bucket or memory, lazily and in bounded memory.

In: a run directory, or parts in memory. Out: `Run`, whose samples and rows are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.documents import Documents, Piece, documents_of, pieces_of
from jax_extract.store.file_part import FilePart, Sidecars, StoredPart
from jax_extract.store.ledger import Key, Ledger, Record, part_name
from jax_extract.store.metadata import metadata_of
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.shuffled.rows import ShuffledRows, ShuffleSettings
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Storage
from jax_extract.store.upload import open_noted
from models.hooks import GATED, resolve_hook_points
from models.nearest import nearest


@dataclass(frozen=True, repr=False, eq=False)
class SampleActivations:
    """One sample of a run.

    Attributes:
      sample_id: the source's name for it.
      sample_index: its place in the input.
      token_ids: int32 [tokens], all of them, special tokens included.
      positions: int32 [rows], the token position of each stored row; -1 where a row is a mean.
      meta: the source's JSON values.
      truncated_tokens: how many tokens were cut off its end.
      pieces: the documents that it was joined from, with --context_tokens; else itself.
    """

    sample_id: str
    sample_index: int
    token_ids: np.ndarray
    positions: np.ndarray
    meta: Mapping[str, Any]
    truncated_tokens: int
    _run: Run = field(repr=False)
    _part: StoredPart = field(repr=False)
    _rows: tuple[int, int] = field(repr=False)

    def __repr__(self) -> str:
        return f"SampleActivations({self.sample_id!r}, {len(self.token_ids)} tokens, {len(self.positions)} rows)"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return pieces_of(self.sample_id, len(self.token_ids), self.meta)

    @property
    def documents(self) -> np.ndarray:
        """Strings [rows], the document of each row; empty where it is of none, as a BOS between two."""
        return self._documents[0]

    @property
    def document_positions(self) -> np.ndarray:
        """int32 [rows], which token of its document each row is; -1 where it is of none, or a mean."""
        return self._documents[1]

    @property
    def _documents(self) -> tuple[np.ndarray, np.ndarray]:
        return documents_of(self.pieces, self.positions)

    def get(self, layer: int | None = None, hook: str = "after_block") -> np.ndarray:
        """Its activations, [positions, width], in the run's stored dtype.

        Raises:
          UserError: the run does not hold that layer or hook point, or its bytes are damaged.
        """
        return self._part.rows(self._run.site(layer, hook), *self._rows)


@dataclass(frozen=True)
class ActivationBatch:
    """All rows of one part at one site.

    Attributes:
      batch, part: place in the run.
      sample_ids: samples in row order.
      row_offsets: int64 [samples + 1]: sample i has rows row_offsets[i] to row_offsets[i + 1].
      positions: int32 [rows].
      activations: [rows, width].
      sample_indices: int64 [samples], the place of each in the input.
    """

    batch: int
    part: int
    sample_ids: tuple[str, ...]
    row_offsets: np.ndarray
    positions: np.ndarray
    activations: np.ndarray
    sample_indices: np.ndarray


class Run:
    """The activations of one extraction, finished or not.

    Attributes:
      metadata: what metadata.json says.
      sites: what was captured: hook point, layer, width.
    """

    def __init__(self, metadata: Mapping[str, Any], sites: Sequence[Site], parts: Sequence[StoredPart]) -> None:
        self.metadata = metadata
        self.sites = tuple(sites)
        self._parts = parts

    def __repr__(self) -> str:
        return (
            f"Run({self.metadata.get('model_name')!r}, {self.metadata.get('total_samples')} samples, "
            f"layers {self.layers}, {', '.join(self.hook_points)})"
        )

    def __len__(self) -> int:
        return len(self._places)

    @property
    def layers(self) -> list[int]:
        return sorted({site.layer for site in self.sites if site.layer is not None})

    @property
    def hook_points(self) -> list[str]:
        return list(dict.fromkeys(site.hook for site in self.sites))

    @property
    def sample_ids(self) -> list[str]:
        """In the order of the input."""
        return list(self._places)

    def site(self, layer: int | None, hook: str = "after_block") -> Site:
        """The site of a hook point, by name or TransformerLens name, at a layer; UserError where it was not captured.

        The layer can be left out where the hook point has none, or where only one was captured.
        """
        (hook, named), *others = resolve_hook_points([hook], self.metadata.get("model_hook_points", GATED)).items()
        if others:
            raise UserError(f"{hook!r} and {others[0][0]!r} are both meant; name one hook point")
        layer = next(iter(named)) if named else layer
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

    def sample(self, sample_id: str) -> SampleActivations:
        """One sample by its id; UserError (with an id that is near) where the run does not hold it."""
        if not isinstance(sample_id, str):
            raise UserError(f"sample ids are strings, {sample_id!r} is none; by place: run.sample_ids[{sample_id!r}]")
        if sample_id not in self._places:
            near = nearest(sample_id, list(self._places)[:10_000])
            meant = f"; the nearest is {near!r}" if near else ""
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
            _run=self,
            _part=part,
            _rows=(int(content.row_offsets[place]), int(content.row_offsets[place + 1])),
        )

    def samples(self) -> Iterator[SampleActivations]:
        """All samples in the order of the input."""
        return map(self.sample, self._places)

    def batches(self, layer: int | None = None, hook: str = "after_block") -> Iterator[ActivationBatch]:
        """Every row of a site, a part at a time, in storage order; one part is in memory at once."""
        site = self.site(layer, hook)
        for part in self._parts:
            content = part.content
            yield ActivationBatch(
                content.batch,
                content.part,
                content.sample_ids,
                content.row_offsets,
                np.concatenate(content.positions) if content.positions else np.zeros(0, np.int32),
                part.rows(site, 0, content.rows),
                content.sample_indices,
            )

    def shuffled(
        self,
        layers: int | Iterable[int] | None = None,
        hook: str = "after_block",
        rows: int = 4096,
        seed: int = 0,
        *,
        epochs: int | None = None,
        drop_remainder: bool = True,
        shard: tuple[int, int] = (0, 1),
        buffer_bytes: int = 1 << 30,
        read_bytes: int = 8 << 20,
    ) -> ShuffledRows:
        """Batches of rows from all over the run, in random order, for training; docs/training_data.md.

        Args:
          layers: one layer for batches [rows, width]; several for [rows, layers, width].
          hook: hook point.
          rows: of a batch.
          seed: equal seeds give equal orders; every epoch has another.
          epochs: how many times through the run; without end where left out.
          drop_remainder: leave out what is too little for a batch at the end of an epoch.
          shard: (index, count): of `count` readers each gets its own rows, together all.
          buffer_bytes: memory to shuffle in; the more, the nearer to uniform.
          read_bytes: how much of a layer is read at once, about.
        """
        several = isinstance(layers, Iterable)
        sites = tuple(self.site(layer, hook) for layer in (layers if several else (layers,)))
        settings = ShuffleSettings(sites, several, rows, seed, epochs, drop_remainder, shard, buffer_bytes, read_bytes)
        return ShuffledRows(self._parts, settings)

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

    @property
    def parts(self) -> Sequence[StoredPart]:
        """In storage order."""
        return self._parts

    @cached_property
    def _documents(self) -> Documents:
        return Documents.of_parts(part.content for part in self._parts)

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Sample id -> (part number, place in it), in the order of the input."""
        found = [
            (int(index), sample_id, number, place)
            for number, part in enumerate(self._parts)
            for place, (index, sample_id) in enumerate(_names(part.content))
        ]
        return {sample_id: (number, place) for _, sample_id, number, place in sorted(found)}


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
