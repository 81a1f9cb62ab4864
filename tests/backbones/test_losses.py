"""The fused losses against their definitions, and that the logits are never all alive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reason.backbones.losses import linear_cross_entropy, pairwise_kl


def problem(M=40, N=23, d=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, d, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(N, d, generator=generator, dtype=dtype).requires_grad_()
    target = torch.randint(0, N, (M,), generator=generator)
    target[::5] = -100
    scale = (0.5 + torch.rand(M, generator=generator, dtype=dtype)).requires_grad_()
    row_weight = torch.rand(M, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, target, scale, row_weight


def plain_cross_entropy(hidden, weight, target, scale=1.0, row_weight=1.0):
    scale = scale.unsqueeze(-1) if isinstance(scale, torch.Tensor) and scale.dim() else scale
    return (F.cross_entropy(scale * hidden @ weight.T, target, reduction="none") * row_weight).sum()


@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
def test_cross_entropy_and_its_gradients(chunk):
    hidden, weight, target, scale, row_weight = problem()
    inputs = (hidden, weight, scale, row_weight)
    found = linear_cross_entropy(hidden, weight, target, scale=scale, row_weight=row_weight, chunk=chunk)
    expected = plain_cross_entropy(hidden, weight, target, scale, row_weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_cross_entropy_with_one_scale():
    hidden, weight, target, _, _ = problem()
    for scale in (1 / 0.07, torch.tensor(2.5, requires_grad=True)):
        found = linear_cross_entropy(hidden, weight, target, scale=scale)
        torch.testing.assert_close(
            found, plain_cross_entropy(hidden, weight, target, scale), rtol=1e-5, atol=1e-4
        )
    (slope,) = torch.autograd.grad(found, scale)
    (expected,) = torch.autograd.grad(plain_cross_entropy(hidden, weight, target, scale), scale)
    torch.testing.assert_close(slope, expected)


def test_cross_entropy_by_finite_differences():
    hidden, weight, target, scale, row_weight = problem(M=6, N=5, d=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, s, r: linear_cross_entropy(h, w, target, scale=s, row_weight=r, chunk=4),
        (hidden, weight, scale, row_weight),
    )


def test_rows_without_a_target_do_not_count():
    hidden, weight, target, _, _ = problem()
    kept = target != -100
    with torch.no_grad():
        hidden[~kept] = float("nan")  # not even by accident
    found = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(found, plain_cross_entropy(hidden[kept], weight, target[kept]))
    d_hidden, d_weight = torch.autograd.grad(found, (hidden, weight))
    assert not d_hidden[~kept].any() and d_weight.isfinite().all()
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(target, -100))
    assert nothing == 0 and not torch.autograd.grad(nothing, weight)[0].any()


def test_cross_entropy_is_finite_at_large_logits():
    hidden, weight, target, _, _ = problem()
    loss = linear_cross_entropy(hidden, weight, target, scale=1e4)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_cross_entropy_under_autocast():
    hidden, weight, target, scale, _ = problem(M=200, N=50, d=32)
    exact = linear_cross_entropy(hidden, weight, target, scale=scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, target, scale=scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0.1)
    for low, wide in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(exact, (hidden, weight)),
        strict=True,
    ):
        assert low.dtype == torch.float32
        assert (low - wide).norm() < 0.02 * wide.norm()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_the_logits_are_never_all_alive():
    M, N, d, chunk = 512, 300, 8, 16
    hidden, weight, target, _, _ = problem(M, N, d)
    with LargestTensor() as plain:
        plain_cross_entropy(hidden, weight, target)
    assert plain.largest == M * N  # the measure sees them where they are
    with LargestTensor() as fused:
        linear_cross_entropy(hidden, weight, target, chunk=chunk).backward()
    assert fused.largest <= max(chunk * N, M * d, N * d)
    states = hidden.detach().view(128, 4, d).requires_grad_()
    with LargestTensor() as fused:
        pairwise_kl(states, weight, scale=1.0, bound=5.0, chunk=chunk).backward()
    assert fused.largest <= max(chunk * 4 * N, M * d, N * d)


# --- ERL's diversity --------------------------------------------------------------------------------


def plain_pairwise_kl(states, weight, scale, bound):
    """The definition, pair by pair."""
    log_p = (scale * states @ weight.T).log_softmax(-1)  # (M, J, N)
    J = states.shape[1]
    total = states.new_zeros(())
    for j in range(J):
        for i in range(J):
            if i != j:
                kl = (log_p[:, j].exp() * (log_p[:, j] - log_p[:, i].detach())).sum(-1)
                total = total + kl.clamp(max=bound).sum()
    return total / (J * (J - 1))


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("bound", [0.5, 3.0, 1e9])
def test_pairwise_kl_and_its_gradients(chunk, bound):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 3, 5, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, generator=generator).requires_grad_()
    found = pairwise_kl(states, weight, scale=0.8, bound=bound, chunk=chunk)
    expected = plain_pairwise_kl(states, weight, 0.8, bound)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(found, (states, weight)),
        torch.autograd.grad(expected, (states, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bound_cuts_value_and_gradient():
    states = torch.tensor([[[40.0, 0.0], [0.0, 40.0]]], requires_grad=True)  # far apart
    weight = torch.eye(2, requires_grad=True)
    total = pairwise_kl(states, weight, scale=1.0, bound=2.0)
    assert total == 2.0
    assert not any(g.any() for g in torch.autograd.grad(total, (states, weight)))


def test_equal_states_have_no_diversity():
    weight = torch.randn(500, 8)
    states = torch.randn(9, 1, 8).expand(9, 4, 8).contiguous().requires_grad_()
    total = pairwise_kl(states, weight, scale=3.0, bound=5.0)
    assert total == 0.0
    assert not torch.autograd.grad(total, states)[0].any()


def test_diversity_is_never_negative_and_grows_with_distance():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 8, generator=generator)
    middle = torch.randn(5, 1, 8, generator=generator)
    apart = torch.randn(5, 3, 8, generator=generator)
    values = [
        float(pairwise_kl(middle + step * apart, weight, scale=1.0, bound=1e9))
        for step in (0, 1e-4, 0.1, 0.5, 1)
    ]
    assert values[0] == 0.0 and values == sorted(values)


def test_gradient_reaches_the_first_argument_only():
    weight = torch.randn(6, 3, dtype=torch.float64)
    states = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(pairwise_kl(states, weight, scale=1.0, bound=1e9), states)
    log_p = (states @ weight.T).log_softmax(-1)
    for j, i in ((0, 1), (1, 0)):  # the gradient at state j is that of KL(p_j || p_i) with p_i a constant
        kl = (log_p[0, j].exp() * (log_p[0, j] - log_p[0, i].detach())).sum() / 2
        (expected,) = torch.autograd.grad(kl, states, retain_graph=True)
        torch.testing.assert_close(found[0, j], expected[0, j])
        assert not expected[0, i].any()


def test_one_state_gives_exactly_zero():
    states, weight = torch.randn(4, 1, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    total = pairwise_kl(states, weight, scale=1.0, bound=5.0)
    assert total == 0.0 and total.requires_grad
    assert not any(g.any() for g in torch.autograd.grad(total, (states, weight)))


@pytest.mark.parametrize("bound", [5.0, 1e9])
def test_finite_where_softmax_underflows(bound):
    generator = torch.Generator().manual_seed(2)
    states = (200 * torch.randn(6, 3, 1, generator=generator)).requires_grad_()
    weight = torch.randn(400, 1, generator=generator).requires_grad_()  # logits of standard deviation 200
    total = pairwise_kl(states, weight, scale=1.0, bound=bound)
    assert total.isfinite() and total > 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, (states, weight)))


def test_second_derivatives_are_refused():
    hidden, weight, target, _, _ = problem(M=4, N=5, d=3)
    (slope,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        slope.sum().backward()
