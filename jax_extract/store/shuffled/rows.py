"""Rows of a run in random order, for training: streamed through a buffer of bounded size.

In: the parts of a run, sites, a seed. Out: batches of rows, each with the sample and the token position it
belongs to, and a state of a few numbers with which another process goes on at the very next row. `order`
says in which order; here threads read ahead and rows wait in a pool until their turn. A row that is taken
out makes room for one that is read, so the pool is full all the time.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store.file_part import StoredPart
from jax_extract.store.parts import Site
from jax_extract.store.shuffled.order import Epoch, Layout
from jax_extract.store.shuffled.rows_wanted import RowsWanted
from jax_extract.store.shuffled.source import Pool, Source
from jax_extract.store.token_text import token_texts
from jax_extract.store.torch_tensors import require_torch, tensor_of

if TYPE_CHECKING:
    from jax_extract.store.shuffled.for_jax import DeviceBatches
    from jax_extract.store.shuffled.for_torch import ShuffledDataset

_STATE_VERSION = 1
_WANTED = "rows_wanted"  # in a state
_PAIR = 2
_READERS = 8  # on local disks and in buckets, one read at a time leaves most of the bandwidth unused


@dataclass(frozen=True, eq=False, repr=False)
class ShuffledBatch:
    """Rows drawn from anywhere in a run.

    Attributes:
      activations: [rows, width], or [rows, layers, width] where layers were given as a sequence; the stored
        dtype (bfloat16 as `ml_dtypes.bfloat16`); a `torch.Tensor` or a `jax.Array` where that was asked for. It is
        the caller's to keep and to change.
      sample_indices: int64 [rows], the place of each row's sample in the input.
      positions: int32 [rows], the token position of each row; -1 where it is the mean over all tokens.
      token_ids: int32 [rows], the token at that position; -1 where the row is a mean.
      epoch: from 0.
    """

    activations: Any
    sample_indices: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray
    epoch: int

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.activations.shape))
        return f"ShuffledBatch({shape} {self.activations.dtype}, epoch {self.epoch})"

    def __len__(self) -> int:
        return len(self.sample_indices)

    def tokens(self, tokenizer: Any) -> list[str]:
        """The text of each row's token, as `SampleActivations.tokens` gives it."""
        return token_texts(tokenizer, self.token_ids)


@dataclass(frozen=True)
class ShuffleSettings:
    """What decides which rows come in which order.

    Attributes:
      sites: what a row holds, in this order.
      stacked: whether a batch has an axis for the sites.
      rows: of a batch.
      seed: not negative.
      epochs: how many times through the run; None: without end.
      drop_remainder: leave out the last batch of an epoch where it has fewer rows.
      shard: (index, count): this reader's share of the rows.
      buffer_bytes: memory for rows that wait and rows that are read; batches that were handed out come on top.
      read_bytes: how much of a site is read at once, about.
      wanted: which rows come at all; None for all.
    """

    sites: tuple[Site, ...]
    stacked: bool
    rows: int
    seed: int
    epochs: int | None
    drop_remainder: bool
    shard: tuple[int, int]
    buffer_bytes: int
    read_bytes: int
    wanted: RowsWanted | None = None

    def __post_init__(self) -> None:
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise UserError("layers must name at least one layer, and none twice")
        if other := next((site for site in self.sites if site.width != self.sites[0].width), None):
            first = self.sites[0]
            raise UserError(
                f"{other.hook} has {other.width} values a row, and {first.hook} {first.width}; give those of one width"
            )
        for name, least in (("rows", 1), ("seed", 0), ("epochs", 1), ("buffer_bytes", 1), ("read_bytes", 1)):
            value = getattr(self, name)
            if not (_is_whole(value, least) or (name == "epochs" and value is None)):
                raise UserError(f"{name}={value!r} must be a whole number of at least {least}")
        shard: Any = self.shard
        if not (
            isinstance(shard, Sequence) and len(shard) == _PAIR and all(map(_is_whole, shard)) and shard[0] < shard[1]
        ):
            raise UserError(f"shard={self.shard!r} must be (index, count) with an index from 0 to count - 1")

    def to_state(self) -> dict[str, Any]:
        """What must be the same where a reader goes on; the number of epochs need not."""
        return {
            "sites": [[site.hook, site.layer] for site in self.sites],
            "stacked": self.stacked,
            "rows": int(self.rows),
            "seed": int(self.seed),
            "drop_remainder": bool(self.drop_remainder),
            "shard": [int(number) for number in self.shard],
            "buffer_bytes": int(self.buffer_bytes),
            "read_bytes": int(self.read_bytes),
        }


@dataclass(frozen=True)
class _Place:
    """Between two rows: `taken` rows of the window have come out, `row` rows of the epoch."""

    epoch: int = 0
    window: int = 0
    taken: int = 0
    row: int = 0


class ShuffledRows(Iterator[ShuffledBatch]):
    """Batches of a run's rows in random order; made by `Run.shuffled`.

    Threads read ahead from the first `next` on; `close`, or leaving its `with` block, ends them.
    """

    def __init__(self, parts: Sequence[StoredPart], settings: ShuffleSettings, torch: bool = False) -> None:
        """With `torch`, the `activations` of batches are tensors."""
        if torch:
            require_torch("torch=True")
        self.settings = settings
        self._torch = torch
        self._parts = parts
        self._source = Source(parts, settings.sites, settings.wanted)
        self._place = _Place()
        self._flow: _Flow | None = None
        if not self.batches_per_epoch:
            of = f" of {sum(self._source.stored_rows)} left by positions and without_tokens" if settings.wanted else ""
            raise UserError(
                f"this run has {self._source.rows} rows{of}, which makes no batch of {settings.rows} for shard "
                f"{settings.shard}; ask for fewer rows a batch, or give drop_remainder=False"
            )
        self._layout = Layout.of(
            self._source.stored_rows,
            self._source.row_bytes,
            len(settings.sites),
            settings.buffer_bytes,
            settings.read_bytes,
            settings.shard[1],
            self._source.kept.before if self._source.kept else None,
        )

    @property
    def batches_per_epoch(self) -> int:
        """Of this shard; with `drop_remainder` all shards have equally many."""
        return -(-_rows_out(self._source.rows, self.settings) // self.settings.rows)

    def __next__(self) -> ShuffledBatch:
        if self._flow is None:
            self._flow = _Flow(self._source, self._layout, self.settings, self._place)
        try:
            batch = self._flow.batch()
        except BaseException:
            self.close()  # a later `next` reads anew from the last batch that was handed out, and misses nothing
            raise
        self._place = self._flow.place
        return replace(batch, activations=tensor_of(batch.activations)) if self._torch else batch

    def get_state(self) -> dict[str, Any]:
        """The place behind the last batch, as JSON: numbers, strings and lists of them."""
        return {
            "version": _STATE_VERSION,
            "run": self._source.digest,
            **self.settings.to_state(),
            **self._wanted_state(),
            **dataclasses.asdict(self._place),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken, at the very next row; the rows that waited then are read again.

        Raises:
          UserError: the state is of another run or of other settings; the sentence names what differs.
        """
        place = self._checked(state)
        self.close()
        self._place = place

    def _wanted_state(self) -> dict[str, Any]:
        """Nothing where all rows come, as it was before there was a choice."""
        wanted, kept = self.settings.wanted, self._source.kept
        return {_WANTED: {**wanted.to_state(), "kept": kept.digest}} if wanted and kept else {}

    def _checked(self, state: Mapping[str, Any]) -> _Place:
        own = self.get_state()
        if isinstance(state, Mapping) and "version" in state and state.get(_WANTED) != own.get(_WANTED):
            raise UserError(
                f"the state was taken with the rows {_wanted_text(state.get(_WANTED))} and this reader has "
                f"{_wanted_text(own.get(_WANTED))}; give the same positions and without_tokens, or no state"
            )
        if not isinstance(state, Mapping) or own.keys() != state.keys():
            raise UserError("this is no state of a shuffled reader; give what get_state returned, unchanged")
        if state["run"] != own["run"]:
            raise UserError(
                "the state in key 'run' is of another run, or of this one when it had other parts; open the run as it "
                "was then, or start without a state"
            )
        for key in ("version", *self.settings.to_state()):
            if state[key] != own[key]:
                raise UserError(
                    f"the state was taken with {key} {state[key]!r} and this reader has {own[key]!r}; give the same, "
                    "or start without a state"
                )
        numbers = {key: state[key] for key in dataclasses.asdict(self._place)}
        if not all(map(_is_whole, numbers.values())):
            raise UserError(f"the state's place {numbers} is damaged; use an earlier state")
        return _Place(**numbers)

    def __repr__(self) -> str:
        sites = ", ".join(
            f"{site.hook} {site.layer}" if site.layer is not None else site.hook for site in self.settings.sites
        )
        return f"ShuffledRows({sites}: {self.batches_per_epoch} batches of {self.settings.rows} rows an epoch)"

    def close(self) -> None:
        """Ends the threads that read ahead; a later `next` goes on at the same place."""
        if self._flow is not None:
            self._flow.close()
            self._flow = None

    def __enter__(self) -> ShuffledRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_devices(self, sharding: Any) -> DeviceBatches:
        """The same batches with `activations` as JAX arrays of this sharding, put on the devices a batch ahead."""
        from jax_extract.store.shuffled.for_jax import DeviceBatches

        if self._torch:
            raise UserError("these batches are torch tensors; leave torch=True out to have JAX arrays of them")
        return DeviceBatches(self, sharding)

    def for_torch(self) -> ShuffledDataset:
        """The same rows as a `torch.utils.data.IterableDataset`, divided among the workers of a `DataLoader`."""
        require_torch("for_torch")
        from jax_extract.store.shuffled.for_torch import ShuffledDataset

        return ShuffledDataset(self._parts, self.settings)


def _wanted_text(state: Any) -> str:
    if not isinstance(state, Mapping):
        return "all"
    return ", ".join(f"{key}={value!r:.60}" for key, value in state.items())


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least


def _rows_out(total: int, settings: ShuffleSettings) -> int:
    """How many rows of an epoch this shard hands out; with `drop_remainder` every shard the same."""
    index, count = settings.shard
    if settings.drop_remainder:
        return total // count // settings.rows * settings.rows
    return total * (index + 1) // count - total * index // count


# --------------------------------------------------------------------------------------- rows on their way


class _Flow:
    """Rows from a place on: what is being read, what waits, what comes out next.

    Attributes:
      place: behind the last row that came out.
    """

    def __init__(self, source: Source, layout: Layout, settings: ShuffleSettings, place: _Place) -> None:
        self._source = source
        self._layout = layout
        self._settings = settings
        self._pool = Pool(layout.pool_rows, len(settings.sites), source.row_bytes)
        self._rows_out = _rows_out(layout.rows, settings)
        self._epochs: dict[int, Epoch] = {}
        self.place = place if place.row < self._rows_out else _Place(place.epoch + 1)
        self._from = self.place.epoch, self.place.window
        self._next_read = self.place.epoch, self._epoch(self.place.epoch).first_group(self.place.window)
        self._reads: deque[tuple[tuple[int, int], list[Future[None]]]] = deque()  # by (epoch, group), in order
        self._waiting: dict[tuple[int, int], list[np.ndarray]] = {}  # slots by (epoch, window)
        self._ready: np.ndarray | None = None  # slots of the window that is coming out, in order
        self._all: np.ndarray | None = None  # slots of a shard that fits, which stay taken
        readers = min(_READERS, max(1, settings.buffer_bytes // 8 // layout.piece_bytes))
        self._threads = ThreadPoolExecutor(readers, thread_name_prefix="jax_extract-shuffled")
        # Who forgets to close shall not wait at the end for reads that nobody wants.
        self._end = weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True)

    def close(self) -> None:
        self._end.detach()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def batch(self) -> ShuffledBatch:
        """The next batch; StopIteration behind the last."""
        if self.place.row == self._rows_out:
            self._next_epoch()
        if not self._wanted(self.place.epoch):
            raise StopIteration
        epoch, pool = self.place.epoch, self._pool
        count = min(self._settings.rows, self._rows_out - self.place.row)
        bits = np.empty((count, *pool.bits.shape[1:]), pool.bits.dtype)
        samples = np.empty(count, np.int64)
        positions, tokens = np.empty(count, np.int32), np.empty(count, np.int32)
        done = 0
        while done < count:
            slots = self._next_slots(count - done)
            to = slice(done, done + len(slots))
            # `clip` and `out` together make NumPy copy rows straight to where they go.
            np.take(pool.bits, slots, axis=0, out=bits[to], mode="clip")
            np.take(pool.sample_indices, slots, out=samples[to], mode="clip")
            np.take(pool.positions, slots, out=positions[to], mode="clip")
            np.take(pool.token_ids, slots, out=tokens[to], mode="clip")
            self._give_back(slots)
            self._read_ahead()
            done += len(slots)
        activations = bits.view(self._source.dtype)
        activations = activations if self._settings.stacked else activations[:, 0]
        return ShuffledBatch(activations, samples, positions, tokens, epoch)

    def _next_epoch(self) -> None:
        """Lets go of the rows of a remainder and begins the next epoch."""
        left = self._epoch(self.place.epoch).rows - self.place.row
        while left:
            slots = self._next_slots(left)
            self._give_back(slots)
            left -= len(slots)
        self._epochs.pop(self.place.epoch)
        self.place, self._ready = _Place(self.place.epoch + 1), None

    def _next_slots(self, most: int) -> np.ndarray:
        """Slots of the next rows of the epoch, at least one, at most so many, all of one window."""
        while self._ready is None or not len(self._ready):
            if self._ready is not None:
                self.place = replace(self.place, window=self.place.window + 1, taken=0)
            self._ready = self._open_window()
        slots, self._ready = self._ready[:most], self._ready[most:]
        self.place = replace(self.place, taken=self.place.taken + len(slots), row=self.place.row + len(slots))
        return slots

    def _open_window(self) -> np.ndarray:
        """The slots of the window at the place, in order, when all its rows are there."""
        number, window = self.place.epoch, self.place.window
        epoch = self._epoch(number)
        if window >= epoch.windows:
            raise UserError(f"the state's window {window} is damaged; use an earlier state")
        slots = self._read_window(number, window) if self._all is None else self._all
        if epoch.fits:
            self._all = slots
        slots = slots[epoch.order(window, len(slots))]
        self._give_back(slots[: self.place.taken])  # they came out before the state was taken
        return slots[self.place.taken :]

    def _read_window(self, number: int, window: int) -> np.ndarray:
        """The slots of a window when its rows are in them."""
        last = number, self._epoch(number).last_group(window)
        while self._next_read <= last:
            self._read_group()
        self._read_ahead()
        while self._reads and self._reads[0][0] <= last:
            for read in self._reads[0][1]:
                read.result()
            self._reads.popleft()
        return np.concatenate([*self._waiting.pop((number, window), []), np.zeros(0, np.int64)])

    def _give_back(self, slots: np.ndarray) -> None:
        if self._all is None:
            self._pool.give_back(slots)

    def _read_ahead(self) -> None:
        """Reads as many groups as there is room for."""
        while self._wanted(self._next_read[0]) and self._pool.free:
            number, group = self._next_read
            if self._pool.free < self._epoch(number).group_rows(group):
                return
            self._read_group()

    def _read_group(self) -> None:
        """Hands the next group to the threads, row by row with the slot it goes to, and notes when each comes out."""
        number, group = self._next_read
        epoch = self._epoch(number)
        dealt = [(window, rows) for window, rows in epoch.deal(group) if (number, window) >= self._from]
        slots = np.full(epoch.group_rows(group), -1)
        kept = np.sort(np.concatenate([*(rows for _, rows in dealt), np.zeros(0, np.int64)]))
        slots[kept] = self._pool.take(len(kept))
        for window, rows in dealt:
            self._waiting.setdefault((number, window), []).append(slots[rows])
        reads, at = [], 0
        for piece in epoch.pieces(group).tolist():
            end = at + piece[2] - piece[1]
            read = self._source.fill, self._pool, piece, slots[at:end], self._layout.piece_bytes
            reads.append(self._threads.submit(*read))
            at = end
        self._reads.append((self._next_read, reads))
        self._next_read = (number, group + 1) if group + 1 < epoch.groups else (number + 1, 0)

    def _wanted(self, epoch: int) -> bool:
        return self._settings.epochs is None or epoch < self._settings.epochs

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            self._epochs[number] = Epoch(self._layout, self._settings.seed, number, self._settings.shard)
        return self._epochs[number]
