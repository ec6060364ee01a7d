"""The shell commands that give a form's numbers with the harness' own command line."""

import shlex

from workflow import params, precisions
from workflow.evaluation import harness
from workflow.evaluation.forms import Served
from workflow.evaluation.language_model import SOFTMAX
from workflow.evaluation.llama_cpp import write
from workflow.runtime.forms import AS_TRAINED, BASE, REQUANTIZED
from workflow.runtime.paths import MODEL, served_folder


def commands(served: Served, run: params.Run, evaluation: params.Evaluation) -> list[str]:
    """Return the commands, to be run in this folder, that score a form with the harness alone.

    Where the harness' command line cannot load the form, the first command saves it as a model.
    """
    adapter, save = None, None
    is_quantized = precisions.get(run.variant.precision).is_quantized
    if served.form == BASE and not is_quantized:
        model = MODEL
    elif served.form == AS_TRAINED and not run.method.leaves_adapter:
        model = run.weights
    else:
        saved_form, saved_seed = served.form, run.seed
        if served.form == AS_TRAINED and run.method.through_quantizer:
            saved_form = REQUANTIZED  # computes the same, and needs no method's own layers
        elif served.form == AS_TRAINED:
            adapter = run.weights
            saved_form, saved_seed = BASE, None
        model = MODEL
        if saved_form != BASE or is_quantized:
            model = served_folder(run.name, saved_seed, saved_form)
            seed = [] if saved_seed is None else ["--seed", saved_seed]
            save = ["python", "-m", "workflow.save_served", "--variant", run.name, *seed,
                    "--form", saved_form, "--to", model]  # fmt: skip
    arguments = (
        f"pretrained={model},dtype={served.precision.compute},softmax_dtype={SOFTMAX}"
        + (f",peft={adapter}" if adapter else "")
        + (f",gguf_file={write.FILE}" if served.gguf else "")
    )
    calls = [
        ["lm_eval", "run", "--model", "hf", "--model_args", arguments,
         "--batch_size", evaluation.batch_rows, "--device", served.precision.device,
         *harness.call_of(task, evaluation).arguments()]
        for task in evaluation.tasks
    ]  # fmt: skip
    return [shlex.join(map(str, command)) for command in [*([save] if save else []), *calls]]
