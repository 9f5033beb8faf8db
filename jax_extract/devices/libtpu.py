"""libtpu on a machine without TPU chips: installed for its compiler, and silent otherwise.

In: nothing. Out: environment variables, set before JAX starts. Without them libtpu asks the network what machine this
is, writes logs, and complains on standard error that it is no TPU VM, whatever JAX is used for.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from pathlib import Path

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-64",  # any: nothing runs, and a compilation names its topology
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for chips, of which there are none
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def is_installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def has_chips() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def silence() -> None:
    """To be called before JAX uses a device; does nothing where there are chips."""
    if is_installed() and not has_chips():
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)


def release_signals() -> None:
    """To be called after libtpu is loaded: being ended is no crash that needs a stack trace of it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python knows nothing of the handler that libtpu has put there
