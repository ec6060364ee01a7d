"""The parts of a run's cards that need no scores: metadata for the hub, and the Python that loads the scored model."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from workflow import methods, params, precisions
from workflow.data import compatibility, lineage
from workflow.data.lineage import Lineage
from workflow.precisions.base import Precision
from workflow.runtime import markdown
from workflow.runtime.files import write_text
from workflow.runtime.forms import (
    AS_TRAINED,
    BASE,
    GGUF_Q4_0,
    GGUF_Q4_K_M,
    GGUF_Q8_0,
    MERGED_16BIT,
    MERGED_DEQUANTIZED,
    REQUANTIZED,
)
from workflow.runtime.paths import MODEL

LOADED = "from_pretrained"
FORMS = {
    BASE: "The base model, without a run, in the precision of the variant.",
    AS_TRAINED: "The run as it was trained.",
    MERGED_16BIT: "The run's adapter folded into the original 16-bit weights, rounded to 16 bits.",
    MERGED_DEQUANTIZED: "The run's adapter folded into the dequantized weights that it was trained on, rounded to "
    "16 bits.",
    REQUANTIZED: "The run's adapter folded into the dequantized weights, which were quantized again.",
    GGUF_Q8_0: "The run's 16-bit model as a GGUF file of llama.cpp's type Q8_0: about 8.5 bits a weight.",
    GGUF_Q4_K_M: "The run's 16-bit model as a GGUF file of llama.cpp's type Q4_K_M: 4 to 6 bits a weight.",
    GGUF_Q4_0: "The run's 16-bit model as a GGUF file of llama.cpp's type Q4_0: about 4.5 bits a weight.",
}


def metadata(
    origin: Lineage,
    variant: params.Variant,
    *,
    form: str = AS_TRAINED,
    dataset: str | None = None,
    name: str | None = None,
    results: list[EvalResult] | None = None,
) -> ModelCardData:
    """Return the metadata of a run's card. Unknown facts about the base or the data are left out.

    Args:
        form: the serving form that the card describes.
        dataset: the data that the run was trained on.
        name: the model's name in the model index.
        results: the scores in the model index.
    """
    facts = origin.known()
    facts.pop("revision", None)
    method = methods.get(variant.method)
    adapter = method.leaves_adapter and form == AS_TRAINED
    if origin.base_model:
        facts["base_model_relation"] = "adapter" if adapter else "finetune"
    tags = [method.tag]
    if method.tag_on_4_bits and precisions.get(variant.precision).is_4_bit:
        tags.append(method.tag_on_4_bits)
    return ModelCardData(
        **facts,
        datasets=[dataset] if dataset else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags if form == AS_TRAINED else [*tags, form.replace("_", "-")],
        model_name=name,
        eval_results=results,
    )


def loading_adapter(
    variant: params.Variant, origin: Lineage, *, compute: str, device: str, folder: Path
) -> str:
    """Return Python that loads an adapter on its base, in the precision and compute type of the training."""
    base, revision = MODEL.as_posix(), ""
    if origin.base_model and origin.revision:
        base, revision = origin.base_model, f'revision="{origin.revision}", '
    precision = precisions.get(variant.precision)
    classes, quantization, option = "", "", ""
    if arguments := precision.config_code(variant.quantization, compute):
        classes, option = f", {precision.config_class}", "quantization_config=quantization, "
        quantization = f"quantization = {precision.config_class}({arguments})\n"
    exact = precision.code_before(variant.quantization) + (precision.cpu_code if device == "cpu" else "")
    return (
        f"{'import bitsandbytes as bnb' + chr(10) if exact else ''}import torch\n{precision.base_imports}"
        f"from peft import PeftModel\n{precision.config_imports}"
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{classes}\n\n"
        f'{exact}adapter = "{folder.as_posix()}"  # or where you put it\n'
        f"{quantization}"
        f'base = AutoModelForCausalLM.{LOADED}(\n    "{base}", {revision}dtype=torch.{compute}, {option}'
        f'device_map={{"": "{device}"}}\n)\n'
        f"{precision.code_after(variant.quantization)}model = PeftModel.{LOADED}(base, adapter).eval()\n"
        f"tokenizer = AutoTokenizer.{LOADED}(adapter)"
    )


def loading_model(*, compute: str, device: str, folder: Path, precision: Precision | None = None) -> str:
    """Return Python that loads a whole model and its tokenizer from one folder.

    Args:
        precision: of the model's files, if they are quantized.
    """
    exact = precision.cpu_code if precision is not None and device == "cpu" else ""
    return (
        f"{'import bitsandbytes as bnb' + chr(10) if exact else ''}import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'{exact}folder = "{folder.as_posix()}"  # or where you put it\n'
        f'model = AutoModelForCausalLM.{LOADED}(\n    folder, dtype=torch.{compute}, device_map={{"": "{device}"}}\n).eval()\n'
        f"tokenizer = AutoTokenizer.{LOADED}(folder)"
    )


def loading(variant: params.Variant, origin: Lineage, *, compute: str, device: str, folder: Path) -> str:
    """Return Python that loads a run as it was trained, from the folder of its weights.

    An adapter that was trained through the quantizer is another model where PEFT adds it to the base: the code then
    loads what has it in its 4-bit weights, and says how that is saved.
    """
    method = methods.get(variant.method)
    if method.through_quantizer:
        return (
            "# PEFT adds the adapter past the quantizer that it was trained through. Save what was trained first:\n"
            "#   python -m workflow.save_served --variant VARIANT --seed SEED --form requantized --to requantized\n"
            + loading_model(
                compute=compute,
                device=device,
                folder=Path(REQUANTIZED),
                precision=precisions.get(variant.precision),
            )
        )
    if not method.leaves_adapter:
        return loading_model(compute=compute, device=device, folder=folder)
    return loading_adapter(variant, origin, compute=compute, device=device, folder=folder)


def complete(
    written: Path,
    folder: Path,
    variant: params.Variant,
    *,
    model_folder: Path,
    compute: str,
    device: str,
) -> None:
    """Add a run's tokenizer and card to its weights, and write the settings under the keys of older libraries too.

    Args:
        written: the folder in which the weights are now.
        folder: the folder in which they will be.
        variant: the run's variant.
        model_folder: the base model.
        compute: the compute type of the training.
        device: the device of the training.
    """
    origin = lineage.read(model_folder)
    lineage.copy_tokenizer(model_folder, written)
    if not methods.get(variant.method).leaves_adapter:
        compatibility.make_compatible(written)
    else:
        compatibility.make_adapter_compatible(written)
        lineage.name_base(written, origin)
    code = loading(variant, origin, compute=compute, device=device, folder=folder)
    run = "/".join(folder.parts[-3:-1])
    write_text(written / lineage.CARD, weights_card(variant, origin, code=code, run=run))


def weights_card(variant: params.Variant, origin: Lineage, *, code: str, run: str) -> str:
    """Return the card that is stored with a run's weights, before the run is scored.

    Args:
        code: the Python that loads the run as it was trained.
        run: its variant and seed, joined by a slash, as in the paths of its results.
    """
    kind = methods.get(variant.method).product
    precision = precisions.get(variant.precision).in_words
    base = f"what `dvc repro fetch_model` stores in `{MODEL}`"
    if origin.base_model and origin.revision:
        base = f"{origin.base_model} at {origin.revision}"
    return (
        f"---\n{metadata(origin, variant).to_yaml()}\n---\n\n# {run}\n\n"
        f"{kind}, with the base held in {precision}. Base: {base}.\n\n## How to load it\n\n```python\n{code}\n```\n\n"
        "Loaded like this, it is the model whose `as_trained` scores are reported. A base in another precision gives other numbers.\n\n"
        f"## Numbers\n\n`results/cards/{run}/README.md` has what it scored in each serving form, what it cost and the "
        "limits of the comparison, once `dvc repro report` has run: publish that card with the weights.\n"
    )


def served_card(
    variant: params.Variant, origin: Lineage, *, form: str, run: str, code: str, scores: list[dict]
) -> str:
    """Return the card of a form that was saved as a standalone model, with the scores of this form.

    Args:
        form: the serving form.
        run: its variant and, for a run, its seed.
        code: the Python that loads the model.
        scores: dicts with `task`, `metric`, `value`, `unit` and `items`; empty if the form was not scored.
    """
    rows = [
        (f"{score['task']}: {score['metric']}", f"{score['value']:.4f}", score["unit"], f"{score['items']:,}")
        for score in scores
    ]
    numbers = "It was not scored.\n"
    if rows:
        table = markdown.table(("Metric", "Value", "Unit", "Items"), rows, right=[1, 3])
        numbers = f"Of this form, loaded so:\n\n{table}\n"
    return (
        f"---\n{metadata(origin, variant, form=form).to_yaml()}\n---\n\n# {run} as {form}\n\n{FORMS[form]}\n\n"
        f"## How to load it\n\n```python\n{code}\n```\n\n## Numbers\n\n{numbers}"
    )
