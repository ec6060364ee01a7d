"""Which of the speed-ups that params ask for a run can have."""

from dataclasses import asdict, dataclass

import torch
from transformers import (
    PreTrainedModel,
)

from workflow import precisions
from workflow.models.load import LoadedPrecision, base_linears
from workflow.params import Run
from workflow.training.speed.fused import scoring
from workflow.training.speed.kinds import first_of_each_kind
from workflow.training.speed.obstacles import obstacles
from workflow.training.speed.packing import can_be_packed

# Launching the kernels of a decoder layer, forward and backward, takes a CPU about as long as an H100 computes this
# many weights x tokens of it. Beyond, a graph saves little and its padding costs as much.
LAUNCHES_HIDDEN_BY = 8e11


@dataclass(frozen=True)
class SpeedUps:
    """Which of params' speed-ups are in force in a run: some need a GPU, an adapter or a plain output head."""

    packing: bool
    fused_adapters: bool
    shared_inputs: bool
    fused_layers: bool
    fused_loss: bool
    cuda_graphs: bool

    @property
    def any(self) -> bool:
        return any(asdict(self).values())


def choose_speed_ups(model: PreTrainedModel, run: Run, precision: LoadedPrecision) -> SpeedUps:
    """Those of params' speed-ups that this run can have.

    Packing needs a model that computes of each row what it does of the row alone (no window, no recurrent
    state), and a fused loss an output head that is one matrix. A graph needs packing, work that is the same
    for every batch (the base's products too), no scale that float16's gradients are multiplied by,
    and no random state that a recomputation would go back to.
    """
    reasons = obstacles(
        run.variant,
        run.training,
        method=run.method,
        base=precisions.get(precision.base),
        device=precision.device,
        compute=precision.compute,
    )
    with first_of_each_kind(model):
        packing = not reasons["packing"] and can_be_packed(model, longest=run.training.max_length)
        fused_loss = not reasons["fused_loss"] and _has_plain_head(model)
    return SpeedUps(
        packing=packing,
        fused_adapters=not reasons["fused_adapters"],
        shared_inputs=not reasons["shared_inputs"],
        fused_layers=not reasons["fused_layers"],
        fused_loss=fused_loss,
        cuda_graphs=packing and not reasons["cuda_graphs"],
    )


def graphs_pay(model: PreTrainedModel, tokens: float) -> bool:
    """Whether launching a pass of this many tokens takes longer than computing it."""
    layers = base_linears(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    share = max(precision.launch_share for precision in map(precisions.recognize, layers) if precision)
    return tokens * weights / model.config.get_text_config().num_hidden_layers < LAUNCHES_HIDDEN_BY * share


def _has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are what the output head makes of the last hidden state: its product, nothing added, scaled or capped.

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
        with scoring(head, ids.new_ones(ids.numel(), dtype=torch.bool), ids.flatten(), plain.dtype):
            scored = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    capped = any(getattr(model.config.get_text_config(), name, None) is not None for name in caps)
    if capped or scored.numel() != 2:  # the model reads the head's weight past the head
        return False
    return torch.allclose(plain, logits, rtol=2e-2, atol=1e-2 * float(logits.abs().mean()))
