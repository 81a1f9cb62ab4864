"""External process reward models: another network that reads problem and solution, and scores the steps.

Three kinds are in use, all of them opened by transformers, without code of the model's own:

    tokens      a token classifier, read at the separator behind each step (PRMs of TRL, Qwen-style)
    causal      a language model, read at the probability of a token such as "+" against "-" (Math-Shepherd, RLHFlow)
    sequence    a sequence classifier: one score for all that it has read (outcome reward models)

A prefix is read once and its reward is remembered; a reward is a function of the prefix alone. Where the text of a prefix is how that
of a longer one begins, and the model is a decoder, only new steps are read: keys and values of prefixes are kept. Scores are
log-odds in float64 until the end, so that a sure one does not become 1.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from reason.backbones.cache import RowCache
from reason.backbones.source import folder_of
from reason.backbones.tokens import Tokens
from reason.errors import ConfigError, DataError, RunError, unknown
from reason.methods.particle.config import Reading
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node
from reason.methods.particle.rewards import Remembered

KINDS = ("tokens", "causal", "sequence")


def aggregate(log_odds: np.ndarray, aggregation: str) -> float:
    """The reward, in [0, 1], of a prefix whose steps have these scores (t,)."""
    if aggregation in ("last", "model"):
        return float(expit(log_odds[-1]))
    r = expit(log_odds)
    return float({"min": np.min, "mean": np.mean, "prod": np.prod}[aggregation](r))


class ProcessRewardModel:
    """A reward model as a reward. ``Remembered`` by whoever opens it with ``open_prm``.

    Args:
        model: of transformers, with a head for its kind. tokens: its tokenizer.
        reading: how it is asked.
        seen: fingerprints of problems that it is known to be trained on.
        rows, most: prefixes of a pass at most, and their tokens.
        keep: prefixes whose keys and values are kept, those last used; 0 = none.

    Raises:
        ConfigError: a token or label that it does not have.
    """

    def __init__(
        self, model: Any, tokens: Tokens, reading: Reading, *, seen: frozenset[str] = frozenset(), rows: int = 64,
        most: int = 32_768, keep: int = 256, where: str = "the reward model",
    ):  # fmt: skip
        self.model, self.tokens, self.reading, self.where = model.eval(), tokens, reading, where
        self.seen, self.rows, self.most = seen, rows, most
        self.read = self.passes = 0  # tokens, and passes over them
        added = {token.content: i for i, token in tokens.tokenizer.get_added_tokens_decoder().items()}
        self._special = added.get(reading.behind)  # a token that no text spells
        self._log_odds = self._reader()
        self._keep, self._kept = keep, OrderedDict[tuple[str, str], _Kept]()
        self._cache = self._row_cache() if keep else None

    @property
    def parameters(self) -> int:
        """Weights that a token meets: all but the table of embeddings, in which it is looked up."""
        table = self.model.get_input_embeddings().weight.numel()
        return sum(p.numel() for p in self.model.parameters()) - table

    @torch.inference_mode()
    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n,)

        Raises:
            DataError: a prefix that is longer than the model reads.
            RunError: scores that are too few, or no numbers.
        """
        return np.array([aggregate(z, self.reading.aggregation) for z in self.step_scores(prefixes)])

    @torch.inference_mode()
    def step_scores(self, prefixes: Sequence[Prefix]) -> list[np.ndarray]:
        """For each prefix the log-odds (t,) that its steps are right: one for each, or one in all (model, sequence)."""
        asked = [self._asked(prefix) for prefix in prefixes]
        found = self._anew(asked) if self._cache is None else self._further(self._cache, prefixes, asked)
        for prefix, z in zip(prefixes, found, strict=True):
            bad = np.flatnonzero(~np.isfinite(z))
            if len(bad):
                raise RunError(
                    f"{self.where} gave {z[bad[0]]} for problem {prefix.problem.id!r}, step {bad[0] + 1}.",
                    "Its weights are damaged, or its precision is too low: use float32.",
                )
        return found

    # --- what it is given -------------------------------------------------------------------------------

    def _asked(self, prefix: Prefix) -> tuple[list[int], list[int]]:
        """Token ids, and at which of them the steps are scored."""
        steps = _steps(prefix.node)
        if self.reading.aggregation == "model" or self.reading.kind == "sequence":
            steps = ["\n".join(filter(None, steps))]
        if self.reading.turns:
            ids, at = self._in_turns(prefix.problem.text, steps)
        else:
            front = self._front(prefix.problem.text)
            body, behind = self._separated(steps)
            ids, at = front + body, [len(front) + k for k in behind]
        if len(ids) > self._context:
            raise DataError(
                f"Problem {prefix.problem.id!r} and its solution have {len(ids):,} tokens at step {prefix.node.step}; "
                f"{self.where} reads {self._context:,}.",
                "Use a reward model with a longer context, or shorter solutions.",
            )
        if len(set(at)) != len(steps):
            raise RunError(
                f"{self.where} scores {len(set(at))} of {len(steps)} steps of problem {prefix.problem.id!r} at step "
                f"{prefix.node.step}: its tokenizer joins {self.reading.behind!r} with what is beside it.",
                "Name the separator that the model was trained with, best a token of its own.",
            )
        return ids, at

    def _front(self, problem: str) -> list[int]:
        if self.reading.prompt:
            return self.tokens.prompt(self.reading.prompt.replace("{problem}", problem))
        return self.tokens.chat(self._opening(problem))

    def _opening(self, problem: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.reading.system}] if self.reading.system else []
        return [*system, {"role": "user", "content": problem}]

    def _separated(self, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Steps with a separator behind each, and the place of each separator's last token."""
        if self.reading.kind == "sequence":
            ids = self.tokens.encode(steps)[0][0]
            return ids, [len(ids) - 1]
        if self._special is not None:
            ids, at = [], []
            for step, _ in self.tokens.encode(steps):
                ids += [*step, self._special]
                at.append(len(ids) - 1)
            return ids, at
        text, ends = "", []
        for step in steps:
            text += step + self.reading.behind
            ends.append(len(text))
        ids, spans = self.tokens.encode([text])[0]
        at = []
        for (
            end
        ) in ends:  # the token in which the separator's last character lies, and nothing of the next step
            own = [k for k, (first, last) in enumerate(spans) if first < end <= last]
            at += own[-1:] if own and spans[own[-1]][1] == end else []
        return ids, at

    def _in_turns(self, problem: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """A chat in which each step is a turn, and the places where the model answers."""
        messages = self._opening(problem)
        ids: list[int] = []
        at: list[int] = []
        for i, step in enumerate(steps):
            if i == 0:
                messages[-1]["content"] = f"{problem} {step}"
            else:
                messages += [
                    {"role": "assistant", "content": self.reading.good},
                    {"role": "user", "content": step},
                ]
            before, ids = ids, self.tokens.chat(messages)
            if ids[: len(before)] == before:
                at.append(len(ids) - 1)
        return ids, at

    # --- what it says -----------------------------------------------------------------------------------

    @property
    def _context(self) -> int:
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 2**20

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Cut into passes of similar lengths; a sequence classifier looks for the last token, so of equal ones."""
        groups: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            group = groups[-1] if groups else None
            if (
                group is None
                or len(group) >= self.rows
                or (len(group) + 1) * lengths[i] > self.most
                or (self.reading.kind == "sequence" and lengths[group[0]] != lengths[i])
            ):
                groups.append([i])
            else:
                group.append(i)
        return groups

    def _anew(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """Scores of whole texts."""
        found: list[np.ndarray] = [np.zeros(0)] * len(asked)
        for group in self._groups([len(ids) for ids, _ in asked]):
            for i, z in zip(group, self._pass([asked[i] for i in group]), strict=True):
                found[i] = z
        return found

    def _pass(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        longest = max(len(ids) for ids, _ in asked)
        tokens = torch.zeros(len(asked), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, (ids, _) in enumerate(asked):
            tokens[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
        self.read, self.passes = self.read + int(mask.sum()), self.passes + 1
        device = self.model.device
        out = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits
        if self.reading.kind == "sequence":
            return [self._log_odds(row[None]) for row in out]
        return [
            self._log_odds(row[torch.tensor(at, device=device)])
            for row, (_, at) in zip(out, asked, strict=True)
        ]

    def _row_cache(self) -> RowCache | None:
        """A cache, where prefixes begin with the tokens of shorter ones and the model can go on from them."""
        reading = self.reading
        if (
            self._special is None
            or reading.kind == "sequence"
            or reading.aggregation == "model"
            or reading.turns
        ):
            return None
        if reading.kind == "tokens":
            if not hasattr(self.model, "score"):  # what decoders call their head
                return None
            self.model.get_output_embeddings = lambda: self.model.score
        try:
            return RowCache(self.model, self._context)
        except ConfigError:  # it looks ahead, or keeps something else: it is read whole
            return None

    def _further(
        self, cache: RowCache, prefixes: Sequence[Prefix], asked: Sequence[tuple[list[int], list[int]]]
    ) -> list[np.ndarray]:
        """Scores of texts, of which only what is new is read."""
        fronts = {p.problem.fingerprint: p.problem for p in prefixes if not self._longest(p)}
        if fronts:
            texts = [self._front(problem.text) for problem in fronts.values()]
            for name, row, ids in zip(fronts, cache.open(texts)[0], texts, strict=True):
                self._kept[name, _ROOT] = _Kept(row, ids, np.zeros(0))
            self.read += sum(map(len, texts))
        begun = [self._longest(prefix) for prefix in prefixes]
        rest = [ids[len(kept.ids) :] for (ids, _), kept in zip(asked, begun, strict=True)]  # type: ignore[union-attr]
        found = [kept.scores for kept in begun]  # type: ignore[union-attr]
        longer = sorted((i for i in range(len(rest)) if rest[i]), key=lambda i: len(rest[i]))
        for first in range(0, len(longer), self.rows):
            group = longer[first : first + self.rows]
            befores = [len(begun[i].ids) for i in group]  # type: ignore[union-attr]
            rows = cache.fork([begun[i].row for i in group], befores)  # type: ignore[union-attr]
            states = cache.read(rows, [rest[i] for i in group], keep=True)
            self.read, self.passes = self.read + sum(len(rest[i]) for i in group), self.passes + 1
            for i, row, before, state in zip(group, rows, befores, states, strict=True):
                ids, at = asked[i]
                new = torch.tensor([k - before for k in at if k >= before], device=state.logits.device)
                found[i] = np.concatenate([found[i], self._log_odds(state.logits[new])])
                key = prefixes[i].problem.fingerprint, prefixes[i].node.id
                if prefixes[i].node.finished or key in self._kept:
                    cache.close([row])
                else:
                    self._kept[key] = _Kept(row, ids, found[i])
        while len(self._kept) > self._keep:
            cache.close([self._kept.popitem(last=False)[1].row])
        return found

    def _longest(self, prefix: Prefix) -> _Kept | None:
        """The longest beginning of a prefix that is kept."""
        name, node = prefix.problem.fingerprint, prefix.node
        while node is not None:
            key = (name, node.id if node.parent else _ROOT)
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            node = node.parent
        return None

    def _reader(self) -> Callable[[Tensor], np.ndarray]:
        """Turns outputs (t, labels or vocabulary) into log-odds (t,) of right against wrong."""
        if self.reading.kind == "causal":
            good = self._token(self.reading.good)
            if self.reading.bad:
                bad = self._token(self.reading.bad)
                return lambda x: (x[:, good].double() - x[:, bad].double()).cpu().numpy()
            return lambda x: _against_rest(x, good)
        labels = {int(k): str(v) for k, v in self.model.config.id2label.items()}
        if len(labels) == 1 and not self.reading.good:
            return lambda x: x[:, 0].double().cpu().numpy()
        good = self._label(labels)
        return lambda x: _against_rest(x, good)

    def _label(self, labels: dict[int, str]) -> int:
        name = self.reading.good
        if not name and len(labels) == 2:
            return 1
        if name in labels.values():
            return next(k for k, v in labels.items() if v == name)
        if re.fullmatch(r"\d+", name) and int(name) in labels:
            return int(name)
        if not name:
            raise ConfigError(
                f"{self.where} has {len(labels)} labels: {', '.join(labels.values())}.",
                "Name the one that means right.",
            )
        raise unknown("label of the reward model", name, labels.values())

    def _token(self, text: str) -> int:
        special = self.tokens.tokenizer.token_to_id(text)
        ids = [special] if special is not None else self.tokens.encode([text])[0][0]
        if len(ids) > 1 and self.tokens.decode(ids[:1]).strip() == "":
            ids = ids[1:]  # the mark of a word's beginning
        if len(ids) != 1:
            raise ConfigError(
                f"{text!r} is {len(ids)} tokens of {self.where}; a score is read at one.",
                "Name the token that the model was trained to answer with.",
            )
        return int(ids[0])


_ROOT = ""


@dataclass(frozen=True)
class _Kept:
    """A prefix that was read: its row in the cache, its tokens, the scores of its steps."""

    row: int
    ids: list[int]
    scores: np.ndarray


def _against_rest(x: Tensor, good: int) -> np.ndarray:
    """Log-odds of one output against all others, (t,)."""
    x = x.double()
    rest = torch.cat([x[:, :good], x[:, good + 1 :]], 1).logsumexp(1)
    return (x[:, good] - rest).cpu().numpy()


def _steps(node: Node) -> list[str]:
    """The texts of the chunks up to here, without the separators of the policy. One that says nothing joins the one before."""
    texts = [step.text.strip("\n") for step in node.path]
    return [text for i, text in enumerate(texts) if text.strip() or i == 0]


# --- opening one ----------------------------------------------------------------------------------------


def open_prm(
    source: str, reading: Reading, *, dtype: str = "float32", offline: bool = False, device: Any = "cpu",
    seen: frozenset[str] = frozenset(),
) -> Remembered:  # fmt: skip
    """A reward model from a folder or the hub, whose rewards are remembered.

    Raises:
        ConfigError: no such source, or a model of another kind.
        DataError: it cannot be fetched; its files are broken, or its head has no weights.
    """
    folder, where = folder_of(source, offline)
    model = load(folder, where, reading.kind, getattr(torch, dtype)).to(device)
    return Remembered(ProcessRewardModel(model, Tokens.from_folder(folder), reading, seen=seen, where=where))


def load(folder: Path, where: str, kind: str, dtype: torch.dtype) -> Any:
    """The model of transformers with a head of this kind."""
    import transformers
    from transformers.utils import logging

    opener = {
        "tokens": transformers.AutoModelForTokenClassification,
        "causal": transformers.AutoModelForCausalLM,
        "sequence": transformers.AutoModelForSequenceClassification,
    }[kind]
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, said = opener.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever a file of somebody else's writing can lead a library to
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{where} cannot be opened as a reward model ({kind}): {first}",
            "Models with code of their own are not opened; save it with save_pretrained of transformers.",
        ) from error
    finally:
        if bar:
            logging.enable_progress_bar()
    if missing := sorted(map(str, said.get("missing_keys") or ())):
        raise DataError(
            f"{where} has no weights named {missing[0]}: it was not trained as a reward model of kind {kind!r}.",
            f"Choose its kind: {', '.join(KINDS)}.",
        )
    return model
