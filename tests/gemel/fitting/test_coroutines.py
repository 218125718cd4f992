import pytest

from gemel.fitting.coroutines import run_coroutines


def runs(*keys, log, name):
    def program(wait):
        for key in keys:
            log.append((name, key))
            wait(key)
        log.append((name, "end"))

    return program


def test_programs_meet_at_every_key_in_a_fixed_order():
    log, met = [], []
    programs = {name: runs("one", "two", log=log, name=name) for name in "ab"}
    run_coroutines(programs, {"one": "ab", "two": "ab"}, lambda key, present: met.append((key, present)))
    assert met == [("one", ["a", "b"]), ("two", ["a", "b"])]
    assert log == [("a", "one"), ("b", "one"), ("a", "two"), ("b", "two"), ("a", "end"), ("b", "end")]


def test_a_key_is_met_by_those_who_come_to_it():
    log, met = [], []
    programs = {"a": runs("one", "two", log=log, name="a"), "b": runs("two", log=log, name="b")}
    run_coroutines(programs, {"one": "a", "two": "ab"}, lambda key, present: met.append((key, present)))
    assert met == [("one", ["a"]), ("two", ["a", "b"])]


def test_programs_that_meet_in_different_orders_do_not_wait_for_ever():
    log, met = [], []
    programs = {"a": runs("one", "two", log=log, name="a"), "b": runs("two", "one", log=log, name="b")}
    run_coroutines(programs, {"one": "ab", "two": "ab"}, lambda key, present: met.append((key, present)))
    assert met[0] == ("one", ["a"]) and met[1] == ("two", ["a", "b"]) and len(log) == 6


@pytest.mark.parametrize("fails", ["program", "meet"])
def test_an_error_ends_all_programs_and_is_raised(fails):
    ended, runners = [], []

    def sleeper(wait):
        try:
            wait("one")
            wait("two")
        finally:
            ended.append("sleeper")

    def failing(wait):
        wait("one")
        if fails == "program":
            raise ValueError("broken")
        wait("two")

    def meet(key, present):
        runners.append(present)
        if fails == "meet" and key == "two":
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_coroutines({"s": sleeper, "f": failing}, {"one": "sf", "two": "sf"}, meet)
    assert ended == ["sleeper"]
