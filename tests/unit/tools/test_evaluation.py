"""Evaluation without fine-tuning against formulas written out, scikit-learn and transformers; and the command on two models."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.models.stored import write_stored
from encoder.tools import notebook
from encoder.tools.evaluation import context, masked
from encoder.tools.evaluation.features import layer_features, text_documents
from encoder.tools.evaluation.health import embedding_health
from encoder.tools.evaluation.pieces import cut_texts
from encoder.train.probe_scores import check_labels, held_back, probe_layers, vote
from launch import evaluate as command
from tests.helpers.hf import exported, stored, write_tokenizer_json

TEXTS = ["a cat sat", "every letter counts [MASK]", "ünï çödé", "x" * 300]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of letters as a Hugging Face folder and as a weights folder."""
    root = tmp_path_factory.mktemp("models")
    tokenizer_json = write_tokenizer_json(root / "tokenizer.json")
    exported(tokenizer_json, root / "hf")
    write_stored(dataclasses.replace(stored(), tokenizer_json=tokenizer_json), root / "weights")
    return root


@pytest.fixture(scope="module")
def bert(place):
    return notebook.load(place / "hf")


def test_pieces_hold_every_letter_once_in_the_model_frame(bert):
    pieces = cut_texts(bert, TEXTS, longest=102, most_tokens=10_000)
    inner = [d.tolist()[1:-1] for d in pieces.documents]
    assert all(d[0] == 1 and d[-1] == 2 for d in pieces.documents)
    assert max(map(len, pieces.documents)) == 102
    # letters are bytes here: "[MASK]" in a text is six of them, and 300 letters are three pieces
    assert 4 not in torch.cat(pieces.documents)
    assert pieces.tokens == pieces.bytes == sum(len(text.encode()) for text in TEXTS)
    assert [len(ids) for ids in inner][-3:] == [100, 100, 100]
    assert all((w[1:-1] >= 0).all() and w[0] == w[-1] == -1 for w in pieces.words)


def test_texts_end_where_enough_tokens_are_read(bert):
    pieces = cut_texts(bert, TEXTS, longest=102, most_tokens=14)
    assert pieces.tokens == 14 and len(pieces.documents) == 2
    with pytest.raises(ConfigError, match="--document-tokens"):
        cut_texts(bert, TEXTS, longest=5000, most_tokens=14)
    with pytest.raises(ConfigError, match="no piece"):
        cut_texts(bert, ["", ""], longest=102, most_tokens=14)


def test_masked_loss_is_transformers_mean_over_all_asked_tokens(place, bert):
    from transformers import AutoModelForMaskedLM

    pieces = cut_texts(bert, TEXTS, longest=102, most_tokens=10_000)
    numbers = masked.masked_loss(bert, pieces, mask_share=0.3, seed=5)
    theirs = AutoModelForMaskedLM.from_pretrained(place / "hf", attn_implementation="eager").eval()
    asked = []

    def keep(bert, found):
        asked.extend(found)
        return masked.MaskedLoss(sum=1.0, count=1, correct=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "loss_of", keep)
        masked.masked_loss(bert, pieces, mask_share=0.3, seed=5)
    nats, right = [], 0
    with torch.no_grad():
        for a in asked:
            logits_MV = theirs(a.shown_T[None]).logits[0][a.index_M]
            nats += torch.nn.functional.cross_entropy(logits_MV, a.value_M, reduction="none")
            right += int((logits_MV.argmax(-1) == a.value_M).sum())
    assert numbers["asked_tokens"] == len(nats) > 80
    assert numbers["loss"] == pytest.approx(float(sum(nats)) / len(nats), abs=1e-4)
    assert numbers["accuracy"] == right / len(nats)
    # one byte a token here
    assert numbers["bits_per_byte"] == pytest.approx(numbers["loss"] / math.log(2))
    assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))


def test_the_loss_of_token_frequencies_alone_is_their_entropy(bert):
    pieces = cut_texts(bert, ["aabb", "aacd"], longest=102, most_tokens=100)
    numbers = masked.masked_loss(bert, pieces, mask_share=0.5)
    shares = np.array([4, 2, 1, 1]) / 8
    assert numbers["unigram_loss"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_pseudo_perplexity_masks_each_token_alone_and_the_rest_of_its_word(bert):
    pieces = cut_texts(bert, ["ab cd", "e"], longest=102, most_tokens=100)
    alone, in_words = [], []
    for ids_T, word_T in zip(pieces.documents, pieces.words, strict=True):
        for place in range(1, len(ids_T) - 1):
            later = [p for p in range(place, len(ids_T)) if word_T[p] == word_T[place]]
            for hidden, into in (([place], alone), (later, in_words)):
                shown = ids_T.clone()
                shown[hidden] = 4
                batch = notebook.packed_documents([shown])
                with torch.no_grad():
                    logits_V = bert.model.decode(bert.model.hidden_states(batch))[place]
                into.append(-float(logits_V.log_softmax(-1)[ids_T[place]]))
    numbers = masked.pseudo_perplexity(bert, pieces)
    assert len(alone) == 6
    assert numbers["pseudo_perplexity"] == pytest.approx(math.exp(np.mean(alone)), rel=1e-4)
    assert numbers["pseudo_perplexity_of_words"] == pytest.approx(
        math.exp(np.mean(in_words)), rel=1e-4
    )
    assert numbers["pseudo_perplexity"] != numbers["pseudo_perplexity_of_words"]


def test_features_are_the_means_of_transformers_hidden_states(place, bert):
    from transformers import AutoModelForMaskedLM

    theirs = AutoModelForMaskedLM.from_pretrained(place / "hf", attn_implementation="eager").eval()
    documents = text_documents(bert, TEXTS, longest=102)
    features = layer_features(bert, documents)
    assert len(features) == 5 and all(x.shape == (4, 32) for x in features)
    with torch.no_grad():
        for number, ids_T in enumerate(documents):
            found = theirs.model(ids_T[None], output_hidden_states=True)
            # the last of their hidden_states is before the final norm in some versions
            states = [*found.hidden_states[:-1], found.last_hidden_state]
            for ours, x_1TC in zip(features, states, strict=True):
                torch.testing.assert_close(ours[number], x_1TC[0].mean(0), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="text 2 has no token"):
        text_documents(bert, ["a", ""], longest=102)


def test_health_is_the_formulas_over_all_pairs():
    x_NC = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    unit = (x_NC / x_NC.norm(dim=1, keepdim=True)).double().numpy()
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    cosine = np.mean([unit[i] @ unit[j] for i, j in pairs])
    energy = np.mean([np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i, j in pairs])
    singular = np.linalg.svd(x_NC.double().numpy(), compute_uv=False)
    p = singular / singular.sum()
    found = embedding_health(x_NC)
    assert found["anisotropy"] == pytest.approx(cosine, abs=1e-6)
    assert found["uniformity"] == pytest.approx(np.log(energy), abs=1e-6)
    assert found["rank_me"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-6)


def test_health_of_one_direction_and_of_an_even_spread():
    same = embedding_health(torch.ones(5, 4))
    assert same["anisotropy"] == pytest.approx(1.0) and same["rank_me"] == pytest.approx(1.0)
    assert same["uniformity"] == pytest.approx(0.0, abs=1e-9)
    even = embedding_health(torch.eye(4))
    assert even["anisotropy"] == pytest.approx(0.0) and even["rank_me"] == pytest.approx(4.0)


def test_neighbours_vote_as_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    draw = np.random.default_rng(3)
    known = draw.normal(size=(60, 5))
    asked = draw.normal(size=(20, 5))
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, asked))
    y = draw.integers(3, size=60)
    found = vote(known, y, asked, [1, 5, 20])
    for size, answers in found.items():
        theirs = KNeighborsClassifier(size, metric="cosine").fit(known, y).predict(asked)
        assert answers.tolist() == theirs.tolist()


def test_the_probe_chooses_its_layer_by_texts_that_are_held_back():
    draw = torch.Generator().manual_seed(4)
    y_train, y_test = (torch.randint(2, (n,), generator=draw) for n in (200, 100))
    told = [
        y[:, None] * 3.0 + torch.randn(len(y), 4, generator=draw) * 0.1 + 1.0
        for y in (y_train, y_test)
    ]
    noise = [torch.randn(len(y), 4, generator=draw) for y in (y_train, y_test)]
    words = [[("no", "yes")[i] for i in y.tolist()] for y in (y_train, y_test)]
    # the direction is what is asked, not the length: a third number keeps it
    told = [torch.cat((x, torch.ones(len(x), 1)), 1) for x in told]
    noise = [torch.cat((x, torch.ones(len(x), 1)), 1) for x in noise]
    scores = probe_layers([noise[0], told[0]], words[0], [noise[1], told[1]], words[1], seed=1)
    assert scores.best_linear.layer == 1 and scores.best_linear.test == 1.0
    assert scores.linear[0].test < 0.7
    numbers = scores.numbers()
    assert numbers["probe_accuracy"] == 1.0 and 0.4 < numbers["majority"] < 0.6


def test_a_tenth_of_each_class_is_held_back_and_of_none_all():
    y = np.array([0] * 50 + [1] * 20 + [2] * 2)
    back, fitted = held_back(y, seed=3)
    assert np.bincount(y[back], minlength=3).tolist() == [5, 2, 0]
    assert sorted([*back, *fitted]) == list(range(72))
    back, fitted = held_back(np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), seed=3)
    assert len(back) == 1 and len(fitted) == 9


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (["a"] * 9, ["a"], "one label"),
        (["a", "b"] * 9, ["a", "c"], "'c' of the test texts"),
        (["a", "b"], ["a"], "2 training texts for 2 labels"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(train, test, said):
    with pytest.raises(ConfigError, match=said):
        check_labels(train, test)


def test_context_lengths_double_up_to_the_longest():
    assert context.context_lengths(8192) == [512, 1024, 2048, 4096, 8192]
    assert context.context_lengths(1024) == [256, 512, 1024]
    assert context.context_lengths(140) == [35, 70, 140]
    assert context.context_lengths(32) == [32]


def test_every_context_asks_the_same_last_tokens(bert):
    text = "".join(chr(97 + i % 26) for i in range(200))
    (window_T,) = context.context_windows(bert, [text, "short"], longest=140)
    chosen = np.arange(35) % 3 == 0
    ends = [context._end_of(bert, window_T, length, chosen) for length in (35, 70, 140)]
    assert [len(a.shown_T) for a in ends] == [35, 70, 140]
    assert len({tuple(a.value_M.tolist()) for a in ends}) == 1 and len(ends[0].value_M) == 11
    # counted from the end they are the same places
    assert len({tuple((len(a.shown_T) - a.index_M).tolist()) for a in ends}) == 1
    assert all((a.shown_T[a.index_M] == 4).all() for a in ends)
    with pytest.raises(ConfigError, match="no text has 140 tokens"):
        context.context_windows(bert, ["short"], longest=140)


def test_losses_by_position_average_to_the_loss_of_the_whole_window(bert):
    text = "".join(chr(97 + i % 7) for i in range(200))
    windows = context.context_windows(bert, [text, text[3:]], longest=140)
    found = context._position_loss(bert, windows, mask_share=0.9, seed=1)
    assert [*found] == [1, 18, 35, 52, 70, 87, 104, 121]
    asked = []
    for number, window_T in enumerate(windows):
        chosen_T = context.generator(1, "positions", number).random(140) < 0.9
        chosen_T[[0, -1]] = False
        asked.append(context._hidden(bert, window_T, torch.from_numpy(np.flatnonzero(chosen_T))))
    counts = [
        sum(int(((a.index_M >= start) & (a.index_M < end)).sum()) for a in asked)
        for start, end in zip([*found], [*[*found][1:], 139], strict=True)
    ]
    mean = sum(c * loss for c, loss in zip(counts, found.values(), strict=True)) / sum(counts)
    assert mean == pytest.approx(masked.loss_of(bert, asked).mean, rel=1e-5)


def test_a_needle_lies_at_its_depth_and_its_word_is_asked_at_the_end(bert):
    window_T = torch.tensor([1, *[9] * 138, 2])
    found = [
        context._hay(bert, window_T, [20, 21, 22], 21, length=100, depth=depth)
        for depth in (0.0, 0.5, 1.0)
    ]
    assert all(len(ids) == 100 and ids[-4:].tolist() == [20, 4, 22, 2] for ids in found)
    assert [ids.tolist().index(20) for ids in found] == [1, 47, 93]
    assert context._hay(bert, window_T, [20] * 60, 20, length=100, depth=0.5) is None


def test_only_words_that_are_one_token_are_asked_of_a_needle(bert):
    # every letter is a token here: no word is one
    assert context._single_tokens(bert.tokenizer) == {}
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["The", "code", "of", "Anna", "is", ".", "river", "stone", "music", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = context._single_tokens(tokenizer)
    assert {word: found[word] for word in ("river", "stone", "music")} == {
        "river": 6,
        "stone": 7,
        "music": 8,
    }


def test_the_command_sets_two_models_side_by_side(place, tmp_path, capsys):
    texts = tmp_path / "held_out.jsonl"
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 3))
    rows = [{"text": f"{w} {i}", "label": w} for i in range(12) for w in ("good", "bad")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = [f"one={place / 'hf'}", str(place / "weights"), "--texts", str(texts)]
    words += ["--train", str(tmp_path / "rows.jsonl"), "--test", str(tmp_path / "rows.jsonl")]
    words += ["--measures", "loss,health,probe,pseudo,context", "--document-tokens", "64"]
    words += ["--pseudo-tokens", "9", "--out", str(tmp_path / "out")]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    assert "one" in printed and "weights" in printed and "perplexity" in printed
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    one, two = (m["numbers"] for m in result["models"])
    # a Hugging Face folder and a weights folder of the same model
    assert one == pytest.approx(two, rel=1e-5)
    assert one["probe_accuracy"] > 0.9 and one["rank_me"] > 1
    assert len(result["models"][0]["probe"]["linear"]) == 5
    assert (tmp_path / "out" / "context.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "table.md").read_text().startswith("|  | one | weights |")


def test_an_untrained_twin_has_the_weights_that_its_seed_draws(place, tmp_path):
    twin = notebook.load(place / "hf", untrained=5)
    again = notebook.preset("modernbert_17m", seed=5, **dataclasses.asdict(twin.model.config))
    for (name, ours), (other, theirs) in zip(
        twin.model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(ours, theirs)
    assert not torch.equal(
        next(twin.model.parameters()), next(notebook.load(place / "hf").model.parameters())
    )

    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    words = [str(place / "hf"), "--untrained", "--seed", "5", "--texts", str(tmp_path / "t.jsonl")]
    assert command.main([*words, "--measures", "loss", "--out", str(tmp_path / "out")]) == 0
    trained, untrained = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    assert untrained["name"] == "hf untrained" and "seed 5" in untrained["origin"]
    pieces = cut_texts(twin, TEXTS, longest=128, most_tokens=100_000)
    theirs = masked.masked_loss(twin, pieces, mask_share=0.15, seed=5)
    assert untrained["numbers"]["loss"] == theirs["loss"] != trained["numbers"]["loss"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing is asked"),
        (["--texts", "absent.txt"], "absent.txt"),
        (["--measures", "los", "--texts", "x"], "no measure 'los'"),
        (["--measures", "health"], "health needs texts"),
        (["--train", "absent.jsonl"], "absent.jsonl"),
        (["--texts", "lab.csv"], "Known: sentence, label. Name it: --text COLUMN. Or leave"),
        (["--train", "lab.csv"], "Name columns by --text COLUMN, --label COLUMN."),
        (["--pairs", "lab.csv"], "Name columns by --good COLUMN, --bad COLUMN, --by COLUMN."),
        (["{model}", "--texts", "x"], "two models are called"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    place, tmp_path, monkeypatch, capsys, words, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab.csv").write_text("sentence,label\nx,1\n")
    model = str(place / "hf")
    words = [model, *[w.format(model=model) for w in words], "--out", "out"]
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_head_is_not_asked_what_the_head_says(place, tmp_path, capsys):
    bare = notebook.load(place / "hf")
    bare = dataclasses.replace(bare, drawn=("decoder",))
    texts = tmp_path / "t.txt"
    texts.write_text("a b c\n")
    (tmp_path / "u.txt").write_text("d e f\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebook, "load", lambda path: bare)
        words = ["bare", "--texts", str(texts), str(tmp_path / "u.txt"), "--document-tokens", "64"]
        assert command.main(words) == 0
    printed = capsys.readouterr().out
    assert "loss: left out, for the model came without decoder" in printed
    assert "perplexity" not in printed and "RankMe" in printed
