"""``take_turns``: the order of calls, and which calls count."""

import pytest

from saebench.bench.timing import take_turns


def test_order_alternates_and_first_calls_do_not_count():
    called = []

    def entry(name, seconds):
        def once():
            called.append(name)
            return next(seconds)

        return once

    slow_then_fast = iter([100.0, 100.0, 100.0, 50.0, 1.0, 2.0, 50.0, 3.0, 4.0])
    steady = iter([7.0] * 9)
    timings = take_turns(
        {"a": entry("a", slow_then_fast), "b": entry("b", steady)}, turns=2, announce=lambda name: None
    )
    assert "".join(called) == "bbbaaa" + "aaabbb" + "bbbaaa"
    a = timings["a"]
    assert (a.smallest, a.largest, a.median, a.calls) == (1.0, 4.0, 2.5, 4)
    assert timings["b"].median == 7.0


def test_entry_is_announced_before_each_turn():
    announced = []
    take_turns({"a": lambda: 1.0}, turns=3, calls=1, announce=announced.append)
    assert announced == ["a"] * 4


@pytest.mark.parametrize("calls", [1, 3])
def test_counted_calls_are_turns_times_calls(calls):
    assert take_turns({"a": lambda: 1.0}, turns=2, calls=calls, announce=print)["a"].calls == 2 * calls
