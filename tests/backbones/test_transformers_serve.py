"""A real server, ``transformers serve``: its texts follow the law of the same model in this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reason.backbones.cache import RowCache
from reason.backbones.connection import Address
from reason.backbones.generation import Batch, Sampling, Stop, generate, stream
from reason.backbones.server import Server
from reason.backbones.tokens import Tokens
from reason.datasets.problems import Problem
from reason.methods.particle import searches, smc
from reason.methods.particle.driver import Driver, Task
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws

pytestmark = pytest.mark.slow

for module in ("openai", "uvicorn", "fastapi"):  # of the extra serve
    pytest.importorskip(module)

SIGNS = ["<end>", *(chr(c) for c in range(33, 127))]  # <end> ends a text
STOP = Stop(separators=tuple("aeiou,;.+=()"), chunk=4, length=16)
SAMPLING = Sampling(1.2)


def signs() -> Tokens:
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(SIGNS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Tokens(tokenizer, 0)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(SIGNS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.6, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    signs().save(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1",
             "--port", str(port), "--device", "cpu"],
            stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.3)
        address = Address(f"http://127.0.0.1:{port}", context=64, concurrency=1)
        with Server(address, signs()) as one:
            yield one
    finally:
        process.terminate()
        process.wait(20)


def test_what_it_was_found_to_do(server, model):
    found = server.abilities
    assert (found.ids, found.kept, found.logprobs, found.seeded) == (False, True, False, True)
    assert "generation_config" in found.taken and "top_k" not in found.taken
    assert len(server.notes) == 1


def test_its_likeliest_text_is_that_of_the_model_here(server, model):
    prompts = [[40, 41], [65, 66, 67], [1], [50, 3], [80, 81]]
    batch = Batch(RowCache(model, 64), signs(), [0])
    here = generate(batch, prompts, Sampling(), STOP, range(5))
    for i, row in enumerate(server.open(prompts)):
        server.extend(row, i, Sampling(), STOP, key=i)
    there = {}
    while server.active:
        there |= {c.key: c for c in server.tick()}
    for i, want in enumerate(here):
        assert (there[i].tokens, there[i].text, there[i].end) == (want.tokens, want.text, want.end)
    assert len({want.end for want in here}) > 1


def test_its_samples_have_the_law_of_the_model_here(server, model):
    """Temperature, and no top-k: transformers alone would be greedy, or leave out all but 50 tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[40, 41]])).logits[0, -1].double()
    law = (logits / SAMPLING.temperature).softmax(-1).numpy()
    n, (row,) = 400, server.open([[40, 41]])
    for i, copy in enumerate(server.fork([row] * n)):
        server.extend(copy, stream("law", i), SAMPLING, Stop(chunk=1), key=i)
    counts = np.zeros(len(SIGNS))
    while server.active:
        for chunk in server.tick():
            counts[chunk.tokens[0]] += 1
    error = np.sqrt(law * (1 - law) / n) + 1 / n
    assert (np.abs(counts / n - law) < 4 * error).all(), (counts / n, law)
    rare = law.argsort()[:-50]
    assert counts[rare].sum() > 0 and abs(counts[rare].sum() / n - law[rare].sum()) < 0.05


def test_particles_run_on_it(server):
    def everything(root):
        population = yield from smc.sweep(
            root, smc.Filter(4, Potential("prob"), threshold=1.0), Draws(0, "p")
        )
        whole = yield from searches.samples(root, 3, Draws(1, "p"))
        return [*population.nodes, *whole]

    def reward(prefixes):
        return np.array([0.2 if "a" in prefix.node.text else 0.8 for prefix in prefixes])

    results = []
    for _ in range(2):
        before = server.drawn
        (outcome,) = Driver(server, SAMPLING, STOP, reward).run(
            [Task(Problem("p", ""), [40, 41], everything)]
        )
        assert all(node.finished for node in outcome.result)
        assert outcome.ledger.drawn == server.drawn - before > 0
        results.append([node.solution for node in outcome.result])
    assert results[0] == results[1]  # one request at a time: seeds hold
    assert len(set(results[0])) > 2
