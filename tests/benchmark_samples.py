"""Made-up results of benchmark runs, for the arithmetic of summaries and tables."""

from benchmarks.runs import Result, Run


def result(variant: str, seed: int, *course: tuple[float, int], finished: bool = True, seconds: float = 100) -> Result:
    """A run; course: pairs of seconds and the bytes that were saved by then."""
    history = [
        {"seconds": s, "cpu_seconds": 2 * s, "steps": s, "samples": 10 * s, "saved_bytes": saved} for s, saved in course
    ]
    saved = course[-1][1] if course else 0
    task = {"val": 0.9, "test": 0.8, "unmerged_val": 1.0, "unmerged_test": 0.85, "target": 0.9}
    run = Run(variant, seed, folder=variant, reused=False, same_code=True)
    costs = {"seconds": seconds, "cpu_seconds": 2 * seconds, "history": history}
    return Result(run, saved, finished, rounds=[], tasks={"one": task}, validations=[], **costs)


RESULTS = [
    result("gemel", 0, (10, 50), (40, 100)),
    result("gemel", 1, (20, 150), (60, 200)),
    result("gemel", 2, (80, 100)),
    result("gemel-published", 0, (50, 40), finished=False),
    result("gemel-published", 1, (30, 100), finished=False),
    result("gemel-published", 2, finished=False),
    result("quick", 0, (4, 100)),
    result("quick", 1, (5, 100), (6, 220)),
    result("quick", 2, (7, 90)),
]
