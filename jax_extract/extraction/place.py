"""Where a run goes: the storage whose records decide, and a local directory before it where uploads are wanted.

In: `ExtractConfig`. Out: a `Place`, checked as far as it can be without a run. On several hosts a local
directory must be the same one for all of them, which is tried, not believed.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jax_extract.config import ExtractConfig, to_yaml
from jax_extract.devices.processes import Processes
from jax_extract.errors import UserError, damage_is_told
from jax_extract.extraction.pending import Committed, parse_committed, read_committed
from jax_extract.inputs.wrapping import Kept
from jax_extract.store.ledger import COMMITS, CONFIG_FILE, RUN_FILE, UPLOADED, Ledger, RunStartedMeanwhile, part_name
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.opening import open_storage
from jax_extract.store.storage.verbs import Storage
from jax_extract.store.upload import Uploader, open_copy

_VISIBLE_SECONDS = 15  # network file systems show a new file late


@dataclass(frozen=True)
class Place:
    """Attributes:
    storage: holds the records that decide what is committed.
    spool: the local directory in which parts are made before they are uploaded to `storage`, or None.
    delete_local: whether shards in the spool go when `storage` has them.
    """

    storage: Storage
    spool: Storage | None = None
    delete_local: bool = False

    @classmethod
    def of(cls, config: ExtractConfig) -> Place:
        local = open_storage(config.activations_dir, "--activations_dir")
        if not config.upload_to_cloud:
            return cls(local)
        assert config.gcs_bucket is not None
        return cls(open_storage(config.gcs_bucket, "--gcs_bucket"), local, config.delete_local)

    @property
    def written_to(self) -> Storage:
        """Where shards are written first, and which must have room for them."""
        return self.spool or self.storage

    def require_usable(self) -> None:
        self.written_to.require_usable()
        self.storage.require_usable()

    def require_shared(self, processes: Processes) -> None:
        """UserError where several hosts would keep their records in different directories."""
        if processes.count == 1 or not isinstance(self.storage, Directory):
            return

        def show() -> str:
            self.storage.make("_run")
            name = f"_run/shared-{uuid.uuid4().hex}"
            self.storage.write(name, b"")
            return name

        name = processes.of_first(show)
        try:
            with processes.together():
                until = time.monotonic() + _VISIBLE_SECONDS
                while not self.storage.exists(name):
                    if time.monotonic() > until:
                        raise UserError(
                            f"{self.storage} is not the same directory on every host; write to a bucket "
                            "(--activations_dir gs://bucket/prefix), or to a file system that all hosts share"
                        )
                    time.sleep(0.2)
        finally:
            if processes.is_first:
                self.storage.delete(name)

    def find(self, processes: Processes) -> Ledger | None:
        """The run that is there; where nothing was uploaded yet, the one in the spool of the first process."""

        def run_of(storage: Storage | None) -> Any:
            return Ledger.open(storage).run if storage is not None and storage.exists(RUN_FILE) else None

        if run := processes.of_first(lambda: run_of(self.storage)):
            return Ledger(self.storage, run)
        run = processes.of_first(lambda: run_of(self.spool))
        return Ledger(self.written_to, run) if run else None

    def committed(self, processes: Processes, found: Ledger | None) -> Committed:
        """What is committed in either place, as the first process sees it; nothing is changed."""

        def read() -> list[list[Any]]:
            parts = read_committed(found) if found else []
            if found and self.spool is not None and found.storage is self.storage and self.spool.exists(RUN_FILE):
                there = {tuple(part[:2]) for part in parts}
                local = Ledger.open(self.spool)
                open_copy(local, found)
                left = [part for part in read_committed(local) if tuple(part[:2]) not in there]
                noted = set(local.names(UPLOADED))  # uploaded and deleted here, and lost there since
                parts += [part for part in left if f"{part_name((part[0], part[1]))}.json" not in noted]
            return parts

        return parse_committed(processes.of_first(read))

    def bring_over(self) -> None:
        """Uploads what an earlier command committed in the spool and could not upload any more."""
        if self.spool is None or not self.spool.exists(RUN_FILE):
            return
        source = Ledger.open(self.spool)
        target = open_copy(source, copy_run(source, self.storage))
        there = target.committed()
        left = {key: record for key, record in source.committed().items() if key not in there}
        for key, record in list(left.items()):
            if to := record.get("uploaded_to"):
                del left[key]
                if to != str(self.storage):
                    raise UserError(f"part {part_name(key)} of {self.spool} was uploaded to {to}; go on there")
                # Its shards were deleted here, and the bucket has lost them since: it is computed again.
                self.spool.delete(f"{COMMITS}/{part_name(key)}.json")
        source.drop_stale_notes()
        if left or self.delete_local:
            uploader = Uploader(source, target, uuid.uuid4().hex[:12], self.delete_local)
            for record in left.values():
                uploader.submit(record)
            uploader.close()

    def open_spool(self, ledger: Ledger, config: ExtractConfig) -> Ledger | None:
        """The spool's own ledger of the run, started where there is none yet."""
        if self.spool is None:
            return None
        spool = copy_run(ledger, self.spool)
        open_copy(spool, ledger)
        keep_config(self.spool, config)
        return spool


def keep_config(storage: Storage, config: ExtractConfig) -> None:
    """Writes the resolved configuration beside a run, without which process this is; fed back, it resumes."""
    storage.make("_run")
    neutral = {"overwrite": False, "worker_id": None, "num_workers": None, "process_id": None}
    neutral |= {"num_processes": None, "coordinator_address": None}
    storage.replace(CONFIG_FILE, to_yaml(dataclasses.replace(config, **neutral)).encode())


def kept_by(found: Ledger | None, processes: Processes) -> Kept:
    """What the run that is there keeps from its start; of a new one, what the first process says."""
    if found is None:
        return Kept.of_json(processes.of_first(lambda: Kept.from_now_on().as_json()))
    said = found.run["description"].get("kept")
    begun = processes.of_first(lambda: local_time(found.storage.written_at(RUN_FILE))) if said is None else None
    with processes.together(), damage_is_told(found.storage.where(RUN_FILE), "restore it from a copy of the run"):
        return Kept.of_json(said, begun and datetime.fromisoformat(begun))


def local_time(moment: datetime | None) -> str | None:
    """As a clock on this machine's wall shows it, without a zone."""
    return moment and moment.astimezone().replace(tzinfo=None).isoformat()


def copy_run(source: Ledger, storage: Storage) -> Ledger:
    """The same run in another place, started there unless it is."""
    if storage.exists(RUN_FILE):
        return Ledger.open(storage)
    try:
        return Ledger.start(storage, source.run)
    except RunStartedMeanwhile:
        return Ledger.open(storage)
