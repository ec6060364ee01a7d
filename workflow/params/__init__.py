"""What a run is asked to do: params.yaml, checked before any work.

In: a YAML file. Out: one `Params`, or a sentence that names the key, the value and what is allowed.
"""

from workflow.params.checks import why_not_shared
from workflow.params.model import (
    SHAPES,
    Benchmark,
    Comparison,
    Evaluation,
    Family,
    Hardware,
    LocalFile,
    Params,
    Sample,
    Task,
    Variant,
    can_be_served,
)
from workflow.params.presets import complete_text, with_section
from workflow.params.reading import (
    SINCE,
    check_variant,
    gpus_needed,
    load,
    preset,
)
from workflow.params.run import Run
from workflow.params.schemas import schema
from workflow.params.sources import (
    CHAT_TEMPLATES,
    ChatColumns,
    Columns,
    Dataset,
    File,
    FileDataset,
    FileModel,
    HubDataset,
    HubModel,
    Model,
    Moved,
    RandomModel,
    Wheel,
    WheelDataset,
    WheelModel,
)
from workflow.params.training import Training
from workflow.params.tuning import Candidate, Tuning
from workflow.params.values import (
    OWN_TASKS,
    Count,
    Layers,
    Length,
    Size,
    Vocabulary,
)
from workflow.runtime.forms import FORMS

__all__ = [
    "CHAT_TEMPLATES",
    "FORMS",
    "OWN_TASKS",
    "SHAPES",
    "SINCE",
    "Benchmark",
    "Candidate",
    "ChatColumns",
    "Columns",
    "Comparison",
    "Count",
    "Dataset",
    "Evaluation",
    "Family",
    "File",
    "FileDataset",
    "FileModel",
    "Hardware",
    "HubDataset",
    "HubModel",
    "Layers",
    "Length",
    "LocalFile",
    "Model",
    "Moved",
    "Params",
    "RandomModel",
    "Run",
    "Sample",
    "Size",
    "Task",
    "Training",
    "Tuning",
    "Variant",
    "Vocabulary",
    "Wheel",
    "WheelDataset",
    "WheelModel",
    "can_be_served",
    "check_variant",
    "complete_text",
    "gpus_needed",
    "load",
    "preset",
    "schema",
    "why_not_shared",
    "with_section",
]
