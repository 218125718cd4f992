import threading

import pytest
import torch

from gemel.fitting.coroutines import current, run_coroutines, wait


def waits_for(*keys, log):
    def program():
        for key in keys:
            log.append((current(), key))
            wait(key)
        log.append((current(), "end"))

    return program


def test_programs_meet_at_every_key_in_a_fixed_order():
    log, met = [], []
    programs = {name: waits_for("one", "two", log=log) for name in "ab"}
    run_coroutines(programs, {"one": "ab", "two": "ab"}, lambda key, present: met.append((key, present)))
    assert met == [("one", ["a", "b"]), ("two", ["a", "b"])]
    assert log == [("a", "one"), ("b", "one"), ("a", "two"), ("b", "two"), ("a", "end"), ("b", "end")]


def test_a_key_is_met_by_those_who_come_to_it():
    log, met = [], []
    programs = {"a": waits_for("one", "two", log=log), "b": waits_for("two", log=log)}
    run_coroutines(programs, {"one": "a", "two": "ab"}, lambda key, present: met.append((key, present)))
    assert met == [("one", ["a"]), ("two", ["a", "b"])]


def test_programs_that_meet_in_different_orders_do_not_wait_for_ever():
    log, met = [], []
    programs = {"a": waits_for("one", "two", log=log), "b": waits_for("two", "one", log=log)}
    run_coroutines(programs, {"one": "ab", "two": "ab"}, lambda key, present: met.append((key, present)))
    assert met[0] == ("one", ["a"]) and met[1] == ("two", ["a", "b"]) and len(log) == 6


def test_the_key_with_the_largest_share_of_its_members_is_met_first():
    log, met = [], []
    programs = {name: waits_for(key, log=log) for name, key in {"a": "one", "b": "two", "c": "two"}.items()}
    run_coroutines(programs, {"one": "abc", "two": "abc"}, lambda key, present: met.append(key))
    assert met == ["two", "one"]


def test_programs_run_in_the_thread_that_calls():
    threads = set()
    run_coroutines({"a": lambda: threads.add(threading.get_ident())}, {}, lambda key, present: None)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("fails", ["program", "meet"])
def test_an_error_ends_all_programs_and_is_raised(fails):
    ended, never = [], []

    def sleeper():
        try:
            wait("one")
            wait("two")
        finally:
            ended.append("sleeper")
            raise ValueError("an error of its own, because it was ended")

    def tolerant():
        for key in ("one", "two"):
            try:
                wait(key)
            except Exception:
                never.append("an `except Exception` of a model keeps it running")

    def failing():
        wait("one")
        if fails == "program":
            raise ValueError("broken")
        wait("two")

    def meet(key, present):
        if fails == "meet" and key == "two":
            raise ValueError("broken")

    programs = {"s": sleeper, "t": tolerant, "f": failing, "late": lambda: wait("two")}
    with pytest.raises(ValueError, match="broken"):
        run_coroutines(programs, {"one": "stf", "two": ["s", "t", "f", "late"]}, meet)
    assert ended == ["sleeper"] and not never


# ---- modes ----------------------------------------------------------------------------------------------------------

MODES = {
    "grad": lambda: torch.enable_grad(),
    "inference": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def modes() -> tuple:
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("ends_with_error", [False, True])
def test_a_mode_that_one_program_enters_is_not_seen_by_others(name, ends_with_error):
    seen, own = [], []

    def entering():
        with MODES[name]():
            own.append(modes())
            wait("one")
            own.append(modes())
            wait("two")
            own.append(modes())
            if ends_with_error:
                raise RuntimeError
        own.append(modes())

    def other():
        for key in ("one", "two"):
            seen.append(modes())
            wait(key)
        seen.append(modes())

    def meet(key, present):
        seen.append(modes())

    programs = {"before": other, "entering": entering, "after": other}
    with torch.no_grad():
        callers = modes()
        try:
            run_coroutines(programs, dict.fromkeys(["one", "two"], list(programs)), meet)
        except RuntimeError:
            assert ends_with_error
        assert modes() == callers
    assert set(seen) == {callers} and len(seen) == (7 if ends_with_error else 8)
    assert own[0] == own[1] == own[2] != callers and own[3:] == ([] if ends_with_error else [callers])


def test_programs_run_in_the_modes_of_the_caller():
    seen = []

    def program():
        seen.append(modes())
        wait("one")
        seen.append(modes())

    for enter in (torch.no_grad, torch.inference_mode, MODES["autocast"]):
        seen.clear()
        with enter():
            run_coroutines({"a": program, "b": program}, {"one": "ab"}, lambda key, present: seen.append(modes()))
            assert set(seen) == {modes()} and len(seen) == 5


def test_computations_of_a_program_in_autocast_are_its_own():
    """Two programs in turns, one of them in bfloat16."""
    x, dtypes = torch.rand(4, 4), []

    def program(enter):
        def run():
            with enter():
                for key in ("one", "two"):
                    dtypes.append((x @ x).dtype)
                    wait(key)

        return run

    programs = {"a": program(MODES["autocast"]), "b": program(torch.no_grad)}
    run_coroutines(programs, {"one": "ab", "two": "ab"}, lambda key, present: dtypes.append((x @ x).dtype))
    bfloat16, float32 = torch.bfloat16, torch.float32
    assert dtypes == [bfloat16, float32, float32] * 2


# ---- late starts ----------------------------------------------------------------------------------------------------


def test_a_program_starts_when_its_key_was_met():
    log, met = [], []
    programs = {"a": waits_for("one", "two", log=log), "b": waits_for("two", log=log), "c": waits_for("two", log=log)}
    members = {"one": "a", "two": "abc"}
    run_coroutines(programs, members, lambda key, present: met.append((key, present)), {"b": "one", "c": "one"})
    assert met == [("one", ["a"]), ("two", ["a", "b", "c"])]
    assert log[:4] == [("a", "one"), ("a", "two"), ("b", "two"), ("c", "two")]


def test_a_program_whose_key_nobody_comes_to_starts_last():
    log, met = [], []
    programs = {"late": waits_for("one", log=log), "a": waits_for("one", log=log)}
    run_coroutines(programs, {"one": ["late", "a"]}, lambda key, present: met.append((key, present)), {"late": "none"})
    assert met == [("one", ["a"]), ("one", ["late"])] and log[-1] == ("late", "end")
