r"""One's own problems, from tables: GSM8K's and MATH's files as they are, or columns of other names.

The right answer of a row is, in this order:
 1. what follows ``####`` in the column of answers, whose whole text is then the solution (GSM8K);
 2. the column of answers (MATH-500, AIME ...), or what is boxed in it;
 3. what the column of solutions gives: its last ``\boxed{}``, ``####`` or line ``answer`` (MATH).
GSM8K's marks for a calculator, ``<<3*4=12>>``, are taken out of solutions.

Rows are cleaned and split as documents are (``documents.divide``): a problem that repeats another but for its spaces
counts once, in the test before validation and in both before training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

from reason.answers import stated
from reason.datasets.documents import SPLITS, Documents, clean, divide
from reason.datasets.problems import Problem, ProblemData, Problems, finish, plain
from reason.datasets.tables import TableFile, column, suffix
from reason.datasets.textconfig import ProblemsConfig
from reason.datasets.textfiles import TABLES, Reading, by_id, by_split, files_at, sound
from reason.errors import ConfigError, DataError

ROLES = ("problem", "answer", "solution", "level", "id")
CALCULATOR = re.compile(r"<<[^<>\n]*>>")
LEVEL = re.compile(r"(?:level\s*)?(\d{1,9})(?:\.0)?", re.IGNORECASE)


def load(config: ProblemsConfig, offline: bool = False) -> ProblemData:
    """The problems at ``config.path``. Nothing is ever fetched, so ``offline`` is moot.

    Where only ``test_path`` is given, all that it holds is judged, and there is nothing to train on or to fit to.

    Raises:
        ConfigError: no path. DataError: what lies there cannot be used, and why.
    """
    if not (config.path or config.test_path):
        raise ConfigError(
            "Neither dataset.path nor dataset.test_path is set.", "Name a file or a folder: dataset.path=PATH"
        )
    notes: list[str] = []
    origin: Counter[str] = Counter()
    readings = {
        split: [_rows(path, config, origin) for path in paths]
        for split, paths in _files(config, notes).items()
    }
    with_ids = [reading for several in readings.values() for reading, _ in several if reading.name]
    named = by_id(with_ids, config.id, notes)
    found = {
        split: [
            Problem(name, *row)
            for reading, rows in several
            for name, row in zip(reading.ids(named), rows, strict=True)
        ]
        for split, several in readings.items()
    }
    if origin:
        notes.append(f"Answers are {', '.join(f'{where} ({n:,})' for where, n in origin.most_common())}.")
    return _divided(found, config, notes)


def _files(config: ProblemsConfig, notes: list[str]) -> dict[str, list[Path]]:
    """The tables to read, by split."""
    splits: dict[str, list[Path]] = {}
    if config.path:
        root = Path(config.path).expanduser()
        wanted = [split for split in ("valid", "test") if not getattr(config, f"{split}_path")]
        splits = by_split(root, files_at(root, config.pattern, notes), config.split, notes, wanted)
    for split in ("valid", "test"):
        if own := getattr(config, f"{split}_path"):
            if split in splits:
                notes.append(
                    f"Files of dataset.path that are named for {split} were left out for dataset.{split}_path."
                )
            splits[split] = files_at(Path(own).expanduser(), config.pattern, notes)
    for path in (path for paths in splits.values() for path in paths):
        if suffix(path) not in TABLES:
            raise DataError(
                f"{path} is no table of problems.",
                f'Write a problem per row of a {", ".join(TABLES)} file, such as {{"problem": ..., "answer": ...}}.',
            )
    return splits


def _rows(path: Path, config: ProblemsConfig, origin: Counter[str]) -> tuple[Reading, list[tuple]]:
    """The problems of a table, and for each the fields of a ``Problem`` after its id. ``origin`` counts answers."""
    table = TableFile(path, "problem")
    roles = {role: column(table, role, getattr(config, role), required=role == "problem") for role in ROLES}
    columns = list(dict.fromkeys(name for name in roles.values() if name))
    names, rows = [], []
    for number, values in table.walk(columns):
        row = dict(zip(columns, values, strict=True))
        given = {
            role: _text(table, number, role, name, row[name]) if name else "" for role, name in roles.items()
        }
        answer, solution, where = _answer(given["answer"], given["solution"])
        if answer is not None:
            origin[where.format(**roles)] += 1
        names.append(given["id"])
        rows.append((given["problem"], answer, solution, _level(given["level"])))
    if not rows:
        raise DataError(f"{path} has a header but no rows.", "It should hold one problem per line.")
    return Reading(path, [row[0] for row in rows], names if roles["id"] else None), rows


def _text(table: TableFile, number: int, role: str, name: str, value: object) -> str:
    """A cell as text: numbers as they are written, nothing as ''."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str) or (
        role != "problem" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ):
        return sound(str(value)).strip()
    raise DataError(
        f"{table.at(number)}: {name} is {str(value)[:40]!r}, not text.",
        f"Name the column of the {role}: dataset.{role}=COLUMN",
    )


def _answer(answer: str, solution: str) -> tuple[str | None, str, str]:
    """The right answer, the solution, and where the answer is from, by the rules at the head of this module."""
    if "####" in answer:
        return stated(answer), CALCULATOR.sub("", answer), "what follows #### in {answer}"
    solution = CALCULATOR.sub("", solution)
    if answer:
        return (stated(answer) or answer) if "boxed" in answer else answer, solution, "the column {answer}"
    return stated(solution), solution, "what {solution} ends in"


def _level(level: str) -> int | str | None:
    """ "Level 3" and "3" are 3."""
    number = LEVEL.fullmatch(level)
    return int(number[1]) if number else level or None


def _divided(found: dict[str, list[Problem]], config: ProblemsConfig, notes: list[str]) -> ProblemData:
    documents = {
        split: Documents([p.id for p in several], [plain(p.text) for p in several])
        for split, several in found.items()
    }
    if "train" in found:
        kept = divide(documents, config, config.path, notes, "problems")
    else:
        kept = clean(documents, notes, "problems")
        if not len(kept["test"]):
            raise DataError(f"{config.test_path} holds no problem.", "Each of its rows is empty.")
    chosen: dict[str, Problem] = {}
    answers: dict[str, set[str]] = {}
    for p in (p for split in ("test", "valid", "train") for p in found.get(split, [])):
        chosen.setdefault(p.id, p)
        answers.setdefault(plain(p.text), set()).update([p.answer] if p.answer else [])
    if unlike := sum(len(several) > 1 for several in answers.values()):
        notes.append(
            f"Problems that occur more than once, with different answers: {unlike:,}. The first one counts."
        )
    parts = {split: Problems(chosen[name] for name in kept[split].id) for split in SPLITS}
    return finish(config.name, parts, config.fit, notes=notes)
