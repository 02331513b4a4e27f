"""Language id and fastText classifiers, with the real model lid.176 and real text in eleven languages."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import corpus

from pipelines import plugins
from pipelines.errors import GristmillError, UnknownName
from pipelines.filtering import ScoreSettings, located, score_documents
from pipelines.filters import Filter, Scores
from pipelines.filters._fasttext import _labels, excerpt
from pipelines.filters.language import LANGUAGES, _model
from pipelines.store import Build, Store

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "corpus.parquet"
ENGLISH = "The mill stood by the river, and the miller lived in the house beside it with his wife and three children."
GERMAN = "Die Mühle stand am Fluss, und der Müller wohnte mit seiner Frau und drei Kindern im Haus daneben."


def score(texts: list[str], **values: object) -> Scores:
    plugin = plugins.build("filters", "language", values)
    assert isinstance(plugin, Filter)
    return plugin.score(texts)


def sample(domain: str, count: int) -> list[tuple[str, str]]:
    query = "select lang, text from read_parquet($path) where domain = $domain order by id limit $count"
    return duckdb.sql(query, params={"path": str(SAMPLE), "domain": domain, "count": count}).fetchall()


def test_the_labels_are_the_models() -> None:
    path = _model()
    assert sorted(_labels(path, path.stat().st_size, path.stat().st_mtime_ns)) == sorted(LANGUAGES)


def test_expected_languages_are_summed() -> None:
    english, german, both = (score([ENGLISH, GERMAN], languages=names) for names in (["en"], ["de"], ["en", "de"]))
    assert english["language"] == german["language"] == ["en", "de"]
    assert english["expected_probability"][0] > 0.9 > 0.1 > english["expected_probability"][1]
    total = np.asarray(english["expected_probability"]) + np.asarray(german["expected_probability"])
    np.testing.assert_allclose(both["expected_probability"], total, atol=1e-6)
    np.testing.assert_allclose(english["confidence"], np.maximum(english["expected_probability"], german["expected_probability"]))


def test_a_text_without_words_has_no_language() -> None:
    found = score(["", " \n\t ", ENGLISH])
    assert found["language"] == [None, None, "en"]
    assert np.isnan(found["expected_probability"]).tolist() == [True, True, False]


def test_line_breaks_do_not_matter() -> None:
    one, other = score([ENGLISH.replace(" ", "\n"), ENGLISH])["confidence"]
    assert one == other


def test_a_long_document_is_read_from_its_start_to_its_end() -> None:
    text = "".join(chr(ord("a") + number // 100) for number in range(1_000))
    pieces = excerpt(text, 100).split(" ")
    assert pieces == ["a" * 20, "".join(["c" * 20]), "e" * 10 + "f" * 10, "h" * 20, "j" * 20]
    assert excerpt(text, 1_000) == excerpt(text, None) == text
    long = GERMAN * 50 + ENGLISH * 200
    assert score([long])["language"] == ["en"]
    assert score([GERMAN * 200 + ENGLISH * 50])["language"] == ["de"]


def test_the_language_of_real_text_is_found() -> None:
    labelled = sample("nonenglish", 150)
    found = score([text for _, text in labelled])
    assert np.mean([language == label for language, (label, _) in zip(found["language"], labelled, strict=True)]) > 0.98
    assert np.max(found["expected_probability"]) < 0.3


def test_english_mathematics_is_not_judged_by_it() -> None:
    """Why `language` is off for mathematics: most of it has less than FineWeb's 0.65 for English; of wiki hardly any."""
    shares = {}
    for domain in ("math", "wiki"):
        shares[domain] = np.mean(np.asarray(score([text for _, text in sample(domain, 300)])["expected_probability"]) < 0.65)
    assert shares["math"] > 0.5 and shares["wiki"] < 0.01


def test_an_unknown_language_names_the_nearest() -> None:
    with pytest.raises(GristmillError, match="'eng' is no label of the model.*did you mean"):
        plugins.build("filters", "language", {"languages": ["eng"]})


def test_scores_and_label_are_stored(store: Store) -> None:
    cleaned = corpus(store, "wiki", [ENGLISH, "", GERMAN])
    request = Build("quality_scores.language", score_documents, ScoreSettings(filter="language"), cleaned.partition, {"cleaned": cleaned})
    table = pq.read_table(store.build(request).manifest.file("scores.parquet"))
    assert [str(kind) for kind in table.schema.types] == ["string", "double", "double", "string"]
    assert table["language"].to_pylist() == ["en", None, "de"]


# fasttext_classifier


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    shutil.copyfile(_model(), tmp_path / "models" / "lid.ftz")
    return tmp_path


def classified(root: Path, texts: list[str], **values: object) -> np.ndarray:
    plugin = plugins.build("filters", "fasttext_classifier", {"model": "models/lid.ftz", "label": "de", **values})
    assert isinstance(plugin, Filter)
    found = plugin.at(root).score(texts)["probability"]
    assert isinstance(found, np.ndarray)
    return found


def test_a_classifier_gives_what_the_model_gives(project: Path) -> None:
    import fasttext

    texts = [text for _, text in sample("nonenglish", 20)] + [ENGLISH, GERMAN, "\n"]
    model = fasttext.load_model(str(project / "models" / "lid.ftz"))
    expected = []
    for text in texts:
        labels, shares = model.predict(" ".join(text.split()), k=-1)
        expected.append(min(1.0, dict(zip(labels, shares, strict=True)).get("__label__de", 0.0)))
    np.testing.assert_array_equal(classified(project, texts), [*expected[:-1], np.nan])


def test_a_label_of_probability_zero_is_a_label_all_the_same(project: Path) -> None:
    assert classified(project, [ENGLISH], label="yue")[0] < 1e-4


def test_an_unknown_label_names_the_nearest(project: Path) -> None:
    with pytest.raises(UnknownName, match=r"lid\.ftz.*did you mean 'de'"):
        classified(project, [ENGLISH], label="dee")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "models/none.bin"}, "no model 'models/none.bin'.*give `revision`"),
        ({"model": "../lid.ftz"}, "leaves the project's directory"),
        ({"model": "models/text.bin"}, "not a fastText"),
        ({"revision": "main"}, "full commit hash"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(project: Path, values: dict[str, str], message: str) -> None:
    (project / "models" / "text.bin").write_text("no model, but some text that is longer than a header of a model would be" * 3)
    with pytest.raises(GristmillError, match=message):
        classified(project, [ENGLISH], **values)


def test_the_content_of_the_model_is_part_of_the_scores_identity(project: Path, store: Store) -> None:
    cleaned = corpus(store, "wiki", [ENGLISH, GERMAN])
    asked = ScoreSettings(filter="fasttext_classifier", settings={"model": "models/lid.ftz", "label": "de"})

    def request() -> Build:
        return Build(
            "quality_scores.fasttext_classifier", score_documents, located(asked, project), cleaned.partition, {"cleaned": cleaned}
        )

    first = request()
    assert list(first.settings.files) == ["models/lid.ftz"]  # type: ignore[attr-defined]
    assert store.build(first).manifest.counts["documents"] == 2
    elsewhere = project / "elsewhere"
    shutil.copytree(project / "models", elsewhere / "models")
    assert request().fingerprint() == first.fingerprint()
    with (project / "models" / "lid.ftz").open("ab") as file:
        file.write(b"\0")
    assert request().fingerprint() != first.fingerprint()
    with pytest.raises(GristmillError, match="changed since they were hashed"):
        score_documents(first.settings, project, cleaned=cleaned)  # type: ignore[arg-type]
