"""Rank the linear layers of the base by what quantization does to them, to choose those that stay in 16 bits.

    python -m workflow.rank_layers --precision nf4 --keep 8

Two errors are measured of each layer: that of its weight, and that of its output on rows of the training split. Both are
relative to the 16-bit layer, in the Frobenius norm. The list at the end goes into a variant's layers_in_16_bits.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from workflow import methods, params, precisions
from workflow.data.rows import from_rows
from workflow.params import messages
from workflow.precisions.base import Quantization
from workflow.runtime import faults, outputs, variables
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_jsonl
from workflow.runtime.paths import MODEL, train_rows_file
from workflow.runtime.stage import go_offline, quiet_libraries

if TYPE_CHECKING:  # they take seconds to import
    from torch import Tensor, nn

    from workflow.precisions import Precision

MIB = 2**20
USUAL_BLOCK_SIZE = 64


@dataclass(frozen=True)
class LayerError:
    """What quantization does to a layer.

    Attributes:
        weight: |W' - W| / |W|, of the dequantized weight W'.
        output: |X (W' - W)^T| / |X W^T|, of the inputs X that the layer has in the 16-bit model.
        more_bytes: that it takes if it stays in 16 bits.
    """

    name: str
    weight: float
    output: float
    more_bytes: float


def layer_errors(
    plain: "nn.Module", quantized: "nn.Module", quantization: Quantization, rows: Iterable["Tensor"]
) -> list[LayerError]:
    """Measure every linear layer, the output head left out; the largest error of the output comes first.

    Args:
        plain: the base in 16 bits.
        quantized: the same base, every linear layer quantized.
        rows: token ids [1, tokens] of each row.
    """
    import torch

    from workflow.models.load import base_linears

    layers, sums = base_linears(quantized), {name: torch.zeros(2) for name in base_linears(plain)}

    def measure(name: str):
        def hook(layer: "nn.Linear", inputs: tuple["Tensor", ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            change = _dequantized(layers[name]) - layer.weight.float()
            sums[name] += torch.stack([_square(x @ change.T), _square(x @ layer.weight.float().T)]).cpu()

        return hook

    originals = base_linears(plain)
    handles = [layer.register_forward_pre_hook(measure(name)) for name, layer in originals.items()]
    with torch.no_grad():
        for ids in rows:
            plain.eval()(input_ids=ids.to(plain.device), use_cache=False)
        errors = [
            _error(name, layers[name], layer, sums[name], quantization) for name, layer in originals.items()
        ]
    for handle in handles:
        handle.remove()
    return sorted(errors, key=lambda error: -error.output)


def _error(
    name: str, quantized: "nn.Linear", layer: "nn.Linear", sums: "Tensor", quantization: Quantization
) -> LayerError:
    weight, precision = layer.weight.float(), precisions.recognize(quantized)
    parts = precision.tensor_bytes(layer.in_features, layer.out_features, quantization)
    return LayerError(
        name,
        weight=float((_square(_dequantized(quantized) - weight) / _square(weight)).sqrt()),
        output=float((sums[0] / sums[1]).sqrt()),
        more_bytes=2 * weight.numel() - sum(map(sum, parts)),
    )


def _dequantized(layer: "nn.Linear") -> "Tensor":
    import torch

    return precisions.recognize(layer).dequantized_weight(layer, torch.float32)


def _square(numbers: "Tensor") -> "Tensor":
    return numbers.square().sum()


def variant_of(
    precision: "Precision", block_size: int | None, *, double_quantization: bool
) -> params.Variant:
    """A variant on a base that is quantized like this.

    Args:
        block_size: None for the one that is nearest to the usual one.

    Raises:
        UserError: the precision quantizes nothing, or has no such block size.
    """
    if not precision.is_quantized:
        raise UserError(f"--precision is {precision.name}, which quantizes no layer; name another.")
    try:
        return _variant(
            precision.name,
            block_size
            or next(iter(sorted(precision.block_sizes, key=lambda size: abs(size - USUAL_BLOCK_SIZE))), None),
            double_quantization=double_quantization,
        )
    except ValidationError as error:
        raise UserError(f"{'; '.join(messages.describe(error.errors(), params.Variant))}.") from None


def _variant(precision: str, block_size: int | None, *, double_quantization: bool = False) -> params.Variant:
    return params.Variant(
        method=methods.FROZEN,
        precision=precision,
        double_quantization=double_quantization,
        block_size=block_size,
        layers_in_16_bits=[],
        compute_dtype=None,
        processes=1,
        training={},
    )


def measure(settings: params.Params, variant: params.Variant, *, rows: int) -> list[LayerError]:
    """Measure the errors of the run's model, on the first training rows of its first seed.

    Raises:
        UserError: the model or the rows are missing.
    """
    import torch

    from workflow.data import chat
    from workflow.data.model_files import load_tokenizer
    from workflow.models.load import load_base

    file = train_rows_file(settings.experiment.seeds[0])
    for path, stage in ((MODEL / "config.json", "try_model"), (file, "sample")):
        if not path.is_file():
            raise UserError(f"{path} is missing; `dvc repro {stage}` makes it.")
    outputs.check_outputs(MODEL, file)
    tokenizer, training = load_tokenizer(MODEL), settings.training
    texts = (
        chat.whole(row.conversation(use_context=training.use_context)["prompt"], row.response, tokenizer)
        for row in from_rows(read_jsonl(file)[:rows])
    )
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"][: training.max_length] for text in texts)
    hardware = settings.hardware
    plain, _ = load_base(MODEL, _variant(precisions.SIXTEEN_BIT, None), hardware=hardware)
    quantized, _ = load_base(MODEL, variant, hardware=hardware)
    return layer_errors(plain, quantized, variant.quantization, (torch.tensor([row]) for row in ids))


def table(errors: list[LayerError], *, keep: int) -> str:
    """The layers from the worst on, and the list of the first few to paste into params."""
    width = max(len(error.name) for error in errors)
    lines = [f"{'layer':<{width}} {'weight error':>12} {'output error':>12} {'MiB more in 16 bits':>19}"]
    lines += [
        f"{error.name:<{width}} {error.weight:>12.4f} {error.output:>12.4f} {error.more_bytes / MIB:>19.3f}"
        for error in errors
    ]
    worst = errors[:keep]
    total = sum(error.more_bytes for error in worst) / MIB
    return "\n".join(
        [
            *lines,
            "",
            f"The {len(worst)} with the largest error of the output take {total:.3f} MiB more in 16 bits:",
            "",
            f"layers_in_16_bits: [{', '.join(error.name for error in worst)}]",
        ]
    )


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"{text[:40]} is no whole number from 1 on")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.rank_layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--precision", required=True, help="as in a variant of params.yaml, such as nf4")
    parser.add_argument(
        "--block-size", type=_at_least_one, help="as in a variant (default 64, or what is nearest)"
    )
    parser.add_argument("--double-quantization", action="store_true", help="quantize the constants too")
    parser.add_argument(
        "--rows", type=_at_least_one, default=16, help="rows of the training split (default 16)"
    )
    parser.add_argument(
        "--keep", type=_at_least_one, default=8, help="layers in the list to paste (default 8)"
    )
    options = parser.parse_args()
    go_offline()
    quiet_libraries()
    try:
        variables.check(os.environ, network=False)
        with faults.as_user_errors():
            variant = variant_of(
                precisions.get(options.precision),
                options.block_size,
                double_quantization=options.double_quantization,
            )
            errors = measure(params.load(), variant, rows=options.rows)
    except UserError as error:
        sys.exit(f"rank_layers: {error}")
    print(table(errors, keep=options.keep))


if __name__ == "__main__":
    main()
