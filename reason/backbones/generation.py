"""Sampling from a language model: many texts in one running batch, which they join and leave at any time.

A text is continued by *chunks*: up to and including a separator, or some number of tokens. Its tokens do not depend on
what else is in the batch. Each has random numbers of its own: the uniform of a token is a pure function of a stream,
which names the text, and of a tick, the number of tokens that were drawn from that stream before. It is turned
into a token by the inverse of the cumulative distribution (float32 logits, float64 sums), so nothing but the
rounding of matrix products is left of the batch.

Where a text ends is decided on its bytes, as they arrive: a separator may be spread over tokens, and a token may hold
half a character. Tokens are never cut, and no text is ever tokenised again.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from reason.backbones.cache import CachedLM, Ids, State
from reason.backbones.tokens import Tokens
from reason.errors import ConfigError, RunError

# --- randomness -----------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def stream(*words: int | str) -> int:
    """A 64-bit key of a stream of random numbers: a hash of what names it, such as seed, problem, sweep, chain and slot."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def random_bits(streams: np.ndarray, ticks: np.ndarray) -> np.ndarray:
    """(n,) uint64: output number ``ticks`` (from 0) of SplitMix64 (Steele et al. 2014) seeded with ``streams``."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        x = streams.astype(np.uint64) + np.uint64(GOLDEN) * (ticks.astype(np.uint64) + np.uint64(1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def uniforms(streams: np.ndarray, ticks: np.ndarray) -> np.ndarray:
    """(n,) float64 in [0, 1), of 53 random bits each."""
    return (random_bits(streams, ticks) >> np.uint64(11)) * 2.0**-53


# --- from logits to tokens ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """From which distribution tokens are drawn.

    Raises:
        ConfigError: values out of range.
    """

    temperature: float = 0.0  # 0: always the most probable token
    top_p: float = 1.0  # among the most probable tokens that have this mass together, after top_k
    top_k: int = 0  # among so many of the most probable tokens; 0 = all

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"The temperature is {self.temperature}; it must not be below 0.", "0 is greedy decoding."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p is {self.top_p}; it is a share, above 0 and at most 1.", "1 keeps all tokens."
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it is a number of tokens.", "0 keeps all tokens.")

    @property
    def greedy(self) -> bool:
        """Whether there is nothing to draw."""
        return self.temperature == 0 or self.top_k == 1


GREEDY = Sampling()


class Drawn(NamedTuple):
    """Tokens, and how probable each was. All (n,)."""

    tokens: Tensor  # int64
    logp: Tensor  # float64, under the distribution that it was drawn from: 0 where that is greedy
    model_logp: Tensor  # float64, under the model itself: temperature 1 and all tokens


def draw(logits: Tensor, sampling: Sampling, uniform: np.ndarray) -> Drawn:
    """One token for each row of logits (n, V), from its own uniform (n,) in [0, 1).

    Raises:
        RunError: logits that are not numbers.
    """
    logits = logits.float()
    if sampling.greedy:
        tokens = logits.argmax(-1)
        known = _known(logits, tokens)
        if known.isnan().any():
            raise _no_numbers()
        return Drawn(tokens, torch.zeros_like(known), known)
    share, order = _shares(logits, sampling)
    mass = share.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    point = torch.from_numpy(uniform).to(logits.device)[:, None] * total
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(mass, point, right=True)
    logp = (share.gather(1, index).double() / total).log()[:, 0]
    tokens = (index if order is None else order.gather(1, index))[:, 0]
    plain = order is None and sampling.temperature == 1
    return Drawn(tokens, logp, logp if plain else _known(logits, tokens))


def log_probabilities(logits: Tensor, tokens: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Of given tokens (n,) at logits (n, V): (n,) float64 under ``sampling`` and under the model; -inf where it is never drawn."""
    logits = logits.float()
    known = _known(logits, tokens)
    if sampling.greedy:
        best = logits.argmax(-1) == tokens
        return torch.where(best, 0.0, -torch.inf).double(), known
    share, order = _shares(logits, sampling)
    at = tokens[:, None] if order is None else (order == tokens[:, None]).long().argmax(-1, keepdim=True)
    return (share.gather(1, at).double() / share.sum(-1, True, dtype=torch.float64)).log()[:, 0], known


def _shares(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Unnormalised probabilities (n, V) float32, 0 for tokens that are never drawn; and which tokens they are of."""
    top = logits.amax(-1, keepdim=True)
    if not torch.isfinite(top).all():
        raise _no_numbers()
    share = ((logits - top) / sampling.temperature).exp_()
    if sampling.top_p == 1 and not sampling.top_k:
        return share, None
    share, order = share.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        share[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        mass = share.cumsum(-1, dtype=torch.float64)
        before = mass - share  # of those that are more probable: 0 for the first
        share.masked_fill_(before >= sampling.top_p * mass[:, -1:] - 1e-9, 0)
    return share, order


def _no_numbers() -> RunError:
    return RunError(
        "The model returned logits that are not numbers.",
        "Its weights are damaged, or its precision is too low: use float32.",
    )


def _known(logits: Tensor, tokens: Tensor) -> Tensor:
    return (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).double()


class Sampler:
    """Draws the tokens of one text after another from logits (V,)."""

    def __init__(self, sampling: Sampling, seed: int = 0):
        self.sampling, self._stream, self._tick = sampling, np.array([stream(seed)], np.uint64), 0

    def __call__(self, logits: Tensor) -> int:
        uniform = uniforms(self._stream, np.array([self._tick]))
        self._tick += 1
        return int(draw(logits[None], self.sampling, uniform).tokens[0])


# --- where a chunk ends ---------------------------------------------------------------------------------

End = Literal["separator", "cap", "eos", "stop", "boxed", "length"]
BOX = b"\\boxed{"


@dataclass(frozen=True)
class Stop:
    r"""What ends a chunk, and what ends a text.

    The token in which it appears is kept whole. A separator lies within one chunk, so one that was found is used up;
    a stop string or a box may be spread over chunks.

    Raises:
        ConfigError: an empty text, or a number below 1.
    """

    separators: tuple[str, ...] = ()  # end a chunk; the text goes on behind it
    chunk: int | None = None  # tokens of a chunk at most; the text goes on
    strings: tuple[str, ...] = ()  # end the text
    boxed: bool = False  # \boxed{...} ends the text when its brace is closed
    length: int | None = None  # tokens of a text at most, without its prompt; the context is a limit too

    def __post_init__(self):
        if not all((*self.separators, *self.strings)):
            raise ConfigError("A separator or a stop string is empty.", "Leave it out.")
        for name in ("chunk", "length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"At most {value} tokens for a {name} leaves nothing to write.")


def boxed(text: bytes | bytearray) -> bool:
    r"""Whether a \boxed{...} in it is closed."""
    at = text.find(BOX)
    while at >= 0:
        depth = 1
        for byte in memoryview(text)[at + len(BOX) :]:
            depth += (byte == 0x7B) - (byte == 0x7D)
            if not depth:
                return True
        at = text.find(BOX, at + 1)
    return False


# --- texts in a batch -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Row:
    """A text in the cache, as long as it is open. It can be continued once; for more, fork it.

    length: its tokens, the prompt among them.
    hidden: (D,) what the head reads at its last token.
    """

    number: int  # in the cache
    length: int
    logits: Tensor  # (V,) of the next token
    hidden: Tensor
    last: int  # its last token
    written: int = 0  # tokens behind the prompt
    text: bytearray = field(default_factory=bytearray)  # of these, without the token that ended it
    told: int = 0  # bytes of it that are in chunks, and not of one in the making
    ended: bool = False
    busy: bool = False  # being continued

    def copy(self, number: int) -> Row:
        """The same text in another row."""
        return replace(self, number=number, text=self.text[: self.told], busy=False)


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a text was continued by.

    tokens: at least one; the end-of-text token is the last where the model ended the text.
    text: what they spell, without that token. A character that is not complete is in the chunk that completes it.
    logp: (m,) float64 log-probability of each token under the distribution that it was drawn from.
    model_logp: (m,) under the model itself: at temperature 1, without top-p or top-k.
    hidden: (D,) float32 what the head reads at the last token; None where the writer does not see it.
    tick: what the next chunk of the same stream begins with.
    drawn: tokens that it took, those behind its end too, which a writer may have drawn in vain.
    """

    row: Any  # of its writer
    key: Any  # as given
    tokens: list[int]
    text: str
    logp: np.ndarray
    model_logp: np.ndarray
    hidden: Tensor | None
    end: End
    tick: int
    drawn: int

    @property
    def finished(self) -> bool:
        """Whether the text is over."""
        return self.end not in ("separator", "cap")


class Given(NamedTuple):
    """What a model says of m given tokens."""

    logp: np.ndarray  # (m,) float64 log-probability of each under the distribution that tokens are drawn from
    model_logp: np.ndarray  # (m,) under the model itself: at temperature 1, without top-p or top-k
    hidden: Tensor  # (m, D) float32 what the head reads at each


class Writer(Protocol):
    """Continues many texts at once: ``Batch`` by a model in this process, ``server.Server`` by one elsewhere.

    A row is a text that only its writer understands. For what the methods do, see ``Batch``.

    context: tokens that a text can have. active: texts that are being continued. stepwise: whether a tick draws one
    token for each of these; else it waits for whole chunks, for a moment, and may return none. drawn, read: tokens so far.
    """

    stepwise: bool
    drawn: int
    read: int

    @property
    def context(self) -> int: ...
    @property
    def active(self) -> int: ...
    def open(self, texts: Sequence[Ids], written: Sequence[int] | None = None) -> list[Any]: ...
    def fork(self, rows: Sequence[Any]) -> list[Any]: ...
    def close(self, rows: Iterable[Any]) -> None: ...
    def extend(
        self, row: Any, stream: int, sampling: Sampling, stop: Stop, *, tick: int = 0, key: Any = None
    ) -> None: ...
    def tick(self) -> list[Chunk]: ...
    def score(self, rows: Sequence[Any], texts: Sequence[Ids], sampling: Sampling) -> list[Given]: ...
    def abandon(self, rows: Collection[Any]) -> None: ...


class _Writing:
    """A chunk in the making."""

    __slots__ = (
        "key",
        "limit",
        "logp",
        "mark",
        "model_logp",
        "row",
        "sampling",
        "stop",
        "stream",
        "tick",
        "tokens",
    )

    def __init__(
        self, row: Row, key: Any, stream: int, tick: int, sampling: Sampling, stop: Ends, limit: int
    ):
        self.row, self.key, self.stream, self.tick, self.sampling = row, key, stream, tick, sampling
        self.stop, self.limit, self.mark = stop, limit, row.told
        self.tokens: list[int] = []
        self.logp: list[float] = []
        self.model_logp: list[float] = []


class Ends(NamedTuple):
    """``Stop``, as it is looked for."""

    separators: list[bytes]
    strings: list[bytes]
    boxed: bool
    chunk: float

    @classmethod
    def of(cls, stop: Stop) -> Ends:
        return cls(
            [s.encode() for s in stop.separators], [s.encode() for s in stop.strings], stop.boxed,
            float("inf") if stop.chunk is None else stop.chunk,
        )  # fmt: skip

    def reached(self, text: bytearray, size: int, mark: int, count: int, limit: float) -> End | None:
        """Why a chunk ends behind its last token, if it does.

        Args:
            text: with that token, whose bytes are the last ``size``.
            mark: where in ``text`` the chunk begins. count: its tokens. limit: tokens that there is room for.
        """
        for s in self.strings:
            if text.find(s, max(0, len(text) - size - len(s) + 1)) >= 0:
                return "stop"
        if self.boxed and text.find(b"}", len(text) - size) >= 0 and boxed(text):
            return "boxed"
        if count >= limit:
            return "length"
        for s in self.separators:
            if text.find(s, max(mark, len(text) - size - len(s) + 1)) >= 0:
                return "separator"
        return "cap" if count >= self.chunk else None


class Batch:
    """Texts that are continued together.

        (row,) = batch.open([prompt])
        for i, one in enumerate([row, *batch.fork([row] * 31)]):
            batch.extend(one, stream(seed, i), Sampling(0.8), Stop(separators=("\\n\\n",)), key=i)
        while batch.active:
            for chunk in batch.tick():
                ...  # continue chunk.row, now or later, or close it

    Args:
        lm: the model. tokens: its tokenizer.
        eos: all tokens that end a text.
    """

    stepwise = True

    def __init__(self, lm: CachedLM, tokens: Tokens, eos: Collection[int]):
        self.lm, self.tokens, self.eos = lm, tokens, frozenset(eos)
        self._active: list[_Writing] = []
        self._joining: list[_Writing] = []
        self._logits: Tensor | None = None  # of the active
        self._piece = tokens.piece_of
        self._stops: dict[Stop, Ends] = {}
        self.drawn = self.read = self.passes = 0  # tokens drawn, tokens read otherwise, passes for the former

    @property
    def context(self) -> int:
        """Tokens that a text can have."""
        return self.lm.context

    @property
    def active(self) -> int:
        """Texts that are being continued."""
        return len(self._active) + len(self._joining)

    # --- rows -------------------------------------------------------------------------------------------

    def open(
        self, texts: Sequence[Ids], written: Sequence[int] | None = None, begin: Sequence[Row] | None = None
    ) -> list[Row]:  # fmt: skip
        """New rows for texts of at least one token each.

        Args:
            written: how many tokens at the end of each were drawn before; the rest is its prompt. None: none.
            begin: rows that begin with these texts; only the last token is read then.

        Raises:
            DataError: a text that is empty or longer than the context.
        """
        if not texts:
            return []
        if begin is None:
            numbers, state = self.lm.open(texts)
            self.read += sum(map(len, texts))
        else:
            numbers = self.lm.fork([row.number for row in begin], [len(ids) - 1 for ids in texts])
            last = [int(ids[-1]) for ids in texts]
            state = self.lm.step(numbers, torch.tensor(last, device=begin[0].logits.device))
            self.read += len(texts)
        rows = []
        for i, (number, ids) in enumerate(zip(numbers, texts, strict=True)):
            count = 0 if written is None else written[i]
            row = Row(number, len(ids), *_kept(state, i), int(ids[-1]), count)
            for k in range(len(ids) - count, len(ids)):
                row.text += self._piece(int(ids[k - 1]) if k else None, int(ids[k]))
            row.told = len(row.text)
            rows.append(row)
        return rows

    def fork(self, rows: Sequence[Row]) -> list[Row]:
        """Copies of rows. Of one that is being continued: as it was before."""
        numbers = self.lm.fork([row.number for row in rows], [row.length for row in rows])
        return [row.copy(number) for row, number in zip(rows, numbers, strict=True)]

    def close(self, rows: Iterable[Row]) -> None:
        """Forget rows that are not being continued."""
        rows = list(rows)
        if any(row.busy for row in rows):
            raise ValueError("A text that is being continued cannot be closed.")
        self.lm.close([row.number for row in rows])

    # --- continuing -------------------------------------------------------------------------------------

    def extend(
        self, row: Row, stream: int, sampling: Sampling, stop: Stop, *, tick: int = 0, key: Any = None
    ) -> None:
        """Begin a chunk.

        Args:
            stream, tick: the random numbers of its tokens, the first and those after it.
            key: comes back with the chunk.

        Raises:
            ValueError: a text that is over, or has no room for a token.
        """
        room = self.lm.context - row.length
        if stop.length is not None:
            room = min(room, stop.length - row.written)
        if row.ended or row.busy or room < 1:
            raise ValueError("The text is being continued." if row.busy else "The text is over.")
        row.busy = True
        looked = self._stops.get(stop)
        if looked is None:
            looked = self._stops[stop] = Ends.of(stop)
        self._joining.append(_Writing(row, key, stream, tick, sampling, looked, room))

    @torch.no_grad()
    def tick(self) -> list[Chunk]:
        """Draw a token for each active text. Returns the chunks that it ended."""
        self._join()
        writing = self._active
        if not writing:
            return []
        drawn = self._draw()
        state = self.lm.step([w.row.number for w in writing], drawn.tokens)
        self.passes, self.drawn = self.passes + 1, self.drawn + len(writing)
        ended = self._take(*(x.tolist() for x in drawn))
        self._logits = state.logits
        if not ended:
            return []
        chunks = [self._chunk(writing[i], end, *_kept(state, i)) for i, end in ended]
        gone = {i for i, _ in ended}
        left = [i for i in range(len(writing)) if i not in gone]
        self._active = [writing[i] for i in left]
        self._logits = state.logits[torch.tensor(left, device=state.logits.device)] if left else None
        self._lists()
        return chunks

    def drain(self) -> list[Chunk]:
        """Ticks until nothing is active; all chunks, in the order in which they ended."""
        found = []
        while self.active:
            found += self.tick()
        return found

    @torch.no_grad()
    def score(self, rows: Sequence[Row], texts: Sequence[Ids], sampling: Sampling) -> list[Given]:
        """What the model says of given tokens behind rows, which stay as they are.

        Raises:
            DataError: longer than the context.
        """
        if any(row.busy for row in rows):
            raise ValueError("A text that is being continued cannot be scored.")
        nothing = Given(np.zeros(0), np.zeros(0), torch.zeros(0, 0))
        found = [nothing] * len(rows)
        asked = [i for i, text in enumerate(texts) if len(text)]
        states = self.lm.read([rows[i].number for i in asked], [texts[i] for i in asked], keep=False)
        for i, state in zip(asked, states, strict=True):
            logits = torch.cat([rows[i].logits[None], state.logits[:-1]])
            ids = torch.tensor(list(texts[i]), device=logits.device)
            ours, theirs = log_probabilities(logits, ids, sampling)
            found[i] = Given(ours.cpu().numpy(), theirs.cpu().numpy(), state.hidden.float())
            self.read += len(ids)
        return found

    def abandon(self, rows: Collection[Row]) -> None:
        """Give up chunks that are being written, and close their rows."""
        gone = {id(row) for row in rows if row.busy}
        if not gone:
            return
        self._joining = [w for w in self._joining if id(w.row) not in gone]
        left = [i for i, w in enumerate(self._active) if id(w.row) not in gone]
        self._active = [self._active[i] for i in left]
        if self._logits is not None:
            self._logits = self._logits[torch.tensor(left, device=self._logits.device)] if left else None
        self._lists()
        left_behind = [row for row in rows if row.busy]
        for row in left_behind:
            row.busy = False
        self.close(left_behind)

    # --- inside -----------------------------------------------------------------------------------------

    def _join(self) -> None:
        if not self._joining:
            return
        new = torch.stack([w.row.logits for w in self._joining])
        self._logits = new if self._logits is None else torch.cat([self._logits, new])
        self._active = self._active + self._joining
        self._joining = []
        self._lists()

    def _lists(self) -> None:
        """What is asked of all active texts at each tick; made anew when they change."""
        self._streams = np.array([w.stream for w in self._active], np.uint64)
        self._ticks = np.array([w.tick + len(w.tokens) for w in self._active], np.int64)
        groups: dict[Sampling, list[int]] = {}
        for i, w in enumerate(self._active):
            groups.setdefault(w.sampling, []).append(i)
        self._groups = [(s, np.array(rows)) for s, rows in groups.items()]

    def _draw(self) -> Drawn:
        assert self._logits is not None
        uniform = uniforms(self._streams, self._ticks)
        self._ticks += 1
        if len(self._groups) == 1:
            return draw(self._logits, self._groups[0][0], uniform)
        n, device = len(self._active), self._logits.device
        whole = Drawn(
            torch.zeros(n, dtype=torch.int64, device=device),
            *(torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2)),
        )
        for sampling, rows in self._groups:
            index = torch.from_numpy(rows).to(device)
            for x, y in zip(whole, draw(self._logits[index], sampling, uniform[rows]), strict=True):
                x[index] = y
        return whole

    def _take(self, tokens: list[int], logp: list[float], model_logp: list[float]) -> list[tuple[int, End]]:
        """Note the tokens that were drawn. Returns which texts end a chunk, and why."""
        ended: list[tuple[int, End]] = []
        eos, piece_of = self.eos, self._piece
        for i, w in enumerate(self._active):
            token, row, stop = tokens[i], w.row, w.stop
            w.tokens.append(token)
            w.logp.append(logp[i])
            w.model_logp.append(model_logp[i])
            end: End | None = None
            if token in eos:
                end = "eos"
            else:
                piece = piece_of(row.last, token)
                row.last = token
                text = row.text
                text += piece
                size = len(piece)
                end = stop.reached(text, size, w.mark, len(w.tokens), w.limit)
            if end is not None:
                ended.append((i, end))
        return ended

    def _chunk(self, w: _Writing, end: End, logits: Tensor, hidden: Tensor) -> Chunk:
        row, count = w.row, len(w.tokens)
        row.logits, row.hidden, row.last = logits, hidden, w.tokens[-1]
        row.length, row.written = row.length + count, row.written + count
        row.ended = end not in ("separator", "cap")
        row.busy, row.told = False, len(row.text)
        return Chunk(
            row, w.key, w.tokens, spelt(row.text, w.mark, row.ended), np.array(w.logp), np.array(w.model_logp),
            hidden.float(), end, w.tick + count, count,
        )  # fmt: skip


def spelt(text: bytearray, mark: int, ended: bool) -> str:
    """The text of a chunk that begins at ``mark``, with what the one before has left of a character."""
    own = bytes(text[mark - len(_begun(text[:mark])) :])
    return own[: len(own) - (0 if ended else len(_begun(own)))].decode("utf-8", "replace")


def _begun(text: bytes | bytearray) -> bytes:
    """The bytes at its end that begin a character and do not complete it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(text[-3:]))
    return decoder.getstate()[0]


def _kept(state: State, i: int) -> tuple[Tensor, Tensor]:
    """Logits and state of one text, which outlive the pass."""
    return state.logits[i].clone(), state.hidden[i].clone()


def generate(
    batch: Batch, prompts: Sequence[Ids], sampling: Sampling, stop: Stop, streams: Sequence[int]
) -> list[Chunk]:
    """Continue prompts to their ends, or to the ends of their first chunks where ``stop`` has such. In order."""
    rows = batch.open(prompts)
    for i, (row, key) in enumerate(zip(rows, streams, strict=True)):
        batch.extend(row, key, sampling, stop, key=i)
    chunks = sorted(batch.drain(), key=lambda chunk: chunk.key)
    batch.close(rows)
    return chunks
