"""Promises of the GGUF reader: Hugging Face's weights, configuration and token ids, or a refusal by name.

Small files are written here with gguf's own writer, in the row order of llama.cpp's converter; the real
SmolLM2-135M-Instruct (fixture `smollm2_gguf`) shows that the whole makes a working model.
"""

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from tiny_models import tiny_folder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Tokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jax_extract.errors import UserError
from jax_extract.pytorch.loading import load_theirs
from jax_extract.weights import gguf as gguf_module
from jax_extract.weights.gguf import GgufCheckpoint
from jax_extract.weights.gguf_tokenizer import _backend, _in_transformers, _options
from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.opening import open_checkpoint
from models.registry import port_for

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 64, 96, 4, 2, 16, 40
Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]

# Perplexities measured with torch in float32: a story 34 (200 with query and key rows left as llama.cpp
# orders them), an explanation 4.7 (25). Both texts were written for this test.
STORY = (
    "The old lighthouse stood at the end of the pier, and every evening the keeper climbed its narrow "
    "stairs to light the lamp. Ships far out at sea could see it turning slowly in the dark. Water boils "
    "at a lower temperature high in the mountains because the air pressure there is lower. This is why it "
    "takes longer to cook rice or potatoes in a village at high altitude. My sister bought a small house "
    "near the river last spring. It needed a new roof and some paint, but the garden was full of apple "
    "trees and the neighbours were very kind."
)
EXPLANATION = (
    "Photosynthesis is the process by which plants, algae and some bacteria convert light energy into "
    "chemical energy. During photosynthesis, plants take in carbon dioxide from the air and water from "
    "the soil. Using the energy of sunlight, they turn these into glucose, a kind of sugar, and oxygen. "
    "The oxygen is released into the air, and the glucose is used by the plant as food. Photosynthesis "
    "takes place in the leaves, in small structures called chloroplasts, which contain a green pigment "
    "called chlorophyll."
)
EXPLANATION_PERPLEXITY = 8
WRONG_ORDER_RATIO = 3


def hugging_face_weights(seed: int = 0) -> Tensors:
    """Random float32 weights of a two-layer Llama under Hugging Face names."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": (WIDTH,),
            f"model.layers.{layer}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            f"model.layers.{layer}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"model.layers.{layer}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"model.layers.{layer}.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            f"model.layers.{layer}.post_attention_layernorm.weight": (WIDTH,),
            f"model.layers.{layer}.mlp.gate_proj.weight": (FFN, WIDTH),
            f"model.layers.{layer}.mlp.up_proj.weight": (FFN, WIDTH),
            f"model.layers.{layer}.mlp.down_proj.weight": (WIDTH, FFN),
        }
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def llama_cpp_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for hugging_face, llama_cpp in parts.items():
        name = name.replace(hugging_face, llama_cpp)
    return name


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The two rows that one rotary angle turns, side by side, row by row as the converter's rule says."""
    head_dim = len(weight) // heads
    rows = []
    for head in range(heads):
        for angle in range(head_dim // 2):
            first = head * head_dim + angle
            rows += [weight[first], weight[first + head_dim // 2]]
    return np.stack(rows)


@pytest.fixture
def write_llama(tmp_path: Path) -> Write:
    """Writes a small Llama GGUF file; metadata of None leaves a key out."""

    def write(
        tensors: Tensors | None = None,
        kind: GGMLQuantizationType = GGMLQuantizationType.F32,
        architecture: str = "llama",
        writing: dict[str, Any] | None = None,
        extra_tensors: Tensors | None = None,
        extra_kind: GGMLQuantizationType | None = None,
        **changes: Any,
    ) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = GGUFWriter(path, architecture, **(writing or {}))
        metadata = {
            "llama.block_count": LAYERS,
            "llama.context_length": 128,
            "llama.embedding_length": WIDTH,
            "llama.feed_forward_length": FFN,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 500_000.0,
            "llama.rope.dimension_count": HEAD_DIM,
        }
        for name, value in (metadata | changes).items():
            key = name.replace("llama.", f"{architecture}.", 1) if name.startswith("llama.") else name
            if isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        for name, value in (hugging_face_weights() if tensors is None else tensors).items():
            stored = value
            if "q_proj" in name and architecture == "llama":
                stored = llama_cpp_rows(value, HEADS)
            elif "k_proj" in name and architecture == "llama":
                stored = llama_cpp_rows(value, KV_HEADS)
            # llama.cpp, too, leaves norms unquantised.
            tensor_kind = kind if value.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(llama_cpp_name(name), quants.quantize(stored, tensor_kind), raw_dtype=tensor_kind)
        for name, value in (extra_tensors or {}).items():
            writer.add_tensor(name, value, raw_dtype=extra_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


# --- weights -----------------------------------------------------------------------------------------


def test_float32_weights_come_back_exactly_in_hugging_face_order(write_llama: Write) -> None:
    weights = hugging_face_weights()
    checkpoint = GgufCheckpoint(write_llama(weights))
    assert checkpoint.names() == weights.keys()
    for name, expected in weights.items():
        got = checkpoint.read(name)
        assert got.dtype == np.float32
        assert checkpoint.shape(name) == got.shape
        np.testing.assert_array_equal(got, expected, err_msg=name)


@pytest.mark.parametrize("rows", [slice(3, 11), slice(None, 5), slice(20, None), slice(7, 7)])
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_a_row_range_is_that_range_of_the_whole_tensor(write_llama: Write, name: str, rows: slice) -> None:
    got = GgufCheckpoint(write_llama(kind=GGMLQuantizationType.F32)).read(name, rows)
    np.testing.assert_array_equal(got, hugging_face_weights()[name][rows])
    assert got.flags.owndata
    assert got.flags.writeable


@pytest.mark.parametrize(
    ("kind", "relative_step"),
    # Over the largest value of a block: half a step, and 2**-11 for each float16 rounding of the block's
    # scale (once more for the offset of Q4_1, whose range is up to twice that value).
    [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 254 + 2**-11), ("Q4_1", 1 / 15 + 3 * 2**-11)],
)
def test_quantised_weights_are_within_half_a_step(write_llama: Write, kind: str, relative_step: float) -> None:
    weights = hugging_face_weights()
    checkpoint = GgufCheckpoint(write_llama(weights, GGMLQuantizationType[kind]))
    for name, expected in weights.items():
        blocks = (-1, 32)
        error = np.abs(checkpoint.read(name) - expected).reshape(blocks).max(axis=1)
        assert np.all(error <= relative_step * np.abs(expected).reshape(blocks).max(axis=1)), name


def test_dequantising_in_pieces_changes_nothing(write_llama: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = GgufCheckpoint(write_llama(kind=GGMLQuantizationType.Q8_0))
    whole = {name: checkpoint.read(name) for name in checkpoint.names()}
    monkeypatch.setattr(gguf_module, "DEQUANTIZE_CHUNK_ELEMENTS", 7 * WIDTH)
    for name, expected in whole.items():
        np.testing.assert_array_equal(checkpoint.read(name), expected)


def test_an_output_tensor_is_the_untied_head(write_llama: Write) -> None:
    head = np.ones((VOCABULARY, WIDTH), np.float32)
    tied = GgufCheckpoint(write_llama())
    untied = GgufCheckpoint(write_llama(hugging_face_weights() | {"lm_head.weight": head}))
    assert tied.config["tie_word_embeddings"] is True
    assert untied.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(untied.read("lm_head.weight"), head)


def test_digest_covers_content_and_not_the_order_of_names(write_llama: Write) -> None:
    names = sorted(hugging_face_weights())
    checkpoint, same, other = (GgufCheckpoint(write_llama(hugging_face_weights(seed))) for seed in (0, 0, 1))
    digest = checkpoint.digest(names)
    assert digest.startswith("sha256:")
    assert digest == checkpoint.digest(reversed(names)) == same.digest(names)
    assert digest not in {checkpoint.digest(names[1:]), other.digest(names)}


# --- configuration -----------------------------------------------------------------------------------


def test_config_of_the_real_model(smollm2_gguf: Path) -> None:
    checkpoint = GgufCheckpoint(smollm2_gguf)
    assert checkpoint.source == str(smollm2_gguf)
    assert checkpoint.revision is None
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }
    assert {key: checkpoint.config[key] for key in expected} == expected
    assert len(checkpoint.names()) == 30 * 9 + 2


def test_float32_metadata_comes_back_as_the_decimal_that_was_meant(write_llama: Write) -> None:
    config = GgufCheckpoint(write_llama()).config
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-05, 500000.0)


def test_keys_that_llama_cpp_lets_files_omit_get_its_defaults(write_llama: Write) -> None:
    weights = hugging_face_weights()
    for layer in range(LAYERS):
        for projection in ("k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            weights[name] = np.zeros((HEADS * HEAD_DIM, WIDTH), np.float32)
    omitted = {
        "llama.attention.head_count_kv": None,
        "llama.rope.freq_base": None,
        "llama.rope.dimension_count": None,
    }
    config = GgufCheckpoint(write_llama(weights, **omitted)).config
    assert (config["num_key_value_heads"], config["rope_theta"]) == (HEADS, 10000.0)
    assert (config["head_dim"], config["vocab_size"]) == (HEAD_DIM, VOCABULARY)


def llama3_factors(scaling: dict[str, Any], theta: float = 500_000.0) -> np.ndarray:
    """What llama.cpp's converter writes: what transformers' own frequencies are smaller by."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **scaling},
    )
    plain = theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, None)[0].numpy()).astype(np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8_192), (32.0, 8_192), (4.0, 1_024)])
def test_llama_3_1s_factors_are_the_scaling_that_the_model_was_trained_under(
    write_llama: Write, factor: float, original: int
) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    path = write_llama(extra_tensors={"rope_freqs.weight": llama3_factors(scaling)})
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.config["rope_scaling"] == {"rope_type": "llama3", **scaling}
    assert checkpoint.names() == hugging_face_weights().keys()
    rotary = port_for(checkpoint.config).config(checkpoint.config).rotary
    assert (rotary.kind, rotary.factor, rotary.theta) == ("llama3", factor, 500_000.0)
    with pytest.raises(ValueError, match="does not read the scaling"):  # else verify would compare with another model
        load_theirs(OpenModel.open(str(path)), 1, torch.float32)


def test_factors_of_one_scale_nothing(write_llama: Write) -> None:
    ones = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    assert GgufCheckpoint(write_llama(extra_tensors=ones)).config == GgufCheckpoint(write_llama()).config


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_attn_factor": 2.0, "yarn_beta_fast": 16.0},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 2 * (0.1 * math.log(4) + 1),
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_scaling_keys_mean_what_config_json_would_say(
    write_llama: Write, keys: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    changes = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    assert GgufCheckpoint(write_llama(**changes)).config.get("rope_scaling") == expected


def test_keys_that_change_nothing_are_no_obstacle(write_llama: Write) -> None:
    neutral = {"llama.expert_count": 0, "llama.attention.causal": 1, "llama.tensor_data_layout": "Meta AI original pth"}
    assert GgufCheckpoint(write_llama(**neutral)).config == GgufCheckpoint(write_llama()).config


# --- other architectures -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_configuration_and_weights_are_those_that_transformers_reads(write_llama: Write, architecture: str) -> None:
    weights = hugging_face_weights()
    random = np.random.default_rng(1)
    for layer in range(LAYERS):
        own = {
            "llama": {},
            "qwen2": {"q_proj.bias": WIDTH, "k_proj.bias": KV_HEADS * HEAD_DIM, "v_proj.bias": KV_HEADS * HEAD_DIM},
            "qwen3": {"q_norm.weight": HEAD_DIM, "k_norm.weight": HEAD_DIM},
        }[architecture]
        for name, size in own.items():
            weights[f"model.layers.{layer}.self_attn.{name}"] = random.standard_normal(size).astype(np.float32)
    # It takes a Qwen3's head for 128 wide; a Llama's by the rotary dimensions.
    sizes = {"llama.vocab_size": VOCABULARY} | ({} if architecture == "llama" else {"llama.rope.dimension_count": None})
    path = write_llama(weights, architecture=architecture, **sizes)
    checkpoint = OpenModel.open(str(path)).checkpoint
    fields = dict(checkpoint.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    assert type(theirs).__name__ == checkpoint.config["architectures"][0]
    read = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters"):
        ours, others = getattr(config, key), getattr(read, key)
        assert ours == (pytest.approx(others, rel=1e-6) if isinstance(others, float) else others), key
    assert checkpoint.names() == weights.keys()
    for name, expected in theirs.state_dict().items():
        if name in weights:
            np.testing.assert_array_equal(checkpoint.read(name), expected.numpy(), err_msg=name)
            np.testing.assert_array_equal(checkpoint.read(name), weights[name], err_msg=name)


# --- encodings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(kind.name for kind in quants._type_traits))
def test_every_encoding_is_what_the_gguf_package_makes_of_it(write_llama: Write, kind: str) -> None:
    encoding, width = GGMLQuantizationType[kind], 256
    elements, size = GGML_QUANT_SIZES[encoding]
    stored = np.random.default_rng(0).integers(0, 100, (WIDTH, width // elements * size), np.uint8)
    weights = hugging_face_weights()
    for layer in range(LAYERS):
        for name in ("gate_proj", "up_proj"):
            weights[f"model.layers.{layer}.mlp.{name}.weight"] = np.zeros((width, WIDTH), np.float32)
        weights[f"model.layers.{layer}.mlp.down_proj.weight"] = np.zeros((WIDTH, width), np.float32)
    del weights["model.layers.1.mlp.down_proj.weight"]
    path = write_llama(
        weights,
        extra_tensors={"blk.1.ffn_down.weight": stored},
        extra_kind=encoding,
        **{"llama.feed_forward_length": width},
    )
    read = GgufCheckpoint(path).read("model.layers.1.mlp.down_proj.weight", slice(3, 40))
    np.testing.assert_array_equal(read, quants.dequantize(stored, encoding)[3:40])
    assert np.any(read)


# --- pieces ------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(write_llama: Write) -> list[Path]:
    """A model in four files, as llama.cpp splits one."""
    path = write_llama(writing={"split_max_tensors": 6}, **{"tokenizer.ggml.bos_token_id": 7})
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))


def test_any_piece_opens_the_whole_model(pieces: list[Path], write_llama: Write) -> None:
    assert len(pieces) == 4
    whole = GgufCheckpoint(write_llama(**{"tokenizer.ggml.bos_token_id": 7}))
    for piece in (pieces[0], pieces[2]):
        checkpoint = GgufCheckpoint(piece)
        assert checkpoint.config == whole.config
        assert checkpoint.digest(checkpoint.names()) == whole.digest(whole.names())
        for name in whole.names():
            np.testing.assert_array_equal(checkpoint.read(name), whole.read(name))


def test_a_folder_of_pieces_is_one_model(pieces: list[Path]) -> None:
    folder = pieces[0].parent
    (folder / "mmproj-model-f16.gguf").write_bytes(b"of another kind")
    assert open_checkpoint(str(folder)).source == str(pieces[0])


def test_a_folder_of_several_models_lists_them(write_llama: Write, pieces: list[Path]) -> None:
    other = write_llama()
    with pytest.raises(UserError, match=rf"2 GGUF models \({re.escape(pieces[0].name)}, {other.name}\); give the file"):
        open_checkpoint(str(other.parent))


def test_a_folder_with_config_json_and_gguf_alone_is_that_gguf(write_llama: Write) -> None:
    path = write_llama()
    (path.parent / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(path.parent))
    assert checkpoint.source == str(path)
    assert path.name in checkpoint.notes[0]
    (path.parent / "pytorch_model.bin").write_bytes(b"x")  # which is what transformers would read
    with pytest.raises(UserError, match=r"pytorch_model\.bin, pickles"):
        open_checkpoint(str(path.parent))


def test_a_missing_piece_is_named(pieces: list[Path]) -> None:
    pieces[1].unlink()
    for path in (pieces[0], pieces[0].parent):
        with pytest.raises(UserError, match=rf"one of 4 pieces of a model and {pieces[1].name} is missing"):
            open_checkpoint(str(path))


def test_a_piece_of_another_model_is_refused(pieces: list[Path], write_llama: Write) -> None:
    pieces[1].write_bytes(pieces[2].read_bytes())
    with pytest.raises(UserError, match=rf"{pieces[1].name} says that it is piece 2 of 4.*expected 1 of 4"):
        GgufCheckpoint(pieces[0])
    pieces[1].write_bytes(write_llama().read_bytes())
    with pytest.raises(UserError, match=r"piece None of None"):
        GgufCheckpoint(pieces[0])


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "gemma"}, "general.architecture 'gemma'"),
        ({"general.type": "adapter"}, "general.type 'adapter'"),
        ({"split.count": 3}, r"one of 3 pieces of a model; expected a name such as model-00001-of-00003\.gguf"),
        ({"llama.rope.scaling.type": "longrope"}, r"'longrope' for llama\.rope\.scaling\.type"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor; expected 1"),
        ({"llama.expert_count": 8}, r"llama\.expert_count"),
        ({"llama.attention.sliding_window": 64}, r"llama\.attention\.sliding_window"),
        ({"llama.final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping"),
        ({"llama.some_new_key": 1}, r"llama\.some_new_key"),
        ({"llama.block_count": None}, r"None for llama\.block_count"),
        ({"llama.block_count": LAYERS - 1}, r"tensor 'blk\.1\."),
        ({"llama.block_count": LAYERS + 1}, r"lacks the tensor 'blk\.2\."),
        ({"llama.feed_forward_length": [FFN, FFN]}, r"a list for llama\.feed_forward_length"),
        ({"llama.feed_forward_length": FFN + 1}, r"expected \(97, 64\)"),
        ({"llama.rope.dimension_count": HEAD_DIM // 2}, r"8 for llama\.rope\.dimension_count"),
        ({"llama.attention.value_length": 2 * HEAD_DIM}, r"32 for llama\.attention\.value_length"),
        ({"llama.vocab_size": VOCABULARY + 1}, r"expected \(41, 64\)"),
        ({"tokenizer.ggml.tokens": ["a"] * (VOCABULARY + 1)}, r"41 entries in tokenizer\.ggml\.tokens"),
        ({"extra_tensors": {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}}, r"8 factors from 1 to 9"),
        ({"extra_tensors": {"rope_freqs.weight": np.full(9, 8, np.float32)}}, r"9 factors from 8 to 8; expected the 8"),
        ({"extra_tensors": {"blk.0.attn_q.bias": np.ones(WIDTH, np.float32)}}, r"blk\.0\.attn_q\.bias"),
        ({"extra_tensors": {"output.weight": np.ones((VOCABULARY, WIDTH))}}, "tensors in F64"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(write_llama: Write, change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        GgufCheckpoint(write_llama(**change))
    assert ".gguf" in str(error.value)


@pytest.mark.parametrize("kept", [5, 16, 100, 800, -1])
def test_a_truncated_file_is_refused_wherever_it_ends(write_llama: Write, kept: int) -> None:
    path = write_llama(**{"tokenizer.ggml.tokens": ["a", "b", "c"]})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"\.gguf is truncated or damaged.*download"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"\x80\x04 not a model"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a GGUF file"):
        GgufCheckpoint(path)


def test_a_big_endian_file_is_refused(write_llama: Write) -> None:
    path = write_llama()
    content = bytearray(path.read_bytes())
    content[4:8] = content[4:8][::-1]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"version 0x3000000; expected version 2 or 3, little-endian"):
        GgufCheckpoint(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            GgufCheckpoint(path)


def test_an_unknown_tensor_name_is_refused(write_llama: Write) -> None:
    checkpoint = GgufCheckpoint(write_llama())
    for ask in (checkpoint.read, checkpoint.shape, lambda name: checkpoint.digest([name])):
        with pytest.raises(UserError, match=r"no tensor 'token_embd\.weight'"):
            ask("token_embd.weight")


# --- tokenizer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_gguf: Path) -> PreTrainedTokenizerFast:
    return GgufCheckpoint(smollm2_gguf).tokenizer()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("2026", [34, 32, 34, 38]),
        ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
        ("<|endoftext|>", [0]),
        (
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182],
        ),
    ],
)
def test_smollm2_token_ids(smollm2_tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> None:
    assert smollm2_tokenizer(text).input_ids == ids


def test_smollm2_splits_every_digit(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = smollm2_tokenizer.tokenize("In 1969, 12345 and x42y")
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("19691234542")


def test_smollm2_splits_digits_before_words(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    # The vocabulary has no token of two digits, so only white space before a digit shows the order: without
    # the digit splitting the second space would go with the number, as it goes with a word.
    assert smollm2_tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert smollm2_tokenizer.tokenize("a  b") == ["a", "Ġ", "Ġb"]


@pytest.mark.parametrize(
    "text",
    [
        "  leading, double  and trailing spaces  \n\n\ttabs",
        "naïve café, Ελληνικά, Русский, 日本語, עברית, हिन्दी",
        "decomposed e\u0301 stays decomposed",
        "👩🏽‍🚀 \U0001d518\U0001d52b \u200b\ufeff",
        "don't !!! ,. 'tis isn 't",
        "def f(x):\n    return x ** 2  # ½ Ⅷ ²\r\n",
    ],
)
def test_smollm2_decoding_inverts_encoding(smollm2_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert smollm2_tokenizer.decode(smollm2_tokenizer(text).input_ids) == text


def test_smollm2_has_only_the_byte_gaps_of_its_own_vocabulary(
    smollm2_tokenizer: PreTrainedTokenizerFast,
) -> None:
    # SmolLM2 was trained without these control characters; no other printable or control ASCII may be lost.
    lost = [chr(code) for code in range(128) if not smollm2_tokenizer(chr(code)).input_ids]
    assert lost == ["\x04", "\x06", "\x13", "\x14", "\x16", "\x1d"]


def test_smollm2_special_tokens_and_chat_template(smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = smollm2_tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert tokenizer("text").input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.decode([1, 19556, 16, 2], skip_special_tokens=True) == "Hello"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(prompt, str)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_reading_weights_and_tokenizer_needs_no_torch(smollm2_gguf: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from jax_extract.weights.gguf import GgufCheckpoint; "
        f"checkpoint = GgufCheckpoint(Path({str(smollm2_gguf)!r})); "
        "assert 'transformers' not in sys.modules, 'imported before it is needed'; "
        "checkpoint.read('model.norm.weight'); checkpoint.tokenizer()('text'); "
        "assert 'torch' not in sys.modules"
    )
    root = Path(gguf_module.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def tokenizer_fields(pre: str, **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary with a few merges, one token of every kind, and one unused token."""
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "the"),
        ("1", "2"),
        ("Ã", "©"),
        ("'", "s"),
        ("Ċ", "Ċ"),
        ("Ġ", "Ġ"),
    ]
    text_tokens = sorted(ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*text_tokens, "<|end|>", "<tool>", "[PAD9]"],
        "tokenizer.ggml.token_type": [1] * len(text_tokens) + [3, 4, 5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": len(text_tokens),
    } | changes


def build_tokenizer(fields: dict[str, Any]) -> Any:
    """The backend of a GGUF file's tokenizer in one of transformers, which runs it."""
    return _in_transformers(_backend(fields), _options(fields))


def _llama3_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    fields = {"tokenizer_type": "gpt2", "pre_tokenizer_type": "llama-bpe", "tokens": list(vocab)}
    backend, _ = convert_gguf_tokenizer("llama", {**fields, "merges": [" ".join(merge) for merge in merges]})
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("pre", "reference"),
    [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer), ("llama-bpe", _llama3_tokenizer)],
)
@pytest.mark.parametrize(
    "text",
    [
        "the the  the\n\n\nthe's THE'S",
        "12 1212 x12, 12.5",
        "cafe\u0301 café",
        "a\r\n  b\t c   ",
        "(the) _the! ...\n\n the",
    ],
)
def test_pre_tokenisers_agree_with_transformers(pre: str, reference: Any, text: str) -> None:
    fields = tokenizer_fields(pre)
    tokens = fields["tokenizer.ggml.tokens"][:-3]
    merges = [tuple(line.split(" ")) for line in fields["tokenizer.ggml.merges"]]
    expected = reference(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    assert build_tokenizer(fields)(text).input_ids == expected(text).input_ids


def test_added_tokens_keep_their_ids_and_kinds() -> None:
    fields = tokenizer_fields("qwen2")
    tokenizer = build_tokenizer(fields)
    end, tool = (fields["tokenizer.ggml.tokens"].index(token) for token in ("<|end|>", "<tool>"))
    ids = tokenizer("the<tool><|end|>").input_ids
    assert ids[1:] == [tool, end]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>"
    assert (tokenizer.eos_token_id, tokenizer.bos_token) == (end, None)
    assert "[PAD9]" not in tokenizer.get_vocab()


def test_llama_3_begins_every_text_and_takes_words_that_are_tokens_whole() -> None:
    fields = tokenizer_fields("llama-bpe")
    end = fields["tokenizer.ggml.eos_token_id"]
    fields["tokenizer.ggml.bos_token_id"] = end
    fields["tokenizer.ggml.tokens"].append("Ġhouse")  # without merges that lead to it
    fields["tokenizer.ggml.token_type"].append(1)
    assert build_tokenizer(fields)(" house").input_ids == [end, len(fields["tokenizer.ggml.tokens"]) - 1]
    assert build_tokenizer(fields | {"tokenizer.ggml.add_bos_token": False})("the").input_ids[0] != end


def test_add_bos_token_is_honoured() -> None:
    fields = tokenizer_fields("gpt-2")
    end = fields["tokenizer.ggml.eos_token_id"]
    with_bos = {"tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.add_bos_token": True}
    plain = build_tokenizer(fields)("the").input_ids
    assert build_tokenizer(fields | with_bos)("the").input_ids == [end, *plain]
    assert build_tokenizer(fields | with_bos | {"tokenizer.ggml.add_bos_token": False})("the").input_ids == plain


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.model is 'llama'"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            r"tokenizer\.ggml\.pre is 'tekken'; expected one of 'gpt-2', 'llama-bpe'",
        ),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre is None"),
        ({"tokenizer.ggml.merges": None}, r"None for tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.merges": ["t h e"]}, r"tokenizer\.ggml\.merges has 't h e'"),
        ({"tokenizer.ggml.token_type": [1]}, r"1 entries in tokenizer\.ggml\.token_type"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, r"'a' at 0 and at 1"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, r"tokenizer\.ggml\.eos_token_id is 1000000"),
        ({"tokenizer.ggml.add_bos_token": True}, r"tokenizer\.ggml\.add_bos_token is True but"),
        ({"tokenizer.ggml.add_space_prefix": True}, r"tokenizer\.ggml\.add_space_prefix is True"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_tokenizer(tokenizer_fields("smollm", **changes))


def test_the_tokenizer_of_the_models_own_folder_stands_in_for_one_that_cannot_be_rebuilt(write_llama: Write) -> None:
    path = write_llama(**{"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(UserError, match=r"model is 'llama'; .*or put its tokenizer\.json .* beside this file"):
        GgufCheckpoint(path).tokenizer()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder("llama") / name, path.parent)
    assert GgufCheckpoint(path).tokenizer()(["!#"])["input_ids"] == [[0, 2]]


# --- the whole ---------------------------------------------------------------------------------------


def test_the_real_model_predicts_plain_english_only_with_rows_in_order(smollm2_gguf: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = GgufCheckpoint(smollm2_gguf)
    tokenizer = checkpoint.tokenizer()
    config = dict(checkpoint.config)
    # transformers 5 spells it so.
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def perplexities(tensors: Tensors) -> list[float]:
        state = {name: torch.from_numpy(value) for name, value in tensors.items()}
        loaded = model.load_state_dict(state, strict=False)
        assert (loaded.missing_keys, loaded.unexpected_keys) == (["lm_head.weight"], [])
        model.tie_weights()
        with torch.inference_mode():
            batches = [torch.tensor([tokenizer(text).input_ids]) for text in (STORY, EXPLANATION)]
            return [math.exp(model(ids, labels=ids).loss) for ids in batches]

    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    disordered = {
        name: llama_cpp_rows(value, heads[projection])
        for name, value in weights.items()
        if (projection := name.split(".")[-2]) in heads
    }
    right, wrong = perplexities(weights), perplexities(weights | disordered)
    assert right[1] < EXPLANATION_PERPLEXITY
    for ordered, unordered in zip(right, wrong, strict=True):
        assert ordered * WRONG_ORDER_RATIO < unordered, (right, wrong)
