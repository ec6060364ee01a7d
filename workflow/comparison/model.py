"""The data classes of a comparison: scores, contrasts with their verdicts, claims and costs.

comparison.json is `Comparison` as JSON, field by field. An *arm* is a variant in a serving form: `base` is the
untouched base in the variant's precision, and the other forms are those of workflow/evaluation/forms.py.
A *contrast* is a signed sum of arms, computed per seed and item, so every difference is paired over both.
Its kinds are:

    to_baseline    a variant in a form, minus the baseline as trained
    to_base        a variant in a form, minus its untouched base: what training changed
    base_to_base   the untouched base in a variant's precision, minus the one in the baseline's: quantization's damage
    recovery       to_baseline minus base_to_base: how much of that damage training changed
    form           a variant in another form, minus the variant as trained: the effect of that form
    repair         a variant with a fault, minus the one without it (the pairs are in params)
    control        the baseline as trained with the first half of its seeds, minus itself with the second half

Its subset is the items that it covers: `all`, `category/NAME`, `held_out` (the categories that its variant was not
trained on: those that every variant holds out, and those that it alone leaves out) or `seen` (the others). Two variants
that were not trained on different categories have no difference in these two.

Every p value is corrected. Those of the family in params are corrected together. Every other one is corrected over
the differences of its own kind, form, metric and kind of subset, which are those of the other variants and categories.
"""

from dataclasses import asdict, dataclass, field

from workflow.comparison.inference import Difference, Equivalence, Verdict
from workflow.runtime.forms import AS_TRAINED, REQUANTIZED

ALL, HELD_OUT, SEEN = "all", "held_out", "seen"

# The recipe evaluated the first of these and published the second.
CLAIMED_FORMS = (AS_TRAINED, REQUANTIZED)


@dataclass(frozen=True)
class Arm:
    """A variant in a serving form; `base` is its untouched base."""

    variant: str
    form: str

    def __str__(self) -> str:
        return f"{self.variant}/{self.form}"


@dataclass(frozen=True)
class Score:
    """One metric of one arm, over its seeds."""

    variant: str
    form: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool | None
    split: str | None
    subset: str
    items: int
    groups: int | None  # None if the metric has no value per item
    value: float
    per_seed: dict[str, float]  # empty for an untouched base


@dataclass(frozen=True)
class Contrast:
    """A difference between arms in one metric, with its uncertainty, its tests and its verdict."""

    kind: str
    name: str | None  # of a repair, or the seeds of a control
    variant: str
    form: str
    other: str  # the arm that is subtracted: variant/form
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    subset: str
    difference: Difference
    p_accuracy: float | None  # of the paired test of accuracies; then the larger of the two p values counts
    p_adjusted: float  # by Holm's correction, over `corrected_over` differences
    in_family: bool
    equivalence: Equivalence | None  # None without a margin
    p_equivalence_adjusted: float | None
    verdict: Verdict
    sentence: str
    corrected_over: int = 1
    # With the same weight for every item; None if they weigh the same already.
    by_rows: Difference | None = None
    verdict_by_rows: Verdict | None = None
    caveat: str | None = None  # what the verdict rests on; it ends the sentence too
    warning: str | None = None  # why the interval may cover less than its confidence


@dataclass(frozen=True)
class RowWeights:
    """How unequally the test rows weigh in the primary metric."""

    task: str
    metric: str
    rows: int
    effective_rows: float  # Kish's number: so many rows of equal weight say as much
    largest_share: float  # of the weight, in one row
    max_length: int  # tokens: of the longest row that the baseline is trained on
    longer_rows: int | None  # rows whose response alone has more tokens; None if tokens were not scored
    longer_share: float | None  # of the weight, in these rows


@dataclass(frozen=True)
class Rise:
    """A variant whose validation loss, on a fixed set of rows, rose again before its training ended."""

    variant: str
    best_step: int
    last_step: int
    best: float  # nats per token, mean over the seeds
    last: float
    low: float | None  # interval of last minus best over the seeds; None with one seed
    high: float | None
    # The last step at which its loss was below the baseline's; None if there is none or it is the last step.
    ahead_until: int | None


@dataclass(frozen=True)
class Share:
    """What an arm gained, or scored, as a share of the same of the baseline as trained.

    Its measure is one of
        share_of_gain    (base - arm) / (base - baseline) of a loss, and with the opposite signs of a score: the gain over the
                         baseline's untouched base, whatever the arm's own precision
        share_of_score   arm / baseline, of a score of which more is better

    Neither is the contrast `recovery`, which is a difference.
    """

    measure: str
    variant: str
    form: str
    other: str  # the baseline's arm: variant/form
    task: str
    metric: str
    unit: str  # of the metric; a share has none
    higher_is_better: bool  # of the metric; a higher share is always better
    split: str
    subset: str
    items: int
    groups: int
    seeds: int
    confidence: float
    value: float | None  # None if the baseline's own gain or score is too uncertain to divide by
    low: float | None
    high: float | None
    divisor: Difference  # the baseline's own gain or score, and its interval
    reason: str | None  # why no share is stated


@dataclass(frozen=True)
class Divergence:
    """One measure of how far an arm's predictions lie from those of the baseline's run of the same seed, as trained.

    Both read the same prompts and responses. The metric is one of
        kl_mean            KL(baseline || arm) of the distribution of the next token, mean over the tokens of all responses
        kl_median          its median over these tokens, and
        kl_p99_9           the value that 99.9 % of them do not exceed: without an interval
        same_top_token     share of the tokens at which both find the same token the most likely
    """

    variant: str
    form: str
    other: str  # the baseline's arm: variant/form
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    split: str
    items: int
    groups: int
    tokens: int  # of one seed
    value: float  # mean over the seeds
    low: float | None
    high: float | None
    confidence: float
    per_seed: dict[str, float]


@dataclass(frozen=True)
class Part:
    """One row of the decomposition of a quantized variant's difference to the baseline."""

    variant: str
    task: str
    metric: str
    part: str
    kind: str
    form: str
    value: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Interval:
    """The two ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """One measured cost of one variant, and its ratio to the baseline's.

    Attributes:
        value: the geometric mean over the processes.
        low, high: quartiles over the steps of the one process, no confidence interval; None of several processes.
        mean_low, mean_high: the interval of `value` over processes; None of fewer than three.
        ratio_low, ratio_high: the interval of `ratio_to_baseline` over processes; None of fewer than three, and for the
            baseline.
    """

    variant: str
    metric: str
    unit: str
    higher_is_better: bool
    definition: str
    value: float
    low: float | None
    high: float | None
    ratio_to_baseline: float
    processes: int = 1
    mean_low: float | None = None
    mean_high: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class Claim:
    """One claim of the recipe that this project grew out of, checked for one variant.

    `holds` is yes, no, mixed (the primary metric says yes, but the answers got worse), in part (the primary metric says
    yes, and a metric of the answers was not measured), undecided, measured once or measured twice (a cost with too few
    processes for an interval) or not tested. The verdict belongs to the claim's difference.
    """

    claim: str
    text: str
    variant: str
    form: str
    metric: str | None
    difference: Difference | None
    verdict: Verdict | None
    holds: str
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """The whole comparison; comparison.json is its JSON."""

    baseline: str
    seeds: list[int]
    confidence: float
    power: float
    resamples: int
    primary: str
    margins: dict[str, float]
    family: dict
    held_out_categories: list[str]
    precisions: dict[str, dict]
    training: dict[str, list[dict]]
    trained_otherwise: dict[str, list[str]]  # by variant, those of its own params that change its rows
    scores: list[Score]
    contrasts: list[Contrast]
    decomposition: list[Part]
    claims: list[Claim]
    cost: list[Cost]
    rises: list[Rise] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    row_weights: RowWeights | None = None
    left_out_categories: dict[str, list[str]] = field(default_factory=dict)  # by variant, its own alone

    def as_dict(self) -> dict:
        return asdict(self)
