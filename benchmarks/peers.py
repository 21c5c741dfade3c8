"""transformers' ModernBERT on the documents of our micro-batches, as people train it: padded, padded by length, packed.

    padded    batches of --hf-batch documents as they come, each padded to its longest: what its collator makes
    sorted    the same, documents of similar length together: what the Trainer's group_by_length makes
    packed    documents end to end in rows as long as the longest may be, a mask that keeps them apart, positions that restart

transformers has a path without padding for its flash attention alone, which no CPU runs; `packed` gives its own layers and its own
attention function a mask of documents, in version 4 in the place where it makes one, in version 5 as its argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.workload import Document, documents_of, first_model
from encoder.base.batch import IGNORE, TokenBatch
from encoder.base.errors import ConfigError
from encoder.data.packing import pack_best_fit
from encoder.models.modernbert import ModernBertConfig

KINDS = ("padded", "sorted", "packed")
PAD = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One forward of theirs."""

    inputs: dict[str, Any]
    masks: tuple[Any, Any] | None = None  # packed: what global and local layers see


class Theirs:
    """A ModernBertForMaskedLM of transformers with our weights, torch's AdamW, and micro-batches of one kind."""

    def __init__(
        self,
        kind: str,
        config: ModernBertConfig,
        batches: list[TokenBatch],
        *,
        attention: str,
        batch_documents: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        compiled: bool = False,
    ) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                f"--against hf, but transformers cannot be imported ({error}). Install it, or leave"
                " --against out."
            ) from error
        own = transformers.ModernBertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            reference_compile=compiled,
            sparse_prediction=True,
            global_rope_theta=config.global_rope_theta,
            local_rope_theta=config.local_rope_theta,
        )
        own._attn_implementation = attention
        self.newer = int(transformers.__version__.split(".")[0]) >= 5
        if attention == "flex_attention" and not self.newer:
            raise ConfigError(
                f"--hf-attention flex_attention with transformers {transformers.__version__}: its"
                " ModernBERT has it from version 5 on. Use sdpa."
            )
        # its stubs take a device for a model
        model: Any = transformers.ModernBertForMaskedLM(own)
        self.model = model
        # decoder.weight is tied to the embedding, so our state does not hold it
        missing = self.model.load_state_dict(
            first_model(config).state_dict(), strict=False
        ).missing_keys
        assert set(missing) <= {"decoder.weight"}, (
            f"transformers has weights that we have not: {missing}"
        )
        self.model.tie_weights()
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.autocast = autocast
        self._masks: tuple[Any, Any] | None = None
        # version 4 makes its masks in this method; ours are put in their place
        if not self.newer:
            made = self.model.model._update_attention_mask
            self.model.model._update_attention_mask = lambda *a, **k: self._masks or made(*a, **k)
        # version 5 has no setting for it
        if compiled and self.newer:
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        longest = max(b.max_seqlen for b in batches)
        make = {
            "padded": lambda d: _padded(d, batch_documents),
            "sorted": lambda d: _padded(sorted(d, key=lambda x: -len(x.ids)), batch_documents),
            "packed": lambda d: _packed(
                d, longest, flex=attention == "flex_attention", config=config, device=device
            ),
        }[kind]
        self.steps = [[_on(part, device) for part in make(documents_of(b))] for b in batches]
        self.masked, self.tokens = [b.counts["mlm"] for b in batches], [b.tokens for b in batches]
        # padding counts as a place, too
        places = sum(p.inputs["input_ids"].numel() for s in self.steps for p in s)
        self.name = f"transformers {kind}"
        self.how = (
            f"{attention}{', compiled' if compiled else ''}, {sum(self.tokens) / places:.0%} of it"
            " tokens"
        )

    def loss(self, number: int) -> Tensor:
        """Mean over the predicted positions of a micro-batch."""
        return (
            torch.stack([self._part(part) for part in self.steps[number]]).sum()
            / self.masked[number]
        )

    def step(self, number: int) -> None:
        """One update; each batch goes back at once, as gradient accumulation does."""
        for part in self.steps[number]:
            (self._part(part) / self.masked[number]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _part(self, part: Part) -> Tensor:
        inputs, self._masks = part.inputs, part.masks
        if part.masks and self.newer:
            inputs = {
                **inputs,
                "attention_mask": dict(zip(("full_attention", "sliding_attention"), part.masks)),
            }
        # it returns a mean over the predictions of this forward; what is wanted is their sum
        count = (inputs["labels"] != IGNORE).sum()
        with self.autocast():
            return self.model(**inputs).loss * count


def _padded(documents: list[Document], size: int) -> list[Part]:
    parts = []
    for start in range(0, len(documents), size):
        some = documents[start : start + size]
        # transformers cannot be asked nothing
        if any((d.labels != IGNORE).any() for d in some):
            parts.append(
                Part(
                    inputs={
                        "input_ids": pad_sequence(
                            [d.ids for d in some], batch_first=True, padding_value=PAD
                        ),
                        "labels": pad_sequence(
                            [d.labels for d in some], batch_first=True, padding_value=IGNORE
                        ),
                        "attention_mask": pad_sequence(
                            [torch.ones_like(d.ids) for d in some], batch_first=True
                        ),
                    }
                )
            )
    return parts


def _packed(
    documents: list[Document],
    row_tokens: int,
    *,
    flex: bool,
    config: ModernBertConfig,
    device: torch.device,
) -> list[Part]:
    """All rows of a micro-batch as one batch [R, L]; padding is a document of its own."""

    # rows by best fit, as ours
    packing = pack_best_fit(torch.tensor([len(d.ids) for d in documents]).numpy(), row_tokens)
    ids, labels, document, position = [], [], [], []
    for row in range(packing.rows):
        own = [
            documents[i]
            for i in packing.pieces_P[slice(*packing.row_starts_R1[row : row + 2])].tolist()
        ]
        # the rest of a row is a document of padding
        room = row_tokens - sum(len(d.ids) for d in own)
        own.append(Document(ids=torch.full((room,), PAD), labels=torch.full((room,), IGNORE)))
        ids.append(torch.cat([d.ids for d in own]))
        labels.append(torch.cat([d.labels for d in own]))
        document.append(
            torch.repeat_interleave(torch.arange(len(own)), torch.tensor([len(d.ids) for d in own]))
        )
        position.append(torch.cat([torch.arange(len(d.ids)) for d in own]))
    inputs = {
        "input_ids": torch.stack(ids),
        "labels": torch.stack(labels),
        "position_ids": torch.stack(position),
    }
    masks = (_flex_masks if flex else _dense_masks)(
        torch.stack(document).to(device), radius=config.window_radius_tokens
    )
    return [Part(inputs=inputs, masks=masks)]


def _dense_masks(document_RL: Tensor, *, radius: int) -> tuple[Tensor, Tensor]:
    """Added to the scores, [R, 1, L, L] fp32."""
    place_L = torch.arange(document_RL.shape[1], device=document_RL.device)
    sees = (document_RL[:, :, None] == document_RL[:, None, :])[:, None]
    near = sees & ((place_L[:, None] - place_L).abs() <= radius)
    # as in transformers' own masks, the lowest number in place of -inf
    lowest = torch.finfo(torch.float32).min

    def scores(mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)

    return scores(sees), scores(near)


def _flex_masks(document_RL: Tensor, *, radius: int) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, tokens = document_RL.shape

    def whole(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document_RL[b, query] == document_RL[b, key]

    def windowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return whole(b, h, query, key) & ((query - key).abs() <= radius)

    make = functools.partial(
        create_block_mask, B=rows, H=None, Q_LEN=tokens, KV_LEN=tokens, device=document_RL.device
    )
    return make(whole), make(windowed)


def _on(part: Part, device: torch.device) -> Part:
    return Part(inputs={k: v.to(device) for k, v in part.inputs.items()}, masks=part.masks)
