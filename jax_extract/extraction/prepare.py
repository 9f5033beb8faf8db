"""From a configuration to everything an extraction needs, each thing refused as early as it can be.

In: `ExtractConfig`. Out: a `Job`: an opened model, the capture plan with its sites, the mesh, the numerics,
and from them, when asked for, the batch plan, the weights and the program.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_extract.config import ExtractConfig
from jax_extract.devices.chips import CHIPS
from jax_extract.devices.exhaustion import refusing_exhaustion
from jax_extract.devices.mesh import BATCH_AXES, make_mesh, parse_mesh_shape, platform_of
from jax_extract.devices.planner import Decision, ModelCounts, Request, choose_layout
from jax_extract.devices.platform import device_kind, platform_defaults
from jax_extract.devices.sharding import Layout
from jax_extract.errors import UserError, user_path
from jax_extract.extraction.program import CaptureProgram, captured_bytes
from jax_extract.inputs.plan import Window, plan_windows
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.slabs import PlanSettings, SlabShape
from jax_extract.inputs.tokenize import Continued, InputCounts, TokenizedSample, tokenize
from jax_extract.store.parts import Site
from jax_extract.weights.checkpoint import Checkpoint, open_checkpoint
from jax_extract.weights.load import Weights
from jax_extract.weights.text_part import text_part
from models.accelerated_attention import attention_backend
from models.hooks import HOOK_POINTS, CapturePlan, resolve_hook_points
from models.layers import Numerics
from models.ports import ModelConfig, Port, hook_width
from models.positions import Positions
from models.qwen2_jax_with_hooks import DEFAULT_SAE_LAYERS
from models.registry import port_for

LONGEST_DEFAULT = 8_192

_PACKAGES = ("jax_extract", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class OpenModel:
    """A model whose configuration is understood and whose weights are not loaded yet."""

    checkpoint: Checkpoint
    port: Port
    config: ModelConfig

    @classmethod
    def open(cls, model_path: str, revision: str | None = None, adapter: str | None = None) -> OpenModel:
        if not model_path:
            raise UserError("no model was given; pass --model_path with a folder, a hub id or a .gguf file")
        checkpoint = text_part(open_checkpoint(model_path, revision))
        port = port_for(checkpoint.config)
        if adapter is not None:
            from jax_extract.weights.adapter import open_adapter

            checkpoint = open_adapter(checkpoint, adapter, port)
        return cls(checkpoint, port, port.config(checkpoint.config))

    @cached_property
    def tokenizer(self) -> Any:
        return self.checkpoint.tokenizer()

    @property
    def name(self) -> str:
        """The hub id where there is one, else the name of the folder or file."""
        named = str(self.checkpoint.config.get("_name_or_path") or "")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", named):
            return named
        source = self.checkpoint.source
        path = user_path(source, "--model_path")
        return (path.stem if path.suffix == ".gguf" else path.resolve().name) if path.exists() else source


def choose_layers(wanted: Iterable[int] | None, num_layers: int) -> tuple[int, ...]:
    """The layers to capture: the wanted ones, or 10 to 23 as far as the model has them, else all.

    A list equal to the default counts as the default, so the documented command serves every model.
    """
    chosen = tuple(sorted(set(wanted))) if wanted is not None else None
    if chosen is None or chosen == tuple(DEFAULT_SAE_LAYERS):
        have = tuple(layer for layer in DEFAULT_SAE_LAYERS if layer < num_layers)
        return have or tuple(range(num_layers))
    for layer in chosen:
        if not 0 <= layer < num_layers:
            raise UserError(f"layer {layer} does not exist; the model has layers 0 to {num_layers - 1}")
    return chosen


def capture_plan(
    model: OpenModel,
    layers: Iterable[int] | None,
    hook_points: Iterable[str],
    positions: str,
    capture_dtype: str,
) -> CapturePlan:
    """What is captured, checked against the architecture."""
    num_layers = model.config.num_hidden_layers
    chosen = choose_layers(layers, num_layers)
    captures: list[tuple[str, tuple[int, ...]]] = []
    for hook, named in resolve_hook_points(hook_points, model.port.hook_points(model.config)).items():
        if not HOOK_POINTS[hook].per_layer:
            captures.append((hook, ()))
        else:
            captures.append((hook, chosen if named is None else choose_layers(named, num_layers)))
    return CapturePlan(tuple(captures), Positions.parse(positions), capture_dtype)


def sites_of(plan: CapturePlan, config: ModelConfig) -> list[Site]:
    """Every captured tensor with its width, in file order."""
    return [Site(hook, layer, hook_width(config, HOOK_POINTS[hook].width)) for hook, layer in plan.sites()]


def sequence_limit(wanted: int | None, config: ModelConfig) -> int:
    """Longest sample in tokens."""
    allowed = config.max_position_embeddings
    if wanted is not None and wanted > allowed:
        raise UserError(f"--max_seq_length {wanted} is more than the {allowed} positions this model allows")
    return wanted or min(LONGEST_DEFAULT, allowed)


def open_mesh(mesh_shape: str | None) -> Mesh:
    return make_mesh(parse_mesh_shape(mesh_shape) if mesh_shape else None)


def compute_numerics(dtype: str | None) -> Numerics:
    return Numerics("bfloat16" if (dtype or platform_defaults().dtype) == "bfloat16" else "float32")


def with_attention(numerics: Numerics, mesh: Mesh, config: ModelConfig, samples_a_row: int = 1) -> Numerics:
    """The same, with what computes attention best on these devices, where so many samples may lie in a row."""
    backend = attention_backend(
        platform_of(mesh),
        numerics,
        head_width=config.head_dim,
        soft_cap=config.attention.soft_cap,
        samples_a_row=samples_a_row,
    )
    return dataclasses.replace(numerics, attention=backend.name)


def numerics_fingerprint(numerics: Numerics) -> dict[str, str]:
    """What decides the bits of a row, besides the plan's slab shapes: equal here means equal bytes."""
    return {
        "dtype": numerics.dtype,
        "accumulation": "float32",
        "attention": numerics.attention,
        "parameters": "whole when their layer runs, no reduction across devices",
        "device_kind": device_kind(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
    }


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read.

    Attributes:
      sites: every captured tensor, in file order.
      max_length: longest sample in tokens, what follows its prompt included.
      prompt_length: longest prompt in tokens.
    """

    model: OpenModel
    plan: CapturePlan
    sites: tuple[Site, ...]
    mesh: Mesh
    numerics: Numerics
    max_length: int
    prompt_length: int

    @classmethod
    def open(cls, config: ExtractConfig) -> Job:
        """Opens the model and checks the request against it and against the devices; UserError."""
        model = OpenModel.open(config.model_path, config.revision, config.adapter)
        plan = capture_plan(model, config.layers_to_extract, config.hook_points, config.positions, config.capture_dtype)
        mesh = open_mesh(config.mesh_shape)
        max_length = sequence_limit(config.max_seq_length, model.config)
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
            mesh=mesh,
            numerics=compute_numerics(config.dtype),
        ).under(None)

    def under(self, settings: PlanSettings | None) -> Job:
        """The same job, as it is computed in slabs of a plan with these settings (None: the platform's own)."""
        packed = platform_defaults().packed if settings is None else settings.packed
        samples = (2 if settings is None else settings.rows) if packed else 1
        numerics = with_attention(self.numerics, self.mesh, self.model.config, samples)
        return dataclasses.replace(self, numerics=numerics)

    @property
    def devices_of_host(self) -> int:
        return sum(device.process_index == jax.process_index() for device in self.mesh.devices.flat)

    def bytes_on_host(self, shapes: Iterable[SlabShape]) -> int:
        """What the captures of one step take in this host's memory, at most."""
        return self.devices_of_host * max(map(self._captured_bytes, shapes))

    def _captured_bytes(self, shape: SlabShape) -> int:
        return captured_bytes(self.plan, self.model.config, shape, platform_of(self.mesh))

    def layout(self, weights: Weights, shapes: Iterable[SlabShape]) -> Decision | None:
        """How parameters should lie for slabs of these shapes; None where nothing is known of the device."""
        if (chip := CHIPS.get(device_kind())) is None:
            return None
        shape = max(shapes, key=lambda shape: shape.tokens)  # which takes the most memory
        data, model = (self.mesh.shape[axis] for axis in BATCH_AXES)
        captures = self._captured_bytes(shape)
        return choose_layout(Request(self.counts(weights), chip, data, model, shape.rows, shape.length, captures))

    def counts(self, weights: Weights) -> ModelCounts:
        """What the planner knows of the model."""
        return ModelCounts.of(weights.structure(self.numerics.dtype), self.model.config, weights.num_blocks)

    @property
    def value_bytes(self) -> int:
        return 4 if self.plan.dtype == "float32" else 2

    def plan_settings(self, config: ExtractConfig, frozen: Mapping[str, Any] | None = None) -> PlanSettings:
        """How samples are batched; `frozen` are the settings of a run that is resumed, which devices do not change."""
        defaults = platform_defaults()
        frozen = frozen or {}
        same_rows = frozen.get("rows") == config.batch_size
        return PlanSettings(
            samples_per_batch=frozen["samples_per_batch"] if same_rows else config.batch_size * self.mesh.size,
            rows=config.batch_size,
            slab_tokens=config.slab_tokens or frozen.get("slab_tokens") or defaults.slab_tokens,
            length_multiple=frozen.get("length_multiple") or defaults.length_multiple,
            packed=frozen.get("packed", defaults.packed),
            compile_tokens=frozen.get("compile_tokens", defaults.compile_tokens),
            hosts=frozen.get("hosts") or self.mesh.size // self.devices_of_host,
            max_length=self.max_length,
            positions=self.plan.positions,
            bytes_per_row=max(site.width for site in self.sites) * self.value_bytes,
        )

    def tokenized(
        self, samples: Iterable[Sample], chat_template: bool, counts: InputCounts, continued: Continued | None = None
    ) -> Iterator[TokenizedSample]:
        """Samples as the model sees them, lazily; `counts` tells afterwards what the input was."""
        tokenizer, vocabulary = self.model.tokenizer, self.model.config.vocab_size
        return tokenize(samples, tokenizer, self.prompt_length, chat_template, counts, vocabulary, continued)

    def windows(
        self,
        samples: Iterable[Sample],
        settings: PlanSettings,
        chat_template: bool,
        counts: InputCounts,
        continued: Continued | None = None,
    ) -> Iterator[Window]:
        """Tokenises and plans, lazily; `continued` gives a sample with what follows its prompt."""
        return plan_windows(self.tokenized(samples, chat_template, counts, continued), settings)

    def weights(self) -> Weights:
        """The tensors that will be loaded, checked by name and shape."""
        blocks = self.plan.blocks_needed(self.model.config.num_hidden_layers)
        return Weights(self.model.checkpoint, self.model.port, self.model.config, blocks)

    @refusing_exhaustion()
    def program(self, weights: Weights, shapes: Iterable[SlabShape], first: SlabShape | None = None) -> CaptureProgram:
        """Loads the weights onto the mesh and meanwhile compiles for `first`; this is where the real work begins.

        Args:
          shapes: that a slab may have: parameters lie as suits the largest.
        """
        decision = self.layout(weights, shapes)
        layout = decision.layout if decision else Layout.GATHERED
        params = weights.shapes(self.mesh, self.numerics.dtype, layout)
        program = CaptureProgram(self.model.port, self.model.config, params, self.plan, self.mesh, self.numerics)
        with program.compiling(first):
            program.use(weights.load(self.mesh, self.numerics.dtype, layout))
        return program

    def bytes_stored(self, samples: Iterable[TokenizedSample]) -> int:
        """Bytes of all the rows that these samples give, over all sites."""
        rows = sum(self.plan.positions.rows(sample.length) for sample in samples)
        return rows * sum(site.width for site in self.sites) * self.value_bytes

    def identity(self) -> dict[str, Any]:
        """What of the run decides which rows there are; plain JSON."""
        return {
            "model_type": self.model.config.model_type,
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "hook_points": [hook for hook, _ in self.plan.layers],
            "positions": str(self.plan.positions),
            "capture_dtype": self.plan.dtype,
        }

    def description(self) -> dict[str, Any]:
        """Provenance that may differ between sessions of one run; plain JSON."""
        return {
            "model_name": self.model.name,
            "model_hook_points": dict(self.model.port.hook_points(self.model.config)),
            "model_path": self.model.checkpoint.source,
            "model_revision": self.model.checkpoint.revision,
            "adapter": self.model.checkpoint.adapter,
            "hidden_dim": self.model.config.hidden_size,
            "num_hidden_layers": self.model.config.num_hidden_layers,
            "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "python": platform.python_version(),
        }
