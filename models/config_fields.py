"""Which fields of a config.json a model type reads, which no row depends on, and what a missing one means.

In: config.json as a dictionary, and a port's `Fields` of its model type. Out: the same dictionary with every field that
the port reads, as transformers 5 would take it; the fields that nobody reads; or one sentence that names a field
which is set and would change the rows, or which says that the model is another one. The truth is transformers'
configuration class and modelling code of that type; tests/test_model_configs.py compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import UserError

TORCH_MEND = "--backend torch computes it as transformers does"

# What every class of transformers has or had: bookkeeping, types, the implementation of attention, other tasks' heads.
_OF_EVERY_CLASS = frozenset(
    (
        "model_type architectures auto_map transformers_version _name_or_path name_or_path _commit_hash dtype "
        "torch_dtype output_hidden_states output_attentions _output_attentions return_dict use_return_dict use_cache "
        "chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size "
        "tie_encoder_decoder tie_last_hidden_states id2label label2id num_labels _num_labels problem_type "
        "finetuning_task task_specific_params tokenizer_class prefix bos_token_id eos_token_id pad_token_id "
        "sep_token_id unk_token_id mask_token_id cls_token_id decoder_start_token_id torchscript use_bfloat16 "
        "tf_legacy_loss pruned_heads attn_implementation _attn_implementation _attn_implementation_internal "
        "_attn_implementation_autoset experts_implementation _experts_implementation _experts_implementation_internal "
        "_flash_attn_2_enabled gradient_checkpointing initializer_range output_past xla_device is_composition "
        "keys_to_ignore_at_inference has_no_defaults_at_init attribute_map base_config_key sub_configs "
        "sub_configs_defaults base_model_tp_plan base_model_pp_plan base_model_ep_plan base_model_fsdp_plan "
        "_auto_class extra_files extra_config_files _is_quantized _post_init_done ignore_keys_at_rope_validation "
        "distributed_config allow_global_per_layer_attribute_access classifier_dropout summary_last_dropout "
        "fusion_config hidden_dropout"
    ).split()
)
# How answers are sampled, which older releases kept in config.json; all fields of transformers' GenerationConfig.
_OF_GENERATION = frozenset(
    (
        "_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
        "assistant_lookbehind bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config "
        "constraints continuous_batching_config disable_compile diversity_penalty do_sample dola_layers early_stopping "
        "encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff "
        "exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id generation_config "
        "guidance_scale is_assistant length_penalty low_memory max_cache_len max_length max_matching_ngram_size "
        "max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens "
        "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits output_scores "
        "penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits "
        "repetition_penalty return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens "
        "target_lookbehind temperature token_healing top_h top_k top_p typical_p use_mtp watermarking_config"
    ).split()
)
# What other programs write into many released files, known to mean nothing to the model.
_OF_OTHER_PROGRAMS = frozenset(
    (
        "transformers.js_config unsloth_version unsloth_fixed is_llama_config custom_pipelines custom_pipeline "
        "internal_version max_sequence_length model_max_length neuron"
    ).split()
)
BOOKKEEPING = _OF_EVERY_CLASS | _OF_GENERATION | _OF_OTHER_PROGRAMS

# Any value but null and {} changes what is computed, or says that the weights are not what they seem.
_QUANTIZED = ("quantization_config", "quantization", "compression_config")
_REFUSED_WHEN_SET = {
    "per_layer_config": "gives single layers a shape of their own",
    "transformers_weights": "names the file of the weights",
}

# What other decoders of transformers compute with -> the values that leave the mathematics alone; null always does.
_NONE = ([], {})
_ONE, _OFF = (1, 1.0), (False,)
OF_OTHER_DECODERS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "embedding_multiplier residual_multiplier logits_scaling lm_head_multiplier key_multiplier "
        "attention_in_multiplier attention_out_multiplier scale_emb embedding_scale logit_scale residual_scale "
        "attention_value_scale logits_mup_width_multiplier".split(),
        _ONE,
    ),
    **dict.fromkeys(
        "attention_multiplier scale_depth dim_model_base clip_qkv mlp_multipliers attention_logit_cap logits_soft_cap "
        "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar no_rope_layers no_rope_layer_interval "
        "attention_chunk_size".split(),
        _NONE,
    ),
    **dict.fromkeys(
        "use_mrope use_qk_norm qk_norm qk_layernorm alibi use_alibi multi_query new_decoder_architecture parallel_attn "
        "use_parallel_residual rope_interleave rope_interleaved attn_temperature_tuning scale_embedding "
        "apply_residual_connection_post_layernorm mup_enabled use_post_norm use_attention_gate".split(),
        _OFF,
    ),
    **dict.fromkeys("num_local_experts num_experts n_routed_experts".split(), (0, *_ONE)),
}
_OF_ALL = ("is_causal",)  # read by the code that makes every decoder's mask
_MUP = "mup_"  # the scales of maximal update parametrisation, under many names
_MUP_NEUTRAL = (0, *_ONE, *_OFF)

_FLOAT_TAG = "__float__"  # JSON has no infinity; transformers writes {"__float__": "Infinity"}
_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


@dataclass(frozen=True)
class Fields:
    """The fields of one model type, as transformers' class and modelling code have them.

    Attributes:
      read: what the port reads -> what transformers takes where config.json lacks it.
      ignored: what the class has and no row depends on: dropout, other tasks' heads, what the makers wrote beside.
      renamed: other spellings of a field, which count before it -> the field.
      echoes: what transformers does not read -> the field that it reads instead; worth a word only where they differ.
    """

    read: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    echoes: Mapping[str, str] = field(default_factory=dict)

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with every field that the port reads; UserError where a field asks for what no port computes.

        A field that is null stays null: to transformers it is a value like others.
        """
        said = {**untagged(dict(config))}
        for spelling, name in self.renamed.items():
            if spelling in said:
                said[name] = said.pop(spelling)
        self._refuse_what_no_port_computes(said)
        return {**self.read, **said}

    def unread(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of fields that are set and that neither transformers nor this port reads, sorted."""
        said = self.complete(config)
        known = BOOKKEEPING.union(self.read, self.ignored, OF_OTHER_DECODERS, _QUANTIZED, _REFUSED_WHEN_SET, _OF_ALL)
        there = (name for name, value in said.items() if value is not None)
        return tuple(sorted(name for name in there if not self._known(name, known, said)))

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Sentences about fields that are ignored, though a user might think that they count."""
        names = [
            f"{name} ({self.echoes[name]} counts)" if name in self.echoes else name for name in self.unread(config)
        ]
        return (f"config.json has {', '.join(names)}, which transformers does not read either: ignored",) * bool(names)

    def _known(self, name: str, known: frozenset[str], said: Mapping[str, Any]) -> bool:
        if name in self.echoes:
            return said[name] == said[self.echoes[name]]
        return name in known or name.startswith(_MUP)

    def _refuse_what_no_port_computes(self, said: Mapping[str, Any]) -> None:
        for name in _QUANTIZED:
            if said.get(name):
                raise UserError(
                    f"config.json has a {name}{_method(said[name])}: its weights are quantised, and no port computes "
                    f"with such weights; give the model as it was before quantisation ({TORCH_MEND})"
                )
        for name, effect in _REFUSED_WHEN_SET.items():
            if said.get(name):
                raise UserError(f"config.json has {name}, which {effect}; no port does that ({TORCH_MEND})")
        if said.get("is_causal", True) is not True:
            raise UserError(
                f"config.json has is_causal {said['is_causal']!r:.40}: tokens would attend to later ones, which no "
                f"port computes ({TORCH_MEND})"
            )
        for name, value in said.items():
            neutral = _MUP_NEUTRAL if name.startswith(_MUP) else OF_OTHER_DECODERS.get(name)
            if neutral is None or name in self.read or name in self.ignored or value is None or value in neutral:
                continue
            raise UserError(
                f"config.json has {name} {value!r:.40}, which other model types compute with and "
                f"{said.get('model_type')!r} does not: the file describes another model than model_type says; correct "
                f"one of the two ({TORCH_MEND}, which ignores {name})"
            )


def untagged(value: Any) -> Any:
    """A value of config.json with the numbers that JSON lacks, as transformers writes them."""
    if isinstance(value, dict):
        if set(value) == {_FLOAT_TAG} and isinstance(value[_FLOAT_TAG], str):
            return _FLOATS.get(value[_FLOAT_TAG], value)
        return {key: untagged(inner) for key, inner in value.items()}
    return [untagged(inner) for inner in value] if isinstance(value, list) else value


def _method(quantization: Any) -> str:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return f" ({method})" if isinstance(method, str) else ""
