"""How an adapter begins: one entry each, and one table that the methods with an adapter ask.

In: `training.step.initialization`. Out: PEFT's name for it, the bases that it works on, and what it does to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from workflow.runtime.errors import UserError


@dataclass(frozen=True)
class Initialization:
    """A way in which the matrices A and B begin.

    Attributes:
        name: in params.yaml.
        label: in a sentence; empty for the one that needs no mention.
        peft: LoraConfig.init_lora_weights.
        on_unquantized: whether it works on a base in 16 bits.
        on_quantized: whether it works on a quantized base.
        refusal: why not on the others, as a relative clause.
        changes_base: the initial product is taken out of the base's weights. The adapter is then saved as the
            difference from its beginning, which belongs on the published base.
        corrects_base: the initial product stands for what quantization took from the base's weights.
    """

    name: str
    label: str
    peft: bool | str
    on_unquantized: bool
    on_quantized: bool
    refusal: str = ""
    changes_base: bool = False
    corrects_base: bool = False

    @property
    def of_the_base(self) -> bool:
        """Whether the adapter begins with the base's own weights: alike for all seeds, and not alike for all bases."""
        return self.changes_base or self.corrects_base


RESIDUAL = "whose residual weights cannot be written into a quantized base without another loss"
TABLE = {
    entry.name: entry
    for entry in (
        # A is random and B zero (Hu et al. 2021, section 4.1).
        Initialization("default", "", True, on_unquantized=True, on_quantized=True),
        # The largest singular values and vectors of the weight (Meng et al. 2024, equations 2 to 4).
        Initialization(
            "pissa",
            "PiSSA",
            "pissa",
            on_unquantized=True,
            on_quantized=False,
            refusal=RESIDUAL,
            changes_base=True,
        ),
        # The first columns and rows of the weight's QR decomposition (Büyükakyüz 2024, algorithm 1).
        Initialization(
            "olora",
            "OLoRA",
            "olora",
            on_unquantized=True,
            on_quantized=False,
            refusal=RESIDUAL,
            changes_base=True,
        ),
        # The best approximation, of the adapter's rank, of what quantization took (Li et al. 2023, algorithm 1 with one
        # step, after which the base is what plain quantization gives).
        Initialization(
            "loftq",
            "LoftQ",
            True,
            on_unquantized=False,
            on_quantized=True,
            refusal="which makes up for what quantization takes, and nothing is quantized",
            corrects_base=True,
        ),
    )
}


def get(name: str) -> Initialization:
    """The initialization of this name.

    Raises:
        UserError: there is none.
    """
    if name not in TABLE:
        raise UserError(f"there is no initialization {name}; known are {', '.join(TABLE)}.")
    return TABLE[name]
