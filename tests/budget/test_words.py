"""A budget in words, the choice inside it, and the arithmetic of the search: numbers alone, no model."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.budget.choice import choose, evenly, front, nearest, rounds_of
from pipelines.budget.latency import solve
from pipelines.budget.shapes import Forecast, Shape, candidates_of, schemes_of, undominated
from pipelines.budget.words import Budget, FitConfig, drop_of, exclusions, impossible
from pipelines.core.config import QuantizeConfig
from pipelines.core.errors import InputError


@pytest.mark.parametrize(
    ("words", "bytes_", "ms"),
    [
        (["10MB", "5ms"], 1e7, 5.0),
        (["5 ms"], None, 5.0),
        (["1.5GB"], 1.5e9, None),
        (["800kB"], 8e5, None),
        (["0.2s"], None, 200.0),
        (["10MB", "4MB"], 4e6, None),  # a flag after a file
        ([], None, None),
    ],
)
def test_a_bound_is_a_number_with_a_unit(words, bytes_, ms):
    assert FitConfig(under=words).budget == Budget(None, bytes_, ms)


@pytest.mark.parametrize("settings", [{"under": ["10"]}, {"under": ["5m"]}, {"under": ["0MB"]}, {"time": "soon"}])
def test_what_is_no_bound_is_refused_with_an_example(settings):
    with pytest.raises(InputError, match="such as"):
        FitConfig(**settings)


def test_time_has_units_of_its_own():
    assert [FitConfig(time=text).seconds for text in ("90s", "30m", "2h", None)] == [90, 1800, 7200, None]


def test_a_drop_is_points_or_per_cent():
    accuracy, perplexity = SimpleNamespace(greater_is_better=True), SimpleNamespace(greater_is_better=False)
    assert drop_of(accuracy, 0.90, 0.89) == pytest.approx(1)
    assert drop_of(perplexity, 20.0, 21.0) == pytest.approx(5)
    assert drop_of(perplexity, 20.0, 19.0) < 0


COSTS = [{"bytes": size, "ms": ms} for size, ms in [(4e6, 9.0), (8e6, 2.0), (12e6, 3.0), (20e6, 9.0)]]


def test_it_says_which_bound_excludes_what():
    said = exclusions(COSTS, Budget(1, 10e6, 5.0), 1)
    assert said == "10 MB excludes 2 of 4 shapes; 5 ms 1 more; 1 to try"
    assert exclusions(COSTS, Budget(ms=5.0), 2).startswith("5 ms excludes 2 of 4 shapes")
    assert "no bound" in exclusions(COSTS, Budget(), 4)


def test_an_impossible_budget_names_the_binding_bound_by_how_much_and_what_would_do():
    costs = dict(zip(("small", "quick", "middle", "large"), COSTS, strict=True))
    said = impossible(costs, Budget(bytes=5e6, ms=5.0))
    # Each bound can be met, both together cannot: each is relaxed while the other one holds.
    assert "the smallest within 5 ms (quick) takes 8 MB, 3 MB more than --under 5MB" in said
    assert "the fastest within 5 MB (small) takes 9 ms, 4 ms more than --under 5ms" in said
    proposed = FitConfig(under=[said.partition("(--under ")[2].partition(" would do")[0], "5ms"]).budget
    assert any(not proposed.broken(**cost) for cost in COSTS)
    alone = impossible(costs, Budget(bytes=1e6, ms=5.0))
    assert "3 MB more than --under 1MB" not in alone  # of the smallest that meets the other bound, not of any
    assert "the smallest within 5 ms (quick)" in alone
    assert "fastest" not in impossible(costs, Budget(bytes=1e6))


def row(name: str, score: float, size: float, ms: float, budget: Budget, teacher: float = 0.9, **more) -> dict:
    task = SimpleNamespace(greater_is_better=True)
    breaks = budget.broken(drop_of(task, teacher, score), bytes=size, ms=ms)
    return {"name": name, "score": score, "bytes": size, "ms": ms, "breaks": breaks, **more}


def rows(budget: Budget) -> list[dict]:
    numbers = [("deep", 0.90, 9e6, 8.0), ("wide", 0.895, 6e6, 3.0), ("tiny", 0.85, 1e6, 1.0), ("worse", 0.84, 2e6, 2.0)]
    return [row(*one, budget) for one in numbers]


@pytest.mark.parametrize(
    ("budget", "answer"),
    [
        (Budget(1, 10e6, 10.0), "deep"),  # the best inside
        (Budget(1, 10e6, 5.0), "wide"),
        (Budget(None, 1.5e6), "tiny"),
        (Budget(1), "wide"),  # the fastest that is good enough
        (Budget(), "wide"),  # the knee
    ],
)
def test_the_answer_is_inside_the_budget(budget, answer):
    assert choose(rows(budget), budget, True)["answer"]["name"] == answer


def test_a_baseline_that_meets_the_budget_with_a_better_score_is_the_answer():
    budget = Budget(2, 10e6, 5.0)
    found = choose([*rows(budget), row("tfidf", 0.91, 5e5, 0.5, budget)], budget, True)
    assert found["answer"]["name"] == found["smallest"]["name"] == found["fastest"]["name"] == "tfidf"


def test_a_model_without_a_score_is_never_inside():
    budget = Budget(None, 10e6)
    found = choose([row("broken", float("nan"), 1e6, 1.0, budget)], budget, True)
    assert found["answer"] is None


def test_the_nearest_break_the_bounds_by_the_smallest_shares():
    budget = Budget(1, 5e6, 2.0)
    assert not choose(rows(budget), budget, True)["answer"]
    assert [one["name"] for one in nearest(rows(budget))][0] == "wide"  # 20 % and 50 % too much
    assert len(nearest(rows(budget))) == 3


def test_the_front_has_what_no_other_row_beats():
    assert [one["name"] for one in front(rows(Budget()), True)] == ["deep", "wide", "tiny"]


def shape(layers: int, heads: float, neurons: float, size: float, ms: float) -> Forecast:
    of = Shape(layers, heads, neurons, "dynamic_int8")
    return Forecast(of, layers, round(layers * heads * 12), round(layers * neurons * 1536), size, 1000, ms)


GRID = [
    shape(layers, heads, neurons, 1e7 + 1e6 * layers * (heads + 2 * neurons), 1 + layers * (heads + neurons))
    for layers in (6, 4, 3, 2, 1)
    for heads in (1.0, 0.5)
    for neurons in (1.0, 0.5, 0.25)
]


def test_schemes_are_the_one_asked_for_or_all_that_need_no_examples(task, image_task, language_task):
    assert schemes_of(task, QuantizeConfig()) == ["dynamic_int8", "int8_int4_embeddings", "int4_blocks"]
    assert schemes_of(image_task, QuantizeConfig()) == ["dynamic_int8"]
    assert schemes_of(language_task, QuantizeConfig())[0] == "dynamic_int8"
    assert schemes_of(task, QuantizeConfig(quantization="mixed_int8")) == ["mixed_int8"]
    assert schemes_of(task, QuantizeConfig(quantization="none")) == ["fp32"]


def test_candidates_are_what_no_other_feasible_shape_has_more_of():
    budget = Budget(ms=5.0)
    feasible = [one for one in GRID if one.ms <= 5]
    left = undominated(feasible)
    for one in left:
        larger = [other for other in feasible if np.all(np.array(other.capacity) >= one.capacity) and other != one]
        assert not larger
    chosen = candidates_of(feasible, GRID[0], budget, most=4)
    assert 1 < len(chosen) <= 4
    assert {one.shape for one in chosen} <= {one.shape for one in left}
    assert chosen == sorted(chosen, key=lambda one: -one.ms)


def test_without_bounds_the_candidates_are_a_spread_and_never_the_whole_teacher():
    chosen = candidates_of(GRID, GRID[0], Budget(), most=4)
    assert len(chosen) == 4
    assert GRID[0] not in chosen
    assert chosen[-1].ms < 3 < chosen[0].ms
    assert candidates_of(GRID[:1], GRID[0], Budget(), most=4) == GRID[:1]
    trimmed = [
        replace(one, shape=replace(one.shape, vocabulary="corpus"), vocabulary=100, bytes=one.bytes - 9e5)
        for one in GRID
    ]
    both = candidates_of([*GRID, *trimmed], GRID[0], Budget(), most=4)
    assert [one.vocabulary for one in both] == [100] * 4
    assert both[0] == trimmed[0]  # the teacher with fewer tokens


def test_a_slower_device_gets_another_model():
    here, there = (
        candidates_of([one for one in GRID if one.ms * slower <= 5], GRID[0], Budget(ms=5.0), most=1)
        for slower in (1, 2)
    )
    assert here[0].layers > there[0].layers


@pytest.mark.parametrize("time", [1e9, 250.0, 120.0, 60.0, 10.0])
def test_halving_fits_into_the_time_and_trains_the_last_ones_longest(time):
    seconds, fixed = [100.0, 80.0, 60.0, 40.0], 5.0
    rounds = rounds_of(seconds, fixed, time)
    counts, shares = zip(*rounds, strict=True)
    cost = sum(count * (share * np.mean(seconds[: counts[0]]) + fixed) for count, share in rounds)
    assert cost <= time * 1.01 or rounds == [(1, 0.05)]
    assert list(shares) == sorted(shares)
    assert all(before > after for before, after in zip(counts, counts[1:], strict=False))
    assert shares[-1] <= 1
    if time > sum(seconds) + 4 * fixed:
        assert rounds == [(4, 1.0)]
    assert rounds_of(seconds, fixed, None) == [(4, 1.0)]


def test_items_are_taken_evenly_from_the_first_to_the_last():
    assert evenly("abcdefg", 3) == ["a", "d", "g"]
    assert evenly("abc", 9) == ["a", "b", "c"]
    assert evenly("abc", 1) == ["a"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 15, 16])
def test_for_the_fastest_there_are_as_many_trainings_as_halving_an_interval_takes(count):
    seconds = [10.0 * (count - place) for place in range(count)]  # the slowest candidate takes longest
    [(trainings, share)] = rounds_of(seconds, 0.0, None, "fastest")
    assert (trainings, share) == (math.floor(math.log2(count)) + 1, 1.0)
    left, worst = seconds, 0.0
    while left:  # none but the slowest is good enough
        worst += left[len(left) // 2]
        left = left[: len(left) // 2]
    [(trainings, share)] = rounds_of(seconds, 0.0, worst / 2, "fastest")
    assert share * worst * trainings / (math.floor(math.log2(count)) + 1) <= worst / 2 * 1.3
    assert share >= 0.25


def test_where_only_copies_are_left_nothing_is_trained():
    assert rounds_of([], 5.0, 10.0, "fastest") == rounds_of([], 5.0, 10.0, "best") == [(0, 1.0)]


def test_what_fits_in_int4_alone_does_not_rule_out_what_fits_in_int8():
    wide, narrow = shape(2, 1.0, 1.0, 2e6, 2.0), shape(2, 1.0, 0.5, 2e6, 1.5)
    blocks = [replace(one, shape=replace(one.shape, scheme="int4_blocks"), bytes=1e6) for one in (wide, narrow)]
    chosen = candidates_of([*blocks, narrow], GRID[0], Budget(bytes=2.5e6), most=4)
    assert [one.shape.model for one in chosen] == [one.shape.model for one in (wide, narrow)]


def test_for_the_knee_all_get_the_same_training():
    assert rounds_of([100.0] * 4, 0.0, 200.0, "knee") == [(4, 0.5)]
    assert rounds_of([100.0] * 4, 0.0, 60.0, "knee") == [(2, 0.3)]


@pytest.mark.parametrize("cheap", [0, 1])
def test_the_milliseconds_of_every_shape_are_solved_from_a_few(cheap):
    """Also where the last layer costs next to nothing."""
    true = np.array([1.2, 0.4, 0.03, 0.0007])
    few = [GRID[6], GRID[9], GRID[14], GRID[18], GRID[24]]

    def ms(one: Forecast) -> float:
        whole = one.layers - cheap
        return float(np.dot([1, whole, one.heads * whole / one.layers, one.neurons * whole / one.layers], true))

    found = solve(few, [ms(one) for one in few])
    np.testing.assert_allclose([found(one) for one in GRID], [ms(one) for one in GRID], rtol=1e-6)
    noisy = solve(few, [ms(one) * factor for one, factor in zip(few, (1.05, 0.95, 1.05, 1.0, 0.96), strict=True)])
    assert all(noisy(one) > 0 for one in GRID)
    assert np.median([abs(noisy(one) / ms(one) - 1) for one in GRID]) < 0.15
