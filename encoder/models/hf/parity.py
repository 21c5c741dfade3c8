"""The proof of a Hugging Face folder: transformers, loading it as a stranger would, gives the logits that we give.

Two questions are asked. What config.json means: a small model of the same kind, with drawn weights on which every setting
shows, is compared in fp64. Whether weights and config belong together: documents of 1, 127-130 (the edges of a window of
129 keys), 1,024 and the longest allowed number of tokens are asked with the model's own weights in fp32, and where its
rounding alone is large (sharp attention), again in fp64. Each is asked alone, padded on the right and, in fp32, on the left
(but for models whose positions count padding).

    alone    a b c           left    - - - a b c        right    a b c - - -
                                     - - - - - d                 d - - - - -
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from encoder.base.batch import TokenBatch, packed_documents
from encoder.base.errors import ExportError
from encoder.base.files import native_path
from encoder.base.rng import generator
from encoder.base.untrusted import read_json
from encoder.models.catalog import build_model
from encoder.models.contract import Model, ModelConfig
from encoder.models.hf.bridge import BY_MASK, Bridge, Padding
from encoder.models.hf.catalog import bridge_of, bridge_of_settings
from encoder.models.hf.quiet import quiet_transformers, without_bars
from encoder.nn.heads import TokenDecoder

# fp32 logits of equal models mostly differ by 4e-6 to 2e-5, those of sharp attention by more
TOLERANCE = 1e-4
TOLERANCE_FP64 = 1e-6  # equal models: 1e-13; the angles are fp32 on both sides
# equal: 4e-14; theta 160,001 for 160,000: 2e-4; norm_eps 1e-12 for 1e-6: 2e-3
TOLERANCE_DRAWN = 1e-7
FP64_TOKENS = 1024  # the longest document asked in fp64
# logits compared at once: 100 MB of 50,368 entries; of a whole document of 8,192 it were 1.6 GB
CHUNK_TOKENS = 512
PADDING_TOKENS = 3  # beside the longest document of a batch

Rows = Callable[[int, slice], Tensor]  # (row, positions) -> logits [positions, V]
# (ids_BL, attention mask) -> their logits, made when they are looked at
LogitsFn = Callable[[Tensor, Tensor], Rows]


class MaskedModel(Model, Protocol):
    """A model of ours that predicts masked tokens."""

    training: bool

    def token_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """Hidden states [M, C] -> the head's output, and the decoder's weight and bias."""

    def masked_states(self, batch: TokenBatch, index_M: Tensor) -> Tensor:
        """x_MC, from which the decoder tells what stood at masked tokens index_M."""

    def decode(self, x_MC: Tensor) -> Tensor:
        """Hidden states [M, C] -> logits [M, V]."""

    def sentence_decoder(self, x_MC: Tensor) -> Tensor:
        """Hidden states [M, C] -> logits [M, 2]; of a model with such a head."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared before a folder came to be."""

    max_abs_difference: float  # of a logit in fp32, over all documents and paddings
    lengths: tuple[int, ...]  # of the documents compared, in tokens
    # the same up to FP64_TOKENS in fp64; None: fp32 was close enough
    fp64_difference: float | None = None
    left_padded: bool = True
    right_padded: bool = True

    def __str__(self) -> str:
        fp64 = ""
        if self.fp64_difference is not None:
            fp64 = f" in fp32, by its rounding ({self.fp64_difference:.1e} in fp64),"
        side = "either side" if self.left_padded else "the right"
        if not self.right_padded:
            side = "the left"
        return (
            f"the same logits within {self.max_abs_difference:.1e}{fp64} at lengths "
            f"{', '.join(f'{n:,}' for n in self.lengths)}, alone and padded on {side}"
        )


def prove(
    ours: MaskedModel,
    ask: LogitsFn,
    *,
    max_tokens: int,
    asked: str,
    tolerance: float = TOLERANCE,
    ask_fp64: Callable[[], LogitsFn] | None = None,
    padding: Padding = BY_MASK,
) -> Proof:
    """Compares `ours` with the model behind `ask`. Raises ExportError where they differ.

    ours, ask: both models.
    max_tokens: of the longest document; at least the window is passed in any case, where the model can be so long.
    asked: the other model's name in errors.
    tolerance: of a logit in fp32.
    ask_fp64: the same model in fp64, asked where fp32 differs by more than `tolerance`.
    padding: how the other model may be padded.
    """
    # 1 token, around the window, 1,024, and the longest, as far as the model can be so long
    edges = _bridge(ours.config).edges(ours.config)
    longest = min(ours.config.max_position_embeddings, max(max_tokens, *edges))
    lengths = sorted({min(n, longest) for n in (1, *edges, 1024, max_tokens, longest)})
    worst = _compared(ours, ask, lengths, sides=(None, False, True), padding=padding)
    proof = Proof(max_abs_difference=worst, lengths=tuple(lengths), left_padded=padding.left)
    if worst <= tolerance:
        return proof

    # fp64 tells rounding, which is below 1e-6 there, from another model, which is not
    said, needed = f"by {worst:.2e}", f"at most {tolerance:.0e}"
    if ask_fp64 is not None and math.isfinite(worst):
        fp64 = _compared(
            copy.deepcopy(ours).double(),
            ask_fp64(),
            [n for n in lengths if n <= FP64_TOKENS],
            sides=(None, False),
            padding=padding,
        )
        if fp64 <= TOLERANCE_FP64:
            return dataclasses.replace(proof, fp64_difference=fp64)
        said, needed = (
            f"{said} in fp32 and by {fp64:.2e} in fp64",
            f"{needed}, or {TOLERANCE_FP64:.0e} in fp64",
        )
    if not math.isfinite(worst):
        why = "They are not finite: look for inf and nan in the weights."
    elif ask_fp64 is not None:
        why = "Check that the weights and the config belong together."
    else:
        why = "A model of sharp attention rounds as much in fp32, and fp64 cannot be asked here."
    raise ExportError(
        f"the logits of {asked} differ from ours {said}; needed: {needed}. Nothing was written."
        f" {why}"
    )


def drawn_difference(settings: dict[str, Any], config: ModelConfig) -> float:
    """How far transformers' logits by config.json are from ours by `config`, both of a small model of that kind with drawn
    weights, in fp64: 1e-13 where they mean the same, more than 1e-7 where they do not. Raises ExportError.
    """
    import transformers

    bridge = bridge_of_settings(settings)
    # the same small weights on both sides; only what config.json means can differ
    settings, config = bridge.smaller(settings, config)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in build_model(config, seed=0).state_dict().items()}
    draw = generator(0, "drawn weights")
    weights = {name: torch.from_numpy(_drawn(name, shape, draw)) for name, shape in shapes.items()}
    ours = our_model(weights, config)
    try:
        # transformers draws first weights from torch's own generator
        with torch.random.fork_rng(devices=[]):
            made = getattr(transformers, bridge.auto_class(settings)).from_config(
                _config_of(bridge, settings), attn_implementation=bridge.attention
            )
            theirs = made.double().eval()
            notes = theirs.load_state_dict(bridge.weights_to(weights, config), strict=False)
    except Exception as error:  # whatever its version raises
        raise ExportError(
            f"transformers {transformers.__version__} cannot make the model of config.json: "
            f"{_line(error)}"
        ) from error

    lost = [n for n in (*notes.missing_keys, *notes.unexpected_keys) if n not in bridge.tied]
    if lost:
        raise ExportError(
            f"transformers {transformers.__version__} by config.json has other weights than we"
            f" have: {lost[:3]}."
        )
    # also about half of an edge, the window's radius: from there on it hides something
    edges = bridge.edges(config)
    lengths = {1, 2, 40, *(n // 2 + 1 for n in edges), *(min(n, FP64_TOKENS) for n in edges)}
    states = _compared(
        ours,
        logits_fn(theirs, bridge),
        sorted({min(n, config.max_position_embeddings) for n in lengths}),
        sides=(None, False),
        padding=bridge.padding(settings),
    )
    return max(states, bridge.also_differs(ours, theirs))


def our_model(weights: dict[str, Tensor], config: ModelConfig) -> MaskedModel:
    """The model on the CPU with these weights, which are not copied."""
    with torch.device("meta"):
        model = build_model(config, seed=0)
    model.load_state_dict(weights, assign=True)
    model.train(False)
    return cast(MaskedModel, model)  # a family without masked tokens has no bridge


def transformers_model(
    folder: Path,
    bridge: Bridge,
    settings: dict[str, Any] | None = None,
    drawn: Mapping[str, Tensor] | None = None,
    beside: Collection[str] = (),
) -> torch.nn.Module:
    """The model of a folder by transformers' own code, fp32.

    folder, bridge: of the model.
    settings: in place of its config.json.
    drawn: weights by their names that the folder lacks, for a body without heads.
    beside: names of its tensors that are not of this model.

    Raises ExportError.
    """
    import transformers

    drawn = drawn or {}
    try:
        said = settings or read_json(folder / "config.json", root=dict, error=ExportError)
        given = {}
        if settings is not None:
            given = {"config": _config_of(bridge, settings)}
        auto = getattr(transformers, bridge.auto_class(said))
        # that heads are missing is said by who drew them
        quiet = quiet_transformers if drawn else without_bars
        with native_path(folder) as name, quiet():
            model, notes = auto.from_pretrained(
                name,
                dtype=torch.float32,
                attn_implementation=bridge.attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **given,
            )
    except Exception as error:
        # whatever its version raises: the answer is the same, with its words
        raise ExportError(
            f"transformers {transformers.__version__} cannot load the folder: {_line(error)}"
        ) from error

    # allowed: parts that are left out and said, tied copies, and heads that are drawn
    unexpected = list(notes.get("unexpected_keys", ()))
    for part in bridge.leaves:
        unexpected = [name for name in unexpected if part not in name]
    unexpected = [name for name in unexpected if name not in beside]
    wrong = [
        n
        for n in (*notes.get("missing_keys", ()), *unexpected, *notes.get("mismatched_keys", ()))
        if n not in (*bridge.tied, *drawn)
    ]
    if wrong:
        raise ExportError(
            f"transformers {transformers.__version__} does not find all weights: {wrong[:3]}."
        )
    if drawn:
        model.load_state_dict(drawn, strict=False)
    return model.eval()


def logits_fn(model: torch.nn.Module, bridge: Bridge) -> LogitsFn:
    """Transformers' model as `prove` asks it: the last hidden state at once, head and decoder where they are looked at."""

    def ask(ids_BL: Tensor, real_BL: Tensor) -> Rows:
        try:
            with KeepFloat64():
                x_BLC = bridge.hidden_states(model, ids_BL, real_BL)
        except Exception as error:  # whatever its version raises
            import transformers

            raise ExportError(
                f"transformers {transformers.__version__} loads the model but cannot run it: "
                f"{_line(error)}"
            ) from error
        return lambda row, positions: bridge.logits(model, x_BLC[row, positions])

    return ask


def logits_fn_fp64(model: torch.nn.Module, bridge: Bridge) -> LogitsFn:
    """The same of a copy in fp64."""
    return logits_fn(copy.deepcopy(model).double(), bridge)


class KeepFloat64(TorchFunctionMode):
    """transformers 5 turns queries and keys as fp32 whatever they are: of an fp64 model 4e-6 in the logits, 4e-14 with this."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # queries and keys alone: [B, heads, L, D], where tables of angles have fewer axes
        if func is Tensor.float and args[0].dtype == torch.float64 and args[0].ndim == 4:
            return args[0]
        return func(*args, **(kwargs or {}))


def _compared(
    ours: MaskedModel,
    ask: LogitsFn,
    lengths: list[int],
    *,
    sides: Sequence[bool | None],
    padding: Padding,
) -> float:
    """The largest difference of a logit over drawn documents of these lengths.

    ours, ask: both models
    lengths: of the documents
    sides: None: each alone; False, True: padded on the right, on the left
    padding: how the other model may be padded
    """
    draw = generator(0, "export proof")
    vocab = ours.config.vocab_size
    documents = [torch.from_numpy(draw.integers(0, vocab, n)) for n in lengths]
    if padding.pad_id is not None:
        # in a text it would be padding to them
        other = (padding.pad_id + 1) % vocab
        documents = [d.where(d != padding.pad_id, torch.tensor(other)) for d in documents]
    with torch.inference_mode():
        # ours sees all documents packed in one forward, theirs in batches
        expected = ours.hidden_states(packed_documents(documents)).split(lengths)
        found = []
        for batch in _batches(lengths):
            texts = [documents[i] for i in batch]
            answers = [expected[i] for i in batch]
            for left in sides:
                if padding.left or not left:
                    worst = _worst(ours, ask, texts, answers, left=left, padding=padding)
                    found.append(worst)
        return max(found)


def _answers(ours: MaskedModel, x_MC: Tensor, *, width: int) -> Tensor:
    """Our logits [M, V], and the sentence head's beside them where the other model gives so many."""
    logits_MV = ours.decode(x_MC)
    # the head's logits stand behind the vocabulary, [M, V + 2]
    if width == logits_MV.shape[-1]:
        return logits_MV
    return torch.cat((logits_MV, ours.sentence_decoder(x_MC)), dim=-1)


def _bridge(config: ModelConfig) -> Bridge:
    bridge = bridge_of(config)
    assert bridge, "who asks for a proof has asked export_blocker before"
    return bridge


def _config_of(bridge: Bridge, settings: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, bridge.config_class).from_dict(settings)


def _drawn(name: str, shape: torch.Size, draw: np.random.Generator) -> np.ndarray:
    """Values at which every setting shows: norms about 1, scores of attention about 2, embeddings small beside norm_eps."""
    values = draw.standard_normal(tuple(shape))
    if "norm" in name:
        return values * 0.3 + (1.0 if name.endswith("weight") else 0.0)
    if len(shape) == 1 or "tok_embeddings" in name:
        return values * 0.1
    return values * (1.5 / math.sqrt(shape[1]))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """The short documents together, so that padding is long for some; a long one alone."""
    short = [i for i, n in enumerate(lengths) if n <= CHUNK_TOKENS]
    return [short] * bool(short) + [[i] for i, n in enumerate(lengths) if n > CHUNK_TOKENS]


def _worst(
    ours: MaskedModel,
    ask: LogitsFn,
    documents: list[Tensor],
    expected: Sequence[Tensor],
    *,
    left: bool | None,
    padding: Padding,
) -> float:
    """The largest difference of a logit over some documents: each alone (left None), or padded to one batch.

    ours, ask: both models
    documents, expected: ids, and our hidden states
    left: the side of the padding; None: each alone
    padding: how the other model may be padded
    """
    if left is None:
        answers = [(ask(d[None], torch.ones_like(d)[None]), 0, 0) for d in documents]
    else:
        width = max(map(len, documents)) + PADDING_TOKENS
        # a model whose positions count padding cannot be wider than its table
        width = min(width, padding.most_tokens or width)

        shape = (len(documents), width)
        ids_BL = torch.full(shape, padding.pad_id or 0, dtype=torch.int64)
        real_BL = torch.zeros_like(ids_BL)
        starts = [width - len(d) if left else 0 for d in documents]
        for row, (document, start) in enumerate(zip(documents, starts, strict=True)):
            (
                ids_BL[row, start : start + len(document)],
                real_BL[row, start : start + len(document)],
            ) = (document, 1)
        rows = ask(ids_BL, real_BL)
        answers = [(rows, row, start) for row, start in enumerate(starts)]
    worst = 0.0
    for (rows, row, start), x_TC in zip(answers, expected, strict=True):
        # head and decoder in pieces: see CHUNK_TOKENS
        for at in range(0, len(x_TC), CHUNK_TOKENS):
            end = min(at + CHUNK_TOKENS, len(x_TC))
            found = rows(row, slice(start + at, start + end))
            mine = _answers(ours, x_TC[at:end], width=found.shape[-1])
            difference = float((found - mine).abs().max())
            # nan is not equal to itself: it counts as infinitely far
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst
