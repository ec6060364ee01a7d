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


def weights(shape: Shape, variant: params.Variant, *, parts: int = 1) -> tuple[int, int]:
    """Bytes of the base's weights, and of its quantization constants.

    The precision determines the tensors of linear layers. Embeddings, head and norms stay in 16 bits. Full
    fine-tuning keeps all weights in float32.

    Args:
        parts: into which each weight is cut, of which one is counted; constants stay whole.
    """
    others = shape.embedding_parameters + shape.norm_parameters
    if methods.get(variant.method).master_weights:
        return 4 * (shape.linear_parameters + others), 0
    tensor_bytes = precisions.get(variant.precision).tensor_bytes
    linears = constants = 0
    for name, (inputs, outputs) in shape.linears.items():
        layer, layer_constants = tensor_bytes(inputs, outputs, variant.quantization)
        plain = layers_in_16_bits(shape, variant, name)
        held = sum(rounded(size / parts) for size in layer)
        linears += plain * rounded(2 * inputs * outputs / parts) + (shape.layers - plain) * held
        constants += (shape.layers - plain) * sum(map(rounded, layer_constants))
    return linears + ceil(2 * others / parts), constants


def quantized_parameters(shape: Shape, variant: params.Variant) -> int:
    """Weights of the linear layers that do not stay in 16 bits."""
    sizes = shape.linears.items()
    return sum((shape.layers - layers_in_16_bits(shape, variant, name)) * a * b for name, (a, b) in sizes)


def layers_in_16_bits(shape: Shape, variant: params.Variant, name: str) -> int:
    """In how many decoder layers the linear layer of this name stays in 16 bits."""
    names = [whole for whole in linear_names(shape) if whole.endswith(f".{name}")]
    return sum(_stays_in_16_bits(whole, variant) for whole in names)


def _stays_in_16_bits(whole: str, variant: params.Variant) -> bool:
    """Whether the linear layer of this whole name is not quantized."""
    return any(dynamic.is_named(whole, end) for end in variant.layers_in_16_bits)


def _layer_bytes(shape: Shape, variant: params.Variant) -> int:
    """Bytes of the weights of the largest decoder layer, as they are stored, without their quantization constants."""
    tensor_bytes = precisions.get(variant.precision).tensor_bytes
    layers = [2 * ceil(shape.norm_parameters / shape.layers)] * shape.layers
    for number, whole in enumerate(linear_names(shape)):
        inputs, outputs = shape.linears[whole.rpartition(".")[2]]
        stored, _ = tensor_bytes(inputs, outputs, variant.quantization)
        held = 2 * inputs * outputs if _stays_in_16_bits(whole, variant) else ceil(sum(stored))
        layers[number // len(shape.linears)] += held
    return max(layers)


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


@dataclass(frozen=True)
class _Pass:
    """Bytes that a forward and backward pass takes, beside weights, adapters, gradients and the optimizer's states."""

    layer: int  # kept of a decoder layer for the backward pass
    kept: int  # of all layers, and the last residual stream
    logits: int  # a chunk of them, with log-probabilities
    at_loss: int  # beside that chunk
    in_backward: int  # of the layer that computes


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

    The peak is the larger of two moments. The first is the loss: a chunk of logits and its log-probabilities, both in
    32 bits, are in memory together with the last hidden states and their gradient. The second is
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
    trained = method.trained_parameters(shape, training)
    step = _pass(shape, variant, training, tokens=tokens, ahead=graphs and weights_ahead)
    if step.logits + step.at_loss > step.in_backward:
        loss, transient = step.logits, step.at_loss
    else:
        loss, transient = 0, step.in_backward
    return Memory(
        weights=base,
        quantization_constants=constants,
        adapters=4 * method.adapter_parameters(shape, training),
        gradients=4 * trained,
        optimizer=ADAM_STATES[training.optimizer] * trained,
        activations=step.kept,
        loss=loss,
        transient=transient,
        workspace=(4 if graphs else 2) * WORKSPACE,
    )


def _pass(
    shape: Shape, variant: params.Variant, training: params.Training, *, tokens: int, ahead: bool
) -> _Pass:
    """Count what `predict` describes.

    Args:
        ahead: whether the dequantized weight of the next product is made ahead.
    """
    method, precision = methods.get(variant.method), precisions.get(variant.precision)
    outputs = method.kept_outputs(shape, training)
    training = method.activation_settings(training)
    shared_inputs = (
        training.shared_inputs and method.may_share_inputs and precision.can_be_fused and not training.dropout
    )
    layer = kept_of_a_layer(shape, training, tokens, outputs=outputs, shared_inputs=shared_inputs)
    stream = 2 * tokens * shape.hidden
    kept, again = (stream, layer - stream) if training.gradient_checkpointing else (layer, 0)
    rows = max(1, min(tokens, LOGITS_AT_ONCE // shape.vocabulary))
    is_dequantized = precision.is_quantized and not precision.is_emulated
    dequantized = 2 * shape.hidden * shape.intermediate if is_dequantized else 0
    made_ahead = dequantized if ahead and precision.makes_weights else 0
    wide = 2 * tokens * shape.intermediate
    folding = method.folding_bytes(shape.hidden * shape.intermediate, precision)
    return _Pass(
        layer=kept,
        kept=shape.layers * kept + stream,  # the last residual stream, which the last norm keeps
        logits=rows * shape.vocabulary * (4 + 4),
        at_loss=2 * stream + made_ahead,
        in_backward=again + made_ahead + max(dequantized + wide, 0 if shared_inputs else 2 * wide, folding),
    )


@dataclass(frozen=True)
class SharedMemory(Memory):
    """The same of one of the processes that share a training, each on a card of its own."""

    gathered: int  # weights of all processes, while they are in use


# Copies of a decoder layer's weights that FSDP2 has at once (`FSDPParamGroup.wait_for_unshard`, PyTorch 2.13). While
# forward copies a layer out of the buffer that it was gathered in, the buffer of the layer before is still referred to;
# while backward computes a layer, the one before it is gathered into its buffer.
LAYERS_IN_FORWARD, LAYERS_IN_BACKWARD = 3, 2


def predict_shared(
    shape: Shape, variant: params.Variant, training: params.Training, *, tokens: int, processes: int
) -> SharedMemory:
    """Predict the peak of `predict` on each card of a training that several processes share (docs/sharding.md).

    A process holds its part of every weight, adapter and optimizer state, and all quantization constants. It has the
    same speed-ups but CUDA graphs, and gathers (accelerate's `fsdp2_prepare_model`) a decoder layer for its forward and
    backward pass, as it is stored; the embedding for both; and the output head from its product until its own backward
    pass. A tied head is the embedding, and stays for the whole pass. Gradients are cut as they are summed over the
    processes, a decoder layer at a time, which is done in the last of a step's passes: in several passes, each process
    has whole ones. (The copy that is summed stays until the next one is made.) The peak is the largest of these moments:
    the last decoder layer in forward, the head as it is gathered, the loss, the last decoder layer in backward, the one
    before it and the second, and the embedding at the end (a tied one at the beginning).

    Args:
        training: by its batch_rows and micro_batch_rows a process has one pass a step, or several.
        tokens: of a pass of one process.
        processes: two or more.
    """
    method = methods.get(variant.method)
    trained, adapters = method.trained_parameters(shape, training), method.adapter_parameters(shape, training)
    step = _pass(shape, variant, training, tokens=tokens, ahead=False)
    unit = _layer_bytes(shape, variant) + 4 * ceil(adapters / shape.layers)
    head = 2 * shape.vocabulary * shape.hidden
    held = head if shape.tied else 0
    of_a_layer = 4 * ceil(trained / shape.layers)
    part = ceil(of_a_layer / processes)
    several = training.batch_rows > training.micro_batch_rows * processes
    whole = 4 * trained if several else 0
    # (gradients, activations, loss, transient, gathered) of each moment.
    moments = [
        (whole, step.kept - step.layer, 0, 0, held + LAYERS_IN_FORWARD * unit),
        (whole, step.kept, 0, 0, held if shape.tied else unit + 2 * head),
        (whole, step.kept, step.logits, step.at_loss, head + (unit if shape.tied else max(unit, head))),
        (whole or of_a_layer, step.kept, 0, step.in_backward, held + LAYERS_IN_BACKWARD * unit),
    ]
    for done in (1, max(1, shape.layers - 2)):  # decoder layers, whose gradients are summed
        gradients = done * part + (4 * trained - (done - 1) * of_a_layer if several else 2 * of_a_layer)
        activations = step.kept - done * step.layer
        moments.append((gradients, activations, 0, step.in_backward, held + LAYERS_IN_BACKWARD * unit))
    if shape.tied:
        moments.append((whole, 0, 0, 0, 2 * head + 2 * unit))
    else:
        moments.append((max(whole, shape.layers * part + of_a_layer), 0, 0, 0, 2 * head))
    gradients, activations, loss, transient, gathered = max(moments, key=sum)
    base, constants = weights(shape, variant, parts=processes)
    return SharedMemory(
        weights=base,
        quantization_constants=constants,
        adapters=4 * ceil(adapters / processes),
        gradients=gradients,
        optimizer=ADAM_STATES[training.optimizer] * ceil(trained / processes),
        activations=activations,
        loss=loss,
        transient=transient,
        workspace=2 * WORKSPACE,
        gathered=gathered,
    )


def predict_per_card(
    shape: Shape, variant: params.Variant, training: params.Training, *, tokens: int, processes: int
) -> Memory:
    """`predict` of one process, and else `predict_shared`."""
    if processes == 1:
        return predict(shape, variant, training, tokens=tokens)
    return predict_shared(shape, variant, training, tokens=tokens, processes=processes)


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


def largest_fit(
    shape: Shape, variant: params.Variant, training: params.Training, *, gib: float, processes: int = 1
) -> int:
    """The largest number of tokens, a multiple of 64, whose forward pass fits in `gib` GiB; 0 if not even 64 fit.

    Args:
        processes: that share the training; the pass is that of one, and so are the GiB.
    """
    step, low, high = 64, 0, 2**14
    while low < high:
        middle = (low + high + 1) // 2
        need = predict_per_card(shape, variant, training, tokens=middle * step, processes=processes)
        if fits(need, gib):
            low = middle
        else:
            high = middle - 1
    return low * step
