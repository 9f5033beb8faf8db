"""docs/notebook.ipynb runs from its first cell to its last, and what stands in it was made by running it.

In: the notebook, its model and a few words replaced by those of a tiny model, whose tokens are letters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from tiny_models import tiny_folder

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebook.ipynb"
# Of the tiny model: answers of one token, and two countries of as many tokens.
TINY = {'" Paris", " Rome"': '"P", "R"', '" good", " bad"': '"g", "b"', "of Italy is": "of Greece is"}


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_every_cell_of_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sources = ["".join(cell["source"]) for cell in code_cells()]
    assert sum("MODEL = " in source for source in sources) == 1
    for words in TINY:
        assert any(words in source for source in sources), words
    names: dict[str, Any] = {}
    for source in sources:
        lines = [
            f"MODEL = {str(tiny_folder('llama'))!r}" if line.startswith("MODEL = ") else line
            for line in source.splitlines()
        ]
        cell = "\n".join(lines)
        for words, tiny in TINY.items():
            cell = cell.replace(words, tiny)
        exec(compile(cell, NOTEBOOK.name, "exec"), names)
    curve = [line for axes in plt.gcf().axes for line in axes.lines][:3]
    assert [line.get_label() for line in curve] == names["prompts"]
    np.testing.assert_array_equal([line.get_ydata() for line in curve], names["effects"].values.T)
    unsteered = names["effects"].values[list(names["scales"]).index(0.0)]
    np.testing.assert_allclose(unsteered, names["effects"].without, atol=1e-4)
    plt.close("all")


def test_the_notebook_was_executed_in_order_without_an_error() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 3
    assert "smollm2-135m-instruct" in "".join(outputs[0]["data"]["text/plain"])
    assert NOTEBOOK.stat().st_size < 250_000
