"""Stage fetch_model: get the base model and store it as 16-bit safetensors."""

from workflow import params
from workflow.fetch import sources
from workflow.runtime.files import whole_folder, write_json
from workflow.runtime.paths import MODEL, MODEL_SOURCE
from workflow.runtime.stage import run_stage


def fetch_model() -> None:
    """Get the base model that params.yaml names, check it, and store it with its tokenizer."""
    model = params.load().model
    with whole_folder(MODEL) as folder:
        source = sources.fetch_model(model, folder)
    write_json(MODEL_SOURCE, source)


if __name__ == "__main__":
    run_stage("fetch_model", fetch_model, network=True)
