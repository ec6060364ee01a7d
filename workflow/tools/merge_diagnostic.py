"""Show into which weights a trained adapter is best merged: those of 16 bits, the dequantized ones, or quantized ones.

    python -m workflow.merge_diagnostic --variant qlora_nf4_dq --seed 1

An adapter learned its change C (s B A of LoRA) on the dequantized weights D of a quantized base W.
    merged_16bit         W + C: off by the quantization error D - W from what was trained
    merged_dequantized   D + C: off by nothing but rounding to 16 bits
    requantized          quantize(D + C): off by a second quantization
For each layer: the size (Frobenius norm) of the quantization error and of what quantizing again adds, both as shares of the
size of C; and the share of C that is left after quantizing again, <dequantize(quantize(D + C)) - D, C> / <C, C>. For each form:
the loss on rows of the test split.
"""

import argparse
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from workflow import methods, params, precisions
from workflow.runtime import markdown, outputs
from workflow.runtime.errors import UserError, suggestion
from workflow.runtime.files import write_text
from workflow.runtime.forms import AS_TRAINED, MERGED_16BIT, MERGED_DEQUANTIZED, REQUANTIZED
from workflow.runtime.paths import MODEL, PARAMS
from workflow.runtime.stage import offline_command, say
from workflow.tools.arguments import at_least

if TYPE_CHECKING:  # they take seconds to import
    from torch import Tensor, nn

    from workflow.tools.losses import Loss

MERGED = (MERGED_16BIT, MERGED_DEQUANTIZED, REQUANTIZED)
TARGETS = {
    MERGED_16BIT: "the original 16-bit weights",
    MERGED_DEQUANTIZED: "the dequantized weights",
    REQUANTIZED: "the quantized weights",
}


@dataclass(frozen=True)
class LayerChange:
    """Squares of Frobenius norms of one linear layer's changes, or their sums over several layers.

    Attributes:
        error: of the quantization error, dequantize(quantize(W)) - W.
        learned: of the learned change C.
        added: of what quantizing D + C again adds to it.
        left: the product of C with the change of the quantized weight.
    """

    name: str
    weight: float
    error: float
    learned: float
    added: float
    left: float

    @property
    def error_share(self) -> float:
        """|quantization error| / |C|."""
        return (self.error / self.learned) ** 0.5

    @property
    def added_share(self) -> float:
        """|error of quantizing again| / |C|."""
        return (self.added / self.learned) ** 0.5

    @property
    def survival(self) -> float:
        """The share of C that is left after quantizing again."""
        return self.left / self.learned


def total(changes: Iterable[LayerChange], name: str) -> LayerChange:
    """The changes of several layers as one."""
    changes = list(changes)
    sums = (
        sum(getattr(change, part) for change in changes)
        for part in ("weight", "error", "learned", "added", "left")
    )
    return LayerChange(name, *sums)


def layer_changes(run: params.Run, model_folder: Path, weights_folder: Path) -> list[LayerChange]:
    """Measure every layer that has an adapter.

    Beside two quantized models, one in float32 is in memory.

    Raises:
        UserError, CheckError: as the serving forms.
    """
    import torch

    from workflow.evaluation import forms
    from workflow.models.load import base_linears, load_base
    from workflow.tools.losses import release_memory

    hardware, entry = run.hardware, precisions.get(run.variant.precision)
    variant = run.variant.model_copy(update={"method": methods.FROZEN})
    forms.check_adapter(weights_folder, model_folder, run.method, run.training)
    base, _ = load_base(model_folder, variant, hardware=hardware)
    quantized = base_linears(base)
    plain, _ = load_base(model_folder, variant.model_copy(update=forms.SIXTEEN_BIT), hardware=hardware)
    errors = {
        name: (_square(layer.weight.float()), _square(_weight(quantized[name]) - layer.weight.float()))
        for name, layer in base_linears(plain).items()
    }
    del plain
    release_memory()
    folded, _ = load_base(model_folder, variant, hardware=hardware)
    folded = forms.merged(entry.dequantize(folded, torch.float32), weights_folder)
    again, _ = forms.requantized(
        model_folder, weights_folder, variant=variant, hardware=hardware, method=run.method
    )
    requantized = base_linears(again)
    changes = []
    for name, layer in base_linears(folded).items():
        start = _weight(quantized[name])
        learned, after = layer.weight.detach().float() - start, _weight(requantized[name]) - start
        if size := _square(learned):
            added, left = _square(after - learned), float((after * learned).sum())
            changes.append(LayerChange(name, *errors[name], size, added, left))
    return changes


def _weight(layer: "nn.Linear") -> "Tensor":
    import torch

    precision = precisions.recognize(layer)
    return precision.dequantized_weight(layer, torch.float32).detach()


def _square(weight: "Tensor") -> float:
    return float(weight.detach().square().sum())


def by_decoder_layer(changes: list[LayerChange]) -> list[LayerChange]:
    """The changes of each decoder layer as one, in the order of the model, and of all of them at the end."""
    parts: dict[str, list[LayerChange]] = {}
    for change in changes:
        place = re.search(r"\.(\d+)\.", change.name)
        parts.setdefault(place[1] if place else change.name, []).append(change)
    return [*(total(part, name) for name, part in parts.items()), total(changes, "all")]


def layer_table(changes: list[LayerChange]) -> str:
    """A row for each decoder layer, as Markdown."""
    head = ["decoder layer", "size of W", "size of C", "quantization error / C", "error of quantizing again / C",
            "share of C left then"]  # fmt: skip
    rows = [
        [
            change.name,
            f"{change.weight**0.5:.2f}",
            f"{change.learned**0.5:.4f}",
            f"{change.error_share:.2f}",
            f"{change.added_share:.2f}",
            f"{change.survival:.3f}",
        ]
        for change in by_decoder_layer(changes)
    ]
    return markdown.table(head, rows, right=range(1, 6))


def loss_table(losses: "dict[str, Loss]", settings: params.Params) -> str:
    """A row for each form, as Markdown."""
    from workflow.tools.losses import in_words, minus

    trained = losses[AS_TRAINED]
    rows = [
        [
            form,
            f"{loss.value:.4f}",
            "" if form == AS_TRAINED else in_words(minus(loss, trained, settings, trained=True)),
        ]
        for form, loss in losses.items()
    ]
    head = ["form", "loss, nats per token, less is better", f"minus {AS_TRAINED}"]
    return markdown.table(head, rows, right=[1])


def recommendation(losses: "dict[str, Loss]", whole: LayerChange, settings: params.Params) -> str:
    """Say in one sentence into which weights to merge, by the losses, and what the layers say about why.

    Args:
        whole: the changes of all layers as one.
    """
    from workflow.tools.losses import in_words, minus

    merged = {form: loss for form, loss in losses.items() if form != AS_TRAINED}
    best = min(merged, key=lambda form: merged[form].value)
    cost = minus(merged[best], losses[AS_TRAINED], settings, trained=True)
    worse, level = [], []
    for form, loss in merged.items():
        if form != best:
            gap = minus(loss, merged[best], settings, trained=True)
            (worse if gap.low > 0 else level).append(f"{form} by {in_words(gap)}")
    parts = [
        f"Merge into {TARGETS[best]} ({best}): against the adapter on its base that changes the loss by {in_words(cost)}"
    ]
    if worse:
        parts.append(f"it is ahead of {' and of '.join(worse)}")
    if level:
        parts.append(f"these rows do not tell it from {' and from '.join(level)}")
    parts.append(
        f"the quantization error is {whole.error_share:.2g} times the size of the learned change, and quantizing again adds "
        f"{whole.added_share:.2g} times it and leaves {100 * whole.survival:.2g} % of it"
    )
    if cost.low > 0:
        parts.append("serving the adapter unmerged is better still")
    return "; ".join(parts) + "."


def run_of(settings: params.Params, variant: str, seed: int) -> params.Run:
    """The run, if its adapter can be merged.

    Raises:
        UserError: params have no such run, or it has no choice of weights.
    """
    known = settings.experiment
    if variant not in settings.variants:
        raise UserError(
            f"--variant is {variant}, which is not in {PARAMS}; it has {', '.join(settings.variants)}"
            f"{suggestion(variant, settings.variants)}."
        )
    if seed not in known.seeds:
        raise UserError(f"--seed is {seed}; experiment.seeds has {', '.join(map(str, known.seeds))}.")
    run = settings.run(variant, seed)
    if not run.method.leaves_adapter:
        raise UserError(f"{variant} trained {run.method.trains} and left no adapter to merge.")
    if not precisions.get(run.variant.precision).is_quantized:
        raise UserError(
            f"the base of {variant} is not quantized, so its adapter is merged into the weights it was trained on."
        )
    if not params.can_be_served(run.variant, REQUANTIZED):
        raise UserError(
            f"an adapter on a base in {run.variant.precision} is not merged and quantized again here."
        )
    return run


def flat_table(changes: list[LayerChange]) -> pd.DataFrame:
    """A row for each linear layer, with norms."""
    return pd.DataFrame(
        {
            "layer": change.name,
            "weight_norm": change.weight**0.5,
            "quantization_error_norm": change.error**0.5,
            "learned_change_norm": change.learned**0.5,
            "requantization_error_norm": change.added**0.5,
            "quantization_error_share": change.error_share,
            "requantization_error_share": change.added_share,
            "share_left": change.survival,
        }
        for change in changes
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.merge_diagnostic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variant", required=True, help="of params.yaml, an adapter on a quantized base")
    parser.add_argument("--seed", type=at_least(0), required=True, help="of the trained run")
    parser.add_argument(
        "--rows", type=at_least(2), default=50, help="of the test split to score (default 50)"
    )
    parser.add_argument("--csv", type=Path, help="where a row for each linear layer is written as CSV")
    options = parser.parse_args()
    with offline_command("merge_diagnostic"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module")  # what PEFT warns of is measured here
        settings = params.load()
        run = run_of(settings, options.variant, options.seed)
        from workflow.tools.losses import check_ready, measure

        check_ready()
        if not run.weights.is_dir():
            raise UserError(f"{run.weights} is missing; `dvc repro train@{run.name}-{run.seed}` makes it.")
        outputs.check_outputs(MODEL, run.weights)
        changes = layer_changes(run, MODEL, run.weights)
        if options.csv:
            write_text(options.csv, flat_table(changes).to_csv(index=False))
        say(f"\n{layer_table(changes)}\n")
        losses = {}
        for form in (AS_TRAINED, *(form for form in MERGED if params.can_be_served(run.variant, form))):
            losses[form] = measure(settings, run, form, rows=options.rows)
    trained = losses[AS_TRAINED]
    say(
        f"Loss on {len(trained.tokens)} rows of the test split, {trained.tokens.sum():,.0f} tokens of their responses:\n"
    )
    say(f"{loss_table(losses, settings)}\n")
    say(recommendation(losses, total(changes, "all"), settings))


if __name__ == "__main__":
    main()
