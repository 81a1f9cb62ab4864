"""Window means against a plain reference, and what happens to values that are not finite."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.tracking.folder import RunFolder
from reason.tracking.points import PointLog


class Clock:
    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def reference(
    calls: list[tuple[float, str, float, int]], window_s: float
) -> dict[str, list[tuple[float, int]]]:
    """Per curve: a window opens with a value and takes all that come less than window_s later."""
    curves: dict[str, list[tuple[float, int]]] = {}
    for name in {name for _, name, _, _ in calls}:
        rest = [(t, v, s) for t, n, v, s in calls if n == name]
        curves[name] = []
        while rest:
            inside = [r for r in rest if r[0] - rest[0][0] < window_s]
            curves[name].append((math.fsum(v for _, v, _ in inside) / len(inside), inside[-1][2]))
            rest = rest[len(inside) :]
    return curves


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.01, 0.03, 0.1, 0.7, 2.0]), st.sampled_from("ab"), st.floats(-9, 9)),
        max_size=60,
    )
)
def test_window_means_match_the_reference(tmp_path_factory, calls):
    folder, clock = RunFolder(tmp_path_factory.mktemp("run")), Clock()
    timed = []
    with PointLog(folder, clock=clock) as log:
        for step, (wait, name, value) in enumerate(calls):
            clock.now += wait
            log.log(name, value, step)
            timed.append((clock.now, name, value, step))
    found: dict[str, list[tuple[float, int]]] = {}
    for point in folder.points()[0]:
        found.setdefault(point["name"], []).append((point["value"], point["step"]))
    wanted = reference(timed, 0.1)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert [s for _, s in found[name]] == [s for _, s in wanted[name]]
        assert [v for v, _ in found[name]] == pytest.approx([v for v, _ in wanted[name]], abs=1e-12)


def test_never_more_than_ten_a_second(make):
    folder, clock = make(), Clock()
    with PointLog(folder, clock=clock) as log:
        for step in range(5000):
            clock.now += 0.001
            log.log("train/loss", 1.0, step)
    assert 45 <= len(folder.points()[0]) <= 50


def test_points_reach_the_disk_while_the_run_goes_on(make):
    folder, clock = make(), Clock()
    log = PointLog(folder, clock=clock)
    for step in range(25):
        clock.now += 0.125
        log.log("a", 1.0, step)
    assert len(folder.points()[0]) >= 10
    log.flush()
    assert len(folder.points()[0]) == 25


def test_what_is_not_finite_stays_visible_and_the_file_stays_json(make):
    folder, clock = make(), Clock()
    with PointLog(folder, clock=clock) as log:
        for step, value in enumerate([1.0, math.nan, math.inf, -math.inf, 2.0]):
            log.log("loss", value, step)
            clock.now += 1
        log.log("mixed", 1.0, 0)
        log.log("mixed", math.nan, 1)  # one bad value in a window is not averaged away

    def refuse(text: str):
        raise AssertionError(text)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line, parse_constant=refuse) for line in lines]
    kinds = [(p["value"], p.get("kind")) for p in points if p["name"] == "loss"]
    assert kinds == [(1.0, None), (None, "nan"), (None, "inf"), (None, "-inf"), (2.0, None)]
    assert [p["kind"] for p in points if p["name"] == "mixed"] == ["nan"]
