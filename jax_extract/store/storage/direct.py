"""Reads past the page cache, for runs that are too large for it.

In: a local directory. Out: the same directory, whose large reads go from the disk straight to where they are
wanted. The processor copies nothing, and what other programs have in the page cache stays there.
"""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np

from jax_extract.store.storage.local import Directory

PAGE = 4096  # a multiple of every disk's block


def page_memory(size: int) -> np.ndarray:
    """uint8 [size] that begins with a page."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


class DirectDirectory(Directory):
    """A `Directory` that reads past the page cache where the buffer lies in its page as the bytes do in the file."""

    def read_into(self, name: str, offset: int, buffer: memoryview, generation: int | None = None) -> int:
        head, tail = -offset % PAGE, (offset + len(buffer)) % PAGE
        address = np.frombuffer(buffer, np.uint8).ctypes.data if len(buffer) else 0
        if head + PAGE + tail > len(buffer) or (address + head) % PAGE or not hasattr(os, "O_DIRECT"):
            return super().read_into(name, offset, buffer)
        try:
            got = self._read_pages(name, offset, buffer, head, tail)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which says a file system that cannot, or wants other alignment
                raise
            got = 0
        return got if got == len(buffer) else got + super().read_into(name, offset + got, buffer[got:])

    def _read_pages(self, name: str, offset: int, buffer: memoryview, head: int, tail: int) -> int:
        """Reads whole pages, those inside the buffer straight into it; how many bytes of the buffer it got."""
        file = os.open(self.path(name), os.O_RDONLY | os.O_DIRECT)
        try:
            first, last = page_memory(PAGE), page_memory(PAGE)
            inside = buffer[head : len(buffer) - tail]
            pages = [first.data] * bool(head) + [inside] + [last.data] * bool(tail)
            got = os.preadv(file, pages, offset + head - PAGE * bool(head))
        finally:
            os.close(file)
        if head:
            buffer[:head] = first[PAGE - head :].data
            got -= PAGE - head
        if tail:
            buffer[len(buffer) - tail :] = last[:tail].data
        return min(max(got, 0), len(buffer))
