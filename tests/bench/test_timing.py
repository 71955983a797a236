"""Turns: who is called when, and what is counted."""

import pytest

from saebench.bench.timing import take_turns


def test_neighbors_alternate_and_the_first_calls_do_not_count():
    called = []

    def contestant(name, seconds):
        def once():
            called.append(name)
            return next(seconds)

        return once

    slow_then_fast = iter([100.0, 100.0, 100.0, 50.0, 1.0, 2.0, 50.0, 3.0, 4.0])
    steady = iter([7.0] * 9)
    timings = take_turns(
        {"a": contestant("a", slow_then_fast), "b": contestant("b", steady)}, turns=2, said=lambda name: None
    )
    assert "".join(called) == "bbbaaa" + "aaabbb" + "bbbaaa"
    a = timings["a"]
    assert (a.smallest, a.largest, a.median, a.calls) == (1.0, 4.0, 2.5, 4)
    assert timings["b"].median == 7.0


def test_everyone_is_announced_before_each_turn():
    said = []
    take_turns({"a": lambda: 1.0}, turns=3, calls=1, said=said.append)
    assert said == ["a"] * 4


@pytest.mark.parametrize("calls", [1, 3])
def test_the_number_of_calls_counted(calls):
    assert take_turns({"a": lambda: 1.0}, turns=2, calls=calls, said=print)["a"].calls == 2 * calls
