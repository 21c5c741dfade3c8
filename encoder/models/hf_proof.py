"""The proof of a Hugging Face folder: transformers, loading it as a stranger would, gives the logits that we give.

Documents of 1, 127-130 (the edges of a window of 129 keys), 1,024 and the longest allowed number of tokens are asked alone,
padded on the left and padded on the right.

    alone    a b c           left    - - - a b c        right    a b c - - -
                                     - - - - - d                 d - - - - -
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from encoder.base.batch import TokenBatch
from encoder.base.errors import ExportError
from encoder.base.rng import generator
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

TOLERANCE = 1e-4            # fp32 logits of equal models differ by 4e-6 to 2e-5; a wrong theta or window by 1e-2 and more
CHUNK_TOKENS = 512          # logits compared at once: 100 MB of 50,368 entries; of a whole document of 8,192 it were 1.6 GB
PADDING_TOKENS = 3          # beside the longest document of a batch

Rows = Callable[[int, slice], Tensor]              # (row, positions) -> logits [positions, V]
Ask = Callable[[Tensor, Tensor], Rows]             # (ids_BL, attention mask) -> their logits, made when they are looked at


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared before a folder came to be."""

    max_abs_difference: float       # of a logit, over all documents and paddings
    lengths: tuple[int, ...]        # of the documents compared, in tokens


def prove(ours: ModernBertForMaskedLM, ask: Ask, *, max_tokens: int, asked: str) -> Proof:
    """Compares `ours` with the model behind `ask`, which `asked` names. Raises ExportError above TOLERANCE."""
    edge = 2 * ours.config.window_radius_tokens
    lengths = [*sorted({n for n in (1, edge - 1, edge, edge + 1, edge + 2, 1024) if n < max_tokens}), max_tokens]
    draw = generator(0, "export proof")
    documents = [torch.from_numpy(draw.integers(0, ours.config.vocab_size, n)) for n in lengths]
    with torch.inference_mode():
        x_TC = ours.hidden_states(packed_documents(documents))
        expected = x_TC.split(lengths)
        worst = 0.0
        for batch in _batches(lengths):
            for left in (None, False, True):
                worst = max(worst, _worst(ours, ask, [documents[i] for i in batch], [expected[i] for i in batch], left=left))
    if not worst <= TOLERANCE:
        raise ExportError(f"the logits of {asked} differ from ours by {worst:.2e}; needed: at most {TOLERANCE:.0e}. "
                          "Nothing was written. Check that the weights and the config belong together.")
    return Proof(max_abs_difference=worst, lengths=tuple(lengths))


def our_model(weights: dict[str, Tensor], config: ModernBertConfig) -> ModernBertForMaskedLM:
    """The model on the CPU with these weights, which are not copied."""
    with torch.device("meta"):
        model = ModernBertForMaskedLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def transformers_model(folder: Path) -> torch.nn.Module:
    """ModernBertForMaskedLM of a folder by transformers' own code, fp32. Raises ExportError."""
    import transformers

    try:
        model, notes = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False,
            output_loading_info=True)
    except Exception as error:      # whatever its version raises: the answer is the same, with its words
        raise ExportError(f"transformers {transformers.__version__} cannot load the folder: {error}") from error
    wrong = [n for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for n in notes.get(kind, ())
             if n != "decoder.weight"]
    if wrong:
        raise ExportError(f"transformers {transformers.__version__} does not find all weights: {wrong[:3]}.")
    return model.eval()


def asking(model: torch.nn.Module) -> Ask:
    """Transformers' model as `prove` asks it: the last hidden state at once, head and decoder where they are looked at."""
    def ask(ids_BL: Tensor, real_BL: Tensor) -> Rows:
        x_BLC = model.model(input_ids=ids_BL, attention_mask=real_BL).last_hidden_state
        return lambda row, positions: model.decoder(model.head(x_BLC[row, positions]))
    return ask


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """The short documents together, so that padding is long for some; a long one alone."""
    short = [i for i, n in enumerate(lengths) if n <= CHUNK_TOKENS]
    return [short] * bool(short) + [[i] for i, n in enumerate(lengths) if n > CHUNK_TOKENS]


def _worst(ours: ModernBertForMaskedLM, ask: Ask, documents: list[Tensor], expected: Sequence[Tensor], *,
           left: bool | None) -> float:
    """The largest difference of a logit over some documents: each alone (left None), or padded to one batch."""
    if left is None:
        answers = [(ask(d[None], torch.ones_like(d)[None]), 0, 0) for d in documents]
    else:
        width = max(map(len, documents)) + PADDING_TOKENS
        ids_BL = torch.zeros(len(documents), width, dtype=torch.int64)
        real_BL = torch.zeros_like(ids_BL)
        starts = [width - len(d) if left else 0 for d in documents]
        for row, (document, start) in enumerate(zip(documents, starts, strict=True)):
            ids_BL[row, start: start + len(document)], real_BL[row, start: start + len(document)] = document, 1
        rows = ask(ids_BL, real_BL)
        answers = [(rows, row, start) for row, start in enumerate(starts)]
    worst = 0.0
    for (rows, row, start), x_TC in zip(answers, expected, strict=True):
        for at in range(0, len(x_TC), CHUNK_TOKENS):
            end = min(at + CHUNK_TOKENS, len(x_TC))
            difference = float((rows(row, slice(start + at, start + end)) - ours.decode(x_TC[at:end])).abs().max())
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def packed_documents(documents: list[Tensor]) -> TokenBatch:
    """Documents end to end, nothing asked."""
    lengths = torch.tensor([len(d) for d in documents])
    ids_T = torch.cat(documents)
    nothing = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(
        ids_T=ids_T, positions_T=torch.cat([torch.arange(len(d), dtype=torch.int32) for d in documents]),
        cu_seqlens_S1=torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32), max_seqlen=int(lengths.max()),
        predict_index_M=nothing, predict_target_M=nothing, dropout_key_T=torch.zeros_like(ids_T), masked_tokens=0,
        tokens=len(ids_T))
