"""How alike texts are: cosines of their vectors, through sentence-transformers, or by mean pooling of a body."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.errors import UserError
from encoder.tools.page.encoding import checked, encode
from encoder.tools.page.folders import Opened

MOST_TEXTS = 20


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What was found."""

    texts: list[str]
    cosines: list[list[float]]  # of each text with each
    notes: list[str] = field(default_factory=list)


def similarity(opened: Opened, lines: str) -> Compared:
    """Compares texts, one a line, two at least. Raises UserError."""
    texts = [line.strip() for line in checked(lines).splitlines() if line.strip()]
    if not 2 <= len(texts) <= MOST_TEXTS:
        raise UserError(f"there are {len(texts)} texts; needed: 2 to {MOST_TEXTS}, one a line.")
    x_NC, notes = vectors(opened, texts)
    unit_NC = F.normalize(x_NC.double(), dim=-1)
    return Compared(texts=texts, cosines=(unit_NC @ unit_NC.T).tolist(), notes=notes)


def vectors(opened: Opened, texts: list[str]) -> tuple[Tensor, list[str]]:
    """[N, C] of N texts, and what should be said of them."""
    encoded = [encode(opened, text) for text in texts]
    cut = sum(bool(found.notes) for found in encoded)
    notes = []
    if cut:
        notes.append(
            f"{cut} of the texts are longer than the model's {opened.max_tokens:,} tokens, and were"
            " cut."
        )
    if opened.sentence_transformers:
        x_NC = opened.model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        return x_NC.float(), notes
    means = []
    for found in encoded:
        with torch.no_grad():
            x_TC = opened.model(**found.inputs).last_hidden_state[0]
        # alone there is no padding, and [CLS] and [SEP] count, as in sentence-transformers
        means.append(x_TC.float().mean(0))
    return torch.stack(means), notes
