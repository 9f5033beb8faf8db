"""How long this process has been alive, its imports included; and which import it need not wait for.

In: what the system says of the process. Out: seconds.
"""

from __future__ import annotations

import os
import sys
import time

_IMPORTED = time.monotonic()


def seconds_since_start() -> float:
    """Seconds since the process began; where the system does not tell, since this module was imported."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            began = int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), in clock ticks since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED


def leave_torch_out() -> None:
    """Has transformers give its tokenizers without importing torch, which takes seconds where it is installed.

    For a process that computes in JAX alone: torch cannot be imported in it any more. Nothing is done where it was.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type] (as the import system has it of what is not there)
