"""The ledger of a run directory: what run it is, which parts are committed, and what follows from that.

In: the run's identity, commit records. Out: `_run/run.json`, one create-only record a part, and
`metadata.json`, which is derived and can be rebuilt at any time. A part without a record does not exist.

    _run/run.json               what the run is; written once
    _run/plan/NNNNNN.json       the plan of a window; written once
    _run/parts/B_P*.safetensors sidecars: samples, token ids, positions, offsets and checksums of the files
    _run/commits/B_P.json       commit records, written last
    _run/sessions/*.json        one for each time the command ran to an orderly end
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_extract.errors import UserError, damage_is_told
from jax_extract.store.filesystem import Directory
from jax_extract.store.parts import ShardName

FORMAT_VERSION = 1
RUN_FILE = "_run/run.json"
PLAN, PARTS, COMMITS, SESSIONS = "_run/plan", "_run/parts", "_run/commits", "_run/sessions"
METADATA_FILE = "metadata.json"

Key = tuple[int, int]  # (batch, part), both counted from 1

_OWN_NAME = re.compile(r"\d{6,}(_\d{3,})?\.json|[0-9a-f]{12}\.json")
_REMOVE = "restore it from a copy, or remove it to compute that part again"


def part_name(key: Key) -> str:
    return f"{key[0]:06d}_{key[1]:03d}"


@dataclass(frozen=True)
class Ledger:
    """An opened run directory.

    Attributes:
      directory: where it is.
      run: run.json: `format_version`, `identity` (must be equal on resume), `numerics` (the fingerprint)
        and `description` (provenance, may differ between sessions).
    """

    directory: Directory
    run: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Directory) -> Ledger:
        """Opens an existing run; UserError where there is none or it is of another format version."""
        if not directory.exists(RUN_FILE):
            raise UserError(f"{directory.root} holds no run ({RUN_FILE} is missing); give the --activations_dir of one")
        run = _json(directory, RUN_FILE)
        if directory.path("_run").is_symlink():
            raise UserError(f"{directory.root}/_run is a link; a run's own folders are not")
        if run.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{directory.root} has format version {run.get('format_version')!r} and this version reads "
                f"{FORMAT_VERSION}; use the jax_extract that wrote it"
            )
        with damage_is_told(f"{directory.path(RUN_FILE)}", "restore it from a copy of the run"):
            for key in ("identity", "numerics", "description"):
                if not isinstance(run[key], dict):
                    raise TypeError(f"{key} is no object")
            str(run["run_id"])
        return cls(directory, run)

    @classmethod
    def start(cls, directory: Directory, run: Mapping[str, Any]) -> Ledger:
        """Writes run.json into a directory that holds no run yet."""
        directory.make(PLAN, PARTS, COMMITS, SESSIONS)
        if directory.names(COMMITS):
            raise UserError(
                f"{directory.root} holds commit records but no {RUN_FILE}; restore that file from a copy, "
                "or choose another --activations_dir"
            )
        run = {"format_version": FORMAT_VERSION, "run_id": uuid.uuid4().hex, **run}
        try:
            directory.write(RUN_FILE, _dump(run))
        except FileExistsError:
            raise UserError(
                f"another process has just started a run in {directory.root}; give the command again"
            ) from None
        return cls(directory, run)

    def require_same(
        self, identity: Mapping[str, Any], numerics: Mapping[str, Any], allow_numeric_change: bool
    ) -> None:
        """Refuses to mix runs: names every key that differs."""
        stored = self.run["identity"]
        if changed := _differences(stored, identity):
            raise UserError(
                f"{self.directory.root} holds another run: {changed}; choose another --activations_dir, "
                "or start anew with --overwrite"
            )
        if (changed := _differences(self.run["numerics"], numerics)) and not allow_numeric_change:
            raise UserError(
                f"resuming in {self.directory.root} would change the arithmetic: {changed}; go back to what it was, or "
                "accept rows that agree only within tolerance with --allow_numeric_change"
            )

    def committed(self) -> dict[Key, dict[str, Any]]:
        """Every commit record, by (batch, part), in that order; UserError on a damaged or foreign one."""
        records: dict[Key, dict[str, Any]] = {}
        for name in self._names(COMMITS):
            record = _json(self.directory, f"{COMMITS}/{name}")
            with damage_is_told(f"commit record {self.directory.path(COMMITS)}/{name}", _REMOVE):
                if record["run"] != self.run["run_id"]:
                    raise ValueError("it belongs to another run")
                counts = [record[key] for key in ("batch", "part", "parts_in_batch", "samples", "tokens", "rows")]
                counts += [file["bytes"] for file in record["files"]] + [record["sidecar"]["bytes"]]
                if not all(type(count) is int and count >= 0 for count in counts):
                    raise ValueError("a count is no whole number")
                records[record["batch"], record["part"]] = record
        return records

    def require_files(self, committed: Mapping[Key, Mapping[str, Any]]) -> None:
        """UserError where a file that a record names is missing or has another size."""
        for key, record in committed.items():
            for file in (record["sidecar"], *record["files"]):
                path = self.directory.path(file["path"])
                if not path.is_file() or path.stat().st_size != file["bytes"]:
                    raise UserError(
                        f"{path} is missing or cut short; restore it from a copy, or remove "
                        f"{self.directory.path(COMMITS)}/{part_name(key)}.json to compute that part again"
                    )

    def commit(self, record: Mapping[str, Any]) -> bool:
        """Makes a part exist; False where another worker has committed it already."""
        if _json(self.directory, RUN_FILE).get("run_id") != self.run["run_id"]:
            raise UserError(f"another process started {self.directory.root} anew; this run is over")
        record = {**record, "run": self.run["run_id"]}
        try:
            self.directory.write(f"{COMMITS}/{part_name((record['batch'], record['part']))}.json", _dump(record))
        except FileExistsError:
            return False
        return True

    def keep_plan(self, number: int, plan: Mapping[str, Any]) -> None:
        """Stores a window's plan, or checks that it is the one that is stored."""
        name = f"{PLAN}/{number:06d}.json"
        try:
            self.directory.write(name, _dump(plan))
        except FileExistsError:
            if _json(self.directory, name) != json.loads(_dump(plan)):
                raise UserError(
                    f"{self.directory.root} holds a run over other inputs (window {number} of its plan differs); "
                    "restore the inputs, choose another --activations_dir, or start anew with --overwrite"
                ) from None

    def end_session(self, attempt: str, session: Mapping[str, Any]) -> None:
        self.directory.write(f"{SESSIONS}/{attempt}.json", _dump(session))

    def sessions(self) -> list[dict[str, Any]]:
        return [_json(self.directory, f"{SESSIONS}/{name}") for name in self._names(SESSIONS)]

    def _names(self, folder: str) -> list[str]:
        """Our own files of a folder: file managers and copy programs leave others."""
        return [name for name in self.directory.names(folder) if _OWN_NAME.fullmatch(name)]

    def metadata(self) -> dict[str, Any]:
        """What metadata.json says, derived from run.json, the records and the sessions."""
        with damage_is_told(f"the run in {self.directory.root}", "restore its _run folder from a copy"):
            return self._metadata()

    def _metadata(self) -> dict[str, Any]:
        identity, description = self.run["identity"], self.run["description"]
        records = self.committed()
        batches: dict[int, dict[str, Any]] = {}
        for (batch, _), record in records.items():
            entry = batches.setdefault(
                batch,
                {"batch": batch, "parts": record["parts_in_batch"], "samples": 0, "tokens": 0, "rows": 0, "files": []},
            )
            for count in ("samples", "tokens", "rows"):
                entry[count] += record[count]
            entry["files"] += [file["path"] for file in record["files"]]
        sessions = self.sessions()
        plans = self._names(PLAN)
        plan = _json(self.directory, f"{PLAN}/{plans[-1]}") if plans else {}
        layers = sorted({site["layer"] for site in identity["sites"] if site["layer"] is not None})
        return {
            "model_name": description["model_name"],
            "layers_extracted": layers,
            "hidden_dim": description["hidden_dim"],
            "num_layers_extracted": len(layers),
            "total_samples": sum(record["samples"] for record in records.values()),
            "total_tokens": sum(record["tokens"] for record in records.values()),
            "total_rows": sum(record["rows"] for record in records.values()),
            "total_bytes": sum(file["bytes"] for record in records.values() for file in record["files"]),
            "not_finite_rows": sum(record.get("not_finite_rows", 0) for record in records.values()),
            "tokens_per_second": _ratio(sessions, "tokens", "seconds"),
            "padding_waste": _waste(sessions),
            "format_version": self.run["format_version"],
            **identity,
            "plan_fingerprint": plan.get("digest"),
            "input": plan.get("input"),
            "numerics": self.run["numerics"],
            **{key: value for key, value in description.items() if key not in ("model_name", "hidden_dim")},
            "sessions": sessions,
            "batches": [batches[batch] for batch in sorted(batches)],
        }

    def write_metadata(self) -> dict[str, Any]:
        metadata = self.metadata()
        self.directory.replace(METADATA_FILE, _dump(metadata))
        return metadata


def erase(directory: Directory) -> None:
    """Removes a run from a directory: its records first, then its shards; every other file is left alone."""
    run = Ledger.open(directory).run
    for folder in (COMMITS, SESSIONS, PLAN, PARTS):
        if directory.path(folder).is_symlink():
            raise UserError(f"{directory.path(folder)} is a link; a run's own folders are not: remove the link first")
    with damage_is_told(f"the run in {directory.root}", "remove it by hand"):
        batches = {p["batch"] for n in directory.names(PLAN) for p in _json(directory, f"{PLAN}/{n}")["parts"]}
        sites = {(site["hook"], site["layer"]) for site in run["identity"]["sites"]}
        shard_format = run["identity"]["shard_format"]
    for folder in (COMMITS, SESSIONS, PLAN, PARTS):
        for name in directory.names(folder):
            directory.path(f"{folder}/{name}").unlink()
    for name in directory.names():
        shard = ShardName.parse(name)
        if shard and (shard.hook, shard.layer) in sites and shard.batch in batches and shard.format == shard_format:
            directory.path(name).unlink()
    directory.path(METADATA_FILE).unlink(missing_ok=True)
    directory.path(RUN_FILE).unlink(missing_ok=True)


def _json(directory: Directory, name: str) -> dict[str, Any]:
    try:
        value = json.loads(directory.read(name))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{directory.path(name)} cannot be read ({error}); restore it from a copy of the run") from None


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    before, after = _flat(stored), _flat(json.loads(json.dumps(wanted)))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if "sites" in keys:  # which explains these: other layers load other weights and have other widths
        keys = [key for key in keys if key not in ("weights", "plan_settings.bytes_per_row")]
        before["sites"], after["sites"] = _sites_text(before["sites"]), _sites_text(after["sites"])
    return "; ".join(f"{key} was {_brief(before.get(key))}, is now {_brief(after.get(key))}" for key in keys)


def _sites_text(sites: Any) -> str:
    """Such as `after_block 10 11 12; final_norm`."""
    layers: dict[str, list[str]] = {}
    for site in sites:
        layers.setdefault(site["hook"], []).extend([] if site["layer"] is None else [str(site["layer"])])
    return "; ".join(" ".join([hook, *numbers]) for hook, numbers in layers.items())


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


def _brief(value: Any, most: int = 100) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _ratio(sessions: list[dict[str, Any]], above: str, below: str) -> float | None:
    total = sum(session[below] for session in sessions)
    return sum(session[above] for session in sessions) / total if total else None


def _waste(sessions: list[dict[str, Any]]) -> float | None:
    share = _ratio(sessions, "tokens", "slab_tokens")
    return None if share is None else 1 - share
