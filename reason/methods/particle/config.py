"""The keys of particle filtering. Free of torch and numpy: ``show``, ``--help`` and ``--dry-run`` read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reason.backbones.source import settle
from reason.errors import ConfigError, unknown
from reason.keys import key

Stage = Literal["solve", "policy", "value"]
AlgorithmName = Literal["filter", "islands", "adaptive", "gibbs", "tempering"]
PotentialName = Literal["auto", "prob", "exp", "logit", "ratio", "self_certainty"]
Scheme = Literal["auto", "multinomial", "systematic", "stratified", "residual"]
Anneal = Literal["none", "ess", "entropy", "base"]
Rule = Literal["weighted_vote", "argmax_last", "majority", "reward_vote", "lineage_vote", "sample"]
Combination = Literal["mean", "pessimistic", "min", "median"]
CalibrationKind = Literal["auto", "none", "temperature", "platt", "isotonic"]
Aggregation = Literal["last", "min", "mean", "prod", "model"]

REWARDS = ("exact", "value", "prm", "certainty", "rules", "constant")
RIVALS = ("samples", "beam", "dvts")
TELESCOPING = ("prod", "min")  # rewards that repeat earlier steps: only their ratios may weigh a particle
POTENTIAL_OF = {  # of rewards as they are; one that is calibrated to how solutions end is a value, whatever it was before
    "value": "ratio", "exact": "logit", "prm": "logit", "rules": "logit", "certainty": "self_certainty", "constant": "logit",
}  # fmt: skip


def spelt(text: str) -> str:
    r"""``text`` with ``\n`` and ``\t`` as the characters that they stand for, as nobody can type these in a shell."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown(name, value, known)


@dataclass
class Noise:
    """How the exact judge of steps is made worse, see ``noise.Channel``. Everything is on the scale of log-odds."""

    sigma: float = key(0.0, "standard deviation of the noise in logits; 0 = none", evaluation=True)
    rho: float = key(0.0, "correlation of the noise from one step of a lineage to the next", evaluation=True)
    scale: float = key(1.0, "factor of the logits; above 1 = too sure", evaluation=True)
    bias: float = key(
        0.0, "standard deviation of a bias that all prefixes of a problem share", evaluation=True
    )
    bonus: float = key(
        0.0, "added for a step that is long or has a keyword: what could be exploited", evaluation=True
    )
    long: int = key(0, "tokens above which a step is long; 0 = no length counts", evaluation=True)
    keywords: list[str] = key([], "words that earn the bonus, separated by commas", evaluation=True)
    flips: float = key(0.0, "probability that a prefix is judged the wrong way round", evaluation=True)
    half_life: float = key(0.0, "steps in which sigma falls to a half; 0 = it stays", evaluation=True)
    margin: float = key(0.5, "logits that the judge gives a right prefix of one step", evaluation=True)
    margin_last: float = key(3.0, "logits that it gives one of margin_steps steps or more", evaluation=True)
    margin_steps: int = key(8, "steps over which the margin grows", evaluation=True)
    seed: int = key(0, "seed of the noise, which belongs to the problem and the prefix", evaluation=True)

    def __post_init__(self):
        for name in ("sigma", "scale", "bias", "half_life", "long", "margin", "margin_last"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} of the noise must not be below 0.")
        if not 0 <= self.rho <= 1:
            raise ConfigError(
                f"rho={self.rho} of the noise is a correlation from 0 (independent) to 1 (kept for ever)."
            )
        if not 0 <= self.flips <= 0.5:
            raise ConfigError(f"flips={self.flips} of the noise is a probability from 0 to 0.5.")
        if self.margin_steps < 1:
            raise ConfigError(f"margin_steps={self.margin_steps} of the noise must be at least 1.")

    @property
    def silent(self) -> bool:
        """Whether the judgement is to be given as it is: nothing is set that makes it worse."""
        return not (self.sigma or self.bias or self.bonus or self.flips) and self.scale == 1


@dataclass
class Reading:
    r"""How an external process reward model is asked (``prm.py``)."""

    kind: Literal["tokens", "causal", "sequence"] = key(
        "tokens", "tokens = a token classifier, read behind each step; causal = a language model, read at the "
        "probability of the token `good`; sequence = one score for a whole solution", evaluation=True,
    )  # fmt: skip
    aggregation: Aggregation = key(
        "last", "reward of a prefix from the scores of its steps; model = the prefix is given as one step (Puri et al.)",
        evaluation=True,
    )  # fmt: skip
    separator: str = key("\\n\\n", "what stands behind each step, as the model was trained", evaluation=True)
    good: str = key(
        "", "token (causal) or label that means right; empty = the second of two labels", evaluation=True
    )
    bad: str = key("", "token or label that means wrong; empty = all the rest", evaluation=True)
    prompt: str = key(
        "", "text before the solution, with {problem} in it; empty = its chat template", evaluation=True
    )
    system: str = key("", "what the system says in its chat template", evaluation=True)
    turns: bool = key(
        False, "each step is a turn of the chat, which the model answers with `good`", evaluation=True
    )
    source: str = key(
        "", "the reward model: folder or hub id", path="settled", evaluation=True,
        opened="reason.methods.particle.network:opened_prm",
    )  # fmt: skip

    def __post_init__(self):
        self.source = settle(self.source)
        one_of("kind of reward model", self.kind, ("tokens", "causal", "sequence"))
        one_of("aggregation of step scores", self.aggregation, ("last", "min", "mean", "prod", "model"))
        if self.kind == "sequence" and self.aggregation not in ("last", "model"):
            raise ConfigError(
                f"A sequence classifier gives one score for a whole solution; there are none of steps to take the {self.aggregation} of.",
                "Use the aggregation model, or a reward model that scores steps.",
            )
        if self.kind == "causal" and not self.good:
            raise ConfigError(
                "A causal reward model is read at a token that means right, and none is named.",
                "Name it, and the one that means wrong, such as + and -.",
            )
        if self.turns and (self.kind != "causal" or self.prompt):
            raise ConfigError(
                "Turns for each step are for causal reward models with a chat template.",
                "Leave turns off, or the prompt empty.",
            )
        if not (self.separator or self.turns or self.kind == "sequence"):
            raise ConfigError(
                "The separator behind a step is empty.", "Name the one that the model was trained with."
            )
        if self.prompt and "{problem}" not in self.prompt:
            raise ConfigError(
                "The prompt of the reward model lacks {problem}.", "Write where the problem goes."
            )

    @property
    def behind(self) -> str:
        """The separator, spelt."""
        return spelt(self.separator)


@dataclass
class RewardConfig:
    """What judges prefixes, and how its scores are read."""

    kind: str = key(
        "constant",
        "what judges a prefix; several, separated by commas, are an ensemble: exact = the dataset's own judge of steps; "
        "value = a value head on the policy's states; prm = another network; certainty = the policy's own probabilities; "
        "rules = the arithmetic that it writes down; constant = nothing does",
        evaluation=True,
    )
    source: str = key(
        "", "run that trained the value head: run:NAME, experiment:NAME or a folder", path="settled", evaluation=True,
        opened="reason.methods.particle.network:opened_value",
    )  # fmt: skip
    combine: Combination = key("mean", "ensemble: how log-odds become one reward", evaluation=True)
    caution: float = key(
        0.0, "ensemble: log-odds are divided by sqrt(1 + variance / caution) where members disagree; 0 = not",
        evaluation=True,
    )  # fmt: skip
    calibration: CalibrationKind = key(
        "auto", "correction fitted to how solutions of held-out problems end, step by step: log-odds divided by a temperature; "
        "platt = times a slope, plus an offset; isotonic; auto = platt, or none where the reward is exact "
        "or says nothing", evaluation=True,
    )  # fmt: skip
    ratings: str = key(
        "", "JSON lines of people's ratings of prefixes, answers to a run's questions.jsonl; empty = none", path="settled",
        evaluation=True, opened="reason.methods.particle.network:opened_ratings",
    )  # fmt: skip
    questions: int = key(
        0, "prefixes that people are to rate, written into the run's questions.jsonl each time that rewards are asked for: those "
        "about which a rating tells most", evaluation=True,
    )  # fmt: skip
    sensitivity: float = key(0.9, "how often a rater calls a right prefix right", evaluation=True)
    specificity: float = key(0.9, "how often a rater calls a wrong prefix wrong", evaluation=True)
    noise: Noise = field(default_factory=Noise)
    prm: Reading = field(default_factory=Reading)

    def __post_init__(self):
        self.source = settle(self.source)
        if self.ratings:
            self.ratings = str(Path(self.ratings).expanduser().absolute())
        for kind in self.kinds:
            one_of("particle.reward.kind", kind, REWARDS)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(
                f"particle.reward.kind={self.kind!r} must name rewards, each once.",
                f"Choose from {', '.join(REWARDS)}.",
            )
        if "constant" in self.kinds and len(self.kinds) > 1:
            raise ConfigError(
                "A constant reward has nothing to add to others.", "Leave it out of particle.reward.kind."
            )
        if "value" in self.kinds and not self.source:
            raise ConfigError(
                "particle.reward.kind=value needs a value head, and particle.reward.source names none.",
                "Use particle.reward.source=experiment:particle-value, or run:NAME of a run with particle.stage=value.",
            )
        if "prm" in self.kinds and not self.prm.source:
            raise ConfigError(
                "particle.reward.kind=prm needs a reward model, and particle.reward.prm.source names none.",
                "Name its folder or hub id, such as particle.reward.prm.source=Qwen/Qwen2.5-Math-PRM-7B.",
            )
        if not self.noise.silent and "exact" not in self.kinds:
            raise ConfigError(
                f"particle.reward.noise makes the exact judge worse, and particle.reward.kind is {self.kind}.",
                "Use particle.reward.kind=exact, or leave the noise out.",
            )
        for name in ("caution", "questions"):
            if getattr(self, name) < 0:
                raise ConfigError(f"particle.reward.{name}={getattr(self, name):g} must not be below 0.")
        a, b = self.sensitivity, self.specificity
        if not (0 < a < 1 and 0 < b < 1 and a + b > 1):
            raise ConfigError(
                f"particle.reward.sensitivity={a:g} and particle.reward.specificity={b:g} must lie between 0 and 1, and add up to more "
                "than 1: else ratings are no better than chance.",
                "Nobody is always right; 0.99 is near it.",
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, self.kind.split(","))))

    @property
    def sure(self) -> bool:
        """Whether there is nothing to calibrate: the reward is exact, or says nothing of right and wrong."""
        exact = self.kinds == ("exact",) and self.noise.silent
        return exact or self.kinds in (("constant",), ("certainty",))


@dataclass
class ValueConfig:
    """How a value head is trained (particle.stage=value)."""

    solutions: int = key(8, "solutions sampled of each training problem, whose prefixes the head learns from")
    problems: int = key(400, "training problems that solutions are sampled of; 0 = all")
    completions: int = key(
        0,
        "a prefix is labelled by the share of so many completions that end right (Math-Shepherd); 0 = by its own end",
    )
    hidden: int = key(32, "width of the head's hidden layer; 0 = it is linear")

    def __post_init__(self):
        for name, least in (("solutions", 1), ("problems", 0), ("completions", 0), ("hidden", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"particle.value.{name}={getattr(self, name)} must be at least {least}.")


@dataclass
class ServerConfig:
    """A server that writes in the policy's place, see docs/servers.md. Only its model's name is part of a result's identity."""

    url: str = key("", "address of a server with OpenAI's completions, such as http://localhost:8000; empty = none", path="settled", opened="reason.methods.particle.network:opened_server")  # fmt: skip
    model: str = key("", "name of its model; empty = the only one it has")
    tokenizer: str = key(
        "", "tokenizer of its model: folder or hub id", path="settled", opened="reason.methods.particle.network:opened_tokenizer"
    )  # fmt: skip
    api_key: str = key("", "environment variable that holds the key of its API; empty = none")
    context: int = key(0, "tokens that a text can have; 0 = as the server says")
    concurrency: int = key(32, "requests at once")
    timeout: float = key(300.0, "seconds that a request may take")
    retries: int = key(6, "how often a request that failed is tried again")

    def __post_init__(self):
        self.tokenizer = settle(self.tokenizer)
        if bool(self.url) != bool(self.tokenizer):
            raise ConfigError(
                "particle.server needs both: the address of the server, and the tokenizer of its model.",
                "For example particle.server.url=http://localhost:8000 particle.server.tokenizer=Qwen/Qwen2.5-Math-1.5B-Instruct.",
            )


@dataclass
class BudgetConfig:
    """What solving may cost. Whoever is at work when a cap is reached answers with what there is."""

    tokens: int = key(0, "tokens drawn for a problem at most; 0 = no cap", evaluation=True)
    seconds: float = key(0.0, "seconds for all problems of a predict call; 0 = no cap", evaluation=True)
    money: float = key(
        0.0, "cost of all problems of a predict call, in the currency of price; 0 = no cap", evaluation=True
    )
    price: float = key(0.0, "price of a million tokens, drawn or read", evaluation=True)

    def __post_init__(self):
        for name in ("tokens", "seconds", "money", "price"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"particle.budget.{name}={getattr(self, name)} must not be below 0.", "0 = no cap."
                )
        if self.money and not self.price:
            raise ConfigError(
                "particle.budget.money is a cap on what tokens cost, and particle.budget.price is 0.",
                "Give the price of a million tokens.",
            )


@dataclass
class ParticleConfig:
    """The paper is Puri et al., arXiv 2502.01618; "ours" is a choice of this platform."""

    stage: Stage = key(
        "solve",
        "solve = trains nothing; policy = trains the language model on worked solutions; value = trains a value head on "
        "solutions that the language model samples",
    )

    prompt: Literal["auto", "plain", "chat"] = key(
        "auto",
        "plain = the problem and a new line; chat = the model's chat template; auto = chat where there is one",
    )
    system: str = key("", "what the system says in the chat template; empty = nothing")
    temperature: float = key(0.8, "sampling temperature of the language model (paper)")
    top_p: float = key(1.0, "tokens are drawn from the most probable ones with this mass together (paper: 1)")
    separator: str = key(
        "\\n\\n", "what ends a step (paper: a blank line); \\n stands for a new line; empty = none"
    )
    chunk: int = key(256, "tokens of a step at most (ours)")
    steps: int = key(40, "steps of a solution at most (paper)")
    length: int = key(0, "tokens of a solution at most; 0 = as many as the model has room for")
    boxed: bool = key(
        True, "a closed \\boxed{...} ends a solution (ours; the paper's code ends at an open one)"
    )

    algorithm: AlgorithmName = key(
        "filter",
        "filter = one particle filter; islands = several side by side; adaptive = islands one after another, until the "
        "answer is settled or there are depth particles (ours); gibbs = particle Gibbs; tempering = parallel tempering "
        "with swaps (paper, section 3; swaps as ours)",
        evaluation=True,
    )
    start: int = key(
        4, "adaptive: particles of the first island; each further one doubles their number", evaluation=True
    )
    confidence: float = key(
        0.95, "adaptive: probability that the leading answer has more than half of all votes, at which it is settled",
        evaluation=True,
    )  # fmt: skip
    sweeps: int = key(4, "gibbs, tempering: sweeps; the first is a particle filter", evaluation=True)
    burn_in: int = key(1, "gibbs, tempering: sweeps whose particles do not vote (ours)", evaluation=True)
    chains: int = key(4, "islands, tempering: how many", evaluation=True)
    hottest: float = key(
        4.0, "tempering: reward temperature of the hottest chain; geometric down to tau", evaluation=True
    )
    ancestor_sampling: bool = key(
        False, "gibbs, tempering: draw the reference's past anew (PGAS)", evaluation=True
    )
    potential: PotentialName = key(
        "auto",
        "weight of a step from the rewards r: prob = r; exp = e^r; logit = odds of r; ratio = r over the r before; "
        "self_certainty = odds of the mean token probability; auto = ratio for a calibrated reward or a value head, prob for an "
        "exact one, else logit",
        evaluation=True,
    )
    tau: float = key(1.0, "temperature that log-potentials are divided by (paper)", evaluation=True)
    clip: float = key(
        1e-4, "rewards nearer to 0 or 1 than this are moved to it (ours; paper's code: 1e-7)", evaluation=True
    )
    resampling: Scheme = key(
        "auto", "auto = systematic, and multinomial for gibbs and tempering (ours; paper's code: multinomial)",
        evaluation=True,
    )  # fmt: skip
    threshold: float = key(
        0.5, "resample where the effective sample size is at most this share of the particles; 1 = after every step "
        "(paper), 0 = never", evaluation=True,
    )  # fmt: skip
    first: int = key(1, "steps before which nothing is resampled", evaluation=True)
    anneal: Anneal = key(
        "none", "entropic particle filtering: how collapsed weights are flattened early (arXiv 2510.05825)",
        evaluation=True,
    )  # fmt: skip
    final_selection: Rule = key(
        "weighted_vote", "how the final particles answer; all rules are reported (ours; the paper's code: argmax_last)",
        evaluation=True,
    )  # fmt: skip

    rivals: list[str] = key(
        list(RIVALS),
        "what is run beside it: samples (self-consistency and best-of-n), beam, dvts",
        evaluation=True,
        aside=True,
    )
    beam_width: int = key(
        4,
        "beam, dvts: children of a beam, or the largest number below that divides the beams (Beeching et al. 2024)",
        evaluation=True,
    )
    together: int = key(
        256, "particles that are decoded together, over all problems", evaluation=True, aside=True
    )
    record: int = key(
        20,
        "test problems whose particles are written to audit.jsonl, replayable",
        evaluation=True,
        aside=True,
    )

    server: ServerConfig = field(default_factory=ServerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self):
        for name, least in (
            ("chunk", 1), ("steps", 1), ("length", 0), ("sweeps", 1), ("burn_in", 0), ("chains", 1), ("first", 1),
            ("beam_width", 1), ("together", 1), ("record", 0), ("start", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"particle.{name}={getattr(self, name)} must be at least {least}.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"particle.temperature={self.temperature:g} must not be below 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(
                f"particle.top_p={self.top_p:g} is a share: above 0, at most 1.", "1 keeps all tokens."
            )
        if self.tau <= 0:
            raise ConfigError(
                f"particle.tau={self.tau:g} must be above 0.",
                "A very small one prunes by the reward alone, as beam search does.",
            )
        if not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"particle.threshold={self.threshold:g} is a share of the particles, from 0 to 1."
            )
        if not 0.5 < self.confidence <= 1:
            raise ConfigError(
                f"particle.confidence={self.confidence:g} must be above 0.5 and at most 1.",
                "1 never stops before the cap.",
            )
        if not 0 <= self.clip < 0.5:
            raise ConfigError(f"particle.clip={self.clip:g} must be at least 0 and below 0.5.")
        for rival in self.rivals:
            one_of("particle.rivals", rival, RIVALS)
        self._check_several()
        if (
            self.reward.prm.aggregation in TELESCOPING
            and "prm" in self.reward.kinds
            and self.weighing != "ratio"
        ):
            raise ConfigError(
                f"With the aggregation {self.reward.prm.aggregation} every reward repeats the scores of all earlier steps, and "
                f"the potential {self.weighing} would weigh them anew in each round.",
                "Use particle.potential=ratio, or particle.reward.prm.aggregation=last.",
            )

    def _check_several(self) -> None:
        several = self.algorithm in ("gibbs", "tempering")
        if several and self.burn_in >= self.sweeps:
            raise ConfigError(
                f"particle.burn_in={self.burn_in} leaves none of {self.sweeps} sweeps to vote.",
                f"Use particle.burn_in={self.sweeps - 1} or less.",
            )
        if self.algorithm == "tempering" and not (self.chains > 1 and self.hottest > self.tau):
            raise ConfigError(
                f"Parallel tempering needs 2 chains or more, the hottest above tau; there are particle.chains={self.chains} and "
                f"particle.hottest={self.hottest:g} with particle.tau={self.tau:g}.",
                "For example particle.chains=4 particle.hottest=4.",
            )
        if several and self.ancestor_sampling and self.resampling not in ("auto", "multinomial"):
            raise ConfigError(
                f"Ancestor sampling draws one parent by itself, which {self.resampling} resampling does not allow.",
                "Use particle.resampling=multinomial with it.",
            )

    def settle(self, config: Any, origin: Mapping[str, str]) -> None:
        """Refuse particles that cannot differ, and too few of them for a reference."""
        if self.temperature == 0 and config.depth > 1:
            raise ConfigError(
                f"particle.temperature=0 writes the same solution {config.depth} times: copies never part.",
                "Use a temperature such as 0.8, or depth=1.",
            )
        if self.algorithm in ("gibbs", "tempering"):
            if config.depth < 2:
                raise ConfigError(
                    f"particle.algorithm={self.algorithm} needs 2 particles or more, one of them the reference; depth={config.depth}.",
                    "Use depth=8 or more: with few, the reference hardly moves.",
                )
            if config.eval.curve and origin.get("eval.curve") == "command line":
                raise ConfigError(
                    f"eval.curve=true asks for one particle too, and particle.algorithm={self.algorithm} needs two.",
                    "Leave it out, and sweep depth=2,4,8 instead.",
                )
            config.eval.curve = False
        if self.server.url:
            self._settle_server(config, origin)
        if self.stage == "value" and not config.backbone.source:
            raise ConfigError(
                "particle.stage=value trains a head on the states of a trained language model, and backbone.source names none.",
                "Use backbone.source=experiment:particle-policy, or a model of your own.",
            )

    def _settle_server(self, config: Any, origin: Mapping[str, str]) -> None:
        """The server has the model: there is no other, and nothing of it to train or to read values from."""
        if self.stage != "solve":
            raise ConfigError(
                f"particle.stage={self.stage} trains on a model in this process, and particle.server.url names a server.",
                "Leave the server out.",
            )
        if config.backbone.source and not origin.get("backbone.source", "").startswith(
            ("preset", "recorded")
        ):
            raise ConfigError(
                "backbone.source and particle.server.url both name a policy.", "Leave one of them out."
            )
        config.backbone.source = ""
        if "value" in self.reward.kinds:
            raise ConfigError(
                "A value head reads the states of the policy, which a server does not show.",
                "Use another reward: particle.reward.kind=prm with particle.reward.prm.source, or certainty, rules, exact.",
            )
        if self.ancestor_sampling:
            raise ConfigError(
                "Ancestor sampling scores given tokens, which a server does not.",
                "Use particle.ancestor_sampling=false.",
            )

    @property
    def trains(self) -> bool:
        """Whether a run of this stage trains anything."""
        return self.stage != "solve"

    def at_most(self, config: Any) -> dict[str, float]:
        """Counters of one problem, whatever is written: the tokens of all particles, and the operations for them where the sizes
        of the policy are those of the configuration."""
        solution = min(
            self.length or config.backbone.context, self.steps * self.chunk, config.backbone.context
        )
        times = self.sweeps if self.algorithm in ("gibbs", "tempering") else 1
        times *= self.chains if self.algorithm in ("islands", "tempering") else 1
        tokens = min(float(config.depth * times * solution), float(self.budget.tokens or math.inf))
        return {"tokens": tokens}

    @property
    def weighing(self) -> str:
        """The potential that is meant."""
        if self.potential != "auto":
            return self.potential
        if self.reward.kinds == ("exact",) and self.reward.noise.silent:
            return "prob"
        return "ratio" if self.fitting else POTENTIAL_OF[self.reward.kinds[0]]

    @property
    def scheme(self) -> str:
        """The resampling that is meant."""
        if self.resampling != "auto":
            return self.resampling
        return "multinomial" if self.algorithm in ("gibbs", "tempering") else "systematic"

    @property
    def fitting(self) -> str:
        """The calibration that is meant; "" = none."""
        kind = self.reward.calibration
        if kind == "auto":
            return "" if self.reward.sure else "platt"
        return "" if kind == "none" else kind
