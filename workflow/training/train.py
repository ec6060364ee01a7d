"""Fine-tune one run (a variant with a seed) by TRL's SFTTrainer, alike in all but the precision."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from workflow import precisions
from workflow.data.model_files import load_tokenizer
from workflow.data.rows import Instruction
from workflow.methods import Method, initializations
from workflow.models.load import LoadedPrecision, load_base
from workflow.params import Run
from workflow.runtime import launch
from workflow.runtime.files import whole_folder
from workflow.runtime.lifetime import Terminated, sigterm_noted
from workflow.training.checkpoints import Checkpointing
from workflow.training.checks import (
    check_model_fits,
    check_possible,
    check_processes,
    check_saved,
    check_trainable,
    check_trained,
    is_deterministic,
)
from workflow.training.config import arguments
from workflow.training.history import History
from workflow.training.initialization import correct_quantization
from workflow.training.order import planned, planned_steps
from workflow.training.rows import (
    Rows,
    check_rendered,
    check_rows,
    chosen,
    teaches,
    tokenizable,
    with_faults,
)
from workflow.training.sharding import (
    keep_quantization,
    whole,
)
from workflow.training.speed.choice import SpeedUps, choose_speed_ups
from workflow.training.trainer import RunTrainer, model_of


@dataclass(frozen=True)
class Trained:
    """What one run did, as its result.json holds it."""

    precision: LoadedPrecision
    processes: int  # that held a part of the weights each and computed a part of the rows
    weights_gib_per_process: float  # base, adapter and quantization constants, when the training begins
    speed_ups: SpeedUps
    deterministic: bool  # the same params on the same machine give the same bits
    rows: Rows
    validation_rows: Rows
    order_sha256: str  # of the rows in the order of the steps, as `planned` defines it
    trainable_parameters: int
    trainable_dtype: str
    adapted_modules: int
    steps: int
    rows_per_step: int
    tokens_seen: int  # without padding
    tokens_computed: int  # with padding
    seconds: float  # in training steps, without loading, validation and the capture of graphs
    first_loss: float  # nats per token
    last_loss: float
    validation_loss_before: float
    validation_loss_after: float  # of the last step
    validation_tokens: int
    kept_step: int  # whose weights were saved, of `steps`
    validation_loss_kept: float  # of these weights

    def as_dict(self) -> dict:
        return asdict(self)


def train(
    run: Run,
    *,
    model_folder: Path,
    train_rows: list[Instruction],
    validation_rows: list[Instruction],
    folder: Path,
    checkpointing: Checkpointing | None = None,
    finish: Callable[[Path, LoadedPrecision], None] | None = None,
) -> Trained:
    """Train one run and save what its method leaves: an adapter in PEFT's format, or a model.

    Args:
        model_folder: the base model, 16-bit safetensors.
        train_rows, validation_rows: of the sample, from which `training.schedule` may choose.
        folder: gets the folder `weights`, history.csv (a line per `training.schedule.log_every_steps`, while it trains) and
            validation.csv (the validation loss before, during and after).
        checkpointing: what goes into checkpoints, in the folder `checkpoints` beside the weights; None for none.
        finish: puts what belongs beside the weights into their folder, before it takes its place.

    A SIGTERM ends the training after the step and its checkpoint. Every process of a sharded training calls this, and
    the first writes the files.

    Raises:
        UserError: there is no such device, no row is left to train on, or no BOS token to repeat.
        CheckError: the precision, the rows or the weights to train are not what params ask for.
        Terminated: a SIGTERM came before the last step.
    """
    training = run.training
    train_rows, validation_rows = chosen(train_rows, validation_rows, training)
    check_possible(training, run.hardware)
    check_processes(run.variant, run.hardware)
    tokenizer = load_tokenizer(model_folder)
    sharded = run.variant.processes > 1
    model, precision = load_base(model_folder, run.variant, hardware=run.hardware, sharded=sharded)
    check_model_fits(model, training)
    trainer = build_trainer(
        model,
        tokenizer,
        run,
        train_rows=train_rows,
        validation_rows=validation_rows,
        precision=precision,
        scratch=folder,
    )
    rows, validated = counted(trainer, run, drawn=(len(train_rows), len(validation_rows)))
    check_trainable(model_of(trainer), run.method, training)
    steps = planned_steps(rows.rows, training)
    order, tokens = planned(trainer.train_dataset, trainer.sampler(), steps)
    trainer.history = History(
        trainer,
        folder,
        steps=steps,
        validations=training.validations,
        keep=training.keep,
        checkpointing=checkpointing,
    )
    trainer.add_callback(trainer.history)
    learn(trainer, steps=steps)
    check_trained(trainer, run.method, trained_weights(trainer), steps=steps, tokens=tokens)
    trainer.history.take_kept()
    weights = trained_weights(trainer)
    if trainer.is_world_process_zero():
        save(
            model_of(trainer),
            run.method,
            folder / "weights",
            weights=weights,
            initial=trainer.initial,
            gathered=sharded,
            finish=lambda written: finish and finish(written, precision),
        )
    facts = {"precision": precision, "rows": rows, "validation_rows": validated, "order_sha256": order}
    summary = summarize(trainer, run, weights, **facts)
    if sharded:
        torch.distributed.destroy_process_group()
    return summary


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    *,
    train_rows: list[Instruction] | list[dict],
    validation_rows: list[Instruction] | list[dict],
    precision: LoadedPrecision,
    scratch: Path,
) -> RunTrainer:
    """Wrap the model as the run's method does, and give model and rows to TRL.

    The seed is set right before the adapter is made, and the adapter is kept in float32 in every
    variant, so that all variants of a seed begin with the same adapter: TRL would round it to
    bfloat16 on a quantized base and keep it in float32 on a 16-bit one. An initialization that begins with the
    base's own weights gives each base its own adapter. The faults that params ask
    for are put into the training rows alone: validation losses are of the same rows in every variant.

    Raises:
        UserError: `training.step.second_bos` finds no BOS token to repeat.
        CheckError: TRL made other tokens of a row than the chat template's text has.
    """
    training = run.training
    speed_ups = choose_speed_ups(model, run, precision)
    set_seed(run.seed)
    model = run.method.wrap(model, training)
    run.method.attach(model, precisions.get(run.variant.precision))
    initialization = initializations.get(training.initialization)
    if initialization.corrects_base:
        correct_quantization(model)
    initial = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = RunTrainer(
        model=model,
        args=arguments(run, precision, scratch=scratch),
        train_dataset=tokenizable(train_rows, training),
        eval_dataset=tokenizable(validation_rows, training),
        processing_class=tokenizer,
    )
    check_rendered(trainer.train_dataset, train_rows, tokenizer, training)
    check_rendered(trainer.eval_dataset, validation_rows, tokenizer, training)
    columns = ["input_ids", "labels"]
    trainer.train_dataset = with_faults(trainer.train_dataset, tokenizer, training).select_columns(columns)
    trainer.eval_dataset = trainer.eval_dataset.filter(teaches).select_columns(columns)
    trainer.length_window = training.length_window
    trainer.rate_factor = lambda name: run.method.rate_factor(name, training)
    if initialization.changes_base:
        trainer.initial = {name: weight.cpu().clone() for name, weight in initial.items()}
    trainer.remove_callback(PrinterCallback)  # History prints its own, readable lines
    for name, parameter in model_of(trainer).named_parameters():
        if name in initial:
            parameter.data = initial[name]
    trainer.speed_up(speed_ups, compute=getattr(torch, precision.compute))
    if run.variant.processes > 1:
        keep_quantization(model, trainer.accelerator.device)
        # Every process drops out of its own rows; all began with one seed, so that their adapters do.
        torch.manual_seed(int(np.random.SeedSequence([run.seed, launch.rank()]).generate_state(1)[0]))
    return trainer


def counted(trainer: RunTrainer, run: Run, *, drawn: tuple[int, int]) -> tuple[Rows, Rows]:
    """The checked and counted rows to train and to validate on; the latter have none of the faults.

    Args:
        drawn: rows of the two that the sample has.
    """
    sound = run.training.model_copy(update={"learn_end_token": True, "second_bos": False})
    tokenizer = trainer.processing_class
    return (
        check_rows(trainer.train_dataset, tokenizer, drawn=drawn[0], training=run.training),
        check_rows(trainer.eval_dataset, tokenizer, drawn=drawn[1], training=sound, split="validation"),
    )


def learn(trainer: RunTrainer, *, steps: int) -> None:
    """Train, from the last checkpoint if there is one, and validate after the last step.

    Raises:
        Terminated: a SIGTERM came before the last step.
    """
    history = trainer.history
    with sigterm_noted() as history.asked_to_end:
        trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    if history.ended:
        raise Terminated(
            f"step {trainer.state.global_step} of {steps} is done and "
            + ("kept" if history.checkpointing else "lost, since params ask for no checkpoints")
        )
    if history.validated[-1][0] != trainer.state.global_step:
        history.validate(step=trainer.state.global_step)


def trained_weights(trainer: RunTrainer) -> dict[str, Tensor]:
    """What is trained, by name, as one process would hold it."""
    return {name: whole(p) for name, p in model_of(trainer).named_parameters() if p.requires_grad}


def summarize(trainer: RunTrainer, run: Run, weights: dict[str, Tensor], **facts: Any) -> Trained:
    """What the run did: the given facts, and those that the trainer and its history counted.

    Args:
        weights: what was trained, by name.
    """
    history = trainer.history
    kept_step, validation_loss_kept, _ = history.kept()
    return Trained(
        **facts,
        trainable_parameters=sum(weight.numel() for weight in weights.values()),
        trainable_dtype=str(next(iter(weights.values())).dtype).removeprefix("torch."),
        adapted_modules=len(run.method.adapter_layers(model_of(trainer))),
        rows_per_step=run.training.batch_rows,
        processes=trainer.ranks,
        weights_gib_per_process=round(history.weights_gib, 6),
        speed_ups=trainer.speed_ups,
        deterministic=is_deterministic(facts["precision"]),
        steps=trainer.state.global_step,
        tokens_seen=history.tokens,
        tokens_computed=trainer.summed(trainer.tokens_computed),
        seconds=round(history.seconds - trainer.capture_seconds, 3),
        first_loss=history.losses[0],
        last_loss=history.losses[-1],
        validation_loss_before=history.validated[0][1],
        validation_loss_after=history.validated[-1][1],
        validation_tokens=history.validation_tokens,
        kept_step=kept_step,
        validation_loss_kept=validation_loss_kept,
    )


def save(
    model: torch.nn.Module,
    method: Method,
    folder: Path,
    *,
    weights: dict[str, Tensor],
    initial: dict[str, Tensor] | None = None,
    gathered: bool = False,
    finish: Callable[[Path], None] = lambda written: None,
) -> None:
    """Save what the method leaves, and read it back.

    Args:
        weights: what was trained, by name.
        initial: the same before the training, if it was taken out of the base.
        gathered: whether the model holds only a part of each.
        finish: puts what belongs beside the weights into their folder, before it takes its place.

    Raises:
        CheckError: what can be read from the files is not what was trained.
    """
    portable = method.portable(weights, initial or {})
    with whole_folder(folder) as partial:
        method.save(model, partial, portable, gathered=gathered or portable is not weights)
        check_saved(*method.saved(model, partial, portable))
        finish(partial)
