"""To Hugging Face: a folder that exists only after transformers, reading it back, gave the same logits as we do.

ModernBERT's parameters have Hugging Face's names already; those of the other families are renamed and cut. What is written:

    OUT/
        config.json              both rotary thetas always explicit, in the words of transformers 4 and of 5
        model.safetensors        fp32; decoder.weight is left out where it is the embedding
        tokenizer.json           the run's own, with the mask token taking the space before it
        tokenizer_config.json
        onnx/model.onnx          where asked for: ids and attention mask -> logits, for onnxruntime
        README.md, modules.json  a model card, and what sentence-transformers reads (card.py and stages.py)
        export_proof.json        what was compared, and how close it was; also the mark of a folder that we may replace
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from encoder.base.errors import ExportError
from encoder.base.files import atomic_folder, files_below, native_path, sha256_of, write_json
from encoder.base.tokenizer_json import SpecialIds
from encoder.base.untrusted import read_json
from encoder.models.hf.card import (
    CARD,
    Described,
    Training,
    write_card,
)
from encoder.models.hf.catalog import bridge_of
from encoder.models.hf.onnx import check_onnx_installed, write_onnx
from encoder.models.hf.parity import (
    TOLERANCE,
    TOLERANCE_DRAWN,
    Proof,
    drawn_difference,
    logits_fn,
    logits_fn_fp64,
    our_model,
    prove,
    transformers_model,
)
from encoder.models.hf.stages import write_sentence_transformers
from encoder.models.hf.tokenizer import write_tokenizer
from encoder.models.stored import TOKENIZER, WEIGHTS, StoredModel, check_weights, write_safetensors

PROOF = "export_proof.json"
# in it: the names of what the export wrote, and hashes of what a person may edit
FILES, SHA256 = (
    "files",
    "sha256",
)
HASHED = ("config.json", WEIGHTS, TOKENIZER, CARD)


def export_hf(
    model: StoredModel,
    tokenizer_json: Path,
    specials: SpecialIds,
    out: Path,
    *,
    onnx: bool = False,
    training: Training | None = None,
) -> dict[str, Proof]:
    """Write `out`, a folder that its class of transformers and AutoTokenizer load, and prove it before it has its name.

    training: what the model card says of its making; default: where the model came from.
    Returns the proofs by what was asked: transformers, and onnxruntime where `onnx`. Raises UserError, leaving nothing
    behind, where its class cannot be this model, the weights do not fit the config, `out` holds
    something that is no export of ours, or logits differ (encoder/models/hf/parity.py says by how much).
    """
    config, max_tokens = model.config, model.max_tokens or model.config.max_position_embeddings
    if max_tokens > config.max_position_embeddings:
        raise ExportError(
            f"max_tokens {max_tokens:,} is more than max_position_embeddings "
            f"{config.max_position_embeddings:,}. Raise the model's max_position_embeddings."
        )
    bridge = bridge_of(config, specials)
    if bridge is None:
        raise ExportError("this model has no class in transformers. Keep it as a weights folder.")
    # all that can be refused without writing comes first
    settings = bridge.to_settings(config, specials)
    check_weights(model.weights, config, of=model.origin)
    if onnx:
        check_onnx_installed()
    earlier = files_of_earlier(out)
    ours = our_model(model.weights, config)
    with atomic_folder(out, mark=PROOF, ours=earlier) as part:
        write_tokenizer(
            part,
            tokenizer_json,
            specials,
            vocab_size=config.vocab_size,
            max_tokens=max_tokens,
            segments=getattr(config, "type_vocab_size", 0) > 1,
        )
        write_safetensors(bridge.weights_to(model.weights, config), part / WEIGHTS)
        write_json(part / "config.json", settings)

        # read back from the disk, as a stranger would
        theirs = transformers_model(part, bridge)
        mask_token = _load_tokenizer(part).mask_token
        drawn = drawn_difference(settings, config)
        if not drawn <= TOLERANCE_DRAWN:
            raise ExportError(
                f"the logits of transformers differ from ours by {drawn:.2e} on drawn weights in"
                f" fp64; needed: at most {TOLERANCE_DRAWN:.0e}. Nothing was written. To this"
                " transformers config.json says another model than ours: use a version of it that"
                " the README names."
            )

        proofs = {
            "transformers": prove(
                ours,
                logits_fn(theirs, bridge),
                max_tokens=max_tokens,
                asked="transformers",
                ask_fp64=lambda: logits_fn_fp64(theirs, bridge),
                padding=bridge.padding(settings),
            )
        }
        if onnx:
            # as much as transformers was measured to round; a wrong window is 1e-1 off
            rounding = min(2 * proofs["transformers"].max_abs_difference, 1e-2)
            proofs["onnxruntime"] = write_onnx(
                part,
                theirs,
                ours,
                max_tokens=max_tokens,
                tolerance=max(TOLERANCE, rounding),
                padding=bridge.padding(settings),
            )
        write_sentence_transformers(part, width=config.hidden_size, max_tokens=max_tokens)
        write_card(
            part,
            described=Described(
                bridge=bridge,
                config=config,
                parameters=ours.parameter_count(),
                max_tokens=max_tokens,
                auto_class=bridge.auto_class(settings),
            ),
            mask_token=mask_token,
            training=training or Training(name=out.name, facts={"origin": model.origin}),
            proofs=proofs,
            shown_as=Path(os.path.abspath(out)).name,
        )
        write_json(part / PROOF, proof_file(part, drawn=drawn, proofs=proofs))
    return proofs


def proof_file(folder: Path, *, drawn: float, proofs: dict[str, Proof]) -> dict[str, Any]:
    """What export_proof.json says.

    folder: all that was written beside it
    drawn: the difference on drawn weights in fp64
    proofs: by what was asked
    """
    return {
        "drawn_weights_fp64_difference": drawn,
        **{asked: dataclasses.asdict(proof) for asked, proof in proofs.items()},
        SHA256: {name: sha256_of(folder / name) for name in HASHED},
        FILES: files_below(folder),
    }


def files_of_earlier(out: Path) -> list[str] | None:
    """What an earlier export wrote to `out`; None where it did not say. Raises ExportError where its card was edited since."""
    if not (out / PROOF).is_file():
        return None
    proof = read_json(out / PROOF, error=ExportError, root=dict)
    names = proof.get(FILES)
    if not isinstance(names, list):
        return None  # of an export that wrote no card
    if CARD in edited_since(out, proof):
        raise ExportError(
            f"{out / CARD} was edited since it was written, and another export would write over it."
            " Move it away, or name another folder."
        )
    return names


def edited_since(folder: Path, proof: dict[str, Any]) -> list[str]:
    """Files of an export that are not what was proven."""
    hashes = proof.get(SHA256)
    hashes = hashes if isinstance(hashes, dict) else {}
    return [
        name
        for name in HASHED
        if (folder / name).is_file() and sha256_of(folder / name) != hashes.get(name)
    ]


def _load_tokenizer(folder: Path) -> Any:
    import transformers

    try:
        with native_path(folder) as name:
            return transformers.AutoTokenizer.from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # whatever its version raises: the answer is the same, with its words
        raise ExportError(
            f"transformers {transformers.__version__} cannot load the tokenizer: {error}"
        ) from error
