"""A tokenizer's chat template: conversations to text, and what it can be asked for.

In: a transformers tokenizer, a `Wrapping`. Out: a `ChatTemplate`, which refuses what the template has no use for and
shows it the run's own clock. A template is a program of the model's author: transformers runs it in a sandbox, and
what of it would differ from one day to the next is stopped or refused here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.template_variables import variables_of
from jax_extract.inputs.wrapping import Wrapping

Turns = Sequence[Mapping[str, Any]]

# Of `apply_chat_template` and not of the template; a conversation is the sample itself.
NOT_VARIABLES = frozenset(
    (
        "conversation messages tokenize padding truncation max_length return_tensors return_dict "
        "return_assistant_tokens_mask tokenizer_kwargs sanitize_control_tokens"
    ).split()
)
_OF_EVERY_TEMPLATE = frozenset(("add_generation_prompt", "continue_final_message", "chat_template"))
_CLOCK = "strftime_now"
_SYSTEM_PROBE, _USER_PROBE = "a-system-turn-7f3c", "a-user-turn-7f3c"


class ChatTemplate:
    """Attributes:
    clock_text: what the template was told when it asked for the time; None where it has not asked.
    closed_samples: how many ended with the assistant's turn, and without a prompt for another.
    """

    def __init__(self, tokenizer: Any, wrapping: Wrapping) -> None:
        """UserError where the tokenizer has no template, or one that lacks what is asked for."""
        self.clock_text: str | None = None
        self.closed_samples = 0
        self._tokenizer = tokenizer
        self._clock = wrapping.kept.clock
        self._system = wrapping.system_prompt
        self._variables = dict(wrapping.variables)
        self._template = self._chosen(self._variables.pop("chat_template", None))
        self._syntax = self._parsed()
        self._refuse_chance()
        self._require_variables()
        # Runs that were begun before texts were looked for go on as they began.
        self._in_parts = wrapping.kept.one_opening and self._looks_for_parts()
        if self._system is not None:
            self._require_system("--system_prompt", "leave it out, or write it into the texts")

    def text_of(self, sample: Sample) -> str:
        """A sample as the model is to see it.

        The generation prompt follows, unless the assistant has the last word: then the conversation is whole.
        """
        turns = list(sample.turns) if sample.turns is not None else [{"role": "user", "content": sample.text}]
        self._check_turns(sample, turns)
        if self._system is not None:
            turns = [{"role": "system", "content": self._system}, *turns]
        open_end = self._variables.keys() & {"add_generation_prompt", "continue_final_message"}
        self.closed_samples += turns[-1]["role"] == "assistant" and not open_end
        try:
            return self._rendered(turns)
        except Exception as error:  # noqa: BLE001 (a template is a program of the model's author)
            mend = "leave --chat_template out" if sample.turns is None else "give turns that it takes"
            if self._variables:
                mend += ", or other --chat_template_kwargs"
            raise UserError(
                f"the chat template fails on sample {sample.sample_id!r} ({first_line(error)}); {mend}"
            ) from None

    def _rendered(self, turns: Turns) -> str:
        is_open = turns[-1]["role"] != "assistant" and not self._variables.get("continue_final_message")
        options = {"add_generation_prompt": is_open, **self._variables}
        if self._in_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        with self._stopped_clock():
            return self._tokenizer.apply_chat_template(
                list(turns), tokenize=False, chat_template=self._template, **options
            )

    def _check_turns(self, sample: Sample, turns: Turns) -> None:
        where = f"sample {sample.sample_id!r}"
        if wrong := [turn for turn in turns if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str)]:
            raise UserError(
                f"{where} has the turn {wrong[0]!r:.60}, which has no role; give each turn as "
                '{"role": "user", "content": "…"}'
            )
        if any(turn["role"] == "system" for turn in turns):
            if self._system is not None:
                raise UserError(f"{where} has a system turn of its own; leave --system_prompt out")
            self._require_system(where, "leave its system turn out, or write it into the user's")

    # ------------------------------------------------------------------------------ what the template is

    def _chosen(self, name: Any) -> str:
        """The template's text; of several the one that is named, else the default."""
        template = getattr(self._tokenizer, "chat_template", None)
        if not template:
            raise UserError("this model's tokenizer has no chat template; leave --chat_template out")
        several = template if isinstance(template, Mapping) else {}
        if name is not None and name not in several:
            there = f"has {', '.join(sorted(several))}" if several else "has one chat template, without a name"
            raise UserError(f"--chat_template_kwargs names the chat template {name!r:.60}, and the tokenizer {there}")
        try:
            return self._tokenizer.get_chat_template(name, self._variables.get("tools"))
        except ValueError:
            raise UserError(
                f"this model's tokenizer has several chat templates ({', '.join(sorted(several))}) and none of them is "
                'the default; name one with --chat_template_kwargs \'{"chat_template": "NAME"}\''
            ) from None

    def _parsed(self) -> Any:
        """As transformers reads it."""
        try:
            return self._compiled.environment.parse(self._template)
        except Exception as error:  # noqa: BLE001 (Jinja has a dozen classes)
            raise UserError(
                f"this model's chat template cannot be read ({first_line(error)}); mend it, or leave --chat_template "
                "out"
            ) from None

    @cached_property
    def _compiled(self) -> Any:
        # The same object that rendering uses: transformers keeps it by the template's text.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(self._template)

    def _refuse_chance(self) -> None:
        from jinja2 import nodes

        filters = {node.name for node in self._syntax.find_all(nodes.Filter)}
        names = {node.name for node in self._syntax.find_all(nodes.Name)}
        if drawn := sorted(filters & {"random"} | names & {"lipsum"}):
            raise UserError(
                f"this model's chat template draws at random ({drawn[0]}), so that no two commands would make the same "
                "prompts; leave --chat_template out"
            )

    def _require_variables(self) -> None:
        known = variables_of(self._syntax)
        lacking = sorted(self._variables.keys() - known - _OF_EVERY_TEMPLATE)
        if not lacking:
            return
        special = {str(name) for name in getattr(self._tokenizer, "special_tokens_map", {})}
        there = ", ".join(sorted(known - special - {"messages"})) or "none but the messages"
        raise UserError(
            f"--chat_template_kwargs has {lacking[0]!r}, which this model's chat template never asks for; its "
            f"variables are: {there}"
        )

    def _looks_for_parts(self) -> bool:
        """Whether the template finds a text only among a turn's parts, as those of models that also see do."""
        return not self._shows(_USER_PROBE) and self._shows([{"type": "text", "text": _USER_PROBE}])

    def _shows(self, content: Any) -> bool:
        self._in_parts = False
        try:
            return _USER_PROBE in self._rendered([{"role": "user", "content": content}])
        except Exception:  # noqa: BLE001 (a template is a program of the model's author)
            return False
        finally:
            self.clock_text = None

    def _require_system(self, what: str, mend: str) -> None:
        """UserError where the template refuses a system turn, or leaves it out without a word."""
        if reason := self._against_system:
            raise UserError(f"this model's chat template {reason}, and {what} has one; {mend}")

    @cached_property
    def _against_system(self) -> str | None:
        turns = [{"role": "system", "content": _SYSTEM_PROBE}, {"role": "user", "content": _USER_PROBE}]
        told = self.clock_text
        try:
            said = self._rendered(turns)
        except Exception as error:  # noqa: BLE001 (a template is a program of the model's author)
            return f"takes no system turn ({first_line(error)})"
        finally:
            self.clock_text = told
        return None if _SYSTEM_PROBE in said else "drops system turns"

    # ---------------------------------------------------------------------------------------- the clock

    @contextlib.contextmanager
    def _stopped_clock(self) -> Iterator[None]:
        """Templates ask for the date with a function that transformers gives them: here it says the run's."""
        if (clock := self._clock) is None:
            yield
            return

        def tell(form: str) -> str:
            told = clock.strftime(form)
            self.clock_text = self.clock_text or told
            return told

        own = self._compiled.globals  # of this template alone; those of all templates lie behind them
        own[_CLOCK] = tell
        try:
            yield
        finally:
            del own[_CLOCK]


def first_line(error: Exception) -> str:
    """What a library's exception says, in a line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
