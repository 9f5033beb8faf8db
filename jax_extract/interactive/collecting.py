"""What comes out of batches, put together by sample.

In: outputs of programs. Out: `Outcome` and `Gradients`, in the order of the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_extract.extraction.prepare import Job
from jax_extract.forward.batches import Batch
from jax_extract.forward.gradients import SampleGradient
from jax_extract.forward.program import Outputs, Wanted
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.interactive.outcome import Gradients, Outcome, ScoredAnswer
from jax_extract.store.memory import MemorySink
from jax_extract.store.parts import PartContent
from jax_extract.store.reader import Run
from jax_extract.store.writer import RowPiece
from models.positions import Positions


class Collected:
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
        metadata = {**_metadata(job, samples), "seconds": seconds}
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


def collected_gradients(job: Job, samples: Sequence[TokenizedSample], found: Iterable[SampleGradient]) -> Gradients:
    """A run whose rows are gradients; the metric of each sample."""
    sink = MemorySink(job.sites, job.plan.dtype)
    values: dict[int, Any] = {}
    for one in found:
        sample = samples[one.sample]
        part = sink.begin(_content([sample], len(sink.parts) + 1, job.plan.positions))
        blocks = {site.key: one.rows[site.hook][job.plan.slot(*site.key)][None] for site in job.sites}
        part.append(blocks, [RowPiece(0, 0, sample.length)], lambda: None)
        values[one.sample] = one.value
    run = Run(_metadata(job, samples), job.sites, sink.parts)
    return Gradients(run, np.array([values[i] for i in range(len(samples))], np.float32))


def _metadata(job: Job, samples: Sequence[TokenizedSample]) -> Mapping[str, Any]:
    return {
        **job.identity(),
        **job.description(),
        "total_samples": len(samples),
        "total_tokens": sum(sample.length for sample in samples),
        "numerics": job.backend.fingerprint(),
    }
