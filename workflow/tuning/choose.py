"""Choose a learning rate for each variant: the candidate with the lowest mean validation loss, or the number of params."""

from workflow import params
from workflow.runtime.errors import UserError, missing
from workflow.runtime.files import read_json
from workflow.runtime.paths import tune_folder
from workflow.tuning.records import CandidateResult, Choice, Rates, VariantRate


def choose(settings: params.Params) -> Rates:
    """Return the rate of each variant of the experiment, and the choice for each variant that has candidates.

    Only the results of stage `tune` are read, so no test row can have a say.

    Raises:
        UserError: the result of a candidate is missing, or every candidate of a variant diverged.
    """
    tuned = dict.fromkeys(candidate.variant for candidate in settings.tuning.candidates.values())
    choices = {variant: _choice(variant, list(settings.tuning.of(variant))) for variant in tuned}
    rates = {}
    for name in settings.experiment.variants:
        rate = settings.rate_of(name)
        tuned_for = rate if isinstance(rate, str) else None
        number = choices[tuned_for].learning_rate if tuned_for else float(rate)
        rates[name] = VariantRate(variant=name, learning_rate=number, tuned_for=tuned_for)
    return Rates(variants=rates, choices=choices)


def _choice(variant: str, names: list[str]) -> Choice:
    candidates = sorted(map(_read, names), key=lambda candidate: candidate.learning_rate)
    ranked = sorted(
        (candidate for candidate in candidates if not candidate.diverged),
        key=lambda candidate: (candidate.mean_loss, candidate.learning_rate),
    )
    if not ranked:
        raise UserError(
            f"every candidate of {variant} diverged ({', '.join(f'{c.learning_rate:g}' for c in candidates)}): add lower rates to "
            "tuning.candidates."
        )
    best, second = ranked[0], next(iter(ranked[1:]), None)
    ends = {candidates[0].candidate: "lowest", candidates[-1].candidate: "highest"}
    return Choice(
        variant=variant,
        candidates=candidates,
        chosen=best.candidate,
        learning_rate=best.learning_rate,
        runner_up=second and second.candidate,
        margin=second and second.mean_loss - best.mean_loss,
        end=ends.get(best.candidate),
    )


def _read(name: str) -> CandidateResult:
    path = tune_folder(name) / "result.json"
    if not path.is_file():
        raise missing(path)
    return CandidateResult.model_validate(read_json(path))
