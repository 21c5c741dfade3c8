"""What the page answers is what transformers' pipelines and sentence-transformers answer; mistakes are words."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from encoder.base.errors import UserError
from encoder.base.rng import generator
from encoder.data.examples import micro_batch
from encoder.finetune.encoding import read_encoder
from encoder.finetune.kinds.spans import SpansConfig, SpanSet
from encoder.models.hf.stages import check_stages
from encoder.models.hf.task import export_task, task_model
from encoder.objectives.text_tasks import TERM
from encoder.tools.page import blocks, examples
from encoder.tools.page.choice import choose
from encoder.tools.page.classify import classify
from encoder.tools.page.encoding import MOST_CHARACTERS
from encoder.tools.page.fill_mask import bars, fill_mask, visible
from encoder.tools.page.folders import ARCHITECTURES, kind_of, longest_text, open_folder
from encoder.tools.page.similarity import similarity
from encoder.tools.page.span import span
from encoder.tools.page.tags import tags
from launch import serve
from tests.helpers.hf import task_pipeline, write_tokenizer_json
from tests.helpers.pages import write_page_folder
from tests.helpers.tasks import drawn_task, rows_of, write_start

LABELS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "num_labels": 3}
THEIRS = "sentence_transformers.models."
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
QUESTION, CONTEXT = "who?", "ada was in rome"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command changes its process's own; tests that follow have theirs again."""
    for name in ("HF_HUB_OFFLINE", "GRADIO_ANALYTICS_ENABLED", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def mlm(place):
    return write_page_folder(place / "mlm", "BertForMaskedLM")


@pytest.fixture(scope="module")
def classifier(place):
    return write_page_folder(
        place / "classifier",
        "BertForSequenceClassification",
        id2label={0: "bad", 1: "good", 2: "so so"},
        num_labels=3,
    )


@pytest.fixture(scope="module")
def tagger(place):
    return write_page_folder(place / "tagger", "BertForTokenClassification", **LABELS)


@pytest.fixture(scope="module")
def reader(place):
    return write_page_folder(place / "reader", "BertForQuestionAnswering")


def pipeline(task, folder, **told):
    return task_pipeline(task)(model=str(folder), device="cpu", **told)


def test_masks_are_filled_as_by_the_pipeline(mlm):
    found = fill_mask(open_folder(mlm), "ab[MASK]c[MASK]", top=4)
    expected = pipeline("fill-mask", mlm)("ab[MASK]c[MASK]", top_k=4)
    for answers, ids, theirs in zip(found.masks, found.token_ids, expected, strict=True):
        assert ids == [a["token"] for a in theirs]
        assert [s for _, s in answers] == pytest.approx([a["score"] for a in theirs], rel=1e-4)


def test_bars_show_blanks_and_bytes_and_lose_none(mlm):
    opened = open_folder(mlm)
    found = fill_mask(opened, "a[MASK]", top=280)
    (shown,) = bars(opened, found)
    assert len(shown) == 280 and sum(shown.values()) == pytest.approx(1.0, abs=1e-5)
    assert [visible(text) for text in (" Paris", "  a", "\n", "ß")] == ["␣Paris", "␣␣a", "\\n", "ß"]


@pytest.mark.parametrize(
    ("family", "architecture", "shape"),
    [
        ("Electra", "ForPreTraining", {"hidden_size": 16, "num_attention_heads": 2}),
        ("XLNet", "LMHeadModel", {"d_model": 16, "n_head": 2, "d_inner": 24}),
    ],
)
def test_a_model_that_fills_in_no_word_compares_texts(place, family, architecture, shape):
    """By the means of transformers' own body; asked for masks it is refused."""
    import transformers

    folder = write_page_folder(place / family, "BertForMaskedLM")
    config = getattr(transformers, f"{family}Config")(vocab_size=280, num_hidden_layers=1, **shape)
    drawn = getattr(transformers, f"{family}{architecture}")(config)
    drawn.save_pretrained(folder)
    opened = open_folder(folder)
    assert opened.kind == "similarity" and opened.architecture == f"{family}Model"
    texts = ["a fine film", "a dull one"]
    ids = [opened.tokenizer(text, return_tensors="pt") for text in texts]
    body = drawn.base_model.eval()
    with torch.no_grad():
        means = [body(**given).last_hidden_state[0].mean(0) for given in ids]
    expected = float(torch.nn.functional.cosine_similarity(*means, dim=0))
    assert similarity(opened, "\n".join(texts)).cosines[0][1] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match=f"a model for similarity \\({family}{architecture}\\)"):
        open_folder(folder, kind="fill_mask")


def test_labels_have_the_probabilities_of_the_pipeline(classifier):
    found = classify(open_folder(classifier), "a fine film")
    expected = pipeline("text-classification", classifier, top_k=None)(["a fine film"])[0]
    assert found.number is None and found.probabilities == pytest.approx(
        {a["label"]: a["score"] for a in expected}, rel=1e-4
    )


def test_a_pair_has_its_form_and_one_without_is_refused(classifier, place):
    found = classify(open_folder(classifier), "ab", "cd").probabilities
    theirs = pipeline("text-classification", classifier, top_k=None)(
        {"text": "ab", "text_pair": "cd"}
    )
    assert found == pytest.approx({a["label"]: a["score"] for a in theirs}, rel=1e-4)
    lone = write_page_folder(place / "lone", "BertForSequenceClassification", pair=False)
    with pytest.raises(UserError, match="the tokenizer of lone has no form for two texts"):
        classify(open_folder(lone), "ab", "cd")


def test_several_labels_are_each_for_itself_and_a_number_is_one(classifier, place):
    opened = open_folder(classifier)
    opened.model.config.problem_type = "multi_label_classification"
    found = classify(opened, "ab").probabilities
    with torch.no_grad():
        logits_K = opened.model(**opened.tokenizer("ab", return_tensors="pt")).logits[0]
    assert [*found.values()] == pytest.approx((1 / (1 + torch.exp(-logits_K))).tolist())
    number = write_page_folder(place / "number", "BertForSequenceClassification", num_labels=1)
    opened = open_folder(number)
    with torch.no_grad():
        (value,) = opened.model(**opened.tokenizer("ab", return_tensors="pt")).logits[0].tolist()
    found = classify(opened, "ab")
    assert found.probabilities == {} and found.number == pytest.approx(value)


def test_a_special_token_that_a_text_spells_is_text(classifier):
    opened = open_folder(classifier)
    assert classify(opened, "a[SEP]b").probabilities != classify(opened, "a").probabilities
    from encoder.tools.page.encoding import encode

    assert encode(opened, "a[SEP]b").inputs["input_ids"][0].tolist().count(2) == 1


def test_a_word_has_the_label_of_its_first_token(tagger):
    opened = open_folder(tagger)
    text = "ada, of rome"
    found = tags(opened, text)
    tokens = pipeline("token-classification", tagger, ignore_labels=[])(text)
    # letters are tokens, and a byte-level token of a blank stands before its word
    first = {"ada": 0, ",": 3, "of": 5, "rome": 8}
    assert [word for word, _, _ in found.words] == [*first]
    by_start = {t["start"]: t for t in tokens}
    for word, label, share in found.words:
        theirs = by_start[first[word]]
        assert label == theirs["entity"] and share == pytest.approx(theirs["score"], rel=1e-4)
    assert "".join(text for text, _ in found.spans) == text


def test_neighbours_of_one_entity_are_one_span(tagger):
    class Decided(torch.nn.Module):
        """B-PER at the first letters of `ada` and `eve`, I-PER at that of `king`."""

        config = open_folder(tagger).model.config

        def forward(self, input_ids, **others):
            text = opened.tokenizer.convert_ids_to_tokens(input_ids[0])
            label = {"a": 1, "k": 2, "e": 1}
            chosen_T = torch.tensor([label.get(token, 0) for token in text])
            return SimpleNamespace(logits=torch.nn.functional.one_hot(chosen_T, 3)[None] * 9.0)

    opened = dataclasses.replace(open_folder(tagger), model=Decided())
    assert tags(opened, "so ada king, eve").spans == [
        ("so ", None),
        ("ada king", "PER"),
        (", ", None),
        ("eve", "PER"),
    ]
    # an entity does not go on over a word that is none
    assert tags(opened, "ada of king").spans == [("ada", "PER"), (" of ", None), ("king", "PER")]


def test_an_answer_is_that_of_the_pipeline(reader):
    found = span(open_folder(reader), QUESTION, CONTEXT)
    theirs = pipeline("question-answering", reader)(
        question=QUESTION, context=CONTEXT, max_answer_len=30, align_to_words=False
    )
    assert (found.start, found.end) == (theirs["start"], theirs["end"])
    assert found.answer == theirs["answer"] and "".join(t for t, _ in found.spans) == CONTEXT


def spans_of(folder: Path, kind: SpansConfig, rows: list[dict]) -> tuple[SpanSet, np.ndarray]:
    """A data set of questions, and what an exported span model answers, by our own forward."""
    encoder = read_encoder(
        folder / "tokenizer.json", vocab_size=280, max_tokens=40, segments=False, pairs=True
    )
    asked = kind.encode(rows_of(rows), encoder, name="dev")
    made = micro_batch(asked.examples, np.arange(len(asked.examples)), term=TERM)
    with torch.no_grad():
        logits = kind.objective.answers(
            task_model(drawn_task("modernbert", kind="span")), made.batch
        )
    return asked, logits.double().numpy()


@pytest.mark.parametrize("max_context", [False, True])
def test_the_page_gives_the_answers_of_an_evaluation_and_none_where_it_gives_none(
    tmp_path, max_context
):
    """By the threshold that the dev set chose, which the folder carries, over several windows a row."""
    draw = generator(3, "asked rows")
    rows = []
    for _ in range(12):
        context = "".join(draw.choice(list("abcdefgh "), int(draw.integers(30, 90)))) + "."
        none = {"text": [], "answer_start": []}
        rows.append({"question": "who?", "context": context, "answers": none})
    tokenizer_json = write_tokenizer_json(tmp_path / "tokenizer.json")
    content = {**json.loads(tokenizer_json.read_text()), "post_processor": None}
    tokenizer_json.write_text(json.dumps(content))
    kind = SpansConfig(
        no_answer=True,
        max_question_tokens=8,
        overlap_tokens=9,
        max_answer_tokens=6,
        candidates=30,
        max_context=max_context,
    )
    task = dataclasses.replace(drawn_task("modernbert", kind="span"), tokenizer_json=tokenizer_json)
    export_task(task, tmp_path / "bare")
    asked, logits = spans_of(tmp_path / "bare", kind, rows)
    lines = [*asked.lines(logits, {})]
    missing = [line["no_answer_score"] - line["score"] for line in lines]
    # below the median the model is right, above it there is no answer
    for row, line, more in zip(rows, lines, missing, strict=True):
        if line["answer"] and more < np.median(missing):
            start = row["context"].index(line["answer"], line["start"])
            row["answers"] = {"text": [line["answer"]], "answer_start": [start]}
    asked, _ = spans_of(tmp_path / "bare", kind, rows)
    decided = asked.decided(logits)
    export_task(dataclasses.replace(task, carried=kind.carried(decided)), tmp_path / "out")

    opened = open_folder(tmp_path / "out")
    given = [line["answer"] for line in asked.lines(logits, decided)]
    assert given.count("") >= 5 and len({*given}) >= 5
    found = [span(opened, row["question"], row["context"]) for row in rows]
    assert [one.answer.strip() for one in found] == given
    assert max(one.windows for one in found) >= 3
    assert [one.missing for one in found] == pytest.approx(missing, abs=1e-5)
    for one in found:
        said = any(note.startswith("No answer: that scores higher") for note in one.notes)
        assert said == (not one.answer)
        assert "".join(text for text, _ in one.spans)


def test_a_rule_that_nothing_decided_gives_an_answer_and_says_what_none_scores(reader):
    """Of a run that is not at its end, say: no threshold was chosen, and 0 would be one."""

    class Undecided(torch.nn.Module):
        """Likes the first token best."""

        config = SimpleNamespace(**SpansConfig(no_answer=True).carried({}))

        def forward(self, input_ids, **others):
            first_T = (torch.arange(input_ids.shape[1]) == 0)[None] * 9.0
            return SimpleNamespace(start_logits=first_T, end_logits=first_T)

    opened = dataclasses.replace(open_folder(reader), model=Undecided())
    assert opened.model.config.answer_rule["no_answer_threshold"] is None
    found = span(opened, QUESTION, "ada")
    assert found.answer and found.missing == 18.0
    assert "That there is no answer scores higher by 18.00; the folder has no" in found.notes[-1]


def test_a_rule_in_a_folder_that_is_none_is_refused_in_a_line(reader):
    opened = open_folder(reader)
    opened.model.config.answer_rule = {"no_answer_threshold": "much"}
    with pytest.raises(UserError, match="reader: answer_rule.*no_answer_threshold.*much"):
        span(opened, QUESTION, CONTEXT)


def test_an_answer_far_behind_is_found_in_a_later_window(reader):
    class Pointing(torch.nn.Module):
        """At the letter z, wherever it stands."""

        config = SimpleNamespace()

        def forward(self, input_ids, **others):
            hit_T = (input_ids == opened.tokenizer.convert_tokens_to_ids("z")) * 9.0
            return SimpleNamespace(start_logits=hit_T, end_logits=hit_T)

    opened = dataclasses.replace(open_folder(reader), model=Pointing())
    context = "a" * 100 + "z" + "b" * 50
    found = span(opened, QUESTION, context)
    assert (found.answer, found.start, found.end) == ("z", 100, 101)
    assert found.windows > 3 and "windows" in found.notes[0]
    with pytest.raises(UserError, match="the question has 64 tokens; needed: at most 35"):
        span(opened, "q" * 64, context)


def test_answers_are_weighed_as_a_padded_batch(place):
    folder = write_page_folder(place / "choice", "BertForMultipleChoice")
    opened = open_folder(folder)
    answers = ["yes", "no, never", "b"]
    found = choose(opened, "ab", answers).probabilities
    batch = opened.tokenizer(["ab"] * 3, answers, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits_K = opened.model(**{k: v[None] for k, v in batch.items()}).logits[0]
    assert [*found] == answers
    assert [*found.values()] == pytest.approx(logits_K.softmax(0).tolist(), rel=1e-4)
    # a question stands before each answer
    asked = choose(opened, "ab", ["x yes", "x no, never", "x b"]).probabilities
    found = choose(opened, "ab", answers, question="x ").probabilities
    assert [*found.values()] == [*asked.values()]
    with pytest.raises(UserError, match="leaves no room for a text in the model's 40 tokens"):
        choose(opened, "ab", ["yes", "n" * 60])
    with pytest.raises(UserError, match="there are 1 answers; needed: at least 2"):
        choose(opened, "ab", ["yes", " "])
    with pytest.raises(UserError, match="'yes' stands twice"):
        choose(opened, "ab", ["yes", "yes"])


def test_a_body_is_compared_as_sentence_transformers_would(mlm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    found = similarity(open_folder(mlm, kind="similarity"), "abc\n\nabd\nxyz xyz")
    theirs = sentence_transformers.SentenceTransformer(str(mlm), device="cpu")
    x_NC = theirs.encode(["abc", "abd", "xyz xyz"], convert_to_tensor=True)
    expected = theirs.similarity(x_NC, x_NC).flatten().tolist()
    assert sum(found.cosines, []) == pytest.approx(expected, abs=1e-5)
    # a folder of theirs goes through them
    theirs.save_pretrained(str(mlm.with_name("st")))
    again = similarity(open_folder(mlm.with_name("st")), "abc\nabd\nxyz xyz")
    assert sum(again.cosines, []) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="there are 1 texts; needed: 2 to 20"):
        similarity(open_folder(mlm, kind="similarity"), "abc")


def test_a_text_longer_than_the_model_is_cut_and_that_is_said(mlm, classifier, tagger):
    long = "a" * 60
    found = classify(open_folder(classifier), long)
    assert found.notes == ["The text has 62 tokens, the model takes 40: the rest was cut."]
    assert found.probabilities == pytest.approx(
        classify(open_folder(classifier), "a" * 38).probabilities
    )
    assert tags(open_folder(tagger), f"x {long} y").words[-1][0] == long
    assert fill_mask(open_folder(mlm), f"[MASK]{long}").notes
    with pytest.raises(UserError, match="stands behind token 40"):
        fill_mask(open_folder(mlm), f"{long}[MASK]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  ", "there is no text"),
        ("no mask", "has no .MASK."),
        ("[MASK]" + "a" * MOST_CHARACTERS, "Shorten it"),
    ],
)
def test_what_cannot_be_asked_is_said_in_words(mlm, text, said):
    with pytest.raises(UserError, match=said):
        fill_mask(open_folder(mlm), text)


def test_kinds_follow_the_architecture_and_another_is_refused(tmp_path):
    for ending, (kind, class_name) in ARCHITECTURES.items():
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [f"Bert{ending}"]}))
        assert kind_of(tmp_path)[:2] == (kind, class_name) and kind in blocks.TABS
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel2"]}))
    with pytest.raises(UserError, match="names the architecture GPT2LMHeadModel2; needed"):
        open_folder(tmp_path)


def test_no_code_of_a_folder_is_run_and_no_pickle_read(mlm, tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "modeling_mine.Mine"}]))
    with pytest.raises(UserError, match="names the stage 'modeling_mine.Mine', which may run code"):
        open_folder(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in mlm.iterdir():
        if path.suffix == ".json":
            (pickled / path.name).write_bytes(path.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as a model"):
        open_folder(pickled)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("modules.json", [{"path": "", "type": THEIRS + "Router"}], "the stage '.*Router', which"),
        ("modules.json", [{"path": "", "type": THEIRS + "Dense"}], "the stage '.*Dense', which"),
        ("modules.json", [{"path": "", "type": "sentence_transformers.util.x"}], "which may run"),
        ("modules.json", [{"path": "..", "type": THEIRS + "Pooling"}], "leaves its folder"),
        ("modules.json", [{"path": "/tmp", "type": THEIRS + "Pooling"}], "is absolute"),
        ("modules.json", [{"type": THEIRS + "Pooling"}], "is no text"),
        ("1_Pooling/pytorch_model.bin", {}, "in pytorch_model.bin alone, a pickle"),
        ("adapter_config.json", {}, "its other weights are elsewhere"),
    ],
)
def test_a_stage_that_may_run_code_is_refused_before_anything_is_loaded(
    tmp_path, file, content, said
):
    good = [{"path": "", "type": THEIRS + "Transformer"}, {"path": "1_Pooling", "type": POOLING}]
    (tmp_path / "modules.json").write_text(json.dumps(good))
    (tmp_path / "1_Pooling").mkdir()
    assert check_stages(tmp_path) == [tmp_path, tmp_path / "1_Pooling"]
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        open_folder(tmp_path)


def test_code_that_a_router_names_is_not_run(mlm, tmp_path):
    pytest.importorskip("sentence_transformers")
    folder = tmp_path / "routed"
    shutil.copytree(mlm, folder)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    routed = {"types": {"x": "modeling_evil.E"}, "structure": {}, "parameters": {}}
    (folder / "router_config.json").write_text(json.dumps(routed))
    (folder / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": THEIRS + "Router"}])
    )
    with pytest.raises(UserError, match="Router"):
        open_folder(folder, kind="similarity")
    assert not (tmp_path / "ran").exists()


def test_what_sentence_transformers_writes_today_is_read(mlm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Normalize

    theirs = sentence_transformers.SentenceTransformer(str(mlm), device="cpu")
    theirs.append(Normalize())
    theirs.save_pretrained(str(tmp_path / "st"))
    assert len(check_stages(tmp_path / "st")) == 3


def test_a_head_that_is_not_in_the_folder_is_not_drawn(place, mlm):
    bare = place / "bare"
    shutil.copytree(mlm, bare)
    config = json.loads((bare / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    (bare / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="bare cannot be read as a model .it lacks classifier.bias"):
        open_folder(bare)


@pytest.mark.parametrize(
    ("kind", "shown"), [("token", "tags"), ("span", "span"), ("choice", "choice")]
)
def test_an_export_of_each_kind_of_task_has_its_tab(tmp_path, kind, shown):
    tokenizer_json = write_tokenizer_json(tmp_path / "tokenizer.json")
    content = json.loads(tokenizer_json.read_text())
    content["post_processor"] = None  # the export's own then has the pair form
    tokenizer_json.write_text(json.dumps(content))
    task = drawn_task("modernbert", kind=kind)
    export_task(dataclasses.replace(task, tokenizer_json=tokenizer_json), tmp_path / "out")
    opened = open_folder(tmp_path / "out")
    assert opened.kind == shown and opened.max_tokens == 40
    if shown == "tags":
        assert [word for word, _, _ in tags(opened, "ada of rome").words] == ["ada", "of", "rome"]
    elif shown == "span":
        found = span(opened, QUESTION, CONTEXT)
        assert CONTEXT[found.start : found.end] == found.answer and found.answer
    else:
        assert sum(choose(opened, "ab", ["c", "d"]).probabilities.values()) == pytest.approx(1.0)


def test_examples_fit_the_labels(classifier, place):
    opened = open_folder(classifier)
    opened.model.config.id2label = {0: "entailment", 1: "not_entailment"}
    assert all(second for _, second in examples.classify(opened))
    opened.model.config.id2label = {0: "negative", 1: "positive"}
    assert examples.classify(opened)[0][0].startswith("A fine film")


def test_a_weights_folder_is_exported_for_the_page_and_leaves_with_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with contextlib.ExitStack() as held:
        named = {"mine": write_start(place / "start")}
        masks, texts = serve.open_all(named, held, similarity=True)
        assert fill_mask(masks, "ab[MASK]", top=2).masks and similarity(texts, "a\nb").cosines
        assert (texts.name, texts.kind) == ("mine, similarity", "similarity")
        assert len([*tmp_path.glob("tessera-page-*")]) == 1
    assert not [*tmp_path.glob("tessera-page-*")]


def test_two_classes_of_one_name_have_a_bar_each_and_a_gap_has_a_name(classifier):
    opened = open_folder(classifier)
    expected = [*classify(opened, "ab").probabilities.values()]
    opened.model.config.id2label = {0: "bad", 1: "bad", 2: "good"}
    found = classify(opened, "ab").probabilities
    assert [*found] == ["bad (0)", "bad (1)", "good (2)"] and [*found.values()] == expected
    opened.model.config.id2label = {0: "bad", 7: "good"}
    assert [*classify(opened, "ab").probabilities] == ["bad", "LABEL_1", "LABEL_2"]


def test_a_roberta_takes_as_many_tokens_as_its_positions_leave():
    import transformers

    small = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.RobertaConfig(**small, max_position_embeddings=14, pad_token_id=1)
    model = transformers.RobertaModel(config).eval()
    longest = longest_text(model, 99)
    assert longest == 12
    model(torch.full((1, longest), 5))
    # transformers 5 looks its segments up by the position, too
    with pytest.raises((IndexError, RuntimeError), match="range|bounds"):
        model(torch.full((1, longest + 1), 5))
    bert = transformers.BertModel(transformers.BertConfig(**small, max_position_embeddings=14))
    assert longest_text(bert, 99) == 14 and longest_text(bert, 6) == 6
    # relative positions: none are named
    funnel = SimpleNamespace(config=SimpleNamespace())
    assert longest_text(funnel, 512) == 512 and longest_text(funnel, 10**30) == 8192


def test_gradio_is_not_told_of_paths_and_editors_by_the_environment(monkeypatch):
    pytest.importorskip("gradio")
    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_VIBE_MODE"):
        monkeypatch.setenv(name, "/")
    blocks.prepare_gradio()
    assert not {"GRADIO_ALLOWED_PATHS", "GRADIO_VIBE_MODE"} & {*os.environ}


def refused(capsys, *words) -> str:
    assert serve.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_mistakes_at_the_command_are_one_line(mlm, capsys, tmp_path, monkeypatch):
    assert "missing is no folder" in refused(capsys, tmp_path / "missing")
    assert "two tabs are called mlm. Name one of them" in refused(capsys, mlm, mlm)
    assert "at most 65,535" in refused(capsys, mlm, "--port", 70000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} cannot be had" in refused(capsys, mlm, "--port", port)
    (tmp_path / "empty").mkdir()
    pytest.importorskip("gradio")
    assert "empty cannot be shown: " in refused(capsys, tmp_path / "empty")

    monkeypatch.setattr(blocks.metadata, "version", lambda name: "3.18.0")
    assert "gradio 3.18.0 is here; needed: 6.6 to below 7. Install" in refused(capsys, mlm)

    def absent(name):
        raise blocks.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(blocks.metadata, "version", absent)
    assert "pip install -e '.[page]'" in refused(capsys, mlm)
