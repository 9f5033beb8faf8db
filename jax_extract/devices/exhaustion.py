"""A device that has too little memory, in one sentence.

In: whatever XLA raises while parameters are placed or a step is compiled, run or fetched. Out: a `UserError` where
that was for want of memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax

from jax_extract.errors import UserError


@contextlib.contextmanager
def refusing_exhaustion() -> Iterator[None]:
    """Around device work; a decorator too.

    Raises:
      UserError: a device's memory does not suffice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"allocat\w+ ([\d,.]+ ?\w*)", str(error))
        raise UserError(
            "a device has too little memory for the parameters and a step"
            + (f" (it wanted {wanted[1]} more)" if wanted else "")
            + "; give a smaller --slab_tokens or --batch_size, fewer layers or positions, or a --mesh_shape with a "
            "longer model axis"
        ) from None
