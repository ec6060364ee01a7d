"""Fine-tune one run (a variant with a seed) by TRL's SFTTrainer, alike in all but the precision."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl import SFTTrainer

from workflow import params
from workflow.data.instructions import Instruction
from workflow.data.model_files import load_tokenizer
from workflow.precisions.load import Precision, load_base
from workflow.runtime import launch
from workflow.runtime.files import whole_folder
from workflow.runtime.lifetime import Terminated, sigterm_noted
from workflow.training.checkpoints import Kept
from workflow.training.checks import (
    check_adapters,
    check_model_fits,
    check_possible,
    check_processes,
    check_saved,
    check_trained,
    is_deterministic,
)
from workflow.training.config import arguments, lora
from workflow.training.history import History
from workflow.training.order import planned, planned_steps
from workflow.training.rows import Rows, check_rendered, check_rows, teaches, tokenizable, with_faults
from workflow.training.sharding import (
    keep_quantization,
    whole,
)
from workflow.training.speed.choice import SpeedUps, choose_speed_ups, sharded_speed_ups
from workflow.training.trainer import RunTrainer, model_of


@dataclass(frozen=True)
class Trained:
    """What one run did, as its result.json holds it."""

    precision: Precision
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
    validation_loss_after: float
    validation_tokens: int

    def as_dict(self) -> dict:
        return asdict(self)


def train(
    *,
    model_folder: Path,
    train_rows: list[Instruction],
    validation_rows: list[Instruction],
    variant: params.Variant,
    training: params.Training,
    hardware: params.Hardware,
    seed: int,
    weights_folder: Path,
    history_file: Path,
    validation_file: Path,
    kept: Kept | None = None,
    finish: Callable[[Path, Precision], None] | None = None,
) -> Trained:
    """Train one run and save its adapter (of a full fine-tuning, its model).

    Args:
        model_folder: the base model, 16-bit safetensors.
        seed: of the adapter's initial weights, of dropout and of the order of the rows.
        weights_folder: where the adapter goes, in PEFT's own format.
        history_file: a CSV written while it trains, one line per `training.log_every_steps`.
        validation_file: a CSV with the validation loss before, during and after.
        kept: what goes into checkpoints, in the folder `checkpoints` beside the weights; None for none.
        finish: puts what belongs beside the weights into their folder, before it takes its place.

    A SIGTERM ends the step, writes a checkpoint and ends the training.

    Of the processes of a sharded training each calls this; the first alone writes the files.

    Raises:
        UserError: the device is not to be had, no row is left to train on, or none begins with the BOS
            token that `training.second_bos` repeats.
        CheckError: the precision, the rows or the adapter are not what was asked for.
        Terminated: a SIGTERM came before the last step.
    """
    check_possible(training, hardware)
    check_processes(variant, hardware)
    tokenizer = load_tokenizer(model_folder)
    model, precision = load_base(model_folder, variant, hardware=hardware, sharded=variant.processes > 1)
    check_model_fits(model, training)
    trainer = build_trainer(
        model,
        tokenizer,
        train_rows=train_rows,
        validation_rows=validation_rows,
        variant=variant,
        training=training,
        precision=precision,
        seed=seed,
        data_workers=hardware.data_workers,
        scratch=weights_folder.parent,
        ranks=variant.processes,
    )
    rows = check_rows(trainer.train_dataset, tokenizer, asked=len(train_rows), training=training)
    sound = training.model_copy(update={"learn_end_token": True, "second_bos": False})
    validated = check_rows(
        trainer.eval_dataset, tokenizer, asked=len(validation_rows), training=sound, split="validation"
    )
    check_adapters(trainer, variant, training)
    steps = planned_steps(rows.rows, training)
    order, planned_tokens = planned(trainer.train_dataset, trainer.sampler(), steps)
    trainer.history = history = History(
        trainer,
        history_file,
        validation_file,
        steps=steps,
        validations=training.validations,
        kept=kept,
    )
    trainer.add_callback(history)
    with sigterm_noted() as history.asked_to_end:
        trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    if history.ended:
        raise Terminated(
            f"step {trainer.state.global_step} of {steps} is done and "
            + ("kept" if kept else "lost, since params ask for no checkpoints")
        )
    if history.validated[-1][0] != trainer.state.global_step:
        history.validate(step=trainer.state.global_step)
    trained = [p for p in model_of(trainer).parameters() if p.requires_grad]
    trained_in = str(trained[0].dtype).removeprefix("torch.")
    weights = {name: whole(p) for name, p in model_of(trainer).named_parameters() if p.requires_grad}
    check_trained(trainer, history, variant, weights, steps=steps, tokens=planned_tokens)
    if trainer.is_world_process_zero():
        save(
            model_of(trainer),
            variant,
            weights_folder,
            weights=weights,
            gathered=trainer.ranks > 1,
            finish=lambda written: finish and finish(written, precision),
        )
    done = Trained(
        precision=precision,
        processes=trainer.ranks,
        weights_gib_per_process=round(history.weights_gib, 6),
        speed_ups=trainer.speed_ups,
        deterministic=is_deterministic(precision),
        rows=rows,
        validation_rows=validated,
        order_sha256=order,
        trainable_parameters=sum(p.numel() for p in trained),
        trainable_dtype=trained_in,
        adapted_modules=sum(hasattr(m, "lora_A") for m in model_of(trainer).modules()),
        steps=trainer.state.global_step,
        rows_per_step=training.batch_rows,
        tokens_seen=int(history.tokens),
        tokens_computed=trainer.summed(trainer.tokens_computed),
        seconds=round(history.seconds - trainer.capture_seconds, 3),
        first_loss=history.losses[0],
        last_loss=history.losses[-1],
        validation_loss_before=history.validated[0][1],
        validation_loss_after=history.validated[-1][1],
        validation_tokens=history.validation_tokens,
    )
    if trainer.ranks > 1:
        torch.distributed.destroy_process_group()
    return done


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_rows: list[Instruction] | list[dict],
    validation_rows: list[Instruction] | list[dict],
    variant: params.Variant,
    training: params.Training,
    precision: Precision,
    seed: int,
    data_workers: int,
    scratch: Path,
    ranks: int = 1,
) -> SFTTrainer:
    """Attach the adapter and give model and rows to TRL.

    The seed is set right before the adapter is made, and the adapter is kept in float32 in every
    variant, so that all variants of a seed begin with the same adapter: TRL would round it to
    bfloat16 on a quantized base and keep it in float32 on a 16-bit one. The faults that params ask
    for are put into the training rows alone: validation losses are of the same rows in every variant.

    Args:
        ranks: processes that share the weights and the rows of this training.

    Raises:
        UserError: `training.second_bos` finds no BOS token to repeat.
        CheckError: TRL made other tokens of a row than the chat template's text has.
    """
    speed_ups = (
        choose_speed_ups(model, training, variant, precision) if ranks == 1 else sharded_speed_ups(training)
    )
    set_seed(seed)
    if variant.method == "lora":
        model = get_peft_model(model, lora(training))
    initial = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = RunTrainer(
        model=model,
        args=arguments(
            training, precision, seed=seed, data_workers=data_workers, scratch=scratch, ranks=ranks
        ),
        train_dataset=tokenizable(train_rows, training),
        eval_dataset=tokenizable(validation_rows, training),
        processing_class=tokenizer,
    )
    check_rendered(trainer.train_dataset, train_rows, tokenizer, training)
    check_rendered(trainer.eval_dataset, validation_rows, tokenizer, training)
    trainer.train_dataset = with_faults(trainer.train_dataset, tokenizer, training)
    trainer.eval_dataset = trainer.eval_dataset.filter(teaches)
    for name in ("train_dataset", "eval_dataset"):
        setattr(trainer, name, getattr(trainer, name).select_columns(["input_ids", "labels"]))
    trainer.length_window = training.length_window
    trainer.remove_callback(PrinterCallback)  # History prints its own, readable lines
    for name, parameter in model_of(trainer).named_parameters():
        if name in initial:
            parameter.data = initial[name]
    if ranks > 1:
        keep_quantization(model, trainer.accelerator.device)
        # Every process drops out of its own rows; all began with one seed, so that their adapters do.
        torch.manual_seed(int(np.random.SeedSequence([seed, launch.rank()]).generate_state(1)[0]))
    trainer.speed_up(speed_ups, compute=getattr(torch, precision.compute))
    return trainer


def save(
    model: torch.nn.Module,
    variant: params.Variant,
    folder: Path,
    *,
    weights: dict[str, Tensor],
    gathered: bool = False,
    finish: Callable[[Path], None] = lambda written: None,
) -> None:
    """Save the adapter in PEFT's format; of a full fine-tuning, the model in 16 bits.

    Args:
        weights: what was trained, by name.
        gathered: whether the model holds a part of each alone.
        finish: puts what belongs beside the weights into their folder, before it takes its place.

    Raises:
        CheckError: what can be read from the files is not what was trained.
    """
    if variant.method == "full":
        model = model.to(torch.bfloat16)
    for config in getattr(model, "peft_config", {}).values():
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(
                config.target_modules
            )  # a set, whose order is another in each process
    with whole_folder(folder) as beside:
        model.save_pretrained(beside, **({"state_dict": weights} if gathered else {}))
        if variant.method == "full":
            read = dict(
                AutoModelForCausalLM.from_pretrained(
                    beside, dtype=torch.bfloat16, trust_remote_code=False
                ).named_parameters()
            )
            wanted = {name: weight.bfloat16() for name, weight in weights.items()}
        else:
            read = load_file(beside / "adapter_model.safetensors")
            wanted = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
        check_saved(read, wanted)
        finish(beside)
