"""Folders of the cache: made once, whole or not at all."""

import threading
import time

import pytest

from reason.datasets.fetch import build_once
from reason.errors import DataError


def test_whoever_comes_first_makes_it_and_the_others_wait(tmp_path):
    folder, makers, found = tmp_path / "cache/deep/thing", [], []

    def make(aside):
        makers.append(threading.get_ident())
        (aside / "first").write_text("1")
        time.sleep(0.1)  # the others are waiting by now
        (aside / "second").write_text("2")

    def ask():
        found.append(sorted(p.name for p in build_once(folder, make).iterdir()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1 and found == [["first", "second"]] * 4
    assert build_once(folder, lambda aside: pytest.fail("made again")) == folder


def test_a_failure_leaves_nothing_and_the_next_may_try(tmp_path):
    def fail(aside):
        (aside / "half").write_text("")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        build_once(tmp_path / "thing", fail)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert list(build_once(tmp_path / "thing", lambda aside: None).iterdir()) == []


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used") as caught:
        build_once(tmp_path / "file/thing", lambda aside: None)
    assert "REASON_CACHE" in caught.value.hint
