"""Rows that a model computes while SAEs are trained on them: shuffled on the devices, stored nowhere.

In: a model, its input. Out: batches [b, layers, width] on the devices, each row once a pass over the input. Rows come
as slabs are computed, in windows of `buffer_rows`; a window is drawn from in random order until it is used up, and what
came beyond it begins the next one. So the place of a batch is a window, a number in it, and the slab that the window
begins with: where a training is gone on with, the slabs of one window are computed again, and the very next batch
follows.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jax_extract.errors import UserError
from jax_extract.inputs.tokenize import tokenizer_digest
from jax_extract.inputs.wrapping import Kept
from jax_extract.sae.online.forward import Forward, Slab, chunks
from jax_extract.sae.online.ring import Ring
from jax_extract.sae.rows import HELD_OUT_ROWS, MEASURED_ROWS, Scales
from jax_extract.sae.sources import HeldOut, key_of
from jax_extract.store.parts import Site
from jax_extract.store.shuffled.order import random_order

_SLABS_AHEAD = 4  # of a device, that are computed before rows of them are waited for
_PLANNED_FOR_SOME = 2_048  # samples
_SPARE = 1.25  # slots of a device by its share of a window: slabs are not equally full


class _Came(NamedTuple):
    """Rows of one slab that wait, in their order.

    Attributes:
      skipped: rows of the slab that came before these.
      slots: int32 [n], of its device.
    """

    epoch: int
    slab: int
    skipped: int
    device: int
    slots: np.ndarray


class OnlineRows:
    """As `Rows` are, of a model.

    Attributes:
      source: itself, of which the rest asks what it holds.
      sites: of each layer of a row.
      rows: of a training, as many as it asks for.
      state: in JSON, behind the last batch that came out.
    """

    def __init__(
        self, forward: Forward, sites: Sequence[Site], batch: int, window: int, held_out: HeldOut, training_rows: int
    ) -> None:
        self.source, self.sites, self.rows = self, tuple(sites), training_rows
        self.read = self.left_out = self.not_finite = 0
        self._forward, self._batch, self._held_out = forward, batch, held_out
        self._window = max(1, min(window, training_rows) // batch) * batch
        self._state: dict[str, Any] = {"epoch": 0, "slab": 0, "skipped": 0, "window": 0, "batch": 0}

    @property
    def state(self) -> dict[str, Any]:
        return {**self._state, "kept": self._forward.kept.as_json()}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._forward.kept = Kept.of_json(state["kept"])
        self._state = {name: int(value) for name, value in state.items() if name != "kept"}

    @property
    def digest(self) -> str:
        """Of what decides which rows there are."""
        job, config, source = self._forward.job, self._forward.config, self._forward.source
        known: list[Any] = [job.identity(), config.chat_template, tokenizer_digest(job.model.tokenizer)]
        known += [job.weights().provenance(), source.fingerprint(), source.name]
        said = json.dumps([*known, str(self._forward.settings), self._window], sort_keys=True, default=str)
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    @property
    def about(self) -> dict[str, Any]:
        described = self._forward.job.description()
        aliases = described["model_hook_points"]
        names = {site: (aliases.get(site.hook) or "").replace("{i}", str(site.layer)) for site in self.sites}
        return {
            "model_name": described["model_name"],
            "positions": str(self._forward.job.plan.positions),
            "hook_names": {key_of(site): name or None for site, name in names.items()},
            "input": self._forward.source.name,
        }

    @property
    def notes(self) -> list[str]:
        """What a user should know of the input."""
        cut, samples = self._forward.truncated
        most = self._forward.job.max_length
        return [f"{cut:,} of {samples:,} texts are longer than {most:,} tokens, and were cut there"] if cut else []

    def measured(self) -> np.ndarray:
        """[n, layers, width] on the host, the first rows of the first pass."""
        return self._some(self._held_out.trained_on, min(MEASURED_ROWS, self.rows))[0]

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """[n, layers, width] of rows that are not trained on, and int64 [n], their samples."""
        found = self._some(self._held_out, HELD_OUT_ROWS)
        if not len(found[0]):
            raise UserError(
                f"--held_out {self._held_out.share} of the input holds out no row; give a larger share, another "
                "--seed, or more samples"
            )
        return found

    def batches(self, scales: Scales) -> Iterator[Array]:
        """[b, layers, width], without end, from `state` on."""
        devices = self._forward.program.devices
        ahead = _SLABS_AHEAD * self._forward.most_rows
        slots = int(self._window / devices * _SPARE) + 2 * ahead
        ring = Ring(self._forward.job.plan, self.sites, self._forward.program.mesh, slots)
        flow = _Flow(self, ring, scales, self._state)
        number, used = self._state["window"], self._state["batch"]
        while True:
            flow.fill(self._window)
            order = random_order(self._window, self._forward.seed, number)
            where, at = flow.places(self._window)
            following = flow.begin_behind(self._window)
            while used < self._window // self._batch:
                chosen = order[used * self._batch : (used + 1) * self._batch]
                used += 1
                begins = following if used == self._window // self._batch else flow.begin
                done = used == self._window // self._batch
                self._state = {**begins, "window": number + done, "batch": 0 if done else used}
                yield ring.draw(where[chosen], at[chosen])
            flow.drop(self._window)
            number, used = number + 1, 0

    def _some(self, samples: Any, most: int) -> tuple[np.ndarray, np.ndarray]:
        found, of, total = [], [], 0
        forward = self._forward
        for some in chunks(forward.slabs(samples, 0, _PLANNED_FOR_SOME), forward.program.devices):
            for together, captured in forward.compute(some):
                blocks = forward.program.on_host(captured)
                for device, slab in sorted(together.items()):
                    block = blocks[device]
                    rows = [np.asarray(block[site.key], np.float32) for site in self.sites]
                    kept = [np.concatenate([each[i, :n] for i, n in enumerate(slab.counts)]) for each in rows]
                    found.append(np.stack(kept, axis=1))
                    of.append(slab.samples)
                    total += len(slab.samples)
            if total >= most:
                break
        if not found:
            return np.zeros((0, len(self.sites), self.sites[0].width), np.float32), np.zeros(0, np.int64)
        return np.concatenate(found)[:most], np.concatenate(of)[:most]


class _Lengths(Sequence[int]):
    """How many slots each device has free, as it is when it is asked."""

    def __init__(self, free: Sequence[Sequence[int]]) -> None:
        self._free = free

    def __len__(self) -> int:
        return len(self._free)

    def __getitem__(self, device: Any) -> Any:
        return len(self._free[device])


class _Flow:
    """What waits in the ring, in the order in which it came.

    Attributes:
      begin: where the first row that waits lies, as `OnlineRows.state` says it.
    """

    def __init__(self, owner: OnlineRows, ring: Ring, scales: Scales, state: dict[str, Any]) -> None:
        self._owner, self._ring = owner, ring
        self._largest = np.square(scales.largest)
        self._waiting: deque[_Came] = deque()
        devices = owner._forward.program.devices
        self._free = [list(range(ring.slots))[::-1] for _ in range(devices)]
        self.begin = {name: int(state[name]) for name in ("epoch", "slab", "skipped")}
        self._skip = self.begin["skipped"]
        self._chunks = self._from(self.begin["epoch"], self.begin["slab"])

    def fill(self, wanted: int) -> None:
        """Computes until so many rows wait."""
        while sum(len(came.slots) for came in self._waiting) < wanted:
            epoch, slabs = next(self._chunks)
            came = {}
            for together, captured in self._owner._forward.compute(slabs, _Lengths(self._free)):
                came |= self._put(epoch, together, captured)
            self._waiting += [came[slab.number] for slab in slabs]

    def places(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Devices and slots, int32 [count] each, of the first rows that wait."""
        devices = np.concatenate([np.full(len(came.slots), came.device, np.int32) for came in self._waiting])
        return devices[:count], np.concatenate([came.slots for came in self._waiting])[:count]

    def begin_behind(self, count: int) -> dict[str, int]:
        """`begin` when so many rows are dropped."""
        for came in self._waiting:
            if count < len(came.slots):
                return {"epoch": came.epoch, "slab": came.slab, "skipped": came.skipped + count}
            count -= len(came.slots)
            last = came
        return {"epoch": last.epoch, "slab": last.slab, "skipped": last.skipped + len(last.slots)}

    def drop(self, count: int) -> None:
        """The first rows make room."""
        self.begin = self.begin_behind(count)
        while count:
            came = self._waiting.popleft()
            used = min(count, len(came.slots))
            self._free[came.device] += came.slots[:used].tolist()
            count -= used
            if used < len(came.slots):
                left = came._replace(slots=came.slots[used:], skipped=came.skipped + used)
                self._waiting.appendleft(left)

    def _from(self, epoch: int, first: int) -> Iterator[tuple[int, list[Slab]]]:
        """Slabs of this pass from one on, and of those that follow."""
        forward = self._owner._forward
        size = _SLABS_AHEAD * forward.program.devices
        while True:
            some = False
            slabs = forward.slabs(self._owner._held_out.trained_on, epoch)
            for chunk in chunks((slab for slab in slabs if slab.number >= first), size):
                some = True
                yield epoch, chunk
            if not some and not first:
                raise UserError("all samples are held out; give a smaller --held_out, or more samples")
            epoch, first = epoch + 1, 0

    def _put(self, epoch: int, slabs: Mapping[int, Slab], captured: Any) -> dict[int, _Came]:
        """Into the ring, without rows that are left out; by the slab's number."""
        owner, devices = self._owner, len(self._free)
        shape = next(iter(slabs.values())).work.slab.shape
        room, a_row = owner._forward.room(shape), owner._forward.room(shape) // shape.rows
        rows = np.zeros((devices, room), np.int32)
        slots = np.full((devices, room), self._ring.slots, np.int32)
        for device, slab in slabs.items():
            if len(slab.samples) > len(self._free[device]):
                raise UserError(
                    f"the ring of --buffer_rows {owner._window:,} has no room for a slab on one of {devices} devices; "
                    "give more rows"
                )
            real = np.concatenate([np.arange(n) + i * a_row for i, n in enumerate(slab.counts)])
            rows[device, : len(real)] = real
            slots[device, : len(real)] = [self._free[device].pop() for _ in real]
        squares = self._ring.put(captured, rows, slots)
        found = {}
        for device, slab in slabs.items():
            count = len(slab.samples)
            of_slab, mine = squares[device, :count], slots[device, :count]
            finite = np.isfinite(of_slab).all(axis=1)
            kept = finite & (of_slab <= self._largest).all(axis=1)
            owner.read += count
            owner.not_finite += int((~finite).sum())
            owner.left_out += int((finite & ~kept).sum())
            self._free[device] += mine[~kept].tolist()
            mine, skipped = mine[kept], 0
            if self._skip and (epoch, slab.number) == (self.begin["epoch"], self.begin["slab"]):
                skipped = self._skip
                self._free[device] += mine[:skipped].tolist()
                mine, self._skip = mine[skipped:], 0
            found[slab.number] = _Came(epoch, slab.number, skipped, device, mine)
        return found
