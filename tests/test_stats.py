"""Accuracy protocols against literal re-computations on rankings, clustered intervals against simulation, published
figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from drmcli.data.datasets import DATASETS
from drmcli.errors import InputError
from drmcli.measure import intervals, protocols, published
from drmcli.measure.intervals import mean_ci, paired_ci
from drmcli.measure.protocols import PROTOCOLS, Pairs, accuracy, all_protocols, paired_difference

Lists = list[tuple[list[int], list[float]]]
"""(ranks, 1 best; scores) of each prompt's images in list order."""


def pairs_of(lists: Lists) -> Pairs:
    """All pairs i < j of each list; chosen is the better ranked, and the first of a tie."""
    rows = []
    for prompt, (ranks, scores) in enumerate(lists):
        for i, j in itertools.combinations(range(len(ranks)), 2):
            first = ranks[i] <= ranks[j]
            label = 0.5 if ranks[i] == ranks[j] else 1.0
            chosen, rejected = (i, j) if first else (j, i)
            rows.append((prompt, label, scores[chosen], scores[rejected], first))
    return Pairs(*(np.array(column) for column in zip(*rows, strict=True)))


def random_lists(seed: int, kind: str, prompts: int = 25) -> Lists:
    """Lists of 2 to 9 images with tied, gappy ranks; each has at least one strict pair, among the scored images too."""
    rng = np.random.default_rng(seed)
    lists: Lists = []
    for _ in range(prompts):
        n = int(rng.integers(2, 10))
        ranks = rng.integers(1, 6, n)
        ranks[:2] = [4, 2]
        scores = {
            "normal": rng.normal(size=n),
            "tied": rng.integers(0, 3, n).astype(float),
            "constant": np.zeros(n),
            "perfect": -ranks.astype(float),
            "reversed": ranks.astype(float),
            "infinite": rng.choice([-np.inf, 0.0, np.inf], n),
            "nan": np.where(rng.random(n) < 0.3, np.nan, rng.integers(0, 4, n)),
        }[kind]
        scores[:2] = np.where(np.isnan(scores[:2]), 1.0, scores[:2])
        lists.append((ranks.tolist(), scores.tolist()))
    return lists


def scored(lists: Lists) -> Lists:
    """Without the images that have no score."""
    kept = [[(r, s) for r, s in zip(*item, strict=True) if not math.isnan(s)] for item in lists]
    return [([r for r, _ in item], [s for _, s in item]) for item in kept]


# Literal re-computations, image by image


def literal_strict(ranks: list[int], scores: list[float]) -> tuple[int, int]:
    right = total = 0
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] > ranks[j]:
            total += 1
            right += scores[i] < scores[j]
        elif ranks[i] < ranks[j]:
            total += 1
            right += scores[i] > scores[j]
    return right, total


def literal_inversions(ranks: list[int], scores: list[float]) -> float:
    """1 - inversions / pairs on the places of a stable descending sort."""
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    places = [order.index(k) for k in range(len(scores))]
    inverted = 0
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if (places[i] > places[j] and ranks[i] < ranks[j]) or (places[i] < places[j] and ranks[i] > ranks[j]):
            inverted += 1
    return 1 - inverted / (len(ranks) * (len(ranks) - 1) / 2)


def literal(name: str, lists: Lists) -> float:
    counts = [literal_strict(*item) for item in lists]
    if name == "strict":
        return 100 * sum(right for right, _ in counts) / sum(total for _, total in counts)
    if name == "imagereward-macro":
        return 100 * sum(right / total for right, total in counts) / len(counts)
    if name == "hpdv2":
        return 100 * sum(literal_inversions(*item) for item in lists) / len(lists)
    if name == "ties-wrong-micro":
        n_pairs = sum(len(ranks) * (len(ranks) - 1) // 2 for ranks, _ in lists)
        return 100 * sum(right for right, _ in counts) / n_pairs
    raise AssertionError(name)


KINDS = ["normal", "tied", "constant", "perfect", "reversed", "infinite", "nan"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["strict", "imagereward-macro", "hpdv2", "ties-wrong-micro"])
def test_ranking_protocols_equal_their_reference(name: str, kind: str) -> None:
    for seed in range(4):
        lists = random_lists(seed, kind)
        result = accuracy(pairs_of(lists), name)
        assert result.value == pytest.approx(literal(name, scored(lists)), abs=1e-9)
        assert result.n_skipped == len(pairs_of(lists)) - len(pairs_of(scored(lists)))
        assert (result.n_skipped > 0) == (kind == "nan")


def answer(difference: float, threshold: float) -> str:
    """chosen, rejected or tie, from the softmax of scores (difference, 0)."""
    p_chosen, p_rejected = 1 / (1 + math.exp(-difference)), 1 / (1 + math.exp(difference))
    if abs(p_rejected - p_chosen) <= threshold:
        return "tie"
    return "chosen" if p_chosen > p_rejected else "rejected"


def literal_threshold(pairs: Pairs, threshold: float) -> float:
    credits = []
    for label, a, b in zip(pairs.label, pairs.score_chosen, pairs.score_rejected, strict=True):
        if math.isnan(a) or math.isnan(b):
            continue
        people = "tie" if label == 0.5 else "chosen" if label == 1 else "rejected"
        model = answer(a - b, threshold)
        credits.append(1.0 if people == model else 0.5 if "tie" in (people, model) else 0.0)
    return sum(credits) / len(credits)


@pytest.mark.parametrize("kind", ["normal", "tied", "constant", "nan", "reversed"])
def test_threshold_protocol_equals_its_reference(kind: str) -> None:
    candidates = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    thresholds = set()
    for seed in range(6):
        test, validation = pairs_of(random_lists(seed, kind)), pairs_of(random_lists(100 + seed, kind))
        results = [literal_threshold(validation, t) for t in candidates]
        best = candidates[results.index(max(results))]
        found = accuracy(test, "pickscore-threshold", calibration=validation)
        assert found.threshold == best
        assert found.value == pytest.approx(100 * literal_threshold(test, best))
        thresholds.add(best)
    assert len(thresholds) > 1 or kind in ("constant", "reversed")


def test_threshold_1_ties_even_the_surest_scores() -> None:
    """Ground-truth ties alone, scores so far apart that p is 0 and 1: of all thresholds only 1 calls them ties."""
    n = np.arange(4)
    ties = Pairs(n, np.full(4, 0.5), np.array([np.inf, 1e3, -1e3, 0]), np.array([0, 0, 0, 1e3]), np.ones(4))
    found = accuracy(ties, "pickscore-threshold", calibration=ties)
    assert (found.threshold, found.value, found.n_predicted_ties) == (1, 100, 4)


def test_temperature_divides_the_scores_of_the_threshold_protocol() -> None:
    test, validation = pairs_of(random_lists(1, "normal")), pairs_of(random_lists(2, "normal"))
    hot, cold = (
        Pairs(p.prompt, p.label, 7 * p.score_chosen, 7 * p.score_rejected, p.chosen_first) for p in (test, validation)
    )
    assert accuracy(hot, "pickscore-threshold", cold, temperature=7) == accuracy(
        test, "pickscore-threshold", validation
    )


@pytest.mark.parametrize(("name", "tie"), [("ties-half", 0.5), ("pickscore-training", 0.0)])
def test_label_of_the_winner(name: str, tie: float) -> None:
    rng = np.random.default_rng(3)
    label, a, b = rng.choice([0.5, 0.7, 1.0], 200), rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    credits = [p if x > y else 1 - p if x < y else tie for p, x, y in zip(label, a, b, strict=True)]
    pairs = Pairs(np.arange(200) // 5, label, a, b, np.ones(200))
    assert accuracy(pairs, name).value == pytest.approx(100 * sum(credits) / 200)


def example() -> Pairs:
    """Prompt A: right, wrong, and a ground-truth tie that the model orders; prompt B: right, and equal scores with the
    chosen image second in the list."""
    return Pairs(
        prompt=np.array([0, 0, 0, 1, 1]),
        label=np.array([1, 1, 0.5, 1, 1]),
        score_chosen=np.array([2.0, 1, 3, 5, 4]),
        score_rejected=np.array([1.0, 2, 0, 1, 4]),
        chosen_first=np.array([True, True, True, True, False]),
    )


def test_example_by_hand() -> None:
    """strict: A 1/2, B 1/2 -> 2/4. hpdv2: A (1+0+1)/3, B (1+0)/2 -> 7/12. ties-half: (1+0+.5+1+.5)/5 = 3/5; training
    code: 2.5/5. drop-ties: micro (1+0+1+.5)/4 = 5/8, macro (1/2 + 3/4)/2 = 5/8. ties-wrong: 2/5. Threshold 0, from
    calibration pairs that are all right and wide apart: 1+0+.5+1+.5 -> 3/5."""
    sure = Pairs(np.arange(3), np.ones(3), np.full(3, 50.0), np.zeros(3), np.ones(3))
    expected = {
        "strict": 50,
        "hpdv2": 700 / 12,
        "imagereward-macro": 50,
        "ties-half": 60,
        "pickscore-training": 50,
        "pickscore-threshold": 60,
        "drop-ties-micro": 62.5,
        "drop-ties-macro": 62.5,
        "ties-wrong-micro": 40,
    }
    found = all_protocols(example(), calibration=sure)
    assert {name: result.value for name, result in found.items()} == pytest.approx(expected)
    assert list(found) == list(PROTOCOLS) == list(expected)
    result = found["strict"]
    assert (result.n_prompts, result.n_pairs, result.n_counted, result.n_ties, result.n_predicted_ties) == (
        2,
        5,
        4,
        1,
        1,
    )
    assert "pickscore-threshold" not in all_protocols(example())


CALIBRATION = pairs_of(random_lists(9, "normal"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0, None, 0, 50, 0, None, 50, 50, 0]),
        ("perfect", [100, 100, 100, None, None, None, 100, 100, None]),
        ("reversed", [0, None, 0, None, None, None, 0, 0, 0]),
    ],
)
def test_constant_perfect_and_reversed_models(kind: str, expected: list[float | None]) -> None:
    """With a share t of ties in the ground truth, ties give half: a perfect model has 1 - t/2, a reversed one t/2
    (both by ties-half where a tied rank gets a tied score), and ties-wrong at best 1 - t. hpdv2 gives a reversed model
    each prompt's own t."""
    pairs = pairs_of(random_lists(5, kind))
    found = all_protocols(pairs)
    for name, value in zip(PROTOCOLS, expected, strict=True):
        if value is not None:
            assert found[name].value == pytest.approx(value), name
    ties = 100 * float(np.mean(pairs.truth == 0))
    if kind == "perfect":
        assert found["ties-half"].value == pytest.approx(100 - ties / 2)
        assert found["ties-wrong-micro"].value == pytest.approx(100 - ties)
    if kind == "reversed":
        assert found["ties-half"].value == pytest.approx(ties / 2)
        assert found["hpdv2"].value == pytest.approx(
            np.mean([np.mean(pairs.truth[pairs.prompt == p] == 0) for p in range(25)]) * 100
        )


def test_order_of_pairs_does_not_matter() -> None:
    pairs = pairs_of(random_lists(6, "nan"))
    shuffled = pairs.subset(np.random.default_rng(0).permutation(len(pairs)))
    for name in PROTOCOLS:
        a, b = accuracy(pairs, name, CALIBRATION), accuracy(shuffled, name, CALIBRATION)
        assert (a.value, *a.ci95) == pytest.approx((b.value, *b.ci95), abs=1e-9)
        assert (a.n_counted, a.n_skipped, a.n_ties) == (b.n_counted, b.n_skipped, b.n_ties)


@pytest.mark.parametrize("kind", ["tied", "nan"])
def test_side_called_chosen_does_not_matter(kind: str) -> None:
    """Swapping sides with their label is the same data; only a wrong list order may change `hpdv2`, and only by
    predicted ties."""
    pairs = pairs_of(random_lists(7, kind))
    for name in PROTOCOLS:
        assert accuracy(pairs.swapped(), name, CALIBRATION) == accuracy(pairs, name, CALIBRATION), name
    other = Pairs(pairs.prompt, pairs.label, pairs.score_chosen, pairs.score_rejected, ~pairs.chosen_first)
    changed = {n for n in PROTOCOLS if accuracy(other, n, CALIBRATION) != accuracy(pairs, n, CALIBRATION)}
    assert changed == {"hpdv2"}


def test_prompt_labels_may_be_text_and_weights_count() -> None:
    """Weight 3 on a pair is that pair three times over."""
    pairs = example()
    names = np.array(["b", "b", "b", "a", "a"])
    weighted = Pairs(
        names,
        pairs.label,
        pairs.score_chosen,
        pairs.score_rejected,
        pairs.chosen_first,
        weight=np.array([3, 1, 1, 1, 0]),
    )
    repeated = pairs.subset(np.array([0, 0, 0, 1, 2, 3]))
    for name in PROTOCOLS:
        a, b = accuracy(weighted, name, CALIBRATION), accuracy(repeated, name, CALIBRATION)
        assert (a.value, *a.ci95) == pytest.approx((b.value, *b.ci95))


def test_nothing_to_count_is_nan_and_bad_input_is_named() -> None:
    tied = Pairs(np.zeros(2), np.full(2, 0.5), np.ones(2), np.zeros(2), np.ones(2))
    empty = accuracy(tied.subset(np.zeros(0, dtype=int)), "hpdv2")
    for result in (accuracy(tied, "strict"), accuracy(tied, "imagereward-macro"), empty):
        assert math.isnan(result.value) and math.isnan(result.ci95[0]) and result.n_counted == 0
    unscored = Pairs(np.zeros(2), np.ones(2), np.full(2, np.nan), np.ones(2), np.ones(2))
    assert accuracy(unscored, "strict").n_skipped == 2
    with pytest.raises(InputError, match="needs calibration"):
        accuracy(tied, "pickscore-threshold")
    with pytest.raises(InputError, match="no pair has a score"):
        accuracy(tied, "pickscore-threshold", calibration=unscored)
    with pytest.raises(InputError, match="no such protocol"):
        accuracy(tied, "micro")
    with pytest.raises(InputError, match="label"):
        Pairs(np.zeros(1), np.full(1, np.nan), np.ones(1), np.ones(1), np.ones(1))
    with pytest.raises(InputError, match="shape"):
        Pairs(np.zeros(1), np.ones(2), np.ones(2), np.ones(2), np.ones(2))


def test_countable_protocols() -> None:
    assert protocols.countable("pickscore-threshold") == "ties-half"
    assert protocols.countable("pickscore-threshold", calibrated=True) == "pickscore-threshold"
    assert protocols.countable("hpdv2") == "hpdv2"
    assert protocols.countable("strict") == "strict"


# Intervals


@pytest.mark.parametrize(
    ("df", "point"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (31, 2.03951), (5000, 1.95996)]
)
def test_t_quantile_equals_the_printed_table(df: int, point: float) -> None:
    assert intervals.t_quantile(df) == pytest.approx(point, abs=2e-5)


def outcomes(right: np.ndarray, prompt: np.ndarray) -> Pairs:
    """Strict pairs that a model gets right or wrong."""
    n = len(right)
    return Pairs(prompt, np.ones(n), right.astype(float), 0.5 * np.ones(n), np.ones(n))


def test_independent_pairs_give_wilson() -> None:
    """One pair a prompt, 300 of 400 right: se^2 = p(1-p)/(n-1), so Wilson's interval with 399 pairs: 70.5 to 79.0."""
    p, n, z = 0.75, 399, intervals.t_quantile(399)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    for name in ("strict", "imagereward-macro"):
        result = accuracy(outcomes(np.arange(400) < 300, np.arange(400)), name)
        assert result.ci95 == pytest.approx((100 * (centre - half), 100 * (centre + half)))
    assert result.ci95 == pytest.approx((70.5, 79.0), abs=0.06)


def test_copies_within_a_prompt_add_no_certainty() -> None:
    right = np.random.default_rng(0).random(60) < 0.7
    once = accuracy(outcomes(right, np.arange(60)), "strict")
    often = accuracy(outcomes(np.repeat(right, 36), np.repeat(np.arange(60), 36)), "strict")
    assert often.ci95 == pytest.approx(once.ci95)


@pytest.mark.parametrize("right", [True, False])
def test_interval_of_0_and_100_percent_is_wilson_over_prompts(right: bool) -> None:
    """20 of 20 prompts: Wilson's lower bound is 20 / (20 + 1.96^2) = 83.89 %, however many pairs a prompt has."""
    low, high = accuracy(outcomes(np.full(100, right), np.arange(100) // 5), "strict").ci95
    assert (low, high) == pytest.approx((83.887, 100) if right else (0, 16.113), abs=1e-3)


def test_single_prompt_is_counted_by_pairs() -> None:
    right = np.arange(30) < 20
    assert (
        accuracy(outcomes(right, np.zeros(30)), "strict").ci95
        == accuracy(outcomes(right, np.arange(30)), "strict").ci95
    )
    assert accuracy(outcomes(np.ones(1), np.zeros(1)), "strict").ci95 == pytest.approx((20.654, 100), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "rate", "prompts"), [("strict", 0.7, 40), ("hpdv2", 0.7, 40), ("strict", 0.93, 60), ("hpdv2", 0.6, 8)]
)
def test_coverage_on_clustered_data(name: str, rate: float, prompts: int) -> None:
    """800 draws of prompts of unequal size whose accuracy varies by prompt: the true rate is inside about 95 % of the
    time, while an interval that takes pairs as independent misses it far more often."""
    rng = np.random.default_rng(1)
    inside = naive = 0
    draws = 800
    for _ in range(draws):
        prompt = np.repeat(np.arange(prompts), rng.integers(1, 30, prompts))
        right = rng.random(len(prompt)) < rng.beta(4 * rate, 4 * (1 - rate), prompts)[prompt]
        pairs = outcomes(right, prompt)
        low, high = accuracy(pairs, name).ci95
        inside += low <= 100 * rate <= high
        naive += abs(right.mean() - rate) <= 1.96 * math.sqrt(rate * (1 - rate) / len(prompt))
    assert 0.925 <= inside / draws <= 0.98
    assert naive / draws < 0.85


# Two models, judge scores


def test_paired_difference_by_hand() -> None:
    """Prompts of one pair: a right in 1 1 1 0, b in 1 0 0 0, so d = 0 1 1 0, mean 50, se = sqrt(4/3 * 4 * .25) / 4 =
    .288675, t(3) = 3.18245, p = P(|T| > sqrt 3) = .18169; the interval, -41.9 to 141.9, is cut at 100."""
    a, b = outcomes(np.array([1, 1, 1, 0]), np.arange(4)), outcomes(np.array([1, 0, 0, 0]), np.arange(4))
    found = paired_difference(a, b, "strict")
    assert (found.value, found.a, found.b, found.n, found.n_clusters) == (50, 75, 25, 4, 4)
    assert found.ci95 == pytest.approx((50 - 100 * 3.18245 * 0.288675, 100), abs=1e-3)
    assert found.p_value == pytest.approx(0.18169, abs=1e-5)
    back = paired_difference(b, a, "strict")
    assert (back.value, back.ci95[1], back.p_value) == pytest.approx((-50, -found.ci95[0], found.p_value))


def test_paired_difference_counts_what_both_scored() -> None:
    pairs = pairs_of(random_lists(8, "nan"))
    scores = np.random.default_rng(2).normal(size=(2, len(pairs)))
    other = Pairs(pairs.prompt, pairs.label, scores[0], scores[1], pairs.chosen_first)
    for name in PROTOCOLS:
        found = paired_difference(pairs, other, name, CALIBRATION, CALIBRATION)
        a, b = (accuracy(side.subset(pairs.scored), name, CALIBRATION) for side in (pairs, other))
        assert (found.value, found.a, found.b) == pytest.approx((a.value - b.value, a.value, b.value))
        assert found.n_skipped == int((~pairs.scored).sum()) > 0
    with pytest.raises(InputError, match="differ in prompt"):
        paired_difference(
            pairs, Pairs(pairs.prompt + 1, pairs.label, scores[0], scores[1], pairs.chosen_first), "strict"
        )


def test_paired_difference_without_variation() -> None:
    """The same answers: no difference, p 1, and room for what 96 prompts did not show, 1.96^2 / (96 + 1.96^2) = 3.85
    points."""
    right, prompt = np.ones(96), np.arange(96)
    same = paired_difference(outcomes(right, prompt), outcomes(right, prompt), "strict")
    assert (same.value, same.p_value) == (0, 1)
    assert same.ci95 == pytest.approx((-3.848, 3.848), abs=1e-3)
    opposite = paired_difference(outcomes(right[:8], prompt[:8]), outcomes(0 * right[:8], prompt[:8]), "strict")
    assert (opposite.value, opposite.p_value, opposite.ci95[1]) == (100, 2**-7, 100)


def test_p_value_is_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(4)
    prompt = np.repeat(np.arange(30), 6)
    found = []
    for _ in range(600):
        rate = rng.random((2, 30))[:, prompt]
        a, b = (outcomes(rng.random(180) < side, prompt) for side in rate)
        found.append(paired_difference(a, b, "strict"))
    assert 0.03 <= np.mean([f.p_value < 0.05 for f in found]) <= 0.075
    assert all((f.p_value < 0.05) == (f.ci95[0] > 0 or f.ci95[1] < 0) for f in found)


def test_mean_and_paired_intervals_by_hand() -> None:
    """Values 1 2 3 4: mean 2.5, se = sqrt(5/3)/2 = .645497, t(3) = 3.18245. Twice each in one cluster: the same."""
    values = np.array([1.0, 2, 3, 4])
    half = 3.18245 * 0.645497
    found = mean_ci(np.append(values, np.nan))
    assert (found.value, found.n, found.n_clusters, found.n_skipped) == (2.5, 4, 4, 1)
    assert found.ci95 == pytest.approx((2.5 - half, 2.5 + half), abs=1e-4)
    assert mean_ci(np.repeat(values, 2), np.repeat(list("abcd"), 2)).ci95 == pytest.approx(found.ci95)

    paired = paired_ci(np.append(values, np.nan) + 10, np.full(5, 10.0))
    assert (paired.value, paired.a, paired.b, paired.n, paired.n_skipped) == (2.5, 12.5, 10, 4, 1)
    assert paired.ci95 == pytest.approx(found.ci95)
    assert paired.p_value == pytest.approx(0.03047, abs=1e-4)
    assert math.isnan(mean_ci(np.array([3.0])).ci95[0]) and math.isnan(mean_ci(np.array([])).value)
    assert mean_ci(np.full(5, 0.1)).ci95 == pytest.approx((0.1, 0.1))


# Calibration


def test_calibration_by_hand() -> None:
    """Two pairs of difference ln 3 (p = 3/4), one right and one wrong, two bins: each bin holds two sides, predicted
    1/4 and 3/4, observed 1/2: error 1/4. Certain and right: no error. A constant model: one half, as observed."""
    pairs = Pairs(np.arange(2), np.array([1, 0]), np.full(2, math.log(3)), np.zeros(2), np.ones(2))
    curve = protocols.calibration_curve(pairs, bins=2)
    assert curve.predicted == pytest.approx([0.25, 0.75]) and curve.observed == pytest.approx([0.5, 0.5])
    assert curve.count.tolist() == [2, 2] and curve.ece == pytest.approx(0.25)
    assert protocols.calibration_curve(pairs, temperature=1e9).ece == pytest.approx(0, abs=1e-9)
    sure = protocols.calibration_curve(outcomes(np.full(5, np.inf), np.arange(5)))
    assert sure.ece == 0 and sure.count.tolist() == [5, 0, 0, 0, 0, 0, 0, 0, 0, 5] and np.isnan(sure.observed[4])
    for score in (0.0, np.inf):
        constant = Pairs(np.arange(4), np.ones(4), np.full(4, score), np.full(4, score), np.ones(4))
        assert protocols.calibration_curve(constant, bins=5).ece == pytest.approx(0)


def test_calibration_of_a_bradley_terry_world() -> None:
    """Labels drawn from sigmoid(difference): small error; scores three times too large: overconfident. Sides do not
    matter."""
    rng = np.random.default_rng(0)
    difference = rng.normal(size=20000) * 1.5
    label = (rng.random(20000) < 1 / (1 + np.exp(-difference))).astype(float)
    pairs = Pairs(np.arange(20000), label, difference, np.zeros(20000), np.ones(20000))
    assert protocols.calibration_curve(pairs).ece < 0.012
    assert protocols.calibration_curve(pairs, temperature=1 / 3).ece > 0.08
    curve, swapped = protocols.calibration_curve(pairs), protocols.calibration_curve(pairs.swapped())
    assert curve.observed == pytest.approx(swapped.observed) and curve.observed == pytest.approx(
        1 - curve.observed[::-1]
    )


# Published figures


def test_published_figures_are_sound() -> None:
    keys = [(row.model, row.dataset, row.source) for row in published.PUBLISHED]
    assert len(set(keys)) == len(keys)
    for row in published.PUBLISHED:
        assert row.dataset in {*DATASETS, "shapes"} and 40 < row.accuracy < 90, row
        assert row.protocol is None or row.protocol in PROTOCOLS, row
        assert "https://" in row.source or "CVPR" in row.source, row


def test_published_figures_of_the_paper_and_of_known_protocols() -> None:
    paper = {row.dataset: row.accuracy for row in published.PUBLISHED if row.model == "DRM"}
    assert paper == {"imagereward": 64.1, "pickapic": 73.4, "hpdv2": 82.2, "hpdv3": 74.0}
    strict = {row.model: row.accuracy for row in published.comparable("imagereward", "strict") if row.accuracy > 58}
    assert strict == {"ImageReward": 65.1, "HPS": 61.2}
    best = published.published("hpdv2")
    assert best[0].model == "DiT-Reward" and [row.accuracy for row in best] == sorted(
        (r.accuracy for r in best), reverse=True
    )
    assert {row.accuracy for row in published.published("imagereward", "PickScore")} == {61.6, 62.9, 66.7}
    assert published.published("shapes") == []
