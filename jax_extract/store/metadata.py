"""`metadata.json`: what a run holds, in one file, for people and for scripts.

In: a ledger. Out: a dictionary, and the file beside the shards. All of it is derived: it can be written
anew at any time, and nothing that decides anything reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax_extract.errors import damage_is_told
from jax_extract.store.ledger import COMMITS, Key, Ledger, Record, to_json

METADATA_FILE = "metadata.json"
_TRIES = 3  # a worker that ends while others go on does not wait for them: the last one writes it whole

VERIFICATION_FILE = "verification.json"  # written by those who verify, gone with the run


def metadata_of(ledger: Ledger, records: Mapping[Key, Record] | None = None) -> dict[str, Any]:
    """What metadata.json says, derived from run.json, the records and the sessions."""
    with damage_is_told(f"the run in {ledger.storage}", "restore its _run folder from a copy"):
        return _metadata(ledger, ledger.committed() if records is None else records)


def write_metadata(ledger: Ledger) -> dict[str, Any]:
    """Writes metadata.json; again, where other workers have committed parts in the meantime."""
    for _ in range(_TRIES):
        records = ledger.committed()
        metadata = metadata_of(ledger, records)
        ledger.storage.replace(METADATA_FILE, to_json(metadata))
        if len(ledger.names(COMMITS)) == len(records):
            break
    return metadata


def _metadata(ledger: Ledger, records: Mapping[Key, Record]) -> dict[str, Any]:
    identity, description = ledger.run["identity"], ledger.run["description"]
    batches: dict[int, dict[str, Any]] = {}
    for (batch, _), record in records.items():
        entry = batches.setdefault(
            batch,
            {"batch": batch, "parts": record["parts_in_batch"], "samples": 0, "tokens": 0, "rows": 0, "files": []},
        )
        for count in ("samples", "tokens", "rows"):
            entry[count] += record[count]
        entry["files"] += [file["path"] for file in record["files"]]
    sessions = ledger.sessions()
    plan = ledger.last_plan() or {}
    layers = sorted({site["layer"] for site in identity["sites"] if site["layer"] is not None})
    return {
        **description.get("about", {}),
        "model_name": description["model_name"],
        "layers_extracted": layers,
        "hidden_dim": description["hidden_dim"],
        "num_layers_extracted": len(layers),
        "total_samples": sum(record["samples"] for record in records.values()),
        "total_tokens": sum(record["tokens"] for record in records.values()),
        "total_rows": sum(record["rows"] for record in records.values()),
        "total_bytes": sum(file["bytes"] for record in records.values() for file in record["files"]),
        "not_finite_rows": sum(record.get("not_finite_rows", 0) for record in records.values()),
        "tokens_per_second": _throughput(sessions),
        "padding_waste": _share(sessions, _padding),
        "idle_devices": _share(sessions, _idle),
        "format_version": ledger.run["format_version"],
        **identity,
        "plan_fingerprint": plan.get("digest"),
        "input": plan.get("input"),
        "numerics": ledger.run["numerics"],
        **{key: value for key, value in description.items() if key not in ("model_name", "hidden_dim", "about")},
        "sessions": sessions,
        "batches": [batches[batch] for batch in sorted(batches)],
    }


def _throughput(sessions: list[dict[str, Any]]) -> float | None:
    """Tokens a second; processes that ran side by side share the seconds."""
    seconds = sum(session["seconds"] / session.get("processes", 1) for session in sessions)
    return sum(session["tokens"] for session in sessions) / seconds if seconds else None


def _share(sessions: list[dict[str, Any]], wanted: Callable[[dict[str, Any]], int]) -> float | None:
    """Of the tokens that devices computed."""
    computed = sum(session["slab_tokens"] for session in sessions)
    return sum(map(wanted, sessions)) / computed if computed else None


def _padding(session: dict[str, Any]) -> int:
    """Tokens within rows that are of no sample."""
    return session["slab_tokens"] - session["tokens"] - _idle(session)


def _idle(session: dict[str, Any]) -> int:
    """Tokens of devices without a slab; sessions of versions that did not count them have these in the padding."""
    return session.get("idle_tokens", 0)
