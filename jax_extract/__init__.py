"""jax_extract: a language model's activations, exactly matched to tokens.

`load_model(folder)` keeps a model and runs it with `Edit`s; `extract(model, texts)` gives activations in a notebook,
`open_activations(directory)` reads a run that a command wrote, `load_shard(file)` reads one shard by itself,
`__version__` is the installed version. `RepresentationExtractor` and `LoRARepresentationExtractor` make a row a text of
models before and after training, `find_representations(folder)` finds what was made. `train_saes(run, folder)` trains
sparse autoencoders, `SparseAutoencoder.open(folder)` reads one. Each is imported when it is asked
for, so that a command starts at once and can be interrupted from its first moment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from jax_extract.errors import UserError
    from jax_extract.forward.edit import Edit
    from jax_extract.forward.metrics import answer_log_probability, logit_difference
    from jax_extract.interactive.model import Model, load_model
    from jax_extract.interactive.notebook import extract
    from jax_extract.interactive.outcome import EditEffects, Gradients, Outcome, ScoredAnswer
    from jax_extract.post_training.extractors import LoRARepresentationExtractor, RepresentationExtractor
    from jax_extract.post_training.names import Representations, find_representations
    from jax_extract.sae.autoencoder import SparseAutoencoder
    from jax_extract.sae.notebook import train_saes
    from jax_extract.store.formats import load_shard
    from jax_extract.store.reader import Run, SampleActivations, open_activations

__all__ = [
    "Edit",
    "EditEffects",
    "Gradients",
    "LoRARepresentationExtractor",
    "Model",
    "Outcome",
    "RepresentationExtractor",
    "Representations",
    "Run",
    "SampleActivations",
    "ScoredAnswer",
    "SparseAutoencoder",
    "UserError",
    "answer_log_probability",
    "extract",
    "find_representations",
    "load_model",
    "load_shard",
    "logit_difference",
    "open_activations",
    "train_saes",
]

_MODULES = {
    "Gradients": "interactive.outcome",
    "EditEffects": "interactive.outcome",
    "logit_difference": "forward.metrics",
    "answer_log_probability": "forward.metrics",
    "Edit": "forward.edit",
    "Model": "interactive.model",
    "Outcome": "interactive.outcome",
    "ScoredAnswer": "interactive.outcome",
    "load_model": "interactive.model",
    "LoRARepresentationExtractor": "post_training.extractors",
    "RepresentationExtractor": "post_training.extractors",
    "Representations": "post_training.names",
    "find_representations": "post_training.names",
    "Run": "store.reader",
    "SampleActivations": "store.reader",
    "SparseAutoencoder": "sae.autoencoder",
    "UserError": "errors",
    "extract": "interactive.notebook",
    "load_shard": "store.formats",
    "open_activations": "store.reader",
    "train_saes": "sae.notebook",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version(__name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
