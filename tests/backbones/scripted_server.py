"""A language model that is a table, in this process and behind a server on loopback that can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from reason.backbones.cache import State
from reason.backbones.generation import Sampling, draw, random_bits, uniforms
from reason.backbones.tokens import Tokens

LETTERS = ("<end>", "a", "b", ",", ";", "{", "}")  # <end> ends a text


@lru_cache
def letters() -> Tokens:
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<end>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return Tokens(tokenizer, 0)


def law(ids) -> torch.Tensor:
    """(V,) logits after a text: a function of all of it."""
    return _law(tuple(int(i) for i in ids))


@lru_cache(100_000)
def _law(ids) -> torch.Tensor:
    digest = hashlib.sha256(repr(ids).encode()).digest()
    logits = np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=len(LETTERS))
    return torch.tensor(logits, dtype=torch.float32) - torch.tensor([1.0, 0, 0, 0, 0, 2, 2])


class TableLM:
    """The table as a ``CachedLM``."""

    context = 64

    def __init__(self):
        self.rows: dict[int, list[int]] = {}
        self._next = 0

    def _state(self, rows) -> State:
        return State(torch.stack([law(self.rows[r]) for r in rows]), torch.zeros(len(rows), 1))

    def _new(self, ids) -> int:
        self._next += 1
        self.rows[self._next] = list(ids)
        return self._next

    def open(self, texts):
        rows = [self._new(text) for text in texts]
        return rows, self._state(rows)

    def step(self, rows, tokens):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            self.rows[row].append(token)
        return self._state(rows)

    def read(self, rows, texts, keep):
        raise NotImplementedError

    def fork(self, rows, lengths=None):
        return [self._new(self.rows[row]) for row in rows]

    def close(self, rows):
        for row in rows:
            del self.rows[row]


class Scripted:
    """The table as a server.

    kind: how much it tells. "ids": token ids, like vLLM. "kept": stop strings stay in its texts. "told": it cuts them off
    and says which. "cut": it cuts them off and says nothing. known: parameters beyond OpenAI's that it
    does not refuse; None = all. faults: what it does to the next requests instead of answering. seeds: which uniform
    numbers a seed stands for.
    """

    def __init__(self, kind="ids", known: set[str] | None = None, models=("table",), length: int | None = 64):
        self.kind, self.known, self.models, self.length = kind, known, models, length
        self.faults: deque = deque()
        self.down = False
        self.seeds: dict[int, tuple[int, int]] = {}
        self.asked: list[dict] = []
        self.answered = self.at_once = self.most = self.drawn = 0
        self.headers: list[str] = []
        self.pause = 0.0
        self.write: Callable[[list[int], dict], tuple[str, str]] | None = None
        self.gone = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer is one packet

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.headers.append(self.headers.get("Authorization", ""))
                one = {} if outer.length is None else {"max_model_len": outer.length}
                self.say(200, {"data": [{"id": name, **one} for name in outer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                try:
                    outer.serve(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer._lock:
                        outer.at_once -= 1

            def say(self, code, found, headers=()):
                sent = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(sent)))
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

            def drop(self, begun=b""):
                """Break the connection off, half-way through an answer."""
                if begun:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(begun)
                    self.wfile.flush()
                self.close_connection = True

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gone.set()
        self.http.shutdown()
        self.http.server_close()

    def serve(self, handler, body):
        with self._lock:
            self.asked.append(body)
            fault = self.faults.popleft() if self.faults else None
        if self.pause:
            time.sleep(self.pause)
        if self.down:
            return handler.say(503, {"error": {"message": "shutting down"}})
        if fault is not None:
            return fault(handler, body)
        openai = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"}
        if self.known is not None and (extra := set(body) - openai - self.known):
            return handler.say(422, {"detail": f"Unexpected fields: {extra}"})
        if isinstance(body["prompt"], list) and self.kind != "ids":
            return handler.say(400, {"error": {"message": "prompt must be a string."}})
        return handler.say(200, self.complete(body))

    def complete(self, body) -> dict:
        tokens = letters()
        prompt = body["prompt"]
        ids = list(prompt) if isinstance(prompt, list) else tokens.encode([prompt])[0][0]
        stream, tick = self.seeds.get(body["seed"], (body["seed"], 0))
        sampling = Sampling(body["temperature"], body["top_p"])
        drawn, logps, text, finish, stopped = [], [], "", "length", None
        for k in range(body["max_tokens"]):
            u = uniforms(np.array([stream], np.uint64), np.array([tick + k]))
            one = draw(law([*ids, *drawn])[None], sampling, u)
            drawn.append(int(one.tokens[0]))
            logps.append(float(one.logp[0]))
            if drawn[-1] == 0:
                finish = "stop"
                break
            text += LETTERS[drawn[-1]]
            stopped = next((s for s in body.get("stop", ()) if s in text), None)
            if stopped:
                finish = "stop"
                break
        keeps = self.kind == "kept" or (self.kind == "ids" and body.get("include_stop_str_in_output"))
        if stopped and not keeps:
            text = text[: text.index(stopped)]
        choice = {"index": 0, "text": text, "finish_reason": finish}
        if self.kind in ("ids", "told"):
            choice["stop_reason"] = stopped
        if self.kind == "ids" and body.get("return_token_ids"):
            choice["token_ids"] = drawn
        if "logprobs" in body and self.kind != "kept":
            choice["logprobs"] = {"tokens": [LETTERS[i] for i in drawn], "token_logprobs": logps}
        if self.write is not None:
            choice["text"], choice["finish_reason"] = self.write(ids, body)
        with self._lock:
            self.answered += 1
            self.drawn += len(drawn)
            if choice["finish_reason"] == "length":
                drawn += [0] * (body["max_tokens"] - len(drawn))
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(drawn)}
        return {"object": "text_completion", "choices": [choice], "usage": usage}


def seed_of(stream: int, tick: int) -> int:
    return int(random_bits(np.array([stream], np.uint64), np.array([tick]))[0] >> np.uint64(33))
