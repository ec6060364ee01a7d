"""Write a preset as a complete params file, or print the JSON schema of params.yaml for editors.

python -m workflow.params preset tiny --output params.yaml
python -m workflow.params schema
"""

import argparse
import json
import sys
from pathlib import Path

from workflow.params import complete_text, presets, schema
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_text
from workflow.runtime.paths import PARAMS


def main() -> None:
    """Parse the command line and run it; exit with code 1 and one sentence on a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.params",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    preset = actions.add_parser("preset", help="write the complete params file of a preset")
    preset.add_argument("name", help=", ".join(presets.names()))
    preset.add_argument("--output", type=Path, default=PARAMS, help=f"default {PARAMS}")
    actions.add_parser("schema", help="print the JSON schema of params.yaml")
    options = parser.parse_args()
    try:
        if options.action == "schema":
            print(json.dumps(schema(), indent=2))
        else:
            write_text(options.output, complete_text(options.name))
    except UserError as error:
        sys.exit(f"params: {error}")


if __name__ == "__main__":
    main()
