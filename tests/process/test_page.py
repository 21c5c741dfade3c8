"""The page as people and programs use it: a server process, a client, and a real headless browser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from encoder.tools.page.classify import classify
from encoder.tools.page.fill_mask import bars, fill_mask
from encoder.tools.page.folders import open_folder
from encoder.tools.page.span import span
from encoder.tools.page.tags import tags
from tests.helpers.browser import browser, chromium
from tests.helpers.installed import needs
from tests.helpers.pages import write_page_folder

ROOT = Path(__file__).resolve().parents[2]
needs("gradio", extra="page")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One of each kind."""
    place = tmp_path_factory.mktemp("folders")
    found = {
        "masks": ("BertForMaskedLM", {}),
        "labels": (
            "BertForSequenceClassification",
            {"id2label": {0: "bad", 1: "good", 2: "so so"}, "num_labels": 3},
        ),
        "words": ("BertForTokenClassification", {"id2label": {0: "O", 1: "PER"}}),
        "reader": ("BertForQuestionAnswering", {}),
    }
    return {
        name: write_page_folder(place / name, cls, **told) for name, (cls, told) in found.items()
    }


@pytest.fixture(scope="module")
def address(folders):
    """Of the page. Ctrl-C ends it with 130 and one word."""
    words = [sys.executable, ROOT / "launch" / "serve.py", "--similarity", *folders.values()]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("http"):
            break
    else:
        raise AssertionError(process.communicate()[1])
    found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/   \(Ctrl-C ends it\)\n", said[-1])
    assert found, said
    assert "reader: span\n" in said
    yield found[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped\n")


def test_a_program_gets_the_answers_of_the_functions(address, folders):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    opened = open_folder(folders["masks"])
    (expected,) = bars(opened, fill_mask(opened, "ab[MASK]", top=3))
    shown = client.predict("ab[MASK]", 3, api_name="/fill_mask")[0]["value"]
    found = {one["label"]: one["confidence"] for one in shown["confidences"]}
    assert found == pytest.approx(expected, rel=1e-4)
    shown, note = client.predict("ab", "cd", api_name="/classify")
    found = {one["label"]: one["confidence"] for one in shown["confidences"]}
    expected = classify(open_folder(folders["labels"]), "ab", "cd").probabilities
    assert found == pytest.approx(expected, rel=1e-4) and note == ""
    assert "62 tokens" in client.predict("a" * 60, "", api_name="/classify")[1]
    shown, _ = client.predict("ada of rome", api_name="/tags")
    spans = [(one["token"], one["class_or_confidence"]) for one in shown]
    assert spans == tags(open_folder(folders["words"]), "ada of rome").spans
    answer, _, _ = client.predict("who?", "ada was", api_name="/span")
    assert answer.startswith(span(open_folder(folders["reader"]), "who?", "ada was").answer)
    shown, _ = client.predict("ab\nab\ncd", api_name="/similarity")
    assert [row[1] for row in shown["data"]][:2] == ["1.000", "1.000"]
    with pytest.raises(AppError, match=r"'ab' has no \[MASK\]; write one where"):
        client.predict("ab", 3, api_name="/fill_mask")


def test_a_person_types_clicks_and_reads_and_nothing_is_asked_elsewhere(address, tmp_path):
    chromium()
    with browser(tmp_path / "profile") as tab:
        tab.open(address, words="fill-mask with BertForMaskedLM")
        tab.type("text with [MASK]", "no mask")
        tab.click("button", "Fill in")
        tab.wait_for("'no mask' has no [MASK]; write one")
        tab.type("text with [MASK]", "ab[MASK]cd[MASK]")
        tab.click("button", "Fill in")
        tab.wait_for("[MASK] 2")
        tab.click("[role=tab]", "labels")
        tab.click("button", "Please send me the report before noon.")
        tab.wait(
            "[...document.querySelectorAll('textarea')].some(e => e.value.startsWith('Please'))",
            what="the example",
        )
        tab.click("button", "Classify")
        tab.wait_for("so so")
        tab.click("[role=tab]", "reader")
        tab.type("question", "who?")
        tab.type("text that holds the answer", "ada was in rome")
        tab.click("button", "Answer")
        tab.wait_for("ANSWER")
        tab.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        asked = {url for url in tab.requests if not url.startswith(("data:", "blob:"))}
    assert len(asked) > 20
    assert {url for url in asked if not url.startswith(address)} == set()
