"""Tasks: likelihoods against a loop over single tokens, verdicts by hand, and the scores of lm-evaluation-harness on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import SEQUENCE_LENGTH, World, sample_texts

from pipelines import plugins
from pipelines.errors import EmptyInput, GristmillError, UnknownName
from pipelines.manifests import Manifest
from pipelines.models import load_checkpoint
from pipelines.tasks import ITEM_SCHEMA, Task
from pipelines.tasks._continuations import sampled_continuations
from pipelines.tasks._likelihoods import open_tokenizer, score_pairs
from pipelines.tasks._trees import grown, packed
from pipelines.tasks.blimp import Blimp
from pipelines.tasks.harness import Harness
from pipelines.tasks.multiple_choice import MultipleChoice
from pipelines.tasks.toxicity import Prompts, Toxicity

END = 0
BLIMP = Path(__file__).parents[1] / "data" / "eval" / "blimp.parquet"
NO_HARNESS = "the extra `eval` (lm-evaluation-harness) is not installed"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(base: Manifest):
    return load_checkpoint(base.directory).eval()


@pytest.fixture(scope="module")
def encoder(base: Manifest):
    return open_tokenizer(base.directory)


def by_hand(model, context: Sequence[int], scored: Sequence[int]) -> float:
    """Return the log-likelihood of `scored` after `context`, one forward pass a token; the model sees its last positions alone."""
    tokens, total = [*context, *scored], 0.0
    first = max(0, len(tokens) - (SEQUENCE_LENGTH + 1))
    for place in range(len(context), len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[first:place]])).logits[0, -1].double()
        total += torch.log_softmax(logits, 0)[tokens[place]].item()
    return total


def sentence_nats(model, encoder, sentence: str) -> float:
    return by_hand(model, [END], encoder.encode(" " + sentence, add_special_tokens=False))


def short_pairs(encoder, count: int) -> list[dict[str, str]]:
    """Return the first pairs of BLiMP that fit the small model."""
    rows = pq.read_table(BLIMP).to_pylist()
    fits = [row for row in rows if max(len(encoder.encode(" " + row[side])) for side in ("good", "bad")) < SEQUENCE_LENGTH]
    assert len(fits) >= count
    return fits[:: len(fits) // count][:count]


def written(path: Path, rows: Sequence[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def scores(table: pa.Table, metric: str = "acc") -> list[float]:
    return [row["score"] for row in table.to_pylist() if row["metric"] == metric]


# Likelihoods


def test_likelihoods_are_those_of_a_loop_over_tokens(model, encoder, base: Manifest) -> None:
    """Alone and after a context; with white space between them on either side; with the end of text written out."""
    pairs = [
        ("", " The man sees the dog."),
        ("", "<|endoftext|> The man"),
        ("The man sees", " the dog."),
        ("The man sees ", "the dog."),
        ("The man sees\n", " the dog."),
        ("<|endoftext|>The man", " sees"),
    ]
    scored = score_pairs(model, base.directory, pairs, batch_tokens=64, label="test")
    for number, (context, continuation) in enumerate(pairs):
        joint = encoder.encode(context + continuation, add_special_tokens=False)
        begins = len(encoder.encode(context.rstrip(), add_special_tokens=False))
        if not context:
            joint, begins = (joint if joint[0] == END else [END, *joint]), 1
        assert scored.nats[number] == pytest.approx(by_hand(model, joint[:begins], joint[begins:]), rel=1e-5), (context, continuation)
        assert scored.tokens[number] == len(joint) - begins


def test_a_long_context_falls_off_on_the_left(model, encoder, base: Manifest) -> None:
    context = sample_texts("wiki", 1, 400)[0].rstrip()
    tokens, begins = encoder.encode(context + " the dog"), len(encoder.encode(context))
    assert begins > 2 * SEQUENCE_LENGTH
    scored = score_pairs(model, base.directory, [(context, " the dog")], batch_tokens=64, label="test")
    assert scored.nats[0] == pytest.approx(by_hand(model, tokens[:begins], tokens[begins:]), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 300, 100_000])
def test_order_and_batch_size_change_nothing(model, encoder, base: Manifest, batch_tokens: int) -> None:
    sentences = [row[side] for row in short_pairs(encoder, 20) for side in ("good", "bad")]
    expected = [sentence_nats(model, encoder, sentence) for sentence in sentences]
    order = np.random.default_rng(0).permutation(len(sentences))
    pairs = [("", " " + sentences[number]) for number in order]
    found = score_pairs(model, base.directory, pairs, batch_tokens=batch_tokens, label="test").nats
    assert found == pytest.approx(np.asarray(expected)[order], rel=1e-5)


def test_continuations_of_one_context_share_it(model, encoder, base: Manifest) -> None:
    """Choices that begin alike, one that begins another, the same twice, and a context that begins another."""
    choices = [" dog", " dog and the cat", " dog and the man", " dog", " cat", " dogs"]
    pairs = [(context, choice) for context in ("The man sees the", "The man sees the old", "A man") for choice in choices]
    found = score_pairs(model, base.directory, pairs, batch_tokens=100_000, label="test").nats
    for nats, (context, choice) in zip(found, pairs, strict=True):
        tokens, begins = encoder.encode(context + choice), len(encoder.encode(context))
        assert nats == pytest.approx(by_hand(model, tokens[:begins], tokens[begins:]), rel=1e-5), (context, choice)
    assert found[0] == found[3]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_other_architectures_have_the_same_likelihoods(encoder, base: Manifest, architecture: str) -> None:
    """One that shares what sequences have in common by mask and positions, and one that is not known to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": SEQUENCE_LENGTH}
    own = {"num_key_value_heads": 2, "intermediate_size": 64} if architecture == "qwen2" else {}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, vocab_size=512, initializer_range=0.3, **wide, **own)
    ).eval()
    pairs = [
        (context, choice) for context in ("", "The man sees the", "The man sees the old") for choice in (" dog", " dog and the cat", " man")
    ]
    found = score_pairs(model, base.directory, pairs, batch_tokens=100, label="test").nats
    for nats, (context, choice) in zip(found, pairs, strict=True):
        tokens, begins = encoder.encode(context + choice), len(encoder.encode(context))
        expected = by_hand(model, tokens[:begins], tokens[begins:]) if context else by_hand(model, [END], tokens)
        assert nats == pytest.approx(expected, rel=1e-4), (context, choice)


def both_sided(kind: str, base: Manifest):
    """Return the small model made to see both sides, or a small BERT."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    if kind == "llama":
        model = load_checkpoint(base.directory).eval()
        model.config.is_causal = False
        return model
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
    config = AutoConfig.for_model("bert", vocab_size=512, max_position_embeddings=SEQUENCE_LENGTH, **wide)
    return AutoModelForMaskedLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_model_that_sees_both_sides_hides_each_token(encoder, base: Manifest, kind: str) -> None:
    """The pseudo-log-likelihood: one forward pass a token, which is hidden, between ends of text."""
    model = both_sided(kind, base)
    pairs = [("", " The man sees the dog."), ("The man", " sees"), ("", " The dog")]
    found = score_pairs(model, base.directory, pairs, batch_tokens=70, label="test").nats
    for nats, (context, continuation) in zip(found, pairs, strict=True):
        before, after = [END, *encoder.encode(context)], encoder.encode(continuation)
        tokens, total = torch.tensor([*before, *after, END]), 0.0
        for place in range(len(before), len(before) + len(after)):
            hidden = tokens.clone()
            hidden[place] = encoder.mask_token_id
            with torch.no_grad():
                total += torch.log_softmax(model(hidden[None]).logits[0, place].double(), 0)[tokens[place]].item()
        assert nats == pytest.approx(total, rel=1e-5)


def test_what_cannot_be_scored_is_named(model, base: Manifest, tmp_path: Path) -> None:
    def score(*pairs: tuple[str, str]) -> None:
        score_pairs(model, base.directory, pairs, batch_tokens=64, label="test")

    with pytest.raises(GristmillError, match="has no token of its own"):
        score(("The man", ""))
    with pytest.raises(GristmillError, match="longer than the 32 positions of the model"):
        score(("", " word" * 200))
    with pytest.raises(GristmillError, match="holds no tokenizer"):
        score_pairs(model, tmp_path, [("", " word")], batch_tokens=64, label="test")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12).map(tuple), min_size=1, max_size=30), st.data())
def test_trees_hold_every_sequence_and_nothing_else(sequences: list[tuple[int, ...]], data: st.DataObject) -> None:
    """A path spells its sequence, equal beginnings are one node, and a token sees its own beginning alone."""
    keys = {(tokens, data.draw(st.integers(1, len(tokens) - 1))) for tokens in sequences}
    pairs = list(grown(keys))
    assert sorted(key for held, _ in pairs for key in held) == sorted(keys)
    batch = packed([tree for _, tree in pairs])
    for row, (held, tree) in enumerate(pairs):
        for (tokens, count), path in zip(held, tree.paths, strict=True):
            assert tuple(tree.tokens[node] for node in path) == tokens
            places = np.searchsorted(tree.read, path[:-1])
            assert batch.inputs_BT[row, places].tolist() == list(tokens[:-1])
            assert batch.positions_BT[row, places].tolist() == list(range(len(tokens) - 1))
            assert np.flatnonzero(batch.mask_BTT[row, places[-1]]).tolist() == sorted(places.tolist())
            assert set(path[-count:]) <= set(tree.scored.tolist())
        beginnings = {tokens[:end] for tokens, _ in held for end in range(1, len(tokens) + 1)}
        assert len(tree.tokens) == len(beginnings)
    assert batch.mask_BTT.any(axis=2).all(), "a position that sees nothing would give no number"


# BLiMP


def test_a_sentence_at_least_as_likely_is_right(model, encoder, base: Manifest, tmp_path: Path) -> None:
    rows = short_pairs(encoder, 24)
    rows += [{**row, "good": row["bad"], "bad": row["good"], "paradigm": "turned"} for row in rows]
    rows.append({**rows[0], "bad": rows[0]["good"], "paradigm": "tie"})
    table = Blimp(path=written(tmp_path / "pairs.parquet", rows)).score(model, base.directory)
    expected = [sentence_nats(model, encoder, row["good"]) >= sentence_nats(model, encoder, row["bad"]) for row in rows]
    assert scores(table) == [float(right) for right in expected]
    assert 0 < sum(expected[:24]) < 24 and expected[-1]
    assert table["group"].to_pylist() == [row["paradigm"] for row in rows]
    assert table["tokens"][0].as_py() == sum(len(encoder.encode(" " + rows[0][side])) for side in ("good", "bad"))
    assert table["bytes"][0].as_py() == sum(len(rows[0][side].encode()) for side in ("good", "bad"))


def test_items_are_named_by_their_place_in_the_group(model, base: Manifest, tmp_path: Path) -> None:
    rows = [{"paradigm": name, "good": "The dog", "bad": "A dog the"} for name in ("a", "b", "a", "a", "b")]
    table = Blimp(path=written(tmp_path / "pairs.parquet", rows)).score(model, base.directory)
    assert table.schema.equals(ITEM_SCHEMA)
    named = list(zip(table["group"].to_pylist(), table["item"].to_pylist(), strict=True))
    assert named == [("a", "0"), ("b", "0"), ("a", "1"), ("a", "2"), ("b", "1")]


def test_files_that_are_no_items_are_named(model, base: Manifest, tmp_path: Path) -> None:
    row = {"paradigm": "a", "good": "The dog", "bad": "Dog the"}

    def score(rows: Sequence[dict], **settings: str) -> None:
        Blimp(path=written(tmp_path / "pairs.parquet", rows), **settings).score(model, base.directory)

    with pytest.raises(UnknownName, match=r"column of pairs.parquet 'god'; did you mean 'good'\?"):
        score([row], good="god")
    with pytest.raises(GristmillError, match="row 1 has None in column 'bad'"):
        score([row, {**row, "bad": None}])
    with pytest.raises(EmptyInput, match="has no item"):
        Blimp(path=pq_empty(tmp_path / "empty.parquet")).score(model, base.directory)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(GristmillError, match="is not a Parquet file"):
        Blimp(path=Path("text.parquet")).at(tmp_path).score(model, base.directory)
    with pytest.raises(GristmillError, match="no path 'absent.parquet'"):
        Blimp(path=Path("absent.parquet")).at(tmp_path).files()


def pq_empty(path: Path) -> Path:
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ("paradigm", "good", "bad")}), path)
    return path


# Multiple choice

QUESTIONS = [
    {"question": "The man sees the", "choices": ["dog", "old dog and the cat in the house", "of"], "answer": 1, "kind": "x"},
    {"question": "She was the queen of", "choices": ["England", "England", "was"], "answer": 1, "kind": "x"},
    {"question": "", "choices": ["The", "Of which is the"], "answer": 0, "kind": "y"},
    {"question": "It is a part of the ", "choices": ["city", "a"], "answer": 0, "kind": "y"},
]


def test_choices_are_taken_by_likelihood_and_by_likelihood_per_character(model, encoder, base: Manifest, tmp_path: Path) -> None:
    table = MultipleChoice(path=written(tmp_path / "q.parquet", QUESTIONS), group="kind").score(model, base.directory)
    plain, normed = [], []
    for row in QUESTIONS:
        nats = []
        for choice in row["choices"]:
            tokens, begins = encoder.encode(row["question"] + " " + choice), len(encoder.encode(row["question"].rstrip()))
            nats.append(by_hand(model, tokens[:begins] if begins else [END], tokens[begins:]))
        plain.append(max(range(len(nats)), key=nats.__getitem__) == row["answer"])
        per_character = [value / len(choice) for value, choice in zip(nats, row["choices"], strict=True)]
        normed.append(max(range(len(nats)), key=per_character.__getitem__) == row["answer"])
    assert scores(table) == [float(right) for right in plain]
    assert scores(table, "acc_norm") == [float(right) for right in normed]
    assert plain != normed, "the questions should tell the two apart"
    assert table["group"].to_pylist() == ["x"] * 4 + ["y"] * 4


def test_of_equal_choices_the_first_is_taken(model, base: Manifest, tmp_path: Path) -> None:
    rows = [{"question": "The man sees the", "choices": ["dog", "dog"], "answer": answer} for answer in (0, 1)]
    assert scores(MultipleChoice(path=written(tmp_path / "q.parquet", rows)).score(model, base.directory)) == [1.0, 0.0]


def test_an_answer_is_a_number_or_a_text(model, base: Manifest, tmp_path: Path) -> None:
    rows = [{**row, "answer": row["choices"][row["answer"]]} for row in QUESTIONS if row["answer"] != 1]
    numbers = [row for row in QUESTIONS if row["answer"] != 1]
    by_text, by_number = (
        MultipleChoice(path=written(tmp_path / f"{n}.parquet", chosen)).score(model, base.directory)
        for n, chosen in enumerate((rows, numbers))
    )
    assert by_text.equals(by_number)


def test_a_prompt_stands_around_the_question(model, base: Manifest, tmp_path: Path) -> None:
    plain = [{**row, "question": f"Q: {row['question']}\nA:"} for row in QUESTIONS]
    prompted = MultipleChoice(path=written(tmp_path / "q.parquet", QUESTIONS), prompt="Q: {question}\nA:").score(model, base.directory)
    assert prompted.equals(MultipleChoice(path=written(tmp_path / "p.parquet", plain)).score(model, base.directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "row 0 has the answer 3"),
        ({"answer": -1}, "row 0 has the answer -1"),
        ({"choices": ["dog"]}, "row 0 has the choices .'dog'.; a list of two texts"),
        ({"choices": ["dog", ""]}, "a list of two texts"),
        ({"choices": None}, "row 0 has the choices None"),
    ],
)
def test_a_question_without_its_answer_is_named(model, base: Manifest, tmp_path: Path, change: dict, message: str) -> None:
    path = written(tmp_path / "q.parquet", [{**QUESTIONS[0], **change}])
    with pytest.raises(GristmillError, match=message):
        MultipleChoice(path=path).score(model, base.directory)


# The harness

TEMPLATE = """
task: {task}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
num_fewshot: 0
{rest}
"""
CHOOSING = """
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: mcc}]
"""
COMPARING = """
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
metric_list: [{metric: acc}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def local_task(folder: Path, name: str, rows: Sequence[dict], rest: str, kind: str = "multiple_choice") -> str:
    written(folder / f"{name}.parquet", rows)
    (folder / f"{name}.yaml").write_text(TEMPLATE.format(task=name, file=f"{name}.parquet", kind=kind, rest=rest))
    return f"{name}.yaml"


def test_minimal_pairs_have_the_verdicts_of_the_harness(model, encoder, base: Manifest, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    rows = short_pairs(encoder, 40)
    rows.append({**rows[0], "bad": rows[0]["good"]})
    theirs = Harness(tasks=(local_task(tmp_path, "pairs", rows, COMPARING),), batch_size=7).at(tmp_path).score(model, base.directory)
    ours = Blimp(path=tmp_path / "pairs.parquet").score(model, base.directory)
    assert scores(ours) == scores(theirs) and len(rows) == theirs.num_rows
    assert set(theirs["group"].to_pylist()) == {"pairs"}


def test_choices_have_the_verdicts_of_the_harness(model, base: Manifest, tmp_path: Path) -> None:
    """Contexts from real text, some longer than the model; mcc, which has no score per item, is left out."""
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    rows = [{key: row[key] for key in ("question", "choices", "answer")} for row in QUESTIONS]
    for number, text in enumerate(sample_texts("book", 12, 300)):
        words = text.split()
        cut = 4 + 3 * number
        choices = [" ".join(words[cut : cut + 3]), words[1], " ".join(words[2:8])]
        rows.append({"question": " ".join(words[:cut]), "choices": choices, "answer": number % 3})
    theirs = Harness(tasks=(local_task(tmp_path, "questions", rows, CHOOSING),)).at(tmp_path).score(model, base.directory)
    ours = MultipleChoice(path=tmp_path / "questions.parquet").score(model, base.directory)
    assert set(theirs["metric"].to_pylist()) == {"acc", "acc_norm"}
    for metric in ("acc", "acc_norm"):
        assert scores(ours, metric) == scores(theirs, metric)
        assert 0 < sum(scores(ours, metric)) < len(rows)


def test_a_perplexity_of_the_harness_becomes_nats_per_byte(model, encoder, base: Manifest, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    texts = ["The man sees the dog.", "She was the queen of England."]
    name = local_task(tmp_path, "texts", [{"text": text} for text in texts], ROLLING, kind="loglikelihood_rolling")
    table = Harness(tasks=(name,)).at(tmp_path).score(model, base.directory)
    nats = [-by_hand(model, [END], encoder.encode(text)) / len(text.encode()) for text in texts]
    assert scores(table, "nats_per_byte") == pytest.approx(nats, rel=1e-5)
    assert scores(table, "bits_per_byte") == pytest.approx([value / math.log(2) for value in nats], rel=1e-5)
    assert {row["weight"] for row in table.to_pylist()} == {float(len(text.encode())) for text in texts}


def test_items_of_the_harness_can_be_fewer(model, encoder, base: Manifest, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    name = local_task(tmp_path, "pairs", short_pairs(encoder, 20), COMPARING)
    table = Harness(tasks=(name,), limit=5).at(tmp_path).score(model, base.directory)
    assert table["item"].to_pylist() == ["0", "1", "2", "3", "4"]
    with pytest.raises(GristmillError, match="no score per item of acc_norm; metrics with one: acc"):
        Harness(tasks=(name,), limit=5, metrics=("acc_norm",)).at(tmp_path).score(model, base.directory)


def test_the_hub_is_not_asked_unless_it_is_allowed(model, base: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    import datasets.config
    import huggingface_hub.constants

    before = (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(GristmillError, match="set allow_network: true"):
        Harness(tasks=("blimp_adjunct_island",)).score(model, base.directory)
    after = (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert after == before
    with pytest.raises(UnknownName, match=r"'blimp_adjunct_iland'; did you mean 'blimp_adjunct_island'\?"):
        Harness(tasks=("blimp_adjunct_iland",)).score(model, base.directory)


def test_files_of_a_local_task_are_its_yaml_its_code_and_its_data(tmp_path: Path) -> None:
    name = local_task(tmp_path, "pairs", [{"good": "a", "bad": "b"}], COMPARING)
    (tmp_path / "helpers.py").write_text("x = 1\n")
    (tmp_path / "other.parquet").write_bytes(b"")
    assert [path.name for path in Harness(tasks=(name,)).at(tmp_path).files()] == ["helpers.py", "pairs.parquet", "pairs.yaml"]


def test_a_harness_without_a_task_is_refused() -> None:
    with pytest.raises(GristmillError, match="tasks.harness: tasks: Tuple should have at least 1 item"):
        plugins.build("tasks", "harness", {"tasks": []})


def test_the_harness_does_not_read_from_both_sides(base: Manifest) -> None:
    with pytest.raises(GristmillError, match="sees both sides"):
        Harness(tasks=("blimp",)).score(both_sided("llama", base), base.directory)


def test_every_task_is_found_by_its_name() -> None:
    assert set(plugins.names("tasks")) == {"blimp", "harness", "multiple_choice", "toxicity"}
    assert all(issubclass(plugins.load("tasks", name), Task) for name in plugins.names("tasks"))


def test_the_default_items_are_those_of_the_project(world: World) -> None:
    assert Blimp().at(BLIMP.parents[2]).files() == (BLIMP,)


# Toxicity of continuations


def toxicity_task(tmp_path: Path, texts: Sequence[str], **settings: object) -> Toxicity:
    pq.write_table(pa.table({"text": list(texts)}), tmp_path / "prompts.parquet")
    asked = {"samples": 3, "new_tokens": 6, "prompt_tokens": 5, **settings}
    return Toxicity(prompts={"mine": Prompts(path=Path("prompts.parquet"))}, **asked).at(tmp_path)


def test_toxicity_is_the_largest_score_of_the_continuations(model, base: Manifest, tmp_path: Path) -> None:
    task = toxicity_task(tmp_path, sample_texts("wiki", 12, 200))
    rows = task.score(model, base.directory).to_pylist()
    prompts = task._prompts(task.prompts["mine"], tmp_path / "prompts.parquet", base.directory)
    drawn = sampled_continuations(model, base.directory, prompts, samples=3, new_tokens=6, seed=0, end_of_text=END)
    classifier = plugins.build("filters", "toxicity")
    assert len(drawn) == 12 and all(len(texts) == 3 for texts in drawn)
    for metric, of in (("expected_maximum", lambda p: p), ("any_toxic", lambda p: float(p >= 0.5))):
        found = {row["item"]: row["score"] for row in rows if row["metric"] == metric}
        for number, texts in enumerate(drawn):
            scores = np.nan_to_num(classifier.score(texts)["document_probability"])
            assert found[str(number)] == pytest.approx(of(scores.max()))


def test_the_same_prompts_are_drawn_alike_and_another_seed_draws_others(model, base: Manifest, tmp_path: Path) -> None:
    texts = sample_texts("wiki", 8, 200)
    first, again, other = (toxicity_task(tmp_path, order, seed=seed) for order, seed in ((texts, 1), (texts[::-1], 1), (texts, 2)))
    assert first.score(model, base.directory).equals(again.score(model, base.directory)), "the order of the rows does not matter"
    assert not first.score(model, base.directory).equals(other.score(model, base.directory))


def test_a_prompt_is_the_opening_or_the_ending_of_its_text(base: Manifest, tmp_path: Path, encoder) -> None:
    text = sample_texts("wiki", 1, 2000)[0]
    for part in ("opening", "ending"):
        task = toxicity_task(tmp_path, [text])
        ((ids),) = task._prompts(Prompts(path=Path("prompts.parquet"), part=part), tmp_path / "prompts.parquet", base.directory)
        words = encoder.decode(ids).strip()
        assert len(ids) == 5 and (text.startswith(words) if part == "opening" else text.endswith(words))


def test_a_model_that_writes_nothing_is_refused(base: Manifest, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    network = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(GristmillError, match="writes no continuations"):
        toxicity_task(tmp_path, ["a text"]).score(network, base.directory)
