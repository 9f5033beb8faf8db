"""The input that a configuration names.

In: `ExtractConfig`. Out: a `Source`, whose fingerprint knows what of the configuration changes its samples.
"""

from __future__ import annotations

import dataclasses

from jax_extract.config import ExtractConfig
from jax_extract.inputs.sources import Source, open_source


def source_named(config: ExtractConfig) -> Source:
    """See `open_source`."""
    source = open_source(
        config.tasks_file,
        config.dataset,
        n_tasks=config.n_tasks,
        n_samples=config.n_samples,
        encoder=config.grid_encoder,
        seed=config.seed,
        split=config.split,
        dataset_config=config.dataset_config,
        text_column=config.text_column,
        id_column=config.id_column,
        skip_bad_tasks=config.skip_bad_tasks,
    )
    if (most := config.max_new_tokens) is None:
        return source
    of_source = source.fingerprint  # answers leave less room to prompts

    def known() -> str | None:
        return (found := of_source()) and f"{found}, --max_new_tokens {most}"

    return dataclasses.replace(source, fingerprint=known)
