"""What a run that is there spares the session that goes on with it: reading, tokenising, planning.

In: the run, its records, a source. Out: `Resumption`. The bytes that the samples come from must be those that the run
was begun with, as their fingerprint says on every process; where they are not, or nobody knows, nothing is spared: the
input is read, and compared with the plan that is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_extract.devices.processes import Processes
from jax_extract.errors import damage_is_told
from jax_extract.extraction.kept_windows import KeptWindow, kept_windows, kept_windows_of
from jax_extract.extraction.pending import Committed
from jax_extract.inputs.planning.windows import Window
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.store.ledger import Ledger
from jax_extract.terminal import Terminal

FINGERPRINT = "input_fingerprint"  # in the description of a run


@dataclass(frozen=True)
class Resumption:
    """Attributes:
    keeps: whether windows of this run may be kept for the next session.
    kept: windows that need not be tokenised, from the first one on.
    done: numbers of windows all of whose parts are committed.
    last_plan: that of the last window, where all parts of the whole plan are committed; else None.
    stored: of each window with a plan its digest, and what was counted of the input; on the first process.
    unusable: name of a file that has the place of a kept window and is none; on the first process.
    """

    keeps: bool = False
    kept: Sequence[KeptWindow] = ()
    done: Collection[int] = ()
    last_plan: Mapping[str, Any] | None = None
    stored: Mapping[int, tuple[str, Any]] = field(default_factory=dict)
    unusable: str = ""

    @classmethod
    def of(
        cls,
        source: Source | Fingerprint,
        found: Ledger | None,
        committed: Committed,
        processes: Processes,
        terminal: Terminal,
    ) -> Resumption:
        """What `found` spares, where it is a run; `source` may be under way to its fingerprint already."""
        begun = found.run["description"].get(FINGERPRINT) if found else None
        if found is None or begun is None:
            return cls()
        fingerprint = source if isinstance(source, Fingerprint) else Fingerprint(source)
        if fingerprint.of_all(processes) != begun:
            return cls()
        windows: list[KeptWindow] = []
        stored: dict[int, tuple[str, Any]] = {}
        unusable = ""

        def look() -> dict[str, Any]:
            nonlocal unusable
            plans = found.plans()
            with damage_is_told(f"the plan in {found.storage}", "restore its _run folder from a copy"):
                done = [plan["window"] for plan in plans if _is_committed(plan, committed)]
                if plans and plans[-1]["last"] and done == list(range(len(plans))):
                    return {"last": {**plans[-1], "parts": []}}
                stored.update({plan["window"]: (plan["digest"], plan["input"]) for plan in plans})
            kept, unusable, damaged = kept_windows(found, done)
            if damaged:
                terminal.line("note", f"{damaged}; the input is tokenised again")
            windows.extend(kept)
            return {"kept": len(kept), "done": done}

        said = processes.of_first(look)
        if last := said.get("last"):
            return cls(True, last_plan=last)
        with processes.together():
            if not processes.is_first:
                windows = kept_windows_of(found, said["kept"], said["done"])
        return cls(True, windows, frozenset(said["done"]), stored=stored, unusable=unusable)

    def has_plan(self, window: Window, counts: InputCounts) -> bool:
        """Whether that very plan is known to be stored."""
        digest, counted = self.stored.get(window.number, ("", None))
        return digest == window.digest and (not window.is_last or counted == counts.as_json())


class Fingerprint:
    """Of what a source reads, made in a thread of its own from the beginning on."""

    def __init__(self, source: Source) -> None:
        self._made: list[str | None] = []
        self._thread = threading.Thread(
            target=lambda: self._made.append(source.fingerprint()), name="jax_extract-fingerprint", daemon=True
        )
        self._thread.start()

    def of_all(self, processes: Processes) -> str | None:
        """Where every process has the same; None where that cannot be known. All call it together."""
        self._thread.join()
        found = set(processes.of_all(self._made[0] if self._made else None))
        return found.pop() if len(found) == 1 else None


def _is_committed(plan: Mapping[str, Any], committed: Committed) -> bool:
    """Whether all parts of a window are committed, as they are planned."""
    records = ((committed.get((part["batch"], part["part"])), part["digest"]) for part in plan["parts"])
    return all(record is not None and record.plan == digest for record, digest in records)
