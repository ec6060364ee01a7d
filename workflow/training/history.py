"""The curves of a run, written while it trains."""

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    TrainerCallback,
)

from workflow.runtime.stage import progress, say
from workflow.training.checkpoints import Checkpointing, pack_model, unpack_model
from workflow.training.sharding import check_sharded, held_gib
from workflow.training.speed.fused import IGNORED
from workflow.training.trainer import RunTrainer, model_of, targets_of


class History(TrainerCallback):
    """Writes the CSVs of a run while it trains, and says on the terminal how far it is."""

    COLUMNS = (
        "step",
        "epoch",
        "loss",
        "token_accuracy",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
    )
    VALIDATION_COLUMNS = ("step", "validation_loss", "validation_token_accuracy")
    # What a checkpoint holds of it.
    STATE = ("lines", "losses", "validated", "validation_tokens", "seconds", "logged_seconds", "tokens")
    BEST = "best."  # begins the names of the best weights in a checkpoint

    def __init__(
        self,
        trainer: RunTrainer,
        folder: Path,
        *,
        steps: int,
        validations: int,
        keep: str = "last",
        checkpointing: Checkpointing | None = None,
    ):
        self.trainer = trainer
        self.history_file = folder / "history.csv"
        self.validation_file = folder / "validation.csv"
        self.every = max(1, steps // validations)
        self.keep = keep
        self.best_weights: dict[str, Tensor] = {}  # this process' part, where `keep` is best
        self.checkpointing = checkpointing
        self.asked_to_end: Callable[[], bool] = lambda: False
        self.ended = False
        self.lines: list[tuple] = []
        self.losses: list[float] = []
        self.validated: list[tuple[int, float, float]] = []
        self.validation_tokens = 0
        self.seconds = self.logged_seconds = 0.0
        self.tokens = 0
        self.steps = steps
        self.write(self.history_file, self.COLUMNS, new=True)
        self.write(self.validation_file, self.VALIDATION_COLUMNS, new=True)

    def write(self, path: Path, values: tuple, *, new: bool = False) -> None:
        """Append a line to a CSV that is read while it grows (`dvc plots`, `tail -f`)."""
        if self.trainer.is_world_process_zero():
            with path.open("w" if new else "a", newline="") as file:
                csv.writer(file).writerow(values)

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it as tensors: the best weights so far."""
        return {f"{self.BEST}{name}": weight for name, weight in self.best_weights.items()}

    def restore(self, saved: dict[str, Any], tensors: dict[str, Tensor], *, step: int) -> None:
        """Take up what a checkpoint holds, and write the lines of the CSVs again."""
        self.best_weights = {
            name.removeprefix(self.BEST): weight
            for name, weight in tensors.items()
            if name.startswith(self.BEST)
        }
        for name in self.STATE:
            setattr(self, name, saved[name])
        for line in self.lines:
            self.write(self.history_file, line)
        for line in self.validated:
            self.write(self.validation_file, line)
        say(f"  goes on after step {step} of {self.steps}, from its checkpoint")

    def on_train_begin(self, args, state, control, **kwargs):
        # Not before: a sharded model is put onto its devices when the training begins.
        if self.trainer.ranks > 1:
            check_sharded(model_of(self.trainer), self.trainer.ranks)
        self.weights_gib = held_gib(model_of(self.trainer))
        if state.global_step:
            self.trainer.restore()
        else:
            self.validate(step=0)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the time would be that of the launches
        self.seconds += time.monotonic() - self.step_started
        control.should_log = control.should_log or state.global_step == self.steps
        if state.global_step % self.every == 0 and state.global_step < self.steps:
            self.validate(step=state.global_step)
        if state.global_step == self.steps:
            return
        # Of several processes that share the training, each ends if one is asked to.
        self.ended = self.trainer.summed(int(self.asked_to_end())) > 0
        if self.checkpointing is not None:
            control.should_save = self.ended or state.global_step % self.checkpointing.every == 0
        control.should_training_stop = control.should_training_stop or self.ended

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        tokens, accuracy = self.trainer.take_counts()
        rate = tokens / (self.seconds - self.logged_seconds)
        self.tokens += tokens
        self.logged_seconds = self.seconds
        line = (
            state.global_step,
            round(self.epochs(state.global_step), 4),
            logs["loss"],
            logs["mean_token_accuracy"] if accuracy is None else accuracy,
            logs["learning_rate"],
            logs["grad_norm"],
            round(rate, 1),
        )
        self.lines.append(line)
        self.write(self.history_file, line)
        progress(
            state.global_step,
            self.steps,
            self.seconds,
            f"loss {logs['loss']:.3f} nats per token, {rate:.0f} tokens/s",
        )

    def epochs(self, step: int) -> float:
        """Epochs that `step` optimizer steps are, counted in forward passes however many processes share them."""
        arguments = self.trainer.args
        passes = math.ceil(len(self.trainer.train_dataset) / arguments.per_device_train_batch_size)
        step_passes = arguments.gradient_accumulation_steps * self.trainer.ranks
        full, more = divmod(step, math.ceil(passes / step_passes))
        return full + min(1, more * step_passes / passes)

    def validate(self, *, step: int) -> None:
        """Score the validation rows exactly: the sum over all response tokens, divided by their number."""
        with (
            torch.random.fork_rng()
        ):  # a data loader draws a seed, which would change the dropout that follows
            loss, right, count = self._score()
        self.validation_tokens = int(count)
        self.validated.append((step, loss / count, right / count))
        self.write(self.validation_file, self.validated[-1])
        say(f"  step {step} of {self.steps}: validation loss {loss / count:.3f} nats per token")
        if self.keep == "best" and step and self.kept()[0] == step:
            self.best_weights.clear()  # before the copy, so that host memory never holds two
            for name, weight in pack_model(self.trainer.model).items():
                self.best_weights[name] = weight.to("cpu", copy=True)

    def kept(self) -> tuple[int, float, float]:
        """The step whose weights are kept, of those scored so far, its validation loss and its token accuracy."""
        if self.keep == "last":
            return tuple(self.validated[-1])
        # Among equal losses, min takes the first.
        return tuple(min(self.validated[1:], key=lambda validated: validated[1]))

    def take_kept(self) -> None:
        """Put the weights that are kept into the model, which holds those of the last step."""
        if self.best_weights:
            unpack_model(self.trainer.model, self.best_weights)

    def _score(self) -> tuple[float, float, float]:
        """Nats, right predictions and learned tokens, summed over the validation rows of all processes."""
        model = self.trainer.model
        training = model.training
        model.eval()
        loss = right = count = 0.0
        for batch in self.trainer.get_eval_dataloader():
            with torch.no_grad():
                nats, correct = self.trainer.loss_of(batch, 1)
            loss += nats.item()
            right += correct.item()
            count += (targets_of(batch) != IGNORED).sum().item()
        model.train(training)
        if self.trainer.ranks > 1:
            sums = torch.tensor([loss, right, count], dtype=torch.float64)
            loss, right, count = self.trainer.summed(sums).tolist()
        return loss, right, count
