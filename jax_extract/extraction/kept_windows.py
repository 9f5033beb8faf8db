"""Windows that are kept until their run is whole, so that the same command need not tokenise its input again.

In: planned windows and the counts of their input. Out: files in `_run/tokens`, written in the background; and from
them, in a later session, the same windows: planned anew from their lengths, with the digests that they had.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jax_extract.errors import UserError, damage_is_told
from jax_extract.inputs.columns import Texts
from jax_extract.inputs.planning.windows import Window, WindowPlanner, layout_digest
from jax_extract.inputs.token_table import TokenTable
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.store import token_files
from jax_extract.store.ledger import Ledger
from jax_extract.store.token_files import TokenFile

_DIGEST_BYTES = 32
_ENDS_SECONDS = 10.0  # for the file that is being written, to a place that may hang
_AT_ONCE = 16  # a bucket answers each question after a round trip


class Planned(NamedTuple):
    """A window, and what was counted of the input when it was planned."""

    window: Window
    counts: InputCounts

    @classmethod
    def now(cls, window: Window, counts: InputCounts) -> Planned:
        """With what is counted at this moment."""
        return cls(window, dataclasses.replace(counts, first_empty_samples=[*counts.first_empty_samples]))


@dataclass(frozen=True)
class KeptWindow:
    """A window in a file; of its arrays each is read and checked when it is first asked for."""

    file: TokenFile

    @classmethod
    def open(cls, ledger: Ledger, number: int, is_done: bool) -> KeptWindow | None:
        """None where there is none of this run.

        Args:
          is_done: nothing of it is to be computed any more, so that only the header need be sound.

        Raises:
          UserError: it is damaged, as far as that shows without token ids.
        """
        if (file := TokenFile.open(ledger, number)) is None:
            return None
        kept = cls(file)
        with damage_is_told(file.storage.where(file.name), token_files.MEND):
            kept.counted(InputCounts())
            _ = kept.is_last, kept.digest, file.said["layout"], file.said["batches"]
            if not is_done:
                kept._require_sound()
        return kept

    def _require_sound(self) -> None:
        table, samples = self.table, len(self.table)
        counts = [len(each) for each in (table.sample_ids, table.meta, table.sample_indices, table.full_lengths)]
        if counts != [samples] * len(counts) or b"".join(self.digests) != self.file.array("digests").tobytes():
            raise ValueError("its arrays do not fit each other")

    @cached_property
    def table(self) -> TokenTable:
        return _KeptTable(self.file)

    @cached_property
    def digests(self) -> list[bytes]:
        """Of the parts, in their order."""
        data = self.file.array("digests").tobytes()
        return [data[at : at + _DIGEST_BYTES] for at in range(0, len(data), _DIGEST_BYTES)]

    @property
    def is_last(self) -> bool:
        return self.file.said["last"]

    def counted(self, counts: InputCounts) -> InputCounts:
        """`counts`, filled with those of the window."""
        for name, value in self.file.said["counts"].items():
            setattr(counts, name, value)
        return counts

    @property
    def digest(self) -> str:
        """Of the window."""
        return self.file.said["digest"]

    def planned(self, planner: WindowPlanner, counts: InputCounts) -> Planned | None:
        """The window, as it was, with `counts` filled; None where another version of the planner laid it out."""
        window = planner.window(self.table, self.is_last, self.digests)
        if (window.digest, layout_digest(window)) != (self.digest, self.file.said["layout"]):
            return None
        return Planned(window, self.counted(counts))

    def pass_over(self, planner: WindowPlanner) -> None:
        """For the windows behind it, where nothing of it is to be done any more."""
        planner.pass_over(self.file.said["batches"], self.digest)


class _KeptTable(TokenTable):
    """A table each array of which is read and checked when it is first asked for."""

    def __init__(self, file: TokenFile) -> None:
        self.__dict__["_file"] = file

    def __getattr__(self, name: str) -> Any:
        if name in ("sample_ids", "meta"):
            kind = {"sample_ids": "id", "meta": "meta"}[name]
            found: Any = Texts(self._file.array(f"{kind}_bytes"), self._file.array(f"{kind}_offsets"))
        elif name in ("token_ids", "offsets", "sample_indices", "full_lengths"):
            found = self._file.array(name)
        else:
            raise AttributeError(name)
        self.__dict__[name] = found
        return found


@dataclass(frozen=True)
class KeptTables(Sequence[TokenTable]):
    """Tables of windows, each opened anew whenever it is asked for: there may be many."""

    windows: Sequence[KeptWindow]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> Any:
        return _KeptTable(self.windows[index].file)


def keep(ledger: Ledger, planned: Planned, attempt: str) -> None:
    """Writes a window's file, unless there is one."""
    window = planned.window
    if ledger.storage.exists(token_files.file_name(window.number)):
        return
    table = window.arrangement.table
    names, meta = (_as_texts(texts) for texts in (table.sample_ids, table.meta))
    arrays = {
        "offsets": table.offsets,
        "sample_indices": table.sample_indices,
        "full_lengths": table.full_lengths,
        "id_offsets": names.offsets,
        "meta_offsets": meta.offsets,
        "token_ids": table.token_ids,
        "id_bytes": names.data,
        "meta_bytes": meta.data,
        "digests": np.frombuffer(b"".join(part.sha256 for part in window.parts), np.uint8),
    }
    said = {
        "last": window.is_last,
        "digest": window.digest,
        "layout": layout_digest(window),
        "batches": window.parts[-1].batch,
        "counts": dataclasses.asdict(planned.counts),
    }
    token_files.write(ledger, window.number, arrays, said, attempt)


def _as_texts(texts: Sequence[str]) -> Texts:
    return texts if isinstance(texts, Texts) else Texts.of(texts)


def kept_windows(ledger: Ledger, done: Collection[int]) -> tuple[list[KeptWindow], str, str]:
    """The windows that are kept from the first one on, without a gap.

    Args:
      done: numbers of windows of which nothing is to be computed any more.

    Returns:
      Them, the name of the file behind them where that is no window of this run, and what is wrong with it where it is
      damaged.
    """
    there = token_files.sizes(ledger.storage)
    count = next(number for number in itertools.count() if token_files.file_name(number) not in there)
    found: list[KeptWindow] = []
    for number, window in enumerate(_opened(ledger, count, done)):
        if not isinstance(window, KeptWindow):
            return found, token_files.file_name(number), window or ""
        found.append(window)
    return found, "", ""


def kept_windows_of(ledger: Ledger, count: int, done: Collection[int]) -> list[KeptWindow]:
    """The same where another process has found so many; UserError where they are not here."""
    found = [window for window in _opened(ledger, count, done) if isinstance(window, KeptWindow)]
    if len(found) < count:
        raise UserError(
            f"{ledger.storage.where(token_files.file_name(len(found)))} is sound on the first host and not here; "
            "give them one place"
        )
    return found


def _opened(ledger: Ledger, count: int, done: Collection[int]) -> list[KeptWindow | str | None]:
    """Each window, or what is wrong with it, or None where it is not there."""

    def one(number: int) -> KeptWindow | str | None:
        try:
            return KeptWindow.open(ledger, number, is_done=number in done and number > 0)
        except UserError as error:
            return str(error).removesuffix(f"; {token_files.MEND}")  # it is made again without anybody's help

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="jax_extract-kept") as pool:
        return list(pool.map(one, range(count)))


class Keeper:
    """Keeps windows in a thread of its own; where one cannot be kept, that is told when it ends, and no other is."""

    def __init__(self, ledger: Ledger, attempt: str) -> None:
        self._ledger = ledger
        self._attempt = attempt
        self._waiting: deque[Planned] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._trouble = ""
        self._thread = threading.Thread(target=self._work, name="jax_extract-keeper", daemon=True)
        self._thread.start()

    def keep(self, planned: Planned) -> None:
        """Returns at once."""
        with self._changed:
            self._waiting.append(planned)
            self._changed.notify_all()

    def close(self, seconds: float) -> str:
        """Ends when what waits is kept, or after so many seconds; says why a window could not be kept."""
        until = time.monotonic() + seconds
        with self._changed:
            self._ends = True
            self._changed.notify_all()
            while self._waiting and time.monotonic() < until and self._thread.is_alive():
                self._changed.wait(0.1)
            self._waiting.clear()
        self._thread.join(_ENDS_SECONDS)
        return self._trouble

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if not self._waiting:
                    return
                planned = self._waiting.popleft()
            try:
                keep(self._ledger, planned, self._attempt)
            except Exception as error:  # noqa: BLE001 (the run does without; what is wrong will show in its own files)
                self._trouble = str(error) or type(error).__name__
                return
