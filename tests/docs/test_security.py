"""docs/security.md promises nothing without a test: every one that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.findall(
    r"`(tests/[\w/]+\.py)::([\w:]+)`", (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(("file", "path"), NAMED, ids=lambda part: part.rpartition("/")[2])
def test_the_tests_that_are_named_exist(file, path):
    inside: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for name in path.split("::"):
        found = [n for n in inside if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
        assert found, f"{file} has no {path}"
        inside = found[0].body


def test_there_are_some_and_every_promise_has_one():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    promises = re.findall(
        r"^- .*?(?=^- |^#|\Z)", text.partition("## What is not promised")[0], flags=re.M | re.S
    )
    without = [p.splitlines()[0] for p in promises if "::test_" not in p and "not held against" not in p]
    assert len(NAMED) > 40 and not without
