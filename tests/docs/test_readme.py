"""What the README says can be done. (CI runs its first two commands for real.)"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from reason import registry
from reason.cli.app import VERBS, main
from reason.methods.base import MethodCard

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line.partition(" #")[0].rpartition("| ")[2])[1:]
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if "reason " in line
]


def call(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reason", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_understood(words, monkeypatch, capsys):
    assert words[0] in VERBS
    if words[0] in ("run", "sweep"):
        assert call(monkeypatch, *words, "--dry-run") == 0
    elif words[0] in ("list", "show"):
        assert call(monkeypatch, *words) == 0
    else:
        assert call(monkeypatch, words[0], "--help") == 0
        told = capsys.readouterr().out
        assert all(flag in told for flag in words if flag.startswith("--"))


def test_the_two_commands_that_ci_takes():
    first, second = re.findall(r"```sh\n(.*?)```", README, flags=re.S)[:2]
    assert first.strip() == "python -m pip install -e . && reason run latent"
    assert second.strip() == "python -m pip install -e '.[dev]' && pytest"


def test_the_card_of_the_guide_is_a_card():
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, flags=re.S) if "MethodCard(" in b)
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    assert isinstance(space["card"], MethodCard)


def test_the_state_of_the_methods_is_told_truly():
    rows = re.findall(r"^\| `(\w+)` .*\| (works|planned) \|$", README, flags=re.M)
    assert len(rows) == 5
    assert {name for name, state in rows if state == "works"} == set(registry.names("methods"))


def test_links_and_pictures_exist():
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
