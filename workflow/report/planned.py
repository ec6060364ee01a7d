"""The memory that this run's variants would need at the shape of a larger model, predicted without running it."""

from dataclasses import dataclass, fields
from pathlib import Path

from workflow import methods, params, precisions
from workflow.cost import memory
from workflow.runtime.files import read_json

SHAPE = "llama2_7b"  # of a size that most of the published comparisons use


@dataclass(frozen=True)
class Planned:
    """The GiB that each variant needs at a shape, by variant's name.

    Attributes:
        parameters: of the shape.
        tokens: of a forward pass, which is one row of the training's greatest length.
        training: the smaller peak of those with and without gradient checkpointing.
        weights: as the base is held in training.
        in_16_bits: GiB of the weights of a model that was merged into 16 bits.
    """

    shape: str
    parameters: int
    tokens: int
    training: dict[str, float]
    weights: dict[str, float]
    in_16_bits: float


def plan(settings: params.Params, shape: str = SHAPE) -> Planned | None:
    """Predict what the experiment's variants need at a shape. None if their training is not one that is predicted."""
    trainings = {name: settings.training_of(name) for name in settings.experiment.variants}
    if not all(memory.describes(training) for training in trainings.values()):
        return None
    sizes = shape_of(params.SHAPES / f"{shape}.json")
    variants = settings.variants
    return Planned(
        shape=shape,
        parameters=sizes.parameters,
        tokens=max(training.max_length for training in trainings.values()),
        training={name: _training(sizes, variants[name], training) for name, training in trainings.items()},
        weights={name: _weights(sizes, variants[name]) for name in trainings},
        in_16_bits=2 * sizes.parameters / memory.GIB,
    )


def _training(sizes: memory.Shape, variant: params.Variant, training: params.Training) -> float:
    """The smaller peak in GiB, with the allocator's fragments."""
    peaks = [
        memory.predict(
            sizes,
            variant,
            training.model_copy(update={"gradient_checkpointing": checkpointing}),
            tokens=training.max_length,
        ).total
        for checkpointing in (False, True)
    ]
    return min(peaks) * memory.FRAGMENTS / memory.GIB


def _weights(sizes: memory.Shape, variant: params.Variant) -> float:
    """GiB of the base as it is served; one that is not quantized is served in 16 bits."""
    if methods.get(variant.method).master_weights or not precisions.get(variant.precision).is_quantized:
        return 2 * sizes.parameters / memory.GIB
    return sum(memory.weights(sizes, variant)) / memory.GIB


@dataclass(frozen=True)
class _Config:
    """The keys of a config.json, with the defaults of transformers. Its own reader would import torch."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False

    def get_text_config(self) -> "_Config":
        return self


def shape_of(config: Path) -> memory.Shape:
    """The shape of a Llama-like model from its config.json."""
    known = {field.name for field in fields(_Config)}
    return memory.Shape.of(_Config(**{k: v for k, v in read_json(config).items() if k in known}))
