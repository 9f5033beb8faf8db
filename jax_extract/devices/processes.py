"""The processes of one program over several hosts, and how they agree.

In: flags, or what the machine says of itself. Out: `Processes`: how many there are, which one this is, and
the three things they do together: hear the first one's word, hear of each other's mistakes, and meet.
With one process all of them cost nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from jax_extract.errors import UserError

START_SECONDS = 1_800  # a cold restart of a pod brings its hosts up minutes apart
HEARTBEAT_SECONDS = 60
_MESSAGE_BYTES = 2_048


@dataclass(frozen=True)
class Processes:
    """Attributes:
    count: of the program; independent workers are programs of one process each.
    index: of this one, from 0.
    """

    count: int = 1
    index: int = 0

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def of_first(self, value: Callable[[], Any]) -> Any:
        """What `value` gives on the first process, as plain JSON, on all of them; its UserError too."""
        if self.count == 1:
            return value()
        data = b""
        with self.together():
            if self.is_first:
                data = json.dumps(value()).encode()
        from jax.experimental.multihost_utils import broadcast_one_to_all

        size = int(broadcast_one_to_all(np.int64(len(data)).astype(np.int32)))
        padded = np.zeros(max(1, size), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        return json.loads(bytes(np.asarray(broadcast_one_to_all(padded), np.uint8))[:size])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one process refuses, all refuse, each with the same sentence; none is left waiting for it."""
        if self.count == 1:
            yield
            return
        mistake: UserError | None = None
        try:
            yield
        except UserError as error:
            mistake = error
        for index, told in enumerate(self._gather("" if mistake is None else str(mistake) or "refused")):
            if told:
                raise mistake or UserError(f"process {index} says: {told}") from None

    def require_equal(self, what: str, value: str, mend: str) -> None:
        """UserError where the processes do not all hold the same."""
        if self.count > 1 and len(set(self._gather(value))) > 1:
            raise UserError(f"the processes do not have the same {what}; {mend}")

    def any(self, value: bool) -> bool:
        """Whether it is so on any process."""
        return value if self.count == 1 else any(self._gather("x" if value else ""))

    def of_all(self, value: Any) -> list[Any]:
        """What each process says, a small plain JSON value, in their order."""
        return [value] if self.count == 1 else [json.loads(text) for text in self._gather(json.dumps(value))]

    def meet(self) -> None:
        """Waits for all processes."""
        if self.count > 1:
            self._gather("")

    def _gather(self, text: str) -> list[str]:
        from jax.experimental.multihost_utils import process_allgather

        message = np.zeros(_MESSAGE_BYTES, np.uint8)
        data = text.encode()[:_MESSAGE_BYTES]
        message[: len(data)] = np.frombuffer(data, np.uint8)
        gathered = np.asarray(process_allgather(message), np.uint8)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered]


def leave(failure: BaseException) -> NoReturn:
    """Says what failed on this process alone, and ends it without waiting for the others, who wait for it."""
    said = str(failure) or type(failure).__name__
    print(f"error: process {jax.process_index()}: {said}; the other processes end too", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2 if isinstance(failure, UserError) else 1)


def start_processes(mode: str, coordinator: str | None, count: int | None, index: int | None) -> Processes:
    """Joins this process to its program; to be called before any device is used.

    Args:
      mode: `on`: join what the cluster says of itself; `off`: stay alone; `auto`: join on a TPU VM.
      coordinator, count, index: explicit, where the machine cannot tell.

    Raises:
      UserError: the others did not come.
    """
    explicit = coordinator is not None
    if not jax.distributed.is_initialized() and mode != "off" and (explicit or mode == "on" or _is_tpu_vm()):
        # Its handler of SIGTERM would take the place of ours, which commits what is complete.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                coordinator,
                count,
                index,
                initialization_timeout=START_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"this process could not join the others ({reason}); start the same command on every host, with "
                "--coordinator_address HOST:PORT --num_processes N --process_id I where the machine is no TPU pod, "
                "or work alone with --distributed off"
            ) from None
    return Processes(jax.process_count(), jax.process_index())


def _is_tpu_vm() -> bool:
    """Whether this machine has TPU chips that JAX is going to use."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    has_chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return (not platforms or "tpu" in platforms) and has_chips and importlib.util.find_spec("libtpu") is not None
