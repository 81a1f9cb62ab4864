"""Answers that people graded wrongly elsewhere; workers that hang, crash, wait, end and are forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from reason.errors import MissingExtra
from reason.metrics import grading
from reason.metrics.grading import Grader, canonical, grade, number, simple

needs_math = pytest.mark.skipif(not grading.available(), reason="needs math-verify (extra: math)")
TOWER = "9^{9^{9^{9^{%d}}}}"


@pytest.fixture(scope="module")
def one():
    """A grader with one worker, which has plenty of time on a busy machine."""
    with Grader(workers=1, seconds=30) as grader:
        yield grader


@pytest.fixture
def bare(monkeypatch):
    """As if math-verify were not installed."""
    monkeypatch.setattr(grading, "available", lambda: False)


# --- plain numbers and words: exact, with or without the extra ----------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("007", 7), ("-0", 0), ("1,250.50", "1250.5"), ("$1,000", 1000), ("1{,}000", 1000), (r"12,\!345", 12345),
        ("3/4", "3/4"), (r"\frac{3}{4}", "3/4"), (r"\dfrac34", "3/4"), (r"-\frac{1}{2}", "-1/2"), (r"\frac{-1}{2}", "-1/2"),
        ("3 1/2", "7/2"), (r"3\frac12", "7/2"), ("2e-3", "1/500"), (r"$\$18.00$", 18), ("50%", 50), (r"50\%", 50),
        (r"90^\circ", 90), (r"10\text{ cm}^2", 10), ("−3", -3), ("+4", 4), (".5", "1/2"), ("5.", 5),
        ("2^{10}", None), ("3,5", None), ("1/0", None), ("x", None), ("", None), ("3 5", None), ("1e99999", None),
        ("9" * 2000, None), ("٣", None),
    ],
)  # fmt: skip
def test_plain_numbers(text, value):
    assert number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("7", "007", True), ("007", "7", True), ("0.5", "50", False), ("50", "0.5", False), ("50%", "0.5", False),
        ("50", r"50\%", True), ("0.50", "1/2", True), ("0.333333", r"\frac{1}{3}", False), ("1,000", "1000", True),
        ("18 ", "$18", True), ("-3", "3", False), ("evelyn", r"\text{Evelyn}", True), ("nylevE", "Evelyn", False),
        ("B", r"\text{(B)}", True), ("A", "B", False), ("even", "odd", False), ("two", "2", False),
        ("", "7", False), (None, "7", False), ("  ", "7", False), ("100000000000000000001", "100000000000000000000", False),
    ],
)  # fmt: skip
def test_plain_answers(bare, answer, gold, right):
    assert grade(answer, gold) is right


def test_what_looks_alike_is_told_apart():
    assert canonical("3 5") != canonical("35") and canonical("x + 1") == canonical("x+1")
    assert canonical(r"\pi r") != canonical(r"\pir")
    assert canonical(r"\begin{pmatrix}1 \\ 2\end{pmatrix}") == r"\begin{pmatrix}1\\2\end{pmatrix}"
    assert (
        simple("7")
        and simple(r"\frac12")
        and simple("Paris")
        and not simple(r"\sqrt{2}")
        and not simple("3,5")
    )


def test_what_is_very_long_is_compared_as_text_at_once(bare):
    start = time.monotonic()
    for long in (
        "(" * 200_000,
        " " * 200_000 + "x" * 200_000,
        "9" * 200_000,
        r"\text{" * 50_000,
        "a " * 100_000,
    ):
        assert grade(long + " ", long) and not grade(long + "1", long) and number(long) is None
    assert time.monotonic() - start < 5


def test_without_the_extra_mathematics_is_refused_before_anything_is_graded(bare):
    with Grader() as grader:
        grader.require(["7", None, "Paris", r"\frac{1}{2}"])
        for refuse in (lambda: grader.require(["7", r"\sqrt{2}"]), lambda: grader.grade("3", r"\sqrt{2}")):
            with pytest.raises(MissingExtra, match="sqrt") as caught:
                refuse()
            assert caught.value.exit_code == 4 and "reason-lab[math]" in caught.value.hint
        assert grader.grade(r"\sqrt{2}", r"\sqrt{2} ."), "written alike, it is right"
        assert not grader.grade(r"\sqrt{49}", "7") and grader.counts == {"as text": 1}


# --- mathematics --------------------------------------------------------------------------------------


@needs_math
@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("m=3,6", "m=3,5", False), ("m=5,3", "m=3,5", True), ("9", "±9", False), ("±9", "9", False), ("9,-9", "±9", True),
        ("2^-81", "2^-80", False), ("2^{-80}", "2^-80", True), ("e^{-51}", "e^{-50}", False),
        ("2^{-81},1", "2^{-80},1", False), ("11", "11_2", False), ("11_2", "11", False), ("11_3", "11_2", False),
        ("11_{2}", "11_2", True), ("5,5", "5", False), ("1,2", "1,2,3", False), ("3,5", "5,3", True),
        ("(5,3)", "(3,5)", False), ("5,3", "(3,5)", False), (r"\left( 3, 5 \right)", "(3,5)", True), ("[3,5)", "(3,5)", False),
        (r"2\sqrt3", r"\sqrt{12}", True), ("(x+1)^2", "x^2+2x+1", True), ("3", "x=3", True), ("y=3", "x=3", False),
        (r"\frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2}", r"\frac{-1\pm\sqrt{5}}{2}", True), ("5,7", r"5 \text{ or } 7", True),
        (r"x \ge 0", r"[0,\infty)", True), (r"[0,\infty)", r"x \ge 0", True), (r"x > 0", r"[0,\infty)", False), ("3.14", r"\pi", False), ("3.14159265", r"\pi", True), (r"\sqrt{49}", "7", True),
        ("2^{1000}+1", "2^{1000}", False), ("i", "-i", False), (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),
        ("garbage ((", r"\sqrt{2}", False), ("\x00\ud800", r"\sqrt{2}", False), ("{" * 900, r"\sqrt{2}", False),
    ],
)  # fmt: skip
def test_mathematics(one, answer, gold, right):
    assert one.grade(answer, gold) is right


@needs_math
def test_a_tower_of_powers_is_killed_and_the_next_grading_works():
    with Grader(workers=1, seconds=1) as grader:
        assert grader.grade("2", r"\sqrt{4}")
        (worker,) = grader._idle
        assert not grader.grade(TOWER % 8, TOWER % 9)
        assert grader.counts["timed out"] == 1 and worker.process.poll() is not None
        start = time.monotonic()
        assert not grader.grade(TOWER % 8, TOWER % 9), "it is remembered"
        assert time.monotonic() - start < 0.5 and grader.counts["timed out"] == 1
        assert grader.grade(TOWER % 9, TOWER % 9), "written the same, it needs no worker"
        assert grader.grade("3", r"\sqrt{9}")


@needs_math
def test_two_hundred_gradings_through_one_worker_do_not_time_out_by_waiting():
    with Grader(workers=1, seconds=2) as grader:
        golds = [rf"\sqrt{{{i * i}}}+x" for i in range(200)]
        answers = [f"x+{i + i % 2}" for i in range(200)]
        with ThreadPoolExecutor(32) as pool:
            start = time.monotonic()
            found = list(pool.map(grader.grade, answers, golds))
        assert found == [i % 2 == 0 for i in range(200)]
        assert grader.counts == {"compared": 200} and len(grader._idle) == 1
        assert time.monotonic() - start > 2, "the last one waited longer than a comparison may take"


@needs_math
def test_a_crash_costs_one_worker_and_is_counted():
    with Grader(workers=1, seconds=30) as grader:
        assert grader.grade("2", r"\sqrt{4}")
        (worker,) = grader._idle
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(grader.grade, TOWER % 8, TOWER % 9)
            while grader._idle:
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(worker.process.pid, signal.SIGKILL)
            assert waiting.result() is False
        assert grader.counts["crashed"] == 1
        assert grader.grade("3", r"\sqrt{9}")
        os.kill(
            grader._idle[0].process.pid, signal.SIGKILL
        )  # one that waits is replaced, and costs no answer
        grader._idle[0].process.wait()
        assert grader.grade("4", r"\sqrt{16}") and grader.counts["crashed"] == 1


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_math
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_parent_that_is_killed(busy):
    """Also in the middle of what never ends, and while a process that the parent forked holds their input open."""
    code = (
        "import os, sys, threading, time\n"
        "from reason.metrics.grading import Grader\n"
        "g = Grader(workers=1, seconds=1)\n"
        "g.grade('2', r'\\sqrt{4}')\n"
        "print(g._idle[0].process.pid, flush=True)\n"
        f"if {busy}: threading.Thread(target=g.grade, args=({TOWER % 8!r}, {TOWER % 9!r})).start()\n"
        f"if not {busy} and os.fork() == 0: os.close(1); time.sleep(20); os._exit(0)\n"
        "time.sleep(60)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 8
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid)


def test_graders_cost_nothing_until_they_are_needed():
    code = (
        "import sys\nfrom reason.metrics.grading import grade, grader\n"
        "assert grade('7', '007') and not grader()._idle\n"
        "heavy = {'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)
