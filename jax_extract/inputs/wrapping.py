"""What is put around a text before the model sees it: special tokens, or a chat template with a system turn.

In: what the user asked for, and what a run keeps from its start. Out: a `Wrapping`, which `tokenize` goes by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Kept:
    """What a run keeps from its start, so that the same command makes the same tokens on another day.

    Attributes:
      clock: what a chat template is told that asks for the time: the local time, without a zone; None lets it ask.
      one_opening: a text that begins with what the tokenizer puts before every text gets no second one. Runs that
        were begun before this was so go on as they began.
      fields: samples keep the other fields of their rows, likewise.
    """

    clock: datetime | None = None
    one_opening: bool = True
    fields: bool = True

    @classmethod
    def from_now_on(cls) -> Kept:
        return cls(datetime.now().replace(microsecond=0))

    @classmethod
    def of_json(cls, said: Mapping[str, Any] | None, begun: datetime | None = None) -> Kept:
        """Of a run; where it says nothing, as it was before runs kept anything, on the day that it was begun.

        Raises:
          TypeError, ValueError, KeyError: somebody has edited it.
        """
        if said is None:
            return cls(begun, one_opening=False, fields=False)
        clock = None if said["clock"] is None else datetime.fromisoformat(said["clock"])
        return cls(clock, bool(said["one_opening"]), bool(said.get("fields")))

    def as_json(self) -> dict[str, Any]:
        clock = None if self.clock is None else self.clock.isoformat()
        # Only where it is so: runs that were begun before have it not, and are compared.
        return {"clock": clock, "one_opening": self.one_opening, **({"fields": True} if self.fields else {})}


@dataclass(frozen=True)
class Wrapping:
    """How texts are put to a model.

    Attributes:
      chat_template: each is a user's turn, put through the tokenizer's chat template.
      system_prompt: the system's turn before it.
      variables: further ones of the template, by name; plain JSON.
      add_special_tokens: as the tokenizer does, always or never; None: to texts, and not twice.
      kept: what the run keeps from its start.
    """

    chat_template: bool = False
    system_prompt: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool | None = None
    kept: Kept = Kept()
