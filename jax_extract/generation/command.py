"""Inference with answers: every prompt is answered, and then its activations are extracted, with the answer's if asked.

In: `ExtractConfig` with `max_new_tokens`. Out: `answers.jsonl` in the order of the input, for ARC tasks also
`submission.json` and a score; then a run as every extraction writes it. A killed command goes on, by whole batches of
answers. The input has to end: it is answered whole before the first activation is computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jax_extract.config import ExtractConfig
from jax_extract.devices.chips import CHIPS
from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.devices.platform import device_kind
from jax_extract.devices.processes import Processes
from jax_extract.devices.sharding import Layout
from jax_extract.errors import UserError, user_path
from jax_extract.extraction.command import (
    begin_anew,
    extract_request,
    join_processes,
    open_request,
    require_same_run,
    require_samples,
)
from jax_extract.extraction.place import Place
from jax_extract.extraction.preemption import on_preemption
from jax_extract.extraction.prepare import Job, numerics_fingerprint, with_attention
from jax_extract.extraction.summary import tell_input, tell_model, tell_request
from jax_extract.generation import arc
from jax_extract.generation.answers import (
    ANSWERS_FILE,
    NUMERICS,
    SCORE_FILE,
    SUBMISSION_FILE,
    Answer,
    AnswerFiles,
    Batch,
    batches_of,
    in_order,
    inputs_digest,
    own_first,
)
from jax_extract.generation.program import NO_TOKEN, STEPS, AnswerProgram
from jax_extract.generation.sampling import Sampling
from jax_extract.inputs.arc import ArcTask, read_tasks
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import InputCounts, TokenizedSample, tokenizer_digest
from jax_extract.terminal import Terminal, plural, share_text
from jax_extract.weights.load import Weights

_SHARE_OF_MEMORY = 0.5  # of a device, that whole parameters may take


def infer(config: ExtractConfig, *, extracts: bool = True, terminal: Terminal | None = None) -> dict[str, Any]:
    """Answers, and extracts unless only answers are wanted; returns what metadata.json says, on the first process.

    Raises:
      UserError: anything the user can mend; no answer that was committed is lost.
    """
    processes = join_processes(config)
    with processes.to_the_end():
        terminal = terminal or Terminal(silent=not processes.is_first)
        place, source, job = open_request(config, processes)
        place.require_shared(processes)
        if config.capture_answers and not extracts:
            raise UserError("--capture_answers is about activations, which generate does not extract; leave it out")
        if extracts and config.overwrite:
            begin_anew(place, processes)
        elif extracts:
            require_same_run(config, processes, place, job)
        if extracts:
            tell_request(job, config, processes.count, terminal)
        else:
            tell_model(job, processes.count, terminal)
        answers = _Inference(config, processes, place, source, job, terminal).answers()
        if not extracts:
            return {}
        continued = _Continued(answers) if config.capture_answers else None
        config = dataclasses.replace(config, overwrite=False)  # what was there has gone already
        return extract_request(config, processes, place, source, job, terminal, continued)


@dataclass(frozen=True)
class _Continued:
    """A sample with its answer behind it."""

    answers: Mapping[int, Answer]

    def __call__(self, sample: TokenizedSample) -> TokenizedSample:
        answer = self.answers[sample.sample_index]
        tokens = np.concatenate([sample.token_ids, np.asarray(answer.token_ids, np.int32)])
        meta = {**sample.meta, "prompt_tokens": sample.length}
        full_length = sample.full_length + len(answer.token_ids)
        return dataclasses.replace(sample, token_ids=tokens, full_length=full_length, meta=meta)


@dataclass(frozen=True)
class _Inference:
    config: ExtractConfig
    processes: Processes
    place: Place
    source: Source
    job: Job
    terminal: Terminal

    def answers(self) -> dict[int, Answer]:
        """Of every sample with a token, by its place in the input; those that are there already are read."""
        config, processes = self.config, self.processes
        with processes.together():
            sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
            sampling.check()
            if not self.source.finite and config.n_samples is None:
                raise UserError("--max_new_tokens needs an input with an end; add --n_samples")
            tasks, solutions = self._tasks_and_solutions()
            counts = InputCounts()
            samples = list(self.job.tokenized(self.source.samples(), config.chat_template, counts))
            require_samples(counts, self.source)
            weights = Weights(
                self.job.model.checkpoint, self.job.model.port, self.job.model.config, self._layers, head=True
            )
        files = AnswerFiles(self.place.storage)
        if config.overwrite:
            processes.of_first(files.erase)
        found = processes.of_first(files.settings) or {}
        with processes.together():
            settings = self._settings(weights, samples, sampling, found)
        same = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        processes.require_equal("inputs, model, options or library versions", same, "make them the same on every host")
        processes.of_first(lambda: files.start(settings, config.allow_numeric_change))
        tell_input(self.source, counts, self.job, self.terminal)
        size = settings["samples_per_batch"]
        batches = batches_of(samples, size, self.job.prompt_length)
        numbers = set(processes.of_first(lambda: [b.number for b in batches if files.read(b) is not None]))
        with processes.together():
            there = {batch.number: self._read(files, batch) for batch in batches if batch.number in numbers}
        ordered = own_first(batches, config.worker_id or 0, config.num_workers or 1)
        pending = [batch for batch in ordered if batch.number not in there]
        if pending:
            self._tell(samples, batches, pending, sampling)
            program = self._program(weights, sampling)
            there |= _Answerer(self, program, files, size).run(pending)
        found_answers = {answer.sample_index: answer for some in there.values() for answer in some}
        if processes.is_first:
            self._conclude(files, found_answers, {sample.sample_index: sample for sample in samples}, tasks, solutions)
        processes.meet()
        return found_answers

    @property
    def _layers(self) -> int:
        return self.job.model.config.num_hidden_layers

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer, as the model says, else its tokenizer."""
        for said in (self.job.model.checkpoint.generation, self.job.model.checkpoint.config):
            if (tokens := said.get("eos_token_id")) is not None:
                return tuple(tokens) if isinstance(tokens, list) else (int(tokens),)
        end = self.job.model.tokenizer.eos_token_id
        return () if end is None else (int(end),)

    def _read(self, files: AnswerFiles, batch: Batch) -> list[Answer]:
        if (answers := files.read(batch)) is None:
            raise UserError(f"{batch.name} is there on the first host and not on this one; give them one place")
        return answers

    def _settings(
        self, weights: Weights, samples: Sequence[TokenizedSample], sampling: Sampling, found: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What decides the answers, and which prompts are answered together."""
        return {
            "weights": weights.provenance(),
            "tokenizer_hash": tokenizer_digest(self.job.model.tokenizer),
            "inputs": inputs_digest(samples),
            "max_new_tokens": self.config.max_new_tokens,
            "sampling": dataclasses.asdict(sampling),
            "stops": list(self.stops),
            "dtype": self.job.numerics.dtype,
            NUMERICS: numerics_fingerprint(with_attention(self.job.numerics, self.job.mesh, self.job.model.config)),
            "samples_per_batch": found.get("samples_per_batch", self.config.batch_size * self.job.mesh.size),
        }

    @refusing_exhaustion()
    def _program(self, weights: Weights, sampling: Sampling) -> AnswerProgram:
        model, mesh = self.job.model, self.job.mesh
        numerics = with_attention(self.job.numerics, mesh, model.config)
        params = weights.load(mesh, numerics.dtype, self._layout(weights))
        return AnswerProgram(model.port, model.config, params, mesh, numerics, sampling, self.stops)

    def _layout(self, weights: Weights) -> Layout:
        """Whole parameters where they fit: every token reads them all, and gathering them takes longer than that."""
        structure = weights.structure(self.job.numerics.dtype)
        stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(structure))
        if (chip := CHIPS.get(device_kind())) is None:  # as an extraction has them
            return Layout.GATHERED
        fits = stored <= _SHARE_OF_MEMORY * chip.memory_bytes
        return Layout.REPLICATED if fits else Layout.GATHERED_BOTH

    # ----------------------------------------------------------------------------------- what is told

    def _tell(
        self,
        samples: Sequence[TokenizedSample],
        batches: Sequence[Batch],
        pending: Sequence[Batch],
        sampling: Sampling,
    ) -> None:
        how = "the likeliest token each time" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
        self.terminal.line(
            "answers",
            f"{plural(len(samples), 'prompt')} in {plural(len(batches), 'batch')}, at most "
            f"{plural(self.config.max_new_tokens or 0, 'token')} each, {how}"
            + (f"; {plural(done, 'batch')} answered already" if (done := len(batches) - len(pending)) else ""),
        )

    def _tasks_and_solutions(self) -> tuple[Mapping[str, ArcTask], arc.Solutions]:
        """Of ARC tasks; of another input there are none."""
        given = self.config.solutions_file
        if self.source.kind != "arc":
            if given:
                raise UserError(f"--solutions_file {given!r} is for ARC tasks, and {self.source.name} holds none")
            return {}, {}
        tasks = read_tasks(user_path(self.config.tasks_file or "", "--tasks_file"), self.config.split)
        return tasks, arc.known_solutions(tasks, user_path(given, "--solutions_file") if given else None)

    def _conclude(
        self,
        files: AnswerFiles,
        answers: Mapping[int, Answer],
        samples: Mapping[int, TokenizedSample],
        tasks: Mapping[str, ArcTask],
        solutions: arc.Solutions,
    ) -> None:
        """Writes what the answers come to, and tells it."""
        files.put(ANSWERS_FILE, "".join(answer.to_line() for answer in in_order(answers)).encode())
        ended = sum(answer.ended for answer in answers.values())
        told = f"{plural(len(answers), 'answer')}, {share_text(ended / len(answers))} ended by the model"
        if self.source.kind != "arc":
            files.put(SUBMISSION_FILE, None)
            files.put(SCORE_FILE, None)
            self.terminal.line("answered", f"{told}: {self.place.storage.where(ANSWERS_FILE)}")
            return
        metas = ((answer, samples[answer.sample_index].meta) for answer in in_order(answers))
        tried = arc.attempts(
            ((meta["task_id"], meta["test_index"]), arc.predicted_grid(answer.text, meta)) for answer, meta in metas
        )
        files.put(SUBMISSION_FILE, json.dumps(arc.submission(tried, tasks)).encode())
        self.terminal.line("answered", f"{told}: {self.place.storage.where(SUBMISSION_FILE)}")
        score = arc.score(tried, solutions)
        known = (json.dumps(dataclasses.asdict(score), indent=1) + "\n").encode()
        files.put(SCORE_FILE, known if score.inputs else None)
        if score.inputs:
            self.terminal.line(
                "score",
                f"{score.right} of {plural(score.inputs, 'test input')} right in two attempts "
                f"({share_text(score.right / score.inputs)}), {score.right_at_once} at once; "
                f"{score.tasks_right} of {plural(score.tasks, 'task')}; {score.without_grid} without a grid",
            )


@dataclass(frozen=True)
class _Answerer:
    """Answers batches, one after the other.

    Attributes:
      size: prompts of a batch.
    """

    inference: _Inference
    program: AnswerProgram
    files: AnswerFiles
    size: int

    def run(self, batches: Sequence[Batch]) -> dict[int, list[Answer]]:
        most = self.inference.config.max_new_tokens or 0
        done: dict[int, list[Answer]] = {}
        total = most * sum(len(batch.samples) for batch in batches)
        processes = self.inference.processes

        def wind_up(_: float) -> str:
            return f"{plural(len(done), 'batch')} of this session answered"

        with (
            self.inference.terminal.progress(total, "answer") as bar,
            on_preemption(wind_up, linger=processes.count > 1 and processes.is_first),
        ):
            for batch in batches:
                if (there := self._by_another(batch)) is not None:
                    done[batch.number] = there
                    continue
                tokens = np.concatenate(list(self._steps(batch, most, bar)), axis=1)[:, :most]
                answers = [self._answer(s, row) for s, row in zip(batch.samples, tokens, strict=False)]
                done[batch.number] = self.files.write(batch, answers) if processes.is_first else answers
                bar.total -= sum(most - len(answer.token_ids) for answer in done[batch.number])
        return done

    def _by_another(self, batch: Batch) -> list[Answer] | None:
        """What another independent worker has answered meanwhile."""
        return self.files.read(batch) if self.inference.config.worker_id is not None else None

    @refusing_exhaustion()
    def _steps(self, batch: Batch, most: int, bar: Any) -> Iterator[np.ndarray]:
        """int32 [rows, STEPS] until all answers have ended or are as long as they may be."""
        devices = self.inference.job.mesh.size
        tokens = np.zeros((-(-self.size // devices) * devices, batch.columns), np.int32)
        lengths, samples = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
        for row, sample in enumerate(batch.samples):
            tokens[row, : sample.length], lengths[row] = sample.token_ids, sample.length
            samples[row] = sample.sample_index
        columns = batch.columns + -(-most // STEPS) * STEPS
        state = self.program.prompts(tokens, lengths, samples, columns)
        for _ in range(0, most, STEPS):
            state, told, unfinished = self.program.answer(state)
            piece = np.asarray(told)
            bar.update(int(np.sum(piece[: len(batch.samples)] != NO_TOKEN)))
            yield piece
            if not int(unfinished):
                return

    def _answer(self, sample: TokenizedSample, row: np.ndarray) -> Answer:
        tokens = tuple(int(token) for token in row[row != NO_TOKEN])
        ended = bool(tokens) and tokens[-1] in self.inference.stops
        text = self.inference.job.model.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return Answer(sample.sample_index, sample.sample_id, sample.length, tokens, ended, text)
