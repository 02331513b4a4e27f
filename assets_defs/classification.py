"""classification by recipe."""

from assets_defs.materialization import mill_asset
from assets_defs.partitions import RECIPE
from assets_defs.resources import Mill
from pipelines import classification as step
from pipelines.store import Build


@mill_asset(
    step=step.classify,
    audits=step.CLASSIFICATION_AUDITS,
    packages=step.CLASSIFICATION_PACKAGES,
    partitions=RECIPE,
    deps=["pretrained_checkpoint", "tokenizer"],
    kinds={"pytorch", "scikitlearn"},
    isolate=True,
)
def classification(mill: Mill, partition: str) -> Build:
    """Accuracy and macro-F1 on labelled sets: fine-tuned from the checkpoint, from fresh weights, a linear probe, and TF-IDF with an SVM.

    Input: pretrained_checkpoint, tokenizer, and the files of the recipe's labelled sets. The difference of pretrained and fresh
    weights is paired over seeds and test texts. A recipe without labelled sets gets an empty result. Cost: about 2 s for each
    labelled set of the sample and a small model; it grows with model, texts and seeds.
    """
    return Build(
        asset="classification",
        partition=partition,
        step=step.classify,
        settings=step.located_sets(mill.recipe(partition).classification_settings(), mill.root),
        inputs={
            "checkpoint": mill.store.current("pretrained_checkpoint", partition),
            "tokenizer": mill.store.current("tokenizer"),
        },
        audits=step.CLASSIFICATION_AUDITS,
        plugins=("pipelines.optimizers.adamw",),
        packages=step.CLASSIFICATION_PACKAGES,
    )
