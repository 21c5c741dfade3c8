"""The page: a tab for each folder. Alone in importing gradio.

Every tab's event has a name, so that a program can ask the page, too: /fill_mask, and /fill_mask_2 of a second folder.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from encoder.base.errors import ConfigError, UserError
from encoder.tools.page import examples
from encoder.tools.page.choice import choose
from encoder.tools.page.classify import NUMBER, SEVERAL, classify, problem_of
from encoder.tools.page.fill_mask import bars, fill_mask
from encoder.tools.page.folders import Opened
from encoder.tools.page.similarity import similarity
from encoder.tools.page.span import ANSWER, span
from encoder.tools.page.tags import tags

TITLE = "Tessera"
MOST_MASKS = 6  # bars that are shown; a text may have more masks
MOST_BARS = 20
MOST_EXAMPLE_CHARACTERS = 48  # on a button
TITLES = {
    "fill_mask": "fill-mask",
    "classify": "classification",
    "tags": "tags of words",
    "span": "answers in a text",
    "choice": "one of several answers",
    "similarity": "similarity of texts",
}
# read by gradio from the environment: other machines, other programs, files of this one, an editor of the page's code
NOT_FOR_THE_PAGE = (
    "GRADIO_SHARE",
    "GRADIO_ROOT_PATH",
    "GRADIO_NODE_PATH",
    "GRADIO_MCP_SERVER",
    "GRADIO_ALLOWED_PATHS",
    "GRADIO_VIBE_MODE",
)
# nothing is asked of a font server
FONTS = ("system-ui", "sans-serif")
CODE_FONTS = ("ui-monospace", "monospace")


def prepare_gradio() -> None:
    """Before gradio's first import: it tells nobody that it runs, and neither library looks for a hub.

    Raises ConfigError where it is not here, or is another than the page is written for.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in NOT_FOR_THE_PAGE:
        os.environ.pop(name, None)
    # a proxy of the environment is not asked for this machine
    local = "127.0.0.1,localhost"
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), local]))
    try:
        version = metadata.version("gradio")
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            "the page is shown by gradio, which is not here. Install the extra: pip install -e"
            " '.[page]'"
        ) from error
    # about its own web server's names
    warnings.filterwarnings("ignore", module=r"gradio\.")
    major, minor = (int(part) for part in version.split(".")[:2])
    if major != 6 or minor < 6:
        raise ConfigError(
            f"gradio {version} is here; needed: 6.6 to below 7. Install the extra: pip install -e"
            " '.[page]'"
        )


def build_page(folders: Sequence[Opened]) -> Any:
    """gradio's Blocks, ready to be launched."""
    import gradio as gr

    names = _event_names(folders)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        with gr.Tabs():
            for opened, name in zip(folders, names, strict=True):
                with gr.Tab(opened.name):
                    gr.Markdown(_heading(opened))
                    TABS[opened.kind](gr, opened, name)
    return page


def launch_page(page: Any, *, port: int | None) -> str:
    """Serves the page to this machine, in threads of its own; returns its address. Raises OSError for a taken port."""
    import gradio as gr

    theme = gr.themes.Default(font=list(FONTS), font_mono=list(CODE_FONTS))
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        footer_links=["api"],
        theme=theme,
    )
    return str(address)


def _event_names(folders: Sequence[Opened]) -> list[str]:
    """fill_mask, fill_mask_2, classify, ..."""
    seen: Counter[str] = Counter()
    names = []
    for opened in folders:
        seen[opened.kind] += 1
        number = seen[opened.kind]
        names.append(opened.kind if number == 1 else f"{opened.kind}_{number}")
    return names


def _heading(opened: Opened) -> str:
    return (
        f"**{TITLES[opened.kind]}** with {opened.architecture},"
        f" {opened.parameters / 1e6:.1f} M parameters, texts of up to"
        f" {opened.max_tokens:,} tokens"
    )


def _said(notes: Sequence[str]) -> str:
    return "\n".join(f"*{note}*\n" for note in notes)


def _in_words(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose mistakes are shown in the page with our words."""
    import gradio as gr

    def told(*values: Any) -> Any:
        try:
            return answer(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return told


def _examples(gr: Any, rows: Sequence[Sequence[str]], inputs: list[Any], name: str) -> None:
    """Buttons that fill the fields. gradio's own Examples stay empty in a tab that is not seen at first."""
    gr.Markdown("Examples")
    with gr.Row():
        for number, row in enumerate(rows, 1):
            gr.Button(_short(row[0]), size="sm", min_width=120).click(
                lambda values=tuple(row): values[0] if len(values) == 1 else values,
                outputs=inputs,
                api_name=f"{name}_example_{number}",
                api_visibility="undocumented",
                queue=False,
            )


def _short(text: str) -> str:
    line = text.partition("\n")[0]
    if len(line) <= MOST_EXAMPLE_CHARACTERS:
        return line
    return f"{line[:MOST_EXAMPLE_CHARACTERS]}..."


def _fill_mask(gr: Any, opened: Opened, name: str) -> None:
    text = gr.Textbox(label="text with [MASK]", lines=3, max_lines=12)
    top = gr.Slider(1, MOST_BARS, value=5, step=1, label="answers for each [MASK]")
    ask = gr.Button("Fill in", variant="primary")
    with gr.Row():
        labels = [
            gr.Label(label=f"[MASK] {number}", visible=number == 1, show_heading=False)
            for number in range(1, MOST_MASKS + 1)
        ]
    notes = gr.Markdown()
    _examples(gr, examples.FILL_MASK, [text], name)

    def answer(asked: str, number: float) -> list[Any]:
        filled = fill_mask(opened, asked, top=int(number))
        found = bars(opened, filled)
        said = list(filled.notes)
        if len(found) > MOST_MASKS:
            said.append(f"The first {MOST_MASKS} of {len(found)} masks are shown.")
        shown: list[Any] = [
            gr.Label(value=share, num_top_classes=int(number), visible=True)
            for share in found[:MOST_MASKS]
        ]
        shown += [gr.Label(value=None, visible=False)] * (MOST_MASKS - len(shown))
        return [*shown, _said(said)]

    gr.on(
        [ask.click, text.submit],
        _in_words(answer),
        inputs=[text, top],
        outputs=[*labels, notes],
        api_name=name,
    )


def _classify(gr: Any, opened: Opened, name: str) -> None:
    problem = problem_of(opened)
    text = gr.Textbox(label="text", lines=3, max_lines=12)
    second = gr.Textbox(label="second text, for a model that compares two", lines=2, max_lines=12)
    ask = gr.Button("Classify", variant="primary")
    result: Any
    if problem == NUMBER:
        result = gr.Number(label="value", precision=4)
    else:
        several = "labels, each for itself" if problem == SEVERAL else "label"
        result = gr.Label(label=several, num_top_classes=MOST_BARS, show_heading=problem != SEVERAL)
    notes = gr.Markdown()
    _examples(gr, examples.classify(opened), [text, second], name)

    def answer(asked: str, other: str) -> list[Any]:
        found = classify(opened, asked, other)
        value = found.probabilities if found.number is None else found.number
        return [value, _said(found.notes)]

    gr.on(
        [ask.click, text.submit, second.submit],
        _in_words(answer),
        inputs=[text, second],
        outputs=[result, notes],
        api_name=name,
    )


def _tags(gr: Any, opened: Opened, name: str) -> None:
    text = gr.Textbox(label="text", lines=4, max_lines=12)
    ask = gr.Button("Tag", variant="primary")
    result = gr.HighlightedText(label="tags", show_legend=True, show_whitespaces=False)
    notes = gr.Markdown()
    _examples(gr, examples.TAGS, [text], name)

    def answer(asked: str) -> list[Any]:
        found = tags(opened, asked)
        return [found.spans, _said(found.notes)]

    gr.on(
        [ask.click, text.submit],
        _in_words(answer),
        inputs=[text],
        outputs=[result, notes],
        api_name=name,
    )


def _span(gr: Any, opened: Opened, name: str) -> None:
    question = gr.Textbox(label="question")
    context = gr.Textbox(label="text that holds the answer", lines=6, max_lines=12)
    ask = gr.Button("Answer", variant="primary")
    result = gr.Textbox(label="answer", interactive=False)
    shown = gr.HighlightedText(
        label="in its context", color_map={ANSWER: "green"}, show_whitespaces=False
    )
    notes = gr.Markdown()
    _examples(gr, examples.SPAN, [question, context], name)

    def answer(asked: str, text: str) -> list[Any]:
        found = span(opened, asked, text)
        given = found.answer or "no answer"
        return [f"{given}   ({found.probability:.1%})", found.spans, _said(found.notes)]

    gr.on(
        [ask.click, question.submit],
        _in_words(answer),
        inputs=[question, context],
        outputs=[result, shown, notes],
        api_name=name,
    )


def _choice(gr: Any, opened: Opened, name: str) -> None:
    text = gr.Textbox(label="text", lines=3, max_lines=12)
    question = gr.Textbox(label="question, where the model was trained with one")
    answers = gr.Textbox(label="answers, one a line", lines=4, max_lines=12)
    ask = gr.Button("Choose", variant="primary")
    result = gr.Label(label="answer", num_top_classes=MOST_BARS)
    notes = gr.Markdown()
    _examples(gr, examples.CHOICE, [text, question, answers], name)

    def answer(asked: str, about: str, lines: str) -> list[Any]:
        found = choose(opened, asked, lines.splitlines(), question=about)
        return [found.probabilities, _said(found.notes)]

    gr.on(
        [ask.click],
        _in_words(answer),
        inputs=[text, question, answers],
        outputs=[result, notes],
        api_name=name,
    )


def _similarity(gr: Any, opened: Opened, name: str) -> None:
    lines = gr.Textbox(label="texts, one a line", lines=6, max_lines=12)
    ask = gr.Button("Compare", variant="primary")
    result = gr.Dataframe(label="cosines", interactive=False, wrap=True)
    notes = gr.Markdown()
    _examples(gr, examples.SIMILARITY, [lines], name)

    def answer(asked: str) -> list[Any]:
        found = similarity(opened, asked)
        numbers = [str(number) for number in range(1, len(found.texts) + 1)]
        rows = [
            [f"{number}  {text}", *(f"{cosine:.3f}" for cosine in row)]
            for number, text, row in zip(numbers, found.texts, found.cosines, strict=True)
        ]
        return [{"headers": ["text", *numbers], "data": rows}, _said(found.notes)]

    gr.on(
        [ask.click],
        _in_words(answer),
        inputs=[lines],
        outputs=[result, notes],
        api_name=name,
    )


TABS: dict[str, Callable[[Any, Opened, str], None]] = {
    "fill_mask": _fill_mask,
    "classify": _classify,
    "tags": _tags,
    "span": _span,
    "choice": _choice,
    "similarity": _similarity,
}
