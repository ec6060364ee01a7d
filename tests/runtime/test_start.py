"""What a stage imports as it starts: nothing that it does not use and that takes seconds."""

import json
import os
import subprocess
import sys

import pytest

TORCH = {"torch", "transformers", "peft", "trl", "bitsandbytes"}
COMPILER = "torch._inductor.compile_fx"


def imported(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after it ran this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"],
        env={key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "modules",
    [
        "workflow.stages.environment, workflow.stages.train, workflow.stages.evaluate, workflow.pipeline",
        "workflow.stages.fetch_dataset, workflow.data.tables",
        "workflow.stages.compare",
        "workflow.stages.report, workflow.report.cards, workflow.report.page, workflow.report.summary",
    ],
)
def test_what_computes_with_no_model_imports_no_library_of_models(modules):
    assert not imported(f"import {modules}") & TORCH


def test_what_computes_with_a_model_loads_no_compiler_and_may_still_use_it():
    code = (
        "from workflow.runtime.stage import quiet_libraries\n"
        "quiet_libraries()\n"
        "import workflow.training.train, workflow.evaluation.score, torch\n"
        f"assert {COMPILER!r} not in sys.modules\n"
        "calls = []\n"
        "def backend(graph, inputs):\n"
        "    calls.append(graph)\n"
        "    return graph.forward\n"
        "assert torch.equal(torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)), torch.full((2,), 2.0))\n"
        "assert len(calls) == 1"
    )
    assert {"bitsandbytes", "peft", "trl"} <= imported(f"import sys\n{code}")
