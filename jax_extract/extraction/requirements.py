"""What a run asks of its input and its machine, refused before anything is written or computed.

In: counts, parts, a place. Out: nothing, or a `UserError` with the mend; and the budget of the host's memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jax_extract.config import ExtractConfig
from jax_extract.errors import UserError
from jax_extract.extraction.loop import STEPS_IN_MEMORY
from jax_extract.extraction.place import Place
from jax_extract.extraction.prepare import Job
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.inputs.planning.windows import WINDOW_SAMPLES, Part
from jax_extract.inputs.sources import Source
from jax_extract.inputs.tokenize import InputCounts
from jax_extract.store.budget import ByteBudget, default_limit
from jax_extract.store.upload import upload_buffer_bytes
from jax_extract.terminal import bytes_text, plural

_SPOOLED_PARTS = 4  # two that are written, and as many that wait to be uploaded and deleted


def require_one_window(samples: int | None) -> None:
    """UserError where a layer's rows would not fit one part."""
    if samples is None or samples > WINDOW_SAMPLES:
        said = "an input of unknown length" if samples is None else f"{samples:,}"
        raise UserError(
            f"--one_file_per_layer takes at most {WINDOW_SAMPLES:,} samples, not {said}; give --n_samples, or leave it "
            "out"
        )


def require_samples(counts: InputCounts, source: Source) -> None:
    if not counts.samples:
        raise UserError(f"{source.name} gave no sample with a token; there is nothing to extract")


def require_rows(parts: Iterable[Part], job: Job) -> None:
    if not any(job.plan.positions.rows_of(part.lengths).any() for part in parts):
        raise UserError(f"no sample is long enough for positions {job.plan.positions}; choose earlier ones")


def require_a_row_each(parts: Iterable[Part], job: Job) -> None:
    """UserError where a layer's one file, which is read as a row a sample, would lack one."""
    positions = job.plan.positions
    short: list[str] = []
    for part in parts:
        if len(places := np.flatnonzero(positions.rows_of(part.lengths) == 0)):
            ids = part.table.sample_ids
            short += [ids[place] for place in places.tolist()]
    if short:
        more = f" (and {plural(len(short) - 1, 'other sample')})" if len(short) > 1 else ""
        raise UserError(
            f"sample {short[0]!r}{more} has no token for {positions}, and one file a layer holds a row of every "
            "sample; leave such samples out, or choose mean or last"
        )


def require_room(place: Place, needed: int, parties: int, largest: int = 0) -> None:
    """UserError where what is to be written by so many processes does not fit; `largest` is what one part takes."""
    free = place.written_to.free_bytes()
    if place.spool is not None:  # every process has a spool of its own
        needed = min(needed, _SPOOLED_PARTS * largest) if place.delete_local else needed // parties
    if free is not None and needed > free:
        raise UserError(
            f"the run needs {bytes_text(needed)} but {place.written_to} has {bytes_text(free)} free; "
            "choose another --activations_dir, fewer layers, fewer --positions or a smaller --capture_dtype"
        )


def host_budget(config: ExtractConfig, job: Job, place: Place, shapes: set[SlabShape]) -> ByteBudget:
    """Room for captured rows on this host; UserError where not even one step fits."""
    step = job.bytes_on_host(shapes) if shapes else 0
    files = len(job.sites) * place.written_to.buffer_bytes
    if place.spool is not None:
        files += upload_buffer_bytes(place.storage)
    if config.host_memory_gb is None:
        return ByteBudget(max(default_limit(), STEPS_IN_MEMORY * step + files))
    limit = int(config.host_memory_gb * 1e9)
    if step + files > limit:
        raise UserError(
            f"one step needs {bytes_text(step + files)} of host memory for what it captures, and --host_memory_gb "
            f"{config.host_memory_gb} allows {bytes_text(limit)}; allow more, or start a run with a smaller "
            "--slab_tokens, fewer layers or fewer --positions"
        )
    return ByteBudget(limit)
