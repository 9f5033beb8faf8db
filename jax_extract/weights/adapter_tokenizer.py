"""The tokenizer and the chat template that an adapter was trained with: those in its folder, else the base model's.

In: the adapter's folder, the base model's tokenizer, how many rows the embeddings have. Out: a tokenizer, and what a
user should know of it where it is not the base model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax_extract.errors import UserError
from jax_extract.terminal import plural
from jax_extract.weights.checkpoint import folder_tokenizer, read_json

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_NAMED = 3  # of tokens, in a sentence


def adapter_tokenizer(folder: Path, of_base: Callable[[], Any], rows: int) -> tuple[Any, tuple[str, ...]]:
    """(tokenizer, notes); no notes where it is the base model's.

    Raises:
      UserError: the folder's own cannot be used.
    """
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
    template = _template(folder, settings)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        base = of_base()
        _require_known(settings, base, folder)
        if template is None or template == base.chat_template:
            return base, ()
        base.chat_template = template
        return base, ("the chat template is the adapter's own",)
    own, base = folder_tokenizer(folder), of_base()
    without = own.chat_template is None and base.chat_template is not None
    if without:
        own.chat_template = base.chat_template
    same_template = own.chat_template == base.chat_template
    if _rules(own) == _rules(base):
        if same_template:
            return base, ()
        base.chat_template = own.chat_template
        return base, ("the chat template is the adapter's own",)
    vocabulary, known = own.get_vocab(), base.get_vocab()
    more = sorted(vocabulary.keys() - known.keys(), key=vocabulary.__getitem__)
    note = "tokens are those of the adapter's own tokenizer"
    if more:
        note += f", which has {plural(len(more), 'token')} that the model's lacks ({_some(more)})"
    if without:
        note += "; it has no chat template, so that is the model's"
    elif not same_template:
        note += "; so is the chat template"
    return own, (note, *_without_rows(vocabulary, rows))


def _without_rows(vocabulary: Mapping[str, int], rows: int) -> tuple[str, ...]:
    lacking = sorted((token for token, index in vocabulary.items() if index >= rows), key=vocabulary.__getitem__)
    if not lacking:
        return ()
    has = "has" if len(lacking) == 1 else "have"
    return (
        f"{plural(len(lacking), 'token')} of the adapter's tokenizer {has} no row in the embeddings ({_some(lacking)})"
        ", and a text that holds one is refused; save the adapter with its embeddings (save_embedding_layers=True)",
    )


def _require_known(settings: Mapping[str, Any], base: Any, folder: Path) -> None:
    """UserError where tokens were added, and the vocabulary that they were added to is not there."""
    added = settings.get("added_tokens_decoder")
    entries = added.values() if isinstance(added, Mapping) else ()
    contents = [str(entry.get("content")) for entry in entries if isinstance(entry, Mapping)]
    if (folder / "added_tokens.json").is_file():
        contents += read_json(folder / "added_tokens.json")
    if not contents:
        return
    known = base.get_vocab()
    if unknown := [token for token in contents if token not in known]:
        raise UserError(
            f"the adapter in {folder} was trained with tokens that the model's tokenizer lacks ({_some(unknown)}), "
            "and has no tokenizer of its own; save it into that folder with tokenizer.save_pretrained"
        )


def _template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """As transformers looks for it: a file of its own goes before the settings."""
    if (folder / _TEMPLATE).is_file():
        try:
            return (folder / _TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / _TEMPLATE} cannot be read ({error}); save it as UTF-8") from None
    said = settings.get("chat_template")
    if isinstance(said, list):  # several, each with its name
        return {str(entry["name"]): str(entry["template"]) for entry in said if isinstance(entry, Mapping)}
    return said if isinstance(said, str) else None


def _rules(tokenizer: Any) -> Any:
    """All that decides how text becomes tokens; how batches were cut and padded last does not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}


def _some(tokens: list[str]) -> str:
    named = ", ".join(f"{token!r:.40}" for token in tokens[:_NAMED])
    return named if len(tokens) <= _NAMED else f"{named}, …"
