"""What a run needs of its machines: bytes of one rank, and of a checkpoint, counted from shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from encoder.base.objective import Stretch
from encoder.engine.precision import precision_on
from encoder.engine.zero.config import (
    BUCKET_ELEMENTS,
    EngineConfig,
    as_run,
    overlap_on,
    sends_during_backward,
)
from encoder.models.catalog import build_model, networks_of
from encoder.models.contract import ModelConfig
from encoder.nn.loss import PIECE_POSITIONS
from encoder.optim.catalog import state_elements
from encoder.runs.config import FineTuneProbeConfig, RunConfig, with_engine
from encoder.runs.objective_models import shapes_at_hand
from encoder.tools.plan.activations import LONG, count_kept
from encoder.tools.plan.forecast import Machine
from encoder.train.build import compiles
from encoder.train.tuned_probe import body_of, engine_of, tuned_probes

# of what plain layers keep, by engine.fp8
# found: large 0.87, base 0.92 to 0.97, 17m 1.00 to 1.04, base in FP8 0.78 (docs/log.md)
COMPILED_SHARE = {"off": 0.94, "layers": 0.78}
CUBLAS_BYTES = 64 * 2**20  # what cuBLAS keeps to work in


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes on one rank of what an engine holds."""

    weights: int
    gradients: int
    optimizer: int
    offloaded: int  # in host memory

    @property
    def states(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class ProbeMemory(StateBytes):
    """Bytes on one rank of a copy that is fine-tuned as a probe, beside the run that waits for it."""

    activations: int
    bucket: int  # of gradients on their way to their owner
    # before its first step: the run's masters whole, and what is made of them, in host memory
    start: int
    on_cpu: bool  # host memory is the device's

    @property
    def training(self) -> int:
        """On the device, in its steps."""
        return self.states + self.activations + self.bucket

    @property
    def total(self) -> int:
        """On the device, when it is most."""
        return max(self.training, self.start) if self.on_cpu else self.training


@dataclass(frozen=True, kw_only=True)
class Memory(StateBytes):
    """Bytes on one rank of a run."""

    activations: int
    bucket: int  # of gradients on their way to their owner
    # weights of the models that the objective asks, by setting
    asked: dict[str, int] = field(default_factory=dict)
    probe: ProbeMemory | None = None  # the largest of those that fine-tune; one at a time

    @property
    def held(self) -> int:
        """Between two steps, without what is offloaded."""
        return self.states + self.bucket + sum(self.asked.values())

    @property
    def in_step(self) -> int:
        """While the run trains."""
        return self.held + self.activations

    @property
    def total(self) -> int:
        """When it is most: a probe takes its memory where the run has its activations else."""
        return self.held + max(self.activations, self.probe.total if self.probe else 0)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run asks of its machines."""

    parameters: int
    largest: int  # of them, in the largest matrix
    decayed: int  # of them, with weight decay
    memory: Memory  # of one rank
    checkpoint_bytes: int  # of one: masters and what the optimizer keeps, in fp32


def count_needs(run: RunConfig, *, ranks: int) -> Needs:
    """Counted from the model's shapes: no weight is made."""
    run = on_machine(run, None)
    with torch.device("meta"):
        model = build_model(run.model, attention="sdpa", seed=run.seed)
    sizes = [p.numel() for p in model.parameters()]
    state = state_elements(model, run.optimizer)
    memory = estimate_memory(
        run,
        parameters=sum(sizes),
        largest=max(sizes),
        optimizer_elements=state,
        ranks=ranks,
    )
    return Needs(
        parameters=sum(sizes),
        largest=max(sizes),
        decayed=sum(p.numel() for p in model.parameters() if p.ndim > 1),
        memory=memory,
        checkpoint_bytes=4 * (sum(sizes) + state),
    )


def on_machine(run: RunConfig, machine: Machine | None) -> RunConfig:
    """The run with the precision and the overlap that `auto` means on a GPU, or here."""
    device = device_here(run)
    precision = precision_on(run.engine.precision, device)
    if machine and run.engine.precision == "auto":
        precision = "autocast"
    on_cuda = machine is not None or device.type == "cuda"
    overlap = overlap_on(run.engine.overlap, cuda=on_cuda)
    return with_engine(run, precision=precision, overlap=overlap)


def device_here(run: RunConfig) -> torch.device:
    """What this machine would train on."""
    if run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def estimate_memory(
    run: RunConfig, *, parameters: int, largest: int, optimizer_elements: int, ranks: int
) -> Memory:
    """Bytes a rank needs for parameters, gradients, optimizer and one micro-batch's activations.

    ZeRO-1 splits the fp32 masters and the optimizer's own numbers over the ranks, ZeRO-2 the
    gradients, too, ZeRO-3 the weights, too (the largest matrix stands whole while it is used).
    DeepSpeed 0.19.8 copies masters from fp32 weights at stage 3 as well: it compares a device with
    its name. An offloaded optimizer has masters, its own numbers and the gradients in the machine's
    memory, at stage 3 the gradients twice.

    tests/unit/tools/test_plan.py has what torch's allocator counted.

    run: its engine, loader and model decide
    parameters: trained numbers
    largest: of them, those of the largest matrix
    optimizer_elements: numbers that the optimizer keeps beside the weights, over all ranks
    ranks: that share them
    """
    own = _state_bytes(
        run,
        run.engine,
        parameters=parameters,
        largest=largest,
        optimizer_elements=optimizer_elements,
        ranks=ranks,
    )
    copies = [_probe_bytes(run, probe, largest=largest, ranks=ranks) for probe in tuned_probes(run)]
    return Memory(
        **vars(own),
        activations=_activation_bytes(run, width=_width(run.engine)),
        bucket=_bucket_bytes(run, parameters=parameters, ranks=ranks),
        asked={
            name: _width(run.engine) * shape.parameter_counts().total
            for name, shape in shapes_at_hand(run).items()
        },
        probe=max(copies, key=lambda copy: copy.total, default=None),
    )


def _bucket_bytes(run: RunConfig, *, parameters: int, ranks: int) -> int:
    """Gradients on their way: what may wait for the link, at stage 0 all of them, which become the sums.

    run: its engine decides
    parameters: trained numbers
    ranks: that share a step
    """
    # a CPU maps what of a bucket is used
    if run.device == "cpu":
        return 0
    engine = run.engine
    if engine.zero_stage > 0:
        return 4 * BUCKET_ELEMENTS
    sends = sends_during_backward(engine, stage=0, ranks=ranks)
    return _width(engine) * parameters if sends else 0


def _width(engine: EngineConfig) -> int:
    """Bytes of a number of a weight."""
    return {"fp64": 8, "bf16": 2}.get(engine.precision, 4)


def _state_bytes(
    run: RunConfig,
    engine: EngineConfig,
    *,
    parameters: int,
    largest: int,
    optimizer_elements: int,
    ranks: int,
) -> StateBytes:
    """Weights, gradients and optimizer, as estimate_memory says.

    run: whose device decides
    engine: that holds them
    parameters, largest, optimizer_elements, ranks: as there
    """
    if run.device == "cpu":
        engine = as_run(engine, ranks=ranks, device=torch.device("cpu"))
    width = _width(engine)
    master_width = 8 if engine.precision == "fp64" else 4
    gradient_width = 4 if engine.precision == "bf16" else width

    # over how many ranks each kind is split
    stage = engine.zero_stage
    optimizer_parts = ranks if stage >= 1 else 1
    gradient_parts = ranks if stage >= 2 else 1
    # a look ahead keeps every weight until its backward pass
    weight_parts = ranks if stage >= 3 and engine.overlap != "weights" else 1

    masters = parameters if stage > 0 else 0
    optimizer = master_width * (masters + optimizer_elements) // optimizer_parts
    gathered = largest if stage == 3 else 0
    offloaded = 0
    if engine.offload_optimizer == "cpu":
        copies = 2 if stage == 3 else 1
        offloaded = optimizer + master_width * copies * parameters // optimizer_parts
        optimizer = 0
    return StateBytes(
        weights=width * (parameters // weight_parts + gathered),
        gradients=gradient_width * parameters // gradient_parts,
        optimizer=optimizer,
        offloaded=offloaded,
    )


def _probe_bytes(
    run: RunConfig, probe: FineTuneProbeConfig, *, largest: int, ranks: int
) -> ProbeMemory:
    """A fine-tuning as a probe (encoder.train.tuned_probe), of texts that are all as long as they may be.

    run: whose weights it copies
    probe: how many texts of which length are in a step
    largest: numbers of the largest matrix
    ranks: that share them
    """
    body = body_of(run.model)
    engine = engine_of(run.engine)
    kind = _kind(run)
    width = _width(engine)
    parameters = body.parameter_counts().total
    copy = _state_bytes(
        run,
        engine,
        parameters=parameters,
        largest=largest,
        # AdamW's two moments
        optimizer_elements=2 * parameters,
        ranks=ranks,
    )

    # texts are dealt to the ranks, and to as few micro-batches as hold them (encoder.data.examples)
    longest = min(probe.max_tokens, body.max_position_embeddings)
    most = run.loader.micro_batch_rows * run.data.row_tokens
    share = -(-probe.batch_examples * longest // ranks)
    tokens = max(longest, min(most, share))
    activations = _network_bytes(
        body, engine=engine, tokens=tokens, longest=longest, kind=kind, share=1.0
    )
    activations += body.attention_bytes(Stretch(longest), tokens=tokens, width=width, device=kind)
    activations += 0 if kind == "cpu" else CUBLAS_BYTES

    # every rank has the run's masters whole; below stage 3 the copy is made on the CPU, in fp32
    whole = 8 if engine.precision == "fp64" else 4
    start = whole * run.model.parameter_counts().total
    if kind == "cpu":
        # its masters are set from a second whole copy where its weights are bf16
        drawn = 4 * parameters if engine.precision == "bf16" else 0
        start += copy.weights + copy.optimizer + drawn
    elif engine.zero_stage < 3:
        start += 4 * parameters
    return ProbeMemory(
        **vars(copy),
        activations=int(activations),
        # it sends its gradients as the run does
        bucket=_bucket_bytes(run, parameters=parameters, ranks=ranks),
        start=start,
        on_cpu=kind == "cpu",
    )


def _kind(run: RunConfig) -> str:
    return "cpu" if run.device == "cpu" else "cuda"


def _activation_bytes(run: RunConfig, *, width: int) -> int:
    """What autograd keeps of a micro-batch, and what the loss and cuBLAS need at the same time.

    The layers are counted by encoder.tools.plan.activations; where they are computed again, one
    layer counts, and each layer's input. Which tensors a compiler computes again is known only
    after compiling: compiled layers keep a measured share (COMPILED_SHARE) of the plain ones.
    """
    model, engine = run.model, run.engine
    kind = _kind(run)
    tokens = run.loader.micro_batch_rows * run.data.row_tokens
    in_half = engine.precision in ("bf16", "autocast")
    # networks of one model keep theirs at the same time
    networks = networks_of(model).values() or (model,)
    compiled = in_half and compiles(run, torch.device(kind))
    kept = COMPILED_SHARE[engine.fp8] if compiled else 1.0
    layers = sum(
        max(
            _network_bytes(
                network, engine=engine, tokens=tokens, longest=longest, kind=kind, share=kept
            )
            for longest in {phase.max_tokens_per_document for phase in run.phases}
        )
        for network in networks
    )
    scores = max(_score_bytes(run, network, kind=kind, width=width) for network in networks)

    # one piece of logits, which becomes its gradient; the decoder's weight in 2 bytes, and its
    # gradient before and after scaling
    share = max(run.mask_share_of(phase).highest for phase in run.phases)
    targets = run.objective.expected_targets(documents=1, tokens=tokens, mask_share=share)
    piece = min(max(targets.values()), PIECE_POSITIONS[kind])
    if in_half:
        logit_width = 2
    else:
        logit_width = width
    if run.objective.STORED_MODELS:
        # of soft targets: both models' logits, and three pieces that are computed in full precision
        logit_width = 2 * logit_width + 12 if in_half else 3 * width
    decoder_width = 10 if in_half else 8
    loss = model.vocab_size * (logit_width * piece + decoder_width * model.hidden_size)
    workspace = 0 if kind == "cpu" else CUBLAS_BYTES
    return int(layers + scores + loss) + workspace


def _score_bytes(run: RunConfig, network: ModelConfig, *, kind: str, width: int) -> int:
    """What the attention of a network takes beside, in the phase where it is most.

    run: its loader, phases and objective decide
    network: the settings of the model, or of one of its networks
    kind: cuda or cpu
    width: bytes of a number
    """
    tokens = run.loader.micro_batch_rows * run.data.row_tokens
    found = []
    for phase in run.phases:
        stretch = run.objective.longest_stretch(
            longest_tokens=phase.max_tokens_per_document,
            mask_share=run.mask_share_of(phase).highest,
        )
        found.append(network.attention_bytes(stretch, tokens=tokens, width=width, device=kind))
    return max(found)


def _network_bytes(
    network: ModelConfig,
    *,
    engine: EngineConfig,
    tokens: int,
    longest: int,
    kind: str,
    share: float,
) -> float:
    """What autograd keeps of a micro-batch's forward through one network.

    network: the settings of the model, or of one of its networks
    engine: that computes it
    tokens: of the micro-batch
    longest: tokens of a document
    kind: cuda or cpu
    share: of what plain layers keep, that compiled ones do
    """
    counted = count_kept(
        network,
        precision=engine.precision,
        device=kind,
        longest_tokens=longest if kind == "cpu" else LONG,
        fp8=engine.fp8 == "layers",
        zero_3=engine.zero_stage == 3,
    )
    outside = tokens * counted.outside_per_token + counted.outside_fixed
    layer = tokens * counted.layer_per_token
    if engine.activation_checkpointing == "blocks":
        inputs = tokens * network.num_hidden_layers * network.hidden_size * _width(engine)
        return outside + inputs + layer + counted.layer_fixed
    return outside + network.num_hidden_layers * (share * layer + counted.layer_fixed)
