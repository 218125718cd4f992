"""The simulator against arithmetic, and against the runtime with models whose times are set by sleeping."""

import time

import pytest
from edge_samples import Virtual, VirtualTime, profile_of, random_blocks, unshared, write_slim

from gemel.edge import Runtime
from gemel.edge.arrivals import Arrivals
from gemel.edge.blocks import blocks_of
from gemel.edge.compare import RESIDENT, compare, draw, rows_table
from gemel.edge.frames import RandomFrames
from gemel.edge.simulator import Load, Plan, budgets_between, simulate

MIB = 1 << 20


def two_models(shared: bool):
    """Of 10 MiB each, 8 of them shared."""
    keys = {"a_x": {"s": "s", "p": "pa"}, "b_x": {"s": "s" if shared else "s2", "p": "pb"}}
    sizes = {"s": 8 * MIB, "s2": 8 * MIB, "pa": 2 * MIB, "pb": 2 * MIB}
    return blocks_of(keys, sizes, list(keys))


def test_a_cycle_by_hand():
    """10 ms a model, 1 ms a MiB: unmerged a cycle takes 2 x (10 + 10) ms, merged 2 x (2 + 10), all waited for."""
    blocks = two_models(shared=True)
    load = Load(fps=100, sla=1.0, count=100000)
    merged = simulate(blocks, profile_of(blocks, 10, 1), 10 * MIB, load, max_turns=1000)
    other = two_models(shared=False)
    unmerged = simulate(other, profile_of(other, 10, 1), 10 * MIB, load, max_turns=1000)
    assert unmerged.seconds == pytest.approx(1000 * 20e-3)
    assert merged.seconds == pytest.approx(8e-3 + 1000 * 12e-3)
    assert (merged.bytes_moved, unmerged.bytes_moved) == ((8 + 2 * 1000) * MIB, 10 * 1000 * MIB)
    assert merged.tasks["a_x"].swap_seconds == pytest.approx(8e-3 + 500 * 2e-3)
    assert all(t.processed + t.late == 500 for t in unmerged.tasks.values())


def test_reading_ahead_is_hidden_by_running():
    """Eager, with room for both: the 10 ms of reading are over when the other model has run."""
    blocks = two_models(shared=False)
    found = simulate(blocks, profile_of(blocks, 10, 1), 20 * MIB, Load(1000, None, 100))
    assert found.seconds == pytest.approx(10e-3 + 200 * 10e-3)
    assert found.bytes_moved == 20 * MIB


@pytest.mark.parametrize("batch, share", [(1, 0.5), (2, 1.0)])
def test_shares_are_what_arithmetic_says(batch, share):
    """Two models of 10 ms, 100 frames a second each: one a turn is half of them, two a turn would take 36 ms."""
    blocks = two_models(shared=True)
    batches = dict.fromkeys(blocks.needs, batch)
    found = simulate(blocks, profile_of(blocks, 10), 100 * MIB, Load(100, 0.1, 10000), Plan(batches=batches))
    expected = share if batch == 1 else 2 * 10 / 36
    assert found.share == pytest.approx(expected, abs=0.02)


def test_every_frame_is_counted():
    for seed in range(5):
        blocks = random_blocks(4, seed)
        for sla in (None, 0.001, 0.03, 1.0):
            found = simulate(blocks, profile_of(blocks, 7), blocks.distinct_bytes, Load(60, sla, 333))
            assert {task.frames for task in found.tasks.values()} == {333}
            assert sla is not None or found.share == 1


def test_a_simulation_is_a_thousand_times_as_fast_as_the_stream():
    blocks = random_blocks(6, 2)
    load = Load(10, 0.1, 6000)  # ten minutes
    began = time.process_time()
    simulate(blocks, profile_of(blocks, 10, 1), blocks.bytes_of(blocks.largest), load)
    assert (time.process_time() - began) * 1000 < load.count / load.fps


# ---- against the runtime ----------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unmerged"])
def test_the_runtime_does_what_the_simulator_says(tmp_path, merged, eager):
    """At five budgets: bytes exactly, frames of every task within 5 points."""
    write_slim(tmp_path)
    with Runtime(tmp_path) as runtime:
        least, most = runtime.blocks.bytes_of(runtime.blocks.largest), 2 * runtime.blocks.distinct_bytes
    shares = set()
    for budget in [least + (most - least) * i // 4 for i in range(5)]:
        clock = VirtualTime()
        options = {"merged": merged, "eager": eager, "batches": {"a_slim": 2}, "clock": lambda clock=clock: clock}
        options["shared_computation"] = False
        with Virtual(tmp_path, budget, **options) as runtime:
            blocks = runtime.blocks
            runtime.profile, runtime.clock = profile_of(blocks, 12, 1500), clock
            summary = runtime.run(RandomFrames(8, 8), fps=80, sla=0.08, count=10**9, max_turns=100)
        plan = Plan(batches={"a_slim": 2}, eager=eager)
        found = simulate(blocks, runtime.profile, budget, Load(80, 0.08, 10**9), plan, max_turns=100)
        assert found.bytes_moved == summary["bytes_moved"]
        assert found.peak_resident_bytes == summary["peak_resident_bytes"]
        assert summary["seconds"] == pytest.approx(found.seconds, rel=0.01)
        for task, counted in summary["tasks"].items():
            frames = counted["processed"] + counted["late"] + counted["dropped"]
            assert counted["processed"] / frames == pytest.approx(found.tasks[task].share, abs=0.05)
        shares.add(round(found.share, 3))
    assert merged or len(shares) > 1, "the budget makes a difference"


# ---- which frames are taken -------------------------------------------------------------------------------


def test_the_oldest_frames_in_time_are_taken():
    arrivals = Arrivals(fps=10, sla=0.5, batch=2, count=100, expected=0.1)
    taken, dropped = arrivals.take(1.0)  # frames 0 to 10 arrived; a run ends at 1.125 with its margin
    assert (taken, dropped) == (range(7, 9), 7)
    assert arrivals.take(1.0) == (range(9, 11), 0)
    assert arrivals.next_arrival == pytest.approx(1.1)


def test_a_task_that_is_always_late_takes_the_newest():
    arrivals = Arrivals(fps=10, sla=0.05, batch=2, count=100, expected=1.0)
    assert arrivals.take(1.0) == (range(9, 11), 9)


def test_frames_that_arrived_are_dropped_at_the_end():
    arrivals = Arrivals(fps=10, sla=0.05, batch=1, count=5)
    assert arrivals.drop_arrived(0.25) == 3 and arrivals.drop_arrived(9) == 2 and arrivals.is_exhausted


# ---- the comparison ---------------------------------------------------------------------------------------


def test_ways_are_compared_over_budgets(tmp_path):
    blocks = random_blocks(4, 3)
    other = unshared(blocks)
    accuracies = dict.fromkeys(blocks.needs, 0.5)
    rows = compare((blocks, other), profile_of(blocks, 10, 2000), Load(20, 0.2, 500), 3, accuracies)
    assert len(rows) == 3 * 4 + 1 and rows[-1].way == RESIDENT
    by_way = {(row.way, row.budget_bytes): row for row in rows}
    for budget in budgets_between(blocks, other, 3):
        given, ours = by_way["merged, given order", budget], by_way["merged, our order", budget]
        assert by_way["merged, our order and batches", budget].least_share >= ours.least_share
        assert given.share >= by_way["unmerged", budget].share
        assert given.accuracy == pytest.approx(0.5 * given.share)
    assert "everything in memory" in rows_table(rows)
    draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
