"""No character of data steers the terminal, hides text or turns it round, wherever it is shown."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reason.cli import output
from reason.methods.figures import HeatMap, Lines, Table, Tokens
from reason.printable import json_text, printable

HOSTILE = ["\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "a\x7fb", "\x00", "\u202egnp.exe", "\u2066x\u2069",
           "in\u200bvisible", "\ufeff", "\u2028", "\U000e0041\U000e0042", "\ud800", "back\x08\rspace", "\x85"]  # fmt: skip
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_spelled_out(text):
    assert not UNSAFE.search(printable(text)) and printable(text).isprintable()
    assert not UNSAFE.search(json_text(text)) and json.loads(json_text(text)) == text
    assert not UNSAFE.search(json_text([{text: text}], indent=2))


@pytest.mark.parametrize(
    "text", ["Léon", "七人の侍", "שלום", "نمی‌خواهم", "👩‍👧", "one\ttwo\nthree", r"\x1b", "100 %"]
)
def test_what_people_write_stays(text):
    assert printable(text) == text


@given(st.text(st.characters()))
def test_any_text(text):
    assert not UNSAFE.search(printable(text)) and json.loads(json_text(text)) == text
    printable(text).encode()


def figures(text):
    yield Table(text, [text, "n"], [[text, 1]], text)
    yield Lines(text, [0, 1], {text: [0.0, 1.0]}, text, text, text)
    yield HeatMap(text, [[0.0]], [text], [text], text)
    yield Tokens(text, [text, "x"], [0.0, 1.0], legend=text, note=text)


class TestInATerminal:
    @pytest.fixture(params=[True, False], ids=["colours", "plain"])
    def console(self, request, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "200")
        if request.param:
            monkeypatch.setenv("FORCE_COLOR", "1")
        output._console.cache_clear()
        self.capsys = capsys
        yield output.stdout()
        output._console.cache_clear()

    def said(self) -> str:
        """What was written, without the colours that rich itself set."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.capsys.readouterr().out)

    @pytest.mark.parametrize("text", HOSTILE)
    def test_figures(self, console, text):
        from reason.reports.terminal import figure

        for f in figures(text):
            console.print(figure(f))
        said = self.said()
        assert not UNSAFE.search(said) and printable(text) in said  # nor is any of it lost

    @pytest.mark.parametrize("text", HOSTILE)
    def test_any_other_thing_that_is_printed(self, console, text):
        from rich.text import Text

        console.print(text, markup=False)
        console.print(Text(text))
        assert not UNSAFE.search(self.said())

    def test_rows_for_spreadsheets(self, console):
        output.emit_csv([{"run": "a\x1b[2Jb", "n": 1}])
        assert self.said() == "run,n\na\\x1b[2Jb,1\n"

    def test_json_keeps_the_value(self, console):
        output.emit_json({"a": "\x9b\u202e"})
        said = self.said()
        assert not UNSAFE.search(said) and json.loads(said) == {"a": "\x9b\u202e"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page(text):
    from reason.reports.html import page

    assert not UNSAFE.search(page(list(figures(text)), title=text, facts={text: text}, saying=text))


@pytest.mark.parametrize("text", ["\x1b\u202e", "cost $5 or $\\frac"])
def test_a_picture(text, tmp_path):
    """Nothing to steer there, but SVG may not hold control characters, and a dollar sign is no formula."""
    import xml.etree.ElementTree as ET

    import matplotlib as mpl

    from reason.reports.plots import draw_figures

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw_figures(list(figures(text)), tmp_path / "out.svg")
    drawn = (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert not UNSAFE.search(drawn)
    ET.fromstring(drawn)


def test_lines_of_a_run_and_of_fetching(capsys, tmp_path):
    from reason.datasets import fetch
    from reason.engine.progress import RunLog, say

    for speak in (say, fetch.say, RunLog(tmp_path, 0).say, RunLog(tmp_path, 0).note):
        speak("\x1b[2J\u202etitle")
    assert not UNSAFE.search(capsys.readouterr().err) and not UNSAFE.search(
        (tmp_path / "log.txt").read_text()
    )


def test_tags_for_the_tracking_server():
    from reason.tracking.describe import _text

    assert _text("\x1b[31m\u202ex", 100) == r"\x1b[31m\u202ex"
