"""Mixture-of-Recursions on a GPU answers as on the CPU, trains in bf16, and writes the same text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from reason.methods.base import Step
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.generate import GenerationRequest, generate
from reason.methods.mor.objective import losses
from reason.methods.mor.scheduler import Scheduler
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths, TopK

_spec = importlib.util.spec_from_file_location(
    "mor_small", Path(__file__).parents[1] / "methods/mor/small.py"
)
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batch(rows=3, length=40):
    tokens = torch.randint(small.VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "length": torch.full((rows,), length)}


@pytest.mark.parametrize("kv_mode", ["recursion", "sharing", "hybrid", "deepest", "propagate"])
@pytest.mark.parametrize(
    "route", [TopK([1, 0.6, 0.3]), AboveThreshold([0.0, 0.0]), KnownDepths(2)], ids=["topk", "above", "known"]
)
def test_states_are_those_of_the_cpu(route, kv_mode):
    model, tokens = small.network(), batch()["tokens"]
    lengths = torch.tensor([40, 31, 7])
    with torch.no_grad():
        here = model(tokens, route, lengths=lengths, kv_mode=kv_mode)
        there = model.cuda()(tokens.cuda(), route, lengths=lengths.cuda(), kv_mode=kv_mode)
    assert torch.equal(there.depth.cpu(), here.depth)
    inside = torch.arange(40) < lengths[:, None]
    torch.testing.assert_close(there.states.cpu()[inside], here.states[inside], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", ["expert", "token", "random"])
def test_it_trains_in_bf16(routing):
    model = small.network(routing=routing).cuda().train()
    data = {name: x.cuda() for name, x in batch(8).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for step in range(30):
        place = Step(0, step, step / 30, torch.Generator("cuda").manual_seed(step))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = losses(model.config, model, data, place)
        total = torch.stack([s / c for s, c in found.values()]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append(float(found["text"][0] / found["text"][1]))
    assert seen[-1] < seen[0] - 0.3


def test_the_same_text_is_written_alone_and_in_company():
    model = small.network().cuda()
    requests = [GenerationRequest(small.text(9, seed=s), 12, AboveThreshold([0.0, 0.0])) for s in range(5)]
    alone = [generate(model, request) for request in requests]
    together = Scheduler(model, MoRCache(model), rows=3).run(requests)
    cpu = [generate(model.cpu(), request) for request in requests]
    for a, b, c in zip(alone, together, cpu, strict=True):
        assert a.tokens == b.tokens == c.tokens
        assert a.depth.tolist() == b.depth.tolist() == c.depth.tolist()
