"""The loop that most tutorials train with, to measure ours beside it: transformers, PEFT and autocast.

It takes what `training.build_trainer` takes and behaves enough like a trainer to be timed like one.
"""

from types import SimpleNamespace

import torch
from peft import get_peft_model
from transformers import set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from workflow import params
from workflow.precision import Precision
from workflow.training import LikeLengthSampler, SpeedUps, lora


class PlainLoop:
    """Padded batches, autocast, the model's own loss over whole logits, AdamW, no speed-up."""

    speed_ups = SpeedUps(*[False] * 5)
    capture_seconds = 0.0

    def __init__(
        self,
        model,
        tokenizer,
        *,
        train_rows: list[dict],
        training: params.Training,
        precision: Precision,
        seed: int,
        **_,
    ):
        set_seed(seed)
        self.model = get_peft_model(model, lora(training))
        if training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.rows, self.training, self.precision, self.seed = train_rows, training, precision, seed
        self.collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
        self.state = SimpleNamespace(global_step=0)
        self.callbacks = []

    def add_callback(self, callback) -> None:
        self.callbacks.append(callback)

    def batches(self):
        """Micro-batches of an optimizer step, on the device, epoch after epoch."""
        asked = self.training
        sampler = LikeLengthSampler(
            [len(row["input_ids"]) for row in self.rows],
            batch_rows=asked.batch_rows,
            window=asked.length_window,
            seed=self.seed,
        )
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            order = list(sampler)
            for start in range(0, len(order), asked.batch_rows):
                step = order[start : start + asked.batch_rows]
                yield [
                    {
                        key: tensor.to(self.model.device)
                        for key, tensor in self.collate(
                            [self.rows[row] for row in step[i : i + asked.micro_batch_rows]]
                        ).items()
                    }
                    for i in range(0, len(step), asked.micro_batch_rows)
                ]
            epoch += 1

    def get_batch_samples(self, iterator):
        return next(iterator), None

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
