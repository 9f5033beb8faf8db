"""A run in memory, written as the run directory that the command would have written.

In: parts in memory, and what run.json and the plan say of them. Out: shards, sidecars, records and metadata, by the
ordinary writer and ledger.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.store.file_part import StoredPart
from jax_extract.store.formats import SUFFIXES
from jax_extract.store.ledger import RUN_FILE, Ledger, RunStartedMeanwhile
from jax_extract.store.metadata import write_metadata
from jax_extract.store.parts import Site
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.writer import PartWriter, RowPiece


@dataclass(frozen=True)
class Provenance:
    """What a run in memory knows of itself beside its rows.

    Attributes:
      describe: gives run.json; called when a run is saved, because it takes a checksum of the weights.
      plans: of its windows, as the ledger keeps them.
      session: what was done to compute it.
    """

    describe: Callable[[], Mapping[str, Any]]
    plans: Sequence[Mapping[str, Any]]
    session: Mapping[str, Any]


def save(
    provenance: Provenance, sites: Sequence[Site], parts: Sequence[StoredPart], place: str | Path, shard_format: str
) -> None:
    """See `Run.save`."""
    if shard_format not in SUFFIXES:
        raise UserError(f"shard_format {shard_format!r} is not known; give one of {', '.join(SUFFIXES)}")
    storage = open_storage(place, "the place to save to")
    taken = f"{storage} holds a run already; give another folder"
    if storage.exists(RUN_FILE):
        raise UserError(taken)
    storage.require_usable()
    run = provenance.describe()
    run = {**run, "identity": {**run["identity"], "shard_format": shard_format}}
    storage.make()
    try:
        ledger = Ledger.start(storage, run)
    except RunStartedMeanwhile:
        raise UserError(taken) from None
    for number, plan in enumerate(provenance.plans):
        ledger.keep_plan(number, plan)
    attempt = uuid.uuid4().hex[:12]
    writer = PartWriter(ledger, sites, shard_format, run["identity"]["capture_dtype"], attempt)
    with contextlib.ExitStack() as undo:
        undo.callback(writer.cancel)
        for part in parts:
            content = part.content
            opened = writer.begin(content)
            blocks = {site.key: part.rows(site, 0, content.rows)[None] for site in sites}
            opened.append(blocks, [RowPiece(0, 0, content.rows)], lambda: None)
            opened.commit()
        undo.pop_all()
        writer.close()
    ledger.end_session(attempt, provenance.session)
    write_metadata(ledger)
