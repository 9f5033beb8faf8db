"""What pages show runs: the Python and the commands of a page, block by block, on a tiny model.

Guarded: docs/interventions.md, whose examples are under ten lines each, and the YAML file that it shows; our side of
docs/coming_from.md (theirs, marked `python theirs`, needs packages that tests do not have), and its table of names.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from tiny_models import tiny_folder
from transformers import AddedToken, AutoTokenizer

from jax_extract.cli import main
from jax_extract.forward.edit_files import read_edits
from models.hooks import resolve_hook_points

DOCS = Path(__file__).resolve().parent.parent / "docs"
LONGEST = 10  # lines of an example
WIDTH, LATENTS = 54, 12  # of the tiny model, and of an SAE


def blocks(page: str, languages: str) -> list[tuple[str, str]]:
    """(language, text) of each block in one of them."""
    return re.findall(rf"```({languages})\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def answering_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has the answers of the pages as one token each, as real ones do."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_folder("llama"), folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (" Paris", " Rome", " Warsaw")])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", ["interventions.md", "coming_from.md"])
def test_what_a_page_shows_runs(
    page: str, answering_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_what_the_pages_name(tmp_path)
    names: dict[str, object] = {}
    found = blocks(page, "python|bash")
    assert found
    for language, block in found:
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) <= LONGEST, block
        here = block.replace("/path/to/model", str(answering_folder)).replace("/path/to/sae", "sae")
        if language == "python":
            exec(compile(here, page, "exec"), names)
        else:
            command, *words = shlex.split(here.replace("\\\n", " "))
            assert command == "jax-extract"
            assert main(words) == 0


def write_what_the_pages_name(place: Path) -> None:
    """A corpus, and an SAE as SAELens saves it."""
    random = np.random.default_rng(0)
    (place / "corpus").mkdir()
    lines = [json.dumps({"text": f"Text number {number} of this corpus, and no other."}) for number in range(50)]
    (place / "corpus" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shapes = {"W_enc": (WIDTH, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    (place / "sae").mkdir()
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, place / "sae" / "sae_weights.safetensors")


def test_names_of_transformer_lens_are_those_that_are_understood() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\S+)`.*\| `(?:model\.model|layers)", (DOCS / "coming_from.md").read_text(), re.M
    )
    assert len(rows) >= 10
    for name, theirs in rows:
        assert list(resolve_hook_points([theirs.replace("{i}", "3")])) == [name]


def test_the_file_of_edits_that_the_page_shows_is_read(tmp_path: Path) -> None:
    [(_, shown)] = blocks("interventions.md", "yaml")
    given = yaml.safe_load(shown)
    np.save(tmp_path / "direction.npy", np.ones(4, np.float32))
    given = [one for one in given if "source" not in one]  # of a run that lies nowhere
    (tmp_path / "edits.yaml").write_text(yaml.safe_dump(given))
    edits = read_edits(str(tmp_path / "edits.yaml"))
    assert [edit.change for edit in edits] == ["add", "zero"]
    assert edits[0].scale == 4.0
    assert edits[1].samples == ("007bbfb7_0",)
