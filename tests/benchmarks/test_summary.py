"""The arithmetic of summaries: levels, ratios, medians."""

import math

from benchmark_samples import RESULTS

from benchmarks.summary import cost_to, costs_to_level, ratio_to, spread


def test_levels_are_what_the_baseline_ends_with_seed_by_seed():
    assert costs_to_level(RESULTS, "quick", 0.5, "seconds") == [4, 5, 7]
    assert costs_to_level(RESULTS, "quick", 1.0, "cpu_seconds") == [8, 12, math.inf]
    assert costs_to_level(RESULTS, "gemel", 0.9, "steps") == [40, 60, 80]
    assert cost_to(RESULTS[0], 51, "samples") == 400


def test_ratios_compare_seed_by_seed_and_say_when_they_are_a_lower_bound():
    assert ratio_to(RESULTS, "quick", "gemel", 0.5, "seconds", 100) == (4, False)  # 2.5, 4 and 11.4
    assert ratio_to(RESULTS, "quick", "gemel", 1.0, "seconds", 100) == (10, False)  # 10, 10 and never
    assert ratio_to(RESULTS, "quick", "gemel-published", 1.0, "seconds", 50) == (50 / 6, True)
    assert ratio_to(RESULTS, "gemel-published", "gemel", 1.0, "seconds", 100).value == 0
    assert ratio_to(RESULTS, "quick", "absent", 1.0, "seconds", 100) is None


def test_a_median_over_seeds_is_finite_only_if_most_seeds_reached_the_level():
    assert spread([3, math.inf, 5]).as_json() == {"median": 5, "min": 3, "max": None}
    assert spread([3, math.inf]).as_json() == {"median": None, "min": 3, "max": None}
