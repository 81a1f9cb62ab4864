"""A distribution that adds two methods and a backbone by entry points, as anybody's would. Importing it is cheap.

``voting`` trains nothing: it draws guesses of the next item from one network, has a second one rate them, and lets
them vote; depth is the number of guesses. ``probe`` trains a head on frozen item vectors; depth is how often the state
is read.
"""

from dataclasses import dataclass, field

from reason.backbones.base import BackboneCard
from reason.keys import key
from reason.methods.base import DepthAxis, MethodCard, Units


@dataclass
class SamplerConfig:
    name: str = key("sampler", "the backbone")
    sharpness: float = key(1.0, "how much likelier a frequent item is drawn than a rare one; 0 = all alike")


@dataclass
class RewardConfig:
    name: str = key("sampler", "the backbone that rates the guesses")
    sharpness: float = key(3.0, "how much higher a frequent item is rated than a rare one")


@dataclass
class VotingConfig:
    reward: RewardConfig = field(default_factory=RewardConfig)
    rounds: int = key(1, "guesses that count as one", evaluation=True)


@dataclass
class ProbeConfig:
    width: int = key(8, "numbers that describe an item")


sampler = BackboneCard(
    "sampler", "Items by their frequency.", "sampler", SamplerConfig, "voting.methods:Sampler"
)

voting = MethodCard(
    name="voting",
    summary="Guesses the next item several times and lets the guesses vote.",
    paper="none",
    Config=VotingConfig,
    depth=DepthAxis("guesses", least=1, default=4, zero="one guess", bound=False, curve="powers"),
    view="sequences",
    units=Units("user", "hit rate", "one answer", "users/s"),
    target="voting.methods:Voting",
    backbone="sampler",
    dataset="synthetic-interactions",
    trains=False,
)

probe = MethodCard(
    name="probe",
    summary="Trains a head on item vectors that stay as they are.",
    paper="none",
    Config=ProbeConfig,
    depth=DepthAxis("readings", least=0, default=2, zero="no reading"),
    view="sequences",
    units=Units("user", "hit rate", "one answer", "users/s"),
    target="voting.methods:Probe",
    backbone="sampler",
    dataset="synthetic-interactions",
)
