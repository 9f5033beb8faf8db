"""Extractors as objects: one model, and the representations of texts in memory or in a folder.

In: a model (and an adapter), how it is computed, how a text's tokens become one row. Out: a `Run`, or a folder with
`layer_0.pt`, …, `final_hidden_states.pt` and metadata.json. One forward serves all layers: rows leave the device as
they are computed, and nothing of a layer is held until the others are done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError, user_path
from jax_extract.extraction.command import extract_to_directory
from jax_extract.extraction.prepare import Job
from jax_extract.extraction.summary import captures_text, slower_text
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.sources import Source
from jax_extract.inputs.text import named_texts
from jax_extract.interactive.notebook import extract
from jax_extract.layer_words import Layers, LayerWord, layer_words
from jax_extract.post_training.adapter_weights import FOLDER, Matrices, adapter_weights, save_adapter_weights
from jax_extract.post_training.pooling import DEFAULT_POOLING, begun_with, pooling_of, pooling_text
from jax_extract.store.reader import Run
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.terminal import Terminal
from jax_extract.weights.adapter import find_adapter
from jax_extract.weights.open_model import OpenModel

Texts = Iterable[str] | Mapping[str, str] | Iterable[Sample]


@dataclass(frozen=True)
class RepresentationExtractor:
    """Representations of a causal language model, one row a text and layer.

    Attributes:
      model_path: Hugging Face folder, hub id, or .gguf file.
      revision: branch, tag or commit of a hub id.
      layers: as `extract` takes them: 12, -1, "10-23" or a list of these; by default all.
      hook_points: by default the output of every block and the final hidden states.
      pooling: `mean_from:k`, the mean over a text's tokens from token k on, `mean`, over all of them, or `last`, its
        last token; by default `mean_from:1`, and in a folder that was begun, what it was begun with.
      max_length: of a text in tokens; longer ones are cut at the end.
      batch_size: texts a device computes at once, at least.
      backend: torch, by forward hooks, or jax.
      device: of the torch backend.
      dtype: of the computation; capture_dtype of what is kept.
    """

    model_path: str
    _: KW_ONLY
    revision: str | None = None
    layers: Layers | None = None
    hook_points: Sequence[str] | str = ("after_block", "final_norm")
    pooling: str | None = None
    max_length: int | None = None
    batch_size: int = 8
    backend: Literal["torch", "jax"] = "torch"
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    capture_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        """UserError for what no representations can be had of."""
        given = {"model_path": str(self.model_path), "hook_points": _words(self.hook_points)}
        if self.layers is not None:
            given["layers"] = layer_words(self.layers, "layers")
        if self.pooling is not None:
            given["pooling"] = pooling_of(self.pooling)
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """UserError where the model, its weights by name and shape, or the device are not what they should be."""
        self._job.weights()
        ids = self.tokenizer()("a")["input_ids"]
        if ids and ids[-1] == self.tokenizer().eos_token_id:
            raise UserError(
                f"the tokenizer of {self.model_path} puts its end token behind every text, where no model is trained "
                "to read it; set add_eos_token to false in its tokenizer_config.json"
            )

    @property
    def computed_in(self) -> str:
        """The dtype of matrix products."""
        return self._job.backend.dtype

    def tokenizer(self) -> Any:
        """The model's, of transformers."""
        return self._job.model.tokenizer

    def description(self) -> str:
        """What is captured and how it is computed, for a person."""
        backend = self._job.backend
        return f"{captures_text(self._job.plan)}; in {backend.dtype} with {backend.name} on {backend.device_kind}"

    def note(self) -> str | None:
        """Where another backend would be faster."""
        return slower_text(self._job)

    @cached_property
    def _job(self) -> Job:
        return Job.open(self._config())

    @property
    def most_tokens(self) -> int:
        """The longest text that the model takes."""
        return self._model.config.max_position_embeddings

    def extract(self, texts: Sequence[str] | Mapping[str, str]) -> Run:
        """In memory: `run.sample("0").get(layer=3)` -> [1, width].

        Args:
          texts: with ids where it is a mapping; else the ids are "0", "1", ….

        Raises:
          UserError: anything that the user can mend.
        """
        options = {name: value for name, value in self._options().items() if name not in _OF_RUNS}
        run = extract(self.model_path, texts, layers=self._layers(), **options)
        for sample in run.samples():
            if not len(sample.positions):
                raise UserError(
                    f"text {sample.sample_id!r} has no token for {options['positions']}; leave it out, or choose mean "
                    "or last"
                )
        return run

    def save(
        self,
        texts: Texts,
        folder: str | Path,
        *,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        terminal: Terminal | None = None,
    ) -> dict[str, Any]:
        """Into a folder, a file a layer; resumed where it was begun, nothing done where it is whole.

        Args:
          texts: as for `extract`; or samples, whose ids and further values are kept.
          about: what metadata.json should say besides; plain JSON.
          overwrite: compute anew what is there.
          terminal: where lines and the bar go; by default none are shown.

        Returns:
          What metadata.json says.

        Raises:
          UserError: anything that the user can mend; nothing that was committed is lost.
        """
        samples = _samples(texts)
        _require_json(about)
        source = Source(f"{len(samples)} texts", "text", True, lambda: iter(samples))
        config = replace(self._config(), activations_dir=str(folder), overwrite=overwrite)
        if self.pooling is None and not overwrite and (begun := begun_with([folder])):
            config = replace(config, positions=begun)
        said = {"pooling": config.positions, "pooling_is": pooling_text(config.positions), **(about or {})}
        return extract_to_directory(config, terminal or Terminal(silent=True), source, said)

    def _config(self) -> ExtractConfig:
        config = ExtractConfig(model_path=self.model_path, layers_to_extract=self._layers(), **self._options())
        config.check()
        return config

    def _options(self) -> dict[str, Any]:
        """Fields of `ExtractConfig`."""
        return {
            "revision": self.revision,
            "hook_points": tuple(self.hook_points),
            "positions": self.pooling or DEFAULT_POOLING,
            "max_seq_length": self.max_length,
            "batch_size": self.batch_size,
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "capture_dtype": self.capture_dtype,
            "shard_format": "pt",
            "one_file_per_layer": True,
            "distributed": "off",
            "allow_numeric_change": True,  # a run of one part is computed in one session, and tells in which
        }

    def _layers(self) -> tuple[LayerWord, ...]:
        words = layer_words(self.layers)
        return ("all",) if words is None else words

    @cached_property
    def _model(self) -> OpenModel:
        """Without an adapter."""
        return OpenModel.open(self.model_path, self.revision, None, needs_port=self.backend == "jax")


@dataclass(frozen=True)
class LoRARepresentationExtractor(RepresentationExtractor):
    """The same of a model under an adapter, whose matrices are saved too.

    Attributes:
      adapter: a folder that PEFT saved, or a hub id; `model_path` is the model it was trained on.
    """

    adapter: str

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adapter", str(self.adapter))

    def adapter_weights(self) -> Matrices:
        """Layer -> `A` or `B` -> module -> matrix: A [rank, inputs], B [outputs, rank]."""
        return adapter_weights(find_adapter(self.adapter)[0])

    def save(
        self,
        texts: Texts,
        folder: str | Path,
        *,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        terminal: Terminal | None = None,
    ) -> dict[str, Any]:
        """As `RepresentationExtractor.save`, with `adapter_weights/lora_A_layer_0.pt` and so on beside the rows."""
        if str(folder).startswith(BUCKET_SCHEME):
            raise UserError(
                f"{folder} is in a bucket, where adapter weights are not written; give a folder, then upload"
            )
        metadata = super().save(texts, folder, about=about, overwrite=overwrite, terminal=terminal)
        save_adapter_weights(find_adapter(self.adapter)[0], user_path(str(folder), "folder") / FOLDER)
        return metadata

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "adapter": self.adapter}


_OF_RUNS = frozenset(("shard_format", "one_file_per_layer", "distributed", "allow_numeric_change"))


def _samples(texts: Texts) -> list[Sample]:
    if isinstance(texts, str | Mapping):
        return list(named_texts(texts))  # type: ignore[arg-type] (it tells who gives others)
    given = list(texts)
    samples = [text for text in given if isinstance(text, Sample)]
    return samples if len(samples) == len(given) else list(named_texts(given))  # type: ignore[arg-type] (as above)


def _words(hook_points: Sequence[str] | str | None) -> tuple[str, ...]:
    return (hook_points,) if isinstance(hook_points, str) else tuple(hook_points or ())


def _require_json(about: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(dict(about or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"about cannot be written as JSON ({error}); give plain values") from None
