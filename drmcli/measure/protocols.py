"""Preference accuracy under every counting convention in use, with intervals clustered by prompt.

Published accuracies differ by several points because everyone counts ties and averages in a way of their own. A
protocol here is a credit in [0, 1] for every pair, a mask of the pairs in the denominator, and the average: micro
(every pair weighs the same) or macro (every prompt weighs the same). Each is therefore a ratio sum(w credit) / sum(w),
and one estimator of its error serves them all.

P pairs, B bins. Accuracies, their intervals and their differences are in percent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from drmcli.errors import InputError
from drmcli.measure.intervals import (
    NAN,
    Difference,
    Interval,
    p_value_of,
    proportion_ci,
    ratio_of,
    unseen_rate,
)

THRESHOLDS = np.arange(11) / 10
"""Tie thresholds on |p1 - p0| that PickScore's evaluation tries."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preference pairs with the scores of one reward model; every field is an array of length P."""

    prompt: np.ndarray
    """Which prompt (list of images) the pair belongs to: the cluster, and the unit of a macro average. Any sortable
    type."""
    label: np.ndarray
    """Probability that `chosen` is better: 1 strictly better, 0.5 a tie in the ground truth, others soft labels."""
    score_chosen: np.ndarray
    """Score of the chosen image; NaN where it could not be scored."""
    score_rejected: np.ndarray
    """Score of the rejected image; NaN where it could not be scored."""
    chosen_first: np.ndarray
    """True where the chosen image comes first in the dataset's own list. It breaks predicted ties in `hpdv2` alone."""
    weight: np.ndarray | None = None
    """Weight of each pair within its average, finite and >= 0; None is 1 for all."""

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"label": float, "score_chosen": float, "score_rejected": float, "chosen_first": bool}
        for name in ("prompt", *kinds):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kinds.get(name)))
        weight = np.ones(len(self.label)) if self.weight is None else np.asarray(self.weight, dtype=float)
        object.__setattr__(self, "weight", weight)
        shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.label.ndim != 1:
            raise InputError(f"pairs: columns differ in shape: {shapes}", hint="give one value a pair in every column")
        if not np.all((self.label >= 0) & (self.label <= 1)):
            raise InputError(
                "pairs: a label is not within [0, 1]", hint="1 chosen is better, 0.5 tie; others are soft labels"
            )
        if not np.all(np.isfinite(weight) & (weight >= 0)):
            raise InputError("pairs: a weight is negative or not finite", hint="give weights >= 0, or none")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def scored(self) -> np.ndarray:
        """bool [P]: both images have a score."""
        return ~(np.isnan(self.score_chosen) | np.isnan(self.score_rejected))

    @property
    def truth(self) -> np.ndarray:
        """int [P]: 1 people prefer chosen, 0 tie, -1 they prefer rejected (a label below 0.5)."""
        return np.sign(self.label - 0.5).astype(int)

    @property
    def predicted(self) -> np.ndarray:
        """int [P]: 1 chosen has the higher score, 0 equal scores, -1 rejected has."""
        return (self.score_chosen > self.score_rejected).astype(int) - (self.score_chosen < self.score_rejected)

    @property
    def margin(self) -> np.ndarray:
        """float [P]: score of chosen minus score of rejected; 0 where they are equal, infinities included."""
        with np.errstate(invalid="ignore"):
            return np.where(self.score_chosen == self.score_rejected, 0.0, self.score_chosen - self.score_rejected)

    def subset(self, rows: np.ndarray) -> Pairs:
        """The pairs at these positions: indices, or a bool mask."""
        return Pairs(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def swapped(self) -> Pairs:
        """The same facts with the two sides exchanged in every pair."""
        return Pairs(
            self.prompt, 1 - self.label, self.score_rejected, self.score_chosen, ~self.chosen_first, weight=self.weight
        )


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one reward model under one protocol."""

    value: float
    """Percent; NaN when no pair is in the denominator."""
    ci95: Interval
    """95 % confidence interval in percent, clustered by prompt."""
    n_prompts: int
    """Prompts with at least one scored pair."""
    n_pairs: int
    """Scored pairs, ties included."""
    n_counted: int
    """Scored pairs in the protocol's denominator."""
    n_ties: int
    """Scored pairs that are ties in the ground truth."""
    n_predicted_ties: int
    """Scored pairs that the model ties: equal scores, or a difference within `threshold`."""
    n_skipped: int
    """Pairs with an image that has no score; in no denominator and in none of the counts above."""
    threshold: float | None = None
    """Tie threshold on |p1 - p0| from the calibration pairs; None where the protocol has none."""


# Protocols: credit [P] in [0, 1] and counted [P] bool, from the pairs and from predicted [P] in {-1, 0, 1}.

Counted = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Protocol:
    """One convention for preference accuracy."""

    name: str
    description: str
    used_by: str
    count: Callable[[Pairs, np.ndarray], Counted]
    """(pairs, predicted) -> (credit, counted)."""
    macro: bool = False
    """True: the mean over prompts of each prompt's average; a prompt with nothing to count is left out."""
    calibrated: bool = False
    """True: predicted ties come from a threshold chosen on calibration pairs."""


def _all(pairs: Pairs) -> np.ndarray:
    return np.ones(len(pairs), dtype=bool)


def _strict(pairs: Pairs, predicted: np.ndarray) -> Counted:
    return (predicted == pairs.truth).astype(float), pairs.truth != 0


def _not_inverted(pairs: Pairs, predicted: np.ndarray) -> Counted:
    """A stable argsort(-score) ranks the image that is listed first above one with the same score."""
    ranked = np.where(predicted == 0, np.where(pairs.chosen_first, 1, -1), predicted)
    return (ranked * pairs.truth >= 0).astype(float), _all(pairs)


def _label_of_winner(pairs: Pairs, predicted: np.ndarray, tie: float) -> np.ndarray:
    return np.select([predicted > 0, predicted < 0], [pairs.label, 1 - pairs.label], tie)


def _ties_half(pairs: Pairs, predicted: np.ndarray) -> Counted:
    return _label_of_winner(pairs, predicted, tie=0.5), _all(pairs)


def _pickscore_training(pairs: Pairs, predicted: np.ndarray) -> Counted:
    return _label_of_winner(pairs, predicted, tie=0.0), _all(pairs)


def _three_way(pairs: Pairs, predicted: np.ndarray) -> Counted:
    """1 where both say the same of {chosen, tie, rejected}, 0 where they are opposite, 0.5 where just one says tie."""
    return 1 - np.abs(predicted - pairs.truth) / 2, _all(pairs)


def _drop_ties(pairs: Pairs, predicted: np.ndarray) -> Counted:
    return (1 + predicted * pairs.truth) / 2, pairs.truth != 0


def _ties_wrong(pairs: Pairs, predicted: np.ndarray) -> Counted:
    return (predicted * pairs.truth > 0).astype(float), _all(pairs)


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "strict",
            "Micro average over the pairs that are strict in the ground truth; equal scores are wrong.",
            "ImageReward test.py; HPSv3's evaluation on HPDv3",
            _strict,
        ),
        Protocol(
            "hpdv2",
            "Mean over prompts of 1 - inversions / pairs: ground-truth ties are right, equal scores keep list order.",
            "HPSv2 evaluation on HPDv2; MPS",
            _not_inverted,
            macro=True,
        ),
        Protocol(
            "imagereward-macro",
            "Mean over prompts of the accuracy on a prompt's strict pairs; equal scores are wrong.",
            "HPSv2's evaluation on ImageReward's test set",
            _strict,
            macro=True,
        ),
        Protocol(
            "ties-half",
            "Micro average over all pairs of the label of the image with the higher score: a ground-truth "
            "tie gives half, and so do equal scores.",
            "the expected result when ties are settled by a fair coin; PickScore's training code but for equal scores",
            _ties_half,
        ),
        Protocol(
            "pickscore-training",
            "Micro average over all pairs of the label of the image with the higher score: a ground-truth tie "
            "gives half, but equal scores give 0.",
            "PickScore's validation during training (clip_task.py)",
            _pickscore_training,
        ),
        Protocol(
            "pickscore-threshold",
            "Micro average over all pairs; the model ties where |p1 - p0| is within a threshold chosen on calibration "
            "pairs: 1 for the same answer of three, 0.5 where just one is a tie, 0 for the opposite.",
            "PickScore's reported accuracy on Pick-a-Pic (eval_preference_predictor.py)",
            _three_way,
            calibrated=True,
        ),
        Protocol(
            "drop-ties-micro",
            "Micro average over the pairs that are strict in the ground truth; equal scores give half.",
            "evaluations that discard tied pairs (imscore), without a penalty for equal scores",
            _drop_ties,
        ),
        Protocol(
            "drop-ties-macro",
            "Mean over prompts of the accuracy on a prompt's strict pairs; equal scores give half.",
            "evaluations that discard tied pairs and average by prompt",
            _drop_ties,
            macro=True,
        ),
        Protocol(
            "ties-wrong-micro",
            "Micro average over all pairs; a tie in the ground truth or in the scores is wrong, so 100 % is out of "
            "reach where the ground truth has ties.",
            "DiNa-LRM's inference engine",
            _ties_wrong,
        ),
    )
}


def countable(protocol: str, *, calibrated: bool = False) -> str:
    """The protocol to report first: a dataset's own, or `ties-half` where that needs calibration pairs and there are none."""
    return "ties-half" if PROTOCOLS[protocol].calibrated and not calibrated else protocol


def accuracy(pairs: Pairs, protocol: str, calibration: Pairs | None = None, temperature: float = 1.0) -> Accuracy:
    """Accuracy under the named protocol. Pairs with a NaN score leave every denominator.

    `calibration` (other pairs, scored by the same model) and `temperature` (scores are divided by it before the
    softmax) serve the calibrated protocol alone. Raises InputError for an unknown protocol, or when calibration pairs
    are needed and missing.

    Two prompts of pairs (label, score difference): A (1, +), (1, -), (0.5, +); B (1, +). Then strict = 2/3, hpdv2 =
    (2/3 + 1)/2 = 83.3 %, imagereward-macro = (1/2 + 1)/2 = 75 %, ties-half = 2.5/4, ties-wrong-micro = 2/4.
    """
    chosen = _protocol(protocol)
    threshold = _calibrate(chosen, calibration, temperature)
    kept = pairs.subset(pairs.scored)
    predicted = _predict(kept, threshold, temperature)
    credit, weight = _weigh(chosen, kept, predicted)
    ratio = ratio_of(credit, weight, kept.prompt)
    low, high = proportion_ci(ratio)
    return Accuracy(
        value=100 * ratio.value,
        ci95=(100 * low, 100 * high),
        n_prompts=len(np.unique(kept.prompt)),
        n_pairs=len(kept),
        n_counted=ratio.n,
        n_ties=int(np.sum(kept.truth == 0)),
        n_predicted_ties=int(np.sum(predicted == 0)),
        n_skipped=len(pairs) - len(kept),
        threshold=threshold,
    )


def all_protocols(pairs: Pairs, calibration: Pairs | None = None, temperature: float = 1.0) -> dict[str, Accuracy]:
    """Accuracy under every protocol, in the order of PROTOCOLS; calibrated ones only where there are calibration
    pairs."""
    return {
        name: accuracy(pairs, name, calibration, temperature)
        for name, protocol in PROTOCOLS.items()
        if calibration is not None or not protocol.calibrated
    }


def tie_threshold(calibration: Pairs, temperature: float = 1.0) -> float:
    """The first of 0, 0.1, ..., 1 with the best `pickscore-threshold` accuracy on these pairs (PickScore's own choice).

    Raises InputError when no calibration pair is scored.
    """
    kept = calibration.subset(calibration.scored)
    if not np.any(kept.weight):
        raise InputError("calibration: no pair has a score", hint="check the images of the calibration split")
    results = [np.average(_three_way(kept, _predict(kept, t, temperature))[0], weights=kept.weight) for t in THRESHOLDS]
    return float(THRESHOLDS[np.argmax(results)])


def paired_difference(
    pairs_a: Pairs,
    pairs_b: Pairs,
    protocol: str,
    calibration_a: Pairs | None = None,
    calibration_b: Pairs | None = None,
    temperature_a: float = 1.0,
    temperature_b: float = 1.0,
) -> Difference:
    """Accuracy of model a minus that of model b on the same pairs, with a clustered 95 % interval and p-value.

    Only pairs that both have scored count. Raises InputError when the two are not the same pairs in the same order.
    """
    chosen = _protocol(protocol)
    for name in ("prompt", "label", "chosen_first", "weight"):
        if not np.array_equal(getattr(pairs_a, name), getattr(pairs_b, name)):
            raise InputError(f"pairs: the two models differ in {name}", hint="score the same pairs, in the same order")
    both = pairs_a.scored & pairs_b.scored
    credits = []
    weight = prompt = np.empty(0)
    for pairs, calibration, temperature in (
        (pairs_a, calibration_a, temperature_a),
        (pairs_b, calibration_b, temperature_b),
    ):
        kept = pairs.subset(both)
        credit, weight = _weigh(chosen, kept, _predict(kept, _calibrate(chosen, calibration, temperature), temperature))
        credits.append(credit)
        prompt = kept.prompt
    ratio = ratio_of(credits[0] - credits[1], weight, prompt)
    # Where every prompt shows the same difference, the interval allows for the share of prompts that could yet deviate.
    slack = unseen_rate(ratio.n_clusters) if ratio.se == 0 else ratio.critical * ratio.se
    low, high = max(ratio.value - slack, -1.0), min(ratio.value + slack, 1.0)
    a, b = (ratio_of(credit, weight, prompt).value for credit in credits)
    n_skipped = len(pairs_a) - int(both.sum())
    return Difference(
        100 * ratio.value,
        (100 * low, 100 * high),
        p_value_of(ratio),
        100 * a,
        100 * b,
        ratio.n,
        ratio.n_clusters,
        n_skipped,
    )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Whether a score difference means the probability it says (Bradley-Terry): predicted against observed."""

    edges: np.ndarray
    """[B + 1] bounds of the bins of predicted probability, from 0 to 1."""
    predicted: np.ndarray
    """[B] mean predicted probability; NaN in an empty bin."""
    observed: np.ndarray
    """[B] mean label; NaN in an empty bin."""
    count: np.ndarray
    """[B] number of sides; every scored pair counts twice, once from either side."""
    ece: float
    """Expected calibration error in [0, 1]: mean over sides of |observed - predicted| of their bin. NaN with no
    pairs."""


def calibration_curve(pairs: Pairs, bins: int = 10, temperature: float = 1.0) -> Calibration:
    """sigmoid(score difference / temperature) against the label, in equal bins.

    Each pair enters from both sides, as (p, label) and (1 - p, 1 - label): with the chosen side alone every label
    would be 1 and a model that is sure and always right would look no better calibrated than one that is never sure.
    Ground-truth ties take part with their label of 0.5.
    """
    kept = pairs.subset(pairs.scored)
    p = 0.5 * (1 + np.tanh(kept.margin / (2 * temperature)))
    index = np.minimum((p * bins).astype(int), bins - 1)
    both = np.concatenate([index, bins - 1 - index])
    p, label = np.concatenate([p, 1 - p]), np.concatenate([kept.label, 1 - kept.label])
    weight = np.tile(np.asarray(kept.weight), 2)

    total = np.bincount(both, weight, bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        predicted = np.bincount(both, weight * p, bins) / total
        observed = np.bincount(both, weight * label, bins) / total
        ece = float(np.nansum(total * np.abs(observed - predicted)) / total.sum()) if total.sum() else NAN
    return Calibration(np.linspace(0, 1, bins + 1), predicted, observed, np.bincount(both, minlength=bins), ece)


# From a protocol to weighted credits


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise InputError(f"protocol {name}: there is no such protocol", hint=f"choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def _calibrate(protocol: Protocol, calibration: Pairs | None, temperature: float) -> float | None:
    if not protocol.calibrated:
        return None
    if calibration is None:
        raise InputError(
            f"protocol {protocol.name}: it needs calibration pairs",
            hint="score the validation split too, or use ties-half",
        )
    return tie_threshold(calibration, temperature)


def _predict(pairs: Pairs, threshold: float | None, temperature: float) -> np.ndarray:
    """int [P] in {-1, 0, 1}. With p the softmax of the two scores, |p1 - p0| = tanh(|score difference| / 2)."""
    if threshold is None:
        return pairs.predicted
    return np.where(np.abs(np.tanh(pairs.margin / (2 * temperature))) <= threshold, 0, pairs.predicted)


def _weigh(protocol: Protocol, pairs: Pairs, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(credit, weight), both [P]; a macro average is the micro one with every prompt's weights scaled to a sum of 1."""
    credit, counted = protocol.count(pairs, predicted)
    weight = np.where(counted, np.asarray(pairs.weight), 0.0)
    if protocol.macro:
        group = np.unique(pairs.prompt, return_inverse=True)[1]
        total = np.bincount(group, weight)[group]
        weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return credit, weight
