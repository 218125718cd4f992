"""Fits the loss that sensitivity is expected to cost to what trials measured, with whole workloads left out.

    python -m benchmarks.expected_losses RESULTS ...

RESULTS: results folders, or folders with such folders anywhere below them, as DIR/runs of benchmarks/suite.py. A trial
of the strategy `adaptive` says, of each task, how much of its sensitivity was tied and what it reached. For classifiers
and detectors the command prints which factor and exponent (gemel/strategies/curves.py) make these outcomes most likely,
beside the ones in use, and what is chosen where a workload is left out and how likely its outcomes are then. A workload
counts once, however many trials it had. The search chooses its trials by what it expects, so outcomes of trials that
it expects to fail are rare here.
"""

import argparse
import collections
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemel.console.tables import table
from gemel.strategies.curves import Curve, ExpectedLoss
from gemel.thresholds import THRESHOLDS
from gemel.workload import CLASSIFICATION, DETECTION

FACTORS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)
EXPONENTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
CANDIDATES = [ExpectedLoss(*pair) for pair in itertools.product(FACTORS, EXPONENTS)]


class Outcome(NamedTuple):
    """What a trial cost a task. sensitivity: to what was tied. loss: of accuracy / target."""

    sensitivity: float
    loss: float


Outcomes = dict[str, set[Outcome]]  # workload -> outcomes of its tasks of one kind


def in_use(kind: str) -> ExpectedLoss:
    """What the search expects of a task of this kind."""
    search = THRESHOLDS.search
    if kind == CLASSIFICATION:
        return ExpectedLoss(search.classifier_loss, search.classifier_exponent)
    return ExpectedLoss(search.detector_loss)


def manifests(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Of all results folders at or below these."""
    for folder in folders:
        for file in sorted(folder.rglob("merged.json")):
            yield json.loads(file.read_text(encoding="utf-8"))


def outcomes_of(manifest: Mapping[str, Any], kind: str) -> Iterator[Outcome]:
    """Of the trials of a merge by `adaptive`; none of another strategy, or where sensitivity was never predicted."""
    state = manifest["run"].get("strategy_state") or {}
    for search in state.get("components", [state]):
        for task, plain in search.get("curves", {}).items():
            curve = Curve.of(plain)
            total = sum(value for _, name, value in search["sensitivity"] if name == task)
            if total and manifest["tasks"][task]["task"] == kind:
                yield from (Outcome(total * share, curve.unshared - ratio) for share, ratio in curve.points)


def collect(folders: Sequence[Path], kind: str) -> Outcomes:
    """By workload, which is named by its tasks; the same outcome of several merges counts once."""
    found: Outcomes = collections.defaultdict(set)
    for manifest in manifests(folders):
        found[", ".join(sorted(manifest["tasks"]))].update(outcomes_of(manifest, kind))
    return {workload: outcomes for workload, outcomes in found.items() if outcomes}


def surprise(expected: ExpectedLoss, outcomes: Sequence[Outcome]) -> float:
    """The mean negative logarithm of the density of these losses, as a curve without points has it."""
    search, terms = THRESHOLDS.search, []
    for sensitivity, loss in outcomes:
        mean = expected.factor * sensitivity**expected.exponent
        deviation = math.hypot(search.noise, search.uncertainty * mean)
        terms.append(math.log(deviation * math.sqrt(2 * math.pi)) + ((loss - mean) / deviation) ** 2 / 2)
    return sum(terms) / len(terms)


def compare(outcomes: Outcomes, used: ExpectedLoss) -> str:
    """A table of candidates, and a line on what is chosen with each workload left out."""
    candidates = [used, *(one for one in CANDIDATES if one != used)]
    values = np.array([[surprise(one, sorted(own)) for own in outcomes.values()] for one in candidates])
    order = values.sum(1).argsort(kind="stable")
    chosen = [int((values.sum(1) - left_out).argmin()) for left_out in values.T]
    unseen = [values[best, column] for column, best in enumerate(chosen)]
    rows = [[*_named(candidates[i]), f"{values[i].mean():.3f}", ""] for i in dict.fromkeys([0, *order[:5]])]
    rows[0][-1] = "in use"
    counts = collections.Counter(f"{candidates[i].factor:g} and {candidates[i].exponent:g}" for i in chosen)
    times = ", ".join(f"{name} {count} times" for name, count in counts.most_common())
    return (
        table(("factor", "exponent", "surprise", ""), rows)
        + f"\nchosen with one of {len(outcomes)} workloads left out: {times}; surprise of what was left out: "
        + f"{np.mean(unseen):.3f}"
    )


def _named(loss: ExpectedLoss) -> list[str]:
    return [f"{loss.factor:g}", f"{loss.exponent:g}"]


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status: 1 if there is nothing to fit to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expected_losses", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS")
    flags = parser.parse_args(arguments)
    status = 1
    for kind in (CLASSIFICATION, DETECTION):
        outcomes = collect(flags.results, kind)
        print(f"{kind}: {sum(map(len, outcomes.values()))} outcomes of {len(outcomes)} workloads")
        if len(outcomes) > 1:
            print(compare(outcomes, in_use(kind)))
            status = 0
    return status


if __name__ == "__main__":
    sys.exit(main())
