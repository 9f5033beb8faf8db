"""Hugging Face's forward with hooks: token ids in, captured activations out, nothing compiled.

In: a base model on a device, where its hook points are, a capture plan. Out: what `extraction.backend.Program` asks
for. Every sample has a row of its own, padded on the right: no real token of a causal model looks there. Positions are
selected, means taken and values cast on the device, and copied while the next slab computes. Where rotations depend on
how long a batch is, a sample that is so long is computed with those of its own length alone.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from jax_extract.errors import UserError
from jax_extract.forward.edits import Edits, Placed
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.pytorch.changing import changed
from jax_extract.pytorch.hooks import listen
from jax_extract.pytorch.loading import forget_lengths
from models.capture_plan import CapturePlan
from models.ports import Module
from models.positions import Positions


class _Enough(Exception):
    """All that is wanted was captured: the rest of the forward need not run."""


SiteKey = tuple[str, int | None]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchProgram:
    """Runs slabs on one device.

    Attributes:
      plan, hosts, host, devices_of_host, rows_travel: as of every `Program`; there is one device.
    """

    def __init__(
        self,
        model: Any,
        modules: Mapping[str, Module],
        plan: CapturePlan,
        device: torch.device,
        widths: Mapping[str, int],
        needs_mask: bool,
        same_rotations_to: int | None = None,
        edits: Edits | None = None,
    ) -> None:
        """Args:
        needs_mask: where it is not known that the model is causal in everything it does.
        same_rotations_to: the longest batch that is rotated as shorter ones are; None where all are.
        """
        self.plan = plan
        self.edits = edits
        self._modules = modules
        self.hosts, self.host, self.devices_of_host, self.rows_travel = 1, 0, 1, False
        self._model = model
        self._device = device
        self._widths = widths
        self._needs_mask = needs_mask
        self._same_to = same_rotations_to
        self._dtype = _DTYPES[plan.dtype]
        self._captured: dict[SiteKey, torch.Tensor] = {}
        self._selection: Selection | None = None
        self._handles: list[Any] = []
        self._sites = len(list(plan.sites()))
        for hook, layer in plan.sites():
            self._listen(modules, hook, layer)

    def _listen(self, modules: Mapping[str, Module], hook: str, layer: int | None) -> None:
        module, at = modules[hook], layer
        if hook == "residual_before" and layer is not None and layer == self._model.config.num_hidden_layers:
            # The input of a block that does not run is the output of the one before it.
            module, at = modules["after_block"], layer - 1
        me = weakref.proxy(self)  # else model and program would keep each other, and the next model would lack memory

        def keep(rows: torch.Tensor) -> None:
            me._keep((hook, layer), rows)

        self._handles.append(listen(self._model, module, at, keep, self.plan.pattern_tokens))

    def _keep(self, key: SiteKey, value: torch.Tensor) -> None:
        """Selects and casts on the device, and copies: the model may write over its own."""
        if value.ndim != 3:  # noqa: PLR2004 (batch, tokens, width)
            raise ValueError(f"its {key[0]} has {value.ndim} axes and not batch, tokens and width")
        if value.shape[-1] != self._widths[key[0]]:
            raise ValueError(f"its {key[0]} is {value.shape[-1]} wide and not {self._widths[key[0]]}")
        assert self._selection is not None
        self._captured[key] = self._selection.of(value).to(self._dtype, copy=True)
        if len(self._captured) == self._sites:
            raise _Enough

    def try_out(self) -> None:
        """One token; ValueError where the model does not give what its configuration promises."""
        self.run(np.zeros((1, 1), np.int32), np.ones((1, 1), np.int32))

    def compiled(self, shape: SlabShape) -> None:
        """Nothing is."""

    def close(self) -> None:
        """The model is as it was before."""
        while self._handles:
            self._handles.pop().remove()

    def bytes_on_host(self, shape: SlabShape) -> int:
        return captured_bytes(self.plan, self._widths, shape)

    def run(self, tokens: np.ndarray, lengths: np.ndarray, placed: Iterable[Placed] = ()) -> Any:
        changes = self.edits.interventions(placed, tokens.shape) if self.edits else ()
        groups = rotated_alike(lengths[:, 0], tokens.shape[1], self._same_to)
        try:
            with torch.inference_mode():
                captured = []
                for rows, columns in groups:
                    with changed(self._model, self._modules, [change.of_rows(rows) for change in changes]):
                        captured.append(self._captured_of(tokens[rows, :columns], lengths[rows]))
                if len(captured) == 1:
                    return _OnItsWay(captured[0], self._device)
                return _OnItsWay(self._together(captured, [rows for rows, _ in groups], tokens.shape), self._device)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self._device} has not enough memory for {tokens.shape[0]} rows of {tokens.shape[1]} tokens; give a "
                "smaller --batch_size or --slab_tokens, or --dtype bfloat16"
            ) from None

    def _captured_of(self, tokens: np.ndarray, lengths: np.ndarray) -> dict[SiteKey, torch.Tensor]:
        """Of rows [b, t] that are computed together: [b, slots, width]."""
        if self._same_to is not None:
            forget_lengths(self._model)
        self._selection = Selection.of_rows(self.plan.positions, lengths[:, 0], tokens.shape[1], self._device)
        self._captured = {}
        given: dict[str, torch.Tensor] = {"input_ids": torch.from_numpy(tokens.astype(np.int64)).to(self._device)}
        if self._needs_mask:
            columns = np.arange(tokens.shape[1])[None, :]
            real = columns < np.maximum(lengths, 1)  # a row without any would have nothing to attend to
            given["attention_mask"] = torch.from_numpy(real.astype(np.int64)).to(self._device)
        with contextlib.suppress(_Enough):
            self._model(**given, use_cache=False)
        captured, self._captured = self._captured, {}
        return captured

    def _together(
        self, captured: list[dict[SiteKey, torch.Tensor]], rows: list[np.ndarray], shape: tuple[int, ...]
    ) -> dict[SiteKey, torch.Tensor]:
        """Of all rows of a slab, where they lie in it; what no group has is zero."""
        slots = self.plan.positions.slots(shape[1])
        whole: dict[SiteKey, torch.Tensor] = {}
        for key, first in captured[0].items():
            whole[key] = first.new_zeros((shape[0], slots, first.shape[2]))
            for some, places in zip(captured, rows, strict=True):
                whole[key][torch.from_numpy(places).to(self._device), : some[key].shape[1]] = some[key]
        return whole

    def on_host(self, captured: Any) -> list[Mapping[SiteKey, np.ndarray]]:
        return [captured.arrays()]


def rotated_alike(lengths: np.ndarray, columns: int, same_to: int | None) -> list[tuple[np.ndarray, int]]:
    """Which rows of a slab may be computed together, as (their numbers, how many columns they need).

    Args:
      lengths: int [b], real tokens of each row.
      columns: of the slab.
      same_to: the longest batch that is rotated as shorter ones are; None where all are.
    """
    if same_to is None or columns <= same_to:
        return [(np.arange(len(lengths)), columns)]
    short = lengths <= same_to
    groups = [(np.flatnonzero(short), max(1, int(lengths[short].max())))] if short.any() else []
    return groups + [(np.flatnonzero(lengths == length), int(length)) for length in np.unique(lengths[~short])]


def captured_bytes(plan: CapturePlan, widths: Mapping[str, int], shape: SlabShape) -> int:
    """Bytes of the captures of one slab, as they reach the host; `widths` by hook point."""
    itemsize = 4 if plan.dtype == "float32" else 2
    values = sum(widths[hook] for hook, _ in plan.sites())
    return values * shape.rows * plan.positions.slots(shape.length) * itemsize


@dataclass(frozen=True)
class Selection:
    """Which rows of [b, t, d] are kept.

    Attributes:
      columns: int64 [b, slots]; None where all are, or their mean.
      shares: float32 [b, t - first], of each token in the mean; None where it is none.
      first: the position at which the mean begins.
    """

    columns: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    first: int = 0

    @classmethod
    def of_rows(cls, positions: Positions, lengths: np.ndarray, tokens: int, device: torch.device) -> Selection:
        if positions.kind == "all":
            return cls()
        if positions.kind == "mean":
            first = positions.count
            counts = np.maximum(lengths - first, 1)[:, None]
            shares = (np.arange(tokens - first)[None, :] < counts) / counts
            return cls(shares=torch.from_numpy(shares.astype(np.float32)).to(device), first=first)
        columns = np.zeros((len(lengths), positions.slots(tokens)), np.int64)
        for row, length in enumerate(lengths):
            kept = positions.of(max(int(length), 1))
            columns[row, : len(kept)] = kept
        return cls(torch.from_numpy(columns).to(device))

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [b, t, d] -> [b, slots, d]."""
        if self.shares is not None:
            return torch.einsum("bt,btd->bd", self.shares, x[:, self.first :].float())[:, None]
        if self.columns is None:
            return x
        return torch.gather(x, 1, self.columns[:, :, None].expand(-1, -1, x.shape[-1]))


class _OnItsWay:
    """Captures that are copied to the host, from a GPU while it computes on."""

    def __init__(self, captured: Mapping[SiteKey, torch.Tensor], device: torch.device) -> None:
        self._done: Any = None
        if device.type != "cuda":
            self._tensors = captured
            return
        self._tensors = {
            key: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            for key, value in captured.items()
        }
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(device))

    def arrays(self) -> dict[SiteKey, np.ndarray]:
        if self._done is not None:
            self._done.synchronize()
        return {key: _numpy(value) for key, value in self._tensors.items()}


def _numpy(value: torch.Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
