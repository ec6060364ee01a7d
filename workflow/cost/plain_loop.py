"""The training loop of most tutorials (transformers, PEFT and autocast), to compare ours with.

It has the arguments of `train.build_trainer`, and enough of a trainer's interface to be timed like one.
"""

from itertools import islice
from types import SimpleNamespace

import torch
from transformers import set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from workflow import precisions
from workflow.models.load import LoadedPrecision
from workflow.params import Run
from workflow.training.order import LikeLengthSampler
from workflow.training.speed.choice import SpeedUps


class PlainLoop:
    """Trains with padded batches, autocast, the model's own loss over all logits, and AdamW, without speed-ups."""

    speed_ups = SpeedUps(*[False] * 6)
    capture_seconds = 0.0
    graphs = None

    def __init__(
        self,
        model,
        tokenizer,
        run: Run,
        *,
        train_rows: list[dict],
        precision: LoadedPrecision,
        **_,
    ):
        training = run.training
        set_seed(run.seed)
        self.model = run.method.wrap(model, training)
        run.method.attach(self.model, precisions.get(run.variant.precision))
        if training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.rows, self.training, self.precision, self.seed = train_rows, training, precision, run.seed
        self.collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
        self.args = SimpleNamespace(per_device_train_batch_size=training.micro_batch_rows)
        self.state = SimpleNamespace(global_step=0)
        self.callbacks = []

    def add_callback(self, callback) -> None:
        self.callbacks.append(callback)

    def sampler(self) -> LikeLengthSampler:
        return LikeLengthSampler(
            [len(row["input_ids"]) for row in self.rows],
            batch_rows=self.training.batch_rows,
            window=self.training.length_window,
            seed=self.seed,
        )

    def expect_passes(self, passes: list[list[int]]) -> None:
        """Do nothing: this loop prepares no buffers for a pass."""

    def collated(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Collate the rows with these numbers into a forward pass on the device."""
        batch = self.collate([self.rows[row] for row in rows])
        return {key: tensor.to(self.model.device) for key, tensor in batch.items()}

    def batches(self):
        """Yield the micro-batches of each optimizer step, on the device, epoch after epoch."""
        training, sampler = self.training, self.sampler()
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            order = list(sampler)
            for start in range(0, len(order), training.batch_rows):
                step = order[start : start + training.batch_rows]
                yield [
                    self.collated(step[i : i + training.micro_batch_rows])
                    for i in range(0, len(step), training.micro_batch_rows)
                ]
            epoch += 1

    def get_batch_samples(self, iterator, passes: int | None = None):
        """Return the next step's micro-batches from an iterator over steps, or `passes` of them from one over passes."""
        return (next(iterator) if passes is None else list(islice(iterator, passes))), None

    def train(self) -> None:
        compute = getattr(torch, self.precision.compute)
        optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=self.training.learning_rate
        )
        self.model.train()
        iterator = self.batches()
        while self.state.global_step < self.training.steps:
            for callback in self.callbacks:
                callback.on_step_begin(None, self.state, None)
            micro_batches, _ = self.get_batch_samples(iterator)
            for batch in micro_batches:
                with torch.autocast(self.precision.device, compute, enabled=compute != torch.float32):
                    loss = self.model(**batch).loss / len(micro_batches)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.state.global_step += 1
            for callback in self.callbacks:
                callback.on_step_end(None, self.state, None)
