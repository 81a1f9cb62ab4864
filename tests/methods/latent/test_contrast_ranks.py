"""The contrast spread over two processes is the contrast of one: value and gradients."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from reason.methods.latent.objective import contrast

D, K = 6, 2
SHARES = [(slice(0, 3), 5), (slice(3, 5), 4)]  # rows and width of each rank: ragged in both


def case():
    torch.manual_seed(0)
    noisy, clean = torch.randn(2, 5, 5, K, D)
    user = torch.tensor([0, 1, 2, 0, 3])  # the windows of user 0 lie on different ranks
    length = torch.tensor([5, 3, 4, 4, 2])
    return noisy, clean, user, torch.arange(5) < length[:, None]


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        noisy, clean, user, real = case()
        rows, width = SHARES[rank]
        noisy = noisy[rows, :width].clone().requires_grad_()
        clean = clean[rows, :width].clone().requires_grad_()
        value = contrast(noisy, clean, user[rows], real[rows, :width], tau=0.5, cosine=True)
        value.backward()
        torch.save((value.detach(), noisy.grad, clean.grad), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    noisy, clean, user, real = case()
    noisy.requires_grad_()
    clean.requires_grad_()
    value = contrast(noisy, clean, user, real, tau=0.5, cosine=True)
    value.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], value.detach())
    for (rows, width), (_, noisy_grad, clean_grad) in zip(SHARES, parts, strict=True):
        torch.testing.assert_close(noisy_grad, noisy.grad[rows, :width])
        torch.testing.assert_close(clean_grad, clean.grad[rows, :width])
