"""`reason predict`: answer requests, one JSON object per line."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, RunName, Runs
from reason.printable import json_text


def predict(
    run: RunName,
    depth: Annotated[
        int | None,
        typer.Option("--depth", help="Depth of reasoning to answer with.", show_default="that of the run"),
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Read requests from stdin and write answers to stdout, in order, one JSON object per line.

    The fields of a request depend on the method: {"user": "196"} for latent, {"prompt": "def main("} for mor.
    An invalid request is answered with an error that says which fields are allowed.

    Example: echo '{"user": "196"}' | reason predict last
    """
    from reason.engine.session import open_run
    from reason.errors import ConfigError
    from reason.tracking.folder import RunFolder

    if sys.stdin.isatty():
        raise ConfigError(
            "predict reads requests from standard input, but nothing is piped into it.",
            'For example: echo \'{"user": "196"}\' | reason predict last',
        )
    loaded = open_run(RunFolder.find(run, runs))
    requests, places, answers = [], [], {}
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("not a JSON object")
            requests.append(request)
            places.append(number)
        except json.JSONDecodeError as error:
            wrong = f"line {number} is not valid JSON: {error.msg} at character {error.pos + 1}"
            answers[number] = {"error": wrong}
        except RecursionError:
            answers[number] = {"error": f"line {number} is not a request: it is nested too deeply"}
        except ValueError as error:
            answers[number] = {"error": f"line {number} is not a request: {error}"}
    answers |= dict(zip(places, loaded.predict(requests, depth), strict=True))
    for number in sorted(answers):
        print(json_text(answers[number]))
