"""The byte-level BPE tokenizer that a GGUF file carries, rebuilt as a Hugging Face fast tokenizer.

In: the file's `tokenizer.*` metadata as plain Python values (tokens, merges, token types, special ids).
Out: a tokenizer that gives the token ids of the model's own: `Tokenizer` of the tokenizers library for a run, which
needs token ids alone, and the `transformers.PreTrainedTokenizerFast` around it for everything else.

A GGUF file names its normaliser and pre-tokeniser (`tokenizer.ggml.pre`) without describing them, so the
ones that are known stand here in one table and any other name is refused: a near miss, such as SmolLM2
without its digit splitting, still encodes and decodes every text, only to other ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from jax_extract.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEND = "use the model's Hugging Face folder instead"

# A pattern is data: it has to be the one that the Qwen2 vocabulary was trained with, letter for letter.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's is the same but for numbers, which go in threes.
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type` that matter for byte-level BPE."""

    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class TextSplitting:
    """What happens to text before BPE, and what of BPE and the special tokens goes with it.

    Attributes:
      ignore_merges: a word that is a token is that token, whatever its parts would merge to.
      adds_bos: where the file does not say.
    """

    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer
    ignore_merges: bool = False
    adds_bos: bool = False


def _gpt2() -> TextSplitting:
    return TextSplitting(None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))


def _smollm() -> TextSplitting:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return TextSplitting(None, pre_tokenizers.Sequence([digits, _gpt2().pre_tokenizer]))


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _qwen2() -> TextSplitting:
    return TextSplitting(normalizers.NFC(), _words(QWEN2_PATTERN))


def _llama3() -> TextSplitting:
    return TextSplitting(None, _words(LLAMA3_PATTERN), ignore_merges=True, adds_bos=True)


TEXT_SPLITTINGS = {
    "gpt-2": _gpt2,
    "llama-bpe": _llama3,
    "llama-v3": _llama3,
    "llama3": _llama3,
    "qwen2": _qwen2,
    "smollm": _smollm,
}

SPECIAL_TOKEN_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class GgufTokenizer:
    """The tokenizer of a GGUF file; a list of texts becomes token ids without transformers, which takes long to import.

    Everything else that a transformers tokenizer does is asked of one, made when it is asked for.

    Attributes:
      backend_tokenizer: what computes the token ids, as the transformers tokenizer has it.
      encodes_as_backend: it alone makes token ids of texts, so that other processes may.
      chat_template: the model's own, or None.

    Raises:
      UserError: another tokenizer model than "gpt2" (byte-level BPE), another pre-tokeniser than the known ones, or
        metadata that is missing or inconsistent.
    """

    encodes_as_backend = True

    def __init__(self, fields: Mapping[str, Any], model_max_length: int) -> None:
        self.model_max_length = model_max_length
        self.chat_template: str | None = fields.get("tokenizer.chat_template")
        self._options = _options(fields)
        backend = _backend(fields)
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        named = {self._options[role] for role in SPECIAL_TOKEN_KEYS} - {None}
        self._bare = backend
        if named <= added:
            backend.post_processor = _post_processor(self._options, backend)
            self.backend_tokenizer = backend
        else:  # transformers adds the others, by rules of its own
            self.backend_tokenizer = self._whole.backend_tokenizer

    def __call__(self, texts: Any, **options: Any) -> Any:
        if not isinstance(texts, list) or options.keys() - {"add_special_tokens", "verbose"}:
            return self._whole(texts, **options)
        encodings = self.backend_tokenizer.encode_batch_fast(
            texts, add_special_tokens=options.get("add_special_tokens", True)
        )
        return {"input_ids": [encoding.ids for encoding in encodings]}

    def __len__(self) -> int:
        return len(self._whole)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_bare" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._whole, name)

    @cached_property
    def _whole(self) -> "PreTrainedTokenizerFast":
        whole = _in_transformers(self._bare, self._options)
        whole.model_max_length = self.model_max_length
        return whole


def _backend(fields: Mapping[str, Any]) -> Tokenizer:
    """What computes token ids; `fields` maps GGUF metadata keys to str, int, bool or lists of these.

    Control tokens become special added tokens, user-defined ones plain added tokens; tokens marked unused are left
    out, as they are padding that the model's own tokenizer does not have. The ids are those of the file.
    """
    splitting = _text_splitting(fields)
    tokens: list[str] = _required(fields, "tokenizer.ggml.tokens")
    types: list[int] = _required(fields, "tokenizer.ggml.token_type")
    vocabulary = _vocabulary(tokens, types)
    merges = _merges(_required(fields, "tokenizer.ggml.merges"), vocabulary)

    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges))
    if splitting.normalizer is not None:
        backend.normalizer = splitting.normalizer
    backend.pre_tokenizer = splitting.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    # Their text is final: a normaliser must not keep them from being recognised.
    backend.add_special_tokens(_added_tokens(tokens, types, TokenType.CONTROL))
    backend.add_tokens(_added_tokens(tokens, types, TokenType.USER_DEFINED))
    return backend


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is told beside the backend."""
    tokens: list[str] = _required(fields, "tokenizer.ggml.tokens")
    adds_bos = _text_splitting(fields).adds_bos and fields.get(SPECIAL_TOKEN_KEYS["bos_token"]) is not None
    special = {role: _token_of_id(fields, key, tokens) for role, key in SPECIAL_TOKEN_KEYS.items()}
    return {
        "chat_template": fields.get("tokenizer.chat_template"),
        "add_bos_token": _adds(fields, "tokenizer.ggml.add_bos_token", special["bos_token"], adds_bos),
        "add_eos_token": _adds(fields, "tokenizer.ggml.add_eos_token", special["eos_token"]),
        # Cleaning up would eat spaces before punctuation, so that decoding no longer inverts encoding.
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _in_transformers(backend: Tokenizer, options: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def _post_processor(options: Mapping[str, Any], backend: Tokenizer) -> processors.TemplateProcessing:
    """The special tokens around a text or a pair of texts, as transformers writes them."""
    bos, eos = (options[f"{role}_token"] if options[f"add_{role}_token"] else None for role in ("bos", "eos"))

    def around(text: str, kind: int) -> list[str]:
        return [f"{token}:{kind}" for token in (bos, text, eos) if token]

    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    return processors.TemplateProcessing(
        single=around("$A", 0), pair=[*around("$A", 0), *around("$B", 1)], special_tokens=special
    )


def _text_splitting(fields: Mapping[str, Any]) -> TextSplitting:
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(f"tokenizer.ggml.model is {model!r}; expected 'gpt2', the name of byte-level BPE: {MEND}.")
    if fields.get("tokenizer.ggml.add_space_prefix", False):
        raise UserError(
            "tokenizer.ggml.add_space_prefix is True; expected False, as llama.cpp prefixes no space to "
            f"byte-level BPE: {MEND}."
        )
    name = fields.get("tokenizer.ggml.pre")
    if name not in TEXT_SPLITTINGS:
        known = ", ".join(repr(known) for known in sorted(TEXT_SPLITTINGS))
        raise UserError(f"tokenizer.ggml.pre is {name!r}; expected one of {known}: {MEND}.")
    return TEXT_SPLITTINGS[name]()


def _required(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise UserError(f"The file has {value!r} for {key}; expected a list: {MEND}.")
    return value


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Token text -> id, without the unused ones."""
    if len(tokens) != len(types):
        raise UserError(
            f"The file has {len(types):,} entries in tokenizer.ggml.token_type; expected one for each of its "
            f"{len(tokens):,} tokens: {MEND}."
        )
    vocabulary: dict[str, int] = {}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == TokenType.UNUSED:
            continue
        if vocabulary.setdefault(token, index) != index:
            raise UserError(
                f"tokenizer.ggml.tokens has {token!r} at {vocabulary[token]} and at {index}; expected each "
                f"token once: {MEND}."
            )
    return vocabulary


def _merges(lines: list[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merge rules in order of priority; the byte alphabet has no space, so one space parts the two halves."""
    merges: list[tuple[str, str]] = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise UserError(
                f"tokenizer.ggml.merges has {line!r}; expected two tokens that join to a third, with one "
                f"space between them: {MEND}."
            )
        merges.append((left, right))
    return merges


def _added_tokens(tokens: list[str], types: list[int], kind: TokenType) -> list[AddedToken]:
    special = kind is TokenType.CONTROL
    return [
        AddedToken(token, special=special, normalized=False)
        for token, token_kind in zip(tokens, types, strict=True)
        if token_kind == kind
    ]


def _token_of_id(fields: Mapping[str, Any], key: str, tokens: list[str]) -> str | None:
    index = fields.get(key)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise UserError(f"{key} is {index}; expected an id below {len(tokens)}: {MEND}.")
    return tokens[index]


def _adds(fields: Mapping[str, Any], key: str, token: str | None, default: bool = False) -> bool:
    adds = bool(fields.get(key, default))
    if adds and token is None:
        raise UserError(f"{key} is True but the file names no such token; expected its id as well: {MEND}.")
    return adds
