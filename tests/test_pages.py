"""What pages show runs: the Python of a page, block by block, on a tiny model.

Guarded: docs/interventions.md, whose examples are under ten lines each, and the YAML file that it shows.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_models import tiny_folder

from jax_extract.forward.edit_files import read_edits

DOCS = Path(__file__).resolve().parent.parent / "docs"
LONGEST = 10  # lines of an example


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["interventions.md"])
def test_the_python_of_a_page_runs(page: str) -> None:
    names: dict[str, object] = {}
    found = blocks(page, "python")
    assert found
    for block in found:
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) <= LONGEST, block
        exec(compile(block.replace("/path/to/model", str(tiny_folder("llama"))), page, "exec"), names)


def test_the_file_of_edits_that_the_page_shows_is_read(tmp_path: Path) -> None:
    [shown] = blocks("interventions.md", "yaml")
    given = yaml.safe_load(shown)
    np.save(tmp_path / "direction.npy", np.ones(4, np.float32))
    given = [one for one in given if "source" not in one]  # of a run that lies nowhere
    (tmp_path / "edits.yaml").write_text(yaml.safe_dump(given))
    edits = read_edits(str(tmp_path / "edits.yaml"))
    assert [edit.change for edit in edits] == ["add", "zero"]
    assert edits[0].scale == 4.0
    assert edits[1].samples == ("007bbfb7_0",)
