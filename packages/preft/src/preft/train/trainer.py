"""The transformers Trainer for adapters: what differs from finetuning a whole model, and nothing else.

    loss         summed over a step's parts, divided by the step's response tokens on all processes (the Trainer counts
                 them as num_items_in_batch)
    constraint   R is retracted to orthonormal rows after every optimiser step
    data         one item is one part of a step's batch (`preft.train.rows.Parts`), in order: resuming skips items
    checkpoint   an adapter folder that can be served, the adapter's exact state, and the Trainer's own files; the first
                 process makes the folder, every process adds the state of its generators, the first one marks it
    evaluation   loss per response token over all held-out rows, whatever the batches

Devices, mixed precision, several processes (DDP, FSDP) are accelerate's.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from preft.adapters import Adapter, AdapterError
from preft.formats import save_adapter
from preft.train.config import TrainConfig
from preft.train.module import AdaptedModel
from preft.train.rows import Parts
from preft.train.sharding import gather_, retract_sharded_

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments
else:  # their import takes seconds and brings in peft and datasets: `adapter_trainer` joins these classes with them
    Trainer = TrainerCallback = object

STATE_FILE = "adapter_state.safetensors"  # LoReFT's W and R; the served files hold W - R
COMPLETE = "complete"
FIGURES = {"loss", "heldout_loss"}  # a line of the log without either sums up the whole run

OnLog = Callable[[int, dict[str, float]], None]


def arguments(config: TrainConfig, folder: Path, cpu: bool, evaluates: bool) -> "TrainingArguments":
    """The Trainer's settings for a TrainConfig."""
    from transformers import TrainingArguments

    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # an item is a batch
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=cpu,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 1,
        save_total_limit=2,  # one may be half written when the process dies
        eval_strategy="steps" if config.eval_every and evaluates else "no",
        eval_steps=config.eval_every or 1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
    )
    made._n_gpu = min(
        made.n_gpu, 1
    )  # one process, one device: nn.DataParallel would split the parts' tensors
    return made


class Hooks(TrainerCallback):
    """Retraction after every optimiser step, figures to `report`, and a mark in every checkpoint that is whole."""

    def __init__(self, model: AdaptedModel, whole: Adapter | None, report: OnLog | None) -> None:
        self.adapter, self.whole, self.report = model.adapter, whole, report

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Restore the method's constraints."""
        if self.whole is None:
            self.adapter.retract_()
        elif self.adapter.config.method != "lora":
            retract_sharded_(self.adapter, self.whole)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a loss that is no number; pass on what is one step's."""
        logs: dict[str, float] = kwargs["logs"]
        if not math.isfinite(logs.get("loss", 0.0)):
            raise AdapterError(
                f"the loss of step {state.global_step} is {logs['loss']}: lower learning_rate or max_grad_norm"
            )
        if self.report and state.is_world_process_zero and FIGURES & set(logs):
            self.report(state.global_step, {key: value for key, value in logs.items() if key != "epoch"})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint: all of its files are there."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class AdapterTrainer(Trainer):
    """Trains the adapter of an `AdaptedModel`; made by `adapter_trainer`."""

    def __init__(
        self,
        model: AdaptedModel,
        args: "TrainingArguments",
        config: TrainConfig,
        train: Parts,
        heldout: Parts | None,
        report: OnLog | None,
    ) -> None:
        import transformers

        super().__init__(
            model,
            args,
            data_collator=_only,
            train_dataset=train,
            eval_dataset=heldout,
        )
        if self.is_fsdp_enabled and config.save_every:
            raise AdapterError(
                "save_every: sharded training (FSDP) writes no checkpoints, which would hold the whole base model; "
                "leave it out, or train with DDP"
            )
        self._whole = deepcopy(model.adapter) if self.is_fsdp_enabled else None
        self.remove_callback(transformers.trainer_callback.PrinterCallback)
        hooks = type("Hooks", (Hooks, transformers.TrainerCallback), {})
        self.add_callback(hooks(model, self._whole, report))
        self.adapted, self.config = model, config

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now, whole; under FSDP all processes ask together. AdapterError if a value is no number:
        the loss of a step, which `Hooks` looks at, is of the adapter before it."""
        adapter = self.adapted.adapter if self._whole is None else gather_(self._whole, self.adapted.adapter)
        if not all(bool(parameter.isfinite().all()) for parameter in adapter.parameters()):
            raise AdapterError(
                f"after step {self.state.global_step} the adapter has values that are no numbers: lower learning_rate "
                "or max_grad_norm"
            )
        return adapter

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear warm-up and decay (`TrainConfig.rate`)."""

        def rate(step: int) -> float:  # a plain function: a bound method would be pickled into the checkpoint
            return self.config.rate(step)

        stepped: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(stepped, rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out loss per response token (nats), over the rows of all processes."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in self.get_eval_dataloader():
            total = self.model_wrapped(**inputs, num_items_in_batch=1)["loss"]
            sums += torch.stack([total.double(), (inputs["labels"] != -100).sum()]).to(sums)
        total, tokens = self.accelerator.reduce(sums).tolist()
        metrics = {"heldout_loss": total / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter alone: as a folder to serve, and its exact state."""
        if self.args.should_save:
            folder = save_adapter(self.adapter, str(output_dir or self.args.output_dir))
            save_file(self.adapter.state_dict(), folder / STATE_FILE)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process adds its file: after the folder has been put in its place, before it is marked as whole."""
        self.accelerator.wait_for_everyone()
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / STATE_FILE)
        self.adapted.adapter.load_state_dict(state)


def adapter_trainer(*args: Any) -> AdapterTrainer:
    """An `AdapterTrainer` that is a transformers `Trainer`."""
    from transformers import Trainer

    made: AdapterTrainer = type("AdapterTrainer", (AdapterTrainer, Trainer), {})(*args)
    return made


def _only(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    [item] = items
    return item


def last_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that is whole, or None."""
    marks = folder.glob(f"checkpoint-*/{COMPLETE}")
    steps = [int(mark.parent.name.partition("-")[2]) for mark in marks]
    return str(folder / f"checkpoint-{max(steps)}") if steps else None
