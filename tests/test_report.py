"""The report: what it says is what the manifests say, whatever they hold, and the page asks for nothing outside itself."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from small_world import World

from pipelines import pages
from pipelines.manifests import Check, Json, Manifest, Outcome
from pipelines.pages import Column, Html
from pipelines.plots import line_plot
from pipelines.plugins import Settings
from pipelines.report import REPORT_AUDITS, ReportSettings, every_section_present, self_contained, write_report
from pipelines.report_sections import SECTIONS
from pipelines.store import Build, Store, advisory

HOSTILE = '<script>alert("x")</script><img src=http://example.invalid/a.png>&amp; "\'> é 漢'
VOID = {"meta", "img"}


class Found(Settings):
    """What a stub artifact reports."""

    outcome: dict[str, Json]
    roles: dict[str, str] = Field(default_factory=dict)
    thresholds: dict[str, dict[str, Json]] = Field(default_factory=dict)


def publish(settings: Found, out: Path) -> Outcome:
    """Write the plots that `settings` names, and report what it says."""
    outcome = Outcome.model_validate(settings.outcome)
    for name in outcome.plots:
        line_plot(out / name, {"loss": ((0.0, 1.0), (2.0, 1.0))}, x="tokens", y="loss")
    return outcome


def finite(draft: Manifest) -> Check:
    """Always passes."""
    return Check(name="finite", passed=True, description=f"of {HOSTILE}" if draft.asset == "evaluation" else "0 wrong")


@advisory
def enough(draft: Manifest) -> Check:
    """Fails for the evaluation."""
    return Check(name="enough", passed=draft.asset != "evaluation", description="below 100,000 tokens: code")


def stub(store: Store, asset: str, partition: str | None = "r", *, settings: dict[str, Json] | None = None, **outcome: Json) -> Manifest:
    found = Found(outcome=outcome, **(settings or {}))
    return store.build(Build(asset=asset, partition=partition, step=publish, settings=found, audits=(finite, enough))).manifest


def decided(store: Store, asset: str, documents: int, dropped: int, rule: str, **counts: int) -> Manifest:
    flow: dict[str, Json] = {"documents_in": documents, "kept": documents - dropped, "dropped": dropped}
    return stub(
        store,
        asset,
        settings={"thresholds": {"wiki": {rule: {"keep": "at_least", "value": 30.0}}, "code": {}}},
        counts={**flow, "quarantined": 0, **counts},
        tables={
            "by_domain": [{"domain": "wiki", **flow, "share_dropped": dropped / documents}],
            "by_rule": [{"domain": "wiki", "rule": rule, "dropped": dropped}],
        },
        plots=["dropped_by_domain.png"],
    )


def held_out(domain: str, role: str, change: float) -> dict[str, Json]:
    row: dict[str, Json] = {"domain": domain, "role": role, "documents": 7, "tokens": 12345}
    for key in ("loss", "bits_per_byte"):
        row |= {f"{key}_before": 6.0, f"{key}_after": 6.0 + change, f"{key}_change": change}
        row |= {f"{key}_change_low": change - 0.01, f"{key}_change_high": change + 0.01}
    return row


def cost(rule: str, documents: int, characters: int) -> dict[str, Json]:
    bound = {"domain": "wiki", "stage": "quality", "rule": f"words.{rule}", "keep": "at_least", "threshold": 30.0}
    return bound | {"lost_documents": documents, "lost_characters": characters, "share_characters_lost": characters / 9000}


def full(store: Store, **changes: dict[str, Json]) -> dict[str, Manifest | tuple[Manifest, ...]]:
    """Publish a set of manifests in the shapes that the steps write; `changes` lays other outcomes over two of them."""
    read = {"documents_in": 1500, "kept": 1490, "dropped": 0, "quarantined": 10, "characters": 9000, "bytes": 9100}
    clean = {**read, "documents_in": 1490, "quarantined": 0, "characters": 8000, "emails_masked": 37, "phones_masked": 0}
    reasons = {"quarantine": [{"reason": "empty text", "documents": 10}]}
    probe = {"ratio": 0.2, "seed": 0, "general_delta": -0.0655, "general_standard_error": 0.0028, "target_delta": -2.0654}
    ratio: dict[str, Json] = {
        "counts": {"probes": 3, "general_windows": 300, "target_windows": 100},
        "metrics": {"ratio": 0.68042, "tolerance_nats": 0.05, "interval_low": 0.65785, "interval_high": 0.70279},
        "tables": {"probes": [probe]},
        "plots": ["critical_ratio.png", "trajectories.png"],
        "details": {"decision": "estimate"},
    }
    losses = (("code", "target", -2.5), ("wiki", "general", 0.9), ("all general", "general", 0.03))
    evaluation: dict[str, Json] = {
        "counts": {"documents": 21},
        "tables": {"held_out": [held_out(*row) for row in losses]},
        "plots": ["held_out_loss.png"],
    }
    trained = {"counts": {"tokens": 199680, "steps": 195, "parameters": 252144}, "metrics": {"tokens_per_second": 20204.4}}
    selection = {"documents_in": 2000, "kept": 800, "dropped": 1200, "held_out_documents": 240, "documents_without_role": 0}
    tokens = {"general_tokens": 900_000, "general_selected_tokens": 225_000, "target_tokens": 100_000, "target_selected_tokens": 50_000}
    sources = ("code|2026-01-01", "wiki|2026-01-01")
    return {
        "raw": tuple(stub(store, "raw_corpus", source, counts=read, tables=reasons) for source in sources),
        "cleaned": tuple(stub(store, "cleaned_corpus", source, counts=clean) for source in sources),
        "quality": decided(store, "quality_filtered_corpus", 2980, 400, "gopher_quality.num_words"),
        "toxicity": decided(store, "toxicity_filtered_corpus", 2580, 80, "toxicity.document_probability"),
        "decontaminated": decided(store, "decontaminated_corpus", 2500, 0, "contamination.ngrams"),
        "deduplicated": decided(store, "deduplicated_corpus", 2500, 260, "exact_duplicate", kept_train=2000, kept_held_out=240),
        "sweep": stub(
            store,
            "threshold_sweep",
            tables={"costs": [cost("short", 3, 700), cost("free", 0, 0)]},
            plots=["threshold_sweep.png"],
        ),
        "selection": stub(
            store,
            "selected_subset",
            counts={**selection, **tokens},
            metrics={"general_coverage": 0.6845, "general_certified_ratio": 0.994, "target_coverage": 0.8899},
            tables={"most_absorbed": [{"role": "general", "domain": "wiki", "id": HOSTILE, "passage": 0, "represented": 9}]},
            plots=["coverage.png"],
        ),
        "general": stub(store, "general_checkpoint", plots=["training_loss.png"], **trained),
        "probes": (stub(store, "mixture_probe", "r|r0.20-s0", counts={"tokens": 39936}),),
        "ratio": stub(store, "critical_ratio", **{**ratio, **changes.get("ratio", {})}),
        "mixture": stub(store, "domain_mixture", metrics={"target_share": 0.68042}, plots=["mixture.png"]),
        "checkpoint": stub(store, "pretrained_checkpoint", plots=["training_loss.png"], **trained),
        "evaluation": stub(store, "evaluation", settings={"roles": {"code": "target"}}, **{**evaluation, **changes.get("evaluation", {})}),
    }


def bare(store: Store) -> dict[str, Manifest | tuple[Manifest, ...]]:
    """Publish manifests that hold nothing."""
    names = ("quality", "toxicity", "deduplicated", "selection", "general", "ratio", "mixture", "checkpoint", "evaluation")
    return {**{name: stub(store, f"bare_{name}") for name in names}, "raw": (), "cleaned": (), "probes": ()}


def report(store: Store, inputs: dict[str, Manifest | tuple[Manifest, ...]], recipe: str = "r", description: str = "d") -> Manifest:
    settings = ReportSettings(recipe=recipe, description=description)
    build = Build(asset="report", partition="r", step=write_report, settings=settings, inputs=inputs, audits=REPORT_AUDITS)
    return store.build(build).manifest


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID | {"wbr"}:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def read(manifest: Manifest) -> Reader:
    return Reader(manifest.file("report.html").read_text(encoding="utf-8"))


def table_of(reader: Reader, heading: str) -> list[list[str]]:
    return next(table for table in reader.tables if table[0][0] == heading)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all tests: the same stub is made once."""
    return Store(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def whole(store: Store) -> Manifest:
    return report(store, full(store))


def test_the_answer_is_made_of_the_numbers(whole):
    said = " ".join("".join(read(whole).text).split())
    assert "Of 3,000 documents, 2,240 (74.7 %) are left after the filters and deduplication." in said
    assert "275,000 of their 1,000,000 training tokens (27.5 %) were selected." in said
    assert "rises by no more than 0.05 nats per token, is 0.680 (95 % interval 0.658 to 0.703)." in said
    assert "On held-out target text the loss fell: −2.500 nats per token (95 % interval −2.510 to −2.490)." in said
    assert "On held-out general text the loss rose: +0.030 nats per token (95 % interval +0.020 to +0.040), which is within the" in said
    assert "1 of 32 checks failed: enough of evaluation[r]." in said


def test_the_funnel_follows_the_documents(whole):
    rows = table_of(read(whole), "Step")[1:]
    assert [row[:2] for row in rows] == [
        ["Read", "3,000"],
        ["Cleaned", "2,980"],
        ["Quality filter", "2,580"],
        ["Toxicity filter", "2,500"],
        ["Decontamination", "2,500"],
        ["Deduplication", "2,240"],
        ["For training", "2,000"],
        ["Selection", "800"],
    ]
    assert [row[4] for row in rows][:3] == ["20 quarantined", "0 dropped", "400 dropped"]
    assert rows[6][3:] == ["1,000,000", "240 held out"]


def test_rules_that_cost_something_are_listed(whole):
    (row,) = next(table for table in read(whole).tables if table[0][:3] == ["Domain", "Rule", "Threshold"])[1:]
    assert row == ["wiki", "words.short", "≥ 30", "3", "700", "–", "7.8 %"]


def test_every_check_and_every_artifact_is_listed(whole):
    reader = read(whole)
    every = next(table for table in reader.tables if table[0][:3] == ["Asset", "Partition", "Check"])
    assert len(every) - 1 == 32
    assert ["evaluation", "r", "enough", "failed", "below 100,000 tokens: code"] in every
    lineage = next(table for table in reader.tables if "Fingerprint" in table[0])
    inputs = {reference.fingerprint for references in whole.inputs.values() for reference in references}
    assert {row[2] for row in lineage[1:]} == inputs
    cost = next(table for table in reader.tables if "Peak memory" in table[0])
    assert sum(int(row[1]) for row in cost[1:-1]) == int(cost[-1][1]) == len(lineage) - 1


def test_plots_are_inside_with_a_text_instead(store, whole):
    images = read(whole).images
    assert len(images) == whole.counts["plots"] == 12
    assert all(image["alt"] for image in images)
    plot = full(store)["selection"].file("coverage.png").read_bytes()
    assert plot in [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images]
    assert {image["width"] for image in images} == {"520"}


def test_a_refused_estimate_is_said_to_be_refused(store):
    refusal = {"code": "not_bracketed", "seen": "every ratio up to 0.80 holds the tolerance", "remedy": "add a higher ratio"}
    changed = {"details": {"decision": "lower_bound"}, "tables": {"refusals": [refusal]}, "metrics": {"ratio": 0.8, "tolerance_nats": 0.05}}
    reader = read(report(store, full(store, ratio=changed)))
    said = " ".join("".join(reader.text).split())
    assert "is taken to be 0.800, the highest measured share that held the tolerance." in said
    assert "Its estimate was refused because every ratio up to 0.80 holds the tolerance." in said
    assert "The mixture has a target share of 0.680." in said
    assert list(refusal.values()) in table_of(reader, "Code")


def test_the_cards_say_what_the_report_says(store):
    made = report(store, full(store), recipe="a|b", description="What [it] is for")
    model, data = (made.file(name).read_text() for name in ("model_card.md", "data_card.md"))
    head = yaml.safe_load(model.split("---")[1])
    assert head["model_name"] == "a|b" and head["library_name"] == "transformers"
    assert "# a\\|b" in model and "What \\[it\\] is for" in model and "0.6804 (95 % interval 0.6579 to 0.7028)" in model
    assert "| wiki | general |" in model and full(store)["checkpoint"].fingerprint in model
    assert "| quality |" in data and "3,000 documents" in data and full(store)["deduplicated"].fingerprint in data
    bare_model = report(store, bare(store)).file("model_card.md").read_text()
    assert "None" not in model + data + bare_model


@pytest.mark.parametrize(("held", "words"), [(True, "which holds"), (False, "which does not hold")])
def test_the_run_at_the_ratio_is_told(store, held, words):
    row = {"ratio": 0.68, "tokens": 400_000, "measured_general_delta": 0.0612, "predicted_general_delta": 0.05, "held": held}
    reader = read(report(store, full(store, ratio={"tables": {"verification": [row]}})))
    assert f"A run at 0.680 changed the general loss by +0.0612, {words}." in " ".join("".join(reader.text).split())
    assert "+0.0612" in [cell for table in reader.tables for line in table for cell in line]


@pytest.mark.parametrize(("change", "words"), [(0.2, "the loss rose: +0.200"), (0.005, "the loss changed: +0.005")])
def test_a_change_is_a_rise_only_beyond_its_interval(store, change, words):
    changed = {"tables": {"held_out": [held_out("wiki", "general", change)]}}
    said = "".join(read(report(store, full(store, evaluation=changed))).text)
    assert words in said
    assert ("above the tolerance" in said) == (change > 0.05)


def test_text_is_never_markup(store):
    made = report(store, full(store), recipe=HOSTILE, description=HOSTILE)
    reader = read(made)
    assert not reader.tags & {"script", "link", "iframe"}
    assert all(image["src"].startswith("data:image/png;base64,") for image in reader.images)
    assert "".join(reader.text).count(HOSTILE) == 5  # recipe, description, a document's id, a finding in two tables
    assert all(check.passed for check in made.checks)


def test_empty_manifests_make_a_page(store):
    made = report(store, bare(store))
    reader = read(made)
    assert made.counts["sections"] == len(SECTIONS) == 10
    assert made.counts["plots"] == 0
    assert "The manifests hold nothing for this section." in reader.text


def test_the_page_says_which_recipe_it_is_of_and_what_a_run_overrode(tmp_path, store):
    settings = ReportSettings(
        recipe="r",
        description="d",
        fingerprint="0123456789ab",
        extends=("parent", "first"),
        overrides={"selected_subset[r]": {"selection.score": HOSTILE}},
    )
    write_report(settings, tmp_path, **bare(store))
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Recipe fingerprint 0123456789ab; extends parent, which extends first." in reader.text
    assert table_of(reader, "Artifact") == [
        ["Artifact", "Setting", "Value in this run"],
        ["selected_subset[r]", "selection.score", HOSTILE],
    ]


def test_same_manifests_same_bytes(tmp_path, store):
    inputs = full(store)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(ReportSettings(recipe="r", description="d"), tmp_path / name, **inputs)
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


OUTSIDE = (
    '<script src="https://example.invalid/a.js"></script>',
    '<img src="https://example.invalid/a.png">',
    '<img src="plot.png">',
    '<link rel="stylesheet" href="a.css">',
    '<a href="//example.invalid">a</a>',
    '<p style="background:url(https://example.invalid/a.png)">a</p>',
    '<style>@import "a.css";</style>',
    '<meta http-equiv="refresh" content="0;url=https://example.invalid">',
)


@pytest.mark.parametrize("added", OUTSIDE)
def test_the_audit_finds_what_a_page_asks_for(whole, tmp_path, added):
    html = whole.file("report.html").read_text(encoding="utf-8")
    (tmp_path / "report.html").write_text(html.replace("</body>", f"{added}</body>"), encoding="utf-8")
    assert self_contained(whole).passed
    assert not self_contained(whole.at(tmp_path)).passed


def test_the_audit_finds_a_page_too_large(whole, tmp_path):
    html = whole.file("report.html").read_text(encoding="utf-8")
    (tmp_path / "report.html").write_text(html.replace("</body>", f"<p>{'a' * 5_000_000}</p></body>"), encoding="utf-8")
    assert not self_contained(whole.at(tmp_path)).passed


@pytest.mark.parametrize("name", [name for name, *_ in SECTIONS])
def test_the_audit_finds_a_missing_or_empty_section(whole, tmp_path, name):
    html = whole.file("report.html").read_text(encoding="utf-8")
    pattern = re.compile(rf'<section id="{name}">\n(<h2>[^<]*</h2>).*?</section>', re.DOTALL)
    for kept in ("", rf'<section id="{name}">\1</section>'):
        (tmp_path / "report.html").write_text(pattern.sub(kept, html), encoding="utf-8")
        check = every_section_present(whole.at(tmp_path))
        assert not check.passed
        assert name in check.description


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [
        (pages.count, 1234567, "1,234,567"),
        (pages.count, -12, "−12"),
        (pages.count, None, "–"),
        (pages.number, 0.680425, "0.6804"),
        (pages.number, 12345.6, "12,346"),
        (pages.number, float("nan"), "–"),
        (pages.percent, 0.12345, "12.3 %"),
        (pages.decimals(3, sign=True), -0.81849, "−0.818"),
        (pages.decimals(3, sign=True), 0.0531, "+0.053"),
        (pages.decimals(1), 1234.56, "1,234.6"),
        (pages.size, 999, "999 B"),
        (pages.size, 1_250_000, "1.2 MB"),
        (pages.size, 1_117_650_944, "1.1 GB"),
    ],
)
def test_numbers_are_written_for_people(form, value, shown):
    assert form(value) == shown


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


@given(st.lists(st.lists(CELL, min_size=2, max_size=2), min_size=1, max_size=5))
def test_any_text_comes_back_out_of_a_table(rows):
    """An HTML parser, as an independent reader, gives the cells that went in."""
    html = pages.table([{"a": first, "b": second} for first, second in rows], [Column("a", "A"), Column("b", "B")], caption=rows[0][0])
    assert Reader(html).tables == [[["A", "B"], *rows]]


@given(st.integers(-(10**15), 10**15))
def test_a_whole_number_reads_back(value):
    assert int(pages.count(value).replace(",", "").replace("−", "-")) == value


def test_only_html_is_left_as_it_stands():
    assert pages.text("<b>") == "&lt;b&gt;"
    assert pages.text(Html("<b>a</b>")) == "<b>a</b>"
    assert pages.code("a_b<") == "<code>a_<wbr>b&lt;</code>"


def test_fertility_by_domain_is_shown(store: Store, world: World) -> None:
    made = report(store, {**bare(store), "shards": world.shards})
    html = (made.directory / "report.html").read_text(encoding="utf-8")
    start = html.index("What the tokenizer makes of it")
    shown = html[start : html.index("</table>", start)]
    assert [domain in shown for domain in world.corpora] == [True] * 3
    assert f"{world.shards[0].outcome.metrics['tokens_per_word']:.2f}" in shown
