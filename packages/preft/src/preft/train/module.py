"""A frozen base model and the adapter that is trained on it, as one module whose forward pass is the masked loss.

The base model is the caller's: no parameter of it asks for a gradient while it is `held`, it stays in the mode it is
in (eval: its dropout is no part of the method), and only the adapter's tensors are in the state dict.

Gradient checkpointing: transformers runs every block again in the backward pass, when the adapter's hooks are long
gone. The blocks are therefore checkpointed with a context in which the adapter acts on the batch of that forward pass
again, so that the gradients are those without checkpointing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from preft.adapters import Adapter, AdapterError
from preft.forward import adapted, masked_loss, targets
from shared.tokens import TokenBatch


def inputs_of(batch: TokenBatch) -> dict[str, Tensor]:
    """A labelled batch as keyword arguments of `AdaptedModel`; `labels` are the counted ones (`targets`)."""
    tensors = {name: value for name, value in vars(batch).items() if value is not None}
    del tensors["labels_BT"]
    return tensors | {"labels": targets(batch)}


class AdaptedModel(nn.Module):
    """`hf` under `adapter`; `forward(**inputs_of(batch))` gives {"loss": nats a labelled token}.

    With `num_items_in_batch` the sum is divided by that number instead, which is how a step of several batches or
    processes comes to the mean over all of its tokens.
    """

    accepts_loss_kwargs = True  # the Trainer counts the labels of a whole step for num_items_in_batch
    _batch: TokenBatch  # of the latest forward pass

    def __init__(self, hf: Any, adapter: Adapter) -> None:
        super().__init__()
        self.hf, self.adapter = hf, adapter
        # What FSDP shards on its own: the blocks, and the deltas, which run inside the blocks but do not lie in them.
        deltas = {type(delta).__name__ for _, delta in adapter.parts()}
        self._no_split_modules = [*(hf._no_split_modules or ()), *sorted(deltas)]

    def forward(
        self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **fields: Tensor
    ) -> dict[str, Tensor]:
        """Masked loss of a batch (`inputs_of`)."""
        self._batch = TokenBatch(**fields, labels_BT=labels)
        loss = masked_loss(self.hf, self.adapter, self._batch)
        return {"loss": loss.total / (loss.tokens if num_items_in_batch is None else num_items_in_batch)}

    def train(self, mode: bool = True) -> "AdaptedModel":
        """Set the mode of the adapter; the base model keeps its own."""
        self.training = mode
        self.adapter.train(mode)
        return self

    @contextmanager
    def held(self, gradient_checkpointing: bool = False) -> Iterator["AdaptedModel"]:
        """Inside, the base model is frozen and, if asked for, its blocks checkpointed; afterwards it is as before."""
        with frozen(self.hf), self._checkpointed() if gradient_checkpointing else nullcontext():
            yield self

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = [module for module in self.hf.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise AdapterError(
                f"{type(self.hf).__name__} has no blocks that transformers can checkpoint: train without "
                "gradient_checkpointing"
            )
        before = [block.training for block in blocks]
        self.hf.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": self._contexts}
        )
        self.hf.disable_input_require_grads()  # only re-entrant checkpoints need them
        for block in blocks:
            block.training = True  # of the block alone: dropout stays off in the modules inside
        try:
            yield
        finally:
            self.hf.gradient_checkpointing_disable()
            for block, mode in zip(blocks, before):
                block.training = mode

    def _contexts(self) -> tuple[Any, Any]:
        """Of a block's forward pass and of its recomputation; called in the forward pass, with that pass's batch."""
        return nullcontext(), adapted(self.hf, self.adapter, self._batch)


@contextmanager
def frozen(hf: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model asks for a gradient; afterwards each asks as before."""
    before = [(parameter, parameter.requires_grad) for parameter in hf.parameters()]
    hf.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
