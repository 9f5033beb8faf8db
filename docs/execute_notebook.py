#!/usr/bin/env python3
"""Executes docs/notebook.ipynb and writes its outputs into it.

    python docs/execute_notebook.py

In: the notebook, whose first code cell names the model (what `make demo` fetches). Out: the same notebook, with what
every cell printed, what its last line is, and the pictures that it made. jupyter does the same and more; this needs
nothing but matplotlib beside what the project needs.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).parent / "notebook.ipynb"
DPI = 80  # a picture of some 30 kB


def execute(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a cell among `names`; its outputs, as a notebook has them."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "notebook", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "notebook", "eval"), names)  # type: ignore[attr-defined] (an ast.Expr)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    figures = [plt.figure(number) for number in plt.get_fignums()]
    outputs += [_picture(figure) for figure in ([value] if isinstance(value, Figure) else figures)]
    plt.close("all")
    quiet = source.rstrip().endswith(";")  # as IPython has it
    if value is not None and not isinstance(value, Figure) and not quiet:
        said = {"text/plain": repr(value).splitlines(True)}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": said})
    return outputs


def _picture(figure: Figure) -> dict[str, Any]:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "metadata": {}, "data": data}


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["outputs"] = execute("".join(cell["source"]), names)
        cell["execution_count"] = number
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = number
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
