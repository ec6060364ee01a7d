"""What must hold before a training, after it, and of the files that it leaves."""

import math

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from workflow import params
from workflow.methods import Method, initializations
from workflow.models.load import LoadedPrecision, base_linears, choose_compute, choose_device
from workflow.runtime import launch
from workflow.runtime.errors import CheckError, UserError
from workflow.training.sharding import whole
from workflow.training.trainer import RunTrainer, model_of


def check_possible(training: params.Training, hardware: params.Hardware) -> None:
    """Raise a UserError if this device cannot do what the training params ask for."""
    if training.optimizer.startswith("paged_") and choose_device(hardware).type == "cpu":
        raise UserError(
            f"training.step.optimizer is {training.optimizer}, which pages its state between GPU and host memory; "
            "on a CPU use adamw_torch."
        )


def check_model_fits(model: PreTrainedModel, training: params.Training) -> None:
    """Raise a UserError if rows may be longer than the model's context, or no layer has a name that is to be adapted."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and training.max_length > context:
        raise UserError(
            f"training.step.max_length is {training.max_length} tokens, and the model's context (max_position_embeddings) "
            f"holds {context}."
        )
    linear = base_linears(model)
    narrowest = min(min(layer.in_features, layer.out_features) for layer in linear.values()) if linear else 0
    if initializations.get(training.initialization).of_the_base and training.rank > narrowest:
        raise UserError(
            f"training.step.rank is {training.rank} and initialization {training.initialization}, which finds no more than "
            f"{narrowest} directions in the model's narrowest layer."
        )
    for target in [] if training.target_modules == "all-linear" else training.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            last = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"training.step.target_modules names {target}, and no linear layer of the model has that name; they are "
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


def check_trainable(model: torch.nn.Module, method: Method, training: params.Training) -> None:
    """Raise an error unless the weights that the method trains, and no others, are to be trained, in float32.

    Raises:
        UserError: the model has no linear layer of a name in training.target_modules.
        CheckError: another weight is to be trained or one is not, or it is in another type.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise CheckError(f"{name} is to be trained in {parameter.dtype}, and must be in float32")
    expected = method.expected(model, _targets(model, training) if method.leaves_adapter else [])
    for name in sorted(expected ^ trained.keys()):
        raise CheckError(
            f"{name} {'is not to be trained' if name in expected else 'is to be trained, unasked'}"
        )


def _targets(model: torch.nn.Module, training: params.Training) -> list[str]:
    """The names of the linear layers that training.step.target_modules selects."""
    linears = [name.removesuffix(".base_layer") for name in base_linears(model)]
    if training.target_modules == "all-linear":
        return linears
    kinds = {name.rpartition(".")[2] for name in linears}
    unknown = [target for target in training.target_modules if target.rpartition(".")[2] not in kinds]
    if unknown:
        raise UserError(
            f"training.step.target_modules names {unknown[0]}, and the model has no linear layer of that name; it has "
            f"{', '.join(sorted(kinds))}."
        )
    ends = tuple(f".{target}" for target in training.target_modules)
    return [name for name in linears if f".{name}".endswith(ends)]


class Diverged(CheckError):
    """A loss or a weight is not finite."""


def check_trained(
    trainer: RunTrainer, method: Method, weights: dict[str, Tensor], *, steps: int, tokens: int
) -> None:
    """Raise a CheckError unless the run is the one that was planned, finite (`Diverged`), and every weight has learned.

    Args:
        weights: what was trained, by name.
        steps: planned.
        tokens: of the rows that these steps learn from.
    """
    history = trainer.history
    if trainer.state.global_step != steps:
        raise CheckError(f"{trainer.state.global_step} steps were trained, and {steps} were planned")
    if history.tokens != tokens:
        raise CheckError(f"{history.tokens} tokens were trained on, and {tokens} were planned")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not losses or not all(map(math.isfinite, losses)):
        raise Diverged("the training loss is not finite")
    if not all(math.isfinite(loss) for _, loss, _ in history.validated):
        raise Diverged("the validation loss is not finite")
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise CheckError(f"{name} was trained in {weight.dtype}, and must be in float32")
        if not weight.isfinite().all():
            raise Diverged(f"{name} is not finite after training")
    parameters = dict(model_of(trainer).named_parameters())
    method.check_learned(weights, lambda name: _second_moment(trainer.optimizer, parameters[name]))


def _second_moment(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Adam's running mean of a weight's squared gradients, as PyTorch or bitsandbytes names it."""
    state = optimizer.state.get(parameter, {})
    return whole(state.get("exp_avg_sq", state.get("state2", torch.zeros(1))))


def check_saved(read: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    """Raise a CheckError unless the weights that were read back are those that were trained."""
    for name in sorted({*read, *trained}):
        if name not in read or name not in trained:
            raise CheckError(
                f"{name} was {'trained and not saved' if name in trained else 'saved and not trained'}"
            )
        if not read[name].equal(trained[name].to(read[name].device)):
            raise CheckError(f"{name} was saved with other numbers than it was trained to")


def is_deterministic(precision: LoadedPrecision) -> bool:
    """Whether the same params on the same machine give the same bits again.

    On a CPU they do, in every precision. On a GPU, cuBLAS' and bitsandbytes' kernels may add up in
    another order each time, so there it takes PyTorch's own switch, which this pipeline does not set.
    """
    return precision.device == "cpu" or torch.are_deterministic_algorithms_enabled()
