"""A command starts fast: it compiles nothing twice and imports nothing it does not need."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache as of_jax
from small_run import environment, make_model, run_cli, run_here, shards, write_jsonl
from test_weights_gguf import build_tokenizer, tokenizer_fields

from jax_extract import cli
from jax_extract.devices import compilation_cache
from jax_extract.devices.compilation_cache import ENVIRONMENT, CompiledPrograms
from jax_extract.extraction.program import CaptureProgram
from jax_extract.inputs.planning.slabs import SlabShape
from jax_extract.inputs.tokenize import tokenizer_digest
from jax_extract.startup import seconds_since_start
from jax_extract.store.ledger import Ledger
from jax_extract.store.storage.opening import open_storage
from jax_extract.weights.gguf_tokenizer import GgufTokenizer
from jax_extract.weights.load import Weights

SLOW = {"jax", "jaxlib", "flax", "transformers", "datasets", "google", "orbax", "tyro", "gguf", "torch"}
HELP = """
import sys
import jax_extract
from jax_extract import cli
cli.main(["--help"])
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""
TOKENS = """
import sys
from pathlib import Path
import jax_extract.extraction.command
from jax_extract.inputs.tokenize import tokenizer_digest
from jax_extract.weights.gguf import GgufCheckpoint
tokenizer = GgufCheckpoint(Path(sys.argv[1])).tokenizer()
tokenizer_digest(tokenizer)
print(tokenizer(["Hello world"], add_special_tokens=True, verbose=False)["input_ids"], "transformers" in sys.modules)
"""
CACHE_OF_JAX = of_jax.get_file_cache  # tests are read before the session's own cache is started
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for compiled programs, named to commands; JAX keeps none yet, and is as it was when the test is over."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setattr(of_jax, "get_file_cache", CACHE_OF_JAX)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    of_jax.reset_cache()
    yield tmp_path / "compiled"
    of_jax.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def _rows() -> bytes:
    """What a program gives that has to be compiled or loaded."""
    jax.clear_caches()
    x = jnp.linspace(0.0, 1.0, 96, dtype=jnp.float32).reshape(8, 12)

    def block(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(carry @ carry.T @ carry / np.float32(7))
        return carry, carry

    return np.asarray(jax.jit(lambda x: jax.lax.scan(block, x, None, length=4)[1])(x)).tobytes()


def _loaded(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` gives, and how many programs were loaded for it instead of compiled."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        return work(), len(hits)
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_loaded_program_gives_the_rows_of_the_compiled_one_to_the_last_bit(folder: Path) -> None:
    compiled = _rows()
    compilation_cache.start()
    assert _loaded(_rows) == (compiled, 0)
    kept = _files(folder)
    assert kept
    assert _loaded(_rows) == (compiled, len(kept))
    assert _files(folder) == kept


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "not compressed"])
def test_a_damaged_program_is_compiled_again_without_a_word_and_replaced(folder: Path, damage: str) -> None:
    compilation_cache.start()
    rows = _rows()
    whole = {path: path.read_bytes() for path in _files(folder)}
    for path, content in whole.items():
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        damaged = {"cut": content[:middle], "changed": changed, "empty": b"", "not compressed": b"x" * 99}[damage]
        path.write_bytes(damaged)
    assert _loaded(_rows) == (rows, 0)
    assert _loaded(_rows) == (rows, len(whole))


def test_the_cache_is_off_where_the_user_or_jax_itself_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "off")
    compilation_cache.start()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv(ENVIRONMENT, str(folder))
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.start()
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of_jax"))
    compilation_cache.start()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "of_jax")
    _rows()
    assert _files(tmp_path / "of_jax")
    assert not folder.exists()


def test_programs_are_kept_below_the_users_cache_folder_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.chosen_folder() == tmp_path / "jax_extract" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.chosen_folder() == tmp_path / ".cache" / "jax_extract" / "compiled"
    monkeypatch.setenv(ENVIRONMENT, "~/elsewhere")
    assert compilation_cache.chosen_folder() == tmp_path / "elsewhere"


def test_native_code_is_loaded_only_from_where_nobody_else_can_write(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compilation_cache.start()
    _rows()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in _files(folder))
    programs = CompiledPrograms(folder)
    programs.put("mine", b"program")
    path = next(folder.glob("mine-*"))
    path.chmod(0o666)
    assert programs.get("mine") is None
    path.chmod(0o600)
    assert programs.get("mine") == b"program"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    assert programs.get("mine") is None
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o777)
    assert capsys.readouterr().err == ""
    compilation_cache.start()
    assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "chmod 700" in said
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_made_written_or_read_stops_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows()
    (tmp_path / "file").touch()
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "file" / "compiled"))
    compilation_cache.start()
    assert jax.config.jax_compilation_cache_dir is None
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and str(tmp_path / "file") in err, "who names a folder is told"
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation_cache.start()
    assert jax.config.jax_compilation_cache_dir is None and capsys.readouterr() == ("", "")
    monkeypatch.setenv(ENVIRONMENT, str(folder))
    compilation_cache.start()

    def refuse(*_: object, **__: object) -> None:  # as a full or read-only file system does, also to root
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(compilation_cache.tempfile, "mkstemp", refuse)
        assert _rows() == rows
    assert not _files(folder)
    folder.rmdir()
    assert _rows() == rows
    assert capsys.readouterr() == ("", "")


def test_a_disk_that_fills_up_leaves_no_half_program(tmp_path: Path) -> None:
    written = "programs = CompiledPrograms(Path(sys.argv[1])); programs.put('large', b'x' * 100_000)"
    program = (
        "import resource, signal, sys; from pathlib import Path; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"from jax_extract.devices.compilation_cache import CompiledPrograms; {written}"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not _files(tmp_path)


def test_the_programs_that_were_used_longest_ago_go_first(tmp_path: Path) -> None:
    programs = CompiledPrograms(tmp_path, largest_bytes=1_000)
    for number in range(3):
        programs.put(f"p{number}", bytes(250))
        path = next(tmp_path.glob(f"p{number}-*"))
        os.utime(path, (number, number))
    assert programs.get("p0") == bytes(250)  # the oldest one is used, and stays
    programs.put("p3", bytes(250))
    assert {number for number in range(4) if programs.get(f"p{number}")} == {0, 2, 3}
    programs.put("huge", bytes(1_001))
    assert programs.get("huge") is None
    assert programs.get("p3")


def test_another_machine_with_the_same_home_does_not_load_what_this_one_compiled(tmp_path: Path) -> None:
    CompiledPrograms(tmp_path, machine="here").put("key", b"program")
    assert CompiledPrograms(tmp_path, machine="here").get("key") == b"program"
    assert CompiledPrograms(tmp_path, machine="there").get("key") is None


def test_the_processes_of_one_program_share_a_folder_only_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    by_default, named = CompiledPrograms(tmp_path, is_named=False), CompiledPrograms(tmp_path, is_named=True)
    by_default.put("key", b"program")
    assert not _files(tmp_path)
    named.put("key", b"program")
    assert named.get("key") == b"program"
    assert by_default.get("key") is None


def test_a_second_process_compiles_nothing_imports_no_torch_and_writes_the_same_bytes(
    folder: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "tiny", layers=2)
    texts = write_jsonl(tmp_path / "texts.jsonl", [5, 9, 40, 41])
    words = ["--model_path", str(model), "--tasks_file", str(texts), "--activations_dir"]
    assert cli.main(["extract", *words, str(tmp_path / "first")]) == 0
    kept = {path: path.stat().st_ino for path in _files(folder)}
    assert any(path.name.startswith("jit_one_device") for path in kept)
    jax.clear_caches()
    env = {ENVIRONMENT: str(folder), "PYTHONPROFILEIMPORTTIME": "1"}
    done = run_cli(*words, tmp_path / "second", cwd=tmp_path, env=env, fresh=True)
    assert done.returncode == 0, done.stderr
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "transformers" in imported and "torch" not in imported
    assert {path: path.stat().st_ino for path in _files(folder)} == kept
    assert shards(tmp_path / "first") == shards(tmp_path / "second")


def test_the_first_program_is_compiled_while_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, compile_, load = threading.Event(), CaptureProgram._compile, Weights.load

    def told(program: CaptureProgram, shape: SlabShape) -> jax.stages.Compiled:
        compiling.set()
        return compile_(program, shape)

    def when_told(weights: Weights, *given: Any) -> Any:
        assert compiling.wait(20), "no compilation began before the weights were read"
        return load(weights, *given)

    monkeypatch.setattr(CaptureProgram, "_compile", told)
    monkeypatch.setattr(Weights, "load", when_told)
    model = make_model(tmp_path / "tiny", layers=2)
    run_here(model, write_jsonl(tmp_path / "texts.jsonl", [5, 9]), tmp_path / "run")
    (session,) = Ledger.open(open_storage(str(tmp_path / "run"), "the run")).sessions()
    assert 0 < session["first_step_seconds"] < seconds_since_start()
    assert set(shards(tmp_path / "run")) == {"layer_0_batch_000001.pkl", "layer_1_batch_000001.pkl"}


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "smollm"])
@pytest.mark.parametrize("around", ["nothing", "bos", "eos", "both", "an ordinary token"])
def test_a_gguf_tokenizer_is_that_of_transformers_to_the_letter(pre: str, around: str) -> None:
    fields = tokenizer_fields(pre)
    end = fields["tokenizer.ggml.eos_token_id"]
    fields["tokenizer.ggml.bos_token_id"] = 3 if around == "an ordinary token" else end
    fields["tokenizer.ggml.add_bos_token"] = around in ("bos", "both", "an ordinary token")
    fields["tokenizer.ggml.add_eos_token"] = around in ("eos", "both")
    ours, of_transformers = GgufTokenizer(fields, 77), build_tokenizer(fields)
    assert tokenizer_digest(ours) == tokenizer_digest(of_transformers)
    texts = ["the <tool> 12é", "", "<|end|>'s the\n\n"]
    for special in (True, False):
        expected = of_transformers(texts, add_special_tokens=special)["input_ids"]
        assert ours(texts, add_special_tokens=special, verbose=False)["input_ids"] == expected
    assert ours("the").input_ids == of_transformers("the").input_ids
    assert (ours.eos_token_id, ours.model_max_length, ours.decode([end])) == (end, 77, "<|end|>")


def test_a_gguf_model_starts_without_transformers(smollm2_gguf: Path) -> None:
    command = [sys.executable, "-c", TOKENS, str(smollm2_gguf)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[[19556, 905]] False\n"


def test_help_and_the_package_itself_import_nothing_slow() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    usage, _, imported = done.stdout.strip().rpartition("\n")
    assert "commands:" in usage
    assert not SLOW & set(ast.literal_eval(imported))
