"""TRL's configuration of a run."""

from pathlib import Path

from trl import SFTConfig

from workflow.models.load import LoadedPrecision
from workflow.params import Run
from workflow.training.sharding import (
    FSDP,
)


def arguments(run: Run, precision: LoadedPrecision, *, scratch: Path) -> SFTConfig:
    """TRL's configuration: each of our params under the library's name, and nothing left to drift."""
    training, ranks = run.training, run.variant.processes
    return SFTConfig(
        output_dir=str(scratch / "checkpoints"),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 1,
        per_device_train_batch_size=training.micro_batch_rows,
        per_device_eval_batch_size=training.micro_batch_rows,
        gradient_accumulation_steps=training.batch_rows // (training.micro_batch_rows * ranks),
        max_length=training.max_length,
        gradient_checkpointing=training.gradient_checkpointing,
        # Without dropout there is no random state to keep, which a CUDA graph could not read.
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": training.dropout > 0},
        optim=training.optimizer,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_fraction,  # below 1 it is a fraction of the steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_gradient_norm,
        completion_only_loss=training.loss_on == "response",
        loss_type="nll",
        packing=False,
        # Sharded, `loss_of` alone casts: accelerate would have FSDP round the adapter's gradients as well.
        bf16=precision.compute == "bfloat16" and ranks == 1,
        fp16=precision.compute == "float16",
        use_cpu=precision.device == "cpu",
        fsdp=ranks > 1 or None,
        fsdp_config=dict(FSDP) if ranks > 1 else None,
        average_tokens_across_devices=True,
        seed=run.seed,
        data_seed=run.seed,
        logging_strategy="steps",
        logging_steps=training.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it waits for the device at every step; check_trained looks at the losses
        eval_strategy="no",  # History validates, exactly and by token
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=run.hardware.data_workers,
    )
