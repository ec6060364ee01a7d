"""PyTorch's compiler, which the import of bitsandbytes would load.

bitsandbytes marks some of its functions for `torch.compile` as it is imported, and the first mark loads the compiler: a
sixth of all the seconds that a training's imports take. The functions are for devices without kernels of its own; a CPU
and a CUDA GPU never call them. PEFT, and with it transformers' trainer, import bitsandbytes whatever the precision is.
"""

import os

SWITCH = "TORCHDYNAMO_DISABLE"  # while it is set, `torch.compile` returns a function as it is


def skip_at_import() -> None:
    """Keep the libraries that are imported from here on from loading the compiler."""
    os.environ[SWITCH] = "1"


def allow() -> None:
    """Let `torch.compile` compile again."""
    os.environ.pop(SWITCH, None)
