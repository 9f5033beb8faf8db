"""Configurations as their makers released them are read; what a port does not compute is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from jax_extract.errors import UserError
from jax_extract.weights.text_part import text_config
from models.layers import Rotary
from models.registry import port_for

# What the configurations of released models say beyond what today's transformers writes.
GPT2_MEDIUM = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 1024,
    "n_head": 16,
    "n_layer": 24,
    "n_positions": 1024,
    "n_special": 0,
    "predict_special_tokens": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}


# As the model with pictures has it of its language model.
GEMMA3_4B = {
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2_MEDIUM, {"head_dim": 64, "intermediate_size": 4096, "tie_word_embeddings": True}),
        (PYTHIA, {"rotated": 32, "parallel": True, "attention_bias": True}),
        # What is absent is what transformers takes for it.
        (GEMMA2, {"soft_cap": 50.0, "head_soft_cap": 30.0, "windows": (4096, 0) * 13}),
        ({**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}, {"soft_cap": None}),
        ({**GEMMA2, "sliding_window": 512, "sliding_window_size": 256}, {"windows": (512, 0) * 13}),
        # Hugging Face's Gemma 1 has no cap, whatever its config.json says.
        ({**GEMMA2, "model_type": "gemma", "final_logit_softcapping": 30.0}, {"head_soft_cap": None}),
        (
            GEMMA3_4B,
            {
                **{"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
                **{"windows": ((1_024,) * 5 + (0,)) * 5 + (1_024,) * 4, "max_position_embeddings": 131_072},
                **{"rotary": Rotary(1e6, "linear", 8.0), "local_rotary": Rotary(1e4), "query_scale": 1 / 16},
            },
        ),
    ],
)
def test_released_configurations_are_read(config: dict[str, Any], expected: dict[str, Any]) -> None:
    config = text_config(config)
    found = port_for(config).config(config)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**GPT2_MEDIUM, "activation_function": "quick_gelu"}, r"'quick_gelu'; this port computes 'silu', .*'relu'"),
        ({**GPT2_MEDIUM, "add_cross_attention": True}, r"add_cross_attention True"),
        ({**PYTHIA, "rope_scaling": "linear"}, r"has rope_scaling 'linear'; it must be a mapping"),
        ({**GEMMA2, "rope_parameters": [1]}, r"has rope_parameters \[1\]; it must be a mapping"),
        ({**GEMMA2, "rope_parameters": {"rope_type": ["linear"]}}, r"unsupported rope type \['linear'\]"),
        ({**GEMMA2, "layer_types": 5}, r"has layer_types 5; expected a list of 26"),
        ({**GEMMA2, "layer_types": [[1]] * 26}, r"has the layer type \[1\]"),
        ({**GEMMA2, "layer_types": ["full_attention"] * 27}, r"expected a list of 26, one a layer"),
        ({**GEMMA2, "rope_theta": 10**400}, r"has rope_theta 1000.*; it must be a positive number"),
        ({**PYTHIA, "rotary_pct": 0.01}, r"rotates 1 of a head's 128 values"),
        ({**PYTHIA, "num_attention_heads": 7, "rotary_pct": 1.0}, r"width 2048 is not a multiple of the 7 heads"),
        ({**GEMMA2, "model_type": "gemma9"}, r"unsupported architecture 'gemma9' \(the nearest is 'gemma"),
    ],
)
def test_what_a_port_does_not_compute_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        port_for(config).config(config)
