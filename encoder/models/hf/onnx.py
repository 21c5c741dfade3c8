"""An exported folder for onnxruntime: OUT/onnx/model.onnx, proven before the folder appears.

transformers' own model goes through torch.onnx.export (dynamo), batch and length free. Seen to work with attention sdpa
and eager, on transformers 4.57 and 5.x, torch 2.11, onnx 1.23, onnxruntime 1.23; lengths from 1 on, padded on either side.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from encoder.base.errors import ExportError
from encoder.base.files import native_path
from encoder.models.hf.bridge import BY_MASK, Padding
from encoder.models.hf.parity import LogitsFn, MaskedModel, Proof, Rows, prove

# the longest document asked: onnxruntime keeps the scores of all heads, 3 GB at 8,192
PROOF_TOKENS = 1024
# weights beyond it lie beside the graph: one protobuf file ends at 2 GB
INLINE_BYTES = 1_500_000_000


def check_onnx_installed() -> None:
    """Raises ExportError naming what is not installed."""
    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ExportError(
            f"--onnx needs packages that are not installed: {', '.join(missing)}. Install the"
            " extra: pip install -e '.[onnx]'."
        )


def write_onnx(
    folder: Path,
    theirs: nn.Module,
    ours: MaskedModel,
    *,
    max_tokens: int,
    tolerance: float,
    padding: Padding = BY_MASK,
) -> Proof:
    """Write onnx/model.onnx (input_ids, attention_mask -> logits [batch, length, V]) and prove it. Raises ExportError.

    folder: the export's.
    theirs, ours: transformers' model, and ours that the graph is compared with.
    max_tokens: of the longest document.
    tolerance: of a logit; the graph is fp32, so it may round as transformers was measured to round on these weights.
    padding: how the graph may be padded.
    """
    path = folder / "onnx" / "model.onnx"
    path.parent.mkdir()
    # one tensor twice were one input
    example = (
        torch.zeros(2, 16, dtype=torch.int64),
        torch.ones(2, 16, dtype=torch.int64),
    )
    # any batch and length, not those of the example
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}

    size = sum(p.numel() * p.element_size() for p in theirs.parameters())
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                _Logits(theirs),
                example,
                path,
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                external_data=size > INLINE_BYTES,
            )
    except Exception as error:  # the exporter has many kinds
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"torch {torch.__version__} cannot write the ONNX graph: {why}. Export without --onnx."
        ) from error
    return prove(
        ours,
        _logits_fn(path),
        max_tokens=min(max_tokens, PROOF_TOKENS),
        asked="onnxruntime",
        tolerance=tolerance,
        padding=padding,
    )


def _logits_fn(path: Path) -> LogitsFn:
    import onnxruntime

    with native_path(path.parent) as folder:
        session = onnxruntime.InferenceSession(
            f"{folder}/{path.name}", providers=["CPUExecutionProvider"]
        )

    def ask(ids_BL: Tensor, real_BL: Tensor) -> Rows:
        logits_BLV = torch.from_numpy(
            session.run(None, {"input_ids": ids_BL.numpy(), "attention_mask": real_BL.numpy()})[0]
        )
        return lambda row, positions: logits_BLV[row, positions]

    return ask


class _Logits(nn.Module):
    """The model with tensors alone as its inputs and its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # the first output is the logits of masked tokens, whatever other heads there are
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's hints to its own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
