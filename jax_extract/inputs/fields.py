"""From a row with fields to a sample: which field holds the text, the conversation or the tokens, and which the id.

In: a row of any format as a mapping. Out: a `Sample`, with the row's other fields where these are wanted. A field
within another is named with dots (`messages.0.content`); a field whose own name has the dots comes first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Any

from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample

TEXT_FIELDS = ("text", "prompt", "question")
TURNS_FIELDS = ("messages", "conversations", "conversation")
TOKENS_FIELDS = ("input_ids", "tokens")
MASK_FIELD = "attention_mask"
ID_FIELD = "id"

LARGEST_FIELDS = 2_000  # characters of JSON that the other fields of a row may take: sidecars hold them
FIELDS_KEPT = ("fields", "fields_left_out")  # in `meta`
_NAMED_LEFT_OUT = 8
_LONGEST_NAME = 80

_MOST_TOKEN = 2**31 - 1
# ShareGPT's names of who speaks; others are handed on as they are, since templates know more roles than these.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_MISSING = object()

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Fields:
    """Which fields a run reads.

    Attributes:
      text: the field of the text, a conversation or token ids; None for the first there is of text, prompt, question,
        messages, conversations, conversation, input_ids and tokens.
      id: the field of the id; None for `id` where there is one that holds a value.
      keeps_others: whether a sample's `meta` holds the other fields of its row, as `fields`; see `other_fields`.
    """

    text: str | None = None
    id: str | None = None
    keeps_others: bool = False

    def sample(self, row: Row, where: str, otherwise: str, meta: Mapping[str, Any]) -> Sample:
        """A row as a sample.

        Args:
          where: what an error about the row begins with.
          otherwise: the id of a row that has none.

        Raises:
          UserError: the fields are not there, or hold what no sample can.
        """
        name = text_field(row, self.text, f"{where},")
        sample_id = self.id_of(row, where)
        sample_id = otherwise if sample_id is None else sample_id
        if self.keeps_others:
            read = {_column(name, row), _column(self.id or ID_FIELD, row), MASK_FIELD}
            meta = {**meta, **other_fields({key: value for key, value in row.items() if key not in read})}
        value, told = field_of(row, name), f"{where}, field {name!r},"
        last = name.rpartition(".")[2]
        if isinstance(value, str) and last in (*TURNS_FIELDS, *TOKENS_FIELDS):
            value = _list_in(value, named=self.text is not None, where=told)
        if _are_parts(value):  # of the turn that a name with dots led to
            return Sample(sample_id, _content(value, told), meta)
        if (turns := _turns(value, last in TURNS_FIELDS, told)) is not None:
            return Sample(sample_id, "", meta, turns=turns)
        if (token_ids := _token_ids(value, last in TOKENS_FIELDS, told)) is not None:
            mask = _beside(row, name, MASK_FIELD)
            return Sample(sample_id, "", meta, token_ids=_unmasked(token_ids, mask, where))
        return Sample(sample_id, checked_text(value, told), meta)

    def id_of(self, row: Row, where: str) -> str | None:
        """The row's id; None where it has none and none was asked for."""
        if self.id is None:
            # Public data have the column and leave it empty: such rows are called by their place.
            return None if row.get(ID_FIELD) is None else checked_id(row[ID_FIELD], where)
        value = field_of(row, self.id)
        if value is _MISSING:
            raise UserError(
                f"{where}, has no {self.id}, only {_names(row)}: name what holds the id with --id_column, or leave it "
                "out."
            )
        return checked_id(value, where, self.id)

    def columns(self, there: Collection[str], where: str) -> tuple[str, ...]:
        """Those of the columns `there` that have to be read.

        Raises:
          UserError: what is asked for is not among them.
        """
        text = text_field(there, self.text, where)
        needed = [_column(text, there)]
        if self.id is None:
            needed += [ID_FIELD] if ID_FIELD in there else []
        elif (column := _column(self.id, there)) in there:
            needed.append(column)
        else:
            raise UserError(
                f"{where} has no {self.id}, only {', '.join(there)}: name what holds the id with --id_column, or leave "
                "it out."
            )
        if MASK_FIELD in there:
            needed.append(MASK_FIELD)
        return tuple(dict.fromkeys(needed))


def other_fields(row: Row) -> dict[str, Any]:
    """What a sample's `meta` says of fields that are not read otherwise: an answer, a label, a source.

    Returns:
      `fields`: those that have a value, as plain JSON (dates as text), in the row's order, as long as all of them
      together have no more than 2,000 characters; and `fields_left_out`: the first names of those that do not fit, or
      are no JSON. Neither where there is nothing for it.
    """
    kept: dict[str, Any] = {}
    left_out: list[str] = []
    room = LARGEST_FIELDS
    for name, value in row.items():
        if value is None or not isinstance(name, str):
            continue
        try:
            text = _JSON.encode({name: value})
        except (TypeError, ValueError, RecursionError):
            text = None
        if text is None or len(text) > room:
            left_out.append(name[:_LONGEST_NAME])
            continue
        room -= len(text)
        kept[name] = value if isinstance(value, str | int | float) else json.loads(text)[name]
    said: dict[str, Any] = {"fields": kept} if kept else {}
    return {**said, "fields_left_out": left_out[:_NAMED_LEFT_OUT]} if left_out else said


def _plain(value: object) -> str:
    """What JSON has no type for and a text says as well."""
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(type(value).__name__)


_JSON = json.JSONEncoder(default=_plain, allow_nan=False)


def text_field(names: Collection[str], text_column: str | None, where: str) -> str:
    """The one of `names` that holds the text: `text_column`, or for None the first there is of the usual ones.

    Args:
      names: of columns, or a row, within which a name with dots leads on.

    Raises:
      UserError: it is not among them; the sentence begins with `where` and lists those that are.
    """
    if text_column is None:
        for name in (*TEXT_FIELDS, *TURNS_FIELDS, *TOKENS_FIELDS):
            if name in names:
                return name
        wanted = " or ".join((", ".join(TEXT_FIELDS[:-1]), TEXT_FIELDS[-1]))
    else:
        wanted = text_column
        if isinstance(names, Mapping):
            if field_of(names, text_column) is not _MISSING:
                return text_column
        elif _column(text_column, names) in names:
            return text_column
    there = _names(names)
    if text_column is not None and (column := _column(text_column, names)) in names and isinstance(names, Mapping):
        there = f"{column} with {_shape(names[column])}"
    raise UserError(f"{where} has no {wanted}, only {there}: name what holds the text with --text_column.")


def field_of(row: Row, name: str) -> Any:
    """The value under a name, which may lead on with dots; `_MISSING` where it leads nowhere."""
    if name in row:
        return row[name]
    return _within(row, name.split("."))


def _within(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, Mapping):
        # The longest name first: a key of its own may have dots too.
        for end in range(len(parts), 0, -1):
            if (key := ".".join(parts[:end])) in value:
                found = _within(value[key], parts[end:])
                if found is not _MISSING:
                    return found
    elif isinstance(value, list | tuple):
        try:
            return _within(value[int(parts[0])], parts[1:])
        except (ValueError, IndexError):
            return _MISSING
    return _MISSING


def _column(name: str, there: Collection[str]) -> str:
    """The column that a name with dots is in; the name itself where it is in none."""
    parts = name.split(".")
    heads = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((head for head in heads if head in there), name)


def _beside(row: Row, name: str, other: str) -> Any:
    """The field `other` next to the one called `name`; None where there is none."""
    parent = name.rpartition(".")[0]
    value = field_of(row, f"{parent}.{other}" if parent else other)
    return None if value is _MISSING else value


def _names(row: Collection[str]) -> str:
    return ", ".join(map(str, row)) or "nothing at all"


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        return _names(value)
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"{value!r:.40} ({type(value).__name__})"


# ----------------------------------------------------------------------------------------- values


def checked_text(value: object, where: str) -> str:
    """`value` if it is a text that a tokeniser can take; else a UserError that begins with `where`."""
    if not isinstance(value, str):
        kind = "no value" if value is None else type(value).__name__
        raise UserError(f"{where} holds {value!r:.40} ({kind}) where a string is expected: write it as one.")
    # JSON can spell half a surrogate pair, which is no character: tokenisers and writers fail on it late.
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where} holds half a surrogate pair (\\ud800 to \\udfff): write whole characters.")
    return value


def checked_id(value: object, where: str, field: str = ID_FIELD) -> str:
    """`value`, a string or an integer, as a sample id; else a UserError that begins with `where`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value == "":
        raise UserError(f"{where}, has an empty id: give it one, or leave the field out.")
    if not isinstance(value, str):
        raise UserError(
            f"{where}, field {field!r}, holds {value!r:.40} ({type(value).__name__}) where a string or a whole number "
            "is expected: write it as one."
        )
    sample_id = checked_text(value, f"{where}, field {field!r},")
    if "\0" in sample_id:  # NumPy drops zeros at the end of a string, so two ids could become one
        raise UserError(f"{where}, has the id {sample_id[:40]!r}: an id cannot hold a zero byte.")
    return sample_id


def _list_in(value: str, named: bool, where: str) -> object:
    """The list that a text is, as CSV files have them; where the user named the field, any other text is one."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        return found
    if named:
        return value
    raise UserError(
        f"{where} holds {value!r:.40} where a list is expected: write it as JSON, or name what holds the text with "
        "--text_column."
    )


def _turns(value: object, named: bool, where: str) -> tuple[dict[str, Any], ...] | None:
    """A conversation; None where the value is none. `named`: the field's name says that it is one."""
    if (
        isinstance(value, Mapping)
        and not {"role", "from"}.isdisjoint(value)
        and all(isinstance(part, list | tuple) for part in value.values())
    ):
        # Older versions of `datasets` turn a list of objects into an object of lists.
        value = [dict(zip(value.keys(), turn, strict=True)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list | tuple) or not any(isinstance(turn, Mapping) for turn in value):
        return () if named and isinstance(value, list | tuple) and not value else None
    return tuple(_turn(turn, f"{where} turn {number},") for number, turn in enumerate(value))


def _turn(turn: object, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UserError(f'{where} is {turn!r:.40} where {{"role": …, "content": …}} is expected: mend the row.')
    given = {key: value for key, value in turn.items() if value is not None}
    role = given.pop("role", None) or given.pop("from", None)
    if not isinstance(role, str):
        raise UserError(f'{where} names no role, only {_names(turn)}: expected {{"role": …, "content": …}}.')
    content = given.pop("content", None)
    if content is None:
        content = given.pop("value", None)
    if content is None and "tool_calls" in given:
        content = ""
    said = {"role": _ROLES.get(role, role), "content": _content(content, where)}
    return {**said, **given}


def _content(content: object, where: str) -> str:
    """The text of a turn, its parts joined."""
    if isinstance(content, list | tuple):
        return "".join(_part(part, f"{where} part {number},") for number, part in enumerate(content))
    return checked_text(content, f"{where} content,")


def _are_parts(value: object) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(part, Mapping) and "type" in part and {"role", "from"}.isdisjoint(part) for part in value)


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        return checked_text(part, where)
    kind = part.get("type") or "text"
    if kind != "text":
        raise UserError(
            f"{where} is of the type {kind!r:.40}: only texts are read; leave such conversations out, or name a field "
            "of text with --text_column."
        )
    return checked_text(part.get("text"), where)


def _token_ids(value: object, named: bool, where: str) -> tuple[int, ...] | None:
    """Token ids; None where the value is no list of whole numbers. `named`: the field's name says that it is one."""
    if not isinstance(value, list | tuple) or not (named or (value and type(value[0]) is int)):
        return None
    for token in value:
        if type(token) is not int or not 0 <= token <= _MOST_TOKEN:
            raise UserError(f"{where} holds {token!r:.40} where token ids are expected: mend the row.")
    return tuple(value)


def _unmasked(token_ids: tuple[int, ...], mask: object, where: str) -> tuple[int, ...]:
    """The tokens where the attention mask is 1: what it leaves out is padding, which is no token of the sample."""
    if mask is None:
        return token_ids
    if isinstance(mask, str):
        mask = _list_in(mask, named=False, where=f"{where}, field {MASK_FIELD!r},")
    if not isinstance(mask, list | tuple) or len(mask) != len(token_ids) or any(kept not in (0, 1) for kept in mask):
        raise UserError(
            f"{where}, field {MASK_FIELD!r}, is no list of {len(token_ids)} zeros and ones, one for each token: mend "
            "the row, or leave the field out."
        )
    return tuple(token for token, kept in zip(token_ids, mask, strict=True) if kept)
