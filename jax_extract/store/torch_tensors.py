"""Rows as torch tensors that share the memory of their arrays, bfloat16 included.

In: a NumPy array. Out: a tensor. torch is imported when the first one is made, and nowhere else in the store but in
`shuffled.for_torch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from jax_extract.errors import UserError

if TYPE_CHECKING:
    import torch


def require_torch(asked: str) -> None:
    """UserError, which begins with what was asked for, where torch is not installed."""
    try:
        import torch  # noqa: F401 (whether it is there)
    except ModuleNotFoundError as error:
        raise UserError(f"{asked} needs {error.name}, which is not installed: pip install torch") from None


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The array's values as a tensor of the same dtype; UserError where torch is not installed."""
    require_torch("torch=True")
    import torch

    if not array.flags.writeable:  # torch has no such tensors
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:  # torch does not know NumPy's, but its bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
