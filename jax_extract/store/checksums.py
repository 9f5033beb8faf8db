"""Arithmetic of CRC32C: the checksum of the end of something from the checksums of its beginning and its whole.

In: checksums and lengths. Out: checksums, without looking at a byte again. A CRC is linear over GF(2): what
zeros behind a message do to its checksum is a 32 x 32 matrix of bits, one for each number of zeros.
"""

from __future__ import annotations

from functools import cache

_CASTAGNOLI = 0x82F63B78  # the polynomial of CRC32C, lowest power in the highest bit

Matrix = tuple[int, ...]  # 32 columns: what becomes of a checksum that has only this bit


def crc32c_of_end(beginning: int, whole: int, size: int) -> int:
    """CRC32C of the last `size` bytes of something whose CRC32C is `whole`, and `beginning` without them."""
    return whole ^ _with_zeros_behind(beginning, size)


def _with_zeros_behind(checksum: int, size: int) -> int:
    """The part that a beginning has in the checksum of a whole that is `size` bytes longer."""
    power = 0
    while size:
        if size & 1:
            checksum = _times(_zero_bytes(power), checksum)
        size >>= 1
        power += 1
    return checksum


@cache
def _zero_bytes(power: int) -> Matrix:
    """For 2 ** power bytes."""
    if power:
        half = _zero_bytes(power - 1)
    else:
        bit: Matrix = (_CASTAGNOLI, *(1 << i for i in range(31)))
        two = tuple(_times(bit, column) for column in bit)
        half = tuple(_times(two, column) for column in two)  # half a byte
    return tuple(_times(half, column) for column in half)


def _times(matrix: Matrix, vector: int) -> int:
    product = 0
    for column in matrix:
        if not vector:
            break
        if vector & 1:
            product ^= column
        vector >>= 1
    return product
