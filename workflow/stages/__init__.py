"""One entry point for each stage of dvc.yaml: `python -m workflow.stages.train --variant lora_16bit --seed 1`."""

import sys

from workflow.runtime import starting

# Python sets this while it looks for the module to run: a process that imports a stage's functions keeps its handlers.
if sys.argv[0] == "-m" and not starting.is_launched():
    starting.end_in_a_sentence()
