"""config.json as people have it: read as transformers reads it, and refused only for what would change a row.

Guarded: every field that transformers' classes define or their code reads is known here, with its default; a key that
is missing or null means what it means there; bookkeeping of any age is silent, a field that nobody reads is a note, a
scale that no port computes is one sentence; docs/models.md says what is true. The truth is transformers' own classes.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from models_page import PAGE, REFUSED, compared, sentence, shrunk, with_generated
from small_run import whole_lines
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, masking_utils

from jax_extract.errors import UserError
from jax_extract.extraction.summary import tell_model_notes
from jax_extract.terminal import Terminal
from jax_extract.weights.model_type import name_model_type
from jax_extract.weights.open_model import OpenModel
from jax_extract.weights.text_part import text_config
from models.config_fields import BOOKKEEPING, OF_OTHER_DECODERS
from models.ports import ModelConfig
from models.registry import PORTS, port_for

MODEL_TYPES = tuple(sorted(PORTS))
SMALL = {"hidden_size": 512, "intermediate_size": 90, "num_hidden_layers": 4, "num_attention_heads": 32}
LLAMA = {"model_type": "llama", **SMALL, "num_key_value_heads": 8, "vocab_size": 131}


def read(config: dict[str, Any]) -> ModelConfig:
    return port_for(config).config(config)


def notes(config: dict[str, Any]) -> tuple[str, ...]:
    return port_for(config).fields[config["model_type"]].notes(config)


def known_to(model_type: str) -> frozenset[str]:
    """Every name of config.json that something here decides about."""
    ours = PORTS[model_type].fields[model_type]
    return BOOKKEEPING.union(ours.read, ours.ignored, ours.renamed, ours.echoes, OF_OTHER_DECODERS)


# ------------------------------------------------------------------------- what transformers defines and reads

_READS = re.compile(r"""config\.([a-z_]\w*)\b(?!\()|getattr\([\w.]*config,\s*"(\w+)\"""")
# Of the whole model that reads pictures, whose class lies in the same file.
_OF_PICTURES = {"text_config", "vision_config", "image_token_id", "mm_tokens_per_image"}


def modelling_source(model_type: str) -> str:
    beside = Path(inspect.getfile(CONFIG_MAPPING[model_type]))
    return beside.with_name(beside.name.replace("configuration_", "modeling_")).read_text()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_field_that_transformers_defines_is_known(model_type: str) -> None:
    theirs = CONFIG_MAPPING[model_type]
    defined = {field.name for field in dataclass_fields(theirs)} | set(theirs.attribute_map)
    # What the class takes besides its fields, in older spellings.
    defined |= set(re.findall(r'kwargs\.(?:pop|get|setdefault)\("(\w+)"', inspect.getsource(theirs)))
    assert defined - known_to(model_type) == set()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_field_that_transformers_code_reads_is_known(model_type: str) -> None:
    found = {a or b for a, b in _READS.findall(modelling_source(model_type))}
    assert found - known_to(model_type) - _OF_PICTURES == set()


def test_every_field_that_makes_a_mask_is_known() -> None:
    source = "".join(
        inspect.getsource(function)
        for function in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask)
    )
    assert {a or b for a, b in _READS.findall(source)} == {"is_causal", "sliding_window", "_attn_implementation"}


def test_the_bookkeeping_of_every_class_is_known() -> None:
    of_classes = {field.name for field in dataclass_fields(PreTrainedConfig)} | set(PreTrainedConfig().__dict__)
    of_generation = set(GenerationConfig().to_dict()) | set(GenerationConfig._get_default_generation_params())
    assert (of_classes | of_generation) - BOOKKEEPING == set()
    for model_type in MODEL_TYPES:
        assert not BOOKKEEPING & set(PORTS[model_type].fields[model_type].read) - {"add_cross_attention"}


# --------------------------------------------------------------------------- what a missing or a null key means

# Values that are no class's default, for each field that a port reads.
_OTHER: dict[str, Any] = {
    **SMALL,
    **{"vocab_size": 131, "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 77},
    **{"rms_norm_eps": 3e-3, "layer_norm_eps": 3e-3, "layer_norm_epsilon": 3e-3},
    **{"hidden_act": "relu", "activation_function": "relu", "hidden_activation": "gelu_new"},
    **{"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2, "sliding_window_pattern": 3},
    **{"rope_theta": 500.0, "rope_local_base_freq": 300.0, "rotary_emb_base": 700.0, "rotary_pct": 0.5},
    **{"partial_rotary_factor": 1.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    **{"n_positions": 77, "n_embd": 384, "n_layer": 4, "n_head": 32, "n_inner": 70},
    **{"query_pre_attn_scalar": 17, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}
_ONE_VALUE = ("attention_bias", "use_bidirectional_attention", "add_cross_attention")  # of which a port computes one


def filled(model_type: str) -> dict[str, Any]:
    """A configuration that leaves no field at its default."""
    config: dict[str, Any] = {"model_type": model_type}
    for name, default in PORTS[model_type].fields[model_type].read.items():
        if isinstance(default, bool):
            config[name] = default if name in _ONE_VALUE and model_type.startswith(("gemma", "gpt2")) else not default
        elif name in _OTHER:
            config[name] = copy.deepcopy(_OTHER[name])
    if model_type == "gemma":
        config["hidden_act"] = "gelu_new"
    if model_type in ("phi", "gpt_neox"):
        del config["head_dim"]
        config["partial_rotary_factor"] = 0.25
    return config


def as_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """Everything that transformers makes of a configuration, written out."""
    model_type = config["model_type"]
    # As AutoConfig takes it.
    kind = "ministral" if model_type == "mistral" and "layer_types" in config else model_type
    return {**CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config)).to_dict(), "model_type": model_type}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_configuration_without_any_key_is_what_transformers_takes(model_type: str) -> None:
    assert read({"model_type": model_type}) == read(as_transformers({"model_type": model_type}))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_missing_key_means_what_it_means_to_transformers(model_type: str) -> None:
    config = filled(model_type)
    assert read(config) == read(as_transformers(config))
    for name in config.keys() - {"model_type"}:
        rest = {key: value for key, value in config.items() if key != name}
        assert read(rest) == read(as_transformers(rest)), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_null_means_what_it_means_to_transformers(model_type: str) -> None:
    config = filled(model_type)
    for name in config.keys() - {"model_type"}:
        nulled = {**config, name: None}
        try:
            theirs = as_transformers(nulled)
            theirs = read(theirs)
        except Exception:  # noqa: BLE001 (a class refuses in its own way, and so do we of what it gives)
            # What transformers 4 took for the number of heads is taken for it still.
            if (model_type, name) != ("mistral", "num_key_value_heads"):
                with pytest.raises(UserError, match=r"config\.json"):
                    read(nulled)
            continue
        assert read(nulled) == theirs, name


def test_each_default_of_a_port_is_that_of_the_class() -> None:
    for model_type in MODEL_TYPES:
        theirs = CONFIG_MAPPING[model_type]
        defaults = {field.name: field.default for field in dataclass_fields(theirs)}
        ours = PORTS[model_type].fields[model_type].read
        assert {name: ours[name] for name in ours if name in defaults} == {
            name: defaults[name] for name in ours if name in defaults
        }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mistral"}, {"windows": (4_096,) * 32, "num_key_value_heads": 8}),
        ({"model_type": "mistral", "sliding_window": None}, {"windows": ()}),
        ({"model_type": "qwen2", "use_sliding_window": True}, {"windows": (0,) * 28 + (4_096,) * 4}),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None}, {"windows": ()}),
        ({**LLAMA, "pretraining_tp": 4}, {"max_position_embeddings": 2_048, "rms_norm_eps": 1e-6}),
        ({**LLAMA, "rope_scaling": {}, "rope_theta": 500_000}, {}),
        ({**LLAMA, "hidden_act": "relu"}, {"activation": "relu"}),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 2.0},
            {"windows": (4_096, 0, 4_096)},
        ),
        # A bias has a switch where the class defines one.
        ({**LLAMA, "model_type": "qwen2", "attention_bias": False}, {"qkv_bias": True, "output_bias": False}),
        ({**LLAMA, "model_type": "mistral", "attention_bias": True, "mlp_bias": True}, {"qkv_bias": False}),
        ({"model_type": "gpt2", "hidden_size": 96, "n_embd": 48}, {"hidden_size": 96}),
        (
            {"model_type": "gpt_neox", "rotary_emb_base": 25_000, "rope_theta": 10_000, "rotary_pct": 1.0},
            {"rotated": 96},
        ),
    ],
)
def test_what_released_files_leave_out_or_say_twice(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = read(config)
    assert {name: getattr(found, name) for name in expected} == expected
    assert found == read(as_transformers(config))


def test_old_rope_parameters_count_before_new_ones() -> None:
    both = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 7.0}}
    assert read(both) == read(as_transformers(both)) != read({**LLAMA, "rope_parameters": {"rope_theta": 7.0}})


# ------------------------------------------------------------------------------------------ what is beside

_BOOKKEEPING: dict[str, Any] = {
    **{"use_mrope": False, "_attn_implementation_autoset": True, "quantization_config": None, "max_length": 4_096},
    **{"max_sequence_length": 16_384, "pruned_heads": {}, "torchscript": False, "num_labels": 2, "do_sample": True},
    **{"tokenizer_class": "LlamaTokenizer", "temperature": 0.6, "top_k": 50, "unk_token_id": 0, "name_or_path": "x"},
    **{"_name_or_path": None, "custom_pipelines": {}, "internal_version": "7b", "torch_dtype": "bf16", "dtype": None},
    **{
        "pad_token_id": -1,
        "eos_token_id": [1, 2],
        "rope_interleaved": False,
        "is_llama_config": True,
        "bos_token_id": [1],
    },
    **{"tf_legacy_loss": False, "add_cross_attention": False, "embedding_multiplier": 1.0, "alibi": False},
    **{"transformers.js_config": {"kv_cache_dtype": {}}, "task_specific_params": None, "mup_scale": 1.0},
}


def test_bookkeeping_of_any_age_changes_nothing_and_is_silent() -> None:
    assert read({**LLAMA, **_BOOKKEEPING}) == read(LLAMA)
    assert notes({**LLAMA, **_BOOKKEEPING}) == ()


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"use_foo": True, "rotary_dim": 32}, "rotary_dim, use_foo"),
        ({"dual_chunk_attention_config": {"chunk_size": 262_144}}, "dual_chunk_attention_config"),
        ({"sliding_window": 4_096, "layer_types": None}, "sliding_window"),
    ],
)
def test_a_field_that_nobody_reads_is_a_note(beside: dict[str, Any], named: str) -> None:
    assert read({**LLAMA, **beside}) == read(LLAMA)
    assert notes({**LLAMA, **beside}) == (f"config.json has {named}, which transformers does not read either: ignored",)


def test_a_second_name_is_worth_a_note_only_where_it_says_something_else() -> None:
    neox = {"model_type": "gpt_neox", "rotary_emb_base": 10_000, "rotary_pct": 0.25, "partial_rotary_factor": 0.25}
    assert notes({**neox, "rope_theta": 10_000.0}) == ()
    assert "rope_theta (rotary_emb_base counts)" in notes({**neox, "rope_theta": 500.0})[0]
    assert notes({"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4_096}) == ()
    assert "sliding_window_size" in notes({"model_type": "gemma2", "sliding_window_size": 512})[0]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config \(fp8\): its weights are quantised",
        ),
        ({"quantization": {"bits": 4}}, r"has a quantization: its weights are quantised"),
        ({"embedding_multiplier": 12.0}, r"has embedding_multiplier 12.0, which other model types compute with"),
        ({"mup_width_scale": 0.125}, r"has mup_width_scale 0.125, which other model types"),
        ({"attention_multiplier": 1.0}, r"has attention_multiplier 1.0"),
        ({"final_logit_softcapping": 30.0}, r"has final_logit_softcapping 30.0"),
        ({"use_mrope": True}, r"has use_mrope True"),
        ({"num_local_experts": 8}, r"has num_local_experts 8"),
        ({"is_causal": None}, r"has is_causal None: tokens would attend to later ones"),
        (
            {"per_layer_config": {"0": {"num_key_value_heads": 4}}},
            r"per_layer_config, which gives single layers",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor below 1"),
        ({"head_dim": 32.0}, r"has head_dim 32.0; it must be a whole number"),
        ({"rope_theta": {"__float__": "Infinity"}}, r"has rope_theta inf; it must be a positive number"),
        ({"hidden_act": "mish"}, r"asks for hidden_act 'mish'; this port computes 'silu'"),
    ],
)
def test_what_would_change_the_rows_is_refused_with_its_name(beside: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read({**LLAMA, **beside})


def test_layers_with_a_window_of_no_length_are_refused_as_transformers_does() -> None:
    config = {**LLAMA, "model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}
    with pytest.raises(UserError, match="no sliding_window that says how long it is"):
        read(config)


def test_numbers_that_json_lacks_are_read() -> None:
    tagged = {**LLAMA, "time_limit": [0.0, {"__float__": "Infinity"}], "rope_theta": 5e5}
    assert read(json.loads(json.dumps(tagged))) == read({**LLAMA, "rope_theta": 5e5})
    assert read(json.loads(json.dumps({**LLAMA, "time_limit": float("nan")}))) == read(LLAMA)


def test_quantisation_of_a_model_that_reads_pictures_is_refused_too() -> None:
    whole = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}}
    assert read(text_config(whole)).model_type == "gemma3_text"
    with pytest.raises(UserError, match="quantised"):
        read(text_config({**whole, "quantization_config": {"quant_method": "bitsandbytes"}}))


# ----------------------------------------------------------------------------------- files without a model type


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {"n_ctx": 1_024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1_024, "vocab_size": 50_257},
            "gpt2",
        ),
        ({"architectures": ["GPTNeoXForCausalLM"], "hidden_size": 64}, "gpt_neox"),
        # GPT-J has the same sizes, and rotations.
        ({"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1_024, "vocab_size": 9, "rotary_dim": 64}, None),
        ({"max_position_embeddings": 1_010_000, "rope_theta": 1e7}, None),
    ],
)
def test_a_type_that_a_file_does_not_name_is_read_off_it_where_it_is_clear(config: dict[str, Any], found: str) -> None:
    told = name_model_type(config)
    assert config.get("model_type") == found
    assert bool(told) == bool(found)
    if found is None:
        with pytest.raises(UserError, match="has no 'model_type'"):
            port_for(config)


# ---------------------------------------------------------------------------------------------- told, and right


def test_notes_reach_the_user_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "use_foo": 1, "use_mrope": False}))
    save_file({}, tmp_path / "model.safetensors")
    model, terminal = OpenModel.open(str(tmp_path)), Terminal()
    tell_model_notes(model, terminal)
    tell_model_notes(model, terminal)
    told = "note     config.json has use_foo, which transformers does not read either: ignored\n"
    assert whole_lines(capsys.readouterr().out) == told


def test_the_page_of_models_says_what_the_code_says() -> None:
    page = PAGE.read_text()
    assert with_generated(page) == page, "python tests/models_page.py --write"
    assert all(sentence(beside) for beside in REFUSED)
    assert "**differs**" not in page


def test_rows_under_a_configuration_full_of_odd_keys_are_those_of_hugging_face() -> None:
    odd = {"hidden_act": "gelu", "pretraining_tp": 2, "use_foo": 1, "attention_bias": True, "sliding_window": 5}
    worst, wrong = compared({**LLAMA, **odd}, {**LLAMA, **odd})
    assert worst and not wrong


def test_a_configuration_made_small_has_a_factor_for_each_frequency_that_is_left() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    config = {"model_type": "llama", "hidden_size": 4_096, "num_attention_heads": 32, "rope_scaling": scaling}
    small = shrunk(config)
    assert len(small["rope_scaling"]["long_factor"]) == port_for(small).config(small).head_dim // 2 < 64
