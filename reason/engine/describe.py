"""The meaning of every key, read from the comments in the configuration dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from typing import Any

TOP = {
    "method": "the reasoning method",
    "depth": "how much reasoning is spent when the headline number is measured",
    "train_depth": "the depth the model is trained for; 0 = the base without the method",
    "seed": "of data order, initial weights and every random draw",
    "runs": "folder under which run folders are made",
    "offline": "fetch nothing: only caches and local paths",
}


def meanings(plan: Any) -> dict[str, str]:
    """{dotted key: the comment beside its field}."""
    found = dict(TOP)
    for f in dataclasses.fields(plan.config):
        section = getattr(plan.config, f.name)
        if dataclasses.is_dataclass(section):
            for kind in reversed(type(section).__mro__):
                if dataclasses.is_dataclass(kind):
                    found |= {f"{f.name}.{key}": text for key, text in comments(kind).items()}
    return found


def comments(kind: type) -> dict[str, str]:
    """{field: the comment on its lines} of a dataclass, from its source; {} where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    said = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: " ".join(
            said[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in said
        )
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
