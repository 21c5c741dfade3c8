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
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

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

    Of ELECTRA's discriminator, as transformers gives them: logits [batch, length].

    folder: the export's.
    theirs, ours: transformers' model, and ours that the graph is compared with.
    max_tokens: of the longest document.
    tolerance: of a logit; the graph is fp32, so it may round as transformers was measured to round on these weights.
    padding: how the graph may be padded.
    """
    path = write_graph(folder, theirs, inputs=("input_ids", "attention_mask"), outputs=("logits",))
    return prove(
        ours,
        _logits_fn(path),
        max_tokens=min(max_tokens, PROOF_TOKENS),
        asked="onnxruntime",
        tolerance=tolerance,
        padding=padding,
    )


def write_graph(
    folder: Path,
    theirs: nn.Module,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Sequence[str] = ("batch", "length"),
) -> Path:
    """Writes onnx/model.onnx, which nothing has compared yet; its path. Raises ExportError.

    folder: the export's
    theirs: transformers' model
    inputs: names of its arguments, int64 tensors of `axes`
    outputs: names of its first outputs, in their order
    axes: free in the graph: not those of the example it is made by
    """
    path = folder / "onnx" / "model.onnx"
    path.parent.mkdir()
    # one tensor twice were one input
    shape = (2,) * (len(axes) - 1) + (16,)
    example = tuple(torch.full(shape, int(name == "attention_mask")) for name in inputs)
    free = {place: torch.export.Dim(name) for place, name in enumerate(axes)}

    size = sum(p.numel() * p.element_size() for p in theirs.parameters())
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                _Bare(theirs, outputs=len(outputs)),
                example,
                path,
                dynamo=True,
                verbose=False,
                input_names=[*inputs],
                output_names=[*outputs],
                dynamic_shapes=dict.fromkeys(inputs, free),
                external_data=size > INLINE_BYTES,
            )
    except Exception as error:  # the exporter has many kinds
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"torch {torch.__version__} cannot write the ONNX graph: {why}. Export without --onnx."
        ) from error
    return path


class Graph:
    """A graph in onnxruntime that is called as transformers' model is: tensors by name, outputs as attributes."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        with native_path(path.parent) as folder:
            self._session = onnxruntime.InferenceSession(
                f"{folder}/{path.name}", providers=["CPUExecutionProvider"]
            )
        self._inputs = [of.name for of in self._session.get_inputs()]
        self._outputs = [of.name for of in self._session.get_outputs()]

    def __call__(self, **given: Tensor) -> SimpleNamespace:
        """What is not given is zero, as segments are."""
        zeros = torch.zeros_like(given["input_ids"])
        asked = {name: given.get(name, zeros).numpy() for name in self._inputs}
        found = self._session.run(None, asked)
        by_name = zip(self._outputs, map(torch.from_numpy, found), strict=True)
        return SimpleNamespace(**dict(by_name))


def _logits_fn(path: Path) -> LogitsFn:
    graph = Graph(path)

    def ask(ids_BL: Tensor, real_BL: Tensor) -> Rows:
        logits_BLV = graph(input_ids=ids_BL, attention_mask=real_BL).logits
        # a discriminator's has one number a token, and no axis for it
        if logits_BLV.ndim == 2:
            logits_BLV = logits_BLV[:, :, None]
        return lambda row, positions: logits_BLV[row, positions]

    return ask


class _Bare(nn.Module):
    """The model with tensors alone as its inputs and its first outputs."""

    def __init__(self, model: nn.Module, *, outputs: int) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        asked = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            asked["token_type_ids"] = token_type_ids
        # logits come first, whatever else there is
        return tuple(self.model(**asked)[: self.outputs])


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
