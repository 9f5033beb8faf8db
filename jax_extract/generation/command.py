"""Inference with answers: every prompt is answered, and then its activations are extracted, with the answer's if asked.

In: `ExtractConfig` with `max_new_tokens`. Out: `answers.jsonl` in the order of the input, for ARC tasks also
`submission.json` and a score; then a run as every extraction writes it. A killed command goes on, by whole batches of
answers. The input has to end: it is answered whole before the first activation is computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.config import ExtractConfig
from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.devices.processes import Processes
from jax_extract.errors import UserError, damage_is_told, user_path
from jax_extract.extraction.command import (
    begin_anew,
    extract_request,
    join_processes,
    open_request,
    require_same_run,
)
from jax_extract.extraction.jax_backend import JaxBackend, numerics_fingerprint
from jax_extract.extraction.model_fields import MODEL_FIELDS, refuse_changed_meaning, understood_fields
from jax_extract.extraction.place import Place, kept_by, local_time
from jax_extract.extraction.prepare import Job, wrapping_of
from jax_extract.extraction.requirements import require_samples
from jax_extract.extraction.summary import tell_input, tell_model, tell_request
from jax_extract.generation import arc
from jax_extract.generation.answers import (
    ANSWERS_FILE,
    BEGIN_ANEW,
    DERIVED,
    KEPT,
    NUMERICS,
    SCORE_FILE,
    SETTINGS_FILE,
    SIZE,
    SUBMISSION_FILE,
    Answer,
    AnswerFiles,
    AnswersBegunMeanwhile,
    Batch,
    batches_of,
    in_order,
    inputs_digest,
    own_first,
)
from jax_extract.generation.program import AnswerProgram
from jax_extract.generation.reading import Reading, readings
from jax_extract.generation.sampling import Sampling
from jax_extract.generation.steps import answer_of, answered, stop_tokens
from jax_extract.inputs.arc_task import ArcTask
from jax_extract.inputs.sources import Source
from jax_extract.inputs.token_table import PROMPT_TOKENS, TokenizedSample
from jax_extract.inputs.tokenize import InputCounts, tokenizer_digest
from jax_extract.inputs.wrapping import Kept
from jax_extract.preemption import on_preemption
from jax_extract.progress import COMPILING, LOADING, Progress
from jax_extract.terminal import Terminal, plural, share_text
from jax_extract.weights.load import Weights
from models.layers import Numerics

_FEW_ENDED = 0.5  # of answers
_ANSWERING = "answering"


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
        if not extracts and config.overwrite and (run := place.find(processes)) and run.run["identity"].get("answers"):
            raise UserError(
                f"{place.storage} holds activations of the answers that --overwrite would remove; choose another "
                "--activations_dir, or overwrite both with jax-extract extract --capture_answers True"
            )
        if extracts and config.overwrite:
            begin_anew(place, processes)
        elif extracts:
            require_same_run(config, processes, place, job)
        if extracts:
            tell_request(job, config, processes.count, terminal)
        else:
            tell_model(job, processes.count, terminal)
        if config.adapter and not config.overwrite:
            begun = processes.of_first(AnswerFiles(place.storage, 0, 0).settings)
            job = job.as_begun_before() if begun and KEPT not in begun else job
        inference = _Inference(config, processes, place, source, job, terminal)
        kept, answers = inference.answers()
        if not extracts:
            return {}
        continued = _Continued(answers) if config.capture_answers else None
        config = dataclasses.replace(config, overwrite=False)  # what was there has gone already
        return extract_request(config, processes, place, source, job, terminal, continued, kept=kept)


@dataclass(frozen=True)
class _Continued:
    """A sample with its answer behind it."""

    answers: Mapping[int, Answer]

    def __call__(self, sample: TokenizedSample) -> TokenizedSample:
        answer = self.answers[sample.sample_index]
        tokens = np.concatenate([sample.token_ids, np.asarray(answer.token_ids, np.int32)])
        meta = {**sample.meta, PROMPT_TOKENS: sample.length}
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

    def answers(self) -> tuple[Kept, dict[int, Answer]]:
        """What is kept from the start, and the answers to every sample with a token, by its place in the input.

        Those that are there already are read.
        """
        files = AnswerFiles(self.place.storage, self.config.max_new_tokens or 0, self.job.model.config.vocab_size)
        if self.config.overwrite:
            self.processes.of_first(files.erase)
        while True:
            try:
                return self._answers(files)
            except AnswersBegunMeanwhile:  # another worker was faster: its clock counts
                continue

    def _answers(self, files: AnswerFiles) -> tuple[Kept, dict[int, Answer]]:
        config, processes = self.config, self.processes
        found = processes.of_first(files.settings) or {}
        kept = self._kept(found)
        with processes.together():
            sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
            sampling.check()
            if not self.source.finite and config.n_samples is None:
                raise UserError("--max_new_tokens needs an input with an end; add --n_samples")
            tasks, solutions = self._tasks_and_solutions()
            counts = InputCounts()
            samples = list(self.job.tokenized(self.source.samples(), wrapping_of(config, kept), counts))
            require_samples(counts, self.source)
            if self.job.edits:
                self.job.edits.check(samples)
            weights = Weights(
                self.job.model.checkpoint, self.job.model.port, self.job.model.config, self._layers, head=True
            )
            self._require_own_input()
        most = config.max_new_tokens or 0
        with processes.together():
            settings = self._settings(weights, samples, sampling, found) | self._kept_settings(samples, found, kept)
        same = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        processes.require_equal("inputs, model, options or library versions", same, "make them the same on every host")
        if processes.of_first(lambda: files.start(settings, config.allow_numeric_change)):
            raise AnswersBegunMeanwhile
        tell_input(self.source, counts, self.job, self.terminal)
        if closed := counts.closed_samples:
            self.terminal.line(
                "note",
                f"in {plural(closed, 'conversation')} the assistant has the last word, and the answer is what follows "
                "that; --text_column messages.0.content asks the first turn alone, and --chat_template_kwargs "
                "'{\"add_generation_prompt\": true}' for one turn more",
            )
        for note in weights.notes:
            self.terminal.line("note", note)
        size = settings[SIZE]
        batches = batches_of(samples, size, self.job.prompt_length)
        numbers = set(processes.of_first(lambda: [b.number for b in batches if files.read(b) is not None]))
        with processes.together():
            there = {batch.number: self._read(files, batch) for batch in batches if batch.number in numbers}
        ordered = own_first(batches, config.worker_id or 0, config.num_workers or 1)
        pending = [batch for batch in ordered if batch.number not in there]
        if pending:
            self._tell(samples, batches, pending, sampling)
            with self.terminal.waiting(LOADING):
                program = self._program(weights, sampling)
            plans = readings(batches, self._backend.devices, self.job.plan_settings(config))
            by_number = {batch.number: plan for batch, plan in zip(batches, plans, strict=True)}
            answerer = _Answerer(self, program, files, most)
            there |= answerer.run([(batch, by_number[batch.number]) for batch in pending])
            counts = answerer.counts
        else:
            counts = _Counts()
        found_answers = {answer.sample_index: answer for some in there.values() for answer in some}
        if processes.is_first:
            prompts = {sample.sample_index: sample for sample in samples}
            self._conclude(files, found_answers, prompts, tasks, solutions, counts)
        processes.meet()
        return kept, found_answers

    def _kept(self, answers: Mapping[str, Any]) -> Kept:
        """Of the answers that are there, else of the activations, else of now."""
        if not answers:
            return kept_by(self.place.find(self.processes), self.processes)
        begun = self.processes.of_first(lambda: local_time(self.place.storage.written_at(SETTINGS_FILE)))
        with self.processes.together(), damage_is_told(self.place.storage.where(SETTINGS_FILE), BEGIN_ANEW):
            return Kept.of_json(answers.get(KEPT), begun and datetime.fromisoformat(begun))

    @property
    def _backend(self) -> JaxBackend:
        assert isinstance(self.job.backend, JaxBackend), "ExtractConfig.check sees to it"
        return self.job.backend

    @property
    def _numerics(self) -> Numerics:
        return self._backend.numerics_of_answers(self.job.model)

    def _require_own_input(self) -> None:
        """UserError where the answers would be written over the input."""
        given = self.config.tasks_file
        if given and any(Path(given).resolve() == Path(self.place.storage.where(name)).resolve() for name in DERIVED):
            raise UserError(
                f"--tasks_file {given} is where answers go; give another --activations_dir, or move the input"
            )

    @property
    def _layers(self) -> int:
        return self.job.model.config.num_hidden_layers

    @cached_property
    def stops(self) -> tuple[int, ...]:
        return stop_tokens(self.job.model)

    def _read(self, files: AnswerFiles, batch: Batch) -> list[Answer]:
        if (answers := files.read(batch)) is None:
            raise UserError(f"{batch.name} is there on the first host and not on this one; give them one place")
        return answers

    def _settings(
        self, weights: Weights, samples: Sequence[TokenizedSample], sampling: Sampling, found: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What decides the answers, and which prompts are answered together."""
        _ = self.job.model.tokenizer.decode  # answers are texts: a model without a tokenizer has none
        return {
            "weights": weights.provenance(),
            "tokenizer_hash": tokenizer_digest(self.job.model.tokenizer),
            "inputs": inputs_digest(samples),
            "max_new_tokens": self.config.max_new_tokens,
            "sampling": dataclasses.asdict(sampling),
            "stops": list(self.stops),
            "dtype": self._backend.dtype,
            NUMERICS: numerics_fingerprint(self._numerics),
            **({"edits": self.job.edits.digest} if self.job.edits else {}),
            SIZE: found.get(SIZE, self.config.batch_size * self._backend.devices),
        }

    def _kept_settings(
        self, samples: Sequence[TokenizedSample], found: Mapping[str, Any], kept: Kept
    ) -> dict[str, Any]:
        """What answers keep from their start; those that were begun before anything was kept go on without.

        UserError where these would be of two models then.
        """
        model, settings = self.job.model, {}
        if not found or KEPT in found:
            settings[KEPT] = kept.as_json()
        elif MODEL_FIELDS not in found:
            longest = max(sample.length for sample in samples) + (self.config.max_new_tokens or 0)
            refuse_changed_meaning(model, longest, self.place.storage.where(SETTINGS_FILE))
        if not found or MODEL_FIELDS in found:
            settings[MODEL_FIELDS] = understood_fields(model, self.job.max_length)
        return settings

    @refusing_exhaustion()
    def _program(self, weights: Weights, sampling: Sampling) -> AnswerProgram:
        model, mesh = self.job.model, self._backend.mesh
        numerics = self._numerics
        params = weights.load(mesh, numerics.dtype, self._backend.layout_of_whole(weights))
        return AnswerProgram(model.port, model.config, params, mesh, numerics, sampling, self.stops)

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
        tasks = self.source.tasks
        return tasks, arc.known_solutions(tasks, user_path(given, "--solutions_file") if given else None)

    def _conclude(
        self,
        files: AnswerFiles,
        answers: Mapping[int, Answer],
        samples: Mapping[int, TokenizedSample],
        tasks: Mapping[str, ArcTask],
        solutions: arc.Solutions,
        counts: _Counts,
    ) -> None:
        """Writes what the answers come to, and tells it."""
        files.put(ANSWERS_FILE, "".join(answer.to_line() for answer in in_order(answers)).encode())
        ended = sum(answer.ended for answer in answers.values())
        told = f"{plural(len(answers), 'answer')}, {share_text(ended / len(answers))} ended by the model"
        told += f"; {counts}" if counts.read else "; all were there already"
        self._advise(ended / len(answers))
        if self.source.kind != "arc":
            self.terminal.line("answered", f"{told}: {self.place.storage.where(ANSWERS_FILE)}")
            return
        metas = ((answer, samples[answer.sample_index].meta) for answer in in_order(answers))
        tried = arc.attempts(
            (
                (meta["task_id"], meta["test_index"]),
                arc.predicted_grid(answer.text, answer.ended, meta, tasks[meta["task_id"]].longest_side),
            )
            for answer, meta in metas
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
                f"{score.tasks_right} of {plural(score.tasks, 'task')}; {score.without_grid} without a grid"
                + (
                    f"; {unknown} without a known solution, not counted"
                    if (unknown := len(tried) - score.inputs)
                    else ""
                ),
            )

    def _advise(self, ended: float) -> None:
        """Where a chat model was not asked as it was trained to be, it hardly ever ends."""
        has_template = bool(getattr(self.job.model.tokenizer, "chat_template", None))
        if has_template and not self.config.chat_template and ended < _FEW_ENDED:
            self.terminal.line("note", "the model's tokenizer has a chat template; --chat_template True asks with it")


@dataclass
class _Counts:
    """What was done: tokens of prompts, tokens of answers, seconds."""

    read: int = 0
    written: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        tokens = f"{plural(self.read, 'token')} read and {self.written:,} written"
        return f"{tokens} in {self.seconds:.1f} s, compiling included"


@dataclass(frozen=True)
class _Answerer:
    """Answers batches, one after the other.

    Attributes:
      most: tokens of an answer.
      counts: so far.
      known: shapes of what was computed already, the programs of which are there.
    """

    inference: _Inference
    program: AnswerProgram
    files: AnswerFiles
    most: int
    counts: _Counts = field(default_factory=_Counts)
    known: set[tuple[int, ...]] = field(default_factory=set)

    def run(self, batches: Sequence[tuple[Batch, Reading]]) -> dict[int, list[Answer]]:
        done: dict[int, list[Answer]] = {}
        processes = self.inference.processes

        def wind_up(_: float) -> str:
            return f"{plural(len(done), 'batch')} of this session answered"

        total = sum(prompt.length + self.most for batch, _ in batches for prompt in batch.samples)
        start = time.monotonic()
        with (
            self.inference.terminal.progress(total, _ANSWERING) as bar,
            on_preemption(wind_up, linger=processes.count > 1 and processes.is_first),
        ):
            for batch, reading in batches:
                if (there := self._by_another(batch)) is not None:
                    bar.total -= sum(prompt.length + self.most for prompt in batch.samples)
                    done[batch.number] = there
                    continue
                answers = self._answers(batch, reading, bar)
                done[batch.number] = self.files.write(batch, answers) if processes.is_first else answers
                bar.total -= sum(self.most - len(answer.token_ids) for answer in answers)
        self.counts.seconds = time.monotonic() - start
        return done

    def _by_another(self, batch: Batch) -> list[Answer] | None:
        """What another independent worker has answered meanwhile."""
        return self.files.read(batch) if self.inference.config.worker_id is not None else None

    def _answers(self, batch: Batch, reading: Reading, bar: Progress) -> list[Answer]:
        pieces = list(
            answered(
                *(self.program, reading, batch.columns, self.most, self.inference.job.edits),
                count=partial(self._count, bar),
                around=partial(self._compiling, bar),
            )
        )
        tokens = np.concatenate(pieces, axis=1)[:, : self.most]
        by_sample = {prompt.sample_index: tokens[place] for place, prompt in reading.prompts()}
        model, stops = self.inference.job.model, self.inference.stops
        return [answer_of(model, stops, prompt, by_sample[prompt.sample_index]) for prompt in batch.samples]

    @contextmanager
    def _compiling(self, bar: Progress, shape: tuple[int, ...]) -> Iterator[None]:
        """Says so where a program is compiled inside, which the first of a shape does."""
        if shape not in self.known:
            bar.say(COMPILING)
        yield
        self.known.add(shape)
        bar.say(_ANSWERING)

    def _count(self, bar: Progress, read: int, written: int) -> None:
        bar.update(read + written)
        self.counts.read += read
        self.counts.written += written
