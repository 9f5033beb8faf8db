"""From a configuration to everything an extraction needs, each thing refused as early as it can be.

In: `ExtractConfig`. Out: a `Job`: an opened model, the capture plan with its sites, the backend, and from them, when
asked for, the batch plan, the weights and the program.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.accounting import StepCounts
from jax_extract.extraction.backend import Backend, Loadable, Program, Say, silent
from jax_extract.extraction.capture import (
    capture_plan,
    captures_patterns,
    require_short_enough,
    sequence_limit,
    sites_of,
)
from jax_extract.extraction.cost import StepCost
from jax_extract.extraction.jax_backend import JaxBackend
from jax_extract.extraction.schedule import steps
from jax_extract.forward.edit_files import read_edits
from jax_extract.forward.edits import Edits
from jax_extract.inputs.contexts import ContextCounts, ContextForm, KnownContexts, join
from jax_extract.inputs.planning.slabs import SINCE_VERSION_2, WHOLE_INPUT, PlanSettings, SlabShape
from jax_extract.inputs.planning.windows import WINDOW_SAMPLES, Part, Window, plan_tables, shapes_of
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.token_table import TokenizedSample, TokenTable, windows_of
from jax_extract.inputs.tokenize import Continued, tokenized_tables
from jax_extract.inputs.tokenizing.counts import InputCounts
from jax_extract.inputs.tokenizing.passing import KnownTables
from jax_extract.inputs.tokenizing.share import Share
from jax_extract.inputs.wrapping import Kept, Wrapping
from jax_extract.store.parts import Site
from jax_extract.weights.checkpoint import Checkpoint
from jax_extract.weights.open_model import OpenModel
from models.capture_plan import CapturePlan
from models.ports import longest_sample

_UNCUT = sys.maxsize  # tokens of a document
_WINDOW_TOKENS = 1 << 26  # of contexts that are planned together: 256 MB
_PACKAGES = ("jax_extract", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read.

    Attributes:
      sites: every captured tensor, in file order.
      max_length: longest sample in tokens, what follows its prompt included.
      prompt_length: longest prompt in tokens.
      contexts: what samples are joined into, where they are.
      captured_answer: tokens that may follow a prompt and are captured with it, at most.
      edits: that the forward makes; None where it makes none.
    """

    model: OpenModel
    plan: CapturePlan
    sites: tuple[Site, ...]
    backend: Backend
    max_length: int
    prompt_length: int
    contexts: ContextForm | None = None
    captured_answer: int = 0
    edits: Edits | None = None

    @classmethod
    def open(cls, config: ExtractConfig, checkpoint: Checkpoint | None = None) -> Job:
        """Opens the model and checks the request against it and against the devices; UserError.

        Args:
          checkpoint: of the model, where `config.model_path` is only its name.
        """
        backend = _open_backend(config)
        needs_port = backend.name == "jax"
        if checkpoint is not None and not needs_port:
            raise UserError("--backend torch loads a model by itself; give its folder or hub id, not the loaded model")
        model = OpenModel.open(checkpoint or config.model_path, config.revision, config.adapter, needs_port)
        return cls.of(config, model, backend)

    @classmethod
    def of(cls, config: ExtractConfig, model: OpenModel, backend: Backend) -> Job:
        """The same of an opened model, whatever the configuration says of one."""
        plan = capture_plan(
            model,
            config.layers_to_extract,
            config.hook_points,
            config.positions,
            config.capture_dtype,
            config.attention_pattern_tokens,
        )
        contexts = _contexts(config, model, plan)
        max_length = contexts.tokens if contexts else sequence_limit(config.max_seq_length, model.config)
        new_tokens = config.max_new_tokens or 0
        if new_tokens >= max_length:
            raise UserError(
                f"--max_new_tokens {new_tokens} leaves no room for a prompt: prompt and answer have {max_length} "
                "tokens together (--max_seq_length, and what the model allows)"
            )
        return cls(
            model=model,
            plan=plan,
            sites=tuple(sites_of(plan, model.config)),
            max_length=max_length,
            prompt_length=max_length - new_tokens,
            backend=backend,
            contexts=contexts,
            captured_answer=new_tokens if config.capture_answers else 0,
            edits=_edits(config, model, plan),
        ).under(None)

    def under(self, settings: PlanSettings | None) -> Job:
        """The same job, as it is computed in slabs of a plan with these settings (None: the platform's own)."""
        return dataclasses.replace(self, backend=self.backend.under(self.model, settings))

    def as_begun_before(self) -> Job:
        """The same job with the tokens that a run has which keeps nothing from its start."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, tokens_of_base=True))

    def bytes_on_host(self, shapes: Collection[SlabShape]) -> int:
        """What the captures of one step take in this host's memory, at most."""
        most = max(self.backend.captured_bytes(self.plan, self.model, shape) for shape in shapes)
        travel = self.backend.rows_travel(self.plan, self.model, shapes)
        return (self.backend.devices if travel else self.backend.devices_of_host) * most

    @property
    def value_bytes(self) -> int:
        return 4 if self.plan.dtype == "float32" else 2

    def plan_settings(self, config: ExtractConfig, frozen: Mapping[str, Any] | None = None) -> PlanSettings:
        """How samples are batched; `frozen` are the settings of a run that is resumed, which devices do not change."""
        defaults = self.backend.defaults
        frozen = frozen or {}
        same_rows = frozen.get("rows") == config.batch_size
        batches = WHOLE_INPUT // config.batch_size if config.one_file_per_layer else self.backend.devices
        settings = PlanSettings(
            samples_per_batch=frozen["samples_per_batch"] if same_rows else config.batch_size * batches,
            rows=config.batch_size,
            slab_tokens=config.slab_tokens or frozen.get("slab_tokens") or defaults.slab_tokens,
            length_multiple=frozen.get("length_multiple") or defaults.length_multiple,
            packed=frozen.get("packed", defaults.packed),
            compile_tokens=frozen.get("compile_tokens", defaults.compile_tokens),
            hosts=frozen.get("hosts") or self.backend.devices // self.backend.devices_of_host,
            max_length=self.max_length,
            positions=self.plan.positions,
            bytes_per_row=max(site.width for site in self.sites) * self.value_bytes,
        )
        if frozen and "version" not in frozen:
            return settings
        return dataclasses.replace(settings, **{**self._whole_mesh(settings), **_of_version_2(frozen)})

    def _whole_mesh(self, settings: PlanSettings) -> dict[str, Any]:
        """What a new plan knows of the devices that it is made for."""
        backend = self.backend
        # A row of a usual sample or two; how rows lie in the end is not known yet.
        slab = SlabShape(settings.slab_tokens, 1, settings.rows)
        return {
            "version": 2,
            "devices_of_host": backend.devices_of_host,
            "samples_a_row": backend.defaults.samples_a_row,
            "pair_cost": backend.pair_cost(self.model, self.plan),
            "attention_block": backend.attention_block,
            "rows_stay": settings.hosts > 1 and not backend.rows_travel(self.plan, self.model, [slab]),
        }

    def step_counts(self, parts: Sequence[Part]) -> StepCounts:
        """What all devices compute of these parts."""
        backend = self.backend
        hosts = backend.devices // backend.devices_of_host
        travel = backend.rows_travel(self.plan, self.model, shapes_of(parts))
        together = steps(parts, hosts, backend.devices_of_host, travel)
        return StepCounts.of(together, backend.devices, backend.pair_cost(self.model, self.plan))

    def tokenized(
        self, samples: Iterable[Sample], wrapping: Wrapping, counts: InputCounts, continued: Continued | None = None
    ) -> Iterator[TokenizedSample]:
        """Samples as the model sees them, one by one; see `tables`."""
        return itertools.chain.from_iterable(self.tables(samples, wrapping, counts, continued))

    def tables(
        self,
        samples: Iterable[Sample],
        wrapping: Wrapping,
        counts: InputCounts,
        continued: Continued | None = None,
        share: Share | None = None,
        known: Sequence[TokenTable] = (),
    ) -> Iterator[TokenTable]:
        """Samples as the model sees them, lazily; `counts` tells afterwards what the input was.

        Args:
          share: see `tokenized_tables`.
          known: those with which they begin, which are not given again, nor tokenised.

        Raises:
          UserError: besides what reading refuses, a sample that is too long for what is captured of it.
        """
        tables = self._tables(samples, wrapping, counts, continued, share, known)
        if not captures_patterns(self.plan) or self.contexts:  # whose length is known
            return tables
        return self._short_enough(tables, 0 if continued else self.captured_answer)

    def _short_enough(self, tables: Iterable[TokenTable], answer: int) -> Iterator[TokenTable]:
        for table in tables:
            require_short_enough(self.plan, table.sample_ids, table.lengths, answer)
            yield table

    def _tables(
        self,
        samples: Iterable[Sample],
        wrapping: Wrapping,
        counts: InputCounts,
        continued: Continued | None,
        share: Share | None,
        known: Sequence[TokenTable],
    ) -> Iterator[TokenTable]:
        tokenizer, vocabulary = self.model.tokenizer, self.model.config.vocab_size
        if self.contexts is None:
            most = self.prompt_length
            passed = KnownTables(known) if known else None
            return tokenized_tables(samples, tokenizer, most, wrapping, counts, vocabulary, continued, share, passed)
        assert isinstance(counts, ContextCounts)
        read = InputCounts(chained=counts.chained)
        bare = dataclasses.replace(wrapping, add_special_tokens=False)  # contexts have theirs
        there = KnownContexts(known) if known else None
        passed = there and there.documents
        documents = tokenized_tables(samples, tokenizer, _UNCUT, bare, read, vocabulary, share=share, known=passed)
        return join(documents, self.contexts, counts, read, there)

    def windows(
        self,
        samples: Iterable[Sample],
        settings: PlanSettings,
        wrapping: Wrapping,
        counts: InputCounts,
        continued: Continued | None = None,
        share: Share | None = None,
    ) -> Iterator[Window]:
        """Tokenises and plans, lazily; `continued` gives a sample with what follows its prompt."""
        tables = self.tables(samples, wrapping, counts, continued, share)
        return plan_tables(windows_of(tables, self.window_samples), settings)

    @property
    def window_samples(self) -> int:
        """Of a window, at most."""
        if self.contexts is None:
            return WINDOW_SAMPLES
        return min(WINDOW_SAMPLES, max(1, _WINDOW_TOKENS // self.contexts.tokens))  # nothing is gained by sorting many

    def new_counts(self, settings: PlanSettings | None = None) -> InputCounts:
        """For `tables` to fill, and for `windows` with these settings."""
        chained = settings is not None and settings.version == 1
        return InputCounts(chained=chained) if self.contexts is None else ContextCounts(chained=chained)

    def weights(self) -> Loadable:
        """The tensors that will be loaded, checked by name and shape."""
        return self.backend.weights(self.model, self.plan)

    def program(
        self,
        weights: Loadable,
        shapes: Collection[SlabShape],
        needed: Sequence[SlabShape] = (),
        say: Say = silent,
    ) -> Program:
        """See `Backend.program`."""
        travel = self.backend.rows_travel(self.plan, self.model, shapes)
        return self.backend.program(self.model, self.plan, weights, shapes, needed, travel, self.edits, say)

    @cached_property
    def step_cost(self) -> StepCost:
        return StepCost.of(self.model, self.plan)

    def bytes_stored(self, lengths: np.ndarray) -> int:
        """Bytes of all the rows that samples of these lengths give, over all sites."""
        rows = int(self.plan.positions.rows_of(lengths).sum())
        return rows * sum(site.width for site in self.sites) * self.value_bytes

    def identity(self) -> dict[str, Any]:
        """What of the run decides which rows there are; plain JSON."""
        return {
            "model_type": self.model.config.model_type,
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "hook_points": [hook for hook, _ in self.plan.layers],
            "positions": str(self.plan.positions),
            "capture_dtype": self.plan.dtype,
            **({"attention_pattern_tokens": self.plan.pattern_tokens} if captures_patterns(self.plan) else {}),
            **({"contexts": self.contexts.as_json()} if self.contexts else {}),
            **({"edits": self.edits.digest} if self.edits else {}),
        }

    def description(self) -> dict[str, Any]:
        """Provenance that may differ between sessions of one run; plain JSON."""
        return {
            "model_name": self.model.name,
            "model_hook_points": dict(self.model.family.hook_points(self.model.config)),
            "model_path": self.model.checkpoint.source,
            "model_revision": self.model.checkpoint.revision,
            "adapter": self.model.checkpoint.adapter,
            **({"edits": self.edits.described} if self.edits else {}),
            "hidden_dim": self.model.config.hidden_size,
            "num_hidden_layers": self.model.config.num_hidden_layers,
            "packages": {name: importlib.metadata.version(name) for name in (*_PACKAGES, *self.backend.packages)},
            "python": platform.python_version(),
        }


def _of_version_2(frozen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: frozen[name] for name in SINCE_VERSION_2 if name in frozen}


def wrapping_of(config: ExtractConfig, kept: Kept) -> Wrapping:
    """How texts are put to the model."""
    return Wrapping(
        config.chat_template, config.system_prompt, config.template_variables, config.add_special_tokens, kept
    )


def _open_backend(config: ExtractConfig) -> Backend:
    if config.backend == "torch":
        from jax_extract.pytorch.backend import TorchBackend

        return TorchBackend.open(config.device, config.dtype)
    return JaxBackend.open(config.mesh_shape, config.dtype)


def _edits(config: ExtractConfig, model: OpenModel, plan: CapturePlan) -> Edits | None:
    """Those of --edits; UserError where the model lacks what they name, or nothing that is kept shows one."""
    if config.edits is None:
        return None
    edits = Edits.of(read_edits(config.edits), model, config.max_new_tokens or 0)
    edits.require_seen(plan, config.max_new_tokens is not None)
    return edits


def _contexts(config: ExtractConfig, model: OpenModel, plan: CapturePlan) -> ContextForm | None:
    """What samples are joined into; None where each stays by itself. UserError where the model cannot take that."""
    if config.context_tokens is None:
        return None
    if config.context_tokens > (allowed := longest_sample(model.config)):
        raise UserError(
            f"--context_tokens {config.context_tokens} is more than the {allowed} positions this model allows; give at "
            f"most {allowed}"
        )
    if captures_patterns(plan) and config.context_tokens > plan.pattern_tokens:
        raise UserError(
            f"--context_tokens {config.context_tokens} is more than the {plan.pattern_tokens} tokens that "
            f"attention_pattern is kept of; give --attention_pattern_tokens {config.context_tokens}, or less"
        )
    form = ContextForm.of(config.context_tokens, config.context_start, config.context_separator, model.tokenizer)
    for name, token in (("start", form.start), ("separator", form.separator)):
        if token is not None and token >= model.config.vocab_size:
            raise UserError(
                f"--context_{name} puts the token id {token} there but the model knows 0 to "
                f"{model.config.vocab_size - 1}; the tokenizer is of another model, or give --context_{name} none"
            )
    return form
