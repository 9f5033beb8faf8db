"""A GGUF model of the Llama or Qwen architecture as a checkpoint: configuration, tensors and tokenizer.

In: a `.gguf` file written by llama.cpp's tools (general.architecture `llama`, `qwen2` or `qwen3`, quantised or not), or
one piece of several. Out: what a Hugging Face folder would give: a `config.json` dictionary, tensors by Hugging Face
name in [out, in] orientation as float32, and a fast tokenizer.

The files are memory-mapped; opening reads only the headers and dequantising holds one tensor at a time.
The reader fails closed: a metadata key or a tensor whose meaning for the forward pass is not known here
ends in a `UserError`, because ignoring it would give numbers that are silently wrong.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
)
from gguf.quants import dequantize

from jax_extract.errors import UserError
from jax_extract.weights.gguf_container import (
    CONVERT_MEND,
    MetadataArray,
    StoredTensor,
    decode,
    integer,
    open_container,
)
from jax_extract.weights.gguf_rope import FOLDER_MEND, ROPE_FACTORS, ROPE_KEYS, decimal, rope_scaling

TOKENIZER_SETTINGS = "tokenizer_config.json"
# llama.cpp falls back to this base when a file does not name one.
DEFAULT_ROPE_THETA = 10_000.0

# GGUF name -> Hugging Face name and shape by dimension letter:
# v vocabulary, d model width, f feed-forward width, q query rows, k key/value rows, h values of a head.
GLOBAL_TENSORS = {
    "token_embd.weight": ("model.embed_tokens.weight", "vd"),
    "output_norm.weight": ("model.norm.weight", "d"),
    "output.weight": ("lm_head.weight", "vd"),
}
LAYER_TENSORS = {
    "attn_norm.weight": ("input_layernorm.weight", "d"),
    "attn_q.weight": ("self_attn.q_proj.weight", "qd"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kd"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kd"),
    "attn_output.weight": ("self_attn.o_proj.weight", "dq"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "d"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "fd"),
    "ffn_up.weight": ("mlp.up_proj.weight", "fd"),
    "ffn_down.weight": ("mlp.down_proj.weight", "df"),
}
OPTIONAL_TENSORS = frozenset({"output.weight", ROPE_FACTORS})


@dataclass(frozen=True)
class Architecture:
    """What one architecture has of its own.

    Attributes:
      config: entries of config.json, beside the sizes.
      tensors: of each layer, beside those that all have.
      neighbours: whether llama.cpp rotates neighbouring rows of a head, for which its converter orders them.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    neighbours: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
        neighbours=True,
    ),
    "qwen2": Architecture(
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
        {
            "attn_q.bias": ("self_attn.q_proj.bias", "q"),
            "attn_k.bias": ("self_attn.k_proj.bias", "k"),
            "attn_v.bias": ("self_attn.v_proj.bias", "k"),
        },
    ),
    "qwen3": Architecture(
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "use_sliding_window": False,
        },
        {
            "attn_q_norm.weight": ("self_attn.q_norm.weight", "h"),
            "attn_k_norm.weight": ("self_attn.k_norm.weight", "h"),
        },
    ),
}

# Every key of an architecture that this module reads, without its name. Any other one is refused.
HANDLED_KEYS = ROPE_KEYS | {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
# Keys that say nothing about the forward while they have these values; None where any value will do.
NEUTRAL_KEYS: Mapping[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": None,
    "tensor_data_layout": None,
    "use_parallel_residual": (False,),
}

# gguf dequantises through several temporaries of the size of its input, so tensors go in pieces that fit a cache.
DEQUANTIZE_CHUNK_ELEMENTS = 1 << 16


class GgufCheckpoint:
    """A GGUF file, or all pieces of a model, with the interface of a Hugging Face checkpoint folder.

    Attributes:
        source: the path as given.
        revision: always None; the file has no revision, `digest` identifies its content.
        config: a dictionary in the form of Hugging Face's `config.json`.

    Raises:
        UserError: the file is missing, is not GGUF, is cut short, or holds anything that changes the
            mathematics and is not understood here (architecture, metadata key, tensor, encoding).
    """

    def __init__(self, path: Path, note: str | None = None) -> None:
        """`note`: to the user, where it is not plain that this is the file that is meant."""
        self.source = str(path)
        self.revision: str | None = None
        container = open_container(path)
        self._pieces, self._metadata, stored = container.pieces, container.metadata, container.tensors
        architecture = _refuse_unknown_metadata(self._metadata, self.source)
        self.config = _config(self._metadata, stored, self.source)
        if scaling := self._scaling(stored):
            self.config["rope_scaling"] = scaling
        self.generation: dict[str, Any] = {}
        self.adapter: str | None = None
        self.notes = (note,) if note else ()
        self._neighbours = architecture.neighbours
        self._tensors = _by_hugging_face_name(stored, architecture, self.config, self.source)
        _refuse_unreadable_encodings(self._tensors, self.source)

    def names(self) -> frozenset[str]:
        """Hugging Face names of all tensors; `lm_head.weight` only where it is not tied."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in Hugging Face orientation: [out, in] for a projection, [width] for a norm."""
        return self._tensor(name).shape

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """`rows` of the tensor `name`, dequantised: a new float32 array that the caller owns.

        Only the rows asked for are dequantised, so a large tensor can be read shard by shard.
        """
        tensor = self._tensor(name)
        stored = _stored_rows(self._pieces[tensor.piece], tensor)
        if len(tensor.shape) == 1:
            return _dequantize(stored, tensor)[0, rows].copy()
        if self._neighbours and name.endswith("self_attn.q_proj.weight"):
            stored = stored[_rotary_row_order(len(stored), self.config["num_attention_heads"])[rows]]
        elif self._neighbours and name.endswith("self_attn.k_proj.weight"):
            stored = stored[_rotary_row_order(len(stored), self.config["num_key_value_heads"])[rows]]
        else:
            stored = stored[rows]
        return _dequantize(stored, tensor)

    def digest(self, names: Iterable[str]) -> str:
        """`sha256:<hex>` over names, encodings, shapes and stored bytes, whatever the order of `names`."""
        sha256 = hashlib.sha256()
        for name in sorted(set(names)):
            tensor = self._tensor(name)
            sha256.update(f"{name}\n{tensor.kind.name}\n{tensor.shape}\n{tensor.nbytes}\n".encode())
            sha256.update(self._pieces[tensor.piece][tensor.offset : tensor.offset + tensor.nbytes])
        return f"sha256:{sha256.hexdigest()}"

    def tokenizer(self) -> Any:
        """The tokenizer stored in the file; its `model_max_length` is the model's context length.

        Where it is one that cannot be rebuilt, the one whose files lie beside the file, of the model's own folder.
        """
        from jax_extract.weights.gguf_tokenizer import GgufTokenizer

        fields = {
            key: decode(self._pieces[0], value) for key, value in self._metadata.items() if key.startswith("tokenizer.")
        }
        folder = Path(self.source).parent
        try:
            return GgufTokenizer(fields, self.config["max_position_embeddings"])
        except UserError as error:
            if not (folder / TOKENIZER_SETTINGS).is_file():
                said = str(error).rstrip(".")
                raise UserError(
                    f"{said}, or put its tokenizer.json and {TOKENIZER_SETTINGS} beside this file."
                ) from None
        from jax_extract.weights.checkpoint import folder_tokenizer

        return folder_tokenizer(folder)

    def _scaling(self, stored: Mapping[str, StoredTensor]) -> dict[str, Any] | None:
        """What config.json would have as `rope_scaling`."""
        factors = None
        if tensor := stored.get(ROPE_FACTORS):
            _refuse_unreadable_encodings({ROPE_FACTORS: tensor}, self.source)
            factors = _dequantize(_stored_rows(self._pieces[tensor.piece], tensor), tensor).reshape(-1)
        return rope_scaling(self._metadata, factors, self.config, self.source)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise UserError(
                f"{self.source} has no tensor {name!r}; expected a Hugging Face name such as "
                "'model.norm.weight': use one of those that names() lists."
            )
        return self._tensors[name]


def _refuse_unknown_metadata(metadata: Mapping[str, Any], source: str) -> Architecture:
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{source} has general.architecture {name!r}; expected one of "
            f"{', '.join(map(repr, ARCHITECTURES))}: {FOLDER_MEND}."
        )
    content = metadata.get("general.type", "model")
    if content != "model":
        raise UserError(f"{source} has general.type {content!r}; expected 'model': give the file of the model itself.")
    own = {key.removeprefix(f"{name}."): key for key in metadata if key.startswith(f"{name}.")}
    neutral = {key for key, values in NEUTRAL_KEYS.items() if values is None or metadata.get(f"{name}.{key}") in values}
    if unknown := sorted(own.keys() - HANDLED_KEYS - neutral):
        raise UserError(
            f"{source} sets {', '.join(own[key] for key in unknown)}; expected only keys of a plain {name} model, "
            f"because others may change the mathematics: {FOLDER_MEND}."
        )
    return ARCHITECTURES[name]


def _config(metadata: Mapping[str, Any], stored: Mapping[str, StoredTensor], source: str) -> dict[str, Any]:
    name = metadata["general.architecture"]

    def size(key: str, default: int | None = None) -> int:
        return integer(metadata, f"{name}.{key}", source, default)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head_dim) != head_dim:
            raise UserError(
                f"{source} has {metadata[f'{name}.{key}']} for {name}.{key}; expected the width of a head, {head_dim}, "
                f"as in every plain {name} model: {FOLDER_MEND}."
            )
    embedding = stored.get("token_embd.weight")
    vocabulary = size("vocab_size", embedding.shape[0] if embedding else None)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, MetadataArray) and tokens.count > vocabulary:
        raise UserError(
            f"{source} has {tokens.count:,} entries in tokenizer.ggml.tokens; expected at most "
            f"{vocabulary:,}, the rows of the embedding: {CONVERT_MEND}."
        )
    return {
        **ARCHITECTURES[name].config,
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": decimal(metadata, f"{name}.attention.layer_norm_rms_epsilon", source),
        "rope_theta": decimal(metadata, f"{name}.rope.freq_base", source, DEFAULT_ROPE_THETA),
        "max_position_embeddings": size("context_length"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _expected_tensors(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> Hugging Face name and shape, for every tensor that `config` calls for."""
    sizes = {
        "v": config["vocab_size"],
        "d": config["hidden_size"],
        "f": config["intermediate_size"],
        "q": config["num_attention_heads"] * config["head_dim"],
        "k": config["num_key_value_heads"] * config["head_dim"],
        "h": config["head_dim"],
    }
    letters = dict(GLOBAL_TENSORS)
    for layer in range(config["num_hidden_layers"]):
        for gguf_name, (name, dimensions) in {**LAYER_TENSORS, **architecture.tensors}.items():
            letters[f"blk.{layer}.{gguf_name}"] = (f"model.layers.{layer}.{name}", dimensions)
    return {
        gguf_name: (name, tuple(sizes[letter] for letter in dimensions))
        for gguf_name, (name, dimensions) in letters.items()
    }


def _by_hugging_face_name(
    stored: Mapping[str, StoredTensor], architecture: Architecture, config: Mapping[str, Any], source: str
) -> dict[str, StoredTensor]:
    expected = _expected_tensors(architecture, config)
    unknown = sorted(stored.keys() - expected.keys() - OPTIONAL_TENSORS)
    if unknown:
        raise UserError(
            f"{source} holds the tensor {unknown[0]!r} ({len(unknown)} unknown in all); expected only those "
            f"of a plain {config['num_hidden_layers']}-layer {config['model_type']} model, because ignoring one would "
            f"give wrong numbers: {FOLDER_MEND}."
        )
    missing = sorted(expected.keys() - stored.keys() - OPTIONAL_TENSORS)
    if missing:
        raise UserError(
            f"{source} lacks the tensor {missing[0]!r} ({len(missing)} missing in all); expected it from the "
            f"metadata: {CONVERT_MEND}."
        )
    there = {name: tensor for name, tensor in stored.items() if name in expected}
    for gguf_name, tensor in there.items():
        shape = expected[gguf_name][1]
        if tensor.shape != shape:
            raise UserError(
                f"Tensor {gguf_name!r} of {source} has shape {tensor.shape}; expected {shape} from the "
                f"metadata: {CONVERT_MEND}."
            )
    return {expected[gguf_name][0]: tensor for gguf_name, tensor in there.items()}


def _refuse_unreadable_encodings(tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Find out at opening, from one block of zeros, whether gguf can dequantise each encoding in the file."""
    for kind in sorted({tensor.kind for tensor in tensors.values()}):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{source} holds tensors in {kind.name}; expected an encoding that the installed gguf "
                "package can dequantise: take a file in another one, such as Q8_0 or F16."
            ) from error


def _stored_rows(data: memoryview, tensor: StoredTensor) -> np.ndarray:
    """The tensor's bytes in the file, [rows, bytes of a row] uint8 and read-only; a vector is one row."""
    rows = prod(tensor.shape[:-1])
    return np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset).reshape(rows, tensor.nbytes // rows)


def _dequantize(stored: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """float32 values [rows, width] of the rows [rows, bytes of a row] of `tensor`."""
    width = tensor.shape[-1]
    values = np.empty((len(stored), width), np.float32)
    step = max(1, DEQUANTIZE_CHUNK_ELEMENTS // width)
    for start in range(0, len(stored), step):
        values[start : start + step] = dequantize(stored[start : start + step], tensor.kind)
    return values


def _rotary_row_order(rows: int, heads: int) -> np.ndarray:
    """For each row of a q or k projection in Hugging Face order, the row of the file that holds it.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), … of a head and its converter orders the rows to
    suit; Hugging Face rotates row i with row i + head_dim/2. Blocks never cross rows, so the quantised
    rows can be put in order as they are.
    """
    neighbours = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return neighbours.swapaxes(1, 2).reshape(rows)
