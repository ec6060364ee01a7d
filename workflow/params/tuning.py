"""The section `tuning` of params: learning rates to try, and the seeds that they are tried with."""

from workflow.params.values import Name, Rate, Seed, Strict


class Candidate(Strict):
    """A learning rate that is tried for a variant."""

    variant: Name
    learning_rate: Rate


class Tuning(Strict):
    """The candidates by name, of any number of variants, and the seeds that each is trained with."""

    candidates: dict[Name, Candidate]
    seeds: list[Seed]

    def of(self, variant: str) -> dict[str, Candidate]:
        """The candidates of a variant by name, in the order of params."""
        return {name: each for name, each in self.candidates.items() if each.variant == variant}
