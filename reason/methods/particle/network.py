"""The networks of a run: the policy that writes, and the value head that judges what it writes.

A value head reads the states of the policy that it was trained on and of no other, so a run that trained one keeps the
digest of that policy, and which problems it has seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from reason.backbones.connection import Address
from reason.backbones.from_run import again, identity_of, model_file, read_file
from reason.backbones.server import Server
from reason.backbones.source import folder_of, kind, run_of
from reason.backbones.tokens import Tokens
from reason.backbones.weights import digest_of, read_tensors
from reason.errors import ConfigError, DataError
from reason.files import Altered, sha256, write_json
from reason.methods.particle.config import ServerConfig
from reason.methods.particle.value import ValueHead

VALUE = "value.json"  # in the folder of a run that trains a head
TRAINED_ON = "trained_on.json"  # in that of a run that trains a policy
HEAD = "head."


class Policy(nn.Module):
    """A language model and, where there is one, a value head.

    Args:
        lm: of ``backbones.causal``. head: reads its states.
        trains: which of them a run trains: "lm", "head" or "".
    """

    def __init__(self, lm: Any, head: ValueHead | None = None, trains: str = ""):
        super().__init__()
        self.lm, self.head = lm, head
        for name, part in (("lm", lm), ("head", head)):
            if part is not None:
                part.requires_grad_(name == trains)


@dataclass(frozen=True)
class ValueSource:
    """A value head that a run has trained, not yet in memory.

    width, hidden: see ``ValueHead``. policy: digest of the language model. seen: fingerprints of the problems.
    """

    weights: Path
    width: int
    hidden: int
    policy: str
    seen: frozenset[str]
    where: str

    @cached_property
    def digest(self) -> str:
        """sha256 of its weights, its policy and what it has seen."""
        told = f"{digest_of(self.tensors().items())} {self.policy} {sorted(self.seen)}"
        return hashlib.sha256(told.encode()).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        try:
            found, _ = read_tensors(self.weights)
        except (OSError, ValueError, SafetensorError, Altered) as error:
            raise DataError(
                f"{self.weights} cannot be read: {error}.", again(self.weights.parent.parent)
            ) from error
        return {name.removeprefix(HEAD): t for name, t in found.items() if name.startswith(HEAD)}

    def load(self) -> ValueHead:
        """The head, in memory."""
        head = ValueHead(self.width, self.hidden)
        try:
            head.load_state_dict(self.tensors())
        except RuntimeError as error:
            raise DataError(
                f"The weights of {self.where} do not fit its {VALUE}.", again(self.weights.parent.parent)
            ) from error
        return head


@lru_cache(maxsize=2)
def opened_value(source: str, offline: bool = False) -> ValueSource:
    """The value head that a run has trained.

    Args:
        source: run:NAME. offline: moot, as nothing is fetched.

    Raises:
        ConfigError: no run, or one that trained no value head. DataError: it is not finished, or its files are broken.
    """
    if kind(source) != "run":
        raise ConfigError(
            f"particle.reward.source={source} is no run, and a value head is what a run with particle.stage=value trains.",
            "Use run:NAME or experiment:particle-value; another network is particle.reward.kind=prm with particle.reward.prm.source.",
        )
    folder = run_of(source)
    where = f"run {folder.name}"
    identity = identity_of(folder, where)
    weights = model_file(folder, identity, where)
    owner = weights.parent.parent
    if not (owner / VALUE).is_file():
        raise ConfigError(
            f"{where} has trained no value head: it has no {VALUE}.",
            "Name a run that was made with particle.stage=value.",
        )
    told = read_file(owner, VALUE, where, again(owner))
    try:
        return ValueSource(
            weights, told["width"], told["hidden"], told["policy"], frozenset(told["seen"]), where
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{owner / VALUE} cannot be used: {error!r}.", again(owner)) from error


def write_value(folder: Path, head: ValueHead, hidden: int, policy: str, seen: frozenset[str]) -> None:
    """Keep in a run's folder what ``opened_value`` reads beside the weights."""
    width = head.width
    write_json(folder / VALUE, {"width": width, "hidden": hidden, "policy": policy, "seen": sorted(seen)})


class Served(nn.Module):
    """A language model behind a server: ``backbones.causal.LanguageModel`` without weights."""

    def __init__(self, config: ServerConfig, offline: bool = False):
        super().__init__()
        self.tokens = Tokens.from_folder(folder_of(config.tokenizer, offline)[0])
        address = Address(
            config.url,
            config.model,
            config.api_key,
            config.context,
            config.concurrency,
            config.timeout,
            config.retries,
        )
        self._server = Server(address, self.tokens)
        self.where, self.notes = f"{self._server.model} at {address.base}", self._server.notes
        self.context, self.eos = self._server.context, self._server.eos
        self.width = 0
        self.flops_per_token: float | None = None  # nobody says how large it is

    def batch(self) -> Server:
        """The server, which several may write with at a time."""
        return self._server


def write_trained_on(folder: Path, fingerprints: frozenset[str]) -> None:
    """Keep in a run's folder which problems its policy has learnt from."""
    write_json(folder / TRAINED_ON, {"seen": sorted(fingerprints)})


def trained_on(source: str) -> frozenset[str]:
    """Fingerprints of the problems that a policy has learnt from; none where nobody has kept them."""
    if kind(source) != "run":
        return frozenset()
    folder = run_of(source)
    where = f"run {folder.name}"
    owner = model_file(folder, identity_of(folder, where), where).parent.parent
    if not (owner / TRAINED_ON).is_file():
        return frozenset()
    return frozenset(read_file(owner, TRAINED_ON, where, again(owner)).get("seen", ()))


@dataclass(frozen=True)
class Digest:
    """What stands for a source whose content is asked for elsewhere."""

    digest: str


def opened_server(source: str, offline: bool = False) -> Digest:
    """Where a server is says nothing of its model; ``particle.server.model`` does."""
    return Digest("")


def opened_tokenizer(source: str, offline: bool = False) -> Digest:
    """The digest of a tokenizer.

    Raises:
        ConfigError: no such source. DataError: it cannot be fetched or read.
    """
    return Digest(Tokens.from_folder(folder_of(source, offline)[0]).digest)


def opened_prm(source: str, offline: bool = False) -> Digest:
    """The digest of a reward model: of its sizes, its weights and its tokenizer.

    Raises:
        ConfigError: no such source. DataError: it cannot be fetched, or is incomplete.
    """
    folder, where = folder_of(source, offline)
    whole = hashlib.sha256()
    files = [*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.jinja")]
    if not files:
        raise DataError(
            f"{where} holds no model in Hugging Face's format.", "Name the folder that has its config.json."
        )
    for file in sorted(files):
        whole.update(f"{file.name} {sha256(file)}\n".encode())
    return Digest(whole.hexdigest())


def opened_ratings(source: str, offline: bool = False) -> Digest:
    """The digest of a file of ratings, which is read line by line later.

    Raises:
        DataError: there is no such file.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"particle.reward.ratings={source} is no file.", 'It holds lines {"key": "...", "good": true}.'
        )
    return Digest(sha256(path))
