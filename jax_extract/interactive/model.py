"""A model that stays loaded, and is asked.

In: a folder, a hub id or a GGUF file. Out: `Model`: `run` for activations, logits and answers under edits, `extract` and
`generate` as the commands do them, without files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jax_extract.devices import compilation_cache
from jax_extract.errors import UserError
from jax_extract.extraction.capture import sites_of
from jax_extract.extraction.jax_backend import JaxBackend
from jax_extract.extraction.prepare import Job
from jax_extract.forward.batches import Batch, batches_of
from jax_extract.forward.edits import Edit, Edits, Placed
from jax_extract.forward.program import ForwardProgram, Inputs, Outputs, Wanted
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.wrapping import Kept, Wrapping
from jax_extract.interactive.outcome import Outcome, ScoredAnswer
from jax_extract.interactive.requests import (
    Capture,
    LogitPositions,
    Text,
    Texts,
    capture_plan,
    logit_positions,
    named_inputs,
    tokenized,
    with_answers,
)
from jax_extract.store.memory import MemorySink
from jax_extract.store.parts import PartContent
from jax_extract.store.reader import Run
from jax_extract.store.writer import RowPiece
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.hooks import HookPoints
from models.ports import longest_sample
from models.positions import Positions

_LOGITS_AT_ONCE = 1 << 27  # values of a device, unless one text alone has more


def load_model(
    model: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    mesh_shape: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    backend: Literal["jax", "torch"] = "jax",
    device: str | None = None,
) -> Model:
    """Loads a model once, all of it and its head.

    Programs are compiled when they are first needed, and kept for the next session as those of the commands are.

    Args:
      model: Hugging Face folder, hub id or .gguf file.
      dtype: of matrix products: bfloat16 on TPU and GPU, float32 on CPU where left out.
      mesh_shape: such as "2,4", data and model; all devices on data where left out.
      adapter: a LoRA or DoRA adapter that is merged into it: folder or hub id.
      revision: of a hub id.
      backend: "torch" computes with Hugging Face's own forward.
      device: of the torch backend: "cpu", "cuda" or "cuda:1".

    Raises:
      UserError: the model is not there, or not one that is computed here; it does not fit; there is no such mesh.
    """
    for name, given, allowed in (
        ("dtype", dtype, (None, "float32", "bfloat16")),
        ("backend", backend, ("jax", "torch")),
    ):
        if given not in allowed:
            raise UserError(f"{name} is {given!r}; expected {' or '.join(map(repr, filter(None, allowed)))}")
    compilation_cache.start()
    opened = JaxBackend.open(mesh_shape, dtype)
    if opened.devices > opened.devices_of_host:
        raise UserError("load_model is for one process; run a program over several hosts with jax-extract extract")
    found = OpenModel.open(str(model), revision, adapter)
    computing = opened.under(found, None)
    weights = Weights(found.checkpoint, found.port, found.config, found.config.num_hidden_layers, head=True)
    params = weights.load(computing.mesh, computing.dtype, computing.layout_of_whole(weights))
    return Model(found, computing, ForwardProgram(found.port, found.config, params, computing.mesh, computing.numerics))


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A loaded model; `load_model` makes one. All texts of a call are computed together, in as few batches as fit."""

    _opened: OpenModel
    _backend: JaxBackend
    _program: ForwardProgram

    def __repr__(self) -> str:
        config = self._opened.config
        return (
            f"Model({self.name!r}, {config.model_type}, {config.num_hidden_layers} layers, d_model {config.hidden_size}, "
            f"{self._backend.dtype} on {self._backend.name})"
        )

    @property
    def name(self) -> str:
        return self._opened.name

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model."""
        return self._opened.tokenizer

    @property
    def config(self) -> Any:
        """Its figures: `num_hidden_layers`, `hidden_size`, `vocab_size` and so on."""
        return self._opened.config

    @cached_property
    def hook_points(self) -> HookPoints:
        """Those that it has, with their TransformerLens names."""
        return dict(self._opened.family.hook_points(self._opened.config))

    def run(
        self,
        texts: Texts,
        *,
        capture: Capture = None,
        positions: str = "all",
        edits: Iterable[Edit] = (),
        logits: LogitPositions = None,
        answers: Sequence[Text] | Text | None = None,
        chat_template: bool = False,
        add_special_tokens: bool | None = None,
    ) -> Outcome:
        """One forward over texts.

        Args:
          texts: strings or lists of token ids, with ids where they are a mapping; else the ids are "0", "1", ….
          capture: hook point -> layers: one, several, or "all"; `{"after_block": [12], "final_norm": None}`.
          positions: of each sample, that are captured; as `--positions` has them.
          edits: changes on the way; those at one hook point act in the order given.
          logits: "last" or "all", or positions of each sample, negative from its end.
          answers: of each text, whose log-probability is wanted; a sample is then a text with its answer behind it. They are
            tokenised by themselves: an answer that begins a word begins with a space.
          chat_template: put each text through the tokenizer's chat template, as a user's turn.
          add_special_tokens: as the tokenizer does, always or never; None: to texts, and not twice.

        Returns:
          An `Outcome`: `out.run.sample("0").get(layer=12)`, `out.logits[0]` float32 [positions, vocabulary],
          `out.answers[0].log_probability`. Where neither logits nor answers are asked for, no block above the deepest
          hook point that is kept is computed.

        Raises:
          UserError: a hook point, layer, position, sample or change that does not exist; an edit that nothing that is
            asked for could show; a text without a token or with more than the model takes.
        """
        started = time.perf_counter()
        wrapping = Wrapping(chat_template, add_special_tokens=add_special_tokens, kept=Kept.from_now_on())
        samples = tokenized(named_inputs(texts), self._opened, wrapping)
        prompts = samples
        plan = capture_plan(capture, positions, self._opened)
        given: list[np.ndarray] = []
        if answers is not None:
            samples, given = with_answers(prompts, answers, self._opened)
        at = logit_positions(logits, samples)
        made = Edits.of(edits, self._opened)
        made.require_seen(plan, logits is not None or answers is not None)
        made.check(samples)
        if not plan.layers and logits is None and answers is None:
            raise UserError("nothing is asked for; give capture=, logits= or answers=")
        wanted = Wanted(plan, logits is not None, answers is not None)
        before = [
            np.arange(len(p), len(p) + len(a)) - 1 for p, a in zip((p.token_ids for p in prompts), given, strict=False)
        ]
        collected = _Collected(self._job(plan), samples)
        none = [np.zeros(0, np.int64)] * len(samples)
        token_ids = [sample.token_ids for sample in samples]
        for batch in self._batches([s.length for s in samples], max(map(len, at)) if wanted.logits else 0, at):
            inputs = Inputs(
                batch.tokens(token_ids),
                batch.lengths(token_ids),
                batch.spread(at, shift=True),
                batch.spread(before or none, shift=True),
                batch.spread(given or none),
            )
            placed = [Placed(row, column, samples[number]) for row, column, number in batch.members]
            interventions = made.interventions(placed, (batch.rows, batch.columns))
            collected.take(batch, self._program.run(wanted, inputs, interventions), [len(each) for each in at], given)
        return collected.outcome(wanted, given, time.perf_counter() - started)

    def _batches(self, lengths: Sequence[int], logits: int, at: Sequence[np.ndarray]) -> list[Batch]:
        defaults = self._backend.defaults
        most = defaults.slab_tokens
        if logits:  # of a batch of rows, whose samples have so many
            share = max(len(each) / length for each, length in zip(at, lengths, strict=True))
            most = min(most, max(1, int(_LOGITS_AT_ONCE / (share * self.config.vocab_size))))
        return batches_of(lengths, self._backend.devices, defaults, most)

    def _job(self, plan: Any) -> Job:
        sites = tuple(sites_of(plan, self._opened.config))
        most = longest_sample(self._opened.config)
        return Job(self._opened, plan, sites, self._backend, most, most)


class _Collected:
    """What comes out of batches, by sample."""

    def __init__(self, job: Job, samples: Sequence[TokenizedSample]) -> None:
        self._job = job
        self._samples = samples
        self._sink = MemorySink(job.sites, job.plan.dtype)
        self._logits: dict[int, np.ndarray] = {}
        self._answers: dict[int, np.ndarray] = {}

    def take(self, batch: Batch, outputs: Outputs, logits: Sequence[int], answers: Sequence[np.ndarray]) -> None:
        positions = self._job.plan.positions
        members = [self._samples[number] for _, _, number in batch.members]
        part = self._sink.begin(_content(members, len(self._sink.parts) + 1, positions))
        if self._job.sites:
            begun = [0] * batch.rows
            pieces = []
            for (row, _, _), sample in zip(batch.members, members, strict=True):
                pieces.append(RowPiece(row, begun[row], positions.rows(sample.length)))
                begun[row] += pieces[-1].count
            blocks = {site.key: outputs.kept[site.hook][self._job.plan.slot(*site.key)] for site in self._job.sites}
            part.append(blocks, pieces, lambda: None)
        if outputs.logits.shape[1]:
            self._logits |= batch.gathered(outputs.logits, logits)
        if outputs.answers.shape[1]:
            self._answers |= batch.gathered(outputs.answers, [len(answer) for answer in answers])

    def outcome(self, wanted: Wanted, answers: Sequence[np.ndarray], seconds: float) -> Outcome:
        job, samples = self._job, self._samples
        metadata: Mapping[str, Any] = {
            **job.identity(),
            **job.description(),
            "total_samples": len(samples),
            "total_tokens": sum(sample.length for sample in samples),
            "numerics": job.backend.fingerprint(),
            "seconds": seconds,
        }
        numbers = range(len(samples))
        logits = [self._logits[number] for number in numbers] if wanted.logits else []
        scored = [ScoredAnswer(answers[i], self._answers[i]) for i in numbers] if wanted.answers else []
        return Outcome(Run(metadata, job.sites, self._sink.parts), logits, scored)


def _content(members: Sequence[TokenizedSample], part: int, positions: Positions) -> PartContent:
    return PartContent(
        batch=1,
        part=part,
        parts_in_batch=1,
        sample_indices=np.array([sample.sample_index for sample in members], np.int64),
        sample_ids=tuple(sample.sample_id for sample in members),
        token_ids=tuple(sample.token_ids for sample in members),
        positions=tuple(positions.of(sample.length) for sample in members),
        full_lengths=np.array([sample.full_length for sample in members], np.int64),
        meta=tuple(sample.meta for sample in members),
        plan="",
    )
