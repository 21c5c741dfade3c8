"""A link that sends buckets one after the other, event by event: what encoder.tools.plan.communication has in closed form."""

from __future__ import annotations


def waited_seconds(
    *,
    forward: float,
    backward: float,
    micro_batches: int,
    every_backward: bool,
    buckets: int,
    reduction: float,
    last: float,
) -> float:
    """Seconds from the end of the last backward pass to the end of the last bucket.

    forward, backward: seconds of a micro-batch's passes
    micro_batches: of the step
    every_backward: whether each backward pass sends, not the last one alone
    buckets: of one reduction, without its last
    reduction: seconds of the link for all of them
    last: share of the gradients in the bucket that is there when the backward pass is over
    """
    free = now = 0.0
    for number in range(1, micro_batches + 1):
        begin = now + forward
        now = begin + backward
        if not every_backward and number < micro_batches:
            continue
        # near enough to even: a bucket is there when its share of the backward pass is done
        for i in range(1, buckets + 1):
            there = begin + backward * i / buckets
            free = max(free, there) + reduction * (1 - last) / buckets
        free = max(free, now) + reduction * last
    return free - now
