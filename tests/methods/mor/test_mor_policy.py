"""A routed decoder in a running batch writes what it writes alone."""

import numpy as np
import pytest
import small
import torch

from reason.backbones.generation import Batch, Sampling, Stop, stream
from reason.backbones.tokens import Tokens
from reason.errors import ConfigError, DataError
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.generate import GenerationRequest, generate
from reason.methods.mor.policy import RoutedRows
from reason.methods.mor.token_selection import AboveThreshold, TopK
from reason.methods.mor.visible_keys import KV_MODES

ROUTE = AboveThreshold([0.1, -0.2])
BYTE = Tokens.train([], "byte", 0)


def batch_of(model, route=ROUTE, kv_mode=None) -> Batch:
    return Batch(RoutedRows(model, 40, route, cache=MoRCache(model, kv_mode)), BYTE, {5})


@pytest.mark.parametrize("kv_mode", KV_MODES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 0.9)])
def test_texts_that_fork_and_wait_are_those_written_alone(kv_mode, sampling):
    model = small.network()
    batch = batch_of(model, kv_mode=kv_mode)
    rows = batch.open([small.text(4), small.text(9, 2)])
    rows += batch.fork([rows[0], rows[0], rows[1]])
    prompts = [small.text(4), small.text(9, 2), small.text(4), small.text(4), small.text(9, 2)]
    written = [[] for _ in rows]
    for i, row in enumerate(rows):
        batch.extend(row, stream(i), sampling, Stop(chunk=3 + i, length=12), key=i)
    while batch.active:
        for chunk in batch.tick():
            written[chunk.key] += chunk.tokens
            if not chunk.finished:
                batch.extend(
                    chunk.row,
                    stream(chunk.key),
                    sampling,
                    Stop(chunk=4, length=12),
                    tick=chunk.tick,
                    key=chunk.key,
                )
    for i, prompt in enumerate(prompts):
        request = GenerationRequest(prompt, 12, ROUTE, None, sampling, frozenset({5}), i)
        want = generate(model, request, cache=MoRCache(model, kv_mode))
        assert written[i] == want.tokens + [5] * want.stopped
    assert len({tuple(w) for w in written}) == (2 if sampling.greedy else 5)
    batch.close(rows)
    assert batch.lm.cache.used == 0


def test_beginnings_scores_and_states():
    model = small.network()
    batch = batch_of(model)
    (row,) = batch.open([small.text(6)])
    batch.extend(row, 1, Sampling(1.2), Stop(length=8))
    (chunk,) = batch.drain()
    ids = small.text(6) + chunk.tokens
    logits, _ = small.at_once(model, ids, ROUTE)
    torch.testing.assert_close(chunk.row.logits, logits[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decoder.logits(chunk.hidden[None])[0], logits[-1], atol=1e-4, rtol=1e-4)
    (part,) = batch.open([ids[:9]], [3], [row])
    torch.testing.assert_close(part.logits, logits[8], atol=1e-4, rtol=1e-4)
    for _ in range(2):  # the row stays as it is
        ((ours, known, _),) = batch.score([part], [ids[9:]], Sampling(1.0))
        want = logits.double().log_softmax(-1)[range(8, len(ids) - 1), ids[9:]]
        np.testing.assert_allclose(known, want, atol=1e-4)
        np.testing.assert_allclose(ours, want, atol=1e-4)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ConfigError, match="looks ahead"):
        batch_of(small.network(), TopK([1.0, 0.5, 0.5]))
    with pytest.raises(DataError, match="from 1 to 40"):
        batch_of(small.network()).open([small.text(41)])
