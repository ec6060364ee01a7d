"""A base model in memory.

In: a model folder and a variant. Out: the loaded base, with the proof that it is in the variant's precision.
"""

from workflow.runtime import compiler

compiler.skip_at_import()
import bitsandbytes  # noqa: E402, F401  (before anything else imports it)

compiler.allow()
