"""Several problems of one part of params as one ValueError, which pydantic takes for one error of that part."""

from collections.abc import Iterable


class Problems(ValueError):
    """What is wrong with a part of params: sentences without their full stops."""

    def __init__(self, sentences: Iterable[str]):
        self.sentences = tuple(sentences)
        super().__init__("; ".join(self.sentences))


def refuse(sentences: Iterable[str]) -> None:
    """Raise `Problems` if there is a sentence."""
    if problems := list(sentences):
        raise Problems(problems)
