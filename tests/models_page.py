"""Makes docs/models.md what it is: which configurations are read, and whether their rows are Hugging Face's.

In: config.json files, or folders of them. Out: a row a file of the table between the marks of docs/models.md, printed
or written there; and the sections that need no file. With --check-rows each configuration that is read gets a tiny
random model of Hugging Face's under exactly its fields (sizes are shrunk; windows, rotations, biases, activations and
the ratio of heads stay), and every hook point of every layer is compared row by row. The exit code is 1 where one
differs.

    python tests/models_page.py [FILES_OR_FOLDERS…] [--check-rows] [--write]
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jax_extract.devices import libtpu
from jax_extract.errors import UserError
from jax_extract.weights.checkpoint import read_json
from jax_extract.weights.model_type import name_model_type
from jax_extract.weights.text_part import text_config
from models.registry import PORTS, port_for

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"

_MODELS = {
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
    "qwen3": "Qwen3 (dense)",
    "llama": "Llama 1 to 3.3, CodeLlama, Vicuna, Yi, TinyLlama, SmolLM and SmolLM2, DeepSeek-R1-Distill-Llama",
    "mistral": "Mistral 7B, Mistral Nemo, Ministral 8B (with windows by layer where config.json has `layer_types`)",
    "gpt2": "GPT-2, distilgpt2, DialoGPT",
    "gpt_neox": "Pythia, GPT-NeoX-20B, RedPajama-INCITE, Dolly 2, h2oGPT",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "gemma": "Gemma 1, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M and 1B; the language model of those that read pictures (`gemma3`)",
}
_EXAMPLE = {"model_type": "llama"}
# Of each kind of field that is refused, one; and what is said of it.
REFUSED: tuple[dict[str, Any], ...] = (
    {"quantization_config": {"quant_method": "fp8"}},
    {"quantization": {"bits": 4}},
    {"embedding_multiplier": 12.0},
    {"use_qk_norm": True},
    {"is_causal": False},
    {"per_layer_config": {"0": {"num_key_value_heads": 4}}},
    {"partial_rotary_factor": 0.5},
    {"rope_scaling": {"rope_type": "mrope"}},
    {"hidden_act": "mish"},
    {"model_type": "falcon"},
)

_LAYERS, _WINDOW, _VOCABULARY, _FEED_FORWARD = 4, 13, 131, 90
_LENGTHS = (1, 3, 40)  # tokens: within the window, and beyond it
_HEAD_WIDTHS = (16, 20, 24, 32, 40, 64)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one config.json.

    Attributes:
      refused: the sentence, where it is not read.
      worst: relative distance of the worst row from Hugging Face's, by hook point; None where rows were not compared.
      wrong: the first hook point that is out of bounds.
    """

    name: str
    model_type: str
    refused: str = ""
    notes: tuple[str, ...] = ()
    worst: Mapping[str, float] | None = None
    wrong: str = ""

    def row(self) -> str:
        """Of the table."""
        told = f"refused: {self.refused}" if self.refused else "read"
        if self.worst is not None:
            told += (
                f", rows within {max(self.worst.values()):.0e}" if not self.wrong else f", **differs**: {self.wrong}"
            )
        return f"| {self.name} | {self.model_type} | {told}{''.join(f'; note: {note}' for note in self.notes)} |"


def _at_most(value: float) -> str:
    """With one digit, rounded up."""
    exponent = math.floor(math.log10(value)) if value else 0
    return f"{math.ceil(value / 10.0**exponent)}e{exponent}"


def judge(path: Path, check_rows: bool) -> Verdict:
    """Reads one file as the command does."""
    said = read_json(path)
    notes = name_model_type(said)
    name, model_type = path.stem, str(said.get("model_type"))
    try:
        config = text_config(said)
        port = port_for(config)
        read = port.config(config)
    except UserError as error:
        return Verdict(name, model_type, refused=str(error))
    notes += port.fields[read.model_type].notes(config)
    if not check_rows:
        return Verdict(name, model_type, notes=notes)
    try:
        worst, wrong = compared(said, json.loads(path.read_text()))
    except Exception as error:  # noqa: BLE001 (a model of transformers fails in any way; the next file is judged still)
        worst, wrong = {}, f"no tiny model: {type(error).__name__} {error}".partition("\n")[0]
    return Verdict(name, model_type, notes=notes, worst=worst, wrong=wrong)


def compared(said: Mapping[str, Any], written: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Worst error of each hook point of a tiny model under a configuration, and which is out of bounds.

    Args:
      said: config.json with its model_type.
      written: as it was, which is what lies beside the weights.
    """
    from test_parity import bound, captured_in_one_slab
    from tiny_models import random_ids, random_model, reference, row_errors, save
    from transformers import AutoConfig

    small = shrunk(said)
    worst: dict[str, float] = {}
    wrong = ""
    with tempfile.TemporaryDirectory(prefix="configuration_") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(small))
        model = random_model(AutoConfig.from_pretrained(folder), seed=7)
        save(model, Path(folder))
        as_written = {key: value for key, value in small.items() if key in written or key != "model_type"}
        (Path(folder) / "config.json").write_text(json.dumps(as_written))
        sequences = random_ids(_LENGTHS)
        for sequence, rows in zip(sequences, captured_in_one_slab(Path(folder), sequences), strict=True):
            truth = reference(model, sequence)
            if set(rows) != set(truth):
                return {}, "other hook points"
            for (hook, layer), theirs in truth.items():
                error = float(row_errors(rows[hook, layer], theirs).max())
                worst[hook] = max(worst.get(hook, 0.0), error)
                if not error <= bound(hook):
                    wrong = wrong or f"{hook} of layer {layer} by {error:.1e}"
    return worst, wrong


def shrunk(said: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration with few and small layers; what shapes the mathematics stays."""
    small = copy.deepcopy(dict(said))
    if isinstance(small.get("text_config"), dict):
        small["text_config"] = shrunk({"model_type": "gemma3_text", **small["text_config"]})
        small["vision_config"] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        small["vision_config"] |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        return {**small, "mm_tokens_per_image": 4}
    read = port_for(small).config(small)
    heads, key_heads = read.num_attention_heads, read.num_key_value_heads
    kept = 3 if heads == key_heads else min(key_heads, 2)  # key heads
    few = kept * (heads // key_heads)
    share = getattr(read, "rotated", read.head_dim) / read.head_dim
    width = next(width for width in _HEAD_WIDTHS if int(width * share) >= 2 and int(width * share) % 2 == 0)
    hidden = few * round(width * read.hidden_size / (heads * read.head_dim))
    windows = tuple(getattr(read, "windows", ()))
    layers = max(_LAYERS, 1 + max((windows.index(window) for window in set(windows)), default=0))
    layers = min(layers, read.num_hidden_layers)
    if "max_window_layers" in small and windows and not small.get("layer_types"):
        small["max_window_layers"], layers = 2, _LAYERS
    names = {
        **{"hidden_size": hidden, "num_attention_heads": few, "num_hidden_layers": layers, "vocab_size": _VOCABULARY},
        **{"intermediate_size": _FEED_FORWARD, "head_dim": width, "num_key_value_heads": kept},
    }
    if read.model_type == "gpt2":
        short = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
        names = {spelling: names[name] for name, spelling in short.items()} | {"vocab_size": _VOCABULARY}
        if small.get("n_inner"):
            names["n_inner"] = _FEED_FORWARD
    takes = port_for(small).fields[read.model_type].read
    for name, value in names.items():
        # Where it says nothing of a head's width or of key heads, they follow from the others.
        follows = name in ("head_dim", "num_key_value_heads") and small.get(name, takes.get(name)) is None
        if name in takes and not follows:
            small[name] = value
    if windows:
        small["sliding_window"] = _WINDOW
    for rope in (small.get("rope_scaling") or {}, small.get("rope_parameters") or {}):
        for factors in {"short_factor", "long_factor"} & rope.keys():  # one a frequency
            rope[factors] = rope[factors][: int(width * share) // 2]
    if isinstance(small.get("layer_types"), list):
        small["layer_types"] = small["layer_types"][:layers]
    for name, value in small.items():
        if name.endswith("_token_id") and value is not None:
            last = _VOCABULARY - 1
            small[name] = [min(v, last) for v in value] if isinstance(value, list) else min(value, last)
    return small


def sentence(beside: Mapping[str, Any]) -> str:
    """What is said of a Llama's configuration with these fields beside; empty where it is read."""
    try:
        port_for({**_EXAMPLE, **beside}).config({**_EXAMPLE, **beside})
    except UserError as error:
        return str(error)
    return ""


def generated() -> dict[str, str]:
    """Sections of the page that follow from the code alone, by name."""
    files = {kind: Path(inspect.getfile(port.block)).name for kind, port in PORTS.items()}
    types = "\n".join(f"| `{kind}` | {_MODELS[kind]} | `models/{files[kind]}` |" for kind in PORTS)
    refused = "\n".join(f"| `{json.dumps(beside)[1:-1]}` | {sentence(beside)} |" for beside in REFUSED)
    rotations = sentence({"rope_scaling": {"rope_type": "none"}}).partition("supported: ")[2].partition(";")[0]
    return {
        "model types": f"| model type | models | port |\n|---|---|---|\n{types}",
        "rotations": ", ".join(f"`{kind}`" for kind in rotations.split(", ")),
        "refused": f"| config.json of a Llama has | the sentence |\n|---|---|\n{refused}",
    }


def with_generated(page: str) -> str:
    """The page with those sections as the code has them."""
    for name, text in generated().items():
        page = section(name, text, page)
    return page


def section(name: str, text: str, page: str) -> str:
    """The page with what stands between the marks of `name` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, there, rest = page.partition(begin)
    _, ends, after = rest.partition(end)
    if not there or not ends:
        raise ValueError(f"the page has no marks {begin} and {end}")
    return f"{before}{begin}\n{text.rstrip()}\n{end}{after}"


def files(named: Iterable[Path]) -> Iterator[Path]:
    """config.json files themselves, and those of folders."""
    for path in named:
        if path.is_dir() and (path / "config.json").is_file():
            yield path / "config.json"
        else:
            yield from sorted(path.glob("*.json")) if path.is_dir() else [path]


def main() -> int:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    libtpu.silence()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check-rows", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    verdicts = []
    for path in files(asked.files):
        verdicts.append(judge(path, asked.check_rows))
        print(verdicts[-1].row(), flush=True)
    read = sum(not verdict.refused for verdict in verdicts)
    print(f"{read} of {len(verdicts)} are read")
    if asked.write:
        page = with_generated(PAGE.read_text())
        if verdicts:
            rows = "\n".join(verdict.row() for verdict in verdicts)
            table = f"| configuration | model type | {read} of {len(verdicts)} are read |\n|---|---|---|\n{rows}"
            page = section("configurations", table, page)
        PAGE.write_text(page)
    return int(any(verdict.wrong for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
