"""Shared fixtures. Strict dtype and rank promotion are on in every test process; warnings are errors."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from jax_extract.devices import libtpu

# Before JAX is imported anywhere; subprocesses inherit them.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_EXTRACT_COMPILATION_CACHE"] = "off"  # tests of the cache name a folder of their own
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
libtpu.silence()

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo_assets() -> Path:
    """Folder with the real model and the real ARC tasks, fetched once a machine."""
    spec = importlib.util.spec_from_file_location("demo_assets", ROOT / "launch" / "demo_assets.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch()


@pytest.fixture(scope="session")
def smollm2_gguf(demo_assets: Path) -> Path:
    return demo_assets / "smollm2-135m-instruct.gguf"


@pytest.fixture(scope="session")
def arc_tasks(demo_assets: Path) -> Path:
    return demo_assets / "arc-agi-1.json"
