"""Try each variant of an experiment on a few layers of its model, before anything is trained.

The limits of an architecture appear only when its layers are quantized, adapted and executed: experts in a single
tensor, layers of a custom class, or an attention that PyTorch has no function for. The trial loads a copy with random
weights, the model's widths and as few layers as include every kind, and trains it for one step like a run.
"""

import re
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, TrainerCallback

from workflow import methods, params, precisions
from workflow.cost import architecture
from workflow.data.model_files import read_config, reason
from workflow.fetch.convert import byte_tokenizer
from workflow.methods import Method
from workflow.models.load import choose_device, linear_names, load_base
from workflow.precisions.dynamic import layers_in_16_bits
from workflow.runtime.errors import CheckError, UserError
from workflow.training.checks import check_model_fits, check_trainable
from workflow.training.train import build_trainer
from workflow.training.trainer import model_of

FEWEST_LAYERS, VOCABULARY, LENGTHS = 2, 512, (12, 9)
# The share of the weights that may lie outside of linear layers (positions, routers) if these are quantized or adapted.
LARGEST_REST = 0.05
CPU = params.Hardware(device="cpu", compute_dtype="float32", data_workers=0)


def try_variants(model_folder: Path, experiment: params.Params) -> None:
    """Load and train a small copy of the model for a step, in each variant of the experiment.

    Raises:
        UserError: there is no model, its attention is not supported in training, or a variant does not work with this
            architecture; the sentence names each variant and its reason.
    """
    problems: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        full = read_config(model_folder / "config.json")
        model = architecture.build(full)
        architecture.check_attention(model)
        try:
            config = small_config(full)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(scratch)
        except Exception as error:  # each architecture has code of its own
            raise UserError(
                f"two layers of the model cannot be made and stored to try the variants on: {reason(error)}."
            ) from None
        rest = outside(model)
        for name in experiment.experiment.variants:
            try:
                variant = in_trial(experiment.variants[name], full, config, hardware=experiment.hardware)
                problem = try_variant(Path(scratch), variant, experiment.training_of(name), rest=rest)
            except UserError as error:
                problem = str(error).rstrip(".")
            if problem:
                problems.setdefault(problem, []).append(name)
    if problems:
        reasons = "; ".join(f"{', '.join(names)}: {problem}" for problem, names in problems.items())
        raise UserError(
            f"this model does not go with every variant of the experiment, tried on a few of its layers: {reasons}. "
            "Take them out of experiment.variants, or choose another model."
        )


def in_trial(
    variant: params.Variant,
    full: PreTrainedConfig,
    small: PreTrainedConfig,
    *,
    hardware: params.Hardware,
) -> params.Variant:
    """Return the variant as it can be tried on a CPU, where a block must not reach over two rows of a weight.

    Of its layers in 16 bits it has those of the small copy, as long as some are quantized. Where the runs are on a GPU,
    blocks are of the smallest size.

    Raises:
        UserError: the full model has no layer of such a name.
    """
    names = linear_names(small, variant)
    plain = layers_in_16_bits(linear_names(full, variant), variant.layers_in_16_bits)
    here = [name for name in plain if name in names]
    tried = variant.keeping(here if len(here) < len(names) else [])
    sizes = precisions.get(variant.precision).block_sizes
    if sizes and choose_device(hardware).type != "cpu":
        tried = tried.model_copy(update={"block_size": sizes[0]})
    return tried


def try_variant(folder: Path, variant: params.Variant, training: params.Training, *, rest: str) -> str:
    """Say why a variant cannot be trained on the model in `folder`; empty if it can.

    Args:
        rest: the part of the model that can be neither quantized nor adapted, as `outside` describes it.
    """
    if rest and (
        precisions.get(variant.precision).is_quantized
        or (methods.get(variant.method).leaves_adapter and training.target_modules == "all-linear")
    ):
        return rest
    # The trial has its own rows and a single step, so it fixes batch, optimizer and schedule.
    training = training.model_copy(
        update={
            "steps": 1,
            "epochs": None,
            "batch_rows": len(LENGTHS),
            "micro_batch_rows": len(LENGTHS),
            "optimizer": "adamw_torch",
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "learn_end_token": True,
            "second_bos": False,
        }
    )
    alone = variant.model_copy(update={"processes": 1, "compute_dtype": None})
    run = params.Run("trial", alone, 1, training, CPU)
    try:
        model, precision = load_base(folder, alone, hardware=CPU, on_any_device=True)
        check_model_fits(model, training)
        rows = [{"input_ids": ids, "labels": ids} for ids in map(_ids, LENGTHS)]
        with tempfile.TemporaryDirectory() as scratch:
            trainer = build_trainer(
                model,
                byte_tokenizer(vocabulary=VOCABULARY, max_positions=training.max_length),
                run,
                train_rows=rows,
                validation_rows=rows[:1],
                precision=precision,
                scratch=Path(scratch),
            )
            check_trainable(model_of(trainer), run.method, training)
            trainer.add_callback(gradients := Gradients(run.method))
            trainer.train()
    except (UserError, CheckError) as error:
        return str(error).replace(f"{folder} holds no model that can be loaded: ", "").rstrip(".")
    except Exception as error:  # each architecture has code of its own
        return f"{type(error).__name__}: {reason(error)}"
    return gradients.problem


class Gradients(TrainerCallback):
    """Checks the gradients of the first step; `problem` names a weight without a finite, nonzero gradient."""

    def __init__(self, method: Method):
        self.method = method
        self.problem = "no step was trained"

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.problem = ""
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or not self.method.learns_at_once(name):
                continue
            if parameter.grad is None or not parameter.grad.any():
                self.problem = f"no gradient reaches {name}"
            elif not parameter.grad.isfinite().all():
                self.problem = f"the gradient of {name} is not finite"


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration with the same widths, a small vocabulary, and as few layers as include every kind."""
    layers = config.get_text_config().num_hidden_layers
    kinds = _kinds(config)
    for count in range(min(FEWEST_LAYERS, layers), layers):
        small = _cut(config, layers=count)
        try:
            if _kinds(small) == kinds:
                return small
        except UserError:
            continue  # a pattern of layers that needs more layers
    return _cut(config, layers=layers)


def outside(model: torch.nn.Module) -> str:
    """Describe the part of a model that is neither quantized nor adapted, to end a sentence; empty if it is negligible."""
    large = architecture.outside_linears(model)
    share = sum(p.numel() for p in large.values()) / architecture.parameters(model)
    if share <= LARGEST_REST:
        return ""
    name = max(large, key=lambda name: large[name].numel())
    shape = " x ".join(map(str, large[name].shape))
    return (
        f"{share:.0%} of the weights lie outside of linear layers and embeddings ({name} is one tensor of {shape}), where "
        "nothing is quantized or adapted"
    )


def _kinds(config: PreTrainedConfig) -> set[tuple]:
    """Name and class of every module, and name and dimensions of every weight, without layer and expert numbers."""
    model = architecture.build(config)
    modules = {(_unnumbered(name), type(module)) for name, module in model.named_modules()}
    return modules | {(_unnumbered(name), p.dim()) for name, p in model.named_parameters()}


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".#", name)


def _cut(config: PreTrainedConfig, *, layers: int) -> PreTrainedConfig:
    """Return the configuration with its first layers only, and with a small vocabulary."""
    small = type(config).from_dict(config.to_dict())
    text = small.get_text_config()
    full = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full:
            setattr(text, key, value[:layers])  # such as layer_types
    text.num_hidden_layers = layers
    text.vocab_size = VOCABULARY
    for part in (small, text):
        part.pad_token_id = part.bos_token_id = part.eos_token_id = None
    return small


def _ids(length: int) -> list[int]:
    return [3 + 7 * position % (VOCABULARY - 3) for position in range(length)]
