"""Tokens are those that the model was trained on.

Guarded: one BOS; special tokens as asked; conversations, system turns and variables through the chat template, as
transformers renders it; what a template lacks is told; data that are tokenized already; an adapter's own tokenizer,
template and embeddings; a run that was begun before any of this. What a run keeps from its start is in
`test_as_begun`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from jinja2 import Environment
from small_run import make_model
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jax_extract.config import ExtractConfig, from_mapping, from_yaml, to_yaml
from jax_extract.errors import UserError
from jax_extract.inputs.samples import Sample
from jax_extract.inputs.template_variables import variables_of
from jax_extract.inputs.tokenize import InputCounts, tokenize, tokenizer_digest
from jax_extract.inputs.wrapping import Kept, Wrapping
from jax_extract.weights.adapter_tokenizer import adapter_tokenizer
from jax_extract.weights.open_model import OpenModel

CHAT = (
    "{{ bos_token }}{% if not date is defined %}{% set date = 'no day' %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}|{{ date }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if thinking is defined and not thinking %}<quiet>{% endif %}{% endif %}"
)
CLOCK = "{% for m in messages %}{{ strftime_now('%d %b %Y %H:%M') }} {{ m.content }}{% endfor %}"
BOS, EOS = 256, 257


def letters(template: Any = None, opens: bool = True, ends: bool = False, more: Sequence[str] = ()) -> Any:
    """A tokenizer of single bytes, with <s> and </s> around a text where wanted."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    around = [*(["<s>"] if opens else []), "$A", *(["</s>"] if ends else [])]
    backend.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(more), special_tokens=True)
    return tokenizer


def tokens(
    tokenizer: Any, *given: str | Sample, vocab: int = 300, most: int = 1_000, **wrapping: Any
) -> tuple[list[list[int]], InputCounts]:
    samples = [s if isinstance(s, Sample) else Sample(f"s{i}", s) for i, s in enumerate(given)]
    counts = InputCounts()
    found = list(tokenize(samples, tokenizer, most, Wrapping(**wrapping), counts, vocab))
    return [sample.token_ids.tolist() for sample in found], counts


def turns(*said: tuple[str, str], name: str = "t") -> Sample:
    return Sample(name, "", turns=tuple({"role": role, "content": content} for role, content in said))


def refused(sentence: str, *given: Any, **more: Any) -> None:
    with pytest.raises(UserError, match=sentence):
        tokens(*given, **more)


# ------------------------------------------------------------------------------------------ special tokens


def test_a_text_that_begins_with_bos_gets_no_second_one() -> None:
    tokenizer = letters()
    (plain, templated, doubled, later), counts = tokens(tokenizer, "ab", "<s>ab", "<s><s>ab", " <s>ab")
    assert plain == templated == tokenizer("ab")["input_ids"]
    assert doubled == [BOS, *plain], "what somebody has written stays"
    assert later == tokenizer(" <s>ab")["input_ids"], "only a text that begins with it"
    assert (counts.opened_samples, counts.opening) == (2, "<s>")


def test_what_the_user_says_of_special_tokens_goes_before_what_is_detected() -> None:
    tokenizer = letters()
    own = tokenizer("<s>ab", add_special_tokens=False)["input_ids"]
    assert tokens(tokenizer, "<s>ab", add_special_tokens=True)[0] == [[BOS, *own]]
    assert tokens(tokenizer, "<s>ab", "ab", add_special_tokens=False)[0] == [own, own[1:]]
    template = letters(CHAT)
    assert tokens(template, "ab", chat_template=True)[0][0].count(BOS) == 1, "a template writes its own"
    assert tokens(template, "ab", chat_template=True, add_special_tokens=True)[0][0][:2] == [BOS, BOS]


def test_what_a_tokenizer_puts_behind_a_text_stays_and_is_not_doubled_either() -> None:
    tokenizer = letters(ends=True)
    (cut, whole), _ = tokens(tokenizer, "<s>ab", "<s>ab</s>")
    assert cut == whole == tokenizer("ab")["input_ids"]
    assert tokens(letters(opens=False, ends=True), "<s>ab")[0] == [[BOS, *cut[1:-1], EOS]], "nothing to be doubled"


def test_a_text_of_bos_alone_and_a_tokenizer_without_special_tokens_are_left_as_they_are() -> None:
    assert tokens(letters(), "<s>")[0] == [[BOS]]
    found, counts = tokens(letters(opens=False), "<s>ab", "")
    assert found[0][0] == BOS and counts.opened_samples == 0 and counts.first_empty_samples == ["s1"]


def test_a_run_begun_before_goes_on_with_what_it_did() -> None:
    old, counts = tokens(letters(), "<s>ab", kept=Kept.of_json(None))
    assert old == letters()(["<s>ab"])["input_ids"]
    chained = hashlib.sha256(b"\ns0\n<s>ab").hexdigest()
    assert counts.as_json() == {
        **{"samples": 1, "tokens": 4, "truncated_samples": 0, "truncated_tokens": 0, "longest_sample": 4},
        **{"empty_samples": 0, "first_empty_samples": [], "dataset_hash": chained},
    }


# ------------------------------------------------------------------------------------------- chat template


def test_conversations_go_through_the_template_as_transformers_renders_them() -> None:
    tokenizer = letters(CHAT)
    asked = turns(("system", "be"), ("user", "a"), name="asked")
    told = turns(("user", "a"), ("assistant", "b"), name="told")
    (first, second, text), _ = tokens(tokenizer, asked, told, "a", chat_template=True)

    def theirs(sample: Sample, prompt: bool) -> list[int]:
        said = tokenizer.apply_chat_template(list(sample.turns or ()), add_generation_prompt=prompt, tokenize=False)
        return tokenizer(said, add_special_tokens=False)["input_ids"]

    assert first == theirs(asked, True)
    assert second == theirs(told, False), "the assistant has the last word: the conversation is whole"
    assert text == theirs(turns(("user", "a")), True)
    open_again, _ = tokens(tokenizer, told, chat_template=True, variables={"add_generation_prompt": True})
    assert open_again == [theirs(told, True)]
    continued, _ = tokens(tokenizer, told, chat_template=True, variables={"continue_final_message": True})
    assert tokenizer.decode(continued[0]).endswith("b")


def test_a_system_prompt_and_variables_reach_the_template() -> None:
    tokenizer = letters(CHAT)
    wanted = {"chat_template": True, "system_prompt": "be", "variables": {"date": "today", "thinking": False}}
    (found,), _ = tokens(tokenizer, "a", **wanted)
    assert tokenizer.decode(found) == "<s>[system|today]be</s>[user|today]a</s>[assistant]<quiet>"


def test_what_a_template_lacks_is_told_by_name() -> None:
    refused(r"'enable_thinking', which .* never asks for; its variables are: add_generation_prompt, date, thinking",
            letters(CHAT), "a", chat_template=True, variables={"enable_thinking": False})  # fmt: skip
    raising = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    dropping = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    for template, said in (
        (raising, r"takes no system turn \(System role not supported\)"),
        (dropping, "drops system"),
    ):
        refused(f"{said}.*--system_prompt", letters(template), "a", chat_template=True, system_prompt="be")
        refused(f"{said}.*sample 't'", letters(template), turns(("system", "b"), ("user", "a")), chat_template=True)
    refused("this model's tokenizer has no chat template", letters(), "a", chat_template=True)
    refused("cannot be read", letters("{% if %}"), "a", chat_template=True)
    refused("draws at random", letters("{{ ['a', 'b'] | random }}"), "a", chat_template=True)


def test_a_variable_that_a_template_always_sets_itself_is_none_of_its_callers() -> None:
    """As Llama 3's `system_message` is; its `tools` and `date_string` are set only where the caller says nothing."""
    syntax = Environment().parse(
        "{% if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}"
        "{% if not date_string is defined %}{% set date_string = '1' %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system_message = messages[0].content %}"
        "{% elif quiet %}{% set system_message = 'q' %}{% else %}{% set system_message = '' %}{% endif %}"
        "{% for m in messages if m.role != skipped %}{% set role = m.role %}{{ loop.index }}{{ role }}{% endfor %}"
        "{{ system_message }}{{ tools }}{{ date_string }}{{ later }}{% set later = 1 %}{{ later }}"
    )
    expected = {"custom_tools", "tools", "date_string", "messages", "quiet", "skipped", "later"}
    assert variables_of(syntax) == expected
    refused("has 'role', which .* never asks for; its variables are: thinking",
            letters("{% set role = 'u' %}{{ role }}{{ thinking }}"), "a", chat_template=True,
            variables={"role": "x"})  # fmt: skip


def test_conversations_that_no_template_takes_are_told_with_their_mend() -> None:
    refused("'t' is a conversation.*add --chat_template True", letters(CHAT), turns(("user", "a")))
    refused("has a system turn of its own", letters(CHAT), turns(("system", "b"), ("user", "a")),
            chat_template=True, system_prompt="be")  # fmt: skip
    refused("has no role", letters(CHAT), Sample("t", "", turns=({"from": "human"},)), chat_template=True)


def test_a_conversation_without_a_turn_is_left_out_as_a_text_without_a_token_is() -> None:
    found, counts = tokens(letters(CHAT), Sample("t", "", turns=()), turns(("user", "a"), name="u"), chat_template=True)
    assert len(found) == 1
    assert (counts.samples, counts.first_empty_samples, counts.closed_samples) == (1, ["t"], 0)


def test_conversations_that_ask_nothing_are_counted_for_those_who_want_answers() -> None:
    closed = turns(("user", "a"), ("assistant", "b"))
    assert tokens(letters(CHAT), closed, chat_template=True)[1].closed_samples == 1
    more = {"add_generation_prompt": True}
    found = tokens(letters(CHAT), closed, turns(("user", "a"), name="u"), chat_template=True, variables=more)[1]
    assert found.closed_samples == 0
    assert "closed_samples" not in found.as_json()


def test_a_template_that_looks_for_parts_is_given_the_text_in_one() -> None:
    parts = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    )
    seeing = letters(f"{parts}{{% endfor %}};{{% endfor %}}")
    (found, own), _ = tokens(seeing, "a", turns(("system", "b"), ("user", "c")), chat_template=True)
    assert (seeing.decode(found), seeing.decode(own)) == ("user:a;", "system:b;user:c;")


def test_of_several_templates_the_default_is_used_or_the_one_that_is_named() -> None:
    several = letters({"default": "D{{ messages[0].content }}", "rag": "R{{ messages[0].content }}"})
    assert several.decode(tokens(several, "a", chat_template=True)[0][0]) == "Da"
    named = tokens(several, "a", chat_template=True, variables={"chat_template": "rag"})
    assert several.decode(named[0][0]) == "Ra"
    refused("names the chat template 'x', and the tokenizer has default, rag", several, "a", chat_template=True,
            variables={"chat_template": "x"})  # fmt: skip
    refused("several chat templates \\(rag, tool_use\\)", letters({"rag": "R", "tool_use": "T"}), "a",
            chat_template=True)  # fmt: skip


def test_options_of_the_template_are_checked_before_anything_is_opened(tmp_path: Path) -> None:
    def check(**options: Any) -> ExtractConfig:
        config = ExtractConfig(**options)
        config.check()
        return config

    for options, said in (
        ({"chat_template_kwargs": '{"a": 1}'}, "--chat_template_kwargs is for the chat template.*--chat_template True"),
        ({"system_prompt": "be"}, "--system_prompt is for the chat template"),
        ({"chat_template": True, "chat_template_kwargs": "{a: 1}"}, "no JSON object; write it between single quotes"),
        ({"chat_template": True, "chat_template_kwargs": "[1]"}, "no JSON object"),
        ({"chat_template": True, "chat_template_kwargs": {"messages": []}}, "'messages', which is no variable"),
        ({"chat_template": True, "chat_template_kwargs": {"day": datetime.now()}}, "dates between quotes"),
    ):
        with pytest.raises(UserError, match=said):
            check(**options)
    (tmp_path / "o.yaml").write_text("chat_template: true\nchat_template_kwargs: {enable_thinking: false}\n")
    config = from_yaml(str(tmp_path / "o.yaml"), ExtractConfig())
    config.check()
    assert config.template_variables == {"enable_thinking": False}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert from_yaml(str(tmp_path / "again.yaml"), ExtractConfig()) == config
    assert from_mapping({"chat_template_kwargs": {"a": 1}}, config, "x").template_variables == {"a": 1}


# --------------------------------------------------------------------------------- tokenized already


def test_data_that_are_tokenized_already_are_taken_as_they_are() -> None:
    def given(*ids: Any, name: str = "g") -> Sample:
        return Sample(name, "", token_ids=ids)

    found, counts = tokens(letters(), given(5, 256, 7), "ab", given(*range(9), name="h"), given(name="e"), most=4)
    assert found == [[5, 256, 7], letters()("ab")["input_ids"], [0, 1, 2, 3]]
    assert (counts.truncated_samples, counts.truncated_tokens, counts.first_empty_samples) == (1, 5, ["e"])
    assert tokens(letters(), given(5))[1].dataset_hash != tokens(letters(), given(6))[1].dataset_hash
    refused("'g' has the token id 300.* use data that were tokenized for this model", letters(), given(300))
    refused("has the token id -1; token ids are from 0", letters(), given(-1))
    refused("not as whole numbers", letters(), given(1.5))
    refused("a chat template is for texts", letters(CHAT), given(5), chat_template=True)
    refused("special tokens are added only to texts", letters(), given(5), add_special_tokens=True)


def test_a_model_without_a_tokenizer_will_do_for_them_and_says_so_for_texts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=1)
    (folder / "tokenizer.json").unlink()
    tokenizer = OpenModel.open(str(folder)).tokenizer
    assert tokens(tokenizer, Sample("g", "", token_ids=(5, 7)))[0] == [[5, 7]] and tokenizer_digest(tokenizer) == "none"
    refused("no usable tokenizer in .*; add its tokenizer.json", tokenizer, "a")
    refused("no usable tokenizer in", tokenizer, "a", chat_template=True)


# ---------------------------------------------------------------------------------------------- adapters


def adapter_folder(folder: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_the_tokenizer_of_an_adapter_is_used_and_told(tmp_path: Path) -> None:
    own = adapter_folder(tmp_path / "own", letters("own", more=["<call>", "</call>"]))
    found, notes = adapter_tokenizer(own, lambda: letters("base"), 300)
    assert found("<call>a")["input_ids"][:2] == [BOS, 258] and found.chat_template == "own"
    assert notes == (
        "tokens are those of the adapter's own tokenizer, which has 2 tokens that the model's lacks ('<call>', "
        "'</call>'); so is the chat template",
    )
    _, (_, lacking) = adapter_tokenizer(own, lambda: letters("own"), 259)
    assert "1 token of the adapter's tokenizer has no row in the embeddings ('</call>')" in lacking
    refused(r"token id 259 \('</call>'\)", found, "a</call>", vocab=259)
    without = adapter_folder(tmp_path / "without", letters(more=["<call>"]))
    found, (note,) = adapter_tokenizer(without, lambda: letters("base"), 300)
    assert found.chat_template == "base" and "has no chat template, so that is the model's" in note


def test_an_adapter_with_the_tokenizer_of_its_model_changes_nothing(tmp_path: Path) -> None:
    base = letters("base")
    same = letters("base")
    same.padding_side = "left"
    same(["a", "bcd"], padding=False, truncation=True, max_length=2)  # which a tokenizer remembers
    found, notes = adapter_tokenizer(adapter_folder(tmp_path / "same", same), lambda: base, 300)
    assert found is base and not notes and tokenizer_digest(found) == tokenizer_digest(letters("base"))
    (tmp_path / "none").mkdir()
    assert adapter_tokenizer(tmp_path / "none", lambda: base, 300) == (base, ())


def test_an_adapter_with_a_template_alone_gives_the_model_that_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("own")
    found, notes = adapter_tokenizer(tmp_path, lambda: letters("base"), 300)
    assert found.chat_template == "own" and notes == ("the chat template is the adapter's own",)
    (tmp_path / "chat_template.jinja").unlink()
    added = {"258": {"content": "<call>"}, "256": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x", "added_tokens_decoder": added}))
    with pytest.raises(UserError, match=r"tokens that the model's tokenizer lacks \('<call>'\)"):
        adapter_tokenizer(tmp_path, lambda: letters("base"), 300)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_a_resized_vocabulary_brings_its_embeddings(tmp_path: Path, tied: bool) -> None:
    base = make_model(tmp_path / "base", layers=1)
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tied, "num_hidden_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    weights = safetensors.numpy.load_file(base / "model.safetensors")
    if not tied:
        weights["lm_head.weight"] = np.ones_like(weights["model.embed_tokens.weight"])
        safetensors.numpy.save_file(weights, base / "model.safetensors", {"format": "pt"})
    table = np.random.default_rng(0).normal(size=(259, 32)).astype(np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    stored = {"base_model.model.model.embed_tokens.weight": table}
    if not tied:
        stored["base_model.model.lm_head.weight"] = table + 1
    safetensors.numpy.save_file(stored, adapter / "adapter_model.safetensors")
    model = OpenModel.open(str(base), None, str(adapter))
    head = "lm_head.weight"
    assert model.config.vocab_size == 259
    assert np.array_equal(model.checkpoint.read("model.embed_tokens.weight"), table)
    assert np.array_equal(model.checkpoint.read(head), table if tied else table + 1)
    assert model.checkpoint.shape(head) == table.shape
    stored["base_model.model.lm_head.weight"] = table[:-1]
    safetensors.numpy.save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="tables of 258 and 259 tokens"):
        OpenModel.open(str(base), None, str(adapter))
