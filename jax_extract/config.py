"""The configuration of an extraction: one frozen dataclass, which is also the command line.

In: defaults here, a YAML file over them, flags over both. Out: `ExtractConfig`, validated as far as it
can be without looking at files or devices. Flags are spelled as the fields are.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from jax_extract.errors import UserError
from jax_extract.inputs.chat import NOT_VARIABLES
from jax_extract.layer_words import ALIASES, OPTION, LayerWord, layer_words
from jax_extract.store.storage.verbs import BUCKET_SCHEME
from jax_extract.yaml_text import parsed
from models.capture_plan import PATTERN_TOKENS
from models.hooks import DEFAULT_HOOK_POINT
from models.nearest import nearest
from models.positions import Positions

_LARGEST = 2**31 - 1
_LEAST_CONTEXT = 2  # a token before it, and one of a text
_OF_JAX = ("mesh_shape", "max_new_tokens", "explain", "coordinator_address")


@dataclass(frozen=True)
class ExtractConfig:
    """Extract activations of a language model, matched to tokens.

    Attributes:
      model_path: Hugging Face folder, hub id, or .gguf file.
      adapter: adapter of that model, by folder or hub id (OWNER/NAME or OWNER/NAME@REVISION); LoRA, rsLoRA and DoRA
        are merged in float32, other kinds by PEFT with backend torch.
      tasks_file: ARC tasks (.json, .jsonl, .parquet or a folder), rows (.jsonl, .csv, .tsv, .parquet or a list in
        .json) or plain text (.txt); all but .parquet also compressed (.gz, .zst, .bz2, .xz).
      dataset: Hugging Face dataset instead of a file, by hub name or local path; streamed.
      dataset_config: configuration name of the dataset.
      text_column: the column or JSON field that holds the text, a conversation or token ids; dots lead into it
        (messages.0.content).
      id_column: the column or field that holds the id, where it is not called id.
      split: split of the dataset or of a file that has splits.
      n_tasks: only the first so many ARC tasks.
      skip_bad_tasks: leave out files, lines and entries that cannot be used as ARC tasks, and say how many.
      n_samples: how many samples; more than there are makes augmented ARC samples.
      grid_encoder: how ARC grids become text: digits, spaced, json or letters.
      seed: of the ARC augmentation, and of drawn answers.
      chat_template: put each text through the tokenizer's chat template as a user's turn, conversations as they are.
      system_prompt: a system turn before each text, for the chat template.
      chat_template_kwargs: variables of the chat template, as a JSON object: '{"enable_thinking": false}'.
      add_special_tokens: put the tokenizer's special tokens (BOS) around every text, or around none; by default around
        texts without a chat template, and no second BOS before a text that begins with it.
      max_new_tokens: answer every prompt first, with at most so many tokens; prompt and answer fit max_seq_length.
      temperature: of the answers; 0 takes the likeliest token each time.
      top_k: of the answers: draw from so many of the likeliest tokens.
      top_p: of the answers: draw from the likeliest tokens that together have this probability.
      capture_answers: keep activations of the answers' tokens too, behind those of their prompts.
      solutions_file: solutions of the ARC tasks, {"task id": [grid, …]}, where the tasks do not hold them.
      revision: branch, tag or commit of a hub model.
      layers_to_extract: layers (--layers and --layer mean the same), counted from 0, or from the end: 12, -1 (the
        last), 10-23 (both among them), all, or several of these; by default 10-23, or what the model has of them.
      hook_points: where in the block, by name, TransformerLens name or glob. after_block of layer 12 is Hugging Face's
        hidden_states[13], embeddings are hidden_states[0], and final_norm is hidden_states[-1].
      attention_pattern_tokens: of attention_pattern, which is kept where --hook_points has its name: weights that a row
        has for each head, and the most tokens of a sample.
      positions: which tokens: all, from:k, last, mean, mean_from:k, first:n, every:k, at:i,j,…
      edits: a YAML file of changes that the forward makes: rows zeroed, added to, replaced, patched from another run;
        docs/interventions.md.
      backend: jax, or torch for any causal language model that Hugging Face has, by forward hooks, on one device.
      device: of the torch backend: cpu, cuda or cuda:N; by default the first GPU, if there is one.
      dtype: of the computation; by default bfloat16 on TPU and GPU, float32 on CPU.
      capture_dtype: of the stored values.
      shard_format: pickle, npz, safetensors or pt.
      one_file_per_layer: everything of a layer in one file, called layer_10.pt (or .pkl …) without a number; for
        positions that give one row a sample.
      activations_dir: directory or gs://bucket/prefix where the run is written; the same command again resumes it.
      batch_size: sequences per device.
      mesh_shape: DATA,MODEL over all devices; by default all on DATA.
      max_seq_length: longest sample in tokens; by default the smaller of 8192 and what the model allows.
      context_tokens: join the texts, one after the other, into contexts of so many tokens, as sparse autoencoders are
        trained on them; every row still knows its text. By default each text is a sample of its own.
      context_start: token before each context: bos, eos or none; by default bos, if the tokenizer has one.
      context_separator: token between two texts of a context: bos, eos or none; by default bos, if there is one.
      slab_tokens: most tokens one device computes at once; by default what suits the platform.
      gcs_bucket: gs://bucket/prefix to upload to, with upload_to_cloud.
      upload_to_cloud: upload every part to gcs_bucket as soon as it is committed in activations_dir.
      delete_local: delete a part's shards in activations_dir when gcs_bucket has them.
      host_memory_gb: most memory, in GB, for captured rows between device and disk or bucket; by default a
        quarter of the machine's, at most 16.
      distributed: join one program over all hosts; auto does on TPU VMs, on asks the cluster, off never.
      coordinator_address: HOST:PORT of process 0, with num_processes and process_id, where the machine cannot tell.
      num_processes: how many processes the program has.
      process_id: which of them this is, from 0.
      worker_id: which independent worker this is, from 0: it takes every num_workers-th part, then what is left.
      num_workers: how many independent workers share the run.
      overwrite: remove the run in activations_dir and start anew.
      allow_numeric_change: resume although dtype, device kind or library versions changed.
      explain: show how parameters will lie on the mesh, and what was counted for every layout.
    """

    model_path: str = ""
    adapter: str | None = None
    tasks_file: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    text_column: str | None = None
    id_column: str | None = None
    split: str | None = None
    n_tasks: int | None = None
    skip_bad_tasks: bool = False
    n_samples: int | None = None
    grid_encoder: str = "digits"
    seed: int = 0
    chat_template: bool = False
    system_prompt: str | None = None
    chat_template_kwargs: str | None = None
    add_special_tokens: bool | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    capture_answers: bool = False
    solutions_file: str | None = None
    revision: str | None = None
    layers_to_extract: tuple[LayerWord, ...] | None = None
    hook_points: tuple[str, ...] = (DEFAULT_HOOK_POINT,)
    attention_pattern_tokens: int = PATTERN_TOKENS
    positions: str = "last"
    edits: str | None = None
    backend: Literal["jax", "torch"] = "jax"
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    capture_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_format: Literal["pickle", "npz", "safetensors", "pt"] = "pickle"
    one_file_per_layer: bool = False
    activations_dir: str = "activations"
    batch_size: int = 8
    mesh_shape: str | None = None
    max_seq_length: int | None = None
    context_tokens: int | None = None
    context_start: Literal["bos", "eos", "none"] | None = None
    context_separator: Literal["bos", "eos", "none"] | None = None
    slab_tokens: int | None = None
    gcs_bucket: str | None = None
    upload_to_cloud: bool = False
    delete_local: bool = False
    host_memory_gb: float | None = None
    distributed: Literal["auto", "on", "off"] = "auto"
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    worker_id: int | None = None
    num_workers: int | None = None
    overwrite: bool = False
    allow_numeric_change: bool = False
    explain: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, Mapping):  # as YAML and Python have it
            object.__setattr__(self, "chat_template_kwargs", _as_json(self.chat_template_kwargs))
        object.__setattr__(self, OPTION, layer_words(self.layers_to_extract))

    def check(self) -> None:
        """Refuses values that no run can have; `extract_to_directory` calls it first."""
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        check_captures(self)
        if self.one_file_per_layer and not Positions.parse(self.positions).one_row_per_sample:
            raise UserError(
                "--one_file_per_layer is for positions last, mean and mean_from:k, which give one row a sample, and "
                f"not for {self.positions!r}: such files would have no limit; leave it out"
            )
        if self.host_memory_gb is not None and not 0 < self.host_memory_gb < _LARGEST:
            raise UserError(f"--host_memory_gb {self.host_memory_gb} must be a positive number of gigabytes")
        self._check_backend()
        self._check_template()
        self._check_answers()
        self._check_places()
        self._check_contexts()
        self._check_processes()

    def _check_backend(self) -> None:
        if self.backend == "jax":
            if self.device is not None:
                raise UserError(f"--device {self.device} is of --backend torch; JAX has its devices by --mesh_shape")
            return
        for name in _OF_JAX:
            if getattr(self, name) not in (None, False):
                raise UserError(
                    f"--{name} is of --backend jax, and --backend torch computes on one device; leave it out"
                )
        if self.distributed == "on":
            raise UserError(
                "--distributed on is of --backend jax; on several GPUs give each a command with --worker_id"
            )

    @property
    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs`, read; UserError where it is no JSON object."""
        if self.chat_template_kwargs is None:
            return {}
        try:
            variables = json.loads(self.chat_template_kwargs)
        except (ValueError, RecursionError):
            variables = None
        if not isinstance(variables, dict):
            raise UserError(
                f"--chat_template_kwargs {self.chat_template_kwargs!r:.80} is no JSON object; write it between single "
                "quotes: '{\"enable_thinking\": false}'"
            )
        return variables

    def _check_template(self) -> None:
        if wrong := sorted(self.template_variables.keys() & NOT_VARIABLES):
            raise UserError(
                f"--chat_template_kwargs has {wrong[0]!r}, which is no variable of a chat template; leave it out"
            )
        for name in ("system_prompt", "chat_template_kwargs"):
            if getattr(self, name) is not None and not self.chat_template:
                raise UserError(f"--{name} is for the chat template, and none is asked for; add --chat_template True")

    def _check_answers(self) -> None:
        if self.max_new_tokens is not None:
            if not 1 <= self.max_new_tokens <= _LARGEST:
                raise UserError(f"--max_new_tokens {self.max_new_tokens} must be from 1 to {_LARGEST}")
            return
        for name in ("temperature", "top_k", "top_p", "capture_answers", "solutions_file"):
            if getattr(self, name) not in (None, False, 0):
                raise UserError(f"--{name} is about answers, and none are asked for; add --max_new_tokens N")

    def _check_contexts(self) -> None:
        if self.context_tokens is None:
            for name in ("context_start", "context_separator"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} is about contexts, and none are asked for; add --context_tokens N")
            return
        if not _LEAST_CONTEXT <= self.context_tokens <= _LARGEST:
            raise UserError(f"--context_tokens {self.context_tokens} must be from {_LEAST_CONTEXT} to {_LARGEST}")
        if self.add_special_tokens is not None:
            raise UserError(
                f"--add_special_tokens {self.add_special_tokens} does not go with --context_tokens; --context_start "
                "and --context_separator say what stands before contexts and between texts"
            )
        if self.max_new_tokens is not None:
            raise UserError(
                "--max_new_tokens answers each text by itself, and --context_tokens joins texts; leave one of the two "
                "out"
            )
        if self.one_file_per_layer:
            raise UserError(
                "--one_file_per_layer is for one row a text, and --context_tokens joins texts; leave one of the two out"
            )
        if self.max_seq_length is not None and self.max_seq_length < self.context_tokens:
            raise UserError(
                f"--context_tokens {self.context_tokens} is more than --max_seq_length {self.max_seq_length}; leave "
                "--max_seq_length out: with contexts no text is cut"
            )

    def _check_places(self) -> None:
        if self.upload_to_cloud and not self.gcs_bucket:
            raise UserError("--upload_to_cloud True needs a bucket; add --gcs_bucket gs://bucket/prefix")
        if self.gcs_bucket and not self.upload_to_cloud:
            raise UserError(
                f"--gcs_bucket {self.gcs_bucket!r} alone uploads nothing; add --upload_to_cloud True, or write into "
                f"the bucket directly with --activations_dir {self.gcs_bucket}"
            )
        if self.gcs_bucket and not self.gcs_bucket.startswith(BUCKET_SCHEME):
            raise UserError(f"--gcs_bucket {self.gcs_bucket!r} is no bucket; write gs://bucket/prefix")
        if self.gcs_bucket and self.activations_dir.startswith(BUCKET_SCHEME):
            raise UserError(
                f"--activations_dir {self.activations_dir} is in a bucket already; leave --gcs_bucket and "
                "--upload_to_cloud out, or give a local directory"
            )
        if self.delete_local and not self.upload_to_cloud:
            raise UserError("--delete_local True keeps nothing; it goes with --gcs_bucket and --upload_to_cloud True")

    def _check_processes(self) -> None:
        _check_group("worker_id", self.worker_id, "num_workers", self.num_workers)
        _check_group("process_id", self.process_id, "num_processes", self.num_processes)
        if (self.coordinator_address is None) != (self.process_id is None):
            raise UserError(
                "--coordinator_address, --num_processes and --process_id belong together; give all three, or none"
            )
        if self.worker_id is not None and (self.process_id is not None or self.distributed == "on"):
            raise UserError(
                "--worker_id is for independent workers and --process_id or --distributed on for one program over all "
                "hosts; choose one of the two"
            )
        if self.distributed == "off" and self.process_id is not None:
            raise UserError("--distributed off and --process_id contradict each other; leave one of them out")
        if self.overwrite and self.worker_id is not None:
            raise UserError(
                "--overwrite with --worker_id would remove what other workers write; remove the old run first, with "
                "--overwrite in a command of its own, or choose another --activations_dir"
            )


class Captures(Protocol):
    """What extractions and compilations are both asked for."""

    @property
    def batch_size(self) -> int: ...
    @property
    def max_seq_length(self) -> int | None: ...
    @property
    def slab_tokens(self) -> int | None: ...
    @property
    def hook_points(self) -> tuple[str, ...]: ...
    @property
    def attention_pattern_tokens(self) -> int: ...
    @property
    def layers_to_extract(self) -> tuple[LayerWord, ...] | None: ...


def check_captures(config: Captures) -> None:
    """Refuses sizes that nothing can be computed with, and a request for nothing."""
    for name in ("batch_size", "max_seq_length", "slab_tokens", "attention_pattern_tokens"):
        value = getattr(config, name)
        if value is not None and not 1 <= value <= _LARGEST:
            raise UserError(f"--{name} {value} must be from 1 to {_LARGEST}")
    if not config.hook_points:
        raise UserError("--hook_points is empty; name at least one, such as after_block")
    if config.layers_to_extract is not None and not config.layers_to_extract:
        raise UserError("--layers_to_extract is empty; name at least one layer, or leave the flag out")


def _as_json(variables: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(variables), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"chat_template_kwargs cannot be written as JSON ({error}); give texts (dates between quotes), numbers, "
            "True or False, lists and mappings"
        ) from None


def _check_group(name: str, index: int | None, total: str, count: int | None) -> None:
    """An index and how many there are: both or neither, and the one below the other."""
    if (index is None) != (count is None):
        raise UserError(f"--{name} and --{total} belong together; give both, or neither")
    if index is not None and count is not None and not 0 <= index < count:
        raise UserError(f"--{name} {index} must be from 0 to {count - 1} (--{total} {count})")


_TYPES = typing.get_type_hints(ExtractConfig)


def _check_type(name: str, value: object) -> None:
    """UserError where a value (of a YAML file, which may hold anything) is not of its option's type."""
    hint = _TYPES[name]
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return
        elif typing.get_origin(option) is tuple:
            members = typing.get_args(option)[0]
            kinds = typing.get_args(members) or (members,)
            if isinstance(value, tuple) and all(type(item) in kinds for item in value):
                return
        elif type(value) is option or (option is float and type(value) is int):
            return
    raise UserError(f"--{name} {value!r} is not what the option takes; expected {_expected(options)}")


def _expected(options: Sequence[Any]) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "nothing"}
    said = []
    for option in options:
        if typing.get_origin(option) is Literal:
            said.append(" or ".join(typing.get_args(option)))
        elif typing.get_origin(option) is tuple:
            said.append("a list")
        elif option is not type(None):
            said.append(words[option])
    return " or ".join(said)


def from_mapping(values: Mapping[str, Any], defaults: ExtractConfig, origin: str) -> ExtractConfig:
    """`defaults` with some fields replaced; UserError naming an unknown field and one that is near it."""
    known = {field.name for field in dataclasses.fields(ExtractConfig)}
    for name in values:
        if name not in known and name not in ALIASES:
            meant = f"; the nearest is {near!r}" if (near := nearest(str(name), known)) else ""
            raise UserError(f"{origin} has the unknown option {name!r}{meant}")
    clean = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if len(given := [name for name in ALIASES if name in clean]) > 1:
        raise UserError(f"{origin} has both {given[0]} and {given[1]}, which mean the same; leave one of them out")
    for name in given:
        clean[OPTION] = clean.pop(name)
    if isinstance(clean.get("mesh_shape"), tuple):
        clean["mesh_shape"] = ",".join(map(str, clean["mesh_shape"]))
    return dataclasses.replace(defaults, **clean)


def from_yaml(path: str, defaults: ExtractConfig) -> ExtractConfig:
    """`defaults` with what a YAML file says over them."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"configuration {path!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"configuration {path!r} is not valid YAML: it must be UTF-8; save it as such") from None
    values = parsed(text, f"configuration {path!r}", "write one 'option: value' a line")
    if not isinstance(values, dict):
        raise UserError(f"configuration {path!r} must be a mapping; write one 'option: value' a line")
    return from_mapping(values, defaults, f"configuration {path!r}")


def to_yaml(config: ExtractConfig) -> str:
    """The configuration as a YAML file that `--config` takes."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(values, sort_keys=False)
