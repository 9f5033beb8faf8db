"""From the flags of `sae train --online` to the rows that a model gives.

In: `SaeTrainConfig`. Out: `OnlineRows`; the model's weights are read when its first rows are asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.named_source import source_named
from jax_extract.extraction.prepare import Job
from jax_extract.layer_words import layer_words
from jax_extract.sae.config import SaeTrainConfig
from jax_extract.sae.online.forward import Forward
from jax_extract.sae.online.rows import OnlineRows
from jax_extract.sae.sources import HeldOut
from jax_extract.store.parts import Site
from models.hooks import resolve_hook_points

_OF_INPUT = """model_path adapter revision tasks_file dataset dataset_config split text_column n_samples chat_template
    context_tokens max_seq_length dtype mesh_shape""".split()


def open_online(config: SaeTrainConfig, say: Callable[[str], None]) -> OnlineRows:
    """UserError where the model or its input is none, or rows of several widths are asked for."""
    if config.training_rows is None:
        raise UserError("--training_rows is not given; say how many rows a model is to give to --online")
    if not config.model_path:
        raise UserError("--online needs --model_path, the model whose activations are trained on")
    extract = ExtractConfig(
        **{name: getattr(config, name) for name in _OF_INPUT},
        layers_to_extract=layer_words(config.layers, "--layers"),
        hook_points=tuple(filter(None, (config.hook, config.target_hook))),
        positions=config.positions or "from:1",
    )
    extract.check()
    source = source_named(extract)
    job = Job.open(extract)
    if job.backend.devices > job.backend.devices_of_host:
        raise UserError("--online is for one process with any number of devices; leave the coordinator's flags out")
    forward = Forward(job, extract, source, config.seed[0], say)
    held_out = HeldOut(config.held_out, config.seed[0])
    sites = _sites(config, job)
    return OnlineRows(forward, sites, config.batch_size, config.buffer_rows, held_out, config.training_rows)


def _sites(config: SaeTrainConfig, job: Job) -> list[Site]:
    """Of hook, and then of target_hook."""
    known = job.model.family.hook_points(job.model.config)
    halves: list[list[Site]] = []
    for name in filter(None, (config.hook, config.target_hook)):
        found = list(resolve_hook_points([name], known))
        if len(found) > 1:
            raise UserError(f"{name!r} names {len(found)} hook points; name one")
        halves.append([site for site in job.sites if site.hook == found[0]])
    sites = [site for half in halves for site in half]
    if len({tuple(site.layer for site in half) for half in halves}) > 1:
        raise UserError(f"{config.target_hook} has no layers as {config.hook} has them; a transcoder is of one layer")
    if other := next((site for site in sites if site.width != sites[0].width), None):
        raise UserError(
            f"{other.hook} has {other.width} values a row, and {sites[0].hook} {sites[0].width}; give those of one "
            "width"
        )
    return sites
