"""Sampling from a language model that a server has: ``generation.Batch`` over ``/v1/completions``.

A row is a text; the server knows none, and reads it with every request (what it keeps of prefixes is its own affair). A
chunk is a request. Each has a seed of its own, a function of stream and tick, so equal prefixes are asked for
one by one: with ``n`` answers to a request their seeds would depend on each other.

Servers differ in what they can be asked and in what they tell, and not all say so. What matters is tried when the server is
opened (``Abilities``):

- The server takes and gives token ids: these are the truth, and everything is as in ``Batch``. Otherwise texts go to and
  fro, and the ids are those of our tokenizer for what came back.
- It leaves the separator at which it stopped in the text, or says which one it was. Otherwise the end of a text could not
  be told from the end of a chunk: then it is asked to stop nowhere, and what is behind a separator is thrown away.
- It leaves out tokens as its own settings say (llama.cpp: top-k 40, min-p 0.05), so it is told to leave out none.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reason.backbones.cache import Ids
from reason.backbones.connection import Address, Connection, Garbled, Refused
from reason.backbones.generation import Chunk, End, Ends, Given, Sampling, Stop, random_bits, spelt
from reason.backbones.tokens import Tokens
from reason.errors import ConfigError, DataError, RunError, unknown

MOMENT = 0.1  # seconds that a tick waits
HALF = "\ufffd"  # what stands for half a character


@dataclass(frozen=True)
class Abilities:
    """What a server was found to do.

    taken: names of further parameters that it did not refuse. ids: token ids go to and fro. kept: the stop string
    stays in the text; told: it says which one it was. logprobs: it tells how probable its tokens were. seeded: equal seeds
    give equal texts, at least one after the other.
    """

    taken: frozenset[str] = frozenset()
    ids: bool = False
    kept: bool = False
    told: bool = False
    logprobs: bool = False
    seeded: bool = False

    @property
    def stops(self) -> bool:
        """Whether it can be asked to stop somewhere."""
        return self.kept or self.told


@dataclass(eq=False)
class _Text:
    """A row."""

    ids: list[int]
    prompt: str  # as it is sent; "" where ids are sent
    size: int  # tokens as the server counts them
    written: int = 0  # tokens behind the prompt
    text: bytearray = field(default_factory=bytearray)  # of these
    ended: bool = False
    busy: bool = False

    def copy(self) -> _Text:
        return replace(self, ids=list(self.ids), text=bytearray(self.text))


@dataclass(frozen=True)
class _Asked:
    """A chunk that the server is at."""

    row: _Text
    key: Any
    tick: int
    ends: Ends
    limit: int


class Server:
    """``generation.Writer`` over a server that speaks the completions of OpenAI's API.

    Args:
        address: of the server.
        tokens: the tokenizer of its model.
        eos: all tokens that end a text, where they are known.

    Attributes:
        abilities: what it was found to do. notes: what people should know of it. drawn, read: tokens that it says it
            has drawn and read, for answers that arrived. requests: answers. ``connection.retried``: what was asked again.

    Raises:
        ConfigError: no such model, a tokenizer that is not the model's, or a server that always writes the same.
        RunError: a server that does not answer.
    """

    stepwise = False

    def __init__(self, address: Address, tokens: Tokens, eos: Collection[int] = ()):
        self.tokens, self.eos = tokens, frozenset(eos) | {tokens.eos}
        self.connection = Connection(address)
        self.drawn = self.read = self.requests = 0
        self.notes: list[str] = []
        self._asked: dict[Future[Any], _Asked] = {}
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._failure: RunError | None = None
        self._ends: dict[Stop, Ends] = {}
        self.abilities = Abilities()
        try:
            self.model, self._context = self._named()
            self.abilities = self._tried()
        except BaseException:
            self.shut()
            raise
        self._note()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()

    def shut(self) -> None:
        """Give up what is asked for, and close the connections."""
        self.connection.end()

    @property
    def context(self) -> int:
        """Tokens that a text can have."""
        return self._context

    @property
    def active(self) -> int:
        """Texts that are being continued."""
        return len(self._asked)

    # --- rows -------------------------------------------------------------------------------------------

    def open(self, texts: Sequence[Ids], written: Sequence[int] | None = None) -> list[_Text]:
        """As ``Batch.open``. Nothing is read before a text is continued."""
        rows = []
        for i, text in enumerate(texts):
            ids, count = [int(token) for token in text], 0 if written is None else written[i]
            if not 0 < len(ids) <= self.context:
                raise DataError(
                    f"A text has {len(ids):,} tokens; this model reads from 1 to {self.context:,}.",
                    "Shorten the text, or use a model with a longer context.",
                )
            cut = len(ids) - count
            rows.append(
                _Text(ids, self._prompt(ids[:cut]), len(ids), count, bytearray(self._spelt(ids, cut)))
            )
        return rows

    def fork(self, rows: Sequence[_Text]) -> list[_Text]:
        """Copies of rows that are not being continued."""
        return [row.copy() for row in rows]

    def close(self, rows: Iterable[_Text]) -> None:
        """Forget rows: nothing is kept of them anyway."""

    # --- continuing -------------------------------------------------------------------------------------

    def extend(
        self, row: _Text, stream: int, sampling: Sampling, stop: Stop, *, tick: int = 0, key: Any = None
    ) -> None:
        """Ask for a chunk.

        Raises:
            ConfigError: top-k, of a server that has no such parameter.
            ValueError: a text that is over, or has no room for a token.
        """
        room = self.context - row.size
        if stop.length is not None:
            room = min(room, stop.length - row.written)
        if row.ended or row.busy or room < 1:
            raise ValueError("The text is being continued." if row.busy else "The text is over.")
        if sampling.top_k and not self.abilities.taken & {"top_k", "generation_config"}:
            raise ConfigError("This server has no top_k.", "Use top_k=0, or top_p.")
        row.busy = True
        ends = self._ends.get(stop)
        if ends is None:
            ends = self._ends[stop] = Ends.of(stop)
        prompt: str | list[int] = row.prompt + row.text.decode("utf-8", "replace")
        if self.abilities.ids:
            prompt = list(row.ids)
        bits = random_bits(np.array([stream], np.uint64), np.array([tick]))
        body = self._body(prompt, int(min(room, ends.chunk)), sampling, int(bits[0] >> np.uint64(33)))
        if self.abilities.stops and (stop.separators or stop.strings):
            body["stop"] = [*stop.separators, *stop.strings]
        future = self.connection.start("completions", body, _completion)
        self._asked[future] = _Asked(row, key, tick, ends, room)
        future.add_done_callback(self._done.put)

    def tick(self) -> list[Chunk]:
        """Wait for a moment. Returns the chunks that have arrived.

        Raises:
            RunError: the server failed for good. What had arrived was returned before.
        """
        if not self._asked:
            return []
        chunks: list[Chunk] = []
        wait = MOMENT
        while self._failure is None:
            try:
                future = self._done.get(timeout=wait) if wait else self._done.get_nowait()
            except queue.Empty:
                break
            asked = self._asked.get(future)
            if asked is None:  # given up
                continue
            wait = 0
            try:
                chunks.append(self._chunk(asked, future.result()))
                del self._asked[future]
            except RunError as error:
                self._failure = error
        if self._failure is not None and not chunks:
            failure, self._failure = self._failure, None
            self.abandon([asked.row for asked in self._asked.values()])
            raise failure
        return chunks

    def abandon(self, rows: Collection[_Text]) -> None:
        """Give up chunks. What they have cost until now only the server knows."""
        gone = {id(row) for row in rows if row.busy}
        for future in [future for future, asked in self._asked.items() if id(asked.row) in gone]:
            self._asked.pop(future).row.busy = False
            future.cancel()

    def score(self, rows: Sequence[_Text], texts: Sequence[Ids], sampling: Sampling) -> list[Given]:
        """Not to be had.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "A server does not say how probable a given text is, which ancestor sampling needs.",
            "Turn ancestor sampling off, or use a model in this process.",
        )

    # --- what is asked ----------------------------------------------------------------------------------

    def _body(self, prompt: str | list[int], count: int, sampling: Sampling, seed: int) -> dict[str, Any]:
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": count, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": seed,
        }  # fmt: skip
        further = self._further(sampling)
        return body | {name: further[name] for name in self.abilities.taken}

    def _further(self, sampling: Sampling) -> dict[str, Any]:
        """Parameters that some servers have: to be told more, and to sample as we mean it."""
        whole = {
            "do_sample": not sampling.greedy, "top_k": sampling.top_k, "eos_token_id": sorted(self.eos),
            "pad_token_id": self.tokens.eos,
        }  # fmt: skip
        return {
            "logprobs": 1,
            "return_token_ids": True,
            "include_stop_str_in_output": True,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "generation_config": json.dumps(whole),  # of transformers, which is greedy unless told otherwise
        }

    def _prompt(self, ids: Sequence[int]) -> str:
        """A prompt as text, without the special tokens that the server itself puts in front."""
        if self.abilities.ids:
            return ""
        front = self.tokens.front
        if front and list(ids[: len(front)]) == front:
            ids = ids[len(front) :]
        return self.tokens.decode(ids)

    def _spelt(self, ids: Sequence[int], start: int = 0) -> bytes:
        """UTF-8 of the tokens from ``start`` on."""
        piece_of = self.tokens.piece_of
        return b"".join(piece_of(ids[k - 1] if k else None, ids[k]) for k in range(start, len(ids)))

    # --- what is answered -------------------------------------------------------------------------------

    def _chunk(self, asked: _Asked, reply: dict[str, Any]) -> Chunk:
        row, choice, mark = asked.row, reply["choices"][0], len(asked.row.text)
        usage = reply.get("usage") or {}
        logps, names = _logprobs(choice)
        if self.abilities.ids:
            tokens, drawn, end = self._of_ids(asked, choice)
            logps = logps[: len(tokens)]
        else:
            said = usage.get("completion_tokens")
            tokens, drawn, end, kept = self._of_text(asked, choice, said or len(logps))
            if kept >= 0:
                sizes = np.cumsum([len(name) for name in names])
                logps = logps[: int(np.searchsorted(sizes, kept)) + 1]
        row.ids += tokens
        row.size = max(len(row.ids), int(usage.get("prompt_tokens") or 0) + len(tokens))
        if end in ("separator", "cap") and (len(tokens) >= asked.limit or row.size >= self.context):
            end = "length"
        row.written, row.busy, row.ended = row.written + len(tokens), False, end not in ("separator", "cap")
        if len(logps) != len(tokens):  # the server cut the text in another way: their sum is right
            total = logps.sum() if len(logps) else np.nan
            logps = np.full(len(tokens), total / len(tokens))
        self.requests, self.drawn = self.requests + 1, self.drawn + drawn
        self.read += int(usage.get("prompt_tokens") or 0)
        return Chunk(
            row, asked.key, tokens, spelt(row.text, mark, row.ended), logps, logps, None, end,
            asked.tick + len(tokens), drawn,
        )  # fmt: skip

    def _of_ids(self, asked: _Asked, choice: dict[str, Any]) -> tuple[list[int], int, End]:
        """Tokens, how many were drawn, and why they end. The row gets its text."""
        row, given, mark = asked.row, choice["token_ids"], len(asked.row.text)
        tokens: list[int] = []
        last = row.ids[-1]
        for token in given:
            tokens.append(int(token))
            if token in self.eos or (len(tokens) == len(given) and token == _stopped_at(choice)):
                return tokens, len(given), "eos"
            piece = self.tokens.piece_of(last, token)
            row.text += piece
            last = token
            if end := asked.ends.reached(row.text, len(piece), mark, len(tokens), asked.limit):
                return tokens, len(given), end
        if choice["finish_reason"] == "length":  # by a limit of its own
            return tokens or [self.tokens.eos], len(given), "length"
        return [*tokens, self.tokens.eos], len(given), "eos"

    def _of_text(self, asked: _Asked, choice: dict[str, Any], drawn: int) -> tuple[list[int], int, End, int]:
        """As ``_of_ids``, and how many characters were kept where what is behind was thrown away; -1 = all were."""
        row, mark, stopped = asked.row, len(asked.row.text), choice["finish_reason"] != "length"
        text: str = choice["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.abilities.told and not self.abilities.kept and isinstance(said := _stopped_at(choice), str):
            text += said
        if not stopped:
            text = text.rstrip(HALF)  # it is drawn again, whole
        ends, end, at = asked.ends._replace(chunk=float("inf")), None, 0
        while end is None and at < len(text):
            piece = text[at].encode()
            row.text += piece
            at += 1
            end = ends.reached(row.text, len(piece), mark, 0, float("inf"))
        thrown = -1
        if end is not None:
            own = end == "separator" or any(text[:at].encode().endswith(s) for s in ends.strings)
            if own and stopped and self.abilities.stops:
                row.text += text[at:].encode()  # of the same token
            else:
                text, thrown = text[:at], at
        tokens = self._ids_of(text, row.ids[-1])
        drawn = drawn or len(tokens)
        if end is None and stopped:
            end = "eos"
        elif end is None:
            end = "cap" if drawn >= asked.ends.chunk else "length"
        if end == "eos" or not tokens:
            tokens.append(self.tokens.eos)
            end = end if end == "eos" else "length"  # there is nothing that could be continued
        return tokens, max(drawn, 1), end, thrown

    def _ids_of(self, text: str, last: int) -> list[int]:
        """Ids of a text behind a token.

        Raises:
            ConfigError: our tokenizer cannot write it.
        """
        ids = self.tokens.encode([text])[0][0]
        if self._spelt([last, *ids], 1) != text.encode():  # a tokenizer that puts a space in front of a text
            front, whole = (self.tokens.encode([t])[0][0] for t in ("\n", "\n" + text))
            ids = whole[len(front) :]
            if whole[: len(front)] != front or self._spelt([last, *ids], 1) != text.encode():
                raise ConfigError(
                    f"The tokenizer cannot write what the server wrote: {text[:60]!r}.",
                    "Name the tokenizer of the model that the server has.",
                )
        return ids

    # --- getting to know it -----------------------------------------------------------------------------

    def _named(self) -> tuple[str, int]:
        """The name of the model, and how long its texts can be."""
        address = self.connection.address
        try:
            found = self.connection.ask("models", check=_models)["data"]
        except Refused as refused:
            if refused.status not in (404, 405, 501) or not address.model:
                raise
            found = []  # some servers have no list
        names = {str(one["id"]): one for one in found}
        if not address.model and len(names) != 1:
            raise ConfigError(
                f"The server at {address.base} has {len(names)} models; say which.",
                "It has: " + ", ".join(sorted(names)[:20]) if names else "",
            )
        model = address.model or next(iter(names))
        if names and model not in names:
            raise unknown("model of the server", model, names)
        one = names.get(model, {})
        meta = one.get("meta") if isinstance(one.get("meta"), dict) else {}
        stated = [one.get("max_model_len"), meta.get("n_ctx"), meta.get("n_ctx_train"), address.context]
        context = min((n for n in stated if isinstance(n, int) and n > 0), default=0)
        if not context:
            raise ConfigError(
                f"The server at {address.base} does not say how long a text of {model!r} can be.",
                "Set the context, in tokens.",
            )
        return model, context

    def _tried(self) -> Abilities:
        """What it does, by a few requests for a few tokens."""
        ids, word = self._word()
        greedy = self._further(Sampling())
        names: set[str] = set()
        prompt: str | list[int] = ids
        count = min(8, self.context - len(ids))
        if count < 1:
            raise ConfigError(f"A context of {self.context} has no room for any text.", "Set a longer one.")

        def ask(names: Collection[str], prompt: str | list[int], retries: int | None = None, **more: Any):
            body = self._body(prompt, count, Sampling(), 1) | {name: greedy[name] for name in names}
            return self.connection.ask("completions", body | more, _completion, retries)["choices"][0]

        def takes(names: Collection[str], prompt: str | list[int]) -> bool:
            try:
                ask(names, prompt, retries=2)
            except RunError as error:  # some servers fall over what they do not know
                if isinstance(error, Refused) and error.status in (401, 403, 404, 405):
                    raise
                return False
            return True

        if takes(greedy, ids):
            names = set(greedy)
        else:
            ask((), word)  # if it refuses this, it says why
            names = {name for name in greedy if takes([name], word)}
            if not takes(names, ids):
                prompt = word
        choice = ask(names, prompt)
        given = choice.get("token_ids")
        found = Abilities(frozenset(names), logprobs=bool(len(_logprobs(choice)[0])))
        if isinstance(given, list) and given and not isinstance(prompt, str):
            found = replace(found, ids=True)
            self._check_ids(ids, given, choice["text"])
        else:
            prompt = word
            choice = ask(names, prompt)
        letters = [c for c in choice["text"] if c != HALF]
        if letters:
            letter = letters[len(letters) // 2]
            try:
                stopped = ask(names, prompt, retries=2, stop=[letter])
                found = replace(found, kept=letter in stopped["text"], told=_stopped_at(stopped) == letter)
            except RunError as error:
                self.notes.append(f"The server cannot be asked to stop at a text: {error.message}")
        return replace(found, seeded=self._samples(found, prompt, count))

    def _samples(self, found: Abilities, prompt: str | list[int], count: int) -> bool:
        """Whether equal seeds give equal texts."""
        self.abilities, hot = found, Sampling(2.0)
        texts = [
            self.connection.ask("completions", self._body(prompt, count, hot, seed), _completion)["choices"][0]["text"]
            for seed in (1, 1, 2, 3, 4)
        ]  # fmt: skip
        if len(set(texts)) == 1:
            self.notes.append(
                "The server wrote the same for all seeds at temperature 2: it may not sample at all. Particles that "
                "are copied would never differ."
            )
        return texts[0] == texts[1]

    def _word(self) -> tuple[list[int], str]:
        """A short text that can be asked about, as ids and as text."""
        tokens = self.tokens
        for i in range(tokens.size):
            piece = tokens.piece_of(None, i).decode("utf-8", "replace")
            if i not in self.eos and len(piece) == 1 and piece.isascii() and piece.isalnum():
                ids = [*tokens.front, i]
                return ids, self._prompt(ids)
        raise ConfigError(
            "The tokenizer has no letters and no digits.", "Name that of the model that the server has."
        )

    def _check_ids(self, prompt: list[int], ids: list[int], text: str) -> None:
        """Refuse a tokenizer that is not the server's."""
        shown = [i for i in ids if i not in self.eos]
        if all(0 <= i < self.tokens.size for i in shown):
            ours = self._spelt([*prompt, *shown], len(prompt)).decode("utf-8", "replace")
            special = any(self.tokens.tokenizer.id_to_token(i) in ours.split() for i in shown)
            if special or ours.replace(HALF, "").strip() == text.replace(HALF, "").strip():
                return
        raise ConfigError(
            f"The tokenizer is not that of the server's model {self.model!r}: they spell the same tokens differently.",
            "Name the tokenizer of the model that the server has.",
        )

    def _note(self) -> None:
        found = self.abilities
        if not found.ids:
            self.notes.append("The server takes or gives no token ids: texts are cut into tokens here.")
        if not found.stops:
            self.notes.append(
                "The server does not say where it stopped: it writes on behind separators, and that is thrown away."
            )
        if not found.seeded:
            self.notes.append("The server wrote two texts from one seed: its results cannot be repeated.")


# --- answers --------------------------------------------------------------------------------------------

FINISHED = {"stop", "length", "eos", "eos_token", "stop_sequence"}


def _completion(reply: Any) -> None:
    """Refuse what is no answer to a request for a completion."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Garbled("its answer has no choices")
    if not isinstance(choice.get("text"), str):
        raise Garbled("its answer has no text")
    if choice.get("finish_reason") not in FINISHED:
        raise Garbled(f"its text ended for the reason {choice.get('finish_reason')!r}")


def _models(reply: Any) -> None:
    found = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
        raise Garbled("its list of models is none")


def _stopped_at(choice: dict[str, Any]) -> Any:
    """The stop string, or the id of a token, as vLLM, SGLang or llama.cpp say it."""
    return next(
        (v for name in ("stop_reason", "matched_stop", "stopping_word") if (v := choice.get(name))), None
    )


def _logprobs(choice: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Of the tokens: (m,) and their spellings; empty where they are not told."""
    said = choice.get("logprobs")
    if not isinstance(said, dict):
        return np.zeros(0), []
    if isinstance(content := said.get("content"), list):
        pairs = [(one.get("logprob"), one.get("token")) for one in content if isinstance(one, dict)]
    else:
        pairs = list(zip(said.get("token_logprobs") or [], said.get("tokens") or [], strict=False))
    values = [np.nan if value is None else float(value) for value, _ in pairs]
    return np.array(values, float), [str(name) for _, name in pairs]
