"""jax_extract: a language model's activations, exactly matched to tokens.

`extract(model, texts)` gives them in a notebook, `open_activations(directory)` reads a run that a command wrote,
`load_shard(file)` reads one shard by itself, `__version__` is the installed version. `RepresentationExtractor` and
`LoRARepresentationExtractor` make a row a text of models before and after training, `find_representations(folder)`
finds what was made. Each is imported when it is asked for, so that a command starts at once and can be interrupted from
its first moment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from jax_extract.errors import UserError
    from jax_extract.extraction.notebook import extract
    from jax_extract.post_training.extractors import LoRARepresentationExtractor, RepresentationExtractor
    from jax_extract.post_training.names import Representations, find_representations
    from jax_extract.store.formats import load_shard
    from jax_extract.store.reader import Run, SampleActivations, open_activations

__all__ = [
    "LoRARepresentationExtractor",
    "RepresentationExtractor",
    "Representations",
    "Run",
    "SampleActivations",
    "UserError",
    "extract",
    "find_representations",
    "load_shard",
    "open_activations",
]

_MODULES = {
    "LoRARepresentationExtractor": "post_training.extractors",
    "RepresentationExtractor": "post_training.extractors",
    "Representations": "post_training.names",
    "find_representations": "post_training.names",
    "Run": "store.reader",
    "SampleActivations": "store.reader",
    "UserError": "errors",
    "extract": "extraction.notebook",
    "load_shard": "store.formats",
    "open_activations": "store.reader",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version(__name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
