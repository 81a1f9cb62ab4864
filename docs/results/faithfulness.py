"""Judge how faithfully answers of latent runs can be attributed to their users' histories.

    python docs/results/faithfulness.py RUN ... [--cases 200] [--seed 0] > docs/results/data/SET-faithfulness.json

Opens finished runs, takes random test cases of six items or more, and writes a JSON list, an object a run: what
``reason.methods.latent.faithfulness`` measures, with the run, the data and the depth it was measured on. The
block `faithful SET` of a page shows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import reason
from reason.errors import ConfigError, ReasonError


def judge(run: str, cases: int, seed: int) -> dict:
    """The numbers of one finished run of latent reasoning.

    Raises:
        ReasonError: no such run, not finished, of another method, or without cases to judge.
    """
    from reason.methods.latent.faithfulness import faithfulness

    if cases < 2:
        raise ConfigError(f"{cases} cases are too few for an interval.", "Take 2 or more: --cases 200")
    loaded = reason.load(run)
    s = loaded.session
    network: Any = s.network.eval()
    if s.plan.card.name != "latent":
        raise ConfigError(f"{loaded.folder.name} is a run of {s.plan.card.name}, not of latent.")
    config = s.plan.config
    found = faithfulness(config, network, s.ctx.data.test, config.depth, cases, seed)
    return {
        "run": loaded.folder.name,
        "experiment": loaded.result.experiment,
        "dataset": config.dataset.name,
        "data_digest": s.ctx.dataset.digest,
        "split": "test",
        "seed": seed,
        **found.as_dict(),
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder, name or the beginning of it")
    parser.add_argument("--cases", type=int, default=200, help="test cases to judge, at most")
    parser.add_argument("--seed", type=int, default=0, help="of cases, random deletions, scrambled weights")
    said = parser.parse_args(words)
    try:
        print(json.dumps([judge(run, said.cases, said.seed) for run in said.runs], indent=1))
    except ReasonError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
