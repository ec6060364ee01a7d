"""Fine-tune one run (a variant with a seed) by TRL's SFTTrainer, alike in all but the precision."""

import csv
import hashlib
import math
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer

from workflow import params
from workflow.data import chat
from workflow.data.instructions import Instruction
from workflow.data.model_files import load_tokenizer
from workflow.precisions.load import Precision, base_linears, choose_compute, choose_device, load_base
from workflow.runtime import launch
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import sha256, whole_folder
from workflow.runtime.lifetime import Terminated, sigterm_noted
from workflow.runtime.stage import progress, say
from workflow.training import checkpoints
from workflow.training.checkpoints import Kept
from workflow.training.sharding import (
    FSDP,
    RankBatches,
    check_sharded,
    held_gib,
    keep_quantization,
    loader,
    use_fsdp_on_cpu,
    whole,
)
from workflow.training.speed.cuda_graphs import GraphedSteps
from workflow.training.speed.fused import IGNORED, LinearCrossEntropy, fuse_adapters, fuse_layers
from workflow.training.speed.packing import (
    Pack,
    PackingCollator,
    attention_arguments,
    can_be_packed,
    lengths_needed,
    packed_attention,
)


@dataclass(frozen=True)
class SpeedUps:
    """Which of params' speed-ups are in force in a run: some need a GPU, an adapter or a plain output head."""

    packing: bool
    fused_adapters: bool
    fused_layers: bool
    fused_loss: bool
    cuda_graphs: bool

    @property
    def any(self) -> bool:
        return any(asdict(self).values())


@dataclass(frozen=True)
class Rows:
    """What the tokenized training rows hold, counted as they are trained on."""

    rows: int
    rows_dropped: int  # no response token is left within max_length
    rows_cut: int  # end at max_length, so their end token is not learned
    tokens: int
    tokens_in_loss: int
    longest: int  # tokens
    bos_per_row: int
    end_token_in_loss: bool


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
    order, planned_tokens = planned(trainer, steps)
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
        weights_gib_per_process=round(trainer.weights_gib, 6),
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


def check_possible(training: params.Training, hardware: params.Hardware) -> None:
    """Raise a UserError if this device cannot do what the training params ask for."""
    if training.optimizer.startswith("paged_") and choose_device(hardware).type == "cpu":
        raise UserError(
            f"training.optimizer is {training.optimizer}, which pages its state between GPU and host memory; "
            "on a CPU use adamw_torch."
        )


def check_model_fits(model: PreTrainedModel, training: params.Training) -> None:
    """Raise a UserError if rows may be longer than the model's context, or no layer has a name that is to be adapted."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and training.max_length > context:
        raise UserError(
            f"training.max_length is {training.max_length} tokens, and the model's context (max_position_embeddings) "
            f"holds {context}."
        )
    linear = base_linears(model)
    for wanted in [] if training.target_modules == "all-linear" else training.target_modules:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in linear):
            last = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"training.target_modules names {wanted}, and no linear layer of the model has that name; they are "
                f"{', '.join(last)}."
            )


def check_processes(variant: params.Variant, hardware: params.Hardware) -> None:
    """Raise a UserError if this machine cannot share a training among a variant's processes.

    Raises:
        CheckError: another number of processes was started.
    """
    device = choose_device(hardware)
    if launch.count() != variant.processes:
        raise CheckError(
            f"processes is {variant.processes}, and {launch.count()} of them compute: the train stage starts them"
        )
    if device.type == "cuda" and torch.cuda.device_count() < variant.processes:
        raise UserError(
            f"processes is {variant.processes}, which takes a GPU each, and torch sees {torch.cuda.device_count()}."
        )
    if variant.processes > 1 and choose_compute(hardware, variant, device) == torch.float16:
        raise UserError(
            "compute_dtype is float16, whose scaled gradients are not for a sharded training (processes above 1); "
            "use bfloat16 or float32."
        )


def planned_steps(rows: int, training: params.Training) -> int:
    """Optimizer steps of a training on so many rows (a last, smaller batch is a step too)."""
    return training.steps or math.ceil(training.epochs * math.ceil(rows / training.batch_rows))


def is_deterministic(precision: Precision) -> bool:
    """Whether the same params on the same machine give the same bits again.

    On a CPU they do, in every precision. On a GPU, cuBLAS' and bitsandbytes' kernels may add up in
    another order each time, so there it takes PyTorch's own switch, which this pipeline does not set.
    """
    return precision.device == "cpu" or torch.are_deterministic_algorithms_enabled()


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
        train_dataset=_dataset(train_rows, training),
        eval_dataset=_dataset(validation_rows, training),
        processing_class=tokenizer,
    )
    check_rendered(trainer.train_dataset, train_rows, tokenizer, training)
    check_rendered(trainer.eval_dataset, validation_rows, tokenizer, training)
    trainer.train_dataset = with_faults(trainer.train_dataset, tokenizer, training)
    trainer.eval_dataset = trainer.eval_dataset.filter(_teaches)
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


def choose_speed_ups(
    model: PreTrainedModel, training: params.Training, variant: params.Variant, precision: Precision
) -> SpeedUps:
    """Those of params' speed-ups that this run can have.

    Packing needs a model that computes of each row what it does of the row alone (no window, no recurrent
    state), and a fused loss an output head that is one matrix. A graph needs packing, work that is the same
    for every batch (int8 looks for outliers in each), no scale that float16's gradients are multiplied by,
    and no random state that a recomputation would go back to.
    """
    lora = variant.method == "lora"
    packing = training.packing and can_be_packed(model, longest=training.max_length)
    return SpeedUps(
        packing=packing,
        fused_adapters=training.fused_adapters and lora,
        fused_layers=training.fused_layers,
        fused_loss=training.fused_loss and _has_plain_head(model),
        cuda_graphs=training.cuda_graphs
        and packing
        and precision.device == "cuda"
        and lora
        and precision.base != "int8"
        and precision.compute != "float16"
        and not (training.gradient_checkpointing and training.dropout),
    )


def sharded_speed_ups(training: params.Training) -> SpeedUps:
    """Those of params' speed-ups that a sharded training can have.

    Fused adapters find their weights gathered, as they compute inside a decoder layer. The fused loss would use
    the output head's weight past its module, where it is not gathered. Packing and fused layers are tried on the
    model before they are used, and a model that is to be sharded is in host memory then, where a pass takes minutes.
    """
    return SpeedUps(
        packing=False,
        fused_adapters=training.fused_adapters,
        fused_layers=False,
        fused_loss=False,
        cuda_graphs=False,
    )


def _has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the last hidden state times the output embeddings, nothing added, scaled or capped.

    It is tried on a few tokens; a cap that so small logits would not show is known by its name.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return False
    ids = torch.arange(3, 9, device=model.device)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        plain = (hidden.to(head.weight.dtype) @ head.weight.t()).float()
        logits = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    capped = any(getattr(model.config.get_text_config(), name, None) is not None for name in caps)
    return not capped and torch.allclose(plain, logits, rtol=2e-2, atol=1e-2 * float(logits.abs().mean()))


class RunTrainer(SFTTrainer):
    """TRL's trainer, with batches of like length in a random order and a step that wastes less of the machine.

    The library's own `group_by_length` walks through large windows from the longest rows to the
    shortest, which in a short training is a curriculum and a biased choice of rows. Without any
    speed-up the step is TRL's.
    """

    length_window: int
    speed_ups: SpeedUps
    tokens_computed = 0
    graphs: GraphedSteps | None = None
    capture_seconds = 0.0
    history: "History"

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
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            use_fsdp_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *arguments):
        prepared = super()._prepare_for_training(*arguments)
        if self.ranks > 1:
            check_sharded(model_of(self), self.ranks)
        self.weights_gib = held_gib(model_of(self))
        return prepared

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
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
            self._remove_unused_columns(dataset, description=description),
            batches,
            collate=self.data_collator,
            workers=self.args.dataloader_num_workers,
            device=self.accelerator.device,
        )

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return LikeLengthSampler(
            [len(ids) for ids in dataset["input_ids"]],
            batch_rows=self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.ranks,
            window=self.length_window,
            seed=self.args.data_seed,
        )

    def speed_up(self, speed_ups: SpeedUps, *, compute: torch.dtype) -> None:
        """Put the speed-ups into the model and the data loader."""
        self.speed_ups, self.compute = speed_ups, compute
        self.learned = self.right = self.tokens = 0
        model = model_of(self)
        self.causal_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.attention = packed_attention(self.causal_model, compute) if speed_ups.packing else None
        if speed_ups.fused_layers:
            fuse_layers(model)
        if speed_ups.fused_adapters:
            fuse_adapters(model, compute=compute)
        if speed_ups.packing:
            self.data_collator = PackingCollator()
        if speed_ups.cuda_graphs:
            self.lengths = lengths_needed(pack_totals(self))
            self.slots = self.args.per_device_train_batch_size + 1  # one row of padding
            self.data_collator = PackingCollator(lengths=self.lengths, slots=self.slots)
        if self.attention is not None:
            self.causal_model.set_attn_implementation(self.attention)

    def expect_pass(self, tokens: int) -> None:
        """Have a graph ready for a pack of this many tokens too, which the planned steps need not hold."""
        if self.speed_ups.cuda_graphs:
            self.lengths = lengths_needed([*pack_totals(self), tokens])
            self.data_collator = PackingCollator(lengths=self.lengths, slots=self.slots)

    def collated(self, rows: list[int]) -> dict[str, Tensor]:
        """The rows of a forward pass, by their numbers, as the data loader gives them."""
        dataset = self._remove_unused_columns(self.train_dataset, description="training")
        return self.data_collator([dataset[row] for row in rows])

    def floating_point_ops(self, inputs) -> int:
        """Transformers' estimate counts every parameter again at every step, and nobody reads it."""
        return 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One forward and backward pass: (nats per token of the step) / passes, summed by the caller."""
        self.tokens_computed += inputs["input_ids"].numel()
        if not self.speed_ups.any and self.ranks == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        targets = shifted(inputs)
        if self.speed_ups.cuda_graphs and self.graphs is None and self.state.global_step:
            self.capture_graphs()
        if self.graphs is not None:
            loss, right = self.graphs(_pack(inputs), num_items_in_batch)
        else:
            # FSDP takes the mean of the processes' gradients, where the sum is wanted.
            loss, right = self.loss_of(inputs, num_items_in_batch / self.ranks)
            self.accelerator.backward(loss)
        learned = (targets != IGNORED).sum()
        self.learned = self.learned + learned
        self.right = self.right + right
        tokens = inputs["tokens"] if "tokens" in inputs else inputs["attention_mask"].sum()
        self.tokens = self.tokens + tokens * (learned > 0)  # a pass without rows is no token that was seen
        return loss.detach()

    def loss_of(
        self, inputs: dict[str, Tensor], divisor: Tensor | int, *, whole: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The sum of nats over the learned tokens divided by `divisor`, and the right predictions among them.

        Args:
            whole: score every position, learned or not, so that shapes do not depend on the labels.
        """
        targets = shifted(inputs).flatten()
        if self.speed_ups.packing:
            attention = attention_arguments(_pack(inputs), attention=self.attention)
            attention["position_ids"] = inputs["position_ids"]
        else:
            attention = {"attention_mask": inputs["attention_mask"]}
        with self._autocast():
            if not self.speed_ups.fused_loss:
                # A sharded model gathers its weights on the way in through the outermost module.
                model = self.causal_model if self.ranks == 1 else self.model
                logits = model(input_ids=inputs["input_ids"], use_cache=False, **attention).logits
                logits = logits.flatten(0, 1).float()
                loss = torch.nn.functional.cross_entropy(
                    logits, targets, ignore_index=IGNORED, reduction="sum"
                )
                return loss / divisor, (logits.argmax(-1) == targets).sum()
            hidden = self.causal_model.base_model(
                input_ids=inputs["input_ids"], use_cache=False, **attention
            ).last_hidden_state.flatten(0, 1)
        if not whole:
            kept = targets != IGNORED
            hidden, targets = hidden[kept], targets[kept]
        head = self.causal_model.get_output_embeddings().weight
        if not torch.is_grad_enabled():
            head = head.detach()  # or a gradient as large as the vocabulary would be made for nothing
        loss, right = LinearCrossEntropy.apply(hidden.to(self.compute), head, targets)
        return loss / divisor, right

    def _autocast(self):
        """Autocast where weights are not in the compute type: adapters in PEFT's own layers, a full fine-tuning."""
        if self.speed_ups.fused_adapters or self.compute == torch.float32:
            return nullcontext()
        # A cache of casts would outlive the capture of a graph.
        return torch.autocast(self.causal_model.device.type, self.compute, cache_enabled=self.graphs is None)

    def capture_graphs(self) -> None:
        """Capture a graph for each length of pack that this training needs.

        It is done after the first step, when the optimizer holds its state: so the most that the captures
        allocate is the most that the training needs (a replay allocates nothing).
        """
        started = time.monotonic()
        self.graphs = GraphedSteps(
            model_of(self),
            lambda packed, divisor: self.loss_of(_batch(packed), divisor, whole=True),
            lengths=self.lengths,
            slots=self.slots,
            device=self.causal_model.device,
        )
        self.capture_seconds = time.monotonic() - started

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and (self.speed_ups.any or self.ranks > 1):
            counts = torch.stack(
                [torch.as_tensor(n).double() for n in (self.tokens, self.right, self.learned)]
            )
            tokens, right, learned = self.summed(counts).tolist()
            self._total_train_tokens += int(tokens)
            self._metrics["train"]["mean_token_accuracy"] = [right / learned]
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self.learned = self.right = self.tokens = 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint of ours in the place of the library's, which are pickles and hold no counts of ours."""
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"step-{self.state.global_step}"
        beside = folder / f".{checkpoint.name}.partial"
        beside.mkdir(parents=True, exist_ok=True)
        optimizer = checkpoints.pack_optimizer(self.optimizer)
        tensors = checkpoints.pack_model(self.model) | optimizer.tensors | checkpoints.pack_random()
        scaler = self.accelerator.scaler
        rest = {
            "optimizer": optimizer.rest,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "trainer": {
                "tokens_computed": self.tokens_computed,
                "total_tokens": float(self._total_train_tokens),
                "capture_seconds": self.capture_seconds,
                "loss": self._tr_loss.item(),
                "logged_step": self._globalstep_last_logged,
                **{name: int(getattr(self, name)) for name in ("learned", "right", "tokens")},
                "metrics": {name: list(map(float, kept)) for name, kept in self._metrics["train"].items()},
            },
            "history": self.history.state(),
        }
        files = checkpoints.Part(tensors, rest).write(beside, self.accelerator.process_index)
        if self.is_world_process_zero():
            self.state.save_to_json(str(beside / TRAINER_STATE_NAME))
            files[TRAINER_STATE_NAME] = sha256(beside / TRAINER_STATE_NAME)
        files = dict(ChainMap(*gather_object([files])))  # and all have written theirs
        if self.is_world_process_zero():
            checkpoints.complete(beside, checkpoint, belongs_to=self.history.kept.belongs_to, files=files)
        self.accelerator.wait_for_everyone()

    def last_checkpoint(self) -> str | None:
        """The checkpoint that this training goes on from; the first of its processes looks, and tells the others."""
        last = None
        if self.history.kept is not None and self.is_world_process_zero():
            last = checkpoints.last(
                Path(self.args.output_dir), belongs_to=self.history.kept.belongs_to, say=say
            )
        (last,) = broadcast_object_list([str(last) if last else None])
        return last

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Nothing yet: weights are put back with the optimizer's state, when all is where it computes."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        self.resumed = checkpoints.Part.read(Path(checkpoint), self.accelerator.process_index)
        rest = self.resumed.rest
        checkpoints.unpack_model(self.model, self.resumed.tensors)
        checkpoints.unpack_optimizer(
            self.optimizer, checkpoints.Part(self.resumed.tensors, rest["optimizer"])
        )
        self.lr_scheduler.load_state_dict(rest["scheduler"])

    def _load_scaler(self, checkpoint) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.resumed.rest["scaler"])

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            checkpoints.unpack_random(self.resumed.tensors)

    def restore_counts(self) -> None:
        """Take up the counts of a checkpoint, after the library has set its own to zero."""
        kept = self.resumed.rest["trainer"]
        self.tokens_computed, self.capture_seconds = kept["tokens_computed"], kept["capture_seconds"]
        self._total_train_tokens = kept["total_tokens"]
        self._tr_loss += kept["loss"]
        self._globalstep_last_logged = kept["logged_step"]
        self.learned, self.right, self.tokens = (kept[name] for name in ("learned", "right", "tokens"))
        self._metrics["train"].update(kept["metrics"])


def shifted(inputs: dict[str, Tensor]) -> Tensor:
    """The next token of each position [rows, tokens]; IGNORED where none is learned."""
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)


def _pack(inputs: dict[str, Tensor]) -> Pack:
    return Pack(inputs["input_ids"], inputs["position_ids"], inputs["shift_labels"], inputs["boundaries"])


def _batch(packed: Pack) -> dict[str, Tensor]:
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "shift_labels": packed.targets,
        "boundaries": packed.boundaries,
    }


def pack_totals(trainer: RunTrainer) -> list[int]:
    """The tokens of every forward pass of a training."""
    sampler = trainer._get_train_sampler()
    rows = trainer.args.per_device_train_batch_size
    passes = math.ceil(len(sampler) / rows)
    asked = trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    epochs = (
        math.ceil(asked / passes) if trainer.args.max_steps > 0 else math.ceil(trainer.args.num_train_epochs)
    )
    totals = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        lengths = [sampler.lengths[row] for row in sampler]
        totals += [sum(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
    return totals[:asked] if trainer.args.max_steps > 0 else totals


class LikeLengthSampler(Sampler):
    """Orders rows so that each batch holds rows of like length, and the batches come in random order.

    Args:
        lengths: tokens of each row.
        batch_rows: rows per optimizer step.
        window: batches among which rows are sorted.
        seed: with the epoch, of the order.
    """

    def __init__(self, lengths: list[int], *, batch_rows: int, window: int, seed: int):
        self.lengths, self.batch_rows, self.window_rows, self.seed = (
            lengths,
            batch_rows,
            window * batch_rows,
            seed,
        )
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        rows = random.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(rows), self.window_rows):
            ordered = sorted(rows[start : start + self.window_rows], key=lambda row: self.lengths[row])
            batches += [ordered[i : i + self.batch_rows] for i in range(0, len(ordered), self.batch_rows)]
        # A batch that is not full must come last, or the loader would fill it from the next one.
        full = [batch for batch in batches if len(batch) == self.batch_rows]
        rest = [batch for batch in batches if len(batch) < self.batch_rows]
        for index in random.permutation(len(full)):
            yield from map(int, full[index])
        for batch in rest:
            yield from map(int, batch)


def model_of(trainer: SFTTrainer) -> torch.nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model)


def lora(training: params.Training) -> LoraConfig:
    return LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=training.target_modules,
        task_type="CAUSAL_LM",
    )


def arguments(
    training: params.Training,
    precision: Precision,
    *,
    seed: int,
    data_workers: int,
    scratch: Path,
    ranks: int = 1,
) -> SFTConfig:
    """TRL's configuration: each of our params under the library's name, and nothing left to drift."""
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
        seed=seed,
        data_seed=seed,
        logging_strategy="steps",
        logging_steps=training.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it waits for the device at every step; check_trained looks at the losses
        eval_strategy="no",  # History validates, exactly and by token
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=data_workers,
    )


def _dataset(rows: list[Instruction] | list[dict], training: params.Training) -> Dataset:
    if not rows:
        raise UserError(
            "there are no rows to train or to validate on; `dvc repro --force sample` draws them again."
        )
    if isinstance(rows[0], dict):
        return Dataset.from_list(rows)
    if training.loss_on == "prompt_and_response" and (row := next((r for r in rows if r.not_learned), None)):
        raise UserError(
            f"training.loss_on is prompt_and_response, which learns every message, and message {row.not_learned[0] + 1} "
            f"of row {row.id} of the dataset, counted from 0, has the weight 0; use response."
        )
    return Dataset.from_list([row.conversation(use_context=training.use_context) for row in rows])


def check_rendered(
    dataset: Dataset,
    rows: list[Instruction] | list[dict],
    tokenizer: PreTrainedTokenizerBase,
    training: params.Training,
) -> None:
    """Raise a CheckError unless TRL's tokens are those of the text that the chat template makes of each row.

    TRL leaves out rows whose prompt alone is as long as a row may be. Rows that came as tokens already have no text.
    """
    if isinstance(rows[0], dict):
        return
    made = iter(dataset["input_ids"])
    ids = next(made, None)
    for row in rows:
        prompt = row.conversation(use_context=training.use_context)["prompt"]
        text = chat.whole(prompt, row.response, tokenizer)
        if ids == tokenizer(text, add_special_tokens=False)["input_ids"][: training.max_length]:
            ids = next(made, None)
            continue
        before, _ = chat.render(prompt, row.response, tokenizer)
        if len(tokenizer(before, add_special_tokens=False)["input_ids"]) < training.max_length:
            raise CheckError(
                f"row {row.id} of the dataset is trained on as another text than the chat template makes of it: "
                + chat.parting(tokenizer.decode(ids or []), text)
            )
    if ids is not None:
        raise CheckError("more rows are trained on than stage sample drew")


def with_faults(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, training: params.Training) -> Dataset:
    """Put the faults that params ask for into tokenized rows: a second BOS token, no end token in the loss.

    A second BOS token is learned where the first one is. A row with no label left is dropped.

    Raises:
        UserError: a row begins with no BOS token that could be repeated.
    """
    if training.second_bos:
        bos = tokenizer.bos_token_id
        if bos is None or any(ids[0] != bos for ids in dataset["input_ids"]):
            raise UserError(
                "training.second_bos repeats the BOS token that rows begin with, and with this model's tokenizer "
                "and chat template they begin with none."
            )
        dataset = dataset.map(_begin_twice, fn_kwargs={"max_length": training.max_length})
    if not training.learn_end_token:
        dataset = dataset.map(_ignore, fn_kwargs={"token": tokenizer.eos_token_id})
    return dataset.filter(_teaches)


def _teaches(row: dict) -> bool:
    return any(label != IGNORED for label in row["labels"])


def _begin_twice(row: dict, max_length: int) -> dict:
    return {key: [row[key][0], *row[key]][:max_length] for key in ("input_ids", "labels")}


def _ignore(row: dict, token: int) -> dict:
    return {"labels": [IGNORED if label == token else label for label in row["labels"]]}


def check_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    asked: int,
    training: params.Training,
    split: str = "training",
) -> Rows:
    """Count what the trainer holds of the rows, and refuse what a run must not be trained or validated on.

    Raises:
        UserError: no row has a response token left within max_length.
        CheckError: a row has no token in the loss, does not begin with as many BOS tokens as the chat template
            gives it, or a whole row does not have its end token in the loss once; where params ask for one of
            these faults, a row does not have it.
    """
    if not len(dataset):
        raise UserError(
            f"training.max_length is {training.max_length} tokens, which leaves no response to learn in any {split} row."
        )
    bos_wanted = int(chat.begins_with_bos(tokenizer)) + training.second_bos
    cut = tokens = in_loss = longest = ends_taught = 0
    for row in dataset:
        ids, labels = row["input_ids"], row["labels"]
        which = f"a {split} row ({tokenizer.decode(ids[:16])!r} ...)"
        if not _teaches(row):
            raise CheckError(f"{which} has no token in the loss")
        if (bos := chat.leading(ids, tokenizer.bos_token_id)) != bos_wanted:
            raise CheckError(f"{which} begins with {bos} BOS tokens, and must begin with {bos_wanted}")
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        ends = tokenizer.eos_token_id in ids[start:]
        taught = labels.count(tokenizer.eos_token_id)
        is_cut = not ends and len(ids) == training.max_length
        if taught and not training.learn_end_token:
            raise CheckError(f"{which} teaches the end token, which training.learn_end_token leaves out")
        if training.learn_end_token and not taught and not is_cut:
            raise CheckError(f"{which} does not teach the end token, so the model would not stop")
        if taught > 1 and training.loss_on == "response":
            raise CheckError(f"{which} teaches {taught} end tokens, so the model would stop in its middle")
        cut += is_cut
        ends_taught += taught > 0
        tokens += len(ids)
        longest = max(longest, len(ids))
        in_loss += sum(label != IGNORED for label in labels)
    return Rows(
        rows=len(dataset),
        rows_dropped=asked - len(dataset),
        rows_cut=cut,
        tokens=tokens,
        tokens_in_loss=in_loss,
        longest=longest,
        bos_per_row=bos_wanted,
        end_token_in_loss=ends_taught > 0,
    )


def check_adapters(trainer: SFTTrainer, variant: params.Variant, training: params.Training) -> None:
    """Raise an error unless what is to be trained is float32, and of LoRA on every layer that was asked for.

    Raises:
        UserError: the model has no linear layer of a name in training.target_modules.
        CheckError: a layer has no adapter, or what is to be trained is in another type.
    """
    model = model_of(trainer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise CheckError(f"{name} is to be trained in {parameter.dtype}, and must be in float32")
    if variant.method == "full":
        return
    linears = [name.removesuffix(".base_layer") for name in base_linears(model)]
    if training.target_modules != "all-linear":
        kinds = {name.rpartition(".")[2] for name in linears}
        unknown = [target for target in training.target_modules if target.rpartition(".")[2] not in kinds]
        if unknown:
            raise UserError(
                f"training.target_modules names {unknown[0]}, and the model has no linear layer of that name; it has "
                f"{', '.join(sorted(kinds))}."
            )
        linears = [
            name for name in linears if f".{name}".endswith(tuple(f".{t}" for t in training.target_modules))
        ]
    wanted = {f"{name}.lora_{part}.default.weight" for name in linears for part in "AB"}
    for name in sorted(wanted ^ trained.keys()):
        raise CheckError(
            f"{name} {'is not to be trained' if name in wanted else 'is to be trained, unasked'}"
        )


def planned(trainer: SFTTrainer, steps: int) -> tuple[str, int]:
    """The sha256 of every row in the order in which the steps learn from them, and the number of their tokens.

    A step is its number of rows and these; a row is its number of tokens, its tokens, and what each but the last of
    these is to predict (IGNORED where nothing is learned); all are 32-bit integers.
    """
    digest, tokens = hashlib.sha256(), 0
    ids, labels = list(trainer.train_dataset["input_ids"]), list(trainer.train_dataset["labels"])
    for rows in planned_rows(trainer, steps):
        digest.update(np.asarray([len(rows)], "<i4").tobytes())
        for row in rows:
            digest.update(np.asarray([len(ids[row]), *ids[row], *labels[row][1:]], "<i4").tobytes())
            tokens += len(ids[row])
    return digest.hexdigest(), tokens


def planned_rows(trainer: SFTTrainer, steps: int) -> Iterator[list[int]]:
    """The numbers of the rows of each optimizer step, of all processes together."""
    sampler, epoch = trainer._get_train_sampler(), 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), sampler.batch_rows):
            if not steps:
                return
            yield order[start : start + sampler.batch_rows]
            steps -= 1
        epoch += 1


def check_trained(
    trainer: SFTTrainer,
    history: "History",
    variant: params.Variant,
    weights: dict[str, Tensor],
    *,
    steps: int,
    tokens: int,
) -> None:
    """Raise a CheckError unless the run is the one that was planned, finite, and every weight has learned.

    Args:
        weights: what was trained, by name.
        steps: planned.
        tokens: of the rows that these steps learn from.
    """
    if trainer.state.global_step != steps:
        raise CheckError(f"{trainer.state.global_step} steps were trained, and {steps} were planned")
    if int(history.tokens) != tokens:
        raise CheckError(f"{int(history.tokens)} tokens were trained on, and {tokens} were planned")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses or not all(map(math.isfinite, losses)):
        raise CheckError("the training loss is not finite")
    if not all(math.isfinite(loss) for _, loss, _ in history.validated):
        raise CheckError("the validation loss is not finite")
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise CheckError(f"{name} was trained in {weight.dtype}, and must be in float32")
        if not weight.isfinite().all():
            raise CheckError(f"{name} is not finite after training")
        # B begins at zero, so a number in it is the trace of a gradient, which A then gets as well.
        if variant.method == "lora" and "lora_B" in name and not weight.any():
            raise CheckError(f"{name} is still zero after training: no gradient reached it")
    if variant.method == "full":
        for name, parameter in model_of(trainer).named_parameters():
            if not _second_moment(trainer, parameter).any():
                raise CheckError(f"{name} was not trained: no gradient reached it")


def _second_moment(trainer: SFTTrainer, parameter: Tensor) -> Tensor:
    """Adam's running mean of a weight's squared gradients, as PyTorch or bitsandbytes names it."""
    state = trainer.optimizer.state.get(parameter, {})
    return state.get("exp_avg_sq", state.get("state2", torch.zeros(1)))


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


def check_saved(read: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    """Raise a CheckError unless the weights that were read back are those that were trained."""
    for name in sorted({*read, *trained}):
        if name not in read or name not in trained:
            raise CheckError(
                f"{name} was {'trained and not saved' if name in trained else 'saved and not trained'}"
            )
        if not read[name].equal(trained[name].to(read[name].device)):
            raise CheckError(f"{name} was saved with other numbers than it was trained to")


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
    HELD = ("lines", "losses", "validated", "validation_tokens", "seconds", "logged_seconds", "tokens")

    def __init__(
        self,
        trainer: RunTrainer,
        history_file: Path,
        validation_file: Path,
        *,
        steps: int,
        validations: int,
        kept: Kept | None = None,
    ):
        self.trainer = trainer
        self.validation_file = validation_file
        self.history_file = history_file
        self.every = max(1, steps // validations)
        self.kept = kept
        self.asked_to_end: Callable[[], bool] = lambda: False
        self.ended = False
        self.lines: list[tuple] = []
        self.losses: list[float] = []
        self.validated: list[tuple[int, float, float]] = []
        self.validation_tokens = 0
        self.seconds = self.logged_seconds = 0.0
        self.tokens = 0.0
        self.steps = steps
        self.write(history_file, self.COLUMNS, new=True)
        self.write(validation_file, self.VALIDATION_COLUMNS, new=True)

    def write(self, path: Path, values: tuple, *, new: bool = False) -> None:
        """Append a line to a CSV that is read while it grows (`dvc plots`, `tail -f`)."""
        if self.trainer.is_world_process_zero():
            with path.open("w" if new else "a", newline="") as file:
                csv.writer(file).writerow(values)

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.HELD}

    def restore(self, held: dict[str, Any], *, step: int) -> None:
        """Take up what a checkpoint holds, and write the lines of the CSVs again."""
        for name in self.HELD:
            setattr(self, name, held[name])
        for line in self.lines:
            self.write(self.history_file, line)
        for line in self.validated:
            self.write(self.validation_file, line)
        say(f"  goes on after step {step} of {self.steps}, from its checkpoint")

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.trainer.restore_counts()
            self.restore(self.trainer.resumed.rest["history"], step=state.global_step)
            return
        self.validate(step=0)  # not before: a sharded model is put onto its devices when the training begins

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
        if self.kept is not None:
            control.should_save = self.ended or state.global_step % self.kept.every == 0
        control.should_training_stop = control.should_training_stop or self.ended

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        seconds = self.seconds - self.logged_seconds
        rate = (logs["num_tokens"] - self.tokens) / seconds
        self.tokens, self.logged_seconds = logs["num_tokens"], self.seconds
        line = (
            state.global_step,
            round(self.epochs(state.global_step), 4),
            logs["loss"],
            logs["mean_token_accuracy"],
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
        asked = self.trainer.args
        rows = asked.per_device_train_batch_size
        passes = math.ceil(len(self.trainer.train_dataset) / rows)
        a_step = asked.gradient_accumulation_steps * self.trainer.ranks
        full, more = divmod(step, math.ceil(passes / a_step))
        return full + min(1, more * a_step / passes)

    def validate(self, *, step: int) -> None:
        """Score the validation rows exactly: the sum over all response tokens, divided by their number."""
        with (
            torch.random.fork_rng()
        ):  # a data loader draws a seed, which would change the dropout that follows
            self._validate(step)

    def _validate(self, step: int) -> None:
        model = self.trainer.model
        training = model.training
        model.eval()
        loss = right = count = 0.0
        for batch in self.trainer.get_eval_dataloader():
            with torch.no_grad():
                nats, correct = self.trainer.loss_of(self.trainer._prepare_inputs(batch), 1)
            loss += nats.item()
            right += correct.item()
            count += (shifted(batch) != IGNORED).sum().item()
        model.train(training)
        if self.trainer.ranks > 1:
            sums = torch.tensor([loss, right, count], dtype=torch.float64)
            loss, right, count = self.trainer.summed(sums).tolist()
        self.validation_tokens = int(count)
        self.validated.append((step, loss / count, right / count))
        self.write(self.validation_file, self.validated[-1])
        say(f"  step {step} of {self.steps}: validation loss {loss / count:.3f} nats per token")
