"""Latent reasoning for sequential recommendation (ReaRec): the card. Importing this is cheap."""

from reason.methods.base import Cohort, DepthAxis, MethodCard, Units
from reason.methods.latent.config import LatentConfig

card = MethodCard(
    name="latent",
    summary="Recommends the next item after feeding its own state back for a number of latent steps (ReaRec).",
    paper="Tang et al., Think Before Recommend: Unleashing the Latent Reasoning Power for Sequential "
    "Recommendation, arXiv 2503.22675",
    Config=LatentConfig,
    depth=DepthAxis(
        unit="latent steps", least=0, default=2, zero="no step taken: the state of the encoder answers"
    ),
    view="sequences",
    units=Units(example="user", accuracy="NDCG@10", latency="one ranked request", throughput="users/s"),
    target="reason.methods.latent.method:Latent",
    backbone="sasrec",
    dataset="movielens-100k",
    # Training keys: chosen for the base (train_depth=0) on MovieLens-100K's validation split, and the same for
    # every loss. alpha and contrast_weight: chosen there too; with the reference code's 5 and 1, PRL did worse.
    preset={
        "train.batch_size": 32,
        "train.epochs": 20,
        "train.schedule": "cosine",
        "train.patience": 8,
        "latent.alpha": 1.5,
        "latent.contrast_weight": 0.1,
    },
    cohorts=(
        Cohort("history", "items in the history, in quarters"),
        Cohort("history", "items in the history", edges=(5, 10, 20, 50)),
        Cohort("target_count", "occurrences of the target in training, in quarters", known=False),
        Cohort("target_head", "target among the 20 % most frequent items", known=False),
    ),
)
