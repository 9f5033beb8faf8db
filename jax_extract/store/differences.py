"""In what two runs differ, as a person reads it: by the flags that decide it.

In: what a run directory says of its run, and what is wanted now. Out: one phrase, empty where they agree.
This is the one place that knows which flag stands behind a key of run.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_FLAGS = {
    "plan_settings.rows": "--batch_size",
    "plan_settings.slab_tokens": "--slab_tokens",
    "plan_settings.max_length": "--max_seq_length",
    "answers": "--capture_answers",
    "one_file_per_layer": "--one_file_per_layer",
    "attention_pattern_tokens": "--attention_pattern_tokens",
    "contexts.tokens": "--context_tokens",
    "contexts.start": "the token of --context_start",
    "contexts.separator": "the token of --context_separator",
    **{name: f"--{name}" for name in ("positions", "capture_dtype", "shard_format", "chat_template", "dtype")},
    **{name: f"--{name}" for name in ("system_prompt", "chat_template_kwargs", "add_special_tokens")},
}
# What follows from other keys, which say it better.
_FOLLOWS = {
    "plan_settings.positions": ("positions",),
    "plan_settings.bytes_per_row": ("capture_dtype", "sites"),
    "plan_settings.samples_per_batch": ("plan_settings.rows",),
    "plan_settings.max_length": ("contexts.tokens",),
}
_SITES = ("sites", "hook_points")
_COUNTS = ("documents", "samples", "tokens", "truncated_samples", "empty_samples")
_OF_A_MODEL = {"model_type": "architecture", "weights": "weights", "tokenizer_hash": "tokenizer"}


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """`--batch_size was 4, is now 2; …`, every difference named; keys that no flag decides by their own name."""
    before, after = flattened(stored), flattened(json.loads(json.dumps(wanted)))
    differing = keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    said: list[str] = []
    if "sites" in keys:
        said = _sites_differences(before["sites"], after["sites"])
        if said:  # which explains this: other layers load other weights
            keys = [key for key in keys if key != "weights"]
    if of_model := [name for key, name in _OF_A_MODEL.items() if key in keys]:
        adapted = ", or --adapter another adapter" if of_model == ["weights"] else ""
        said.insert(0, f"--model_path is another model{adapted} (other {', '.join(of_model)})")
    for key in keys:
        if key not in (*_OF_A_MODEL, *_SITES) and not any(reason in keys for reason in _FOLLOWS.get(key, ())):
            said.append(_change(_FLAGS.get(key, key), before.get(key), after.get(key)))
    # Whatever differs is told: nothing said would mean that the runs are the same.
    return "; ".join(said or [_change(key, before.get(key), after.get(key)) for key in differing])


def input_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Between two plans of a window that are not the same: what the counts of their inputs tell."""
    before, after = ((plan.get("input") or {}) for plan in (stored, wanted))
    changed = [name for name in _COUNTS if before.get(name) != after.get(name)]
    if changed:
        return "; ".join(f"{before.get(name)} {name.replace('_', ' ')}, now {after.get(name)}" for name in changed)
    if before.get("dataset_hash") != after.get("dataset_hash"):
        return "as many samples and tokens, but other texts or ids"
    return f"the same texts, but window {wanted.get('window')} of its plan differs"


def _sites_differences(before: Any, after: Any) -> list[str]:
    """By hook points and by layers where these tell it; nothing where only the width of the model differs."""
    hooks = [list(dict.fromkeys(site["hook"] for site in sites)) for sites in (before, after)]
    layers = [sorted({site["layer"] for site in sites} - {None}) for sites in (before, after)]
    texts = [_sites_text(sites) for sites in (before, after)]
    said = []
    if hooks[0] != hooks[1]:
        said.append(_change("--hook_points", *hooks))
    if layers[0] != layers[1]:
        said.append(_change("--layers_to_extract", *layers))
    if not said and texts[0] != texts[1]:  # as blocks.3.hook_resid_post chooses layers of one hook point
        said.append(_change("--hook_points", *texts))
    return said


def _sites_text(sites: Any) -> str:
    """Such as `after_block 10 11 12; final_norm`."""
    layers: dict[str, list[str]] = {}
    for site in sites:
        layers.setdefault(site["hook"], []).extend([] if site["layer"] is None else [str(site["layer"])])
    return ", ".join(" ".join([hook, *numbers]) for hook, numbers in layers.items())


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flattened(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


def _change(name: str, before: object, after: object) -> str:
    return f"{name} was {_as_typed(before)}, is now {_as_typed(after)}"


def _as_typed(value: Any, most: int = 100) -> str:
    """A value as it follows its flag."""
    if value is None:
        return "not there"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= most else f"{text[:most]}…"
