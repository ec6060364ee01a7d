"""What params ask for and this machine lacks, said before anything is computed and not by the stage that fails on it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from dvc.repo import Repo

from workflow import precisions
from workflow.engine.dvc_repository import stale_stages
from workflow.params import Params
from workflow.runtime import errors
from workflow.runtime.errors import UserError
from workflow.runtime.forms import GGUF_FORMS
from workflow.runtime.paths import PARAMS


def check(settings: Params, opened: Callable[[], AbstractContextManager[Repo]]) -> None:
    """Check that this machine can run the stages that compute with the model, if any of them is stale.

    Args:
        opened: opens the repository, which takes a moment, so only if something is lacking.

    Raises:
        UserError: it cannot; the text has every reason.
    """
    problems = list(dict.fromkeys(_lacks(settings)))
    if not problems:
        return
    with opened() as repo:
        if any(_computes(stage.meta) for stage in stale_stages(repo)):
            raise errors.problems(str(PARAMS), [problem.removesuffix(".") for problem in problems])


def _lacks(settings: Params) -> Iterator[str]:
    """Yield a sentence for each thing that the experiment needs and this machine lacks."""
    variants = [settings.variants[name] for name in settings.trained_variants]
    for variant in variants:
        yield from _refusal(precisions.check_installed, precisions.get(variant.precision))
    if set(GGUF_FORMS) & set(settings.evaluation.forms):
        from workflow.evaluation.llama_cpp import extra

        yield from _refusal(extra.check_installed)
    if _depends_on_device(settings):
        yield from _lacks_of_device(settings)


def _computes(meta: dict | None) -> bool:
    return "gpu" in (meta or {}).get("resources", {})


def _depends_on_device(settings: Params) -> bool:
    """Whether some device could not run the experiment: only then are torch and transformers imported, for seconds."""
    if settings.hardware.device == "cuda" or settings.hardware.compute_dtype == "float16":
        return True
    return any(
        settings.training_of(name).optimizer.startswith("paged_")
        or settings.variants[name].compute_dtype == "float16"
        or precisions.get(settings.variants[name].precision).compute_capability
        or settings.variants[name].processes > 1
        for name in settings.trained_variants
    )


def _lacks_of_device(settings: Params) -> Iterator[str]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says which of its kernels it cannot load
    import torch

    from workflow.models import load
    from workflow.training import checks

    try:
        device = load.choose_device(settings.hardware)
    except UserError as error:
        yield str(error)
        return
    for name in settings.trained_variants:
        variant = settings.variants[name]
        yield from _refusal(checks.check_possible, settings.training_of(name), settings.hardware)
        yield from _refusal(load.choose_compute, settings.hardware, variant, device)
        yield from _refusal(load.check_device, precisions.get(variant.precision), device)
        if device.type == "cuda" and torch.cuda.device_count() < variant.processes:
            yield (
                f"variants.{name}.processes is {variant.processes}, which takes a GPU each, and torch sees "
                f"{torch.cuda.device_count()}"
            )


def _refusal(inspect: Callable[..., object], *arguments: object) -> Iterator[str]:
    """Yield the sentence with which a check refuses, if it does."""
    try:
        inspect(*arguments)
    except UserError as error:
        yield str(error)
