"""Answers the requests of many algorithms at once, by a language model with one cache.

A job is an algorithm at work on a problem. All jobs decode in one batch; the particles of a job wait for each other
alone, other jobs go on meanwhile. A prefix is a row of the cache: where several particles continue it, it
is forked, and a row that was given up and is wanted again (a path that particle Gibbs replays) is read anew.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from reason.backbones.generation import Chunk, Sampling, Stop, Writer
from reason.datasets.problems import Problem
from reason.errors import DataError, ReasonError, RunError
from reason.methods.particle.lineage import Node
from reason.methods.particle.requests import Algorithm, Answer, Extend, Halted, Splice


class Prefix(NamedTuple):
    """What a reward judges."""

    problem: Problem
    node: Node
    hidden: Tensor | None  # (D,) what the policy's head reads at the last token; None: a server does not tell


class Reward(Protocol):
    """Judges prefixes, finished ones too. The same prefix always gets the same reward."""

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n,) in [0, 1]; or (n, 1 + m): the reward, and what each of m members of an ensemble said."""
        ...


@dataclass
class Ledger:
    """What a job has cost."""

    prompt: int = 0  # tokens of the prompt, read once for all jobs of a problem
    drawn: int = 0  # tokens drawn, those of particles that were dropped too
    read: int = 0  # tokens read again: prefixes whose rows were gone, spliced futures
    judged: int = 0  # prefixes that got a reward
    forked: int = 0  # rows copied
    rounds: int = 0  # requests answered


@dataclass
class Task:
    """An algorithm to run on a problem. prompt: token ids. budget: tokens drawn at most."""

    problem: Problem
    prompt: Sequence[int]
    algorithm: Callable[[Node], Algorithm[Any]]
    budget: int | None = None
    key: Any = None


@dataclass
class Outcome:
    """What a task came to: ``result`` is what its algorithm returned."""

    task: Task
    result: Any
    ledger: Ledger


@dataclass(eq=False)
class _Job:
    task: Task
    algorithm: Algorithm[Any]
    ledger: Ledger = field(default_factory=Ledger)
    rows: dict[Node, Any] = field(default_factory=dict)  # of unfinished nodes, not being continued
    writing: list[Any] = field(default_factory=list)  # being continued
    children: list[Node] = field(default_factory=list)  # of the request that is being answered
    hidden: dict[Node, Tensor | None] = field(default_factory=dict)  # of children
    scored: bool | str = True
    left: int = 0  # chunks that are still being written
    result: Any = None
    ended: bool = False


class Driver:
    """Runs tasks.

    Args:
        batch: of the policy, or a server that has it.
        sampling: how tokens are drawn; a greedy request is greedy anyway.
        stop: what ends a chunk and a text.
        reward: None: for algorithms that ask for none.
        steps: chunks of a solution at most.
        width: rows that are decoded together, about: a task begins where fewer are.
        halted: asked before every token; a reason to stop, or "". Whoever is at work then returns what it has.
    """

    def __init__(
        self,
        batch: Writer,
        sampling: Sampling,
        stop: Stop,
        reward: Reward | None = None,
        *,
        steps: int = 40,
        width: int = 128,
        halted: Callable[[], str] = lambda: "",
    ):
        self.batch, self.sampling, self.stop, self.reward = batch, sampling, stop, reward
        self.steps, self.width, self.halted = steps, width, halted
        self._jobs: dict[_Job, None] = {}
        self._roots: dict[str, Any] = {}  # of problems at work
        self._users: Counter[str] = Counter()  # tasks of each problem that have not ended

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """The outcomes of ``tasks``, as they end.

        Raises:
            DataError: a prompt that leaves no room for an answer.
            RunError: a reward that is none, or a server that fails. What has ended is handed out first; where it is
                the server, the tasks at work are halted, and hand out what they have, too.
        """
        queue = deque(tasks)
        self._check(queue)
        self._users.update(task.problem.id for task in queue)
        while queue or self._jobs:
            halt = self.halted()
            started = []
            while queue and (halt or self.batch.active + len(started) < self.width):
                task = queue.popleft()
                root = Node(None)
                started.append(job := _Job(task, task.algorithm(root), rows={}))
                self._jobs[job] = None
            self._open(started)
            for job in started:
                self._advance(job, None, halt)
            for job in [job for job in self._jobs if not job.ended]:
                budget = job.task.budget
                if reason := halt or ("out of tokens" if budget and job.ledger.drawn >= budget else ""):
                    self._halt(job, reason)
            try:
                if self.batch.active:
                    self._tick()
            except ReasonError:
                yield from self._ended()
                raise
            yield from self._ended()

    # --- a job's life -----------------------------------------------------------------------------------

    def _check(self, tasks: Iterable[Task]) -> None:
        context = self.batch.context
        for task in tasks:
            if len(task.prompt) >= context:
                raise DataError(
                    f"Problem {task.problem.id!r} has {len(task.prompt):,} tokens; the model has room for "
                    f"{context:,}, its answer included.",
                    "Leave it out, or use a model with a longer context.",
                )

    def _open(self, jobs: Sequence[_Job]) -> None:
        """Read the prompts of problems that are not at work yet."""
        new = {job.task.problem.id: job for job in jobs if job.task.problem.id not in self._roots}
        rows = self.batch.open([job.task.prompt for job in new.values()])
        for (name, job), row in zip(new.items(), rows, strict=True):
            self._roots[name] = row
            job.ledger.prompt = len(job.task.prompt)

    def _advance(self, job: _Job, answer: Answer | None, halt: str = "") -> None:
        """Hand over an answer, and begin with what is asked for next."""
        try:
            while True:
                request = job.algorithm.send(answer)  # type: ignore[arg-type]
                if halt:
                    request = job.algorithm.throw(Halted(halt))
                job.ledger.rounds += 1
                if isinstance(request, Extend):
                    self._begin(job, request)
                    return
                answer = self._splice(job, request)
        except StopIteration as end:
            self._end(job, end.value)

    def _halt(self, job: _Job, reason: str) -> None:
        self.batch.abandon(job.writing)
        job.writing, job.left = [], 0
        try:
            job.algorithm.throw(Halted(reason))
        except StopIteration as end:
            self._end(job, end.value)
        else:
            raise AssertionError("An algorithm went on after it was halted.")

    def _end(self, job: _Job, result: Any) -> None:
        self.batch.close(job.rows.values())
        job.rows, job.result, job.ended = {}, result, True

    def _ended(self) -> list[Outcome]:
        ended = [job for job in self._jobs if job.ended]
        for job in ended:
            del self._jobs[job]
            name = job.task.problem.id
            self._users[name] -= 1
            if not self._users[name]:
                self.batch.close([self._roots.pop(name)])
        return [Outcome(job.task, job.result, job.ledger) for job in ended]

    # --- chunks -----------------------------------------------------------------------------------------

    def _begin(self, job: _Job, request: Extend) -> None:
        """Let the batch write a chunk behind each node."""
        rows = self._rows(job, request.nodes, last=True)
        sampling = Sampling(0.0) if request.greedy else self.sampling
        job.children, job.scored, job.left = [_UNWRITTEN] * len(rows), request.scored, len(rows)
        job.writing = rows
        for i, (row, node) in enumerate(zip(rows, request.nodes, strict=True)):
            self.batch.extend(
                row,
                int(request.streams[i]),
                sampling,
                self.stop,
                tick=int(request.ticks[i]),
                key=(job, i, node),
            )

    def _rows(self, job: _Job, nodes: Sequence[Node], last: bool) -> list[Any]:
        """A row for each node, none of them twice.

        last: the job's rows are theirs to continue, and those that are not wanted are closed.
        """
        wanted = Counter(nodes)
        source: dict[Node, Any] = {}
        for node in wanted:
            if node.parent is None:
                source[node] = self._roots[job.task.problem.id]
            elif node in job.rows:
                source[node] = job.rows[node]
        if gone := [node for node in wanted if node not in source]:
            texts = [[*job.task.prompt, *node.all_tokens] for node in gone]
            source |= zip(gone, self.batch.open(texts, [node.length for node in gone]), strict=True)
            job.ledger.read += sum(map(len, texts))
            job.rows |= {node: source[node] for node in gone}
        if not last:
            return [source[node] for node in nodes]
        free = {node: job.rows.pop(node) for node in wanted if node in job.rows}
        self.batch.close(job.rows.values())
        job.rows = {}
        copies = [node for node in wanted for _ in range(wanted[node] - (node in free))]
        rows: dict[Node, list[Any]] = {node: [row] for node, row in free.items()}
        for node, row in zip(copies, self.batch.fork([source[node] for node in copies]), strict=True):
            rows.setdefault(node, []).append(row)
        job.ledger.forked += len(copies)
        return [rows[node].pop() for node in nodes]

    def _tick(self) -> None:
        """A token more for everybody, and answers to the requests that it completes."""
        if self.batch.stepwise:
            for job in self._jobs:
                job.ledger.drawn += job.left
        complete = []
        try:
            chunks = self.batch.tick()
        except ReasonError as error:
            for job in [job for job in self._jobs if not job.ended]:
                self._halt(job, f"failed: {error.message}")
            raise
        for chunk in chunks:
            job, i, parent = chunk.key
            if not self.batch.stepwise:
                job.ledger.drawn += chunk.drawn
            job.children[i] = child = self._child(parent, chunk)
            job.hidden[child] = chunk.hidden
            if child.finished:
                self.batch.close([chunk.row])
            else:
                job.rows[child] = chunk.row
            job.left -= 1
            if not job.left:
                complete.append(job)
        if not complete:
            return
        self._judge([(job, job.children) for job in complete])
        for job in complete:
            job.writing = []
            self._advance(job, job.children)

    def _child(self, parent: Node, chunk: Chunk) -> Node:
        finish = chunk.end if chunk.finished else "steps" if parent.step + 1 >= self.steps else ""
        return Node(parent, chunk.tokens, chunk.text, float(chunk.logp.sum()), finish=finish)

    def _judge(self, asked: Sequence[tuple[_Job, Sequence[Node]]]) -> None:
        """Give the nodes of several jobs their rewards."""
        pairs = [
            (job, node)
            for job, nodes in asked
            for node in nodes
            if job.scored is True or (job.scored == "finished" and node.finished)
        ]
        if pairs:
            if self.reward is None:
                raise ValueError("This algorithm asks for rewards, and there is none.")
            found = self.reward([Prefix(job.task.problem, node, job.hidden[node]) for job, node in pairs])
            if len(found) != len(pairs):
                raise RunError(f"The reward gave {len(found)} scores for {len(pairs)} prefixes.")
            found = np.asarray(found, np.float64)
            for (job, node), (reward, *members) in zip(
                pairs, found.reshape(len(pairs), -1).tolist(), strict=True
            ):
                if not 0 <= reward <= 1:
                    raise RunError(
                        f"The reward of problem {job.task.problem.id!r}, step {node.step}, is {reward:g}; it must lie "
                        f"between 0 and 1. The prefix ends: {node.text[-60:]!r}",
                        "Check the reward model: its precision, and the token that its scores are read at.",
                    )
                node.reward, node.members = reward, members
                job.ledger.judged += 1
        for job, _ in asked:
            job.hidden = {}

    def _splice(self, job: _Job, request: Splice) -> list[Node | None]:
        """``path`` behind each prefix: one pass over its tokens, with the keys that the prefix has."""
        length = sum(len(step.tokens) for step in request.path)
        limit = min(self.stop.length or self.batch.context, self.batch.context - len(job.task.prompt))
        fit = [
            i
            for i, prefix in enumerate(request.prefixes)
            if not prefix.finished
            and prefix.length + length <= limit
            and prefix.step + len(request.path) <= self.steps
        ]
        ends: list[Node | None] = [None] * len(request.prefixes)
        tokens = [token for step in request.path for token in step.tokens]
        distinct = list(dict.fromkeys(request.prefixes[i] for i in fit))
        if not distinct:
            return ends
        rows = self._rows(job, distinct, last=False)
        scored = self.batch.score(rows, [tokens] * len(distinct), self.sampling)
        job.ledger.read += len(tokens) * len(distinct)
        behind: dict[Node, list[Node]] = {}
        for prefix, given in zip(distinct, scored, strict=True):
            node, start, steps = prefix, 0, []
            for step in request.path:
                end = start + len(step.tokens)
                node = Node(
                    node, step.tokens, step.text, float(given.logp[start:end].sum()), finish=step.finish
                )
                steps.append(node)
                job.hidden[node] = given.hidden[end - 1]
                start = end
            behind[prefix] = steps
        job.scored = True
        self._judge([(job, [node for steps in behind.values() for node in steps])])
        for i in fit:
            ends[i] = behind[request.prefixes[i]][-1]
        return ends


_UNWRITTEN = Node(None)
