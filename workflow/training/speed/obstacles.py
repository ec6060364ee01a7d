"""Why a run cannot have a speed-up that its params ask for, as far as its params and the two tables say.

Nothing here imports torch: the page asks, too. What only the loaded model tells is in choice.py.
"""

from workflow import params
from workflow.methods import Method
from workflow.precisions import Precision

SWITCHED_OFF = "switched off in params.yaml"
SHARDED = "not with weights that are shared between processes"


def obstacles(
    variant: params.Variant,
    training: params.Training,
    *,
    method: Method,
    base: Precision,
    device: str,
    compute: str,
) -> dict[str, str]:
    """By each speed-up's name, why the run cannot have it, as a clause; empty where nothing speaks against it.

    Sharded weights are gathered when a decoder layer or the output head is called, into memory that is taken anew each
    time: a CUDA graph would read where they were.

    Args:
        device: cpu or cuda.
        compute: the type of the matrix products.
    """
    precision = base.no_speed_ups or "not on a base in this precision"
    fused_adapters = _first(not training.fused_adapters and SWITCHED_OFF, method.no_fused_adapters(training))
    packing = _first(not training.packing and SWITCHED_OFF, not base.can_be_packed and precision)
    return {
        "packing": packing,
        "fused_adapters": fused_adapters,
        "shared_inputs": _first(
            not training.shared_inputs and SWITCHED_OFF,
            fused_adapters and "needs fused adapters",
            not method.may_share_inputs and "not for this method’s layers",
            not base.can_be_fused and precision,
            training.dropout and "each layer’s dropout changes the input",
        ),
        "fused_layers": _first(not training.fused_layers and SWITCHED_OFF),
        "fused_loss": _first(not training.fused_loss and SWITCHED_OFF),
        "cuda_graphs": _first(
            not training.cuda_graphs and SWITCHED_OFF,
            variant.processes > 1 and SHARDED,
            device != "cuda" and "needs a GPU",
            method.no_graphs(training),
            not base.can_be_captured and precision,
            compute == "float16" and "float16’s scale of the gradients changes from step to step",
            training.gradient_checkpointing
            and training.dropout
            and "gradient checkpointing would repeat the dropout’s random state",
            packing and "needs packing",
        ),
    }


def _first(*reasons: object) -> str:
    """The first of the reasons that holds; empty if none does."""
    return next((str(reason) for reason in reasons if reason), "")
