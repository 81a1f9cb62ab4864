"""Audit logs: all that happened while a problem was solved, from which it can be computed again.

A log is a block of lines of JSON that is appended in one write, so a file holds whole logs, of one problem or many.
It says what was run (``Recipe``), every node that was written, and for each particle and round the potential, the weights, the
random stream and the ancestor. No time stands in it: the same seed and configuration give the same lines.

A replay believes the nodes alone: their tokens, rewards and log-probabilities. It runs the recipe over them, through
the algorithm itself, writes the log that comes of it, and compares: weights, ESS, ancestors, evidence and swaps have
to be equal to the last bit. Each line carries a sum over itself and the one before it, so that text that was changed, and a
line that is torn, missing or added, is found as well. The sums guard against accidents, not against forgers.

    header    what was run, on which problem; whatever the caller says about run, model and versions
    node      a chunk: parent, tokens, text, log-probability, reward
    particle  sweep, chain, round t, slot: g, log-weights before and after, W, stream and tick of its draws, ancestor
    round     ESS, temperature of resampling, whether resampled, survivors
    sweep     its end: log-evidence, status, particles
    swap      of parallel tempering
    answer    what was chosen in the end, by which rule
    end       how many lines there are
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from reason.datasets.problems import Problem
from reason.errors import DataError, unknown
from reason.files import append_json_lines
from reason.methods.particle import smc
from reason.methods.particle.allocation import adaptive
from reason.methods.particle.genealogy import survivors
from reason.methods.particle.lineage import Node, Population
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Algorithm, Draws, Extend, Halted, Request
from reason.methods.particle.resampling import normalized
from reason.methods.particle.selection import Answer

FORMAT = 1
FILE = "audit.jsonl"  # in the folder of the run
ALGORITHMS = ("filter", "islands", "adaptive", "gibbs", "tempering")
SHOWN = 20  # differences that a replay lists

Line = dict[str, Any]


@dataclass(frozen=True)
class Trail:
    """What an algorithm did. chains: the populations of its sweeps, for each chain or island."""

    chains: list[list[Population]]
    swaps: list[smc.Swap] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """What is run on a problem: all that an algorithm needs but the nodes.

    algorithm: one of ``ALGORITHMS``. chains: islands. sweeps: of particle Gibbs and parallel tempering.
    temperatures: of the chains of parallel tempering, hottest first. start, confidence: see ``allocation.adaptive``.
    """

    algorithm: str
    filter: smc.Filter
    draws: Draws
    sweeps: int = 1
    chains: int = 1
    temperatures: tuple[float, ...] = ()
    ancestor_sampling: bool = False
    start: int = 4
    confidence: float = 1.0

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise unknown("algorithm", self.algorithm, ALGORITHMS)

    def run(self, root: Node) -> Algorithm[Trail]:
        """The algorithm, from an empty solution."""
        if self.algorithm == "filter":
            return Trail([[(yield from smc.sweep(root, self.filter, self.draws))]])
        if self.algorithm == "islands":
            found = yield from smc.islands(root, self.filter, self.draws, self.chains)
            return Trail([[population] for population in found])
        if self.algorithm == "adaptive":
            found = yield from adaptive(root, self.filter, self.draws, self.start, self.confidence)
            return Trail([[population] for population in found])
        if self.algorithm == "gibbs":
            rest = self.draws, self.sweeps, self.ancestor_sampling
            return Trail([(yield from smc.gibbs(root, self.filter, *rest))])
        chains, swaps = yield from smc.tempering(
            root, self.filter, self.draws, self.temperatures, self.sweeps, self.ancestor_sampling
        )
        return Trail(chains, swaps)

    def draws_of(self, sweep: int, chain: int) -> Draws:
        """Where the randomness of a sweep came from."""
        if self.algorithm == "filter":
            return self.draws
        if self.algorithm in ("islands", "adaptive"):
            return replace(self.draws, chain=chain)
        if self.algorithm == "gibbs":
            return replace(self.draws, sweep=sweep)
        return replace(self.draws, sweep=sweep, chain=chain)

    def potential_of(self, chain: int) -> Potential:
        if self.algorithm != "tempering":
            return self.filter.potential
        return replace(self.filter.potential, temperature=self.temperatures[chain])

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Recipe:
        """From ``asdict``, by way of JSON."""
        filter_ = smc.Filter(**{**told["filter"], "potential": Potential(**told["filter"]["potential"])})
        temperatures = tuple(told["temperatures"])
        return cls(
            **{**told, "filter": filter_, "draws": Draws(**told["draws"]), "temperatures": temperatures}
        )


# --- writing ------------------------------------------------------------------------------------------


def write(
    path: Path | str,
    problem: Problem,
    recipe: Recipe,
    trail: Trail,
    about: Mapping[str, Any] | None = None,
    answer: tuple[str, Answer] | None = None,
) -> str:
    """Append the log of a solved problem.

    Args:
        about: JSON data for the header: run, digests of model and reward, versions.
        answer: the rule of the final selection, and what it gave.

    Returns:
        The sum of the last line, 16 hex digits: equal for equal logs.

    Raises:
        OSError: the file cannot be written.
    """
    told = {"id": problem.id, "fingerprint": problem.fingerprint, "text": problem.text}
    lines = list(_lines(recipe, trail, {"problem": told, "about": dict(about or {})}))
    if answer is not None:
        rule, chosen = answer
        lines.append({
            "event": "answer", "rule": rule, "value": chosen.value, "mass": chosen.mass, "margin": chosen.margin,
            "contested": chosen.contested, "id": chosen.node.id if chosen.node else None,
        })  # fmt: skip
    lines.append({"event": "end", "lines": len(lines) + 1})
    sum_ = ""
    for number, line in enumerate(lines, 1):
        line["line"] = number
        line["sum"] = sum_ = _sum(sum_, line)
    append_json_lines(path, lines)
    return sum_


def _sum(before: str, line: Line) -> str:
    text = json.dumps({k: v for k, v in line.items() if k not in ("sum", "crc")}, separators=(",", ":"))
    return hashlib.blake2b(f"{before} {text}".encode(), digest_size=8).hexdigest()


def _number(value: float) -> float | None:
    """JSON has neither NaN (no reward) nor infinity (the log of no weight)."""
    return float(value) if math.isfinite(value) else None


class _Names:
    """Numbers for nodes, in the order of their appearance; the empty solution is 0."""

    def __init__(self):
        self.number: dict[Node, int] = {}

    def new(self, node: Node) -> Iterator[Line]:
        """Lines for the nodes up to this one that have no number yet."""
        for step in node.path:
            if step not in self.number:
                self.number[step] = len(self.number) + 1
                yield {
                    "event": "node", "node": self.number[step], "parent": self.of(step.parent), "id": step.id,
                    "tokens": [int(token) for token in step.tokens], "text": step.text, "log_p": _number(step.log_p),
                    "r": _number(step.reward), "members": [_number(r) for r in step.members], "finish": step.finish,
                }  # fmt: skip

    def of(self, node: Node | None) -> int | None:
        return None if node is None else self.number.get(node, 0)


def _lines(recipe: Recipe, trail: Trail, more: Mapping[str, Any]) -> Iterator[Line]:
    """The log but its answer and its end, without numbers and sums."""
    yield {"event": "header", "format": FORMAT, **more, "recipe": asdict(recipe)}
    names = _Names()
    for sweep in range(max(map(len, trail.chains), default=0)):
        for chain, populations in enumerate(trail.chains):
            if sweep < len(populations):
                yield from _sweep(recipe, sweep, chain, populations[sweep], names)
        for swap in trail.swaps:
            if swap.sweep == sweep:
                yield {"event": "swap", **asdict(swap)}


def _sweep(recipe: Recipe, sweep: int, chain: int, population: Population, names: _Names) -> Iterator[Line]:
    n = len(population.nodes)
    conditional = sweep > 0  # the last slot is then the reference, which draws nothing
    potential = recipe.potential_of(chain)
    streams = recipe.draws_of(sweep, chain).streams(n)
    slots: list[Node | None] = [None] * n
    before, ticks = np.zeros(n), np.zeros(n, np.int64)
    place = {"sweep": sweep, "chain": chain}
    for t, round in enumerate(population.rounds, 1):
        weights, kept = normalized(round.log_weights), round.ancestors
        for slot, node in enumerate(round.nodes):
            yield from names.new(node)
            moved = node is not slots[slot]
            drew = moved and not (conditional and slot == n - 1)
            yield {
                "event": "particle", **place, "t": t, "slot": slot, "node": names.of(node),
                "g": _number(potential(node)) if moved else 0.0,
                "before": _number(before[slot]), "after": _number(round.log_weights[slot]), "W": float(weights[slot]),
                "stream": f"{int(streams[slot]):016x}" if drew else None, "tick": int(ticks[slot]) if drew else None,
                "ancestor": slot if kept is None else int(kept[slot]),
            }  # fmt: skip
            ticks[slot] += len(node.tokens) * drew
        for node in round.spliced:
            if node is not None:
                yield from names.new(node)
        ends = [names.of(node) for node in round.spliced]
        yield {
            "event": "round", **place, "t": t, "ess": float(round.ess), "temperature": float(round.temperature),
            "resampled": kept is not None, "survivors": round.survivors, **({"spliced": ends} if ends else {}),
        }  # fmt: skip
        slots[:], before = survivors(round), round.log_weights
        if kept is not None:
            before = smc.leftover(weights, normalized(round.log_weights / round.temperature))[kept]
    yield {
        "event": "sweep", **place, "log_z": _number(population.log_z), "status": population.status,
        "nodes": [names.of(node) for node in population.nodes],
        "weights": [_number(w) for w in population.log_weights],
    }  # fmt: skip


# --- replaying ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What is wrong with a log. line: in the file, from 1."""

    line: int
    what: str


@dataclass(frozen=True)
class Replay:
    """A log, computed again. findings: what does not agree, in the order of the file; none = it is exact.

    trail: what the algorithm did; None where too little is left of the log to run it. answer: the line of the
    answer as it was logged, if there is one.
    """

    problem: dict[str, Any]
    about: dict[str, Any]
    recipe: Recipe | None
    trail: Trail | None
    answer: Line | None
    findings: tuple[Finding, ...]

    @property
    def exact(self) -> bool:
        return not self.findings


def replay(path: Path | str) -> list[Replay]:
    """Compute every log of a file again.

    Raises:
        DataError: there is no such file, or no log in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Name an audit log of a run.") from error
    blocks: list[list[tuple[int, Line]]] = []
    torn: list[list[int]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            line: Any = json.loads(raw)
        except ValueError:
            line = None
        whole = isinstance(line, dict) and "event" in line
        if whole:
            line.pop(
                "crc", None
            )  # of the line alone; the running sums below know of lines that are missing, too
        if not blocks or (whole and line["event"] == "header"):
            blocks.append([])
            torn.append([])
        if whole:
            blocks[-1].append((number, line))
        else:
            torn[-1].append(number)
    if not any(blocks):
        raise DataError(
            f"{path} holds no audit log.", f"An audit log is called {FILE} and lies in a run's folder."
        )
    return [_replay(lines, bad) for lines, bad in zip(blocks, torn, strict=True)]


def _replay(lines: Sequence[tuple[int, Line]], torn: Sequence[int]) -> Replay:
    findings = [Finding(number, "is torn or no line of a log") for number in torn] + _broken(lines)
    events: dict[str, list[Line]] = {}
    for _, line in lines:
        events.setdefault(line["event"], []).append(line)
    head = events.get("header", [{}])[0]
    recipe, trail = None, None
    try:
        recipe = Recipe.of(head["recipe"])
        recorded = _Recorded(recipe, events)
        trail = recorded.run()
    except (KeyError, TypeError, ValueError, IndexError, AssertionError) as error:
        first = lines[0][0] if lines else torn[0]
        findings.append(Finding(first, f"cannot be replayed: what it needs is missing or wrong ({error})"))
    else:
        more = {"problem": head.get("problem"), "about": head.get("about")}
        findings += _differences(lines, list(_lines(recipe, trail, more)), recorded.lost)
    findings.sort(key=lambda f: f.line)
    answer = events.get("answer", [None])[-1]
    problem, about = head.get("problem") or {}, head.get("about") or {}
    return Replay(problem, about, recipe, trail, answer, tuple(findings))


def _broken(lines: Sequence[tuple[int, Line]]) -> list[Finding]:
    """Lines whose sum is not theirs, and gaps."""
    found, before, expected = [], "", 1
    for number, line in lines:
        if line.get("line") != expected:
            found.append(
                Finding(number, f"is line {line.get('line')} of its log; line {expected} is missing or moved")
            )
        elif line.get("sum") != _sum(before, line):
            found.append(Finding(number, f"was changed ({_place(line)}): its sum is that of another text"))
        before = str(line.get("sum"))
        place = line.get("line")
        expected = (place if isinstance(place, int) else expected) + 1
    if not lines or lines[-1][1]["event"] != "end":
        found.append(Finding(lines[-1][0] if lines else 1, "is the last: the log breaks off before its end"))
    return found


_PLACE = ("sweep", "chain", "t", "slot", "node")


def _place(line: Line) -> str:
    """What a line tells of, for people."""
    kind = line["event"]
    names = ("node",) if kind == "node" else _PLACE[:4]
    return " ".join([kind, *(f"{name} {line[name]}" for name in names if name in line)])


def _key(line: Line) -> tuple:
    kind = line["event"]
    return (kind, line.get("node")) if kind == "node" else (kind, *(line.get(name) for name in _PLACE[:4]))


def _differences(lines: Sequence[tuple[int, Line]], computed: Sequence[Line], lost: str) -> list[Finding]:
    """Where the logged lines are not those that were computed again."""
    again = {_key(line): line for line in computed}
    found: list[Finding] = []
    for number, line in lines:
        if line["event"] in ("answer", "end"):
            continue
        other = again.pop(_key(line), None)
        if other is None and not lost:
            found.append(Finding(number, f"{_place(line)}: the replay has no such thing"))
        for name, value in json.loads(json.dumps(other or {})).items():
            if line.get(name) != value:
                found.append(
                    Finding(number, f"{_place(line)}: {name} is {line.get(name)!r}, computed again {value!r}")
                )
    if lost:
        at = found[0].line if found else lines[-1][0]
        found.append(Finding(at, f"the replay goes another way from here: {lost}"))
    elif again:
        first = next(iter(again.values()))
        found.append(Finding(lines[-1][0], f"{_place(first)} is missing from the log"))
    if len(found) > SHOWN:
        found[SHOWN:] = [Finding(found[SHOWN].line, f"and {len(found) - SHOWN} differences more")]
    return found


class _Recorded:
    """Answers the requests of an algorithm from a log.

    A chunk is known by the stream and the tick that it was drawn by, which no other shares.
    """

    def __init__(self, recipe: Recipe, events: Mapping[str, Sequence[Line]]):
        self.recipe, self.lost = recipe, ""
        self._nodes: dict[int | None, Node | None] = {0: Node(None), None: None}
        for line in events.get("node", ()):
            reward, log_p = (math.nan if line[name] is None else line[name] for name in ("r", "log_p"))
            self._nodes[line["node"]] = Node(
                self._nodes[line["parent"]], line["tokens"], line["text"], log_p, reward, line["finish"],
                tuple(math.nan if r is None else r for r in line["members"]),
            )  # fmt: skip
        self._children: dict[tuple[int, int], Node] = {}
        self._streams: dict[tuple[int, int], list[int]] = {}
        slots: dict[tuple[int, int, int], dict[int, int]] = {}
        ticks: dict[int, int] = {}
        for line in events.get("particle", ()):
            slots.setdefault((line["sweep"], line["chain"], line["t"]), {})[line["slot"]] = line["node"]
            if line["stream"] is not None:  # which it is, and the tick, is computed and not believed
                node = self._known(line["node"])
                stream = self._stream(line["sweep"], line["chain"], line["slot"])
                tick = ticks.get(stream, 0)
                self._children[stream, tick] = node
                ticks[stream] = tick + len(node.tokens)
        self._ends: dict[tuple[Node, ...], list[Node | None]] = {}
        for line in events.get("round", ()):
            if "spliced" in line:
                there = slots[line["sweep"], line["chain"], line["t"]]
                prefixes = tuple(self._known(there[slot]) for slot in sorted(there))
                self._ends[prefixes] = [self._nodes[end] for end in line["spliced"]]
        statuses = [line["status"] for line in events.get("sweep", ())]
        self._halted = next((s for s in statuses if s not in ("finished", "dead")), "")

    def run(self) -> Trail:
        """What the recipe comes to over these nodes. Sets ``lost`` where it asks for a node that was never written."""
        algorithm = self.recipe.run(self._known(0))
        try:
            request = next(algorithm)
            while True:
                answer = self._answer(request)
                if answer is None:
                    algorithm.throw(Halted(self._halted or "lost"))
                    raise AssertionError("An algorithm went on after it was halted.")
                request = algorithm.send(answer)
        except StopIteration as end:
            return end.value

    def _answer(self, request: Request) -> Sequence[Node | None] | None:
        """None where there is none: it was halted here, or the log is not that of this recipe."""
        if isinstance(request, Extend):
            keys = zip(request.streams.tolist(), request.ticks.tolist(), strict=True)
            answer = [self._children.get(key) for key in keys]
            for parent, child in zip(request.nodes, answer, strict=True):
                if child is None:
                    if not self._halted:
                        self.lost = f"no chunk follows there at step {parent.step + 1}"
                    return None
                if child.parent is not parent:
                    self.lost = f"the chunk of step {child.step} was written behind another prefix"
                    return None
            return answer
        ends = self._ends.get(tuple(request.prefixes))
        if ends is None and not self._halted:
            self.lost = "the reference was not spliced there"
        return ends

    def _stream(self, sweep: int, chain: int, slot: int) -> int:
        if (sweep, chain) not in self._streams:
            draws = self.recipe.draws_of(sweep, chain)
            self._streams[sweep, chain] = draws.streams(self.recipe.filter.particles).tolist()
        streams = self._streams[sweep, chain]
        if not 0 <= slot < len(streams):
            raise ValueError(f"slot {slot} of {len(streams)} particles")
        return streams[slot]

    def _known(self, number: int) -> Node:
        node = self._nodes[number]
        assert node is not None
        return node
