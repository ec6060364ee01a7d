"""The paths of every stage's outputs, as dvc.yaml names them (a test compares the two), and of what stages keep."""

from pathlib import Path

CODE = Path("workflow")
PARAMS, DVC_YAML, DVC_LOCK = Path("params.yaml"), Path("dvc.yaml"), Path("dvc.lock")
RESULTS = Path("results")
MODEL = RESULTS / "fetch_model" / "model"
MODEL_SOURCE = RESULTS / "fetch_model" / "source.json"
MODEL_READY = RESULTS / "try_model" / "ready"
INSTRUCTIONS = RESULTS / "fetch_dataset" / "instructions.jsonl"
DATASET_SOURCE = RESULTS / "fetch_dataset" / "source.json"
SAMPLE = RESULTS / "sample"
SAMPLE_COUNTS = SAMPLE / "counts.json"
TRAIN_ROWS = SAMPLE / "train"
TUNING_ROWS = SAMPLE / "tuning.jsonl"
CANDIDATES = RESULTS / "tune" / "candidates.json"
RATE_CHOICES = RESULTS / "rates" / "choices.json"
TASKS = CODE / "evaluation" / "tasks"
FETCHED_TASKS = RESULTS / "fetch_tasks" / "tasks"
LOADED_TASKS = FETCHED_TASKS / "loaded.json"
TASKS_READY = RESULTS / "fetch_tasks" / "ready"
COMPARE = RESULTS / "compare"
COMPARISON = COMPARE / "comparison.json"
HARDWARE = RESULTS / "hardware"
REPORT = Path("report") / "index.html"
SUMMARY = RESULTS / "summary.md"
SUMMARY_TABLE = RESULTS / "summary.csv"
CARDS = RESULTS / "cards"
MEASURED = (RESULTS / "benchmark" / "measured.json", RESULTS / "benchmark_grid" / "measured.json")
LOGS = Path("logs")
ENVIRONMENT = Path("environment.json")  # of a study: what it ran on
STAGE_SECONDS = RESULTS / "stage_seconds.json"  # of the published run
# What stages keep for one another and for their next run; git and DVC ignore it.
CACHE = Path(".cache")
# Downloads, kept so that a change of code does not fetch them again; studies share them.
WHEELS = CACHE / "wheels"
UNPACKED = CACHE / "unpacked"
LOCKS = CACHE / "running"
INPUT_RECORDS = CACHE / "inputs"
DIGESTS = CACHE / "digests"
SERVED = CACHE / "served"
STAGE_SECONDS_HERE = CACHE / "stage_seconds.json"


def environment_file(kind: str) -> Path:
    return RESULTS / "environment" / f"{kind}.json"


def split_file(split: str) -> Path:
    """Return the rows that all runs share: those of `test` or `validation`."""
    return SAMPLE / f"{split}.jsonl"


def train_rows_file(seed: int | str) -> Path:
    """Return the rows that the runs of a seed are trained on."""
    return TRAIN_ROWS / f"{seed}.jsonl"


def tune_folder(candidate: str) -> Path:
    return RESULTS / "tune" / candidate


def rate_file(variant: str) -> Path:
    """Return where the learning rate of a variant's runs stands."""
    return RESULTS / "rates" / "variants" / f"{variant}.json"


def train_folder(variant: str, seed: int) -> Path:
    return RESULTS / "train" / variant / str(seed)


def weights_folder(variant: str, seed: int) -> Path:
    return train_folder(variant, seed) / "weights"


def checkpoints_folder(variant: str, seed: int) -> Path:
    return train_folder(variant, seed) / "checkpoints"


def evaluate_folder(variant: str, seed: int) -> Path:
    return RESULTS / "evaluate" / variant / str(seed)


def divergence_folder(variant: str, seed: int) -> Path:
    return RESULTS / "divergence" / variant / str(seed)


def evaluate_base_folder(variant: str) -> Path:
    return RESULTS / "evaluate_base" / variant


def served_folder(variant: str, seed: int | None, form: str) -> Path:
    """Return where the commands that repeat an evaluation by hand write a model in a serving form."""
    return SERVED / "-".join([variant, *([] if seed is None else [str(seed)]), form])


def gguf_folder(variant: str, seed: int | None) -> Path:
    """Return where an evaluation writes the GGUF files that it scores."""
    return served_folder(variant, seed, "gguf")


def benchmark_file(variant: str) -> Path:
    return RESULTS / "benchmark" / variant / "result.json"


def grid_file(variant: str, shape: str) -> Path:
    return RESULTS / "benchmark_grid" / variant / f"{shape}.json"
