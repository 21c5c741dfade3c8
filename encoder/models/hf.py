"""To Hugging Face: a folder that exists only after transformers, reading it back, gave the same logits as we do.

The names of the parameters are Hugging Face's already, so nothing is renamed or permuted. What is written:

    OUT/
        config.json              both rotary thetas always explicit, in the words of transformers 4 and of 5
        model.safetensors        fp32; decoder.weight is left out, being the embedding
        tokenizer.json           the run's own, with the mask token taking the space before it
        tokenizer_config.json
        export_proof.json        what was compared, and how close it was; also the mark of a folder that we may replace
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from encoder.base.batch import TokenBatch
from encoder.base.errors import ExportError
from encoder.base.files import fsync_path, usual_mode, write_json
from encoder.base.rng import generator
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM

TOLERANCE = 1e-4            # fp32 logits of equal models differ by 4e-6 to 2e-5; a wrong theta or window by 1e-2 and more
PROOF_TOKENS = 2048         # the longest document compared: a dense mask of more would take minutes on a CPU
PROOF = "export_proof.json"


class SpecialIds(Protocol):
    """The tokens that structure a document."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    unk_id: int


@dataclass(frozen=True, kw_only=True)
class ExportProof:
    """What was compared with transformers before the folder came to be."""

    max_abs_difference: float       # of a logit, over all documents and paddings
    lengths: tuple[int, ...]        # documents compared, in tokens


def export_hf(*, weights: dict[str, Tensor], config: ModernBertConfig, tokenizer_json: Path, specials: SpecialIds,
              out: Path, max_tokens: int) -> ExportProof:
    """Write `out`, a folder that AutoModelForMaskedLM and AutoTokenizer load, and prove it before it has its name.

    weights: by Hugging Face's names, as ModernBertForMaskedLM.state_dict() gives them. max_tokens: the longest document
    trained on; becomes the tokenizer's model_max_length. Raises ExportError, leaving nothing behind, where the weights do
    not fit the config, `out` holds something that is no export of ours, or transformers' logits differ by more than 1e-4.
    """
    if max_tokens > config.max_position_embeddings:
        raise ExportError(f"max_tokens {max_tokens:,} is more than max_position_embeddings "
                          f"{config.max_position_embeddings:,}. Raise the model's max_position_embeddings.")
    ours = _our_model(weights, config)
    with _folder_that_appears(out) as part:
        _write_tokenizer(part, tokenizer_json, specials, vocab_size=config.vocab_size, max_tokens=max_tokens)
        _write_model(part, ours, config, specials)
        proof = _prove(part, ours, config, specials, max_tokens=max_tokens)
        write_json(part / PROOF, {"max_abs_difference": proof.max_abs_difference, "lengths": list(proof.lengths)})
    return proof


def hf_config(config: ModernBertConfig, specials: SpecialIds) -> dict[str, Any]:
    """config.json. Dropout after attention has no word in transformers, so a fine-tune there runs without it."""
    layers = range(config.num_hidden_layers)
    return {
        "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "dtype": "float32",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "hidden_activation": "gelu",
        "max_position_embeddings": config.max_position_embeddings,
        "global_attn_every_n_layers": config.global_attn_every_n_layers,
        "local_attention": 2 * config.window_radius_tokens,         # transformers: |i - j| <= local_attention // 2
        "global_rope_theta": config.global_rope_theta, "local_rope_theta": config.local_rope_theta,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": config.global_rope_theta},
                            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta}},
        "layer_types": ["sliding_attention" if config.is_local(i) else "full_attention" for i in layers],
        "norm_eps": config.norm_eps, "norm_bias": False, "attention_bias": False, "mlp_bias": False,
        "decoder_bias": True, "tie_word_embeddings": True,
        "attention_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0,
        "initializer_range": config.initializer_range, "initializer_cutoff_factor": config.initializer_cutoff_factor,
        "classifier_pooling": "mean", "classifier_activation": "gelu", "classifier_bias": False,
        "classifier_dropout": 0.0,
        "pad_token_id": specials.pad_id, "cls_token_id": specials.cls_id, "sep_token_id": specials.sep_id,
        "bos_token_id": specials.cls_id, "eos_token_id": specials.sep_id,
    }


def _our_model(weights: dict[str, Tensor], config: ModernBertConfig) -> ModernBertForMaskedLM:
    """The model on the CPU in fp32, with the judge's attention."""
    with torch.device("meta"):
        model = ModernBertForMaskedLM(config, attention="sdpa")
    wanted = {name: p.shape for name, p in model.state_dict().items()}
    lacking = sorted(wanted.keys() - weights.keys())
    unknown = sorted(weights.keys() - wanted.keys())
    unfit = [f"{n} {list(weights[n].shape)} for {list(s)}" for n, s in wanted.items()
             if n in weights and weights[n].shape != s]
    for words, names in (("lack", lacking), ("hold unknown", unknown), ("have another shape in", unfit)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ExportError(f"the weights {words} {', '.join(names[:3])}{more}. "
                              "Export with the config that the weights were trained with.")
    model.load_state_dict({n: w.detach().to("cpu", torch.float32).contiguous() for n, w in weights.items()}, assign=True)
    return model.eval()


def _write_tokenizer(folder: Path, tokenizer_json: Path, specials: SpecialIds, *, vocab_size: int,
                     max_tokens: int) -> None:
    try:
        content = json.loads(tokenizer_json.read_text(encoding="utf-8"))
        names = {i: word for word, i in content["model"]["vocab"].items()}
        names.update({token["id"]: token["content"] for token in content["added_tokens"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{tokenizer_json} cannot be used as a tokenizer.json ({error!r}). "
                          "Give the one that stands beside the shards.") from error
    ids = {role: getattr(specials, f"{role}_id") for role in ("cls", "sep", "pad", "mask", "unk")}
    strange = [f"{role} {i}" for role, i in ids.items() if i not in names]
    if strange or max(names) >= vocab_size:
        found = f"has no token {', '.join(strange)}" if strange else f"has ids up to {max(names):,}"
        raise ExportError(f"{tokenizer_json} {found}; the model's vocabulary is {vocab_size:,}. "
                          "Give the tokenizer that the run was trained with.")
    for token in content["added_tokens"]:
        if token["id"] == specials.mask_id:
            token["lstrip"] = True          # "a [MASK]" asks for " word", space included, as the vocabulary has it
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    words = {f"{role}_token": names[i] for role, i in ids.items()}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **words, "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask"], "padding_side": "right", "truncation_side": "right",
        # ModernBERT's own file says true, which turns the decoded "x . y" into "x. y": wrong for code
        "clean_up_tokenization_spaces": False,
    })


def _write_model(folder: Path, model: nn.Module, config: ModernBertConfig, specials: SpecialIds) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise ExportError(f"{folder} cannot be written: {error}. Make room, or name another folder.") from error
    write_json(folder / "config.json", hf_config(config, specials))


@torch.inference_mode()
def _prove(folder: Path, ours: ModernBertForMaskedLM, config: ModernBertConfig, specials: SpecialIds, *,
           max_tokens: int) -> ExportProof:
    """Load the written folder as a stranger would and compare: alone, padded on the right, padded on the left."""
    edge, longest = 2 * config.window_radius_tokens, min(max_tokens, PROOF_TOKENS)
    short = sorted({n for n in (1, edge - 1, edge, edge + 1, edge + 2) if n < longest})
    draw = generator(0, "export proof")
    documents = [torch.from_numpy(draw.integers(0, config.vocab_size, n)) for n in (*short, longest)]
    expected = ours.logits(_packed(documents)).split([len(d) for d in documents])
    ask = _transformers_model(folder)
    worst = 0.0

    def compare(found_LV: Tensor, expected_LV: Tensor) -> None:
        nonlocal worst
        difference = float((found_LV - expected_LV).abs().max())
        worst = max(worst, difference if difference == difference else float("inf"))

    for document, logits in zip(documents, expected, strict=True):
        compare(ask(document[None], torch.ones_like(document)[None])[0], logits)
    width = max(map(len, documents[:-1]), default=1) + 3
    for left in (False, True):
        ids = torch.full((len(documents) - 1, width), specials.pad_id)
        real = torch.zeros_like(ids)
        places = [slice(width - len(d), width) if left else slice(0, len(d)) for d in documents[:-1]]
        for row, (document, place) in enumerate(zip(documents[:-1], places, strict=True)):
            ids[row, place], real[row, place] = document, 1
        for logits, place, found in zip(expected, places, ask(ids, real) if len(ids) else (), strict=False):
            compare(found[place], logits)
    if worst > TOLERANCE:
        raise ExportError(f"transformers' logits differ from ours by {worst:.2e}; needed: at most {TOLERANCE:.0e}. "
                          "Nothing was written. Check that the weights and the config belong together.")
    return ExportProof(max_abs_difference=worst, lengths=tuple(len(d) for d in documents))


def _transformers_model(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """(ids, attention mask) -> logits, by transformers' own code."""
    import transformers

    try:
        model, notes = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False,
            output_loading_info=True)
        transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:      # whatever its version raises: the answer is the same, with its words
        raise ExportError(f"transformers {transformers.__version__} cannot load the written folder: {error}") from error
    wrong = [n for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for n in notes.get(kind, ())
             if n != "decoder.weight"]
    if wrong:
        raise ExportError(f"transformers {transformers.__version__} does not find all weights: {wrong[:3]}.")
    if getattr(model.config, "reference_compile", False) is None:
        model.config.reference_compile = False      # 4.x would compile where triton is installed, for minutes
    model.eval()
    return lambda ids_BL, real_BL: model(input_ids=ids_BL, attention_mask=real_BL).logits


def _packed(documents: list[Tensor]) -> TokenBatch:
    """Documents end to end, nothing asked."""
    lengths = torch.tensor([len(d) for d in documents])
    ids_T = torch.cat(documents)
    nothing = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(
        ids_T=ids_T, positions_T=torch.cat([torch.arange(len(d), dtype=torch.int32) for d in documents]),
        cu_seqlens_S1=torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32), max_seqlen=int(lengths.max()),
        predict_index_M=nothing, predict_target_M=nothing, dropout_key_T=torch.zeros_like(ids_T), masked_tokens=0,
        tokens=len(ids_T))


@contextmanager
def _folder_that_appears(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its name when the block ends well, and vanishes when it does not."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; needed: a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()) and not (out / PROOF).is_file():
        raise ExportError(f"{out} is not empty and was not written by an export. Name another folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for path in part.iterdir():
            usual_mode(path)
            fsync_path(path)
        fsync_path(part)
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            os.rename(out, old)
            os.rename(part, out)
            shutil.rmtree(old)
        else:
            os.rename(part, out)
        fsync_path(out.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
