"""The launch scripts: what they print, what they run, how they wait and start again; without any cloud.

`gcloud`, `jax-extract` and the other tools are small fakes on PATH. The fake cloud has a slice of two VMs, each
a folder, on which the commands sent to the VMs really run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from small_run import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = [
    "tpu_pod/create_slice.sh",
    "tpu_pod/setup_workers.sh",
    "tpu_pod/run_extraction.sh",
    "tpu_pod/run_until_complete.sh",
    "tpu_pod/delete_slice.sh",
    "upload.sh",
    "gke/run_jobset.sh",
    "gke/run_xpk.sh",
    "gke/build_image.sh",
]
SLICE = ["--project", "my-project", "--zone", "us-west4-a", "--name", "acts"]
PLACE = "gs://my-bucket/run"
WHERE = ["--project=my-project", "--zone=us-west4-a"]
HOSTILE = ["a b", "it's", '"quoted"', "$(touch owned)", "`touch owned`", "; touch owned", "x\ny", "*", "~", "", "ü"]
FAST = ["--poll_seconds", "0.01", "--retry_seconds", "0.01", "--max_retry_seconds", "0.02", "--grace_seconds", "0.01"]
VMS = 2

# Every fake notes its words in `calls`, each ended by a zero byte, the call by a one.
NOTE = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\1'; } |
  dd bs=1M iflag=fullblock oflag=append conv=notrunc status=none of="$CLOUD/calls"  # at once: others note theirs too
take() { # FILE: its first line, which goes, unless it is the last
  mapfile -t lines <"$CLOUD/$1" && printf '%s\\n' "${lines[0]}"
  ((${#lines[@]} < 2)) || printf '%s\\n' "${lines[@]:1}" >"$CLOUD/$1"
}
"""
# `state` holds the states that the service is going to name, the last one for ever; `extractions` what happens to the
# next extractions: an exit code, `complete`, or `lost`: the connection hangs and the slice is gone. Without
# `extractions` the commands run on the VMs, each a folder.
GCLOUD = (
    NOTE
    + """
case "$3 $4" in
  "queued-resources create") [[ ! -e $CLOUD/state ]] && cp "$CLOUD/states_of_new" "$CLOUD/state" ;;
  "queued-resources delete") rm "$CLOUD/state" ;;
  "queued-resources describe")
    if [[ -e $CLOUD/out_of_order ]]; then
      echo "ERROR: (gcloud) PERMISSION_DENIED: no" >&2
    elif [[ ! -e $CLOUD/state ]]; then
      echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found" >&2
    else
      take state && exit
    fi
    exit 1
    ;;
  "tpu-vm describe") cat "$CLOUD/vm_state" 2>/dev/null || echo READY ;;
  "tpu-vm scp")
    for vm in "$CLOUD"/vm[0-9]; do
      [[ ! -d $vm ]] || cp -r "$6" "$vm/${7#*:}"
    done
    ;;
  "tpu-vm ssh")
    line=${!#}
    line=${line#--command=}
    if [[ $line == *extract.sh* && -e $CLOUD/extractions ]]; then
      what=$(take extractions)
      case $what in
        lost) printf '%s\\n' SUSPENDING SUSPENDED >"$CLOUD/state" && exec sleep 60 ;;
        complete) touch "$CLOUD/complete" && exit 0 ;;
        *) exit "$what" ;;
      esac
    fi
    code=0
    for vm in "$CLOUD"/vm[0-9]; do
      [[ -d $vm ]] && cd "$vm" && { HOME=$vm VM=${vm: -1} bash -c "$line" & }
    done
    for job in $(jobs -p); do
      wait "$job" || code=$?
    done
    exit "$code"
    ;;
esac
"""
)
JAX_EXTRACT = (
    NOTE
    + """
case $1 in
  status) [[ -e $CLOUD/complete ]] || exit "${STATUS:-1}" ;;
  upload) exit "$(take uploads)" ;;
esac
"""
)
# On a VM: writes down what it was given, then does as the file `behaviour` says.
EXTRACTION = """
import json, os, signal, sys, time
from pathlib import Path
home = Path(os.environ["HOME"])
tpu = {name: value for name, value in os.environ.items() if name.startswith(("TPU_", "CLOUD_TPU"))}
with (home / "starts").open("a") as starts:
    starts.write(json.dumps({"argv": sys.argv[1:], "tpu": tpu}) + "\\n")
print("extracting\\r 50%\\r100%", flush=True)
behaviour = (home / "behaviour").read_text() if (home / "behaviour").exists() else "0"
if behaviour == "until SIGTERM":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (home / "ready").touch()
    time.sleep(60)
sys.exit(int(behaviour))
"""
CURL = """#!/bin/bash
case ${!#} in
  */agent-worker-number) printf %s "$VM" ;;
  */worker-network-endpoints) printf 'a:0:10.0.0.1,b:1:10.0.0.2' ;;
  *) exit 22 ;;
esac
"""


class Cloud:
    """A fake cloud in a folder, and the scripts run against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "tools"
        self.tools.mkdir(parents=True)
        self.add("gcloud", GCLOUD)
        self.add("jax-extract", JAX_EXTRACT)
        self.new_slice("ACTIVE")

    def add(self, name: str, program: str) -> None:
        path = self.tools / name
        path.write_text(program if program.startswith("#!") else f"#!{sys.executable} -SE\n{program}")
        path.chmod(0o755)

    def write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def new_slice(self, *states: str) -> None:
        """The states that a slice goes through when it is created."""
        self.write("states_of_new", *states)

    def run(
        self, script: str, *words: object, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(LAUNCH / script), *map(str, words)],
            cwd=self.folder,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def environment(self, changes: Mapping[str, str] | None = None) -> dict[str, str]:
        path = f"{self.tools}:{os.environ['PATH']}"
        ours = {name: value for name, value in os.environ.items() if "TPU" not in name}
        return {**ours, "PATH": path, "CLOUD": str(self.folder), "HOME": str(self.folder), **(changes or {})}

    def calls(self) -> list[list[str]]:
        """What the tools were called with, their own name first."""
        file = self.folder / "calls"
        return _calls(file.read_text()) if file.exists() else []

    def verbs(self) -> list[str]:
        """What was done, without the looking: create, setup, extract, delete, status, upload."""
        return [verb for verb in map(_verb, self.calls()) if verb]


def _calls(noted: str) -> list[list[str]]:
    return [call.split("\0")[:-1] for call in noted.split("\1")[:-1]]


def _verb(call: list[str]) -> str:
    if call[0] == "jax-extract":
        return call[1]
    if call[4] == "ssh":
        return "extract" if "extract.sh" in call[-1] else "setup" if "setup.sh" in call[-1] else ""
    return call[4] if call[4] in ("create", "delete") else ""


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud")


@pytest.fixture
def slice_of_vms(cloud: Cloud) -> Cloud:
    """A slice whose VMs are set up, with an extraction that only notes how it was started."""
    cloud.write("state", "ACTIVE")
    cloud.add("curl", CURL)
    for number in range(VMS):
        project = cloud.folder / f"vm{number}" / "jax_extract"
        shutil.copytree(LAUNCH, project / "launch")
        (project / ".venv/bin").mkdir(parents=True)
        for name, program in {"jax-extract": f"#!{sys.executable} -SE\n{EXTRACTION}", "python": "#!/bin/sh\n"}.items():
            (project / ".venv/bin" / name).write_text(program)
            (project / ".venv/bin" / name).chmod(0o755)
    return cloud


def _starts(cloud: Cloud, number: int) -> list[SimpleNamespace]:
    file = cloud.folder / f"vm{number}" / "starts"
    return [SimpleNamespace(**json.loads(line)) for line in file.read_text().splitlines()]


def _commands(printed: str) -> list[list[str]]:
    """The commands of a dry run, as a shell reads them."""
    script = "note() { printf '%s\\0' \"$@\"; printf '\\1'; }\n"
    lines = re.sub(r"^(?!#)(?=\S)", "note ", printed, flags=re.MULTILINE)
    out = subprocess.run(["bash", "-c", script + lines], capture_output=True, text=True, check=True).stdout
    return _calls(out)


# What every script promises


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_a_wrong_flag_is_refused_in_one_sentence(cloud: Cloud, script: str) -> None:
    told = cloud.run(script, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert "--dry_run" in told.stdout
    for words in (["--no_such_flag", "1"], ["--dry_run", "Perhaps"], ["word"], ["--name"], ["--image"]):
        refused = cloud.run(script, *words)
        assert refused.returncode == 2, words
        assert re.fullmatch(r"error: [^\n]+\n", refused.stderr), refused.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--name", "acts; touch owned"),
        ("--name", "$(touch owned)"),
        ("--name", "-acts"),
        ("--zone", "us-west4-a --quiet"),
        ("--project", "my-project\n--quiet"),
        ("--activations_dir", "activations"),
        ("--activations_dir", "gs://b"),
        ("--activations_dir", "gs://my-bucket/\nrun"),
        ("--mode", "both"),
        ("--mesh_shape", "8x8"),
        ("--chip_bounds", "$(id)"),
        ("--run_id", "a b"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_and_named(cloud: Cloud, flag: str, value: str) -> None:
    words = dict(zip(SLICE[::2], SLICE[1::2], strict=True)) | {"--activations_dir": PLACE, flag: value}
    refused = cloud.run("tpu_pod/run_extraction.sh", *(word for pair in words.items() for word in pair))
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {flag} ")
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "arc_tasks.json"], "--data arc_tasks.json is neither here nor a gs:// place"),
        (["--revision", "no-such-branch"], "--revision no-such-branch is not in this checkout; "),
        (["--repository", "not a url"], "--repository 'not a url' is not the URL of a repository"),
        (["--accelerator_type", "v5e"], "--accelerator_type v5e is not "),
        (["--capacity", "cheap"], "--capacity cheap is not a kind of capacity; "),
        (["--service_account", "me"], "--service_account me is not "),
        (["--mode", "both"], "--mode both is not a mode; "),
        (["--chip_bounds", "2x2"], "--chip_bounds 2x2 is not "),
        (["--", "--worker_id", "3"], "--worker_id is decided by --mode spmd; "),
        (["--", "--activations_dir", "x"], "--activations_dir is a flag of run_until_complete.sh; "),
    ],
)
@pytest.mark.parametrize("dry", [["--dry_run"], []])
def test_what_a_later_step_would_refuse_is_refused_before_the_first(
    cloud: Cloud, words: list[str], told: str, dry: list[str]
) -> None:
    refused = cloud.run("tpu_pod/run_until_complete.sh", *SLICE, "--activations_dir", PLACE, *dry, *words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {told}")
    assert refused.stderr.count("\n") == 1
    assert cloud.calls() == []


def test_a_flag_given_twice_is_refused(cloud: Cloud) -> None:
    refused = cloud.run("tpu_pod/delete_slice.sh", *SLICE, "--name", "other", "--force")
    assert (refused.returncode, refused.stderr) == (2, "error: --name was given twice; give it once\n")


# Creating and deleting a slice


@pytest.mark.parametrize(("capacity", "flags"), [("spot", ["--spot"]), ("reserved", ["--reserved"]), ("on_demand", [])])
def test_a_slice_is_requested_as_a_queued_resource(cloud: Cloud, capacity: str, flags: list[str]) -> None:
    done = cloud.run("tpu_pod/create_slice.sh", *SLICE, "--capacity", capacity, "--dry_run", "--", "--labels=a=b c")
    resource = ["gcloud", "compute", "tpus", "queued-resources"]
    size = ["--node-id=acts", "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert _commands(done.stdout) == [
        [*resource, "create", "acts", *WHERE, *size, *flags, "--quiet", "--async", "--labels=a=b c"],
        [*resource, "describe", "acts", *WHERE, "--format=value(state.state)"],
    ]
    assert cloud.calls() == []


def test_a_slice_is_waited_for_and_one_that_waits_already_is_not_requested_again(cloud: Cloud) -> None:
    cloud.new_slice("CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    words = ["tpu_pod/create_slice.sh", *SLICE, "--poll_seconds", "0.01"]
    done = cloud.run(*words)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "CREATING",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    assert cloud.run(*words).returncode == 0
    assert cloud.verbs() == ["create"]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["PROVISIONING", "FAILED"], 3),
        (["ACTIVE_SOON", "SUSPENDING"], 4),
        (["SUSPENDED"], 4),
        (["WAITING_FOR_RESOURCES"], 5),
    ],
)
def test_a_slice_that_does_not_come_ends_the_waiting_with_a_code_that_says_why(
    cloud: Cloud, states: list[str], code: int
) -> None:
    cloud.new_slice(*states)
    done = cloud.run(
        "tpu_pod/create_slice.sh", *SLICE, "--poll_seconds", "0.01", "--wait_seconds", "0" if code == 5 else "9"
    )
    assert done.returncode == code
    assert states[-1].lower() in done.stderr.lower()


def test_a_cloud_that_does_not_answer_is_not_asked_for_ever(cloud: Cloud) -> None:
    cloud.write("out_of_order", "")
    done = cloud.run("tpu_pod/create_slice.sh", *SLICE, "--poll_seconds", "0.01")
    assert done.returncode == 1
    assert done.stderr.count("PERMISSION_DENIED") == 1  # however often it was said
    assert "create" not in cloud.verbs()


def test_a_slice_is_deleted_only_after_a_yes(cloud: Cloud) -> None:
    cloud.write("state", "ACTIVE")
    assert cloud.run("tpu_pod/delete_slice.sh", *SLICE).returncode == 2
    assert _answer(cloud, "yes") == 2
    assert cloud.verbs() == []
    assert _answer(cloud, "acts") == 0
    [call] = cloud.calls()
    assert call == ["gcloud", "compute", "tpus", "queued-resources", "delete", "acts", *WHERE, "--force", "--quiet"]


def _answer(cloud: Cloud, answer: str) -> int:
    """delete_slice.sh at a terminal, and what is typed there."""
    ours, theirs = pty.openpty()
    words = [str(LAUNCH / "tpu_pod/delete_slice.sh"), *SLICE]
    with subprocess.Popen(words, env=cloud.environment(), stdin=theirs, stdout=theirs, stderr=theirs) as script:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        code = script.wait(30)
    os.close(ours)
    return code


# On the VMs


def test_what_a_dry_run_prints_is_what_runs(cloud: Cloud, tmp_path: Path) -> None:
    (cloud.folder / "my tasks.json").write_text("{}")
    data = ["--data", "my tasks.json", "--data", "gs://models/qwen; touch owned"]
    for script, words in {
        "tpu_pod/setup_workers.sh": [*SLICE, *data],
        "tpu_pod/run_extraction.sh": [*SLICE, "--activations_dir", PLACE, "--run_id", "a", "--", *HOSTILE],
        "upload.sh": ["--directory", "my acts", "--bucket", PLACE, "--on_all_workers", *SLICE],
        "tpu_pod/delete_slice.sh": [*SLICE, "--force"],
    }.items():
        cloud.add("gcloud", GCLOUD)
        (cloud.folder / "calls").unlink(missing_ok=True)
        printed = cloud.run(script, "--dry_run", "True", *words)
        assert printed.returncode == 0, printed.stderr
        assert cloud.calls() == []
        cloud.add("gcloud", NOTE)
        done = cloud.run(script, *words)
        assert done.returncode == 0, done.stderr
        assert cloud.calls() == [command for command in _commands(printed.stdout) if command[0] == "gcloud"], script
    assert not list(tmp_path.rglob("owned"))


def test_a_set_up_vm_has_the_project_its_environment_and_the_data(slice_of_vms: Cloud, tmp_path: Path) -> None:
    slice_of_vms.add("sudo", "#!/bin/sh\ncat >/dev/null\n")
    tasks = slice_of_vms.folder / "my tasks.json"
    tasks.write_text("{}")
    data = ["--data", str(tasks), "--data", "gs://models/qwen; touch owned"]
    done = slice_of_vms.run("tpu_pod/setup_workers.sh", *SLICE, *data)
    assert done.returncode == 0, done.stderr
    for number in range(VMS):
        project = slice_of_vms.folder / f"vm{number}/jax_extract"
        assert (project / "pyproject.toml").read_bytes()
        assert (project / "data/my tasks.json").read_text() == "{}"
        assert [start.argv for start in _starts(slice_of_vms, number)] == [["--version"]]
    fetched = ["gcloud", "storage", "cp", "--recursive", "--no-clobber", "gs://models/qwen; touch owned"]
    assert slice_of_vms.calls().count([*fetched, "jax_extract/data/"]) == VMS
    assert all("--worker=all" in call for call in slice_of_vms.calls() if call[1] == "compute")
    assert not list(tmp_path.rglob("owned"))


def test_a_repository_is_cloned_at_its_revision_by_the_vms_themselves(cloud: Cloud, tmp_path: Path) -> None:
    source = tmp_path / "source"
    git = ["git", "-C", str(source), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "init", "--quiet", "-b", "main", str(source)], check=True)
    for text in ("one", "two"):
        (source / "file").write_text(text)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", text], check=True)
        subprocess.run([*git, "branch", text], check=True)
    words = [*SLICE, "--repository", "https://example.org/x.git", "--dry_run", "--revision"]
    for revision in ("two", "one"):  # the second time it is cloned already
        printed = cloud.run("tpu_pod/setup_workers.sh", *words, revision).stdout
        [line] = [w.partition("=")[2] for w in _commands(printed)[0] if w.startswith("--command=")]
        subprocess.run(["bash", "-c", line.replace("https://example.org/x.git", str(source))], cwd=tmp_path, check=True)
        assert (tmp_path / "jax_extract/file").read_text() == revision


@pytest.mark.parametrize("mode", ["spmd", "workers"])
def test_every_vm_gets_the_words_after_the_dashes_unchanged(slice_of_vms: Cloud, mode: str, tmp_path: Path) -> None:
    words = ["--model_path", *HOSTILE, "--layers_to_extract", "10", "11"]
    done = slice_of_vms.run(
        "tpu_pod/run_extraction.sh", *SLICE, "--activations_dir", PLACE, "--mode", mode, "--", *words
    )
    assert done.returncode == 0, done.stderr
    said = {f"[{number}] {line}" for number in range(VMS) for line in ("extracting", " 50%", "100%")}
    assert said <= set(done.stdout.splitlines())
    for number in range(VMS):
        [start] = _starts(slice_of_vms, number)
        if mode == "spmd":
            before, after = ["--mesh_shape", "8,8"], ["--distributed", "on"]
            assert start.tpu == {}
        else:
            before = []
            after = ["--distributed", "off", "--worker_id", str(number), "--num_workers", str(VMS)]
            assert start.tpu["TPU_PROCESS_BOUNDS"] == "1,1,1"
            assert start.tpu["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "2,2,1"
            assert start.tpu["TPU_VISIBLE_CHIPS"] == "0,1,2,3"
        assert start.argv == ["extract", "--activations_dir", PLACE, *before, *words, *after]
    assert not list(tmp_path.rglob("owned"))


def test_several_slices_can_share_the_workers_of_a_run(slice_of_vms: Cloud) -> None:
    words = [*SLICE, "--activations_dir", PLACE, "--mode", "workers", "--worker_offset", "4", "--num_workers", "6"]
    assert slice_of_vms.run("tpu_pod/run_extraction.sh", *words, "--chip_bounds", "off").returncode == 0
    start = _starts(slice_of_vms, 1)[0]
    assert start.argv[-4:] == ["--worker_id", "5", "--num_workers", "6"]
    assert start.tpu == {}


@pytest.mark.parametrize("flag", ["--worker_id", "--distributed", "--mesh-shape", "--activations_dir=x"])
def test_what_the_mode_decides_is_refused_among_the_extraction_flags(cloud: Cloud, flag: str) -> None:
    refused = cloud.run("tpu_pod/run_extraction.sh", *SLICE, "--activations_dir", PLACE, "--", flag, "1")
    assert refused.returncode == 2
    assert flag.partition("=")[0] in refused.stderr


def test_the_exit_code_of_a_failed_vm_comes_back_and_a_repeated_command_starts_nothing_anew(
    slice_of_vms: Cloud,
) -> None:
    (slice_of_vms.folder / "vm1/behaviour").write_text("7")
    words = ["tpu_pod/run_extraction.sh", *SLICE, "--activations_dir", PLACE, "--run_id", "first"]
    for _ in range(2):  # gcloud repeats a command by itself when a connection breaks
        done = slice_of_vms.run(*words)
        assert done.returncode == 7
        assert "[1] extracting" in done.stdout
    assert [len(_starts(slice_of_vms, number)) for number in range(VMS)] == [1, 1]
    assert slice_of_vms.run(*words[:-1], "second").returncode == 7
    assert len(_starts(slice_of_vms, 0)) == 2


def test_an_extraction_outlives_its_connection_and_is_found_replaced_and_stopped(slice_of_vms: Cloud) -> None:
    homes = [slice_of_vms.folder / f"vm{number}" for number in range(VMS)]
    for home in homes:
        (home / "behaviour").write_text("until SIGTERM")
    words = [str(LAUNCH / "tpu_pod/run_extraction.sh"), *SLICE, "--activations_dir", PLACE]
    with subprocess.Popen(
        [*words, "--run_id", "first"],
        env=slice_of_vms.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as watching:
        _wait_for(*(home / "ready" for home in homes))
        os.killpg(watching.pid, signal.SIGKILL)
    refused = slice_of_vms.run("tpu_pod/run_extraction.sh", *words[1:], "--run_id", "second")
    assert refused.returncode == 2
    assert "runs an extraction already (first)" in refused.stderr
    for home in homes:
        (home / "behaviour").write_text("0")
    replaced = slice_of_vms.run("tpu_pod/run_extraction.sh", *words[1:], "--run_id", "third", "--replace")
    assert replaced.returncode == 0, replaced.stderr
    assert [len(_starts(slice_of_vms, number)) for number in range(VMS)] == [2, 2]
    stopped = slice_of_vms.run("tpu_pod/run_extraction.sh", *SLICE, "--stop")
    assert (stopped.returncode, "no extraction runs on VM 1" in stopped.stdout) == (0, True)


def _wait_for(*files: Path) -> None:
    for file in files:
        deadline = time.monotonic() + 20
        while not file.exists():
            assert time.monotonic() < deadline, f"{file} does not appear"
            time.sleep(0.01)


@pytest.mark.parametrize("version", ["3.12", "3.10"])
def test_a_vm_brings_its_own_python_where_the_one_it_has_is_too_old(tmp_path: Path, version: str) -> None:
    project = tmp_path / "jax_extract"
    shutil.copytree(LAUNCH / "tpu_pod/on_worker", project / "launch/tpu_pod/on_worker")
    log, tools = tmp_path / "log", tmp_path / "tools"
    tools.mkdir()
    # Each tool notes its words; making an environment or fetching uv makes the tools that come with it.
    tool = f"""#!/bin/bash
echo "${{0##*/}} $*" >>{log}
make() {{ mkdir -p "$1" && cp {tools}/python3 "$1/$2"; }}
case "$*" in
  -c*) [[ {version} != 3.10 ]] ;;
  "-m venv"* | "venv "*) make .venv/bin python && make .venv/bin jax-extract ;;
  *--target*) make "$HOME/.local/share/jax_extract/bin" uv ;;
esac
"""
    for name in ("python3", "python3.11", "python3.12", "python3.13", "sudo"):
        (tools / name).write_text(tool)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    setup = project / "launch/tpu_pod/on_worker/setup.sh"
    subprocess.run([str(setup)], env=environment, check=True, capture_output=True)
    steps = [line for line in log.read_text().splitlines() if " -c " not in line and not line.startswith("sudo")]
    made = ["python3.12 -m venv .venv"]
    if version == "3.10":
        made = [
            f"python3 -m pip install --quiet --target {tmp_path}/.local/share/jax_extract uv",
            "uv venv --quiet --seed --python 3.11 .venv",
        ]
    install = "python -m pip install --quiet --disable-pip-version-check --editable .[tpu]"
    assert steps == [*made, install, "jax-extract --version"]
    assert (project / "data").is_dir()


# Starting again after a preemption


def _until_complete(
    cloud: Cloud, *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = [*SLICE, "--activations_dir", PLACE, *FAST, *words, "--", "--model_path", "a b"]
    return cloud.run("tpu_pod/run_until_complete.sh", *arguments, env=env)


def test_a_preempted_extraction_is_started_again_on_a_new_slice_until_it_is_complete(cloud: Cloud) -> None:
    cloud.new_slice("WAITING_FOR_RESOURCES", "ACTIVE")
    cloud.write("extractions", "lost", "complete", "0")
    started = time.monotonic()
    done = _until_complete(cloud, "--delete_when_done")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 30  # the hanging connection was ended
    once = ["create", "setup", "extract"]
    assert cloud.verbs() == ["status", *once, "status", "delete", *once, "status", "delete"]
    commands = [call[-1] for call in cloud.calls() if _verb(call) == "extract"]
    first, second = (re.sub(r"--run_id \S+", "", command) for command in commands)
    assert first == second
    assert first.endswith("--activations_dir gs://my-bucket/run --mesh_shape 8,8 --model_path 'a b'")


def test_a_slice_whose_vms_are_gone_is_replaced_although_its_request_says_active(cloud: Cloud) -> None:
    cloud.write("state", "ACTIVE")
    cloud.write("vm_state", "PREEMPTED")
    cloud.write("extractions", "complete")
    _until_complete(cloud, "--max_tries", "1")
    assert cloud.verbs()[:4] == ["status", "delete", "create", "setup"]


def test_a_run_that_is_complete_costs_nothing(cloud: Cloud) -> None:
    cloud.write("complete", "")
    assert _until_complete(cloud).returncode == 0
    assert cloud.calls() == [["jax-extract", "status", PLACE]]


def test_a_failure_on_a_slice_that_stands_is_tried_again_there_and_not_for_ever(cloud: Cloud) -> None:
    cloud.write("extractions", "1")
    done = _until_complete(cloud, "--max_tries", "3", "--delete_when_done")
    assert done.returncode == 1
    assert f"{PLACE} is not complete after 3 tries" in done.stderr
    assert cloud.verbs() == ["status", "create", "setup", *["extract", "status"] * 3, "delete"]
    assert re.findall(r"again in (\S+) s", done.stdout) == ["0.01", "0.02"]


def test_an_extraction_that_is_refused_twice_is_not_tried_further(cloud: Cloud) -> None:
    cloud.write("extractions", "2", "1", "2", "2", "complete")
    assert _until_complete(cloud).returncode == 2
    assert cloud.verbs().count("extract") == 4
    assert "delete" not in cloud.verbs()


def test_a_machine_that_cannot_see_the_bucket_does_not_repeat_what_ended_well(cloud: Cloud) -> None:
    cloud.write("extractions", "0")
    done = _until_complete(cloud, env={"STATUS": "2"})
    assert done.returncode == 2
    assert "cannot see whether" in done.stdout
    assert cloud.verbs().count("extract") == 1


def test_a_slice_that_fails_or_never_comes_ends_the_tries(cloud: Cloud) -> None:
    cloud.new_slice("FAILED")
    assert _until_complete(cloud, "--max_tries", "2").returncode == 1
    assert cloud.verbs() == ["status", "create", "delete", "create"]
    (cloud.folder / "state").unlink()
    cloud.new_slice("WAITING_FOR_RESOURCES")
    done = _until_complete(cloud, "--wait_seconds", "0", "--delete_when_done")
    assert done.returncode == 5
    assert cloud.verbs()[-2:] == ["create", "delete"]  # else it might come, and be billed, when nobody looks


# The upload job


def _upload(cloud: Cloud, *words: str) -> subprocess.CompletedProcess[str]:
    times = ["--retry_seconds", "0.01", "--max_retry_seconds", "0.015"]
    return cloud.run("upload.sh", "--directory", "my acts", "--bucket", PLACE, *times, *words)


def test_an_upload_is_repeated_with_longer_and_longer_pauses_until_all_is_there(cloud: Cloud) -> None:
    cloud.write("uploads", "1", "1", "143", "0")
    done = _upload(cloud, "--delete_local")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [["jax-extract", "upload", "my acts", PLACE, "--delete_local", "True"]] * 4
    assert re.findall(r"again in (\S+) s", done.stdout) == ["0.01", "0.015", "0.015"]


@pytest.mark.parametrize(
    ("codes", "code", "times"),
    [(["1"], 1, 3), (["2"], 2, 2), (["2", "1", "2", "2", "0"], 2, 4), (["130"], 130, 1)],
)
def test_an_upload_that_cannot_succeed_ends(cloud: Cloud, codes: list[str], code: int, times: int) -> None:
    cloud.write("uploads", *codes)
    assert _upload(cloud, "--max_tries", "3" if codes == ["1"] else "9").returncode == code
    assert len(cloud.calls()) == times


# GKE


def _render(*words: str) -> SimpleNamespace:
    """render_jobset.py, in this process."""
    module = runpy.run_path(str(LAUNCH / "gke/render_jobset.py"))
    fixed = ["--name", "acts", "--image", "registry.example/p/jax-extract:1", "--activations_dir", PLACE]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = module["main"]([*fixed, *words])
        except SystemExit as ended:
            code = ended.code
    return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def _jobset(*words: str) -> SimpleNamespace:
    document = yaml.safe_load(_render(*words).stdout)
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return SimpleNamespace(document=document, job=job, pod=pod, container=pod["containers"][0])


def test_a_jobset_in_spmd_mode_is_one_program_over_the_slice() -> None:
    made = _jobset("--max_restarts", "7", "--", "--model_path", "a")
    assert (made.document["kind"], made.document["metadata"]["name"]) == ("JobSet", "acts")
    assert made.document["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert (made.job["parallelism"], made.job["completions"], made.job["backoffLimit"]) == (16, 16, 0)
    assert made.pod["terminationGracePeriodSeconds"] == 30
    assert made.pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert made.container["resources"]["limits"] == {"google.com/tpu": 4}
    assert made.container["command"] == ["jax-extract", "extract"]
    place = ["--activations_dir", PLACE, "--distributed", "on", "--mesh_shape", "8,8"]
    assert made.container["args"] == [*place, "--model_path", "a"]


def test_a_refused_command_fails_a_jobset_at_once() -> None:
    for mode in ("spmd", "workers"):
        made = _jobset("--mode", mode)
        rule = made.job["podFailurePolicy"]["rules"][0]
        assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
        assert rule["onExitCodes"]["containerName"] == made.container["name"]
        [rule] = made.document["spec"]["failurePolicy"]["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_a_jobset_of_workers_is_of_single_vms_that_are_replaced_singly() -> None:
    made = _jobset("--mode", "workers", "--workers", "6", "--max_restarts", "9", "--spot", "False")
    assert (made.job["parallelism"], made.job["completions"], made.job["backoffLimit"]) == (6, 6, 9)
    assert made.job["podFailurePolicy"]["rules"][1]["action"] == "Ignore"
    assert made.pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2"
    assert "cloud.google.com/gke-spot" not in made.pod["nodeSelector"]
    assert "annotations" not in made.document["metadata"]  # they would be kept on one node pool of one slice
    words = ["--distributed", "off", "--worker_id", "$(WORKER_ID)", "--num_workers", "6"]
    assert made.container["args"] == ["--activations_dir", PLACE, *words]
    [variable] = [entry for entry in made.container["env"] if entry["name"] == "WORKER_ID"]
    assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]


def test_a_data_bucket_is_mounted_for_reading() -> None:
    made = _jobset("--data_bucket", "my-models")
    assert made.job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    [volume], [mount] = made.pod["volumes"], made.container["volumeMounts"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-models"
    assert (mount["name"], mount["mountPath"], mount["readOnly"]) == (volume["name"], "/data", True)


def test_words_of_the_user_stay_words_in_a_jobset() -> None:
    words = [*HOSTILE, "a: b", "- c", "{{x}}", "$(WORKER_ID)", "yes", "3"]
    args = _jobset("--", *words).container["args"]
    assert args[-len(words) :] == [word.replace("$(", "$$(") for word in words]  # $$( is how Kubernetes writes $(


@pytest.mark.parametrize(
    "words",
    [
        ["--name", "a\nb"],
        ["--name", "A"],
        ["--image", "a b"],
        ["--activations_dir", "here"],
        ["--topology", "8,8"],
        ["--topology", "3x3"],
        ["--mode", "workers", "--topology", "8x8"],
        ["--max_restarts", "-1"],
        ["--workers", "many"],
        ["--service_account", "a; b"],
        ["--data_bucket", "gs://x"],
        ["--no_such_flag", "1"],
        ["--", "--worker_id=1"],
    ],
)
def test_a_jobset_that_cannot_be_meant_is_refused_in_one_sentence(words: list[str]) -> None:
    refused = _render(*words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", refused.stderr), refused.stderr


def test_a_jobset_is_rendered_and_applied(cloud: Cloud) -> None:
    cloud.add("kubectl", NOTE)
    fixed = ["--name", "acts", "--image", "i:1", "--activations_dir", PLACE, "--mode", "workers", "--workers", "3"]
    done = cloud.run("gke/run_jobset.sh", *fixed, "--", "--model_path", "a b; touch owned")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [["kubectl", "apply", "--filename=acts.jobset.yaml"]]
    document = yaml.safe_load((cloud.folder / "acts.jobset.yaml").read_text())
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 3
    assert job["template"]["spec"]["containers"][0]["args"][-1] == "a b; touch owned"


def test_an_xpk_workload_has_the_whole_command_as_one_word(cloud: Cloud) -> None:
    fixed = ["--project", "my-project", "--zone", "us-west4-a", "--cluster", "c", "--name", "acts", "--image", "i:1"]
    hostile = [word for word in HOSTILE if "\n" not in word]
    done = cloud.run("gke/run_xpk.sh", *fixed, "--activations_dir", PLACE, "--dry_run", "--", *hostile)
    [command] = _commands(done.stdout)
    assert command[:4] == ["xpk", "workload", "create", "--workload=acts"]
    assert {"--tpu-type=v5litepod-64", "--max-restarts=10", "--restart-on-exit-codes=1"} <= set(command)
    words = shlex.split(command[-1].removeprefix("--command="))
    start = ["exec", "jax-extract", "extract", "--activations_dir", PLACE, "--distributed", "on", "--mesh_shape", "8,8"]
    assert words == [*start, *hostile]
    refused = cloud.run("gke/run_xpk.sh", *fixed, "--activations_dir", PLACE, "--dry_run", "--", "x\ny")
    assert (refused.returncode, "line break" in refused.stderr) == (2, True)


def test_the_image_holds_what_the_package_is_built_from() -> None:
    copied = re.findall(r"^COPY (.+)$", (LAUNCH / "gke/Dockerfile").read_text(), re.MULTILINE)
    sources = {word for line in copied for word in line.split()[:-1]}
    allowed = {line[1:] for line in (LAUNCH / "gke/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)
    assert {"pyproject.toml", "jax_extract", "models", "distributed_inference_with_activations.py"} <= sources


# The page


def test_every_launch_command_of_the_page_is_one_that_the_scripts_take(cloud: Cloud) -> None:
    page = (ROOT / "docs/tpu_pods.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    script = "\n".join(blocks)
    variables = "\n".join(re.findall(r"^[A-Z]+=.+$", script, re.MULTILINE))
    commands = re.findall(r"^ *(launch/(?:.+\\\n)*.+)$", script, re.MULTILINE)
    assert {name for name in SCRIPTS if f"launch/{name}" in "".join(commands)} == set(SCRIPTS)
    (cloud.folder / "arc_tasks.json").write_text("{}")
    (cloud.folder / "launch").symlink_to(LAUNCH)
    for command in commands:
        line = re.sub(r"^(launch/\S+)", r"\1 --dry_run True", command.partition(" >")[0])
        done = subprocess.run(
            ["bash", "-euc", f"i=3\n{variables}\n{line}"],
            cwd=cloud.folder,
            env=cloud.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
    assert cloud.calls() == []
