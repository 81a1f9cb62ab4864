"""A language model behind a server: the same texts as in this process, and a clear end whatever the server does."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from scripted_server import Scripted, TableLM, letters, seed_of

from reason.backbones.connection import Address
from reason.backbones.generation import Batch, Sampling, Stop, stream
from reason.backbones.server import Server
from reason.backbones.tokens import Tokens
from reason.datasets.problems import Problem
from reason.errors import ConfigError, DataError, RunError
from reason.methods.particle import searches, smc
from reason.methods.particle.driver import Driver, Task
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws

KINDS = ("ids", "kept", "told", "cut")
STOP = Stop(separators=(",", ";"), chunk=3, length=9, strings=("bb",))
SAMPLING = Sampling(0.9)
PROB = Potential("prob", clip=0.0)
HOPE = {"context": 64, "retries": 3, "pause": 0.01, "timeout": 20.0}


class Known(Server):
    """Tells the scripted server which uniform numbers its seeds stand for: those of a batch in this process."""

    scripted: Scripted

    def extend(self, row, stream, sampling, stop, *, tick=0, key=None):
        self.scripted.seeds[seed_of(stream, tick)] = (stream, tick)
        super().extend(row, stream, sampling, stop, tick=tick, key=key)


@contextmanager
def server(scripted: Scripted | None = None, tokens: Tokens | None = None, **options) -> Iterator[Known]:
    with scripted or Scripted() as at:
        address = Address(at.url, **(HOPE | options))
        with Known(address, tokens or letters()) as found:
            found.scripted = at
            at.asked.clear()
            at.drawn = at.most = at.answered = 0
            found.connection.retried = 0
            yield found


def reward(prefixes) -> np.ndarray:
    said = [f"{prefix.problem.id} {prefix.node.all_tokens}" for prefix in prefixes]
    return np.array([0.1 + 0.8 * int(hashlib.sha256(s.encode()).hexdigest()[:8], 16) / 2**32 for s in said])


def everything(root, i):
    """Forks, waits, resamples, and continues what was given up."""
    config = smc.Filter(5, PROB, threshold=1.0)
    population = yield from smc.sweep(root, config, Draws(1, f"p{i}"))
    gibbs = yield from smc.gibbs(root, config, Draws(4, f"p{i}"), 3)
    whole = yield from searches.samples(root, 3, Draws(2, f"p{i}"))
    beams = yield from searches.beam(root, 4, 2, Draws(3, f"p{i}"))
    best = yield from searches.greedy(root)
    nodes = [*population.nodes, *(n for p in gibbs for n in p.nodes), *whole, *beams, best]
    rounds = [
        (r.ess, None if r.ancestors is None else r.ancestors.tolist())
        for p in (population, *gibbs)
        for r in p.rounds
    ]
    return [(n.all_tokens, n.solution, n.finish, n.step) for n in nodes], rounds, [n.log_p for n in nodes]  # fmt: skip


def tasks(problems=(0, 1, 2), algorithm=everything, **options) -> list[Task]:
    return [
        Task(Problem(f"p{i}", ""), [1, 2] * (i + 1), lambda root, i=i: algorithm(root, i), **options)
        for i in problems
    ]


def local(stop=STOP, problems=(0, 1, 2)) -> dict:
    batch = Batch(TableLM(), letters(), [0])
    return {o.task.problem.id: o for o in Driver(batch, SAMPLING, stop, reward, steps=6).run(tasks(problems))}


# --- the same as in this process ------------------------------------------------------------------------


@pytest.mark.parametrize("known", [None, set()], ids=["takes all", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_and_a_cache_give_the_same_trace(kind, known):
    """Spec 14.19: texts, ends, ESS and ancestors of every round, whatever the server tells."""
    want = local()
    with server(Scripted(kind, known)) as one:
        assert one.abilities.ids == (kind == "ids" and known is None)
        assert one.abilities.stops == (kind != "cut") and one.abilities.seeded
        got = {o.task.problem.id: o for o in Driver(one, SAMPLING, STOP, reward, steps=6).run(tasks())}
        assert set(got) == set(want)
        for name, outcome in got.items():
            assert outcome.result[:2] == want[name].result[:2]
            assert outcome.ledger.rounds == want[name].ledger.rounds
            assert outcome.ledger.judged == want[name].ledger.judged
            if one.abilities.logprobs:
                np.testing.assert_allclose(outcome.result[2], want[name].result[2], rtol=1e-9)
            else:
                assert np.isnan(outcome.result[2]).all()
        assert sum(o.ledger.drawn for o in got.values()) == one.drawn == one.scripted.drawn
        assert one.requests == one.scripted.answered and one.active == 0


def test_the_trace_has_all_kinds_of_ends():
    """Or the test above would say little."""
    ends = {end for o in local().values() for _, _, end, _ in o.result[0]}
    assert ends == {"eos", "stop", "length", "steps"}


@pytest.mark.parametrize("kind", ["ids", "told", "kept"])
def test_what_ends_at_a_separator_costs_no_more_than_it_does_here(kind):
    stop = Stop(separators=(",", ";"), chunk=3, length=9)
    with server(Scripted(kind)) as one:
        found = list(Driver(one, SAMPLING, stop, reward, steps=6).run(tasks()))
        want = local(stop)
        assert [o.ledger.drawn for o in sorted(found, key=lambda o: o.task.problem.id)] == [
            want[f"p{i}"].ledger.drawn for i in range(3)
        ]


def chunk(one: Server, prompt=(1, 2), sampling=SAMPLING, stop=STOP, key=7):
    (row,) = one.open([list(prompt)])
    one.extend(row, key, sampling, stop)
    while one.active:
        for found in one.tick():
            return found


def test_each_text_has_a_request_and_a_seed_of_its_own():
    with server() as one:
        (row,) = one.open([[1, 2]])
        for i, copy in enumerate(one.fork([row] * 20)):
            one.extend(copy, stream("x", i), SAMPLING, STOP, key=i)
        found = {}
        while one.active:
            found |= {c.key: c for c in one.tick()}
        assert len(found) == 20 and len({tuple(c.tokens) for c in found.values()}) > 5
        assert len({body["seed"] for body in one.scripted.asked}) == 20
        assert all("n" not in body and 0 <= body["seed"] < 2**31 for body in one.scripted.asked)


def test_no_more_is_asked_at_once_than_allowed():
    scripted = Scripted()
    with server(scripted, concurrency=3) as one:
        scripted.pause = 0.1
        for i, row in enumerate(one.fork(one.open([[1, 2]]) * 12)):
            one.extend(row, i, SAMPLING, STOP)
        while one.active:
            one.tick()
        assert scripted.most == 3


def test_nothing_is_left_out_of_the_distribution_by_settings_of_the_server():
    with server() as one:
        chunk(one)
        (body,) = one.scripted.asked
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (
            1.0,
            -1,
            0.0,
            1.0,
        )
        assert '"do_sample": true' in body["generation_config"]


def test_a_box_that_closes_ends_a_text():
    scripted = Scripted("kept")
    byte = Tokens.train([], "byte", 0)
    with server(scripted, byte) as one:
        scripted.write = lambda ids, body: ("so \\boxed{4} and on\n\n", "stop")
        found = chunk(one, b"2+2", stop=Stop(("\n\n",), boxed=True))
        assert (found.text, found.end) == ("so \\boxed{4}", "boxed")


def test_half_characters_and_half_surrogates_are_never_sent_back():
    scripted = Scripted("kept")
    with server(scripted, Tokens.train([], "byte", 0)) as one:
        scripted.write = lambda ids, body: ("na\u00efve \ufffd", "length")
        found = chunk(one, b"x", stop=Stop(chunk=40))
        assert found.text == "na\u00efve " and not found.finished
        assert bytes(found.tokens).decode() == found.text
        scripted.write = lambda ids, body: ("a\ud83d", "stop")
        one.extend(found.row, 1, SAMPLING, Stop())
        while one.active:
            for last in one.tick():
                assert (last.text, last.end, last.tokens[-1]) == ("a\ufffd", "eos", 256)
        assert scripted.asked[-1]["prompt"] == "xna\u00efve "


def test_a_text_that_is_longer_in_our_tokens_than_in_its_own_ends_in_time():
    scripted = Scripted("kept")
    with server(scripted, Tokens.train([], "byte", 0)) as one:
        scripted.write = lambda ids, body: ("\u00ef" * body["max_tokens"], "length")
        first = chunk(one, b"x", stop=Stop(chunk=3, length=8))
        assert (len(first.tokens), first.drawn, first.end) == (6, 3, "cap")
        one.extend(first.row, 1, SAMPLING, Stop(chunk=3, length=8))
        while one.active:
            for last in one.tick():
                assert (len(last.tokens), last.drawn, last.end) == (4, 2, "length")


def test_a_server_that_writes_nothing_ends_the_text():
    scripted = Scripted("kept")
    with server(scripted) as one:
        scripted.write = lambda ids, body: ("", "length")
        found = chunk(one)
        assert found.finished and found.tokens == [0]


# --- what it cannot do ----------------------------------------------------------------------------------


def test_given_texts_are_not_scored_and_states_not_told():
    with server() as one:
        rows = one.open([[1, 2]])
        with pytest.raises(ConfigError, match="ancestor sampling"):
            one.score(rows, [[1]], SAMPLING)
        assert chunk(one).hidden is None
        config = smc.Filter(3, PROB, "multinomial", 1.0)

        def gibbs(root, i):
            return (yield from smc.gibbs(root, config, Draws(0, "p"), 2, ancestor_sampling=True))

        with pytest.raises(ConfigError, match="ancestor sampling"):
            list(Driver(one, SAMPLING, STOP, reward).run(tasks([0], gibbs)))


def test_self_certainty_is_refused_where_probabilities_are_not_told():
    def sweep(root, i):
        return (yield from smc.sweep(root, smc.Filter(3, Potential("self_certainty")), Draws(0, "p")))

    with server(Scripted("told")) as one:
        (outcome,) = Driver(one, SAMPLING, STOP, reward).run(tasks([0], sweep))
        assert outcome.result.status == "finished"
    with server(Scripted("kept")) as one, pytest.raises(ConfigError, match="self_certainty"):
        list(Driver(one, SAMPLING, STOP, reward).run(tasks([0], sweep)))


def test_top_k_is_refused_by_a_server_without_it():
    with server(Scripted("kept", set())) as one, pytest.raises(ConfigError, match="top_k"):
        chunk(one, sampling=Sampling(0.9, top_k=3))


def test_a_text_longer_than_the_context_is_refused_before_it_is_sent():
    with server() as one:
        with pytest.raises(DataError, match="65 tokens"):
            one.open([[1] * 65])
        with pytest.raises(DataError, match="'p0' has 64 tokens"):
            list(
                Driver(one, SAMPLING, STOP, reward).run([Task(Problem("p0", ""), [1] * 64, lambda root: ())])
            )  # type: ignore[arg-type]
        assert not one.scripted.asked


def test_a_text_ends_where_the_server_counts_it_full():
    """Its tokens may be more than ours, by one that it puts in front."""
    scripted = Scripted("kept", length=12)
    with server(scripted, context=0) as one:
        complete = scripted.complete

        def longer(body):
            found = complete(body)
            found["usage"]["prompt_tokens"] += 2
            assert found["usage"]["prompt_tokens"] + body["max_tokens"] <= 14
            return found

        scripted.complete = longer
        row, ends = one.open([[1, 2]])[0], []
        while not row.ended:
            one.extend(row, 1, SAMPLING, Stop(separators=("a", "b", ",", ";", "{", "}")), tick=len(ends))
            while one.active:
                ends += [c.end for c in one.tick()]
        assert ends == ["separator"] * 7 + ["length"] and len(row.ids) == 10


def test_an_end_that_only_the_server_knows_is_one():
    scripted = Scripted()
    with server(scripted) as one:
        complete = scripted.complete

        def ended(body):
            found = complete(body)
            choice = found["choices"][0]
            choice |= {"token_ids": [1, 5], "text": "a", "finish_reason": "stop", "stop_reason": 5}
            return found

        scripted.complete = ended
        found = chunk(one, stop=Stop())
        assert (found.end, found.text, found.tokens) == ("eos", "a", [1, 5])


def test_a_server_that_falls_over_stop_strings_is_asked_for_none():
    def fragile(handler, body, scripted=Scripted("kept")):
        return handler.say(500, b"") if "stop" in body else handler.say(200, scripted.complete(body))

    scripted = Scripted("kept")
    scripted.faults.extend([fragile] * 10_000)
    with server(scripted) as one:
        assert not one.abilities.stops and any("cannot be asked to stop" in note for note in one.notes)
        assert chunk(one).tokens


# --- who it is ------------------------------------------------------------------------------------------


def test_a_wrong_model_is_told_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'llama-3-8b'"), server(
        Scripted(models=("llama-3-8b", "qwen")), model="llama3-8b"
    ):  # fmt: skip
        pass
    with pytest.raises(ConfigError, match=r"has 2 models; say which.\nIt has: llama-3-8b, qwen"), server(
        Scripted(models=("llama-3-8b", "qwen"))
    ):  # fmt: skip
        pass


def test_another_tokenizer_is_refused():
    with (
        pytest.raises(ConfigError, match="tokenizer is not that of the server"),
        server(tokens=Tokens.train([], "byte", 0)),
    ):
        pass


def test_the_context_has_to_be_known():
    with pytest.raises(ConfigError, match="Set the context"), server(Scripted(length=None), context=0):
        pass
    with server(Scripted(length=20), context=64) as one:
        assert one.context == 20


def test_a_server_that_does_not_sample_is_noted():
    scripted = Scripted("kept")
    scripted.write = lambda ids, body: ("ab", "length")
    with server(scripted) as one:
        assert any("may not sample" in note for note in one.notes)
    with server() as one:
        assert one.notes == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host", "not the address"), ("host:8000", "not the address"), ("file:///etc/passwd", "not the address"),
        ("http://", "not the address"), ("http://h:99999", "cannot be read"), ("http://me:secret@host", "password"),
        ("http://host/v1?key=secret", "not the address"), ("", "not the address"),
    ],
)  # fmt: skip
def test_only_addresses_of_servers(url, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Address(url)
    assert "secret@" not in str(caught.value)


def test_keys_do_not_cross_the_network_in_the_open(monkeypatch):
    for url in ("http://example.org", "http://10.0.0.1:8000", "http://localhost.example.org"):
        with pytest.raises(ConfigError, match="unencrypted"):
            Address(url, key="KEY")
    for url in ("https://example.org", "http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1"):
        assert Address(url, key="KEY").base.endswith("/v1")
    monkeypatch.delenv("KEY", raising=False)
    with pytest.raises(ConfigError, match="no KEY"):
        Address("https://example.org", key="KEY").secret()
    monkeypatch.setenv("KEY", "sk 123\n4")
    with pytest.raises(ConfigError, match="no key has") as caught:
        Address("https://example.org", key="KEY").secret()
    assert "123" not in str(caught.value)


def test_the_key_is_sent_and_never_shown(monkeypatch, capfd):
    monkeypatch.setenv("KEY", "sk-very-secret")
    scripted = Scripted()
    with server(scripted, key="KEY") as one:
        assert scripted.headers == ["Bearer sk-very-secret"]
        shown = [repr(one.connection.address), str(one.notes)]

        def refuse(handler, body):
            handler.say(401, {"error": {"message": "Incorrect key sk-very-secret"}})

        scripted.faults.append(refuse)
        with pytest.raises(RunError, match=r"401 Incorrect key \*\*\*") as caught:
            chunk(one)
        assert caught.value.hint == "Check the key in KEY."
        shown += [str(caught.value), repr(caught.value.__cause__), *capfd.readouterr()]
    assert not any("secret" in text for text in shown)


# --- faults ---------------------------------------------------------------------------------------------

FAULTS = {
    "500": lambda handler, body: handler.say(500, b"<html>oops</html>"),
    "429": lambda handler, body: handler.say(429, {"error": "slow down"}, [("Retry-After", "0.02")]),
    "503 with a date": lambda handler, body: handler.say(
        503, b"", [("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT")]
    ),
    "nothing": lambda handler, body: handler.drop(),
    "half": lambda handler, body: handler.drop(b'{"choices": [{"text": "a'),
    "garbage": lambda handler, body: handler.say(200, b"\xff\xfe{not json"),
    "no choices": lambda handler, body: handler.say(200, {"choices": []}),
    "no text": lambda handler, body: handler.say(200, {"choices": [{"index": 0, "finish_reason": "stop"}]}),
    "not an object": lambda handler, body: handler.say(200, [1, 2]),
    "aborted": lambda handler, body: handler.say(
        200, {"choices": [{"text": "ab", "finish_reason": "abort"}], "usage": {"completion_tokens": 2}}
    ),
    "slow": lambda handler, body: time.sleep(1.5) or handler.say(200, {"choices": []}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_asked_again_and_counted_once(fault):
    want = local(problems=[1])["p1"]
    with server(timeout=1.0 if fault == "slow" else 20.0, retries=6) as one:
        one.scripted.faults.extend([FAULTS[fault]] * 3)
        (got,) = Driver(one, SAMPLING, STOP, reward, steps=6).run(tasks([1]))
        assert got.result[:2] == want.result[:2]
        assert one.connection.retried == 3 or (fault == "slow" and one.connection.retried > 3)
        assert got.ledger.drawn == one.drawn
        assert one.requests == len(one.scripted.asked) - one.connection.retried


def test_the_server_says_how_long_to_wait():
    with server() as one:
        one.scripted.faults.append(
            lambda handler, body: handler.say(429, {"error": "slow down"}, [("Retry-After", "0.5")])
        )
        begun = time.monotonic()
        chunk(one)
        assert 0.5 <= time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", "failed 3 times; the last time it said 500 <html>oops</html>"), ("nothing", "the connection broke"),
        ("garbage", "not JSON"), ("no choices", "no choices"), ("aborted", "'abort'"), ("slow", "no answer in 0.5 s"),
    ],
)  # fmt: skip
def test_what_does_not_pass_ends_in_words(fault, says):
    with server(retries=2, timeout=0.5 if fault == "slow" else 20.0) as one:
        one.scripted.faults.extend([FAULTS[fault]] * 100)
        begun = time.monotonic()
        with pytest.raises(RunError, match=says):
            chunk(one)
        assert time.monotonic() - begun < 20
        assert one.drawn == 0 and one.active == 0
        one.scripted.faults.clear()
        assert chunk(one).tokens  # a later request may find it well


def test_a_request_that_is_wrong_is_not_asked_again():
    with server() as one:
        one.scripted.faults.append(lambda handler, body: handler.say(400, {"error": {"message": "too long"}}))
        with pytest.raises(RunError, match="refuses: 400 too long"):
            chunk(one)
        assert len(one.scripted.asked) == 1


def test_a_server_that_goes_down_leaves_what_was_finished():
    scripted = Scripted()
    with server(scripted, retries=1) as one:
        driver = Driver(one, SAMPLING, STOP, reward, steps=6, width=10)
        finished, begun = [], time.monotonic()
        with pytest.raises(RunError, match="503 shutting down"):
            for outcome in driver.run(tasks(range(30), sweep)):
                finished.append(outcome)
                scripted.down = len(finished) >= 3
        assert time.monotonic() - begun < 20
        statuses = [o.result.status for o in finished]
        assert statuses[:3] == ["finished"] * 3 and len(finished) < 30
        failed = [o for o in finished if o.result.status != "finished"]
        assert failed and all(o.result.status.startswith("failed: The server at") for o in failed)
        assert len({o.task.problem.id for o in finished}) == len(finished)
        assert one.active == 0


def sweep(root, i):
    return (yield from smc.sweep(root, smc.Filter(5, PROB), Draws(1, f"p{i}")))


def test_nobody_listens():
    with Scripted() as scripted:
        url = scripted.url
    with pytest.raises(RunError, match="could not be reached"):
        Server(Address(url, retries=1, pause=0.01), letters())


def test_a_deadline_does_not_wait_for_a_slow_server():
    scripted = Scripted()
    with server(scripted) as one:
        scripted.pause = 10.0
        until = time.monotonic() + 0.4
        driver = Driver(
            one, SAMPLING, STOP, reward, halted=lambda: "out of time" if time.monotonic() > until else ""
        )
        outcomes = list(driver.run(tasks([0, 1], sweep)))
        assert time.monotonic() < until + 5
        assert [o.result.status for o in outcomes] == ["out of time"] * 2
        assert one.active == 0


def test_a_budget_ends_a_problem_and_no_other():
    several = [*tasks([0], sweep, budget=8), *tasks([1, 2], sweep)]
    with server() as one:
        found = {o.task.problem.id: o for o in Driver(one, SAMPLING, STOP, reward).run(several)}
    assert found["p0"].result.status == "out of tokens"
    assert 8 <= found["p0"].ledger.drawn < 8 + 5 * 3  # a chunk of each particle at most
    assert found["p1"].result.status == found["p2"].result.status == "finished"
