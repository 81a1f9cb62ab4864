"""The view: windows cover each transition once, batches equal a naive loop, orders are permutations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_files import ROWS

from reason.datasets.config import SyntheticConfig
from reason.datasets.histories import Interactions
from reason.datasets.sequences import IGNORE, windows
from reason.datasets.synthetic import load
from reason.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def data() -> Interactions:
    return load(SyntheticConfig(users=60, items=40, mean_length=15, categories=4))


@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    length=st.integers(1, 12),
    share=st.floats(0, 1),
)
def test_windows_cover_each_transition(rows, length, share):
    """A transition is the pair (row, row + 1) of one user; it is a target at row + 1."""
    end = np.cumsum(np.array(rows) + 3)  # three rows of each user are not training
    start = np.concatenate([[0], end[:-1]])
    wanted = [r for s, n in zip(start, rows, strict=True) for r in range(s + 1, s + n)]
    first, inputs, user = windows(start, start + rows, length, length)
    assert sorted(r for f, n in zip(first, inputs, strict=True) for r in range(f + 1, f + n + 1)) == wanted
    stride = max(1, int(share * length))
    first, inputs, user = windows(start, start + rows, length, stride)
    assert {r for f, n in zip(first, inputs, strict=True) for r in range(f + 1, f + n + 1)} == set(wanted)
    assert ((inputs >= 1) & (inputs <= length)).all() and (first >= start[user]).all()
    assert len(set(zip(first.tolist(), inputs.tolist(), strict=True))) == len(first)
    for u in set(user.tolist()):  # the latest rows stand in the longest window
        mine = user == u
        assert (first + inputs)[mine].max() == start[u] + rows[u] - 1
        assert inputs[mine][0] == inputs[mine].max()


def naive_window(data: Interactions, split, index: int, length: int):
    """Inputs and targets of a training window, found by walking its user's training part."""
    user, start = int(split.user[index]), int(split.start[index])
    own = data.items[start : min(start + length + 1, int(data.train_end[user]))]
    size = int(split.length[index])
    return own[:size].tolist(), own[1 : size + 1].tolist()


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_training_batches_equal_a_naive_loop(data, length):
    split = data.sequences(length).train
    rng = np.random.default_rng(length)
    index = rng.permutation(len(split))[:17]
    batch = split.batch(index)
    pad, width = len(data.item_ids), batch["items"].shape[1]
    assert width == max(split.length[index])
    for row, i in enumerate(index):
        inputs, targets = naive_window(data, split, i, length)
        assert batch["items"][row].tolist() == inputs + [pad] * (width - len(inputs))
        assert batch["targets"][row].tolist() == targets + [IGNORE] * (width - len(inputs))
        assert batch["length"][row] == len(inputs) and inputs[1:] == targets[:-1]
        assert batch["user"][row] == split.user[i]
    assert all(t.dtype == torch.int64 and t.shape[0] == len(index) for t in batch.values())


@pytest.mark.parametrize("length", [1, 5, 50])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_case_batches_equal_a_naive_loop(data, length, part):
    splits = data.sequences(length)
    cases = getattr(splits, part)
    index = np.random.default_rng(0).permutation(len(cases))[:11]
    batch = cases.batch(index)
    for row, i in enumerate(index):
        whole = data.history(data.find(cases.id[i])).tolist()
        cut = len(whole) - (1 if part == "test" else 2)  # the test history includes the validation item
        inputs = whole[:cut][-length:]
        assert batch["target"][row] == whole[cut] == cases.target[i]
        assert cases.history[i] == cut
        assert batch["items"][row, : len(inputs)].tolist() == inputs
        assert (batch["items"][row, len(inputs) :] == splits.pad).all()
    rows, items = cases.seen(index)
    for row, i in enumerate(index):
        assert items[rows == row].tolist() == data.history(int(cases.user[i]))[: cases.history[i]].tolist()


def test_cases_never_reach_into_training_targets(data):
    """No training window holds a validation or test row; train_counts counts training rows only."""
    splits = data.sequences(7)
    last = splits.train.start + splits.train.length
    assert (last < data.train_end[splits.train.user]).all()
    parts = [
        data.history(u)[: end - low]
        for u, (end, low) in enumerate(zip(data.train_end, data.offsets, strict=False))
    ]
    assert (
        splits.catalogue.train_counts.tolist()
        == np.bincount(np.concatenate(parts), minlength=splits.pad).tolist()
    )


def test_time_split_cases_carry_their_history(files):
    rows = [*ROWS, ("dee", "x", 1), ("dee", "y", 2)]
    data = files.load(rows, split="time", valid_from=20, test_from=30)
    splits = data.sequences(2)
    assert splits.test.id.tolist() == ["ann@2", "ann@3", "bob@2"]
    batch = splits.test.batch(np.array([1, 0]))
    names = [[splits.catalogue.item_ids[i] for i in row] for row in batch["items"].tolist()]
    assert names == [["y", "z"], ["x", "y"]]
    assert splits.find("ann") == 1 and splits.test.find("ann@2") == 0
    with pytest.raises(DataError, match="no case of user 'dee'"):
        splits.find("dee")  # only trains


@settings(max_examples=30, deadline=None)
@given(batch_size=st.integers(1, 90), seed=st.integers(0, 2**32), length=st.sampled_from([2, 5, 30]))
def test_order_is_a_seeded_permutation(batch_size, seed, length):
    data = load(SyntheticConfig(users=30, items=20, mean_length=9, categories=3))
    split = data.sequences(length).train
    order = split.order(np.random.default_rng(seed), batch_size)
    assert sorted(order.tolist()) == list(range(len(split)))
    assert (order == split.order(np.random.default_rng(seed), batch_size)).all()


def test_order_groups_lengths_without_sorting_the_epoch():
    data = load(SyntheticConfig(users=3000, items=40, mean_length=12, categories=4))
    split = data.sequences(50).train
    order = split.order(np.random.default_rng(1), 32)
    assert (order != split.order(np.random.default_rng(2), 32)).any()

    def waste(index):
        padded = sum(
            split.length[index[i : i + 32]].max() * len(index[i : i + 32]) for i in range(0, len(index), 32)
        )
        return 1 - split.length.sum() / padded

    assert waste(order) < 0.05 < 0.2 < waste(np.random.default_rng(1).permutation(len(split)))
    means = [split.length[order[i : i + 32]].mean() for i in range(0, len(split), 32)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # batches come in no order of length


def test_lengths_and_strides_that_make_no_sense(data):
    with pytest.raises(ConfigError, match="length of 0"):
        data.sequences(0)
    coarse = load(SyntheticConfig(users=60, items=40, mean_length=15, categories=4, stride=9))
    with pytest.raises(ConfigError, match="transitions would be skipped"):
        coarse.sequences(8)
    fine = load(SyntheticConfig(users=60, items=40, mean_length=15, categories=4, stride=1))
    assert len(fine.sequences(8).train) > len(data.sequences(8).train)
    assert fine.digest == data.digest  # the stride changes training, not the data


def test_a_split_without_transitions_is_refused(files):
    rows = [(u, "xyz"[t], t) for u in "abc" for t in range(3)]
    with pytest.raises(DataError, match="no transition to learn"):
        files.load(rows).sequences(5)


def test_information_adds_up(data):
    splits = data.sequences(4)
    assert splits.info["transitions"] == sum(
        max(0, n - 1) for n in (data.train_end - data.offsets[:-1]).tolist()
    )
    assert splits.info["windows"] == len(splits.train)
    assert len(splits.catalogue.item_text) == len(splits.catalogue) == splits.pad == len(data.item_ids)


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["valid", "test"])
def test_some_cases_are_the_same_cases(data, part):
    cases, size = getattr(data.sequences(5), part), len(getattr(data.sequences(5), part))
    index = np.random.default_rng(3).permutation(len(cases))[:13]
    some = cases.take(index)
    assert len(some) == 13 and some.id.tolist() == cases.id[index].tolist()
    assert some.history.tolist() == cases.history[index].tolist()
    whole, few = cases.batch(index), some.batch(np.arange(13))
    assert all(torch.equal(whole[name], few[name]) for name in whole)
    for ours, theirs in zip(some.seen(np.arange(13)), cases.seen(index), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert some.find(some.id[4]) == 4
    gone = next(name for name in cases.id if name not in set(some.id))
    with pytest.raises(DataError, match="no case of user"):
        some.find(gone)
    mask = cases.length == cases.length.max()
    assert cases.take(mask).id.tolist() == cases.id[mask].tolist()
    assert len(cases) == len(cases.id) == size, "the whole is left as it was"


def test_validation_cases_are_used_once(data):
    splits = data.sequences(5)
    chooses, fits = set(splits.valid.id), set(splits.fit.id)
    assert not chooses & fits and len(chooses | fits) == len(data.valid_rows)
    assert 0.1 < len(fits) / len(data.valid_rows) < 0.4
    assert splits.info["validation"] == len(chooses) and splits.info["fitting"] == len(fits)
    longer = data.sequences(9)  # who is held out depends on the user alone
    assert set(longer.fit.id) == fits


def test_some_cases_keep_the_names_they_have_among_all(files):
    rows = [*ROWS, ("dee", "x", 1), ("dee", "y", 2)]
    cases = files.load(rows, split="time", valid_from=20, test_from=30).sequences(2).test
    assert cases.id.tolist() == ["ann@2", "ann@3", "bob@2"]
    assert cases.take(np.array([2, 0])).id.tolist() == ["bob@2", "ann@2"]  # one case each, named as before


def test_what_is_no_candidate_goes_by_the_key(data):
    index = np.array([4, 1])
    assert data.sequences(5).test.excluded(index) is None
    unseen = load(SyntheticConfig(users=60, items=40, mean_length=15, categories=4, candidates="unseen"))
    cases = unseen.sequences(5).test
    for ours, theirs in zip(cases.excluded(index), cases.seen(index), strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("length", [1, 3, 50])
def test_transitions_are_all_inputs_with_their_targets(data, length):
    split = data.sequences(length).train
    batch = split.batch(np.arange(len(split)))
    real = batch["targets"] != IGNORE
    previous, following = split.transitions()
    assert previous.tolist() == batch["items"][real].tolist()
    assert following.tolist() == batch["targets"][real].tolist()
