"""The GPUs that people have, with the figures of their makers' data sheets, for the planner's estimates of time.

Rates are of dense 16-bit matrix products that are summed in float32, without sparsity. Data sheets: NVIDIA T4, V100
(SXM2), A10G (as AWS offers it), L4, L40S, A100 (SXM4), H100 (SXM5), H200, B200; the whitepapers of the GeForce
architectures Ampere, Ada and Blackwell for the RTX cards.
"""

from dataclasses import dataclass

MEASURED = "h100"


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it."""

    label: str
    memory_gb: float  # of 10^9 bytes
    tflops: float  # 10^12 operations per second
    gb_per_second: float  # of memory, 10^9 bytes
    device: str  # its name in CUDA; another name is another card, such as one for PCIe, or a part of this one
    bfloat16: bool = True  # else float16, which has no CUDA graphs here


CARDS = {
    "t4": Card("T4", 16, 65, 320, "Tesla T4", bfloat16=False),
    "v100_16": Card("V100 16 GB", 16, 125, 900, "Tesla V100-SXM2-16GB", bfloat16=False),
    "v100_32": Card("V100 32 GB", 32, 125, 900, "Tesla V100-SXM2-32GB", bfloat16=False),
    "rtx3090": Card("RTX 3090", 24, 71, 936, "NVIDIA GeForce RTX 3090"),
    "rtx4090": Card("RTX 4090", 24, 165, 1008, "NVIDIA GeForce RTX 4090"),
    "rtx5090": Card("RTX 5090", 32, 209, 1792, "NVIDIA GeForce RTX 5090"),
    "a10g": Card("A10G", 24, 70, 600, "NVIDIA A10G"),
    "l4": Card("L4", 24, 121, 300, "NVIDIA L4"),
    "l40s": Card("L40S", 48, 362, 864, "NVIDIA L40S"),
    "a100_40": Card("A100 40 GB", 40, 312, 1555, "NVIDIA A100-SXM4-40GB"),
    "a100_80": Card("A100 80 GB", 80, 312, 2039, "NVIDIA A100-SXM4-80GB"),
    MEASURED: Card("H100", 80, 989, 3350, "NVIDIA H100 80GB HBM3"),
    "h200": Card("H200", 141, 989, 4800, "NVIDIA H200"),
    "b200": Card("B200", 180, 2250, 8000, "NVIDIA B200"),
}


def nominal_share(point: dict) -> float | None:
    """The share of the data sheet's matrix rate that a measured point of a grid reaches.

    Returns:
        None for a device that is not in the table, for products in another type than the data sheets' 16 bits, or for
        a model whose operations are not counted.
    """
    share, precision = point["model_flop_utilisation"], point["precision"]
    nominal = next((card.tflops for card in CARDS.values() if card.device == precision["device_name"]), None)
    if share is None or nominal is None or precision["compute"] not in ("bfloat16", "float16"):
        return None
    return share * point["matmul_tflops"] / nominal
