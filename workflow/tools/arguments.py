"""Types of command-line arguments that the commands share."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Make an argparse type: a whole number from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 10**9:
            raise argparse.ArgumentTypeError(f"{text[:40]} is no whole number from {least} on")
        return int(text)

    return parse
