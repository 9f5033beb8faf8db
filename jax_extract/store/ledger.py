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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax_extract.errors import UserError
from jax_extract.store.filesystem import Directory
from jax_extract.store.parts import SHARD_NAME

FORMAT_VERSION = 1
RUN_FILE = "_run/run.json"
PLAN, PARTS, COMMITS, SESSIONS = "_run/plan", "_run/parts", "_run/commits", "_run/sessions"
METADATA_FILE = "metadata.json"

Key = tuple[int, int]  # (batch, part), both counted from 1


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
        if run.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{directory.root} has format version {run.get('format_version')!r} and this version reads "
                f"{FORMAT_VERSION}; use the jax_extract that wrote it"
            )
        return cls(directory, run)

    @classmethod
    def start(cls, directory: Directory, run: Mapping[str, Any]) -> Ledger:
        """Writes run.json into a directory that holds no run yet."""
        directory.make(PLAN, PARTS, COMMITS, SESSIONS)
        run = {"format_version": FORMAT_VERSION, **run}
        directory.write(RUN_FILE, _dump(run))
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
        """Every commit record, by (batch, part), in that order."""
        records = (_json(self.directory, f"{COMMITS}/{name}") for name in self.directory.names(COMMITS))
        return {(record["batch"], record["part"]): record for record in records}

    def commit(self, record: Mapping[str, Any]) -> bool:
        """Makes a part exist; False where another worker has committed it already."""
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
        return [_json(self.directory, f"{SESSIONS}/{name}") for name in self.directory.names(SESSIONS)]

    def metadata(self) -> dict[str, Any]:
        """What metadata.json says, derived from run.json, the records and the sessions."""
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
        plans = self.directory.names(PLAN)
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
    """Removes a run from a directory: its records first, then its shards; other files are left alone."""
    for folder in (COMMITS, SESSIONS, PLAN, PARTS):
        for name in directory.names(folder):
            directory.path(f"{folder}/{name}").unlink()
    for name in directory.names():
        if SHARD_NAME.fullmatch(name) or name == METADATA_FILE:
            directory.path(name).unlink()
    directory.path(RUN_FILE).unlink(missing_ok=True)


def _json(directory: Directory, name: str) -> dict[str, Any]:
    try:
        value = json.loads(directory.read(name))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"{directory.path(name)} cannot be read ({error}); restore it from a copy of the run") from None


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    wanted = json.loads(json.dumps(wanted))
    keys = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    return "; ".join(f"{key} was {_brief(stored.get(key))}, is now {_brief(wanted.get(key))}" for key in keys)


def _brief(value: Any, most: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _ratio(sessions: list[dict[str, Any]], above: str, below: str) -> float | None:
    total = sum(session[below] for session in sessions)
    return sum(session[above] for session in sessions) / total if total else None


def _waste(sessions: list[dict[str, Any]]) -> float | None:
    share = _ratio(sessions, "tokens", "slab_tokens")
    return None if share is None else 1 - share
