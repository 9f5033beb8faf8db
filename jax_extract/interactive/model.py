"""A model that stays loaded, and is asked.

In: a folder, a hub id or a GGUF file. Out: `Model`: `run` for activations, logits and answers under edits, `extract`
and `generate` as the commands do them, without files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jax_extract.devices import compilation_cache, libtpu
from jax_extract.errors import UserError
from jax_extract.extraction.capture import require_short_enough, sites_of
from jax_extract.extraction.jax_backend import JaxBackend
from jax_extract.extraction.prepare import Job
from jax_extract.extraction.program import CaptureProgram
from jax_extract.forward.batches import Batch, batches_of
from jax_extract.forward.edit import Edit
from jax_extract.forward.edits import Edits, Placed
from jax_extract.forward.gradients import gradients
from jax_extract.forward.metrics import Function, Metric
from jax_extract.forward.program import ForwardProgram, Inputs, Wanted
from jax_extract.forward.suffix import Suffix, SuffixProgram
from jax_extract.forward.sweeps import measure
from jax_extract.generation.answers import Answer
from jax_extract.generation.sampling import Sampling
from jax_extract.inputs.text import named_texts
from jax_extract.inputs.token_table import TokenizedSample
from jax_extract.inputs.wrapping import Kept, Wrapping
from jax_extract.interactive.answering import AnsweringModel, CompiledAnswers
from jax_extract.interactive.collecting import Collected, collected_gradients
from jax_extract.interactive.judged import judged
from jax_extract.interactive.notebook import NOTEBOOK_OPTIONS, extract_config, extracted, live_checkpoint
from jax_extract.interactive.outcome import EditEffects, Gradients, Outcome
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
from jax_extract.layer_words import Layers
from jax_extract.store.reader import Run
from jax_extract.weights.load import Weights
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan
from models.hooks import DEFAULT_HOOK_POINT, HookPoints
from models.ports import hook_width, longest_sample

if TYPE_CHECKING:
    from jax_extract.pytorch.backend import TorchBackend
    from jax_extract.pytorch.forward import TorchForward

_OPTIONS = NOTEBOOK_OPTIONS - frozenset("adapter backend device dtype mesh_shape revision".split())
_LOGITS_AT_ONCE = 1 << 27  # values of a device, unless one text alone has more


def load_model(
    model: Any,
    *,
    tokenizer: Any = None,
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
      model: Hugging Face folder, hub id or .gguf file; or a model of transformers that is in memory, whose tensors are
        used as they are now.
      tokenizer: of a model in memory that did not come from a folder.
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
    libtpu.silence()
    source = live_checkpoint(model, tokenizer) or str(model)
    if backend == "torch":
        if mesh_shape is not None:
            raise UserError("the torch backend has one device; leave mesh_shape out, or use backend='jax'")
        from jax_extract.pytorch.backend import TorchBackend
        from jax_extract.pytorch.forward import TorchSuffix

        torch_backend = TorchBackend.open(device, dtype)
        if not isinstance(source, str):
            raise UserError(
                "the torch backend loads a model by itself; give its folder or hub id, not the loaded model"
            )
        found = OpenModel.open(source, revision, adapter, needs_port=False)
        forward = torch_backend.forward(found)
        return Model(found, torch_backend, forward, TorchSuffix(forward))
    if device is not None:
        raise UserError("device= is of the torch backend; JAX takes all devices that it sees")
    compilation_cache.start()
    opened = JaxBackend.open(mesh_shape, dtype)
    if opened.devices > opened.devices_of_host:
        raise UserError("load_model is for one process; run a program over several hosts with jax-extract extract")
    found = OpenModel.open(source, revision, adapter)
    computing = opened.under(found, None)
    weights = Weights(found.checkpoint, found.port, found.config, found.config.num_hidden_layers, head=True)
    params = weights.load(computing.mesh, computing.dtype, computing.layout_of_whole(weights))
    program = ForwardProgram(found.port, found.config, params, computing.mesh, computing.numerics)
    return Model(found, computing, program, SuffixProgram(program))


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A loaded model; `load_model` makes one. All texts of a call are computed together, in as few batches as fit."""

    _opened: OpenModel
    _backend: JaxBackend | TorchBackend
    _program: ForwardProgram | TorchForward
    _suffix: Suffix

    def __repr__(self) -> str:
        config = self._opened.config
        return (
            f"Model({self.name!r}, {config.model_type}, {config.num_hidden_layers} layers, "
            f"d_model {config.hidden_size}, {self._backend.dtype} on {self._backend.name})"
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
        edits: Edit | Iterable[Edit] | None = (),
        logits: LogitPositions = None,
        answers: Sequence[Text] | Text | None = None,
        chat_template: bool = False,
        add_special_tokens: bool | None = None,
    ) -> Outcome:
        """One forward over texts.

        Args:
          texts: strings or lists of token ids, with ids where they are a mapping; else the ids are "0", "1", ….
          capture: hook point -> layers, as in `{"after_block": [12, -1], "ffn_out": "2-5", "final_norm": None}`; "all"
            is every hook point at every layer, except the attention patterns.
          positions: of each sample, that are captured; as `--positions` has them.
          edits: changes on the way; those at one hook point act in the order given.
          logits: "last" or "all", or positions of each sample; if negative, from the end of the text, behind which its
            answer follows.
          answers: of each text, whose log-probability is wanted; a sample is then a text with its answer behind it.
            They are tokenised by themselves: an answer that begins a word begins with a space.
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
        samples = prompts = self._prompts(texts, chat_template, add_special_tokens)
        plan = capture_plan(capture, positions, self._opened)
        given: list[np.ndarray] = []
        if answers is not None:
            samples, given = with_answers(prompts, answers, self._opened)
        at = logit_positions(logits, samples)
        made = Edits.of(edits, self._opened)
        made.require_seen(plan, logits is not None or answers is not None)
        made.check(samples)
        _require_short_enough(plan, samples)
        if not plan.layers and logits is None and answers is None:
            raise UserError("nothing is asked for; give capture=, logits= or answers=")
        wanted = Wanted(plan, logits is not None, answers is not None)
        before = [np.arange(p.length, s.length) - 1 for p, s in zip(prompts, samples, strict=True)]
        collected = Collected(self._job(plan), samples)
        token_ids = [sample.token_ids for sample in samples]
        for batch in self._batches([s.length for s in samples], max(map(len, at)) if wanted.logits else 0, at):
            inputs = Inputs(
                batch.tokens(token_ids),
                batch.lengths(token_ids),
                batch.spread(at, shift=True),
                batch.spread(before, shift=True),
                batch.spread(given or before),
            )
            placed = [Placed(row, column, samples[number]) for row, column, number in batch.members]
            interventions = made.interventions(placed, (batch.rows, batch.columns), self._backend.devices)
            collected.take(batch, self._program.run(wanted, inputs, interventions), [len(each) for each in at], given)
        return collected.outcome(wanted, given, time.perf_counter() - started)

    def run_edits(
        self,
        texts: Texts,
        edits: Sequence[Edit | Sequence[Edit]],
        metric: Metric | Function,
        *,
        chat_template: bool = False,
        add_special_tokens: bool | None = None,
    ) -> EditEffects:
        """Every edit of every text, each in a forward of its own, judged by one number.

        The blocks below the lowest edit run once, and those above as a batch over edits.

        Args:
          texts: as of `run`.
          edits: each an `Edit`, or several that are made together.
          metric: `answer_log_probability(answers)`, `logit_difference(right, wrong)`, or a pure JAX function of the
            logits float32 [vocabulary] behind the text, which may return arrays. It is compiled anew where it is
            another function.

        Returns:
          `EditEffects`: `values` [edits, texts] and `without` [texts], of no edit.

        Raises:
          UserError: as `run`; an edit that concerns none of the texts.
        """
        prompts = self._prompts(texts, chat_template, add_special_tokens)
        samples, measured = judged(prompts, metric, self._opened)
        sets = [Edits.of(one, self._opened) for one in ([edits] if isinstance(edits, Edit) else edits or ())]
        if not sets:
            raise UserError("there are no edits; give at least one")
        for one in sets:
            one.check(samples)
        values, without = measure(self._suffix, samples, sets, measured, self._backend.devices, self._backend.defaults)
        return EditEffects(values, without)

    def gradient(
        self,
        texts: Texts,
        hook: str | Mapping[str, Any] | Iterable[str],
        layer: int | Iterable[int] | str | None = None,
        metric: Metric | Function | None = None,
        *,
        edits: Edit | Iterable[Edit] | None = (),
        chat_template: bool = False,
        add_special_tokens: bool | None = None,
    ) -> Gradients:
        """The gradient of a number with respect to activations, at every token; any number of sites in one way back.

        Args:
          texts: as of `run`.
          hook: a hook point, or several with their layers as `run` has them in `capture`.
          layer: of the one hook point.
          metric: as of `run_edits`; a function must return one number.
          edits: under which it is taken.

        Returns:
          `Gradients`: `grad.run.sample("0").get(layer=12)` float32 [tokens, width] of d metric / d activation, of the
          text's own tokens, and `grad.values` [texts], the metric itself.

        Raises:
          UserError: as `run`.
        """
        if metric is None:
            raise UserError("a gradient is of a metric; give metric=answer_log_probability(…) or logit_difference(…)")
        capture: Capture = {hook: layer} if isinstance(hook, str) else hook
        if not isinstance(hook, str) and layer is not None:
            raise UserError("give the layers of several hook points with them, as in {'after_block': [3, 4]}")
        prompts = self._prompts(texts, chat_template, add_special_tokens)
        samples, measured = judged(prompts, metric, self._opened)
        plan = capture_plan(capture, "all", self._opened)
        if not plan.layers:
            raise UserError("a gradient is with respect to a hook point; name one")
        made = Edits.of(edits, self._opened)
        made.check(samples)
        _require_short_enough(plan, samples)
        found = gradients(
            *(self._suffix, self._opened.config, samples, plan, made, measured),
            *(self._backend.devices, self._backend.defaults),
        )
        return collected_gradients(self._job(plan), prompts, found)

    def logits_of(self, rows: Any) -> np.ndarray:
        """What the final norm and the head make of rows of the residual stream: the logit lens.

        Args:
          rows: [rows, width], such as those of `after_block`.

        Returns:
          float32 [rows, vocabulary].

        Raises:
          UserError: they have another width.
        """
        width = self.config.hidden_size
        if hasattr(rows, "detach"):
            rows = rows.detach().float().cpu().numpy()
        try:
            values = np.asarray(rows, np.float32)
        except (TypeError, ValueError):
            raise UserError(f"rows are an array [rows, {width}], not {rows!r:.60}") from None
        if values.ndim != 2 or values.shape[1] != width:  # noqa: PLR2004 (rows and width)
            raise UserError(f"rows have the shape {list(values.shape)}; expected [rows, {width}]")
        return self._program.logits_of(values)

    def next_token_losses(self, rows: Any, tokens: Any, reference: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """How well the model predicts tokens from rows of the residual stream behind its last block, in nats.

        Args:
          rows: [rows, width], such as those of `after_block` at the last layer, of a run under edits.
          tokens: the token that follows each of them.
          reference: rows of the same tokens in a run without edits; `rows` where left out.

        Returns:
          float32 [rows] twice: the cross-entropy of each token, and the KL divergence of the prediction from that of
          `reference`. Never are the logits of all rows in memory.

        Raises:
          UserError: they have another width, or other lengths.
        """
        found = np.asarray(rows, np.float32)
        expected = found if reference is None else np.asarray(reference, np.float32)
        following = np.asarray(tokens, np.int32)
        width = self.config.hidden_size
        if found.shape != (len(following), width) or expected.shape != found.shape:
            raise UserError(
                f"rows of shape {list(found.shape)}, reference rows of {list(expected.shape)} and {len(following)} "
                f"tokens do not belong together; expected [tokens, {width}] twice"
            )
        most = max(1, _LOGITS_AT_ONCE // 2 // self.config.vocab_size)
        parts = [slice(start, start + most) for start in range(0, len(found), most)]
        losses = [self._program.next_token_losses(found[some], expected[some], following[some]) for some in parts]
        missed, divergence = np.concatenate([np.zeros((0, 2), np.float32), *losses]).T
        return missed, divergence

    def extract(
        self,
        texts: Sequence[str] | Mapping[str, str],
        *,
        layers: Layers | None = None,
        hook_points: Iterable[str] = (DEFAULT_HOOK_POINT,),
        positions: str = "last",
        edits: Edit | Iterable[Edit] | None = (),
        progress: bool = False,
        **options: Any,
    ) -> Run:
        """Activations of many texts, as `jax_extract.extract` gives them, of the loaded model.

        Args:
          texts, layers, hook_points, positions, progress: as of `jax_extract.extract`.
          edits: changes on the way.
          options: further fields of `ExtractConfig`, but those that say what model it is and how it is loaded.

        Raises:
          UserError: anything about the request that cannot be done.
        """
        config = extract_config(self._opened.checkpoint.source, layers, hook_points, positions, options, _OPTIONS)
        job = Job.of(config, self._opened, self._backend)
        if made := Edits.of(edits, self._opened):
            made.require_seen(job.plan, False)
            job = replace(job, edits=made)
        return extracted(job, config, named_texts(texts), progress, lambda *_: self._capture_program(job))

    def _capture_program(self, job: Job) -> Any:
        if isinstance(self._backend, JaxBackend):
            program = self._program
            assert isinstance(program, ForwardProgram), "load_model sees to it"
            return CaptureProgram(
                self._opened.port,
                self._opened.config,
                program.params,
                job.plan,
                program.mesh,
                self._backend.numerics,
                edits=job.edits,
            )
        assert not isinstance(self._program, ForwardProgram), "load_model sees to it"
        most = job.plan.pattern_tokens
        widths = {hook: hook_width(self._opened.config, hook, most) for hook, _ in job.plan.layers}
        return self._program.capture_program(job.plan, widths, job.edits)

    def generate(
        self,
        texts: Texts,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        edits: Edit | Iterable[Edit] | None = (),
        chat_template: bool = False,
        add_special_tokens: bool | None = None,
    ) -> list[Answer]:
        """Answers, greedily or by sampling, under edits of prompts and of what is answered: steering.

        Args:
          texts: as of `run`.
          max_new_tokens: of an answer.
          temperature, top_k, top_p, seed: as the flags of `jax-extract generate`.
          edits: an edit without positions is made of every token, those of the answer too; positions count on into the
            answer, and negative ones from the end of the prompt.

        Returns:
          In the order of the texts; `answer.text`, `answer.token_ids`, `answer.ended`.

        Raises:
          UserError: as `run`.
        """
        prompts = self._prompts(texts, chat_template, add_special_tokens)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens!r:.60}; it must be a whole number of at least 1")
        made = Edits.of(edits, self._opened, int(max_new_tokens))
        made.check(prompts)
        sampling = Sampling(temperature, top_k, top_p, seed)
        sampling.check()
        longest = max(prompt.length for prompt in prompts)
        if (most := longest_sample(self._opened.config)) < max_new_tokens + longest:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of {max_new_tokens} are more than the {most} that the "
                "model takes; shorten one of them"
            )
        return self._answering.answers(prompts, max_new_tokens, sampling, made)

    @cached_property
    def _answering(self) -> AnsweringModel:
        if not isinstance(self._program, ForwardProgram):
            from jax_extract.pytorch.answering import TorchAnswers

            return TorchAnswers(self._opened, self._program)
        assert isinstance(self._backend, JaxBackend), "load_model sees to it"
        return CompiledAnswers(self._opened, self._backend, self._program.params)

    def _prompts(self, texts: Texts, chat_template: bool, add_special_tokens: bool | None) -> list[TokenizedSample]:
        if add_special_tokens not in (True, False, None):
            raise UserError(f"add_special_tokens is {add_special_tokens!r:.60}; it must be True, False or None")
        wrapping = Wrapping(chat_template, add_special_tokens=add_special_tokens, kept=Kept.from_now_on())
        return tokenized(named_inputs(texts), self._opened, wrapping)

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


def _require_short_enough(plan: CapturePlan, samples: Sequence[TokenizedSample]) -> None:
    lengths = np.array([sample.length for sample in samples])
    mend = "give shorter texts, or extract() with a larger attention_pattern_tokens"
    require_short_enough(plan, [sample.sample_id for sample in samples], lengths, mend=mend)
