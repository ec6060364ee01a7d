"""`python -m workflow.params`: print the JSON schema of params.yaml, by which an editor completes and checks it."""

import json

from workflow.params import schema

print(json.dumps(schema(), indent=2))
