"""What the runs of a study show: error rates, paired differences, and how small a difference could be seen.

Guarantees: two arms are compared over the seeds that both have and the same utterances, resampled together. All figures
follow from the hypotheses and metrics of the run folders.
Try: `stillhouse study STUDY --table`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ...data.errors import CorpusError
from ..report.html import Points, read_metrics, series
from ..score.hypotheses import read_hypotheses
from ..score.wer import bootstrap_sums, error_counts
from .definition import Study, StudyRun, changes_of_arms
from .runs import check, done
from .words import Holds, class_errors, word_classes

RESAMPLES = 2_000
# A two-sided test at 5 % finds a difference of so many standard errors with a probability of 4 in 5.
FOUND = 1.96 + 0.84


@dataclass(frozen=True)
class Estimate:
    """A rate, or a difference of rates. `low` and `high` bound its 95 % bootstrap interval over utterances."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ErrorDifference:
    """The error rate of an arm minus that of the arm `to`, over the seeds that both have.

    relative: the difference over the other arm's rate.
    by_seed: the difference of each seed, in the order of the seeds.
    verdict: "lower" or "higher" if the difference is above 1.96 standard errors, which include the spread over
        utterances and between seeds. Otherwise "not shown". "one seed" if the spread between seeds is unknown.
    """

    to: str
    estimate: Estimate
    relative: float
    by_seed: tuple[float, ...]
    verdict: str


@dataclass(frozen=True)
class ClassRow:
    """How many of the reference words of a class one arm gets wrong on one split, averaged over its seeds.

    words: how many words of the class the references have.
    """

    arm: str
    split: str
    name: str
    words: int
    wrong: Estimate
    differences: tuple[ErrorDifference, ...]


@dataclass(frozen=True)
class ArmRow:
    """One arm on one split, averaged over its seeds.

    seconds: training time of a run.
    transfer: sum of the transfers' losses over the last tenth of training. None without transfer.
    dev_loss: RNN-T loss per unit of data.dev at the end. None if a run has none.
    """

    arm: str
    split: str
    seeds: tuple[int, ...]
    wer: Estimate
    cer: Estimate
    differences: tuple[ErrorDifference, ...]
    steps: int
    seconds: float
    transfer: float | None
    dev_loss: float | None


@dataclass(frozen=True)
class Detectable:
    """The smallest true difference of two arms with `seeds` seeds each that is found with a probability of 4 in 5."""

    split: str
    value: float
    seeds: int
    utterances: int
    how: str


@dataclass(frozen=True)
class Table:
    """All results of a study.

    missing: runs that are not done.
    changes: what each arm changes, as TOML.
    commands: the command that runs each arm.
    classes: errors by class of words, if the study has classes.
    """

    study: str
    metric: str
    against: tuple[str, ...]
    rows: tuple[ArmRow, ...]
    detectable: tuple[Detectable, ...]
    missing: tuple[str, ...]
    changes: dict[str, str]
    commands: dict[str, str]
    classes: tuple[ClassRow, ...] = ()

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(row.split for row in self.rows))

    def values(self, metric: str) -> dict[str, float | None]:
        """Return "wer", "cer" or the "loss" on dev of each arm, on the split that decides."""
        rows = self.of(self.splits[0])
        return {row.arm: row.dev_loss if metric == "loss" else getattr(row, metric).value for row in rows}

    def of(self, split: str) -> list[ArmRow]:
        return [row for row in self.rows if row.split == split]


@dataclass(frozen=True)
class ArmErrors:
    """Errors int [S, U] and reference lengths int [U] of one arm's S runs on one split, by metric or class of words."""

    seeds: list[int]
    ids: list[str]
    errors: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]

    def estimate(self, metric: str) -> Estimate:
        """Return the mean rate of the runs."""
        value = self.errors[metric].sum(1).mean() / max(1, self.reference[metric].sum())
        return _estimate(value, self.resampled_rates(metric).mean(1))

    def rates(self, metric: str) -> np.ndarray:
        """Return the error rate of each run, float64 [S]."""
        return self.errors[metric].sum(1) / max(1, self.reference[metric].sum())

    def resampled_rates(self, metric: str) -> np.ndarray:
        """Return error rates of bootstrap samples, float64 [resamples, S]."""
        columns = np.concatenate([self.errors[metric], self.reference[metric][None]])
        sums = bootstrap_sums(columns.T, resamples=RESAMPLES)
        return sums[:, :-1] / np.maximum(1, sums[:, -1:])


def tabulate(study: Study) -> Table:
    """Return the results of the runs that are done.

    Raises StaleError if runs cannot be compared, and CorpusError if two were decoded with different transcripts.
    """
    check(study)
    definition = study.definition
    finished = {arm: [run for run in study.of(arm) if done(run, study)] for arm in definition.arms}
    words = word_classes(study)
    rows: list[ArmRow] = []
    classes: list[ClassRow] = []
    for split in study.columns:
        arms = {arm: _read(runs, split, words) for arm, runs in finished.items() if runs}
        first = next(iter(arms), "")
        for arm, errors in arms.items():
            same = all(np.array_equal(errors.reference[m], arms[first].reference[m]) for m in errors.reference)
            if errors.ids != arms[first].ids or not same:
                raise _other_transcripts(f"{arm}, {split}", f"{first}, {split}")
            before = study.against[: study.against.index(arm)] if arm in study.against else study.against
            others = {to: arms[to] for to in before if to in arms}
            rows.append(_row(arm, split, finished[arm], errors, others, definition.metric))
            classes += [_class_row(arm, split, name, errors, others) for name in words]
    return Table(
        study.name,
        definition.metric,
        tuple(study.against),
        tuple(rows),
        tuple(detectable_differences(study)),
        tuple(str(run) for run in study.runs if not done(run, study)),
        changes_of_arms(study),
        {arm: study.command(arm) for arm in definition.arms},
        tuple(classes),
    )


def detectable_differences(study: Study) -> list[Detectable]:
    """Return what each test split can show, from the runs of the reference arm that are done."""
    arm, definition = study.against[0], study.definition
    runs = [run for run in study.of(arm) if done(run, study)]
    splits = study.columns if runs else []
    return [detectable(_read(runs, s), s, definition.metric, arm, len(definition.seeds)) for s in splits]


def mean_curves(study: Study) -> dict[str, dict[str, Points]]:
    """Return {caption: {arm: curve}}, means over the seeds that have begun."""
    plots = {
        "Error rate on dev": ("dev", study.definition.metric, 100.0),
        "Transducer loss": ("train", "rnnt", 1.0),
        "Transducer loss on dev": ("dev", "rnnt", 1.0),
        "Transfer loss": ("train", "transfer", 1.0),
        "Perplexity of a unit on dev": ("dev", "text_perplexity", 1.0),
    }
    curves: dict[str, dict[str, Points]] = {caption: {} for caption in plots}
    for arm in study.definition.arms:
        runs = [read_metrics(run.folder / "metrics.jsonl") for run in study.of(arm)]
        for caption, (kind, key, scale) in plots.items():
            values: dict[float, list[float]] = {}
            for step, value in (point for records in runs for point in series(records, key, kind, scale)):
                values.setdefault(step, []).append(value)
            curves[caption][arm] = [(step, float(np.mean(values[step]))) for step in sorted(values)]
    return curves


def detectable(errors: ArmErrors, split: str, metric: str, arm: str, seeds: int) -> Detectable:
    """Return how small a difference can be found, from how much the runs of one arm differ by the seed alone.

    For each pair of seeds, take the larger of the squared difference and its bootstrap variance over utterances, and
    average. Two runs may be close by chance, and a small test set may hide their difference. With one seed, take twice
    the bootstrap variance of its rate, as if two runs had nothing in common. That is an upper bound for the part of
    the test set, and has no part for the seeds.
    """
    drawn, point = errors.resampled_rates(metric), errors.rates(metric)
    if len(errors.seeds) > 1:
        pairs = [(i, j) for i in range(len(point)) for j in range(i)]
        squared = float(np.mean([(point[i] - point[j]) ** 2 for i, j in pairs]))
        resampled = float(np.mean([np.var(drawn[:, i] - drawn[:, j]) for i, j in pairs]))
        variance, how = (
            max(squared, resampled),
            f"from the {len(point)} runs of the arm “{arm}”, which differ in the seed alone",
        )
    else:
        variance, how = (
            2 * float(np.var(drawn[:, 0])),
            f"from one run of the arm “{arm}”, and better known with more seeds",
        )
    return Detectable(split, FOUND * (variance / seeds) ** 0.5, seeds, len(errors.ids), how)


def _read(runs: Sequence[StudyRun], split: str, words: Mapping[str, Holds] = MappingProxyType({})) -> ArmErrors:
    texts: tuple[list[str], list[str]] | None = None  # ids, references
    errors: dict[str, list[np.ndarray]] = {}
    reference: dict[str, np.ndarray] = {}
    for run in runs:
        path = run.hypotheses(split)
        ids, refs, hyps = (list(column) for column in zip(*read_hypotheses(path)))
        if (ids, refs) != (texts := texts or (ids, refs)):
            raise _other_transcripts(path, runs[0].hypotheses(split))
        for metric in ("wer", "cer"):
            table = error_counts(refs, hyps, characters=metric == "cer")
            errors.setdefault(metric, []).append(table[:, :3].sum(1))
            reference[metric] = table[:, 3]
        for name, counts in class_errors(refs, hyps, words).items():
            errors.setdefault(name, []).append(counts[:, 0])
            reference[name] = counts[:, 1]
    return ArmErrors([run.seed for run in runs], ids, {m: np.stack(rows) for m, rows in errors.items()}, reference)


def _other_transcripts(where: object, other: object) -> CorpusError:
    return CorpusError(
        f"the transcripts differ from those of {other}",
        where=where,
        remedy="delete the result.json of the older runs, and the study decodes them again",
    )


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _row(
    arm: str, split: str, runs: Sequence[StudyRun], errors: ArmErrors, others: dict[str, ArmErrors], metric: str
) -> ArmRow:
    steps = runs[0].config.steps
    metrics = [read_metrics(run.folder / "metrics.jsonl") for run in runs]
    trained = [[m for m in records if m["kind"] == "train"] for records in metrics]
    ends = [m["transfer"] for records in trained for m in records[-max(1, len(records) // 10) :] if "transfer" in m]
    dev = [value for records in metrics for step, value in series(records, "rnnt", "dev") if step == steps]
    differences = (_difference(errors, other, to, metric) for to, other in others.items())
    return ArmRow(
        arm,
        split,
        tuple(errors.seeds),
        errors.estimate("wer"),
        errors.estimate("cer"),
        tuple(d for d in differences if d is not None),
        steps,
        float(np.mean([sum(m["seconds"] for m in records) for records in trained])),
        float(np.mean(ends)) if ends else None,
        float(np.mean(dev)) if len(dev) == len(runs) else None,
    )


def _class_row(arm: str, split: str, name: str, errors: ArmErrors, others: Mapping[str, ArmErrors]) -> ClassRow:
    found = (_difference(errors, other, to, name) for to, other in others.items())
    count = int(errors.reference[name].sum())
    return ClassRow(arm, split, name, count, errors.estimate(name), tuple(d for d in found if d is not None))


def _difference(own: ArmErrors, other: ArmErrors, to: str, metric: str) -> ErrorDifference | None:
    common = sorted(set(own.seeds) & set(other.seeds))
    if not common:
        return None
    i, j = ([errors.seeds.index(seed) for seed in common] for errors in (own, other))
    drawn = (own.resampled_rates(metric)[:, i] - other.resampled_rates(metric)[:, j]).mean(1)
    rates, others = own.rates(metric)[i], other.rates(metric)[j]
    by_seed = rates - others
    between = by_seed.var(ddof=1) / len(common) if len(common) > 1 else 0.0
    error = float(np.sqrt(drawn.var() + between))
    value = float(by_seed.mean())
    if len(common) == 1:
        verdict = "one seed"
    else:
        verdict = "not shown" if abs(value) <= 1.96 * error else "lower" if value < 0 else "higher"
    relative = value / float(others.mean()) if others.mean() else 0.0
    return ErrorDifference(to, _estimate(value, drawn), relative, tuple(float(x) for x in by_seed), verdict)
