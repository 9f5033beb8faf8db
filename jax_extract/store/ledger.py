"""The ledger of a run: what run it is, what is planned, which parts are committed.

In: the run's identity, plans, commit records. Out: `_run/run.json` and one create-only record a part. A
part without a record does not exist; everything else about a run follows from these files.

    _run/run.json               what the run is; written once
    _run/config.yaml            the options of the command that began it
    _run/plan/NNNNNN.json       the plan of a window; written once
    _run/tokens/NNNNNN.safetensors  a window's samples as token ids, until the run is whole; see token_files.py
    _run/parts/B_P*.safetensors sidecars: samples, token ids, positions, offsets and checksums of the files
    _run/commits/B_P.json       commit records, written last
    _run/uploaded/B_P.json      where a part has gone whose shards were deleted here after their upload
    _run/sessions/*.json        one for each process that came to an orderly end
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.differences import differences, input_differences
from jax_extract.store.storage.verbs import Storage

FORMAT_VERSION = 1
RUN_FILE = "_run/run.json"
CONFIG_FILE = "_run/config.yaml"
PLAN, PARTS, COMMITS, UPLOADED, SESSIONS, TOKENS = (
    "_run/plan",
    "_run/parts",
    "_run/commits",
    "_run/uploaded",
    "_run/sessions",
    "_run/tokens",
)
FOLDERS = (COMMITS, UPLOADED, SESSIONS, TOKENS, PLAN, PARTS)  # the records first: so a run is erased

Key = tuple[int, int]  # (batch, part), both counted from 1
Record = dict[str, Any]

_COUNTS = ("batch", "part", "parts_in_batch", "samples", "tokens", "rows")  # of a record
_READ_TOGETHER = 4_096  # records
_OWN_NAME = re.compile(r"\d{6,}(_\d{3,})?\.json|[0-9a-f]{12}\.json")
FOREIGN = "it belongs to another run"
_RESTORE = "restore it from a copy of the run"


class RunStartedMeanwhile(Exception):
    """Another process has just started a run in the same place: look again at what is there."""


def part_name(key: Key) -> str:
    return f"{key[0]:06d}_{key[1]:03d}"


@dataclass(frozen=True)
class Ledger:
    """An opened run.

    Attributes:
      storage: where it is.
      run: run.json: `format_version`, `run_id`, `identity` (must be equal on resume), `numerics` (the
        fingerprint) and `description` (provenance, may differ between sessions).
    """

    storage: Storage
    run: Mapping[str, Any]

    @classmethod
    def open(cls, storage: Storage) -> Ledger:
        """Opens an existing run; UserError where there is none or it is of another format version."""
        if not storage.exists(RUN_FILE):
            raise UserError(
                f"{storage} holds no run ({RUN_FILE} is missing); give the --activations_dir of an extraction"
            )
        storage.require_plain("_run")
        run = read_json(storage, RUN_FILE)
        if run.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{storage} has format version {run.get('format_version')!r} and this version reads "
                f"{FORMAT_VERSION}; use the jax_extract that wrote it"
            )
        with damage_is_told(storage.where(RUN_FILE), _RESTORE):
            for key in ("identity", "numerics", "description"):
                if not isinstance(run[key], dict):
                    raise TypeError(f"{key} is no object")
            str(run["run_id"])
        return cls(storage, run)

    @classmethod
    def start(cls, storage: Storage, run: Mapping[str, Any]) -> Ledger:
        """Writes run.json into a place that holds no run yet; a `run_id` is made unless there is one.

        Raises:
          RunStartedMeanwhile: another process was faster.
        """
        storage.make(*FOLDERS)
        if storage.entries(COMMITS) and not storage.exists(RUN_FILE):
            raise UserError(
                f"{storage} holds commit records but no {RUN_FILE}; restore that file from a copy, "
                "or choose another --activations_dir"
            )
        run = {"format_version": FORMAT_VERSION, "run_id": uuid.uuid4().hex, **run}
        try:
            storage.write(RUN_FILE, to_json(run))
        except FileExistsError:
            raise RunStartedMeanwhile from None
        return cls(storage, run)

    def require_same(
        self, identity: Mapping[str, Any], numerics: Mapping[str, Any], allow_numeric_change: bool
    ) -> None:
        """Refuses to mix runs: names everything that differs."""
        with damage_is_told(self.storage.where(RUN_FILE), _RESTORE):
            changed = differences(self.run["identity"], identity)
        if changed:
            raise UserError(
                f"{self.storage} holds another run: {changed}; go back to that, choose another folder, "
                "or start anew with --overwrite"
            )
        if (changed := differences(self.run["numerics"], numerics)) and not allow_numeric_change:
            raise UserError(
                f"resuming in {self.storage} would change the arithmetic: {changed}; go back to what it was, or "
                "accept rows that agree only within tolerance with --allow_numeric_change"
            )

    def records(self, but: Iterable[Key] = ()) -> tuple[dict[Key, Record], dict[str, str]]:
        """Commit records by (batch, part), in that order; and the damaged ones, name -> what is wrong.

        Those of the parts in `but` are not read.
        """
        records: dict[Key, Record] = {}
        damaged: dict[str, str] = {}
        for name, record in self.each_record(but):
            if isinstance(record, str):
                damaged[name] = record
            else:
                records[record["batch"], record["part"]] = record
        return dict(sorted(records.items())), damaged

    def each_record(self, but: Iterable[Key] = ()) -> Iterator[tuple[str, Record | str]]:
        """The same one after the other, by names, for those who keep little of each; or what is wrong with one."""
        uploaded = set(self.names(UPLOADED))
        known = {f"{part_name(key)}.json" for key in but}
        wanted = (f"{COMMITS}/{name}" for name in self.names(COMMITS) if name not in known)
        while some := list(itertools.islice(wanted, _READ_TOGETHER)):
            for path, data in self.storage.read_many(some).items():
                record = self._told(path, data)
                name = path.rpartition("/")[2]
                if name in uploaded and not isinstance(record, str):
                    note = f"{UPLOADED}/{name}"
                    with damage_is_told(self.storage.where(note), _RESTORE):
                        record["uploaded_to"] = str(read_json(self.storage, note)["to"])
                yield path, record

    def _told(self, path: str, data: bytes) -> Record | str:
        """A record, or what is wrong with it."""
        try:
            return self._parsed(path, data)
        except Exception:  # noqa: BLE001 (told below, by what is wrong)
            try:
                with damage_is_told(f"commit record {self.storage.where(path)}", self._mend):
                    return self._parsed(path, data)
            except UserError as error:
                return str(error)

    def _parsed(self, path: str, data: bytes) -> Record:
        record = self._checked(json.loads(data))
        if f"{COMMITS}/{part_name((record['batch'], record['part']))}.json" != path:
            raise ValueError("it is another part's")
        return record

    @property
    def _mend(self) -> str:
        return f"restore it from a copy, or give its part up with jax-extract sweep {self.storage} --damaged"

    def _checked(self, record: Record) -> Record:
        if record["run"] != self.run["run_id"]:
            raise ValueError(FOREIGN)
        if not isinstance(record["files"], list) or not record["files"]:
            raise TypeError("it names no files")
        if not isinstance(record["plan"], str):
            raise TypeError("its plan is no digest")
        counts = [record[key] for key in _COUNTS]
        for file in (record["sidecar"], *record["files"]):
            counts += (file["bytes"], file["crc32c"])
            if (generation := file.get("generation")) is not None:
                counts.append(generation)
            if not isinstance(file["path"], str):
                raise TypeError("a path is no string")
        if set(map(type, counts)) != {int} or min(counts) < 0:
            raise ValueError("a count is no whole number")
        return record

    def committed(self, but: Iterable[Key] = ()) -> dict[Key, Record]:
        """As `records`; UserError on a damaged or foreign one."""
        records, damaged = self.records(but)
        for reason in damaged.values():
            raise UserError(reason)
        return records

    def record(self, key: Key) -> Record:
        """The record of a committed part; UserError where it is damaged or of another run."""
        name = f"{COMMITS}/{part_name(key)}.json"
        with damage_is_told(f"commit record {self.storage.where(name)}", self._mend):
            return self._checked(read_json(self.storage, name))

    def is_committed(self, key: Key) -> bool:
        return self.storage.exists(f"{COMMITS}/{part_name(key)}.json")

    def commit(self, record: Mapping[str, Any]) -> bool:
        """Makes a part exist; False where another worker has committed it already."""
        if read_json(self.storage, RUN_FILE).get("run_id") != self.run["run_id"]:
            raise UserError(f"another process started {self.storage} anew; this run is over")
        record = {**record, "run": self.run["run_id"]}
        try:
            self.storage.write(f"{COMMITS}/{part_name((record['batch'], record['part']))}.json", to_json(record))
        except FileExistsError:
            return False
        return True

    def drop_stale_notes(self) -> None:
        """Removes notes of uploads whose part has no record any more: they would be taken for its next one's."""
        if stale := set(self.names(UPLOADED)) - set(self.names(COMMITS)):
            self.storage.sync(COMMITS)  # not even a power cut brings the record back without its note
            for name in sorted(stale):
                self.storage.delete(f"{UPLOADED}/{name}")
            self.storage.sync(UPLOADED)

    def holds_plan(self, number: int, digest: str, counted: Mapping[str, Any]) -> bool:
        """Whether the plan of a window is stored, by its digest and, of the last one, what was counted of the input."""
        name = f"{PLAN}/{number:06d}.json"
        if not self.storage.exists(name):
            return False
        stored = read_json(self.storage, name)
        return stored.get("digest") == digest and (not stored.get("last", True) or stored.get("input") == dict(counted))

    def keep_plan(self, number: int, plan: Mapping[str, Any]) -> None:
        """Stores a window's plan, or checks that it is the one that is stored."""
        name = f"{PLAN}/{number:06d}.json"
        try:
            self.storage.write(name, to_json(plan))
        except FileExistsError:
            stored = read_json(self.storage, name)
            if _compared(stored) != _compared(json.loads(to_json(plan))):
                source = self.run["description"].get("source")
                raise UserError(
                    f"{self.storage} holds a run over other inputs, of {source}: {input_differences(stored, plan)}; "
                    "restore the inputs, choose another --activations_dir, or start anew with --overwrite"
                ) from None

    def plans(self) -> list[dict[str, Any]]:
        """The stored plans, window by window."""
        return self._jsons(PLAN, self.names(PLAN))

    def last_plan(self) -> dict[str, Any] | None:
        """That of the last window for which there is one."""
        return next(iter(self._jsons(PLAN, self.names(PLAN)[-1:])), None)

    def end_session(self, attempt: str, session: Mapping[str, Any]) -> None:
        self.storage.write(f"{SESSIONS}/{attempt}.json", to_json(session))

    def sessions(self) -> list[dict[str, Any]]:
        return self._jsons(SESSIONS, self.names(SESSIONS))

    def names(self, folder: str) -> list[str]:
        """Our own files of a folder: file managers and copy programs leave others."""
        return [name for name in self.storage.names(folder) if _OWN_NAME.fullmatch(name)]

    def _jsons(self, folder: str, names: Iterable[str]) -> list[dict[str, Any]]:
        found = self.storage.read_many(f"{folder}/{name}" for name in names)
        return [parse_json(self.storage, name, data) for name, data in found.items()]


def read_json(storage: Storage, name: str) -> dict[str, Any]:
    """A small JSON object of a run; UserError where it is missing or damaged."""
    try:
        data = storage.read(name)
    except OSError as error:
        raise UserError(f"{storage.where(name)} cannot be read ({error}); {_RESTORE}") from None
    return parse_json(storage, name, data)


def parse_json(storage: Storage, name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{storage.where(name)} cannot be read ({error}); {_RESTORE}") from None


def _compared(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a window's plan must have in common with another one's: how far the input was read only at its end."""
    return {key: value for key, value in plan.items() if key != "input" or plan.get("last")}


def to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
