"""`jax-extract status` prints the command that goes on with a run, and that command completes it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from small_run import run_here, shards, snapshot, write_arc, write_jsonl

from jax_extract import cli
from jax_extract.config import ExtractConfig, from_mapping
from jax_extract.extraction.place import keep_config
from jax_extract.post_training.extractors import RepresentationExtractor
from jax_extract.store.ledger import CONFIG_FILE, Ledger
from jax_extract.store.storage.opening import open_storage
from jax_extract.upkeep.going_on import command_of, folded_command, needs_its_folder

HEAD = "this command goes on"


def lose_a_part(directory: Path) -> None:
    """As if it had never been computed."""
    (directory / "_run/commits/000001_001.json").unlink()
    (directory / "_run/parts/000001_001.safetensors").unlink()
    for path in directory.glob("*_batch_000001*"):
        path.unlink()


def told_command(place: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words of the command that status prints, as a shell reads them."""
    capsys.readouterr()
    assert cli.main(["status", str(place)]) == 1
    said = capsys.readouterr().out
    assert all(len(line) <= 100 for line in said.splitlines() if "/" not in line)
    return as_a_shell_reads(said.partition(HEAD)[2].partition(":\n")[2])


def as_a_shell_reads(command: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command.strip()}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def test_the_command_that_status_prints_completes_the_run_byte_for_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "my prompts.jsonl", [40, 12, 30, 20])
    directory = tmp_path / "a run's place"
    words = ["extract", "--model_path", str(model), "--tasks_file", "my prompts.jsonl", "--layers", "10-11"]
    words += ["--hook_points", "after_block", "ffn_*", "--batch_size", "2", "--activations_dir", "a run's place"]
    assert cli.main(words) == 0
    whole = shards(directory)
    lose_a_part(directory)
    command = told_command(directory, capsys)
    assert command == [
        *("jax-extract", "extract", "--model_path", str(model), "--tasks_file", "my prompts.jsonl"),
        *("--layers_to_extract", "10-11", "--hook_points", "after_block", "ffn_*"),
        *("--activations_dir", str(directory), "--batch_size", "2"),
    ]
    assert cli.main(command[1:]) == 0
    assert shards(directory) == whole
    capsys.readouterr()
    assert cli.main(["status", str(directory)]) == 0
    assert HEAD not in capsys.readouterr().out


def test_it_says_where_relative_paths_start_and_what_is_so_by_default_is_not_in_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_arc(tmp_path / "tasks.json")
    run_here(model, Path("tasks.json"), Path("a"), layers_to_extract=tuple(range(10, 24)))
    lose_a_part(tmp_path / "a")
    assert told_command("a", capsys)[2:] == [
        *("--model_path", str(model), "--tasks_file", "tasks.json", "--activations_dir", "a")
    ]
    assert cli.main(["status", "a"]) == 1
    assert f"{HEAD}, given in the folder where the run was started:" in capsys.readouterr().out


OPTIONS = {
    "system_prompt": 'it\'s "so"; $HOME\n',
    "chat_template": True,
    "chat_template_kwargs": '{"enable_thinking": false}',
    "add_special_tokens": False,
    "layers_to_extract": ("0-3", -1),
    "hook_points": ("blocks.{i}.hook_resid_post", "ffn_*"),
    "host_memory_gb": 1.5,
    "shard_format": "npz",
    "mesh_shape": "1,1",
}


def kept(tmp_path: Path, **options: object) -> Ledger:
    """A run of which only its options and what it is are there."""
    storage = open_storage(str(tmp_path / "run"))
    values = {"model_path": "m", "tasks_file": "/t.jsonl", "activations_dir": str(tmp_path / "run"), **options}
    storage.make("_run")
    keep_config(storage, from_mapping(values, ExtractConfig(), "test"))
    return Ledger(storage, {"description": {}})


def test_every_option_comes_back_from_a_shell_as_it_was_given(tmp_path: Path) -> None:
    ledger = kept(tmp_path, **OPTIONS)
    said = command_of(ledger, str(tmp_path / "run"))
    assert said is not None
    for width in (40, 100):
        words = as_a_shell_reads(folded_command(said, width, "    "))
        taken = cli._extract_config(words[2:], "jax-extract extract")
        assert yaml.safe_load(ledger.storage.read(CONFIG_FILE))["system_prompt"] == taken.system_prompt
        assert {name: getattr(taken, name) for name in OPTIONS} == OPTIONS
    assert not needs_its_folder(ledger)


def test_what_one_of_several_workers_says_of_itself_is_not_in_it(tmp_path: Path) -> None:
    said = " ".join(command_of(kept(tmp_path, worker_id=2, num_workers=3, overwrite=False), "elsewhere") or [])
    assert "worker" not in said and "--activations_dir elsewhere" in said


def test_with_uploads_the_place_that_was_asked_about_takes_its_own_part(tmp_path: Path) -> None:
    uploads = {"gcs_bucket": "gs://b/run", "upload_to_cloud": True, "activations_dir": "/local"}
    of_bucket = command_of(kept(tmp_path, **uploads), "gs://b/run")
    of_local = command_of(kept(tmp_path, **uploads), "/mounted/local")
    assert of_bucket and "--activations_dir /local" in of_bucket and "--gcs_bucket gs://b/run" in of_bucket
    assert of_local and "--activations_dir /mounted/local" in of_local


def test_a_password_is_never_told(tmp_path: Path) -> None:
    said = " ".join(command_of(kept(tmp_path, dataset="https://me:secret@host/rows", tasks_file=None), "a") or [])
    assert "secret" not in said and re.search(r"--dataset '?https://…@host/rows", said)


def test_a_run_that_another_command_has_made_is_not_given_the_wrong_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extractor = RepresentationExtractor(str(model), layers=-1, backend="jax", hook_points="after_block")
    extractor.save(["a text"], tmp_path / "run")
    next((tmp_path / "run/_run/commits").iterdir()).unlink()
    assert cli.main(["status", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().out
    assert "the command that started the run goes on, given again" in said and HEAD not in said


@pytest.mark.parametrize("content", [None, b"", b"{", b"- 1", b"layers_of_another_version: 3", b"batch_size: many"])
def test_options_that_cannot_be_read_are_no_trouble(content: bytes | None, tmp_path: Path) -> None:
    ledger = kept(tmp_path)
    before = snapshot(tmp_path)
    if content is None:
        ledger.storage.delete(CONFIG_FILE)
    else:
        ledger.storage.replace(CONFIG_FILE, content)
    assert command_of(ledger, "a") is None
    assert not needs_its_folder(ledger)
    assert set(snapshot(tmp_path)) <= set(before)
