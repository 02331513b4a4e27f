"""tokenizer, fitted once on the pinned sample; tokenized_shards by source."""

import dagster as dg

from assets_defs.materialization import mill_asset
from assets_defs.partitions import ALL, SOURCE
from assets_defs.resources import Mill
from pipelines import tokenization
from pipelines.store import Build


@mill_asset(
    step=tokenization.train_tokenizer,
    packages=tokenization.TOKENIZATION_PACKAGES,
    deps=[dg.AssetDep("cleaned_corpus", partition_mapping=ALL), "duplicate_clusters"],
    kinds={"huggingface"},
)
def tokenizer(mill: Mill, partition: None) -> Build:
    """A byte-level BPE, trained on the training split of the pinned sample (`fit_on` in project.yaml), an equal part per domain.

    Input: cleaned_corpus and the split of the pinned snapshots; a new snapshot retrains nothing. Where project.yaml brings a
    tokenizer, its files instead. Cost: about 4 s for 4,500 documents.
    """
    if mill.project.tokenizer.brought:
        return Build(
            asset="tokenizer",
            step=tokenization.import_tokenizer,
            settings=tokenization.located(mill.project.tokenizer, mill.root),
            packages=tokenization.TOKENIZATION_PACKAGES,
        )
    sample = mill.fit_sample()
    return Build(
        asset="tokenizer",
        step=tokenization.train_tokenizer,
        settings=mill.project.tokenizer,
        inputs={"sample": sample, "splits": mill.splits([str(manifest.partition) for manifest in sample])},
        packages=tokenization.TOKENIZATION_PACKAGES,
    )


@mill_asset(
    step=tokenization.tokenize_documents,
    audits=(*tokenization.TOKENIZATION_AUDITS, tokenization.DecodesBack),
    packages=tokenization.TOKENIZATION_PACKAGES,
    partitions=SOURCE,
    deps=["cleaned_corpus", "tokenizer"],
    kinds={"huggingface"},
)
def tokenized_shards(mill: Mill, partition: str) -> Build:
    """Token ids of every document, memory-mapped, with an index of documents and passages: any position leads back to its text.

    Input: cleaned_corpus, tokenizer. Selection and mixture are views over it; a new ratio costs no tokenization. Cost: about 14 s
    for 23,000 documents.
    """
    cleaned, fitted = mill.store.current("cleaned_corpus", partition), mill.store.current("tokenizer")
    return Build(
        asset="tokenized_shards",
        partition=partition,
        step=tokenization.tokenize_documents,
        settings=mill.project.passages,
        inputs={"cleaned": cleaned, "tokenizer": fitted},
        audits=(*tokenization.TOKENIZATION_AUDITS, tokenization.DecodesBack(cleaned, fitted)),
        packages=tokenization.TOKENIZATION_PACKAGES,
    )
