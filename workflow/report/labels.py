"""Display names of variants, models and datasets."""

import string
from collections.abc import Callable
from pathlib import PurePosixPath

from workflow import methods, params, precisions

LONGEST_SHORT = 14  # characters of a variant's name within a figure


def variant_labels(settings: params.Params) -> dict[str, str]:
    """The display name of each variant of the experiment, by variant. All are different."""
    labels = {name: variant_label(settings, name) for name in settings.experiment.variants}
    return _told_apart(settings, labels, lambda label, name: f"{label}, {name}")


def _told_apart(
    settings: params.Params, labels: dict[str, str], distinguished: Callable[[str, str], str]
) -> dict[str, str]:
    """Labels that are all different. Of equal ones, a variant without training params of its own keeps its label.

    Args:
        distinguished: a label and the variant's name in words, to another label. Where the name only adds to that of the
            variant that keeps the label, the label stays before what it adds.
    """
    all_labels = list(labels.values())
    plain = {
        label: names[0]
        for label in labels.values()
        if len(names := [n for n in labels if labels[n] == label and not settings.variants[n].training]) == 1
    }
    return {
        name: label
        if all_labels.count(label) == 1 or plain.get(label) == name
        else _distinguished(label, name, plain.get(label), distinguished)
        for name, label in labels.items()
    }


def _distinguished(label: str, name: str, plain: str | None, otherwise: Callable[[str, str], str]) -> str:
    if plain and name.startswith(f"{plain}_"):
        return f"{label}, {_in_words(name.removeprefix(f'{plain}_'))}"
    return otherwise(label, _in_words(name))


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def compact_labels(settings: params.Params) -> dict[str, str]:
    """The display name of each variant of the experiment without the method that most share. All are different."""
    compact = {}
    for name in settings.experiment.variants:
        variant = settings.variants[name]
        method = methods.get(variant.method)
        precision = precisions.get(variant.precision).short(variant.quantization)
        dynamic = "dynamic" if variant.layers_in_16_bits else ""
        parts = [precision, dynamic, method.short, *method.traits(settings.training_of(name))]
        compact[name] = ", ".join(filter(None, parts))
    return _told_apart(settings, compact, lambda _, name: name)


def short_labels(settings: params.Params) -> dict[str, str]:
    """A short display name for each variant of the experiment, for figures. All are different.

    If a compact one is too long, the variants get letters and the page a key to them.
    """
    compact = compact_labels(settings)
    if max(map(len, compact.values())) > LONGEST_SHORT:
        return dict(zip(compact, string.ascii_uppercase, strict=False))
    return compact


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
