"""`jax-extract <command>`, and the one way in which every command parses flags and reports mistakes.

In: the words of a command line. Out: an exit code: 0 done, 1 done and the answer is no (of an extraction:
another of its processes is gone), 2 a mistake that the user can mend, 130 interrupted, 143 preempted
(SIGTERM). Flags are the fields of a configuration dataclass, spelled as the fields are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import os
import re
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jax_extract import interruption, startup
from jax_extract.devices import libtpu
from jax_extract.errors import UserError
from jax_extract.layer_words import ALIASES, layer_words
from jax_extract.spelling import as_said
from jax_extract.terminal import folded
from models.nearest import nearest

if TYPE_CHECKING:
    from jax_extract.config import ExtractConfig

T = TypeVar("T")

_USAGE = """usage: jax-extract COMMAND …

commands:
  extract    extract activations of a language model
  generate   answer prompts; with extract --max_new_tokens, answers and activations
  estimate   how much a run will write and how long it will take, before it is started
  finetune   train a model on a benchmark task, whole or by LoRA
  representations
             rows of every layer for all models that finetune has trained, and for their base model
  compile    what a run will need on a TPU slice, by the TPU's compiler: memory, traffic, time, cost
  inspect    summarise a run, or one shard
  plot       pictures of a run, of a training, or of sparse autoencoders
  status     which parts of a run are committed, missing and torn
  verify     read a run again and recompute samples of it
  upload     bring a run from a directory into a bucket
  sweep      remove what killed attempts have left behind; give up damaged parts
  walks      make a dataset of random walks on a graph
  train      train a small language model on walks
  sae train  train sparse autoencoders on the activations of a run
  sae eval   measure them on held-out samples, and in the model
  sae features
             a page of the features of one, and the same for Neuronpedia
  token-representations
             what a model makes of every token of its vocabulary

jax-extract COMMAND --help lists the options of each.
"""
_PIPE_CLOSED = 128 + signal.SIGPIPE  # as a shell has it
_CONFIG_FLAG = "--config"
_EXTRACT_HELP = (
    "Extract activations of a language model, matched to tokens.\n\n"
    f"Options can also come from a YAML file: {_CONFIG_FLAG} FILE; flags go over it."
)
_GENERATE_HELP = (
    "Answer prompts, into answers.jsonl and, for ARC tasks, submission.json in --activations_dir.\n\n"
    f"Options can also come from a YAML file: {_CONFIG_FLAG} FILE; flags go over it."
)


def main(argv: Sequence[str] | None = None) -> int:
    """The `jax-extract` command; without `argv` it is the process's own."""
    if argv is None:
        interruption.listen()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if argv[0] == "--version":
        print(importlib.metadata.version("jax_extract"))
        return 0
    if argv[0] not in _COMMANDS:
        _say_error(f"unknown command {argv[0]!r}; the commands are: {', '.join(_COMMANDS)}")
        return 2
    return guarded(lambda: _COMMANDS[argv[0]](argv[1:]))


def extract_command(program: str, defaults: object = None, argv: Sequence[str] | None = None) -> int:
    """An extraction as a script: `defaults` is a dataclass whose fields are (some of) `ExtractConfig`'s."""
    if argv is None:
        interruption.listen()
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _extract(words, program, defaults))


def guarded(command: Callable[[], int | None]) -> int:
    """Runs a command: its own exit code, or 2 with one sentence for a user's mistake, or 130 for an interruption."""
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):  # a terminal without these characters still gets the words
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return command() or 0
    except UserError as error:
        _say_error(as_said(str(error)))
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # who reads the output has gone, as in `jax-extract inspect … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _PIPE_CLOSED
        place = f"{error.filename} cannot be used" if error.filename else "the system refused"
        _say_error(f"{place} ({error.strerror or error}); check its permissions and the disk")
        return 2
    except KeyboardInterrupt:
        interruption.say()
        return interruption.EXIT_CODE


def _say_error(sentence: str) -> None:
    """One line in a log, where it is searched for; on a terminal as many as it takes."""
    print(folded("error: ", sentence) if sys.stderr.isatty() else f"error: {sentence}", file=sys.stderr)


def _quiet_libraries() -> None:
    """Our own lines are the interface; libraries speak only in exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    libtpu.silence()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _extract(argv: list[str], program: str = "jax-extract extract", defaults: object = None) -> None:
    config = _extract_config(argv, program, defaults)  # first: help and mistakes need not wait for the imports
    _prepare(config)
    if config.max_new_tokens is None:
        from jax_extract.extraction.command import extract_to_directory

        extract_to_directory(config)
    else:
        from jax_extract.generation.command import infer

        infer(config)


def _generate(argv: list[str]) -> None:
    config = _extract_config(argv, "jax-extract generate", help_text=_GENERATE_HELP)
    if config.max_new_tokens is None:
        raise UserError("jax-extract generate needs --max_new_tokens N, the most tokens an answer may have")
    _prepare(config)
    from jax_extract.generation.command import infer

    infer(config, extracts=False)


def _prepare(config: ExtractConfig) -> None:
    """What a run needs before its first program is compiled."""
    from jax_extract.devices import compilation_cache

    if config.overwrite:
        interruption.again = "run the same command again without --overwrite to go on"
    _leave_torch_out(config)
    compilation_cache.start()


def _leave_torch_out(config: ExtractConfig) -> None:
    if config.backend == "jax" and interruption.listening:
        startup.leave_torch_out()


def _extract_config(
    argv: list[str], program: str, defaults: object = None, help_text: str = _EXTRACT_HELP
) -> ExtractConfig:
    """The configuration that defaults, a YAML file and flags give together."""
    from jax_extract.config import ExtractConfig, from_mapping, from_yaml

    base = ExtractConfig()
    if defaults is not None:
        assert dataclasses.is_dataclass(defaults) and not isinstance(defaults, type)
        base = from_mapping(dataclasses.asdict(defaults), base, type(defaults).__name__)
    argv, path = _take_config(argv)
    if path is not None:
        base = from_yaml(path, base)
    base.check()
    return _parse(ExtractConfig, argv, program, base, help_text)


def _parse(kind: type[T], argv: list[str], program: str, default: T | None = None, help_text: str | None = None) -> T:
    """Flags into a dataclass; UserError in one sentence where they do not fit."""
    import tyro

    _refuse_unknown_flags(argv, kind, program)
    words = _join_layers(_spell_out_flags(argv, kind), kind)
    said = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                tyro.conf.configure(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)(kind),
                prog=program,
                args=words,
                use_underscores=True,
                description=help_text,
                **given,
            )
    except SystemExit as ended:
        if not ended.code:  # --help
            raise
        raise UserError(f"{_one_sentence(said.getvalue())}; {program} --help lists the flags") from None


def _status(argv: list[str]) -> int:
    from jax_extract.upkeep.status import StatusConfig, status

    return status(_parse(StatusConfig, argv, "jax-extract status"))


def _sweep(argv: list[str]) -> int:
    from jax_extract.upkeep.status import SweepConfig, sweep_command

    return sweep_command(_parse(SweepConfig, argv, "jax-extract sweep"))


def _estimate(argv: list[str]) -> None:
    interruption.again = None
    config = _extract_config(argv, "jax-extract estimate")
    _leave_torch_out(config)
    from jax_extract.estimation.command import estimate_command

    estimate_command(config)


def _compile(argv: list[str]) -> None:
    interruption.again = None
    from jax_extract.compilation.config import CompileConfig

    config = _parse(CompileConfig, argv, "jax-extract compile")
    config.check()
    from jax_extract.compilation.command import compile_command

    compile_command(config)


def _finetune(argv: list[str]) -> int:
    from jax_extract.pytorch.finetuning.config import FinetuneConfig

    config = _parse(FinetuneConfig, argv, "jax-extract finetune")
    config.check()
    from jax_extract.pytorch.finetuning.command import finetune_command

    return finetune_command(config)


def _representations(argv: list[str]) -> None:
    from jax_extract.devices import compilation_cache
    from jax_extract.post_training.config import PostTrainingConfig

    config = _parse(PostTrainingConfig, argv, "jax-extract representations")
    config.check()
    if config.overwrite:
        interruption.again = "run the same command again without --overwrite to go on"
    compilation_cache.start()
    from jax_extract.post_training.command import representations

    representations(config)


def _verify(argv: list[str]) -> int:
    from jax_extract.verification.command import VerifyConfig, verify_command

    return verify_command(_parse(VerifyConfig, argv, "jax-extract verify"))


def _upload(argv: list[str]) -> int:
    from jax_extract.upkeep.uploading import UploadConfig, upload

    return upload(_parse(UploadConfig, argv, "jax-extract upload"))


def _walks(argv: list[str]) -> None:
    interruption.again = "give the same command again"
    from jax_extract.walks.dataset import WalksConfig, walks_command

    walks_command(_parse(WalksConfig, argv, "jax-extract walks"))


def _train(argv: list[str]) -> None:
    from jax_extract.devices import compilation_cache
    from jax_extract.walks.config import TrainConfig

    config = _parse(TrainConfig, argv, "jax-extract train")
    config.check()
    if config.overwrite:
        interruption.again = "run the same command again without --overwrite to go on"
    compilation_cache.start()
    from jax_extract.walks.command import train

    train(config)


def _sae(argv: list[str]) -> None:
    """`sae train`, and what else is done with sparse autoencoders."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: jax-extract sae COMMAND …\n\ncommands: {', '.join(_OF_SAES)}; COMMAND --help lists the options")
        return
    if not argv or argv[0] not in _OF_SAES:
        raise UserError(f"jax-extract sae needs one of {', '.join(_OF_SAES)}, as in jax-extract sae train --help")
    _OF_SAES[argv[0]](argv[1:])


def _sae_train(argv: list[str]) -> None:
    from jax_extract.sae.config import SaeTrainConfig

    config = _parse(SaeTrainConfig, argv, "jax-extract sae train")
    config.check()
    if config.overwrite:
        interruption.again = "run the same command again without --overwrite to go on"
    _ready_for_saes(needs_torch=config.backend == "torch")
    from jax_extract.sae.command import sae_train

    sae_train(config)


def _sae_eval(argv: list[str]) -> None:
    from jax_extract.sae.evaluation.config import SaeEvalConfig

    config = _parse(SaeEvalConfig, argv, "jax-extract sae eval")
    config.check()
    _ready_for_saes()
    from jax_extract.sae.evaluation.command import sae_eval

    sae_eval(config)


def _sae_features(argv: list[str]) -> None:
    from jax_extract.sae.features.config import SaeFeaturesConfig

    config = _parse(SaeFeaturesConfig, argv, "jax-extract sae features")
    config.check()
    _ready_for_saes()
    from jax_extract.sae.features.command import sae_features

    sae_features(config)


def _ready_for_saes(needs_torch: bool = False) -> None:
    """What comes before their modules are imported."""
    from jax_extract.devices import compilation_cache

    if interruption.listening and not needs_torch:
        startup.leave_torch_out()
    compilation_cache.start()


def _token_representations(argv: list[str]) -> None:
    interruption.again = "give the same command again"
    from jax_extract.devices import compilation_cache
    from jax_extract.representations.config import RepresentationsConfig

    config = _parse(RepresentationsConfig, argv, "jax-extract token-representations")
    config.check()
    compilation_cache.start()
    from jax_extract.representations.command import token_representations

    token_representations(config)


def _plot(argv: list[str]) -> None:
    interruption.again = "give the same command again"
    from jax_extract.plotting.config import PlotConfig

    config = _parse(PlotConfig, argv, "jax-extract plot")
    config.check()
    if interruption.listening:
        startup.leave_torch_out()
    from jax_extract.plotting.command import plot

    plot(config)


def _refuse_unknown_flags(argv: list[str], kind: type, program: str) -> None:
    """UserError that names the flag which is meant, where one is near."""
    flags = [f"--{field.name}" for field in dataclasses.fields(kind)]
    flags += [f"--{alias}" for alias in ALIASES if _layers_field(kind)]
    for word in argv:
        flag = _plain(word.partition("=")[0])
        if not word.startswith("--") or word == "--" or flag in (*flags, "--help"):
            continue
        near = nearest(flag.lstrip("-"), (known.lstrip("-") for known in flags))
        mend = f"did you mean --{near}? {program} --help" if near else f"{program} --help"
        raise UserError(f"there is no flag {word.partition('=')[0]}; {mend} lists the flags")


# What tyro says, and what it says of a flag or word: our sentence.
_SENTENCES: tuple[tuple[str, str], ...] = (
    (r"Unrecognized options: (.*?)(; Perhaps.*)?", "{1!r} is not expected there"),
    (r"Missing value for argument '(.*?)'.*", "{1} needs a value"),
    (r"Error parsing (\S+?):? .*invalid literal for int\(\).*: ('.*')", "{1} {2} is no whole number"),
    (r"Error parsing (\S+?):? .*could not convert string to float: ('.*')", "{1} {2} is no number"),
    (r"[Ii]nvalid choice ('.*?') for argument '(.*?)'. Expected one of \((.*?),?\)", "{2} {1} is none of {3}"),
    (r"Error parsing (\S+?): no type matching .* instantiated from \[(.*?)\]\..*", "{1} does not take {2}"),
    (r"Missing from .*?: ([A-Z]+) .* \(required\) ([A-Z]+) .*", "{1} and {2} are missing"),
    (r"Missing from .*?: ([A-Z]+) (.*?)\.?( \(required\))?", "{1} is missing ({2})"),
)


def _one_sentence(box: str) -> str:
    """What tyro says in a box of several lines, without frame, rules, title and help."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    paragraphs = [" ".join(words) for rule, words in itertools.groupby(lines, _is_rule) if not rule]
    kept = [p.strip() for p in paragraphs if p.strip() and not p.startswith(("For full helptext", "Argument helptext"))]
    said = re.sub(r"\s+", " ", "; ".join(kept)).rstrip(".")
    for pattern, sentence in _SENTENCES:
        if found := re.fullmatch(pattern, said):
            return sentence.format(said, *found.groups())
    return said


def _is_rule(line: str) -> bool:
    return bool(re.fullmatch(r"[-─╭╮╰╯]+", line))


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Takes `--config FILE` out of the words."""
    rest: list[str] = []
    paths: list[str] = []
    words = iter(argv)
    for word in words:
        if word == _CONFIG_FLAG:
            paths.append(next(words, ""))
        elif word.startswith(f"{_CONFIG_FLAG}="):
            paths.append(word.partition("=")[2])
        else:
            rest.append(word)
    if "" in paths:
        raise UserError(f"{_CONFIG_FLAG} needs a YAML file")
    if len(paths) > 1:
        raise UserError(f"{_CONFIG_FLAG} was given {len(paths)} times; put the options into one file")
    return rest, (paths or [None])[0]


def _join_layers(argv: list[str], kind: type) -> list[str]:
    """All words about layers as one, under the field's own name: `--layers_to_extract=0-3,-1` of `--layers 0-3 -1`.

    One word, because `-1` by itself would be a flag.
    """
    if (field := _layers_field(kind)) is None:
        return argv
    rest: list[str] = []
    said: list[str] | None = None
    words = deque(argv)
    while words:
        flag, given, value = (word := words.popleft()).partition("=")
        if _plain(flag) not in {f"--{alias}" for alias in ALIASES}:
            rest.append(word)
            continue
        said = [*(said or []), *([value] if given else [])]
        while words and not words[0].startswith("--"):
            said.append(words.popleft())
    if said is None:
        return argv
    if said != ["None"]:  # the default, in words
        layer_words(said, f"--{field}")  # what it refuses, it refuses in its own words
    return [*rest, f"--{field}={','.join(said)}"]


def _layers_field(kind: type) -> str | None:
    """The field that holds layers, where these options have one."""
    return next((field.name for field in dataclasses.fields(kind) if field.name in ALIASES), None)


def _plain(flag: str) -> str:
    """A flag as its field is spelled."""
    return flag.replace("-", "_").replace("__", "--", 1)


def _spell_out_flags(argv: list[str], dataclass: type) -> list[str]:
    """`--overwrite` alone means `--overwrite True`, as `--upload_to_cloud True` is written in full."""
    switches = {f"--{field.name}" for field in dataclasses.fields(dataclass) if field.default in (True, False)}
    switches |= {switch.replace("_", "-") for switch in switches}
    words: list[str] = []
    for i, word in enumerate(argv):
        words.append(word)
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        if word in switches and following.startswith("-"):
            words.append("True")
    return words


def _inspect(argv: list[str]) -> int:
    from jax_extract.upkeep.inspect import InspectConfig, inspect

    return inspect(_parse(InspectConfig, argv, "jax-extract inspect"))


_COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "extract": _extract,
    "generate": _generate,
    "estimate": _estimate,
    "compile": _compile,
    "finetune": _finetune,
    "representations": _representations,
    "inspect": _inspect,
    "plot": _plot,
    "status": _status,
    "verify": _verify,
    "sweep": _sweep,
    "upload": _upload,
    "walks": _walks,
    "train": _train,
    "sae": _sae,
    "token-representations": _token_representations,
}


_OF_SAES: dict[str, Callable[[list[str]], None]] = {
    "train": _sae_train,
    "eval": _sae_eval,
    "features": _sae_features,
}


if __name__ == "__main__":
    sys.exit(main())
