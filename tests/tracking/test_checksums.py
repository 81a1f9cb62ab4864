"""A bit that flips anywhere in what we wrote is noticed, or changes nothing that is read."""

from __future__ import annotations

import json

import pytest
import torch

from reason.backbones.weights import read_tensors, write_tensors
from reason.errors import DamagedRun
from reason.files import (
    append_json_lines,
    check_content,
    check_signature,
    content,
    read_json,
    read_json_lines,
    signed,
    write_json,
)
from reason.tracking.folder import RunFolder

VALUE = {"accuracy": 0.125, "name": "é [x]", "n": 40, "deep": {"b": [1, 2.5e-7], "a": None}, "flag": True}


def flips(data: bytes, every: int = 1):
    for at in range(0, len(data), every):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, VALUE)
    noticed = 0
    for data in flips(path.read_bytes()):
        path.write_bytes(data)
        try:
            told = read_json(path)
        except ValueError:
            noticed += 1
        else:
            assert {k: told[k] for k in VALUE} == VALUE  # at most the name of the seal has changed
    assert noticed > 1000


def test_json_of_others_is_read_as_it_is(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(VALUE))
    assert read_json(tmp_path / "x.json") == VALUE
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "x.json")


def test_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{**VALUE, "i": i} for i in range(3)]
    append_json_lines(path, rows)
    assert list(read_json_lines(path)) == rows
    for data in flips(path.read_bytes()):
        path.write_bytes(data)
        told = list(read_json_lines(path))
        sound = [t for t in told if t is not None]
        assert len(sound) < 3 or [{k: t[k] for k in rows[0]} for t in sound] == rows
        assert len(sound) == 3 or None in told


def test_signed_text():
    text = signed("seed: 1\nlr: 0.001\n# remark\n")
    check_signature(text)
    check_signature("seed: 1\n")
    missed = 0
    for data in flips(text.encode()):
        try:
            check_signature(data.decode(errors="replace"))
            missed += 1
            assert data.startswith(text.encode()[:27])  # only the words before the checksum
        except ValueError:
            pass
    assert missed <= 8 * len("# sha256 of all above: ")


def test_content_of_a_file_and_of_one_that_grows(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"rows")
    known = content(path)
    check_content(path, known)
    path.write_bytes(b"rows and more")
    check_content(path, known, grows=True)
    for data, grows in ((b"rows and more", False), (b"row", True), (b"rowz", True), (b"", False)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="checksum"):
            check_content(path, known, grows=grows)


def test_tensors(tmp_path):
    path, tensors = (
        tmp_path / "x",
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2, dtype=torch.bfloat16)},
    )
    write_tensors(path, tensors, {"step": 3})
    whole = path.read_bytes()
    told, meta = read_tensors(path)
    assert meta == {"step": 3} and all(torch.equal(told[k], v) for k, v in tensors.items())
    for data in flips(whole):
        path.write_bytes(data)
        try:
            told, meta = read_tensors(path)
        except Exception:  # the library's kinds are many
            continue
        same = told.keys() == tensors.keys() and all(
            told[k].dtype == v.dtype and torch.equal(told[k], v) for k, v in tensors.items()
        )
        assert same or meta is None or meta != {"step": 3}, "read without a word"


def test_a_configuration_edited_by_hand_is_told(tmp_path):
    run = RunFolder.create(tmp_path, "x", "0" * 64)
    run.write_config("seed: 1\n")
    assert run.config == {"seed": 1}
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("1\n", "2\n", 1))
    with pytest.raises(DamagedRun, match=r"config\.yaml was changed after it was written"):
        _ = run.config
