"""The forward of the door in PyTorch: Hugging Face's own model with its head, looked into and changed by hooks.

In: a model with a head on a device, where its hook points are, batches and interventions as the compiled forward takes
them. Out: the same arrays on the host; metrics of many edits, and gradients, each from a whole forward. Every sample
has a row of its own, padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_extract.errors import UserError
from jax_extract.forward.edits import Edits
from jax_extract.forward.metrics import Function, MetricInputs, of_each, require_one_number
from jax_extract.forward.program import Inputs, Outputs, Wanted
from jax_extract.forward.suffix import Interventions, Rows
from jax_extract.pytorch.changing import Hooked, changed
from jax_extract.pytorch.loading import forget_lengths
from jax_extract.pytorch.program import Selection, TorchProgram, rotated_alike
from models.capture_plan import CapturePlan
from models.interventions import Intervention
from models.ports import Module

_LOGITS_AT_ONCE = 1 << 26  # values, where nobody wants to have them
_CAPS, _FACTORS, _DIVISORS = ("final_logit_softcapping",), ("logit_scale",), ("logits_scaling",)


class TorchForward:
    """Attributes:
    base: what is before the head.
    modules: where its hook points are.
    device: that it lies on.
    """

    def __init__(
        self,
        causal: Any,
        base: Any,
        modules: Mapping[str, Module],
        device: torch.device,
        needs_mask: bool,
        same_rotations_to: int | None,
    ) -> None:
        """Args:
        causal: the model with its head; `base` is what is before that.
        needs_mask, same_rotations_to: see `TorchProgram`.

        Raises:
          ValueError: how it makes logits of its last rows is not known.
        """
        self._causal, self.base = causal, base
        self.modules = modules
        self.device = device
        self._needs_mask = needs_mask
        self._same_to = same_rotations_to
        for parameter in causal.parameters():
            parameter.requires_grad_(False)
        self._require_known_head()

    def run(self, wanted: Wanted, inputs: Inputs, interventions: tuple[Intervention, ...] = ()) -> Outputs:
        """See `ForwardProgram.run`."""
        b, t = inputs.tokens.shape
        kept: dict[str, np.ndarray] = {}
        logits, answers = np.zeros((b, 0), np.float32), np.zeros((b, 0), np.float32)
        for rows, columns in rotated_alike(inputs.lengths[:, 0], t, self._same_to):
            tokens, lengths = inputs.tokens[rows, :columns], inputs.lengths[rows]
            selection = Selection.of_rows(wanted.plan.positions, lengths[:, 0], columns, self.device)
            found: dict[tuple[str, int | None], torch.Tensor] = {}
            looks = [Hooked(*site, _keeping(found, site, selection)) for site in wanted.plan.sites()]
            changes = [intervention.of_rows(rows) for intervention in interventions]
            with torch.inference_mode(), changed(self.base, self.modules, changes, looks):
                x = self._last_rows(tokens, lengths)
                if wanted.logits:
                    some = self.logits(_taken(x, inputs.logits_at[rows])).float().cpu().numpy()
                    logits = _put(logits, some, rows, b)
                if wanted.answers:
                    some = self._answers(x, inputs.answers_at[rows], inputs.answers[rows]).cpu().numpy()
                    answers = _put(answers, some, rows, b)
            for (hooked, layer), value in found.items():
                _keep(kept, wanted, hooked, layer, value.float().cpu().numpy(), rows, b, t)
        return Outputs(kept, logits, answers)

    def measure(
        self, kind: str | Function, tokens: np.ndarray, lengths: np.ndarray, metric: MetricInputs, interventions: Any
    ) -> Any:
        """The metric of each row of tokens int32 [b, t], of lengths [b], under its interventions."""
        with torch.inference_mode():
            return self._measured(kind, tokens, lengths, metric, interventions)[0]

    def differentiate(
        self,
        kind: str | Function,
        layers: Mapping[str, np.ndarray],
        tokens: np.ndarray,
        lengths: np.ndarray,
        metric: MetricInputs,
        interventions: tuple[Intervention, ...],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See `SuffixProgram.differentiate`: the metric of each row [b]; hook point -> float32 [k, b, t, width]."""
        probes: dict[tuple[str, int], torch.Tensor] = {}
        values, total = self._measured(kind, tokens, lengths, metric, interventions, (layers, probes))
        gradients = torch.autograd.grad(total, list(probes.values()), allow_unused=True)
        by_site = dict(zip(probes, gradients, strict=True))
        found = {}
        for hooked, chosen in layers.items():
            each = [by_site[hooked, i] for i in range(len(chosen))]
            found[hooked] = np.stack(
                [
                    (torch.zeros_like(probes[hooked, i]) if one is None else one).float().cpu().numpy()
                    for i, one in enumerate(each)
                ]
            )
        return values, found

    def _measured(
        self,
        kind: str | Function,
        tokens: np.ndarray,
        lengths: np.ndarray,
        metric: MetricInputs,
        interventions: tuple[Intervention, ...],
        probing: tuple[Mapping[str, np.ndarray], dict[Any, torch.Tensor]] | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """The metric of each row, and their sum."""
        if self._same_to is not None and tokens.shape[1] > self._same_to and len(set(lengths.tolist())) > 1:
            raise UserError(
                "this model's rotations depend on the length of a text, and the torch backend takes texts of one "
                "length then; give such, or use backend='jax'"
            )
        if self._same_to is not None:
            tokens = tokens[:, : int(lengths.max())]
        looks: list[Hooked] = []
        if probing is not None:
            layers, probes = probing
            for hook, chosen in layers.items():
                for i, layer in enumerate(chosen):
                    at = None if hook in ("embeddings", "final_norm") else int(layer)
                    looks.append(Hooked(hook, at, _probing(probes, (hook, i))))
        with changed(self.base, self.modules, interventions, looks):
            x = self._last_rows(tokens, lengths[:, None])
            if kind == "answer":
                each = self._answers(x, metric.columns, metric.tokens)
                values = (each * torch.from_numpy(metric.counts).to(each.device)).sum(dim=1)
            else:
                logits = self.logits(_taken(x, metric.columns[:, :1]))[:, 0].float()
                if kind == "difference":
                    both = torch.gather(logits, 1, _indices(metric.tokens, logits.device))
                    values = both[:, 0] - both[:, 1]
                else:
                    assert callable(kind)
                    return _by_jax(kind, logits, wants_gradient=probing is not None)
        return values.detach().float().cpu().numpy(), values.sum()

    def _last_rows(self, tokens: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """What the head is given, [b, t, d]."""
        if self._same_to is not None:
            forget_lengths(self.base)
        given: dict[str, torch.Tensor] = {"input_ids": _indices(tokens, self.device)}
        if self._needs_mask:
            columns = np.arange(tokens.shape[1])[None, :]
            given["attention_mask"] = _indices(columns < np.maximum(lengths, 1), self.device)
        return self.base(**given, use_cache=False).last_hidden_state

    def capture_program(self, plan: CapturePlan, widths: Mapping[str, int], edits: Edits | None) -> TorchProgram:
        """What an extraction runs slabs with, of this model; see `TorchProgram`."""
        same = self._same_to
        return TorchProgram(self.base, self.modules, plan, self.device, widths, self._needs_mask, same, edits)

    def logits_of(self, rows: np.ndarray) -> np.ndarray:
        """See `ForwardProgram.logits_of`."""
        if not (norm := self.modules.get("final_norm")) or not norm.path:
            raise UserError("no port computes this model, so where its final norm lies is not known here")
        with torch.inference_mode():
            given = torch.from_numpy(rows)[None].to(self.device, next(self._causal.parameters()).dtype)
            return self.logits(self.base.get_submodule(norm.path)(given))[0].float().cpu().numpy()

    def next_token_losses(self, rows: np.ndarray, reference: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See `ForwardProgram.next_token_losses`."""
        found, expected = (
            torch.log_softmax(torch.from_numpy(self.logits_of(each)), dim=1) for each in (rows, reference)
        )
        missed = -found.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0]
        return torch.stack([missed, (expected.exp() * (expected - found)).sum(dim=1)], dim=1).numpy()

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows behind the final norm, [b, t, d] -> [b, t, vocabulary]."""
        config = self._causal.config.get_text_config()
        logits = self._causal.get_output_embeddings()(rows)
        for name in _FACTORS:
            logits = logits * (getattr(config, name, None) or 1.0)
        for name in _DIVISORS:
            logits = logits / (getattr(config, name, None) or 1.0)
        for name in _CAPS:
            if cap := getattr(config, name, None):
                logits = torch.tanh(logits / cap) * cap
        return logits

    def _require_known_head(self) -> None:
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            expected = self._causal(input_ids=token, use_cache=False).logits
            got = self.logits(self.base(input_ids=token, use_cache=False).last_hidden_state)
        if not torch.allclose(expected.float(), got.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise ValueError("how it makes logits of its last rows is not known")

    def _answers(self, x: torch.Tensor, columns: np.ndarray, answers: np.ndarray) -> torch.Tensor:
        """The log-probability of given tokens, float32 [b, a]; logits exist for some columns at a time."""
        most = max(1, _LOGITS_AT_ONCE // (x.shape[0] * self._causal.config.get_text_config().vocab_size))
        pieces = []
        for start in range(0, columns.shape[1], most):
            some = slice(start, start + most)
            logits = self.logits(_taken(x, columns[:, some])).float()
            chosen = torch.gather(logits, 2, _indices(answers[:, some], x.device)[:, :, None])[:, :, 0]
            pieces.append(chosen - torch.logsumexp(logits, dim=2))
        return torch.cat(pieces, dim=1)


class TorchSuffix:
    """What `SuffixProgram` does, in whole forwards: torch's model begins at its embeddings."""

    def __init__(self, whole: TorchForward) -> None:
        self._whole = whole

    def enter(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return tokens

    def advance(self, stream: np.ndarray, lengths: np.ndarray, first: int, last: int) -> np.ndarray:
        return stream

    def measure(
        self, kind: str | Function, stream: np.ndarray, first: int, rows: Rows, interventions: Interventions
    ) -> Any:
        return self._whole.measure(kind, stream[rows.text], rows.lengths, rows.metric, interventions)

    def differentiate(
        self,
        kind: str | Function,
        sites: tuple[tuple[str, int], ...],
        layers: Mapping[str, np.ndarray],
        stream: np.ndarray,
        first: int,
        rows: Rows,
        interventions: Interventions,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens = stream[rows.text]
        return self._whole.differentiate(kind, layers, tokens, rows.lengths, rows.metric, interventions)


def _keeping(found: dict[Any, torch.Tensor], key: tuple[str, int | None], selection: Selection) -> Any:
    def keep(x: torch.Tensor) -> torch.Tensor:
        found[key] = selection.of(x).to(torch.float32, copy=True)  # the model may write over its own
        return x

    return keep


def _probing(probes: dict[Any, torch.Tensor], key: tuple[str, int]) -> Any:
    def probe(x: torch.Tensor) -> torch.Tensor:
        probes[key] = torch.zeros_like(x, requires_grad=True)
        return x + probes[key]

    return probe


def _keep(
    kept: dict[str, np.ndarray],
    wanted: Wanted,
    hooked: str,
    layer: int | None,
    values: np.ndarray,
    rows: np.ndarray,
    b: int,
    t: int,
) -> None:
    """Puts the rows of some samples where the compiled forward has them."""
    layers = dict(wanted.plan.layers)[hooked]
    shape = (max(1, len(layers)), b, wanted.plan.positions.slots(t), values.shape[-1])
    kept.setdefault(hooked, np.zeros(shape, np.float32))
    kept[hooked][wanted.plan.slot(hooked, layer), rows, : values.shape[1]] = values


def _put(whole: np.ndarray, some: np.ndarray, rows: np.ndarray, b: int) -> np.ndarray:
    if whole.shape[1:] != some.shape[1:]:
        whole = np.zeros((b, *some.shape[1:]), np.float32)
    whole[rows] = some
    return whole


def _indices(numbers: np.ndarray, device: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(numbers).astype(np.int64)).to(device)


def _taken(x: torch.Tensor, columns: np.ndarray) -> torch.Tensor:
    """x [b, t, d], columns [b, k] -> [b, k, d]."""
    at = _indices(columns, x.device)[:, :, None].expand(-1, -1, x.shape[-1])
    return torch.gather(x, 1, at)


def _by_jax(function: Function, logits: torch.Tensor, wants_gradient: bool) -> tuple[Any, torch.Tensor]:
    """What a function of JAX's makes of logits [b, v], and a tensor whose gradient is that of their sum."""
    given = jnp.asarray(logits.detach().cpu().numpy())
    if not wants_gradient:
        return jax.tree.map(np.asarray, of_each(function, given)), logits.sum()
    require_one_number(function, jax.eval_shape(partial(of_each, function), given), len(given))
    values, back = jax.vjp(partial(of_each, function), given)
    (gradient,) = back(jnp.ones_like(values))
    weights = torch.from_numpy(np.array(gradient)).to(logits.device)
    return np.asarray(values), (logits * weights).sum()
