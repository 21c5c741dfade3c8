"""A model with a task to transformers' class for it, proven before the folder has its name.

    a text        ours          ModernBERT      BERT                RoBERTa                  DistilBERT
                  head.dense    head.dense      bert.pooler.dense   classifier.dense         pre_classifier
                  head.norm     head.norm
                  classifier    classifier      classifier          classifier.out_proj      classifier

ALBERT has BERT's, its pooler under the name albert.pooler.
Tokens, spans and choices have their own names in FORMS. The body has the names of encoder/models/hf/bridge.py. Logits are
compared with transformers' on texts of several lengths, each alone and padded on the right; on the left only where a class does
not stand on the first token, which would be padding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.base.batch import TokenBatch, packed_documents
from encoder.base.errors import ExportError
from encoder.base.files import atomic_folder, native_path, write_json
from encoder.base.rng import generator
from encoder.base.schema import to_yaml
from encoder.base.tokenizer_json import SpecialIds
from encoder.base.units import begun, with_article
from encoder.models.contract import ModelConfig
from encoder.models.hf.bridge import Bridge, Padding
from encoder.models.hf.card import CARD, Table, plain, table_text
from encoder.models.hf.catalog import bridge_of, export_blocker
from encoder.models.hf.onnx import PROOF_TOKENS, Graph, check_onnx_installed, write_graph
from encoder.models.hf.parity import (
    PADDING_TOKENS,
    TOLERANCE,
    TOLERANCE_DRAWN,
    TOLERANCE_FP64,
    Proof,
    drawn_difference,
)
from encoder.models.hf.quiet import without_bars
from encoder.models.hf.tokenizer import write_tokenizer
from encoder.models.hf.write import PROOF, files_of_earlier, proof_file
from encoder.models.stored import WEIGHTS, write_safetensors
from encoder.models.with_task import (
    AnyTaskModel,
    HeadFamily,
    HeadKind,
    HeadShape,
    build_task_model,
    layers_of,
)

Sides = tuple[Literal["left", "right"], ...]
# ours -> theirs, stems of a head's parameters
Names = Mapping[str, str]
_MODERN: Names = {"head.dense": "head.dense", "head.norm": "head.norm", "classifier": "classifier"}
_BARE: Names = {"classifier": "classifier"}
_BERT: Names = {"head.dense": "bert.pooler.dense", "classifier": "classifier"}
_OWN_CLASS: Names = {"head.dense": "classifier.dense", "classifier": "classifier.out_proj"}
_ALBERT: Names = {"head.dense": "albert.pooler", "classifier": "classifier"}
_DISTILBERT: Names = {"head.dense": "pre_classifier", "classifier": "classifier"}
_ELECTRA_CHOICE: Names = {"head.dense": "sequence_summary.summary", "classifier": "classifier"}
_XLNET: Names = {"head.dense": "sequence_summary.summary", "classifier": "logits_proj"}
_QUESTION: Names = {"classifier": "qa_outputs"}


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """transformers' classes for one kind of head."""

    suffix: str  # of the class's name
    pipeline: str  # the tag of a card
    names: Mapping[HeadFamily, Names]
    outputs: str  # what a card says of them, where they have no names
    usage: str  # Python that a card shows, behind the imports that it needs
    # (their output) -> logits [B, P, K] of a batch: one place of a text, or each of its tokens
    logits: Callable[[Any], Tensor]
    dropout: Mapping[HeadFamily, str]  # the word of config.json for the head's, where there is one
    by_token: bool = False  # asked at each token
    graph_outputs: tuple[str, ...] = ("logits",)  # names of a graph's outputs, as in their output
    choices: bool = False  # their ids are [B, choices, L]

    @property
    def usage_import(self) -> str:
        """What `usage` needs of transformers."""
        # newer versions have no pipeline for answers in a text
        return "pipeline" if "pipeline(" in self.usage else f"{self.auto_class}, AutoTokenizer"

    @property
    def auto_class(self) -> str:
        """That loads it."""
        return f"AutoModel{self.suffix}"

    def architecture(self, family: HeadFamily) -> str:
        """The class's name."""
        return f"{_PREFIXES[family]}{self.suffix}"


_PREFIXES: dict[HeadFamily, str] = {
    "modernbert": "ModernBert",
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "albert": "Albert",
    "electra": "Electra",
    "xlnet": "XLNet",
}


def _dropouts(distilbert: str | None) -> dict[HeadFamily, str]:
    families: tuple[HeadFamily, ...] = ("modernbert", "bert", "roberta", "electra")
    found: dict[HeadFamily, str] = dict.fromkeys(families, "classifier_dropout")
    found["albert"] = "classifier_dropout_prob"
    # XLNet's of tokens has none
    if distilbert is not None:
        found |= {"distilbert": distilbert, "xlnet": "summary_last_dropout"}
    return found


FORMS: dict[HeadKind, HeadForm] = {
    "text": HeadForm(
        suffix="ForSequenceClassification",
        pipeline="text-classification",
        names={
            "modernbert": _MODERN,
            "bert": _BERT,
            "roberta": _OWN_CLASS,
            "electra": _OWN_CLASS,
            "distilbert": _DISTILBERT,
            "albert": _ALBERT,
            "xlnet": _XLNET,
        },
        outputs="a number",
        usage='answer = pipeline("text-classification", model="FOLDER")("a text")',
        logits=lambda found: found.logits[:, None],
        dropout=_dropouts("seq_classif_dropout"),
    ),
    "token": HeadForm(
        suffix="ForTokenClassification",
        pipeline="token-classification",
        names={
            "modernbert": _MODERN,
            "bert": _BARE,
            "roberta": _BARE,
            "distilbert": _BARE,
            "albert": _BARE,
            "electra": _BARE,
            "xlnet": _BARE,
        },
        outputs="a tag of each word, on its first token",
        usage=(
            'answer = pipeline("token-classification", model="FOLDER",\n'
            '                  aggregation_strategy="first")("words of a text")'
        ),
        logits=lambda found: found.logits,
        # DistilBERT's is that of its body
        dropout=_dropouts(None),
        by_token=True,
    ),
    "span": HeadForm(
        suffix="ForQuestionAnswering",
        pipeline="question-answering",
        names={
            "modernbert": _MODERN,
            "bert": _QUESTION,
            "roberta": _QUESTION,
            "distilbert": _QUESTION,
            "albert": _QUESTION,
            "electra": _QUESTION,
        },
        outputs="start and end of the answer",
        usage=(
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
            'tokens = tokenizer("a question", "a text that has the answer", return_tensors="pt")\n'
            'found = AutoModelForQuestionAnswering.from_pretrained("FOLDER")(**tokens)\n'
            "first, last = found.start_logits.argmax(), found.end_logits.argmax()\n"
            'answer = tokenizer.decode(tokens["input_ids"][0, first : last + 1])'
        ),
        logits=lambda found: torch.stack([found.start_logits, found.end_logits], dim=-1),
        dropout={"modernbert": "classifier_dropout", "distilbert": "qa_dropout"},
        by_token=True,
        graph_outputs=("start_logits", "end_logits"),
    ),
    "choice": HeadForm(
        suffix="ForMultipleChoice",
        pipeline="multiple-choice",
        names={
            "modernbert": _MODERN,
            "bert": _BERT,
            "roberta": {"head.dense": "roberta.pooler.dense", "classifier": "classifier"},
            "distilbert": _DISTILBERT,
            "albert": _ALBERT,
            "electra": _ELECTRA_CHOICE,
            "xlnet": _XLNET,
        },
        outputs="a score of each choice",
        usage=(
            'texts, endings = ["a beginning", "a beginning"], ["one ending", "another"]\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
            'tokens = tokenizer(texts, endings, padding=True, return_tensors="pt")\n'
            'model = AutoModelForMultipleChoice.from_pretrained("FOLDER")\n'
            "answer = model(**{name: x[None] for name, x in tokens.items()}).logits.argmax()"
        ),
        logits=lambda found: found.logits[:, :, None],
        dropout={**_dropouts("seq_classif_dropout"), "electra": "summary_last_dropout"},
        choices=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainedTask:
    """A fine-tuned model at rest."""

    name: str
    config: ModelConfig
    head: HeadShape
    weights: dict[str, Tensor]  # fp32 on the CPU, by our names
    tokenizer_json: Path
    specials: SpecialIds
    max_tokens: int
    labels: tuple[str, ...] | None  # of the outputs; None: a number
    problem: str | None  # transformers' problem_type, where its class has one
    origin: str
    facts: dict[str, str] = field(default_factory=dict)  # of the training, for the card
    dataset: str | None = None  # of the hub, that it was trained on
    # by data set: metric -> value; None where it was no finite number
    results: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    # of config.json beside transformers' words: how answers are read off logits
    carried: Mapping[str, Any] = field(default_factory=dict)


def export_task(task: TrainedTask, out: Path, *, onnx: bool = False) -> dict[str, Proof]:
    """Writes `out`, a folder that transformers' class for the task and AutoTokenizer load; the proofs of it.

    Raises UserError, leaving nothing behind, where transformers has no such model or gives other logits.

    task: the model
    out: the folder
    onnx: also onnx/model.onnx, for onnxruntime
    """
    if onnx:
        check_onnx_installed()
    bridge = bridge_of(task.config, task.specials)
    if bridge is None or (stays := export_blocker(task.config)):
        raise ExportError(
            f"{task.name} goes {stays if bridge else 'not to Hugging Face, which has no class for it'}."
        )
    # what config.json means of the body is seen on drawn weights, as for a language model
    drawn = drawn_difference(bridge.to_settings(task.config, task.specials), task.config)
    if not drawn <= TOLERANCE_DRAWN:
        raise ExportError(
            f"the logits of transformers differ from ours by {drawn:.2e} on drawn weights in fp64;"
            f" needed: at most {TOLERANCE_DRAWN:.0e}. Nothing was written. Use a version of"
            " transformers that the README names."
        )
    earlier = files_of_earlier(out)
    ours = task_model(task)
    with atomic_folder(out, mark=PROOF, ours=earlier) as part:
        write_tokenizer(
            part,
            task.tokenizer_json,
            task.specials,
            vocab_size=task.config.vocab_size,
            max_tokens=task.max_tokens,
            segments=getattr(task.config, "type_vocab_size", 0) > 1,
        )
        write_safetensors(their_weights(task, bridge), part / WEIGHTS)
        settings = their_settings(task, bridge)
        write_json(part / "config.json", settings)
        theirs = _loaded(task, part, bridge)
        padding = bridge.padding(settings)
        proofs = {"transformers": _prove(task, ours, theirs, padding)}
        if onnx:
            graph = Graph(_graph_of(task, theirs.float(), part))
            # as much as transformers was measured to round
            rounding = min(2 * proofs["transformers"].max_abs_difference, 1e-2)
            proofs["onnxruntime"] = _prove_graph(
                task, ours, graph, padding, tolerance=max(TOLERANCE, rounding)
            )
        _write_card(
            part, task, bridge, proofs, parameters=sum(p.numel() for p in ours.parameters())
        )
        write_json(part / PROOF, proof_file(part, drawn=drawn, proofs=proofs))
    return proofs


def task_model(task: TrainedTask) -> AnyTaskModel:
    """The model on the CPU, in eval mode, with these weights, which are not copied."""
    with torch.device("meta"):
        model = build_task_model(task.config, task.head, seed=0)
    # buffers of dropout are no weights: they are drawn with the model, and unused here
    model.load_state_dict(task.weights, assign=True)
    return model.eval()


def their_settings(task: TrainedTask, bridge: Bridge) -> dict[str, Any]:
    """config.json."""
    form, family = FORMS[task.head.kind], task.head.family
    labels = task.labels or tuple(f"LABEL_{k}" for k in range(task.head.outputs))
    settings = bridge.to_settings(task.config, task.specials)
    if family == "modernbert":
        settings["classifier_pooling"] = task.head.pooling
    if word := form.dropout.get(family):
        settings[word] = task.head.dropout
    if task.problem is not None:
        settings["problem_type"] = task.problem
    return {
        **settings,
        **task.carried,
        "architectures": [form.architecture(family)],
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
    }


def their_weights(task: TrainedTask, bridge: Bridge) -> dict[str, Tensor]:
    """Weights by transformers' names."""
    names = FORMS[task.head.kind].names[task.head.family]
    body = {name: w for name, w in task.weights.items() if name.startswith("model.")}
    found = dict(bridge.weights_to(body, task.config))
    for name, w in task.weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in names:
            found[f"{names[stem]}.{kind}"] = w
    return found


def _loaded(task: TrainedTask, folder: Path, bridge: Bridge) -> Any:
    """transformers' model of the folder, read as a stranger would. Raises ExportError."""
    import transformers

    auto_class = getattr(transformers, FORMS[task.head.kind].auto_class)
    try:
        with native_path(folder) as name, without_bars():
            theirs, notes = auto_class.from_pretrained(
                name,
                dtype=torch.float32,
                attn_implementation=bridge.attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever its version raises
        why = " ".join(str(error).split())[:300]
        raise ExportError(
            f"transformers {transformers.__version__} cannot load the folder: {why}"
        ) from error
    lost = [*notes.get("missing_keys", ()), *notes.get("unexpected_keys", ())]
    if lost:
        raise ExportError(
            f"transformers {transformers.__version__} does not find all weights: {lost[:3]}."
        )
    return theirs.eval()


def _prove(task: TrainedTask, ours: AnyTaskModel, theirs: Any, padding: Padding) -> Proof:
    """Compares with transformers; theirs may be in fp64 behind it. Raises ExportError.

    task, ours: the model
    theirs: transformers'
    padding: how theirs may be padded
    """
    lengths, sides = _asked(task, padding)
    worst = _worst(ours, theirs, lengths, padding=padding, sides=sides)
    proof = _proof(worst, lengths, sides)
    if worst <= TOLERANCE:
        return proof
    fp64 = _worst(
        copy.deepcopy(ours).double(), theirs.double(), lengths, padding=padding, sides=sides
    )
    if fp64 <= TOLERANCE_FP64:
        return dataclasses.replace(proof, fp64_difference=fp64)
    raise ExportError(
        f"the logits of transformers differ from ours by {worst:.2e} in fp32 and by {fp64:.2e} in"
        f" fp64; needed: {TOLERANCE:.0e}, or {TOLERANCE_FP64:.0e} in fp64. Nothing was written."
    )


def _asked(task: TrainedTask, padding: Padding, *, most: int = 2**31) -> tuple[list[int], Sides]:
    """Lengths of the texts that are compared, in tokens; and where padding may stand beside them."""
    longest = min(task.max_tokens, task.config.max_position_embeddings, most)
    lengths = sorted({min(n, longest) for n in (1, 2, 40, 127, 128, 129, 130, 512, longest)})
    return lengths, _sides(task.head, padding)


def _graph_of(task: TrainedTask, theirs: Any, folder: Path) -> Path:
    form = FORMS[task.head.kind]
    inputs = ["input_ids", "attention_mask"]
    if getattr(task.config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    axes = ("batch", "choices", "length") if form.choices else ("batch", "length")
    return write_graph(folder, theirs, inputs=inputs, outputs=form.graph_outputs, axes=axes)


def _prove_graph(
    task: TrainedTask, ours: AnyTaskModel, graph: Graph, padding: Padding, *, tolerance: float
) -> Proof:
    """Compares with onnxruntime. Raises ExportError.

    task, ours: the model
    graph: of it
    padding: how it may be padded
    tolerance: of a logit
    """
    lengths, sides = _asked(task, padding, most=PROOF_TOKENS)
    worst = _worst(ours, graph, lengths, padding=padding, sides=sides)
    if not worst <= tolerance:
        raise ExportError(
            f"the logits of onnxruntime differ from ours by {worst:.2e}; needed: at most"
            f" {tolerance:.0e}. Nothing was written. Export without --onnx."
        )
    return _proof(worst, lengths, sides)


def _proof(worst: float, lengths: Sequence[int], sides: Sides) -> Proof:
    return Proof(
        max_abs_difference=worst,
        lengths=tuple(lengths),
        left_padded="left" in sides,
        right_padded="right" in sides,
    )


def _sides(head: HeadShape, padding: Padding) -> Sides:
    """Where padding may stand beside a text: not where the head looks for its first or its last token."""
    if layers_of(head.kind, head.family).at_last:
        return ("left",)
    if padding.left and (FORMS[head.kind].by_token or head.pooling == "mean"):
        return ("right", "left")
    return ("right",)


def _worst(
    ours: AnyTaskModel,
    theirs: Any,
    lengths: Sequence[int],
    *,
    padding: Padding,
    sides: Sides,
) -> float:
    """The largest difference of a logit over drawn texts, each alone and padded.

    ours, theirs: both models
    lengths: of the texts
    padding: how theirs may be padded
    sides: of a text, where padding may stand
    """
    form = FORMS[ours.head_shape.kind]
    draw = generator(0, "task proof")
    vocab = ours.config.vocab_size
    documents = [torch.from_numpy(draw.integers(0, vocab, n)) for n in lengths]
    if padding.pad_id is not None:
        # in a text it would be padding to them
        other = torch.tensor((padding.pad_id + 1) % vocab)
        documents = [d.where(d != padding.pad_id, other) for d in documents]
    worst = 0.0
    with torch.inference_mode():
        batch = packed_documents(documents)
        for document, expected_PK in zip(documents, _ours(ours, batch, lengths), strict=True):
            real_L = torch.ones_like(document)
            worst = _larger(worst, _theirs(theirs, form, document, real_L) - expected_PK)
            for side in sides:
                ids_L, real_L = _padded(document, padding, at_left=side == "left")
                worst = _larger(worst, _theirs(theirs, form, ids_L, real_L) - expected_PK)

        # a pair: the second half of each text is of segment 1
        if getattr(ours.config, "type_vocab_size", 0) > 1:
            halves = [(torch.arange(n) >= n // 2).long() for n in lengths]
            paired = dataclasses.replace(batch, segments_T=torch.cat(halves))
            expected = _ours(ours, paired, lengths)
            for document, half, expected_PK in zip(documents, halves, expected, strict=True):
                real_L = torch.ones_like(document)
                found_PK = _theirs(theirs, form, document, real_L, segments_L=half)
                worst = _larger(worst, found_PK - expected_PK)
    return worst


def _ours(ours: AnyTaskModel, batch: TokenBatch, lengths: Sequence[int]) -> list[Tensor]:
    """Our logits [P, K] of each document: at its first token, or at each."""
    if FORMS[ours.head_shape.kind].by_token:
        index_M = torch.arange(len(batch.ids_T))
        return [*ours.answers(batch, index_M).split([*lengths])]
    starts_M = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return [*ours.answers(batch, starts_M).split(1)]


def _theirs(
    theirs: Any, form: HeadForm, ids_L: Tensor, real_L: Tensor, *, segments_L: Tensor | None = None
) -> Tensor:
    """Their logits [P, K] of one text.

    theirs, form: the model, and how it is asked
    ids_L, real_L: the text, padded or not, and which of it is real
    segments_L: of its tokens, where there are two
    """
    asked = {"input_ids": ids_L, "attention_mask": real_L}
    if segments_L is not None:
        asked["token_type_ids"] = segments_L
    # one text of one choice
    shaped = {name: x[None, None] if form.choices else x[None] for name, x in asked.items()}
    (logits_PK,) = form.logits(theirs(**shaped))
    return logits_PK[real_L.bool()] if form.by_token else logits_PK


def _padded(document: Tensor, padding: Padding, *, at_left: bool) -> tuple[Tensor, Tensor]:
    """A text with padding beside it [L], as far as the model can be so wide; and the mask."""
    room = (padding.most_tokens or 2**31) - len(document)
    filler = torch.full((min(PADDING_TOKENS, max(0, room)),), padding.pad_id or 0)
    parts = [document, filler]
    real = [torch.ones_like(document), torch.zeros_like(filler)]
    if at_left:
        parts.reverse()
        real.reverse()
    return torch.cat(parts), torch.cat(real)


def _larger(worst: float, difference: Tensor) -> float:
    found = float(difference.abs().max())
    # nan is not equal to itself: it counts as infinitely far
    return max(worst, found if found == found else float("inf"))


def _write_card(
    folder: Path, task: TrainedTask, bridge: Bridge, proofs: dict[str, Proof], *, parameters: int
) -> None:
    """Writes README.md; the license is left to be chosen by whoever publishes it."""
    form = FORMS[task.head.kind]
    results = [
        {
            "task": {"type": form.pipeline},
            "dataset": {"name": name, "type": name},
            "metrics": [
                {"type": metric, "value": value}
                for metric, value in numbers.items()
                if value is not None
            ],
        }
        for name, numbers in task.results.items()
    ]
    head = {
        "library_name": "transformers",
        "pipeline_tag": form.pipeline,
        "tags": [bridge.model_type, form.pipeline, "tessera"],
        **({"datasets": [task.dataset]} if task.dataset else {}),
        "model-index": [{"name": task.name, "results": results}],
    }
    model = {
        "parameters": f"{parameters:,}",
        **task.config.facts,
        "longest text": f"{task.max_tokens:,} tokens",
        "pooling": task.head.pooling,
        "outputs": ", ".join(task.labels) if task.labels else form.outputs,
    }
    measured = [
        [name, metric, "not finite" if value is None else f"{value:.4f}"]
        for name, numbers in task.results.items()
        for metric, value in numbers.items()
    ]
    proven = [[asked, str(proof)] for asked, proof in proofs.items()]
    pad_on = _sides(task.head, bridge.padding({}))[0]
    text = "\n".join(
        [
            "---\n# license: name one before you publish, for example apache-2.0\n"
            f"{to_yaml(head)}---\n",
            f"# {plain(task.name)}\n",
            f"{begun(with_article(bridge.title))} fine-tuned with Tessera. Pad texts on the {pad_on}.\n",
            f"```python\nfrom transformers import {form.usage_import}\n\n{form.usage}\n```\n",
            table_text(Table(title="Model", head=("", ""), rows=list(model.items()))),
            table_text(Table(title="Training", head=("", ""), rows=list(task.facts.items()))),
            table_text(Table(title="Results", head=("set", "metric", "value"), rows=measured)),
            table_text(Table(title="Proof of the export", head=("asked", "gives"), rows=proven)),
        ]
    )
    (folder / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")
