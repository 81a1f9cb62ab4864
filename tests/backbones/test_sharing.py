"""Which unrolled layer is which physical one, against the formulas of the paper, and refusals that help."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reason.backbones.sharing import SCHEMES, Sharing
from reason.errors import ConfigError


def by_formula(scheme, L, N, index):
    """Bae et al., arXiv 2507.10524, table 5."""
    if scheme == "cycle":
        return index % (L // N)
    if scheme == "sequence":
        return index // N
    if index == 0:
        return 0
    if index == L - 1:
        return (L - 2) // N + 1
    return 1 + ((index - 1) % ((L - 2) // N) if scheme == "middle_cycle" else (index - 1) // N)


@given(st.sampled_from(SCHEMES), st.integers(1, 6), st.integers(1, 6))
def test_maps_are_those_of_the_paper(scheme, block, recursions):
    ends = 2 if scheme.startswith("middle") else 0
    L = ends + block * recursions
    sharing = Sharing(scheme, L, recursions)
    assert sharing.physical == tuple(by_formula(scheme, L, recursions, i) for i in range(L))
    assert sharing.unique == len(set(sharing.physical)) and (sharing.block, sharing.ends) == (block, ends)


def test_maps_in_full():
    assert Sharing("cycle", 9, 3).physical == (0, 1, 2, 0, 1, 2, 0, 1, 2)
    assert Sharing("sequence", 9, 3).physical == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert Sharing("middle_cycle", 8, 3).physical == (0, 1, 2, 1, 2, 1, 2, 3)
    assert Sharing("middle_sequence", 8, 3).physical == (0, 1, 1, 1, 2, 2, 2, 3)


@given(st.sampled_from(SCHEMES), st.integers(3, 40))
def test_one_recursion_shares_nothing(scheme, L):
    assert Sharing(scheme, L, 1).physical == tuple(range(L))


def test_stopping_early_leaves_whole_passes_out():
    cycle, middle = Sharing("cycle", 6, 3), Sharing("middle_cycle", 8, 3)
    assert [cycle.upto(d) for d in (1, 2, 3)] == [(0, 1), (0, 1) * 2, (0, 1) * 3]
    assert [middle.upto(d) for d in (1, 2, 3)] == [(0, *(1, 2) * d, 3) for d in (1, 2, 3)]
    for scheme, L in (("sequence", 6), ("middle_sequence", 8)):
        sharing = Sharing(scheme, L, 3)
        assert sharing.upto(3) == sharing.physical
        with pytest.raises(ValueError, match=f"sharing={scheme.replace('sequence', 'cycle')}"):
            sharing.upto(2)
    for depth in (0, 4):
        with pytest.raises(ValueError, match="1 to 3"):
            cycle.upto(depth)


@pytest.mark.parametrize(
    ("scheme", "layers", "recursions", "said", "mend"),
    [
        (
            "middle_cycle",
            9,
            2,
            "2 does not divide 7 layers between the two ends",
            "layers=8 or 10, or 1 or 7 rec",
        ),
        ("cycle", 9, 2, "2 does not divide 9 layers", "layers=8 or 10, or 1 or 3 recursions"),
        ("middle_cycle", 4, 3, "3 does not divide 2", "layers=5, or 2 recursions"),
        ("middle_sequence", 30, 3, "3 does not divide 28", "layers=29 or 32, or 2 or 4 recursions"),
        ("middle_cycle", 2, 1, "at least 1 layer", "layers=3."),
        ("cycle", 0, 2, "too few", "layers=2."),
    ],
)
def test_layers_that_do_not_fit_name_those_that_do(scheme, layers, recursions, said, mend):
    with pytest.raises(ConfigError) as caught:
        Sharing(scheme, layers, recursions)
    assert said in caught.value.message and mend in caught.value.hint


@given(st.sampled_from(SCHEMES), st.integers(0, 30), st.integers(1, 12))
def test_the_advice_is_right(scheme, layers, recursions):
    try:
        Sharing(scheme, layers, recursions)
    except ConfigError as error:
        counts, _, others = (
            error.hint.removeprefix("Nearest: backbone.layers=").rstrip(".").partition(", or ")
        )
        for count in counts.split(" or "):
            Sharing(scheme, int(count), recursions)
        for n in others.removesuffix(" recursions").split(" or ") if others else []:
            Sharing(scheme, layers, int(n))


def test_other_refusals():
    with pytest.raises(ConfigError, match="Did you mean 'middle_cycle'"):
        Sharing("midle_cycle", 8, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        Sharing("cycle", 8, 0)
