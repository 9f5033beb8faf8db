"""In which keys two runs differ, as a person reads it.

In: what a run directory says of its run, and what is wanted now. Out: one phrase, empty where they agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """`dtype was "float32", is now "bfloat16"; …`, every differing key named."""
    before, after = _flat(stored), _flat(json.loads(json.dumps(wanted)))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if "sites" in keys:  # which explains these: other layers load other weights and have other widths
        keys = [key for key in keys if key not in ("weights", "plan_settings.bytes_per_row")]
        before["sites"], after["sites"] = _sites_text(before["sites"]), _sites_text(after["sites"])
    return "; ".join(f"{key} was {_brief(before.get(key))}, is now {_brief(after.get(key))}" for key in keys)


def _sites_text(sites: Any) -> str:
    """Such as `after_block 10 11 12; final_norm`."""
    layers: dict[str, list[str]] = {}
    for site in sites:
        layers.setdefault(site["hook"], []).extend([] if site["layer"] is None else [str(site["layer"])])
    return "; ".join(" ".join([hook, *numbers]) for hook, numbers in layers.items())


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


def _brief(value: Any, most: int = 100) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}…"
