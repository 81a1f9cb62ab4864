"""The card by which a backbone is found before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BackboneCard:
    """A network that methods work on. The entry point in group ``reason.backbones`` names one."""

    name: str
    summary: str
    kind: str  # "sequence encoder", "causal lm", "recursive decoder"
    Config: type  # dataclass with `name` first; comments give units and source
    target: str  # "module:Class", called as Class(config, **sizes) -> nn.Module
    opened: str = "reason.backbones.pretrained:opened"  # called as f(source, offline): what a source holds, with its digest
