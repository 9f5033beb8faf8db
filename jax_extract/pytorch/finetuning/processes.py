"""The processes of one training: `accelerate launch` starts one a GPU; one alone needs no launcher.

In: the environment that the launcher sets. Out: who writes and speaks, and values that all processes agree on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from jax_extract.errors import UserError

T = TypeVar("T")


class SharedRefusal(UserError):
    """What all processes are refused for alike, so that it is enough when the main one says it."""


def rank() -> int:
    """The number of this process; known before the processes have met."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that speaks."""
    return rank() == 0


class Processes:
    """This process among those of its training."""

    def __init__(self, cpu: bool) -> None:
        """Meets the others; `accelerate` finds them by the environment."""
        from accelerate import PartialState

        self._state: Any = PartialState(cpu=cpu)
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.is_main: bool = self._state.is_main_process
        self.device: Any = self._state.device

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the main process, in all of them; a UserError of it is a `SharedRefusal` in all."""
        answer: tuple[str | None, Any] = (None, None)
        if self.is_main:
            try:
                answer = None, work()
            except UserError as error:
                answer = str(error), None
        refusal, value = self._broadcast(answer)
        if refusal is not None:
            raise SharedRefusal(refusal)
        return value

    def _broadcast(self, value: Any) -> Any:
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gathered(self, values: list[T]) -> list[T]:
        """The values of all processes, those of the first one first."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return list(gather_object(values))

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def leave(self) -> None:
        """To be called when all is done."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()
