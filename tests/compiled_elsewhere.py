"""Programs for a slice without a TPU, from a process of its own, which the compiler of another platform shares with
nothing.

In: a worker among the tests, which prints a JSON object. Out: that object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def facts_of(worker: str, topology: str = "v5e:8x8") -> dict[str, Any]:
    """The worker must say nothing else, on standard error either."""
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / worker), topology],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    assert not done.stderr, "the compiler speaks"
    return json.loads(done.stdout)
