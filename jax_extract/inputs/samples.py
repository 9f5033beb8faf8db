"""What every input becomes: a stream of samples with stable names.

In: nothing. Out: `Sample`, the one value that the readers in this folder yield
and that the tokeniser consumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One text whose activations are wanted, given in one of three ways.

    Attributes:
      sample_id: stable name from the source; unique within a run.
      text: the prompt, before any chat template; empty where there are `turns` or `token_ids`.
      meta: plain JSON values that let a reader trace the sample back to its source
        (an ARC sample holds its task, test index and augmentation).
      turns: a conversation, {"role": …, "content": …} each, for the chat template; else None. Without a turn it is a
        sample without a token.
      token_ids: where the source is tokenized already: taken as they are; else None.
    """

    sample_id: str
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Mapping[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None
