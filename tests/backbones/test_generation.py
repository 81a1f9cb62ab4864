"""Sampling in a running batch: equal to each text alone from scratch, token for token, whatever joins, forks or leaves."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reason.backbones.cache import RowCache
from reason.backbones.generation import (
    Batch,
    Sampler,
    Sampling,
    Stop,
    boxed,
    draw,
    generate,
    log_probabilities,
    random_bits,
    stream,
    uniforms,
)
from reason.backbones.tokens import Tokens
from reason.errors import ConfigError, DataError, RunError

BYTE = Tokens.train([], "byte", 0)
SIZES = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.35, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 256, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"sliding_window": 48, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 48, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 257, "initializer_range": 0.35,
        "bos_token_id": None, "eos_token_id": 256,
    },
    "gpt_neox": {"rotary_pct": 0.5},
}  # fmt: skip


def network(family="llama", seed=0, **change):
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = FAMILIES[family] if family == "gpt2" else SIZES | FAMILIES[family]
    config = AutoConfig.for_model(family, **(keys | change))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = "eager" if family == "gemma2" else "sdpa"  # which has no soft cap
        return AutoModelForCausalLM.from_config(config, attn_implementation=kind).float().eval()


MODEL = network()
OF = Stop(separators=("\n\n",), chunk=9, length=30)


def batch_of(model=MODEL, eos=(256,), context=None) -> Batch:
    return Batch(RowCache(model, context or 48), BYTE, eos)


def plain_shares(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution (V,) float64, by the definitions."""
    if sampling.greedy:
        return np.eye(len(logits))[logits.argmax()]
    share = np.exp((logits - logits.max()) / sampling.temperature)
    share /= share.sum()
    order = sorted(range(len(share)), key=lambda t: (-share[t], t))[: sampling.top_k or len(share)]
    kept, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p * share[order].sum() - 1e-9:
            break
        kept.append(token)
        mass += share[token]
    found = np.zeros(len(share))
    found[kept] = share[kept] / share[kept].sum()
    return found


def alone(model, prompt, key, sampling, stop=Stop(), tick=0, written=0, eos=(256,), context=48):
    """One chunk of one text, from scratch for every token. (ids, log-probabilities, end, states)"""
    ids, logps, text = list(prompt), [], b""
    while True:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        share = plain_shares(logits, sampling)
        number = len(ids) - len(prompt)
        u = uniforms(np.array([key], np.uint64), np.array([tick + number]))[0]
        order = np.arange(len(share))
        if sampling.top_p < 1 or sampling.top_k:
            order = np.array(sorted(order, key=lambda t: (-share[t], t)))
        token = int(
            share.argmax() if sampling.greedy else order[np.searchsorted(share[order].cumsum(), u, "right")]
        )
        ids.append(token)
        logps.append((np.log(share[token]), logits[token] - np.log(np.exp(logits).sum())))
        number += 1
        text += BYTE.piece_of(None, token) if token not in eos else b""
        if token in eos:
            end = "eos"
        elif stop.length == written + number or len(ids) == context:
            end = "length"
        elif any(s.encode() in text for s in stop.separators):
            end = "separator"
        elif number == stop.chunk:
            end = "cap"
        else:
            continue
        return ids[len(prompt) :], np.array(logps), end


def prompt_of(length, seed=1) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- randomness -----------------------------------------------------------------------------------------


def test_random_bits_are_those_of_splitmix64():
    known = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert random_bits(np.full(5, 1234567, np.uint64), np.arange(5)).tolist() == known


def test_streams_are_named_and_uniforms_are_uniform():
    assert stream(0, "a", 1) == stream(0, "a", 1) != stream(0, "a", 2) and stream(1, 23) != stream(12, 3)
    keys = np.array([stream(0, i) for i in range(2000)], np.uint64)
    for numbers in (uniforms(keys, np.zeros(2000)), uniforms(keys[:1].repeat(2000), np.arange(2000))):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 45  # chi-square, 19 degrees of freedom, p < 0.001
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.08


# --- draws ----------------------------------------------------------------------------------------------

samplings = st.builds(
    Sampling,
    st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0, 1, 3]),
)


@settings(max_examples=150, deadline=None)
@given(samplings, st.lists(st.integers(-6, 6), min_size=2, max_size=9), st.integers(0, 99))
def test_draws_are_those_of_the_definitions(sampling, logits, seed):
    logits = torch.tensor([[x / 2 for x in logits]] * 7)
    u = np.random.default_rng(seed).random(7)
    drawn = draw(logits, sampling, u)
    share = plain_shares(logits[0].double().numpy(), sampling)
    order = (
        sorted(range(len(share)), key=lambda t: (-share[t], t))
        if sampling.top_p < 1 or sampling.top_k
        else range(len(share))
    )
    mass = share[list(order)].cumsum()
    for i, token in enumerate(drawn.tokens.tolist()):
        assert share[token] > 0
        if not sampling.greedy and np.abs(mass - u[i]).min() > 1e-6:
            assert token == list(order)[int(np.searchsorted(mass, u[i], "right"))]
    known = logits[0].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(drawn.logp, np.log(share[drawn.tokens]), atol=1e-6)
    np.testing.assert_allclose(drawn.model_logp, known[drawn.tokens], atol=1e-6)
    for token in range(len(share)):
        ours, theirs = log_probabilities(logits[:1], torch.tensor([token]), sampling)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose([ours[0], theirs[0]], [np.log(share[token]), known[token]], atol=1e-6)


def test_the_largest_uniform_draws_a_token_that_can_be_drawn():
    logits = torch.full((1, 50), -200.0)
    logits[0, :3] = 0
    assert draw(logits, Sampling(1.0), np.array([1 - 2.0**-53])).tokens.item() == 2
    assert draw(logits, Sampling(1.0), np.array([0.0])).tokens.item() == 0


def test_a_sampler_goes_on_and_its_seed_decides():
    logits = torch.zeros(257)
    a, b, c = (Sampler(Sampling(1.0), seed) for seed in (1, 1, 2))
    first = [a(logits) for _ in range(9)]
    assert first == [b(logits) for _ in range(9)] != [c(logits) for _ in range(9)] and len(set(first)) > 5


def test_numbers_that_mean_nothing_are_refused():
    for make in (
        lambda: Sampling(-1.0), lambda: Sampling(float("nan")), lambda: Sampling(float("inf")), lambda: Sampling(1.0, 0.0),
        lambda: Sampling(1.0, 1.5), lambda: Sampling(1.0, 1.0, -1), lambda: Stop(separators=("",)),
        lambda: Stop(strings=("a", "")), lambda: Stop(chunk=0), lambda: Stop(length=0),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, 0.9)):
        with pytest.raises(RunError, match="not numbers"):
            draw(torch.tensor([[0.0, float("nan")]]), sampling, np.zeros(1))


# --- equal to decoding alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.9), Sampling(1.3, 0.7, 20)], ids=["greedy", "plain", "nucleus"]
)
def test_a_batch_writes_what_each_text_would_alone(family, sampling):
    model = MODEL if family == "llama" else network(family)
    prompts = [prompt_of(n, n) for n in (5, 1, 17, 5, 2)]
    streams = [stream(3, i) for i in range(5)]
    chunks = generate(batch_of(model), prompts, sampling, Stop(length=20), streams)
    for prompt, key, chunk in zip(prompts, streams, chunks, strict=True):
        ids, logps, end = alone(model, prompt, key, sampling, Stop(length=20))
        assert chunk.tokens == ids and chunk.end == end and chunk.tick == len(ids)
        np.testing.assert_allclose(np.stack([chunk.logp, chunk.model_logp], 1), logps, atol=1e-4)


def test_the_order_of_a_batch_does_not_matter():
    prompts, streams = [prompt_of(n, n) for n in (3, 9, 4, 12)], [stream(i) for i in range(4)]
    one = generate(batch_of(), prompts, Sampling(1.0), OF, streams)
    order = [2, 0, 3, 1]
    other = generate(batch_of(), [prompts[i] for i in order], Sampling(1.0), OF, [streams[i] for i in order])
    assert [one[i].tokens for i in order] == [chunk.tokens for chunk in other]


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.data())
def test_whatever_joins_forks_waits_and_leaves(data):
    """Random traffic. Every chunk is what its text would be continued by alone, at its stream and tick."""
    batch, waiting, ids, asked = batch_of(), [], {}, {}
    samples = [Sampling(1.0), Sampling(0.7, 0.9), Sampling()]
    for number in range(data.draw(st.integers(15, 60))):
        act = data.draw(
            st.sampled_from(["open", "extend", "extend", "fork", "close", "tick", "tick", "tick", "again"])
        )
        if act == "open" and len(ids) < 12:
            texts = [
                prompt_of(data.draw(st.integers(1, 14)), number + k)
                for k in range(data.draw(st.integers(1, 3)))
            ]
            for row, text in zip(batch.open(texts), texts, strict=True):
                ids[row.number] = (text, 0)
                waiting.append(row)
        elif act == "extend" and waiting:
            row = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            key, tick, sampling = (
                stream(number),
                data.draw(st.integers(0, 5)),
                data.draw(st.sampled_from(samples)),
            )
            asked[row.number] = (key, tick, sampling)
            batch.extend(row, key, sampling, OF, tick=tick, key=row.number)
        elif act == "fork" and waiting:
            rows = [
                waiting[data.draw(st.integers(0, len(waiting) - 1))]
                for _ in range(data.draw(st.integers(1, 3)))
            ]
            for row, copy in zip(rows, batch.fork(rows), strict=True):
                ids[copy.number] = ids[row.number]
                waiting.append(copy)
        elif (
            act == "again" and waiting
        ):  # the row of a beginning is gone, but a row that begins with it is there
            row = waiting[data.draw(st.integers(0, len(waiting) - 1))]
            text, written = ids[row.number]
            cut = data.draw(st.integers(0, written))
            (copy,) = batch.open([text[: len(text) - cut]], [written - cut], [row])
            ids[copy.number] = (text[: len(text) - cut], written - cut)
            waiting.append(copy)
        elif act == "close" and waiting:
            row = waiting.pop()
            batch.close([row])
            del ids[row.number]
        else:
            _check(batch.tick(), ids, asked, waiting)
    while batch.active:
        _check(batch.tick(), ids, asked, waiting)


def _check(chunks, ids, asked, waiting):
    for chunk in chunks:
        number = chunk.row.number
        (text, written), (key, tick, sampling) = ids[number], asked.pop(number)
        want, logps, end = alone(MODEL, text, key, sampling, OF, tick, written)
        assert (chunk.tokens, chunk.end, chunk.key, chunk.tick) == (want, end, number, tick + len(want))
        np.testing.assert_allclose(np.stack([chunk.logp, chunk.model_logp], 1), logps, atol=1e-4)
        ids[number] = ([*text, *want], written + len(want))
        assert chunk.row.length == len(ids[number][0]) and chunk.row.written == written + len(want)
        with torch.no_grad():
            out = MODEL(input_ids=torch.tensor([ids[number][0]]), output_hidden_states=True)
        torch.testing.assert_close(chunk.row.logits, out.logits[0, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(chunk.hidden, out.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)
        if not chunk.finished:
            waiting.append(chunk.row)


def test_chunks_are_the_text_cut_up():
    (whole,) = generate(batch_of(), [prompt_of(4)], Sampling(1.0), Stop(length=25), [7])
    batch, tokens, tick = batch_of(), [], 0
    (row,) = batch.open([prompt_of(4)])
    while not row.ended:
        batch.extend(row, 7, Sampling(1.0), Stop(chunk=4, length=25), tick=tick)
        (chunk,) = batch.drain()
        tokens, tick = tokens + chunk.tokens, chunk.tick
    assert tokens == whole.tokens and chunk.end == whole.end


def test_clones_are_equal_and_then_diverge():
    batch = batch_of()
    (row,) = batch.open([prompt_of(6)])
    clones = batch.fork([row] * 3)
    assert all(torch.equal(clone.logits, row.logits) for clone in clones)
    for i, clone in enumerate(clones):
        batch.extend(clone, stream(i), Sampling(1.5), Stop(length=12), key=i)
    assert len({tuple(chunk.tokens) for chunk in batch.drain()}) == 3
    batch.extend(row, stream(0), Sampling(1.5), Stop(length=12))  # the parent is as it was
    assert batch.drain()[0].tokens == alone(MODEL, prompt_of(6), stream(0), Sampling(1.5), Stop(length=12))[0]


def test_rows_move_to_the_front_and_storage_is_used_again():
    batch = batch_of(eos=())
    cache = batch.lm
    rows = batch.open([prompt_of(3, i) for i in range(16)])
    for i, row in enumerate(rows):
        batch.extend(row, i, Sampling(1.0), Stop(length=4 if i < 12 else 30), key=i)
    chunks = {chunk.key: chunk for chunk in batch.drain()}
    assert cache.moved == 4 and max(cache._slot[row.number] for row in rows[12:]) == 3
    for i in (0, 11, 12, 15):
        assert (
            chunks[i].tokens
            == alone(MODEL, prompt_of(3, i), i, Sampling(1.0), Stop(length=len(chunks[i].tokens)), eos=())[0]
        )
    held = cache.bytes()
    for _ in range(3):
        batch.close(rows)
        rows = batch.open([prompt_of(3, i) for i in range(16)])
    assert cache.bytes() == held


# --- given continuations --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6, 0.8), Sampling()])
def test_given_tokens_are_scored_as_they_would_have_been_drawn(sampling):
    batch = batch_of()
    rows = batch.open([prompt_of(n, n) for n in (4, 11, 2)])
    same = Sampling(1.2)
    for i, row in enumerate(batch.fork(rows)):
        batch.extend(row, stream(i), same, Stop(length=9), key=i)
    paths = [chunk.tokens for chunk in sorted(batch.drain(), key=lambda chunk: chunk.key)]
    paths = [paths[0], paths[1][:2], paths[2]]
    found = batch.score([*rows, rows[0], rows[0]], [*paths, paths[1], []], sampling)
    for n, path, (ours, theirs, _) in zip((4, 11, 2, 4), [*paths, paths[1]], found, strict=False):
        ids = prompt_of(n, n) + path
        with torch.no_grad():
            logits = MODEL(input_ids=torch.tensor([ids])).logits[0].double().numpy()
        at = range(n - 1, len(ids) - 1)
        with np.errstate(divide="ignore"):
            want = [np.log(plain_shares(logits[k], sampling)[ids[k + 1]]) for k in at]
        np.testing.assert_allclose(ours, want, atol=1e-4)
        np.testing.assert_allclose(
            theirs, [logits[k][ids[k + 1]] - np.log(np.exp(logits[k]).sum()) for k in at], atol=1e-4
        )
    assert len(found[-1][0]) == 0
    for i, row in enumerate(rows):  # and the rows stay as they are
        batch.extend(row, stream(i), same, Stop(length=9), key=i)
    assert sorted(batch.drain(), key=lambda c: c.key)[0].tokens == paths[0]


def test_tokens_that_are_read_can_be_kept():
    cache = RowCache(MODEL, 48)
    rows, _ = cache.open([prompt_of(3), prompt_of(8)])
    more = [prompt_of(5, 2), prompt_of(2, 3)]
    states = list(cache.read(rows, more, keep=True))
    after = cache.step(rows, torch.tensor([1, 2]))
    for i, (n, last) in enumerate(((3, 1), (8, 2))):
        ids = prompt_of(n) + more[i]
        with torch.no_grad():
            logits = MODEL(input_ids=torch.tensor([[*ids, last]])).logits[0]
        torch.testing.assert_close(states[i].logits, logits[n:-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.logits[i], logits[-1], atol=1e-4, rtol=1e-4)
        assert cache.length(rows[i]) == len(ids) + 1


# --- where chunks and texts end -------------------------------------------------------------------------


class Scripted:
    """A model that writes what it is told to: ``CachedLM`` without a network."""

    context = 1000

    def __init__(self, vocab, scripts):
        self.vocab, self.scripts, self.at = vocab, scripts, {}

    def _state(self, rows):
        logits = torch.full((len(rows), self.vocab), -50.0)
        for i, row in enumerate(rows):
            script, k = self.at[row]
            logits[i, self.scripts[script][k]] = 50.0 if k < len(self.scripts[script]) else 0.0
        from reason.backbones.cache import State

        return State(logits, torch.zeros(len(rows), 1))

    def open(self, texts):
        rows = [len(self.at) + i for i in range(len(texts))]
        for i, row in enumerate(rows):
            self.at[row] = (i, 0)
        return rows, self._state(rows)

    def step(self, rows, tokens):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            script, k = self.at[row]
            assert self.scripts[script][k] == token
            self.at[row] = (script, min(k + 1, len(self.scripts[script]) - 1))
        return self._state(rows)


def written(tokens, texts, stop, eos=None):
    """The chunks of scripts, each a list of ids."""
    batch = Batch(Scripted(tokens.size, texts), tokens, eos or {tokens.eos})
    chunks = [[] for _ in texts]
    for i, row in enumerate(batch.open([[0]] * len(texts))):
        batch.extend(row, i, Sampling(), stop, key=i)
    while batch.active:
        for chunk in batch.tick():
            chunks[chunk.key].append(chunk)
            if not chunk.finished:
                batch.extend(chunk.row, 0, Sampling(), stop, key=chunk.key)
    return chunks


def merged(*words: str) -> Tokens:
    """Bytes, and a token for each of the words."""
    tokens = Tokens.train([], "byte", 0)
    tokens.tokenizer.add_tokens(list(words))
    return Tokens(tokens.tokenizer, tokens.eos)


def test_a_separator_is_one_token_or_two_and_is_kept():
    tokens = merged(".\n\n")
    one, two = tokens.encode(["a=1.\n\nb"])[0][0], [*b"a=1.\n\nb"]
    assert len(one) == 5 and len(two) == 7
    eos = [tokens.eos]
    for chunks in written(tokens, [one + eos, two + eos], Stop(separators=("\n\n",))):
        assert [(c.text, c.end) for c in chunks] == [("a=1.\n\n", "separator"), ("b", "eos")]
    ids = [token for c in chunks for token in c.tokens]
    assert ids == two + eos


def test_a_text_without_separators_is_one_step():
    ((chunk,),) = written(BYTE, [[*b"x\ny\nz", 256]], Stop(separators=("\n\n",)))
    assert (chunk.text, chunk.end) == ("x\ny\nz", "eos") and chunk.tokens[-1] == 256


def test_used_up_separators_do_not_count_twice():
    ((a, b, c),) = written(BYTE, [[*b"1\n\n\n2\n\n3", 256]], Stop(separators=("\n\n",)))
    assert [a.text, b.text, c.text] == ["1\n\n", "\n2\n\n", "3"]


def test_every_end_of_the_model_ends_a_text():
    for eos in (256, 65):
        ((chunk,),) = written(BYTE, [[66, 67, eos]], Stop(), {256, 65})
        assert (chunk.text, chunk.end, chunk.tokens) == ("BC", "eos", [66, 67, eos]) and chunk.finished


def test_stop_strings_are_found_across_tokens_and_chunks():
    stop = Stop(separators=("\n\n",), strings=("\n\nProblem:", "END"), chunk=40)
    ((a, b),) = written(BYTE, [[*b"so 4.\n\nProblem: next", 256]], stop)
    assert (a.end, b.end, b.text) == ("separator", "stop", "Problem:")
    tokens = merged("N", "DX")
    ((chunk,),) = written(tokens, [[*b"the E", *tokens.encode(["NDX"])[0][0], 256]], stop)
    assert (chunk.text, chunk.end) == ("the ENDX", "stop")  # the token is kept whole


def test_only_a_closed_box_ends_a_text():
    stop = Stop(boxed=True, separators=("\n",))
    ((a, b),) = written(BYTE, [[*rb"so \boxed{\frac{1}{2}", 10, *rb"} and {}", 256]], stop)
    assert (a.text, a.end) == ("so \\boxed{\\frac{1}{2}\n", "separator") and (b.text, b.end) == ("}", "boxed")
    ((a,),) = written(BYTE, [[*rb"no \boxed{12 here {} and \boxed", 256]], stop)
    assert a.end == "eos"
    assert boxed(rb"\boxed{ \boxed{5}") and not boxed(rb"\boxed 5}") and not boxed(rb"\boxed{\{5}")


def test_half_characters_wait_for_their_other_half():
    word = "é🙂"
    for size in (1, 2, 3, 4):
        (chunks,) = written(BYTE, [[*word.encode(), 256]], Stop(chunk=size))
        assert "".join(c.text for c in chunks) == word and "\ufffd" not in "".join(c.text for c in chunks)
    ((chunk,),) = written(BYTE, [[*"é".encode()[:1], 256]], Stop())
    assert chunk.text == "\ufffd"  # it never came


def test_caps_are_never_exceeded():
    for stop, sizes, ends in (
        (Stop(chunk=4), [4, 4, 3], ["cap", "cap", "eos"]),
        (Stop(length=6), [6], ["length"]),
        (Stop(chunk=4, length=6), [4, 2], ["cap", "length"]),
        (Stop(chunk=4, length=4), [4], ["length"]),
    ):
        (chunks,) = written(BYTE, [[*b"0123456789", 256]], stop)
        assert ([len(c.tokens) for c in chunks], [c.end for c in chunks]) == (sizes, ends)


def test_the_context_is_a_cap():
    chunks = generate(
        batch_of(eos=()), [prompt_of(40), prompt_of(48), prompt_of(3)][::2], Sampling(1.0), Stop(), [1, 2]
    )
    assert [len(c.tokens) for c in chunks] == [8, 45] and {c.end for c in chunks} == {"length"}
    assert chunks[0].tokens == alone(MODEL, prompt_of(40), 1, Sampling(1.0), eos=())[0]
    batch = batch_of()
    (full,) = batch.open([prompt_of(48)])
    with pytest.raises(ValueError, match="over"):
        batch.extend(full, 1, Sampling(1.0), Stop())
    for text in ([], prompt_of(49)):
        with pytest.raises(DataError, match="from 1 to 48"):
            batch.open([text])


def test_a_row_is_continued_once_at_a_time():
    batch = batch_of()
    (row,) = batch.open([prompt_of(3)])
    batch.extend(row, 1, Sampling(1.0), Stop(length=3))
    for act in (
        lambda: batch.extend(row, 2, Sampling(1.0), Stop(length=3)), lambda: batch.close([row]),
        lambda: batch.score([row], [[1]], Sampling(1.0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="being continued"):
            act()


def test_a_fork_in_the_middle_of_a_chunk_is_the_text_before_it():
    batch, ask = batch_of(eos=()), (stream(2), Sampling(1.0), Stop(length=9))
    (row,) = batch.open([prompt_of(5)])
    batch.extend(row, *ask, key="first")
    for _ in range(4):
        batch.tick()
    (copy,) = batch.fork([row])
    batch.extend(copy, *ask, key="copy")
    chunks = {chunk.key: chunk for chunk in batch.drain()}
    assert chunks["first"].tokens == chunks["copy"].tokens and chunks["first"].text == chunks["copy"].text


# --- models that are not what they should be ------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba", "bloom", "jamba"])
def test_models_that_keep_something_else_are_refused(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {
        "mamba": {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "bloom": {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        "jamba": {
            "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 16, "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 4, "use_mamba_kernels": False,
            "attn_layer_offset": 1, "attn_layer_period": 2,
        },
    }[family]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys)).eval()
        with pytest.raises(ConfigError, match="cannot be decoded with a cache of rows"):
            RowCache(model, 32)
