"""Stage environment: pick the locked versions that each kind of work depends on."""

from importlib import metadata

from workflow.runtime import environment
from workflow.runtime.files import write_json
from workflow.runtime.paths import environment_file
from workflow.runtime.stage import run_stage, say


def pick_versions() -> None:
    """Write the locked versions that can move a number; say which of them are not the installed ones."""
    kinds = environment.chosen(environment.locked_at(None))
    for name, version in sorted({item for chosen in kinds.values() for item in chosen.items()}):
        installed = installed_version(name)
        if installed.partition("+")[0] not in [part.partition(" ")[0] for part in version.split(", ")]:
            say(f"  {name} is locked at {version}; installed is {installed}. `make environment` mends that.")
    for kind, chosen in kinds.items():
        write_json(environment_file(kind), chosen)


def installed_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # measuring a GPU needs no harness
        return "none"


if __name__ == "__main__":
    run_stage("environment", pick_versions)
