"""Files of `torch.save`, written and read without torch: an uncompressed zip of a pickle and of the bytes of tensors.

In: a dictionary of arrays, strings, numbers and lists. Out: the file; and from one, the dictionary. `head` and `member`
are for who writes the bytes of a tensor as they come.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from jax_extract.store import torch_pickle

_ENCRYPTED = 1  # bit of a member's flags


def save(file: BinaryIO, content: Mapping[str, Any]) -> None:
    """Writes the whole file; arrays become tensors, in float32, float16, bfloat16, float64, int64 or int32."""
    arrays = [value for value in content.values() if isinstance(value, np.ndarray)]
    keys = iter(range(len(arrays)))
    described = {
        name: torch_pickle.Tensor(str(next(keys)), str(value.dtype), value.shape)
        if isinstance(value, np.ndarray)
        else value
        for name, value in content.items()
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        head(archive, described)
        for key, array in enumerate(arrays):
            with archive.open(member(f"data/{key}"), "w", force_zip64=True) as target:
                target.write(np.ascontiguousarray(array).view(np.uint8).data)


def load(file: BinaryIO) -> dict[str, Any]:
    """The dictionary with arrays, bfloat16 as `ml_dtypes.bfloat16`.

    Raises:
      pickle.UnpicklingError, zipfile.BadZipFile, KeyError: it is none, or holds anything else; nothing of it is run.
    """
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
        root = archive.namelist()[0].partition("/")[0]

        def read(name: str) -> bytes:
            # Nothing that is small in the file is large in memory.
            if members[name].compress_type != zipfile.ZIP_STORED or members[name].flag_bits & _ENCRYPTED:
                raise zipfile.BadZipFile(f"its member {name[:80]!r} is compressed or encrypted")
            return archive.read(name)

        return torch_pickle.loads(read(f"{root}/data.pkl"), lambda key: read(f"{root}/data/{key}"))


def head(archive: zipfile.ZipFile, content: Mapping[str, Any]) -> None:
    """What comes before the bytes of tensors, which `content` has as `torch_pickle.Tensor`s."""
    for name, data in {"data.pkl": torch_pickle.dumps(content), "byteorder": b"little", "version": b"3\n"}.items():
        with archive.open(member(name), "w") as target:
            target.write(data)


def member(name: str) -> zipfile.ZipInfo:
    """An entry of the zip; equal content makes equal bytes."""
    return zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
