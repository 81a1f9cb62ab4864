"""The text that every Python brings: what counts of it, and that it says of which Python it is."""

from __future__ import annotations

import platform
import pydoc_data.topics
import sysconfig

import pytest

from reason.datasets import stdlib
from reason.datasets.textconfig import StdlibConfig
from reason.errors import DataError


def test_topics_and_sources_of_the_running_python():
    data = stdlib.load(StdlibConfig(), offline=True)
    found = {i: t for part in data.text().parts.values() for i, t in zip(part.id, part.text, strict=True)}
    assert {i for i in found if i.startswith("topics/")} <= {f"topics/{n}" for n in pydoc_data.topics.topics}
    assert "topics/assert" in found and "lib/argparse.py" in found and "lib/json/decoder.py" in found
    assert not any(
        part in i.split("/") for i in found for part in ("test", "tests", "site-packages", "idlelib")
    )
    assert not any(i.startswith(("lib/config-", "lib/_sysconfigdata", "lib/encodings/")) for i in found)
    assert data.info["python"] == platform.python_version() and platform.python_version() in data.notes[0]
    assert 3e6 < data.info["train_characters"] < 3e7 and data.info["test_documents"] > 20
    assert stdlib.load(StdlibConfig()).digest == data.digest != stdlib.load(StdlibConfig(cut=5000)).digest


def test_what_is_absent_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    data = stdlib.load(StdlibConfig(valid=0.2, test=0.2))
    assert all(name.startswith("topics/") for part in data.corpus.parts.values() for name in part.id)
    monkeypatch.setattr(stdlib, "_topics", dict)
    with pytest.raises(DataError, match="comes without the sources") as caught:
        stdlib.load(StdlibConfig())
    assert "dataset=text" in caught.value.hint
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f"# module {i}\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# Füße\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"# -*- coding: no-such-code -*-\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_m.py").write_text("# a test\n")
    data = stdlib.load(StdlibConfig(valid=0.2, test=0.2))
    texts = [text for part in data.corpus.parts.values() for text in part.text]
    assert len(texts) == 41 and any("Füße" in text for text in texts)
    assert "could not be read: 1" in data.notes[1]
