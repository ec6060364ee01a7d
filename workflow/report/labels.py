"""Display names of variants, models and datasets."""

import string
from pathlib import PurePosixPath

from workflow import methods, params, precisions

LONGEST_SHORT = 14  # characters of a variant's name within a figure


def variant_labels(settings: params.Params) -> dict[str, str]:
    """The display name of each variant of the experiment, by variant. All are different."""
    labels = {name: variant_label(settings, name) for name in settings.experiment.variants}
    return {
        name: label if _is_plain(settings, name, labels) else f"{label}, {name.replace('_', ' ')}"
        for name, label in labels.items()
    }


def _is_plain(settings: params.Params, name: str, labels: dict[str, str]) -> bool:
    """Whether a variant needs no addition to its label: of those with the same, it alone changes no training param."""
    same = [other for other, label in labels.items() if label == labels[name]]
    unchanged = [other for other in same if not settings.variants[other].training]
    return same == [name] or unchanged == [name]


def short_labels(settings: params.Params) -> dict[str, str]:
    """A short display name for each variant of the experiment, for figures. All are different.

    If one of them would be too long, the variants get letters and the page a key to them.
    """
    shorts = {}
    for name in settings.experiment.variants:
        variant = settings.variants[name]
        method = methods.get(variant.method)
        precision = precisions.get(variant.precision).short(variant.quantization)
        dynamic = "dynamic" if variant.layers_in_16_bits else ""
        parts = [precision, dynamic, method.short, *method.traits(settings.training_of(name))]
        shorts[name] = ", ".join(filter(None, parts))
    unique = {
        name: short if _is_plain(settings, name, shorts) else name.replace("_", " ")
        for name, short in shorts.items()
    }
    if max(map(len, unique.values())) > LONGEST_SHORT:
        return dict(zip(unique, string.ascii_uppercase, strict=False))
    return unique


def variant_label(settings: params.Params, name: str) -> str:
    """A variant's display name: its method and precision, and what sets its adapter apart."""
    variant = settings.variants[name]
    method = methods.get(variant.method)
    precision = precisions.get(variant.precision)
    kind = method.label_on_4_bits if precision.is_4_bit else method.label
    dynamic = ["dynamic"] if variant.layers_in_16_bits else []
    label = precision.label(kind, variant.quantization)
    return ", ".join([label, *dynamic, *method.traits(settings.training_of(name))])


def model_name(model: params.Model) -> str:
    """A model's short name, from its source."""
    match model:
        case params.HubModel():
            return model.repository
        case params.WheelModel():
            return PurePosixPath(model.member).name.removesuffix(".gguf")
        case params.FileModel():
            return PurePosixPath(model.path).name
        case params.RandomModel():
            return "Llama with random weights"


def dataset_name(dataset: params.Dataset) -> str:
    """A dataset's short name, from its source."""
    match dataset:
        case params.HubDataset():
            return dataset.repository
        case params.WheelDataset():
            return dataset.package
        case params.FileDataset():
            return PurePosixPath(dataset.path).name
