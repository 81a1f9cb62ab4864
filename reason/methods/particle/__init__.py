"""Particle filtering for inference-time scaling: the card. Importing this is cheap."""

from reason.methods.base import Cohort, DepthAxis, MethodCard, Units
from reason.methods.particle.config import ParticleConfig

card = MethodCard(
    name="particle",
    summary="Solves problems with many partial solutions that are weighed by an imperfect reward and resampled.",
    paper="Puri et al., Rollout Roulette: A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using "
    "Particle-Based Monte Carlo Methods, arXiv 2502.01618",
    Config=ParticleConfig,
    depth=DepthAxis(
        unit="particles", least=1, default=8, zero="one plain sample answers", bound=False, curve="powers"
    ),
    view="problems",
    units=Units(
        example="problem", accuracy="Exact match", latency="one solved problem", throughput="tokens/s"
    ),
    target="reason.methods.particle.method:Particle",
    backbone="causal",
    dataset="arithmetic",
    # A decoder that is trained in minutes, on solutions with slips that the next line may mend. Chosen so that one sample
    # is right in 30 to 60 % of cases; on validation problems.
    preset={
        "backbone.source": "experiment:particle-policy",
        "particle.reward.kind": "value",
        "particle.reward.source": "experiment:particle-value",
        "particle.separator": "\\n",
        "backbone.tokenizer": "byte",
        "backbone.hidden": 96,
        "backbone.layers": 3,
        "backbone.ffn": 256,
        "backbone.init_std": 0.08,  # 0.02 suits widths of 500 and more
        "dataset.modulus": 11,
        "dataset.largest": 5,
        "dataset.slip": 0.15,
        "dataset.stubborn": 0.1,
        "dataset.redo": 0.3,
        "dataset.valid_documents": 300,
        "dataset.fit": 0.4,
        "eval.limit": 200,
        "eval.latency_samples": 5,
    },
    cohorts=(Cohort("level", "level of the problem"),),
    beside=("Oracle",),
)
