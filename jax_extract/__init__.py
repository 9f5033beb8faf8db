"""jax_extract: a language model's activations, exactly matched to tokens.

`extract(model, texts)` gives them in a notebook, `open_activations(directory)` reads a run that a
command wrote, `load_shard(file)` reads one shard by itself.
"""

from jax_extract.errors import UserError
from jax_extract.extraction.notebook import extract
from jax_extract.store.formats import load_shard
from jax_extract.store.reader import Run, SampleActivations, open_activations

__all__ = ["Run", "SampleActivations", "UserError", "extract", "load_shard", "open_activations"]
