"""Compiled programs that outlive the process: the same command starts without compiling again.

In: where programs are kept (`JAX_EXTRACT_COMPILATION_CACHE`, else `$XDG_CACHE_HOME/jax_extract/compiled`).
Out: JAX reads and writes its compiled programs there. JAX decides what is the same program (its key holds the
program, the options, the versions and the devices); what is here is how they are kept: whole or not at all,
checked when read, of this machine, bounded in size, in a folder that nobody else can write to, because a
compiled program is native code that will run. Nothing that happens to the folder ends a command.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT = "JAX_EXTRACT_COMPILATION_CACHE"  # a folder, or `off`
LARGEST_BYTES = 1_000_000_000
SHORTEST_COMPILATION = 0.2  # seconds; what compiles faster is not worth a file

_SUFFIX = ".compiled"
_DIGEST_BYTES = hashlib.sha256().digest_size
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def start() -> None:
    """Has JAX keep its compiled programs, from now on and in the whole process; for commands.

    JAX's own settings go first: where they name a folder or turn the cache off, nothing is changed.
    """
    if (folder := chosen_folder()) is None:
        return
    import jax
    from jax._src import compilation_cache as of_jax

    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    # Its own file cache writes in place, never replaces a damaged entry and trusts whatever it finds.
    if not hasattr(of_jax, "get_file_cache") or not _make_private(folder):
        return
    of_jax.get_file_cache = lambda path: (CompiledPrograms(Path(path), is_named=ENVIRONMENT in os.environ), path)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA writes those itself, and may fail
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_COMPILATION)


def chosen_folder() -> Path | None:
    """Where compiled programs are kept; None where they are not."""
    chosen = os.environ.get(ENVIRONMENT, "")
    if chosen.lower() in ("off", "0", "false", "none"):
        return None
    with contextlib.suppress(RuntimeError):  # no home directory
        if chosen:
            return Path(chosen).expanduser().absolute()
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (home if home.is_absolute() else Path.home() / ".cache") / "jax_extract" / "compiled"
    return None


@functools.cache
def this_machine() -> str:
    """A digest of the processor: programs for a CPU hold its instructions, and homes are shared between machines."""
    about = [platform.machine(), platform.processor(), str(os.cpu_count())]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():  # the first processor stands for all
                break
            if line.startswith(("model name", "flags", "Features", "CPU implementer", "CPU part")):
                about.append(line)
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


@dataclass
class CompiledPrograms:
    """A folder of compiled programs, as JAX wants a cache: `get` and `put`. Any number of processes may share it.

    Attributes:
      is_named: whether the user named the folder: then the processes of one program use it too. By default they do
        not, because JAX lets the first one alone write, and the others would compile what that one loads.
    """

    folder: Path
    is_named: bool = True
    largest_bytes: int = LARGEST_BYTES
    machine: str = field(default_factory=this_machine)

    def get(self, key: str) -> bytes | None:
        """The program of this key; None where there is none that can be used."""
        if not self._is_used():
            return None
        try:
            # Not followed where it is a link: its target may be anybody's.
            with open(os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                if not _is_ours(os.fstat(file.fileno())):
                    return None
                content = file.read()
        except OSError:
            return None
        digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(program).digest() != digest:
            return None  # it is compiled again, and `put` replaces this one
        with contextlib.suppress(OSError):
            os.utime(self._path(key))  # it was used: others go first
        return program

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program, whole or not at all; what was used longest ago goes where there is too much."""
        if not self._is_used() or len(value) > self.largest_bytes:
            return
        with contextlib.suppress(OSError):
            handle, unfinished = tempfile.mkstemp(prefix=".", suffix=_SUFFIX, dir=self.folder)
            try:
                with open(handle, "wb") as file:
                    file.write(hashlib.sha256(value).digest() + value)
                Path(unfinished).replace(self._path(key))
            except BaseException:
                Path(unfinished).unlink(missing_ok=True)
                raise
            self._make_room()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}-{self.machine}{_SUFFIX}"

    def _is_used(self) -> bool:
        if self.is_named:
            return True
        import jax

        return jax.process_count() == 1

    def _make_room(self) -> None:
        used = sorted(self._entries(), key=lambda entry: entry[1].st_mtime_ns, reverse=True)
        total = 0
        for path, status in used:
            total += status.st_size
            if total > self.largest_bytes:
                path.unlink(missing_ok=True)

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(f"*{_SUFFIX}"):  # unfinished ones of killed processes too
            with contextlib.suppress(OSError):
                yield path, path.lstat()


def _make_private(folder: Path) -> bool:
    """Makes the folder, for its owner alone; says whether it is one to load native code from."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        if ENVIRONMENT in os.environ:  # who names a folder wants to know
            print(
                f"note: compiled programs are not kept: {folder} cannot be used ({error.strerror}); "
                f"name another folder in {ENVIRONMENT}, or off",
                file=sys.stderr,
            )
        return False
    if not _is_ours(status):
        print(
            f"note: compiled programs are not kept in {folder}, which others may write to; "
            f"chmod 700 it, or name another folder in {ENVIRONMENT} (or off)",
            file=sys.stderr,
        )
        return False
    return True


def _is_ours(status: os.stat_result) -> bool:
    """Whether only this user, or root, can have written it."""
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & _OTHERS_MAY_WRITE
