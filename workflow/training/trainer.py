"""The training loop: TRL's SFTTrainer with a step of our own.

transformers walks through the epochs and optimizer steps. Of each step it asks this class, in this order, for its
batches (`get_batch_samples`), for the forward and backward pass of each (`training_step`), for its log line and its
checkpoint. What is overridden or touched of the library's private names has its reason beside it.
"""

import statistics
import time
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor
from torch.nn import functional
from torch.utils.data import SequentialSampler
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from workflow.runtime.files import sha256
from workflow.runtime.stage import say
from workflow.training import checkpoints
from workflow.training.order import LikeLengthSampler, rows_of_passes
from workflow.training.sharding import RankBatches, loader, use_fsdp_on_cpu
from workflow.training.speed.choice import SpeedUps, graphs_pay
from workflow.training.speed.cuda_graphs import GraphedSteps
from workflow.training.speed.fused import IGNORED, fuse_adapters, fuse_layers, scoring
from workflow.training.speed.kernels import fuse_rotations
from workflow.training.speed.packing import (
    Pack,
    PackingCollator,
    PackSize,
    attention_arguments,
    packed_attention,
    sizes_needed,
)
from workflow.training.speed.shared_inputs import share_inputs

if TYPE_CHECKING:
    from workflow.training.history import History

Batch = Pack | dict[str, Tensor]  # of one forward pass: a pack, or TRL's padded rows


class RunTrainer(SFTTrainer):
    """TRL's trainer, with batches of like length in a random order and a step that wastes less of the machine.

    The library's own `group_by_length` walks through large windows from the longest rows to the
    shortest, which in a short training is a curriculum and a biased choice of rows. Without any
    speed-up the step is TRL's.
    """

    length_window: int
    speed_ups: SpeedUps
    history: "History"
    rate_factor: Callable[[str], float]  # by a weight's name, of its learning rate
    initial: Mapping[str, Tensor] = MappingProxyType(
        {}
    )  # what was trained, before, if it was taken out of the base
    tokens_computed = 0
    graphs: GraphedSteps | None = None
    capture_seconds = 0.0

    # The model and its speed-ups.

    def speed_up(self, speed_ups: SpeedUps, *, compute: torch.dtype) -> None:
        """Put the speed-ups into the model and the data loader."""
        self.speed_ups, self.compute = speed_ups, compute
        self.learned = self.right = self.tokens = 0  # since the last log line
        model = model_of(self)
        self.causal_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        # A model that is to be sharded is still in host memory.
        device = self.accelerator.device
        self.attention = packed_attention(self.causal_model, compute, device) if speed_ups.packing else None
        if speed_ups.fused_layers:
            fuse_layers(model)
            fuse_rotations(self.causal_model, device)
        if speed_ups.fused_adapters:
            fuse_adapters(model, compute=compute)
        if speed_ups.shared_inputs:
            share_inputs(model)
        rows = [*self.train_dataset["input_ids"], *self.eval_dataset["input_ids"]]
        self.longest_row = max(map(len, rows), default=0)
        if speed_ups.packing:
            self.data_collator = PackingCollator()
        if speed_ups.cuda_graphs:
            self.prepare_graphs(rows_of_passes(self.sampler(), self.args))
        if self.attention is not None:
            self.causal_model.set_attn_implementation(self.attention)

    def expect_passes(self, passes: list[list[int]]) -> None:
        """Have a graph ready for passes with these rows too, which the planned steps need not hold."""
        if self.speed_ups.cuda_graphs:
            self.prepare_graphs([*rows_of_passes(self.sampler(), self.args), *passes])

    def prepare_graphs(self, passes: list[list[int]]) -> None:
        """Choose the sizes of packs for passes with these rows, or no graphs where they would cost time."""
        packed = [PackSize.of([self.train_dataset[row] for row in rows]) for rows in passes]
        if not graphs_pay(self.causal_model, statistics.median(size.tokens for size in packed)):
            self.speed_ups = replace(self.speed_ups, cuda_graphs=False)
            return
        self.sizes = sizes_needed(packed)
        self.slots = self.args.per_device_train_batch_size + 1  # one row of padding
        free = (next(s for s in self.sizes if s.holds(size)).tokens - size.tokens for size in packed)
        self.longest_row = max(self.longest_row, *free)
        self.data_collator = PackingCollator(sizes=self.sizes, slots=self.slots)

    def capture_graphs(self) -> None:
        """Capture a graph for each size of pack that this training needs.

        It is done after the first step, when the optimizer holds its state: so the most that the captures
        allocate is the most that the training needs (a replay allocates nothing).
        """
        started = time.monotonic()
        self.graphs = GraphedSteps(
            model_of(self),
            self.loss_of,
            sizes=self.sizes,
            slots=self.slots,
            device=self.causal_model.device,
        )
        self.capture_seconds = time.monotonic() - started

    # Batches.

    def sampler(self) -> LikeLengthSampler:
        """The order of the training rows."""
        return LikeLengthSampler(
            [len(ids) for ids in self.train_dataset["input_ids"]],
            batch_rows=self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.ranks,
            window=self.length_window,
            seed=self.args.data_seed,
        )

    def _get_train_sampler(self, train_dataset=None):
        """Overridden because transformers has no argument for a sampler."""
        return self.sampler()

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        """Overridden because accelerate deals out rows to processes such that a step's rows depend on their number."""
        if self.ranks == 1:
            return super()._get_dataloader(
                dataset, description, batch_size, sampler_fn, is_training, dataloader_key
            )
        batches = RankBatches(
            sampler_fn(dataset) if is_training else SequentialSampler(dataset),
            pass_rows=batch_size,
            passes=self.args.gradient_accumulation_steps if is_training else 1,
            rank=self.accelerator.process_index,
            ranks=self.ranks,
        )
        return loader(
            dataset,
            batches,
            collate=self.data_collator,
            workers=self.args.dataloader_num_workers,
            device=self.accelerator.device,
        )

    def collated(self, rows: list[int]) -> Batch:
        """The rows of a forward pass, by their numbers, as the data loader gives them."""
        return self.data_collator([self.train_dataset[row] for row in rows])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The batches of an optimizer step, and the number of their learned tokens, which divides the loss.

        Overridden because transformers counts them in dictionaries alone.
        """
        if not self.speed_ups.packing:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        packs = list(islice(epoch_iterator, num_batches))
        learned = torch.as_tensor(sum(pack.targets.ne(IGNORED).sum() for pack in packs), device=device)
        return packs, self.summed(learned).float()

    # The step.

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Overridden because the library gives all weights one learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        factors = {weight: self.rate_factor(name) for name, weight in model_of(self).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for factor in dict.fromkeys((1.0, *(factors.get(weight, 1.0) for weight in group["params"]))):
                weights = [weight for weight in group["params"] if factors.get(weight, 1.0) == factor]
                groups.append(group | {"params": weights, "lr": group["lr"] * factor})
        optimizer.param_groups = groups
        return optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """One forward and backward pass: (nats per token of the step) / passes, summed by the caller."""
        self.tokens_computed += input_ids(inputs).numel()
        if not self.counts:
            self.tokens = self.tokens + inputs["attention_mask"].sum()
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        batch = send_to_device(inputs, self.accelerator.device)
        if self.speed_ups.cuda_graphs and self.graphs is None and self.state.global_step:
            self.capture_graphs()
        if self.graphs is not None:
            loss, right = self.graphs(batch, num_items_in_batch)
        else:
            # FSDP takes the mean of the processes' gradients, and the sum is needed.
            loss, right = self.loss_of(batch, num_items_in_batch / self.ranks)
            self.accelerator.backward(loss)
        learned = (targets_of(batch) != IGNORED).sum()
        self.learned = self.learned + learned
        self.right = self.right + right
        tokens = batch.tokens if isinstance(batch, Pack) else batch["attention_mask"].sum()
        self.tokens = self.tokens + tokens * (learned > 0)  # the token of an empty pass was not seen
        return loss.detach()

    def loss_of(self, batch: Batch, divisor: Tensor | int) -> tuple[Tensor, Tensor]:
        """The sum of nats over the learned tokens divided by `divisor`, and the right predictions among them."""
        ids, targets = input_ids(batch), targets_of(batch).flatten()
        if isinstance(batch, Pack):
            attention = attention_arguments(batch, attention=self.attention, longest_row=self.longest_row)
            attention["position_ids"] = batch.position_ids
        else:
            attention = {"attention_mask": batch["attention_mask"]}
        # A sharded model gathers its weights on the way in through the outermost module.
        model = self.causal_model if self.ranks == 1 else self.model
        with self.autocast():
            if not self.speed_ups.fused_loss:
                logits = model(input_ids=ids, use_cache=False, **attention).logits.flatten(0, 1).float()
                loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
                return loss / divisor, (logits.argmax(-1) == targets).sum()
            learned = batch.learned if isinstance(batch, Pack) else targets != IGNORED
            with scoring(self.causal_model.get_output_embeddings(), learned, targets, self.compute):
                loss, right = model(input_ids=ids, use_cache=False, **attention).logits
        return loss / divisor, right.detach()

    def autocast(self):
        """Autocast where weights are not in the compute type: adapters in PEFT's own layers, a full fine-tuning."""
        if self.speed_ups.fused_adapters or self.compute == torch.float32:
            return nullcontext()
        # A cache of casts would outlive the capture of a graph.
        return torch.autocast(
            self.causal_model.device.type, self.compute, cache_enabled=not self.speed_ups.cuda_graphs
        )

    def floating_point_ops(self, inputs) -> int:
        """Overridden because transformers' estimate counts every parameter again at every step, for no reader."""
        return 0

    # Counts.

    @property
    def counts(self) -> bool:
        """Whether the step is ours, which counts its tokens itself; TRL's step counts its own."""
        return self.speed_ups.any or self.ranks > 1

    def take_counts(self) -> tuple[int, float | None]:
        """Tokens seen since the last call, and the share of the learned ones that were predicted.

        The share is None where TRL's step computes it.
        """
        counts = torch.stack([torch.as_tensor(n).double() for n in (self.tokens, self.right, self.learned)])
        tokens, right, learned = self.summed(counts).tolist()
        self.learned = self.right = self.tokens = 0
        return int(tokens), right / learned if learned else None

    # Several processes.

    @property
    def ranks(self) -> int:
        """Processes that share this training."""
        return self.accelerator.num_processes

    def summed(self, count: int | Tensor) -> int | Tensor:
        """A count of this process' rows, over all processes."""
        if self.ranks == 1:
            return count
        total = self.accelerator.reduce(torch.as_tensor(count, device=self.accelerator.device), "sum")
        return total if isinstance(count, Tensor) else total.item()

    def create_accelerator_and_postprocess(self):
        """Overridden because accelerate shards on GPUs alone unless its state is changed before it is used."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            use_fsdp_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    # Checkpoints.

    def _save_checkpoint(self, model, trial) -> None:
        """Overridden because the library's checkpoints are pickles and hold no counts of ours."""
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"step-{self.state.global_step}"
        partial = folder / f".{checkpoint.name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        files = self.packed().write(partial, self.accelerator.process_index)
        if self.is_world_process_zero():
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            files[TRAINER_STATE_NAME] = sha256(partial / TRAINER_STATE_NAME)
        files = dict(ChainMap(*gather_object([files])))  # and all have written theirs
        if self.is_world_process_zero():
            checkpoints.complete(
                partial, checkpoint, belongs_to=self.history.checkpointing.belongs_to, files=files
            )
        self.accelerator.wait_for_everyone()

    def packed(self) -> checkpoints.Part:
        """What this process needs to go on from here."""
        optimizer = checkpoints.pack_optimizer(self.optimizer)
        tensors = checkpoints.pack_model(self.model) | optimizer.tensors | checkpoints.pack_random()
        tensors |= self.history.tensors()
        scaler = self.accelerator.scaler
        rest = {
            "optimizer": optimizer.rest,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "trainer": {
                "tokens_computed": self.tokens_computed,
                "capture_seconds": self.capture_seconds,
                **{name: int(getattr(self, name)) for name in ("learned", "right", "tokens")},
                # The library's sums since its last log line.
                "loss": self._tr_loss.item(),
                "logged_step": self._globalstep_last_logged,
                "metrics": {
                    name: list(map(float, values)) for name, values in self._metrics["train"].items()
                },
            },
            "history": self.history.state(),
        }
        return checkpoints.Part(tensors, rest)

    def last_checkpoint(self) -> str | None:
        """The checkpoint that this training goes on from; the first of its processes looks, and tells the others."""
        last = None
        if self.history.checkpointing is not None and self.is_world_process_zero():
            last = checkpoints.last(
                Path(self.args.output_dir), belongs_to=self.history.checkpointing.belongs_to, say=say
            )
        (last,) = broadcast_object_list([str(last) if last else None])
        return last

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Overridden because the library looks for its own files, and before the model is sharded."""
        self.resumed = checkpoints.Part.read(Path(resume_from_checkpoint), self.accelerator.process_index)

    def _load_rng_state(self, checkpoint) -> None:
        """Overridden because only the library knows when the next draw is that of the step after the checkpoint."""
        if checkpoint is not None:
            checkpoints.unpack_random(self.resumed.tensors)

    def restore(self) -> None:
        """Take up what a checkpoint holds, after the library has made the optimizer and set its sums to zero."""
        tensors, rest = self.resumed.tensors, self.resumed.rest
        checkpoints.unpack_model(self.model, tensors)
        checkpoints.unpack_optimizer(self.optimizer, checkpoints.Part(tensors, rest["optimizer"]))
        self.lr_scheduler.load_state_dict(rest["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(rest["scaler"])
        counts = rest["trainer"]
        for name in ("tokens_computed", "capture_seconds", "learned", "right", "tokens"):
            setattr(self, name, counts[name])
        self._tr_loss += counts["loss"]
        self._globalstep_last_logged = counts["logged_step"]
        self._metrics["train"].update(counts["metrics"])
        self.history.restore(rest["history"], tensors, step=self.state.global_step)


def model_of(trainer: SFTTrainer) -> torch.nn.Module:
    """The model without what accelerate may have wrapped it in."""
    return trainer.accelerator.unwrap_model(trainer.model)


def input_ids(batch: Batch) -> Tensor:
    """[rows, tokens]; of a pack [1, tokens]."""
    return batch.input_ids if isinstance(batch, Pack) else batch["input_ids"]


def targets_of(batch: Batch) -> Tensor:
    """The next token of each position [rows, tokens]; IGNORED where none is learned."""
    if isinstance(batch, Pack):
        return batch.targets
    return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
