"""Schedules, worked out by hand."""

import pytest

from hf_prune.recipe import Schedule
from hf_prune.training.schedule import updates


def test_linear_reaches_the_end_in_equal_parts():
    assert updates(Schedule(name="linear", begin=0.2, end=0.6, updates=4), 10) == {3: 0.25, 4: 0.5, 5: 0.75, 6: 1.0}


def test_cubic_removes_most_at_first():
    # 1 - (1 - t)^3 at t = 1/2 and 1
    assert updates(Schedule(name="cubic", begin=0.0, end=0.8, updates=2), 10) == {4: 0.875, 8: 1.0}


def test_one_shot_is_one_update_at_the_beginning_it_names():
    assert updates(Schedule(name="one_shot", begin=0.5, end=0.9, updates=7), 10) == {5: 1.0}


def test_constant_asks_for_all_at_every_update():
    assert updates(Schedule(name="constant", begin=0.2, end=0.6, updates=2), 10) == {2: 1.0, 4: 1.0, 6: 1.0}


def test_no_update_is_before_the_first_step_or_after_the_last():
    assert updates(Schedule(name="one_shot", begin=0.0), 10) == {1: 1.0}
    assert max(updates(Schedule(name="linear", begin=0.0, end=1.0, updates=50), 7)) == 7


@pytest.mark.parametrize("n_steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["linear", "cubic", "constant"])
def test_short_trainings_merge_updates_and_still_end_at_all(name, n_steps):
    of_step = updates(Schedule(name=name, updates=20), n_steps)
    assert list(of_step.values())[-1] == 1.0
    assert all(1 <= step <= n_steps for step in of_step)


def test_no_steps():
    with pytest.raises(ValueError, match="n_steps is 0"):
        updates(Schedule(), 0)
