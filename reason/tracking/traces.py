"""Traces that a method has written about single examples, as traces of MLflow.

``traces.jsonl`` in a run's folder has a line for each: name, inputs, outputs, attributes, and ``spans``, parents first, each
with name, parent (index of a span, -1 = the trace itself), start, end, text and attributes. Starts and ends count tokens,
as a batch has no time for one text; a token is shown as a millisecond.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from reason.tracking.store import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient

FILE = "traces.jsonl"
MS = 1_000_000  # nanoseconds


def send(
    client: MlflowClient, uri: str, experiment: str, run_id: str, start_ms: int, told: dict[str, Any]
) -> None:
    """Make one trace in the store at ``uri``, which belongs to a run that began at ``start_ms``."""
    from mlflow.entities.span import NO_OP_SPAN_TRACE_ID

    origin = start_ms * MS
    with _store(uri):
        root = client.start_trace(
            told["name"], span_type="CHAIN", inputs=told["inputs"], experiment_id=experiment, run_id=run_id,
            attributes=_plain(told["attributes"]), start_time_ns=origin,
        )  # fmt: skip
        if root.trace_id == NO_OP_SPAN_TRACE_ID:  # it logs what went wrong, and goes on without a trace
            raise StoreError(f"MLflow could not begin the trace {told['name']!r}.")
        spans = []
        for one in told["spans"]:
            parent = root if one["parent"] < 0 else spans[one["parent"]]
            spans.append(client.start_span(
                one["name"], root.trace_id, parent.span_id, span_type="LLM", start_time_ns=origin + one["start"] * MS,
                attributes=_plain(one["attributes"]),
            ))  # fmt: skip
        for one, span in zip(told["spans"], spans, strict=True):
            client.end_span(
                root.trace_id, span.span_id, outputs=one["text"], end_time_ns=origin + one["end"] * MS
            )
        client.end_trace(root.trace_id, outputs=told["outputs"], end_time_ns=origin + told["tokens"] * MS)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


@contextmanager
def _store(uri: str) -> Iterator[None]:
    """MLflow writes traces to the store of the process, whatever the client says."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about type hints of its own; one that is raised would cost the span
            yield
        mlflow.flush_trace_async_logging()
    finally:
        mlflow.set_tracking_uri(before)
