"""Top-k has shapes that are known before anything is computed: the loop is one graph, and stays the same one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from reason.methods.mor.objective import router_losses
from reason.methods.mor.token_selection import AboveThreshold, TopK

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

pytestmark = pytest.mark.filterwarnings("default")  # torch's own, while it traces


@pytest.mark.parametrize("kv_mode", ["recursion", "sharing"])
def test_the_loop_of_top_k_is_one_graph(kv_mode):
    """``fullgraph`` refuses whatever would make the host wait for a number, or leave the graph for any other reason."""
    model, route = small.network(block=1, sharing="cycle", z_weight=0.1).train(), TopK([1, 2 / 3, 1 / 3])

    def objective(tokens):
        routed = model(tokens, route, kv_mode=kv_mode)
        text = model.decoder.logits(model.read(routed.states)).logsumexp(-1).sum()
        return text + sum(s for s, _ in router_losses(model.config, model, routed).values()), routed.depth

    def told(function, tokens):
        loss, depth = function(tokens)
        wanted = [p for p in model.parameters() if p.requires_grad]
        return [loss, depth, *torch.autograd.grad(loss, wanted)]

    batches = torch.randint(small.VOCAB, (3, 2, 12), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    for turn, tokens in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=turn > 0):
            got = told(compiled, tokens)
        torch.testing.assert_close(got, told(objective, tokens), rtol=1e-5, atol=1e-5)


def test_thresholds_are_no_such_path():
    """The test above can fail: how many tokens are above a threshold is known only once it is computed."""
    model, route = small.network(block=1), AboveThreshold([0.0, 0.0])
    compiled = torch.compile(lambda tokens: model(tokens, route).states, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="data-dependent"):
        compiled(torch.ones(2, 8, dtype=torch.int64))
