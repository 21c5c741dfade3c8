"""How long a rank waits for the link in a step: bytes it sends, less what is sent while it computes.

    stage    gradients                                        weights
    0        all-reduced once a step                          on every rank
    1        reduced to their owners once a step              gathered after the update
    2        reduced to their owners after every micro-batch  gathered after the update
    3        reduce-scattered after every micro-batch         gathered for every forward and every backward pass; with a look
                                                              ahead once a micro-batch, while others compute

Gradients travel in buckets while the backward pass goes on. Its last bucket, the embedding's, comes when it is over, so nothing
hides that one:

    computing    | forward | backward          |         | update |
    link                      | 0 | 1 | 2 | 3  | the last |        | weights |

benchmarks/overlap.py holds this against steps of real ranks on a slow link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from encoder.engine.overlap import bucket_elements
from encoder.engine.zero.config import BUCKET_ELEMENTS

BACKWARD_SHARE = 2 / 3  # of a micro-batch's time: twice the matrix products of the forward pass
# from one rank of a ring to the next: InfiniBand takes 2 to 5 us, NVLink less; assumed
HOP_SECONDS = 5e-6


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends in a step, by ring collectives: a reduce-scatter or an all-gather of n bytes sends n (N - 1) / N."""

    gradients: float  # of one reduction
    reductions: int  # of a step
    weights: float  # gathered after the update
    gathered: float  # of weights for the passes of one micro-batch
    looks_ahead: bool  # whether they are gathered while others compute
    micro_batches: int
    # messages of one reduction, each once around the ring, an all-reduce's twice
    hops: int
    # share of the gradients that is there only when the backward pass is over
    last: float
    sends: bool  # whether gradients are sent during the backward pass

    @staticmethod
    def of(
        *,
        stage: int,
        precision: str,
        parameters: int,
        largest: int,
        ranks: int,
        micro_batches: int,
        sends: bool = True,
        looks_ahead: bool = False,
    ) -> Traffic:
        """Counted from shapes; gradients travel in fp32.

        stage: of ZeRO
        precision: as the engine is told
        parameters: trained numbers
        largest: of them, those of the largest matrix, the embedding
        ranks: that share a step
        micro_batches: of a rank's step
        sends: whether we send them during the backward pass; DeepSpeed's own buckets are larger
        looks_ahead: whether stage 3 gathers weights while others compute
        """
        share = (ranks - 1) / ranks
        # an all-reduce is a reduce-scatter and an all-gather
        passes = 2 if stage == 0 else 1
        gradients = passes * parameters * (8 if precision == "fp64" else 4) * share
        weights = parameters * {"fp64": 8, "bf16": 2}.get(precision, 4) * share
        bucket = bucket_elements(parameters, ranks=ranks)
        if not sends:
            bucket = BUCKET_ELEMENTS
        return Traffic(
            gradients=gradients,
            reductions=micro_batches if stage >= 2 else 1,
            weights=weights if stage in (1, 2) else 0.0,
            # for the forward pass, and again for the backward pass unless they have stayed
            gathered=(1 if looks_ahead else 2) * weights if stage == 3 else 0.0,
            looks_ahead=looks_ahead,
            micro_batches=micro_batches,
            hops=passes * math.ceil(parameters / bucket) * (ranks - 1),
            last=min(1.0, max(largest, bucket) / parameters),
            sends=sends,
        )

    @property
    def total(self) -> float:
        """All bytes of a step."""
        passes = self.micro_batches * self.gathered
        return self.reductions * self.gradients + self.weights + passes

    def scaled(self, factor: float) -> Traffic:
        """As many messages of other sizes."""
        return replace(
            self,
            gradients=factor * self.gradients,
            weights=factor * self.weights,
            gathered=factor * self.gathered,
        )


def waiting_seconds(
    traffic: Traffic,
    *,
    computing: float,
    bytes_per_second: float,
    hop_seconds: float = HOP_SECONDS,
) -> float:
    """What the link adds to a step.

    traffic: of the step
    computing: seconds of its forward and backward passes
    bytes_per_second: of a rank's link, each way
    hop_seconds: from one rank of a ring to the next
    """
    reduction = traffic.gradients / bytes_per_second + traffic.hops * hop_seconds
    forward = (1 - BACKWARD_SHARE) * computing / traffic.micro_batches
    gather = traffic.gathered / bytes_per_second
    if traffic.looks_ahead:
        gather = max(0.0, gather - forward)
    behind = traffic.weights / bytes_per_second + traffic.micro_batches * gather
    if not traffic.sends:
        return traffic.reductions * reduction + behind

    last = traffic.last * reduction
    a_micro_batch = computing / traffic.micro_batches
    # the link is behind since the last reduction began, or since the first: those between are no worse than the two
    behind_since = [
        count * reduction - last - BACKWARD_SHARE * a_micro_batch - (count - 1) * a_micro_batch
        for count in (1, traffic.reductions)
    ]
    return max(0.0, *behind_since) + last + behind
