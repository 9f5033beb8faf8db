"""Shared fixtures. Strict dtype and rank promotion are on in every test process; warnings are errors.

The processes of a test run, those that tests start among them, share their compiled programs: one folder a run, made
anew, so that nothing depends on an earlier run. See docs/decisions/test-suite.md.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from jax_extract.devices import libtpu

if TYPE_CHECKING:
    from gcs_server import RunningServer

# Before JAX is imported anywhere; subprocesses inherit them.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Half of compiling a gradient is LLVM's optimising; test_parity.py, the gate on every port, compiles as users do.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads wait by spinning, and there are as many processes as cores
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="jax_extract_tests_", ignore_cleanup_errors=True)
    atexit.register(_COMPILED.cleanup)
    os.environ["JAX_EXTRACT_COMPILATION_CACHE"] = _COMPILED.name  # tests of the cache name a folder of their own
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"  # single operations are not worth a file
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
libtpu.silence()

ROOT = Path(__file__).resolve().parent.parent
# What takes longest begins first, so that no process works on alone at the end.
LONGEST = """tpu_compiler kills edits parity generation run_edits processes finetuning invariance training post_training
    steering resume verify pages memory attention_hooks positions adapters run_objects estimate launch_stage02
    """.split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # a million objects of libraries, which each later collection would look at again


@pytest.fixture(scope="session", autouse=True)
def compiled_programs() -> None:
    """What is compiled in this process is kept for the others too."""
    from jax_extract.devices import compilation_cache

    compilation_cache.start()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 of twelve layers, which no test changes; see small_run.py."""
    from small_run import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, `model`, and reviews of random words, one of which decides."""
    from tiny_reviews import write_base

    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[RunningServer]:
    """Buckets without faults, for whoever makes one of a name of its own."""
    from gcs_server import running

    with running() as process:
        yield process


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
