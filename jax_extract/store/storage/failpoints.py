"""Places at which a test kills the process: every step between a row in memory and a part that is there.

In: the environment variable JAX_EXTRACT_FAILPOINT. Out: nothing, or SIGKILL, which leaves no time to tidy
up. `NAME:before:3` and `NAME:after:3` kill around the third time that the step NAME is taken; `list:FILE`
kills nothing and writes down each step taken, so that a test can find out which there are.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

VARIABLE = "JAX_EXTRACT_FAILPOINT"

_NOTHING: AbstractContextManager[None] = nullcontext()


def step(name: str) -> AbstractContextManager[None]:
    """To be put around one step of the write path; costs next to nothing where no test asks for it."""
    wanted = os.environ.get(VARIABLE)
    return _NOTHING if wanted is None else _Armed(name, wanted)


_taken: Counter[str] = Counter()
_lock = threading.Lock()


class _Armed(AbstractContextManager[None]):
    def __init__(self, name: str, wanted: str) -> None:
        self._name = name
        self._wanted = wanted

    def __enter__(self) -> None:
        with _lock:
            _taken[self._name] += 1
            self._number = _taken[self._name]
            if self._wanted.startswith("list:"):
                with Path(self._wanted.removeprefix("list:")).open("a") as file:
                    file.write(f"{self._name}:{self._number}\n")
        self._kill_if("before")

    def __exit__(self, *_: object) -> None:
        self._kill_if("after")

    def _kill_if(self, when: str) -> None:
        if self._wanted == f"{self._name}:{when}:{self._number}":
            os.kill(os.getpid(), signal.SIGKILL)
