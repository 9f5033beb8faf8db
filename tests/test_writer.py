"""The writer's short cuts give what the long way gives: checksums made once, values looked at as bits, buffers lent."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_extract.store.checksums import crc32c_of_end
from jax_extract.store.finite import all_finite
from jax_extract.store.ledger import Ledger
from jax_extract.store.parts import PartContent, Site
from jax_extract.store.sidecar import BLOCK_BYTES, Sidecar
from jax_extract.store.storage.local import Directory
from jax_extract.store.storage.verbs import crc32c
from jax_extract.store.writer import PartWriter, RowPiece

WIDTH = 1_000  # 4,000 bytes a row: no block of 1 MiB ends with one
ROWS = (300, 1, 263, 400)


def _write(root: Path, shard_format: str, values: np.ndarray) -> dict[str, Sidecar]:
    """Two parts of four sites; site i holds `values` + i; a block of every second sample is handed over at once."""
    directory = Directory(root)
    directory.make()
    sites = [Site("after_block", layer, WIDTH) for layer in range(4)]
    identity = {"sites": [{"hook": s.hook, "layer": s.layer, "width": WIDTH} for s in sites]}
    ledger = Ledger.start(directory, {"identity": identity, "numerics": {}, "description": {}})
    writer = PartWriter(ledger, sites, shard_format, "float32", "abc")
    positions = tuple(np.arange(n, dtype=np.int32) for n in ROWS)
    for batch in (1, 2):
        counts = np.arange(len(ROWS))
        ids = tuple(map(str, counts))
        plain = tuple({} for _ in ids)
        lengths = np.array(ROWS, np.int64)
        part = writer.begin(PartContent(batch, 1, 1, counts, ids, positions, positions, lengths, plain, "p"))
        for first in (0, 2):
            start, kept = sum(ROWS[:first]), ROWS[first : first + 2]
            block = np.zeros((2, max(ROWS), WIDTH), np.float32)
            block[0, : kept[0]] = values[start : start + kept[0]]
            block[1, : kept[1]] = values[start + kept[0] : start + sum(kept)]
            pieces = [RowPiece(row, 0, count) for row, count in enumerate(kept)]
            part.append({site.key: block + i for i, site in enumerate(sites)}, pieces, lambda: None)
        part.commit()
    writer.close()
    records = ledger.committed().values()
    return {str(r["batch"]): Sidecar.read(directory, r["sidecar"]["path"], r["sidecar"]["crc32c"]) for r in records}


@pytest.mark.parametrize("shard_format", ["pickle", "npz", "safetensors"])
def test_files_and_blocks_have_the_checksums_of_their_bytes_however_the_rows_came(
    tmp_path: Path, shard_format: str
) -> None:
    values = np.random.default_rng(0).standard_normal((sum(ROWS), WIDTH), np.float32)
    sidecars = _write(tmp_path, shard_format, values)
    for record in Ledger.open(Directory(tmp_path)).committed().values():
        sums = {file["path"]: file["crc32c"] for file in record["files"]}
        for i, array in enumerate(sidecars[str(record["batch"])].arrays):
            content = (tmp_path / array.path).read_bytes()
            assert crc32c(content) == sums[array.path]
            rows = content[array.offset : array.offset + values.nbytes]
            assert rows == (values + np.float32(i)).tobytes()
            starts = range(0, len(rows), BLOCK_BYTES)
            assert list(array.blocks) == [crc32c(rows[start : start + BLOCK_BYTES]) for start in starts]
            assert len(array.blocks) == 4


@pytest.mark.parametrize("size", [0, 1, 7, 4_096, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_the_checksum_of_an_end_follows_from_those_of_beginning_and_whole(size: int) -> None:
    data = np.random.default_rng(size).bytes(size + 1_000)
    for beginning in (0, 1, 1_000):
        whole = data[: beginning + size]
        assert crc32c_of_end(crc32c(whole[:beginning]), crc32c(whole), size) == crc32c(whole[beginning:])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_value_is_known_to_be_finite_or_not(dtype: type) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(every.astype(np.float64))
    assert [all_finite(every[i : i + 1]) for i in range(len(every))] == finite.tolist()
    assert all_finite(every[finite])


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
def test_an_infinite_or_undefined_value_is_seen_among_the_largest_finite_ones(bits: int) -> None:
    values = np.array([0, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF], np.uint32).repeat(1_000)
    assert all_finite(values.view(np.float32))
    values[1_234] = bits
    assert not all_finite(values.view(np.float32))
