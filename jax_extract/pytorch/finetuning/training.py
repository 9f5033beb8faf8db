"""The training itself: transformers' Trainer on a decoder, whole or with a LoRA adapter of peft.

In: a model's folder, examples as token ids, and the folder that keeps checkpoints. Out: a trained model. Steps, loss
and checkpoints are told by a callback; the libraries keep silent.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from jax_extract.errors import UserError
from jax_extract.pytorch.finetuning.config import FinetuneConfig
from jax_extract.pytorch.finetuning.examples import Collator, Tokens
from jax_extract.pytorch.finetuning.folder import Results
from jax_extract.pytorch.finetuning.processes import Processes, SharedRefusal
from jax_extract.store.storage.failpoints import step
from jax_extract.terminal import Terminal

_STEPS_A_LOSS = 10
_CHECKPOINTS = 2  # kept while training: the last one can be half-written


def load_model(config: FinetuneConfig, commit: str | None) -> Any:
    """The base model in float32, with a fresh adapter where the method is LoRA.

    Raises:
      UserError: transformers cannot load it whole, or a module to adapt is not there.
    """
    path = Path(config.model_path).expanduser()
    options: dict[str, Any] = {} if path.exists() else {"revision": commit}
    with _told(f"model {config.model_path!r} cannot be loaded by transformers", "give a decoder that it knows"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.absolute() if path.exists() else config.model_path,  # which an adapter's settings repeat
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise UserError(
            f"model {config.model_path!r} has no usable weights for {lacking[0]!r}, and random ones would take their "
            "place; give a whole model"
        )
    return _adapted(model, config) if config.method == "lora" else model


def _adapted(model: Any, config: FinetuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    set_seed(config.seed)
    targets = config.lora_target_modules
    with _told("no LoRA adapter can be made for the model", "name modules of it with --lora_target_modules"):
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] (any number does)
                lora_dropout=config.lora_dropout,
                target_modules="all-linear" if targets is None else list(targets),
                exclude_modules=_outside_text(model),
            ),
        )


def _outside_text(model: Any) -> str | None:
    """A pattern of all modules but those of the language model, where there is more: what reads pictures stays."""
    text = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is text), "")
    return rf"(?!{re.escape(name)}\.).*" if hasattr(model.config, "text_config") and name else None


@contextlib.contextmanager
def _told(what: str, mend: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever a library of models raises is told in one sentence)
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{what} ({reason:.300}); {mend}") from None


def parameters(model: Any) -> tuple[int, int]:
    """(trained, all)."""
    counts = [(each.numel(), each.requires_grad) for each in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


class Training:
    """One Trainer, from the last whole checkpoint to the last step."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: FinetuneConfig,
        examples: Sequence[Tokens],
        padding: int,
        results: Results,
        processes: Processes,
        terminal: Terminal,
    ) -> None:
        self._steps = _Steps(results, processes, terminal)
        self._trainer = Trainer(
            model=model,
            args=_arguments(config, results.path),
            train_dataset=_Examples(examples),
            data_collator=Collator(padding),
            processing_class=tokenizer,  # so that a checkpoint is a whole Hugging Face folder
            callbacks=[self._steps],
        )
        self._trainer.remove_callback(PrinterCallback)

    def run(self, checkpoint: Path | None) -> Any:
        """The trained model, as it was before Trainer made it compute in another dtype than its weights.

        Raises:
          UserError: the loss is no number, or the device has not enough memory.
        """
        try:
            if checkpoint is None or not self._is_last(checkpoint):
                self._trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except torch.OutOfMemoryError:
            raise UserError(
                "the device has not enough memory for this training; lower --batch_size (and raise "
                "--gradient_accumulation_steps by as much), or --max_length"
            ) from None
        finally:
            self._steps.close()
        return self._trainer.accelerator.unwrap_model(self._trainer.model, keep_fp32_wrapper=False)

    def _is_last(self, checkpoint: Path) -> bool:
        """Whether nothing is left to train; Trainer would make one step more. The model is the checkpoint's then."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self._trainer._load_from_checkpoint(str(checkpoint))
        self._trainer.state = state
        self._steps.on_train_begin(self._trainer.args, state, self._trainer.control)
        return True

    @property
    def steps(self) -> int:
        return self._trainer.state.global_step

    @property
    def losses(self) -> list[list[float]]:
        """[step, mean loss of the steps since the last one] each."""
        logs = [(log["step"], log["loss"]) for log in self._trainer.state.log_history if "loss" in log]
        some = [logs[i : i + _STEPS_A_LOSS] for i in range(0, len(logs), _STEPS_A_LOSS)]
        return [[each[-1][0], sum(loss for _, loss in each) / len(each)] for each in some]


def _arguments(config: FinetuneConfig, folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=config.seed,
        data_seed=config.seed,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.peak_learning_rate,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=config.weight_decay,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        use_cpu=config.device == "cpu",
        bf16=config.dtype == "bfloat16",
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=None if config.keep_checkpoints else _CHECKPOINTS,
        logging_steps=1,  # what Trainer sums up between logs is not in its checkpoints
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=config.device == "cuda",
    )
    # One process computes on one device: left alone, Trainer would spread each batch over all GPUs that it sees, and
    # make steps of more examples than were asked for.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class _Examples(Dataset):
    def __init__(self, examples: Sequence[Tokens]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Tokens:
        return self._examples[index]


class _Steps(TrainerCallback):
    """Shows steps, refuses a loss that is no number, and makes checkpoints count."""

    def __init__(self, results: Results, processes: Processes, terminal: Terminal) -> None:
        self._results, self._processes, self._terminal = results, processes, terminal
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        examples = args.per_device_train_batch_size * args.gradient_accumulation_steps * self._processes.count
        if state.global_step:
            self._terminal.line("resume", f"from step {state.global_step:,} of {state.max_steps:,}")
        else:
            self._terminal.line("steps", f"{state.max_steps:,} of {examples} examples")
        self._bar = self._terminal.progress(state.max_steps, "training", " steps")
        # Of speed and time left, what an earlier command did says nothing.
        self._bar.initial = self._bar.n = self._bar.last_print_n = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with step("finetune.step"):
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in (logs or {}) and not math.isfinite(logs["loss"]):
            raise SharedRefusal(  # the mean over all processes
                f"the loss is {logs['loss']} at step {state.global_step}; lower --learning_rate "
                f"({args.learning_rate:g} now)"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._processes.wait()  # each has written a file of its own
        if self._processes.is_main:
            self._results.mark(state.global_step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
