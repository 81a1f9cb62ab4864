"""What a solution gives as its answer, in each of the three forms, and where it gives none."""

from __future__ import annotations

import pytest

from reason.answers import stated


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"so it is \boxed{5}, since \boxed{5}", "5"),
        (r"first \boxed{4}, no: \boxed{5}.", "5"),
        (r"\boxed{12} and then \boxed{", None),  # it broke off inside of its last box
        (r"\boxed{12} and then \boxed{1", None),
        (r"\boxed{12} and then \boxed", None),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),  # escaped braces are no braces
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\fbox{7} or \boxed 8.", "8."),
        (r"\boxed{ }", None),
        ("She has 3.\n#### 1,250", "1,250"),
        ("#### 3\n#### 4", "4"),
        ("####", None),
        ("7+5=12\nanswer 12", "12"),
        ("answer 32\nanswer 31", "32"),  # the first, as the judge of sums has it
        ("the answer 32", None),
        ("answer ", None),
        (r"answer 3, \boxed{4}", "4"),
        ("", None),
    ],
)
def test_what_a_solution_gives(solution, answer):
    assert stated(solution) == answer
