"""Predict the memory that a training needs on a GPU, by component, from a model's configuration alone.

Nothing is measured here. Each component is counted in bytes from the tensors that a step of this project
allocates with every speed-up on (workflow/training/speed/). `results/hardware/` has predictions next to measured peaks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import TYPE_CHECKING

from workflow import methods, params, precisions
from workflow.methods.lora import adapted
from workflow.precisions import dynamic
from workflow.training.speed.chunks import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # it takes seconds to import

GIB = 2**30
ALLOCATION = 512  # PyTorch's CUDA allocator rounds every tensor up to this many bytes
# Bytes of a workspace on Hopper (PyTorch, CUDABlas.cpp); less on older GPUs. cuBLAS and cuBLASLt each have one for the
# default stream and one for the stream on which graphs are captured.
WORKSPACE = 32 * 2**20
ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
)  # the linear layers of a decoder layer's attention; the others are its MLP's
ADAM_STATES = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 0, "paged_adamw_8bit": 0}


@dataclass(frozen=True)
class Shape:
    """The sizes in a Llama-like model's configuration that determine its memory and operations."""

    layers: int
    hidden: int
    intermediate: int
    query: int  # heads x size of a head
    key_value: int
    heads: int
    vocabulary: int
    tied: bool
    others: int | None = None  # parameters of norms and biases, if they were counted in the model itself
    query_key_norms: bool = False  # query and key are normalized, so they are kept before their norms too
    norms_again: bool = (
        True  # attention and MLP read norms that shared inputs compute again in place of keeping them
    )

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        config = config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=config.num_attention_heads * size,
            key_value=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * size,
            heads=config.num_attention_heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a decoder layer."""
        h, i = self.hidden, self.intermediate
        return {
            "q_proj": (h, self.query),
            "k_proj": (h, self.key_value),
            "v_proj": (h, self.key_value),
            "o_proj": (self.query, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        """Parameters of norms and biases. A Llama has two norms per layer, a last one, and no biases."""
        return (2 * self.layers + 1) * self.hidden if self.others is None else self.others

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters + self.norm_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes by component at the step's peak; `total` is the memory that PyTorch's allocator has then allocated."""

    weights: int
    quantization_constants: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass
    loss: int  # logits and their gradients, one chunk at a time
    transient: int  # of the current layer, including its dequantized weight
    workspace: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def gib(self) -> dict[str, float]:
        return {name: value / GIB for name, value in (asdict(self) | {"total": self.total}).items()}


def rounded(size: float) -> int:
    return ceil(size / ALLOCATION) * ALLOCATION


def weights(shape: Shape, variant: params.Variant) -> tuple[int, int]:
    """Bytes of the base's weights, and of its quantization constants.

    The precision determines the tensors of linear layers. Embeddings, head and norms stay in 16 bits. Full
    fine-tuning keeps all weights in float32.
    """
    others = shape.embedding_parameters + shape.norm_parameters
    if methods.get(variant.method).master_weights:
        return 4 * (shape.linear_parameters + others), 0
    tensor_bytes = precisions.get(variant.precision).tensor_bytes
    linears = constants = 0
    for name, (inputs, outputs) in shape.linears.items():
        layer, layer_constants = tensor_bytes(inputs, outputs, variant.quantization)
        plain = layers_in_16_bits(shape, variant, name)
        linears += plain * rounded(2 * inputs * outputs) + (shape.layers - plain) * sum(map(rounded, layer))
        constants += (shape.layers - plain) * sum(map(rounded, layer_constants))
    return linears + 2 * others, constants


def quantized_parameters(shape: Shape, variant: params.Variant) -> int:
    """Weights of the linear layers that do not stay in 16 bits."""
    sizes = shape.linears.items()
    return sum((shape.layers - layers_in_16_bits(shape, variant, name)) * a * b for name, (a, b) in sizes)


def layers_in_16_bits(shape: Shape, variant: params.Variant, name: str) -> int:
    """In how many decoder layers the linear layer of this name stays in 16 bits."""
    names = [whole for whole in linear_names(shape) if whole.endswith(f".{name}")]
    return sum(any(dynamic.is_named(whole, end) for end in variant.layers_in_16_bits) for whole in names)


def linear_names(shape: Shape) -> list[str]:
    """The whole names of a Llama's linear layers."""
    return [
        f"model.layers.{number}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
        for number in range(shape.layers)
        for name in shape.linears
    ]


def kept_of_a_layer(
    shape: Shape, training: params.Training, tokens: int, *, outputs: int = 0, shared_inputs: bool = True
) -> int:
    """Bytes that a decoder layer keeps for its backward pass, for a pack of `tokens` in 16 bits.

    They are two residual streams, query and key (before and after their norms, if there are any), value, the
    attention's output and its log-sum-exp, gate and up. Layers with an adapter add their inputs (two norms' outputs,
    which layers share; the attention's output is already kept) and the [tokens, rank] products. With dropout, each
    adapter's input is a separate copy, with a mask of one byte per number.

    Args:
        outputs: numbers of each token that the method keeps beside them.
        shared_inputs: whether that speed-up is on: the norms' outputs, where all layers that read one have an adapter,
            and the product of gate and up are then computed again, and else kept.
    """
    names = adapted(shape, training)
    wide = 2 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 2 * shape.intermediate
    wide += training.rank * len(names) + outputs + shape.query_key_norms * (shape.query + shape.key_value)
    masks = 0
    if training.dropout:
        masks = sum(inputs for inputs, _ in names.values())
        wide += masks
    else:
        for readers in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}):
            is_kept = not names.keys().isdisjoint(readers) and not (
                shared_inputs and shape.norms_again and names.keys() >= readers
            )
            wide += shape.hidden * is_kept
        wide += shape.intermediate * ("down_proj" in names and not shared_inputs)
    return 2 * tokens * wide + tokens * masks + 4 * tokens * (shape.heads + 2)


def predict(
    shape: Shape,
    variant: params.Variant,
    training: params.Training,
    *,
    tokens: int,
    graphs: bool = True,
    weights_ahead: bool = True,
) -> Memory:
    """Predict the peak that a training step allocates on a GPU, for a forward pass of `tokens` tokens in 16 bits.

    The peak is the larger of two moments. The first is the loss: a chunk of logits (16 bits), its log-probabilities
    (32 bits) and its gradient are in memory together with the last hidden states and their gradient. The second is
    the beginning of the backward pass, in the last layer's MLP: it holds down_proj's dequantized weight and input
    gradient; or, before that, the weight with its adapter folded in, which is quantized; or, where inputs are not
    shared, once down_proj's input is freed, the three [tokens, intermediate] gradients of the gated activation. (By
    then the residual's gradient has replaced the last residual stream.) With checkpointing, only the input of each
    layer is kept, and one layer is recomputed. In a graph, both moments also hold the dequantized weight of the next
    product (workflow/training/speed/ahead.py).

    Args:
        weights_ahead: False for what was measured before graphs made that weight ahead.
    """
    base, constants = weights(shape, variant)
    method = methods.get(variant.method)
    trained, adapters = method.trained_parameters(shape, training), method.adapter_parameters(shape, training)
    outputs = method.kept_outputs(shape, training)
    training = method.activation_settings(training)
    states = ADAM_STATES[training.optimizer] * trained
    precision = precisions.get(variant.precision)
    shared_inputs = (
        training.shared_inputs and method.may_share_inputs and precision.can_be_fused and not training.dropout
    )
    layer = kept_of_a_layer(shape, training, tokens, outputs=outputs, shared_inputs=shared_inputs)
    stream = 2 * tokens * shape.hidden
    embedded = stream  # the last residual stream, which the last norm keeps
    if training.gradient_checkpointing:
        activations, again = shape.layers * stream + embedded, layer - stream
    else:
        activations, again = shape.layers * layer + embedded, 0
    rows = max(1, min(tokens, LOGITS_AT_ONCE // shape.vocabulary))
    chunk = rows * shape.vocabulary
    is_dequantized = precision.is_quantized and not precision.is_emulated
    dequantized = 2 * shape.hidden * shape.intermediate if is_dequantized else 0
    ahead = dequantized if graphs and weights_ahead and precision.makes_weights else 0
    at_loss = 2 * stream + chunk * (4 + 2) + ahead
    wide = 2 * tokens * shape.intermediate
    folding = method.folding_bytes(shape.hidden * shape.intermediate, precision)
    in_backward = again + ahead + max(dequantized + wide, 0 if shared_inputs else 2 * wide, folding)
    if at_loss > in_backward:
        loss, transient = chunk * (4 + 2), 2 * stream + ahead
    else:
        loss, transient = 0, in_backward
    return Memory(
        weights=base,
        quantization_constants=constants,
        adapters=4 * adapters,
        gradients=4 * trained,
        optimizer=states,
        activations=activations,
        loss=loss,
        transient=transient,
        workspace=(4 if graphs else 2) * WORKSPACE,
    )


def describes(speed_ups) -> bool:
    """Whether `predict` counts the tensors of a training with these speed-ups; graphs may be on or off."""
    return speed_ups.packing and speed_ups.fused_adapters and speed_ups.fused_layers and speed_ups.fused_loss


CONTEXT_GIB = 0.8  # the driver's context, loaded kernels and graphs, which PyTorch's allocator does not count
FRAGMENTS = 1.03  # reserved over allocated, because of fragmentation (0 to 4 % as stages run, docs/speed.md)


def usable_gib(gpu_gb: float) -> float:
    """Memory in GiB that a training can allocate on a GPU of `gpu_gb` GB (10^9 bytes)."""
    return gpu_gb * 1e9 / GIB - CONTEXT_GIB


def fits(need: Memory, gib: float) -> bool:
    return need.total * FRAGMENTS <= gib * GIB


def largest_fit(shape: Shape, variant: params.Variant, training: params.Training, *, gib: float) -> int:
    """The largest number of tokens, a multiple of 64, whose forward pass fits in `gib` GiB; 0 if not even 64 fit."""
    step, low, high = 64, 0, 2**14
    while low < high:
        middle = (low + high + 1) // 2
        if fits(predict(shape, variant, training, tokens=middle * step), gib):
            low = middle
        else:
            high = middle - 1
    return low * step
