"""Trajectories as traces: a solved problem as a tree of spans, plain data for whoever shows traces (MLflow, OpenTelemetry).

A span is a chunk. It lies between token numbers of its path, not between times: the policy wrote all particles at once,
so a chunk has no time of its own. Where times are asked for, take a token as a millisecond.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reason.datasets.problems import Problem
from reason.methods.particle.genealogy import written
from reason.methods.particle.lineage import Node, Population
from reason.methods.particle.selection import Answer


def trace(problem: Problem, population: Population, answer: Answer | None = None) -> dict[str, Any]:
    """A trace as JSON data.

    Returns:
        name, inputs, outputs, attributes and tokens of the whole; ``spans``, parents first: each with name, parent (index of
        a span, -1 = the whole), start and end in tokens, text, and attributes: step, reward, log-probability, finish,
        how many of the last particles descend from it, and for those their weight.
    """
    nodes = written(population)
    place = {node: i for i, node in enumerate(nodes)}
    heirs = np.zeros(len(nodes), int)
    weights: dict[Node, float] = {}
    for node, weight in zip(population.nodes, population.weights.tolist(), strict=True):
        weights[node] = weights.get(node, 0.0) + weight
        heirs[[place[step] for step in node.path]] += 1
    return {
        "name": problem.id,
        "inputs": {"problem": problem.text},
        "outputs": None if answer is None else {
            "answer": answer.value, "mass": answer.mass, "margin": answer.margin, "contested": answer.contested,
        },
        "attributes": {
            "particles": len(population.nodes), "rounds": len(population.rounds), "status": population.status,
            "log_z": _number(population.log_z), "right_answer": problem.answer,
        },
        "tokens": max((node.length for node in nodes), default=0),
        "spans": [
            {
                "name": " ".join(node.text.split())[:60] or "(end)",
                "parent": place.get(node.parent, -1) if node.parent is not None else -1,
                "start": node.length - len(node.tokens),
                "end": node.length,
                "text": node.text,
                "attributes": {
                    "id": node.id, "step": node.step, "reward": _number(node.reward), "log_p": _number(node.log_p),
                    "finish": node.finish, "descendants": int(heirs[i]),
                    **({"weight": weights[node]} if node in weights else {}),
                },
            }
            for i, node in enumerate(nodes)
        ],
    }  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
