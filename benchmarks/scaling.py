"""What the plan's model says of base and large on 8 to 512 GPUs, as a table in Markdown: on paper, nothing is run.

    python -m benchmarks.scaling [--gpu h100] [--interconnect 50]

Steps of 4.7 M tokens in rows of 8,192, or of the nearest number of rows that leaves no rank idle. Inside of one machine of 8 the
link is NVLink. A rate is that of one rank, beside one of a single machine's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from encoder.base.command import CommandLine, run_command
from encoder.runs.config import RunConfig, read_run
from encoder.runs.phases import Stretch
from encoder.tools.plan.forecast import Forecast, Machine, Steps, forecast, gpu
from encoder.tools.plan.memory import count_needs, on_machine
from encoder.tools.plan.work import phase_work

MODELS = ("base", "large")
RANKS = (8, 16, 32, 64, 96, 128, 256, 512)
ROW_TOKENS = 8192
ROWS = 576  # 4.7 M tokens
MOST_ROWS = 4  # of a micro-batch: 32,768 tokens
A_MACHINE = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, prints, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("--gpu", default="h100", metavar="WORD")
    parser.add_argument("--interconnect", type=float, default=50.0, metavar="GB/s")
    args = parser.parse_args(argv)

    def body() -> None:
        machine = gpu(args.gpu)
        for model in MODELS:
            print(f"\nmodernbert_{model}\n")
            print("\n".join(table(model, machine=machine, interconnect=1e9 * args.interconnect)))

    return run_command(body)


def table(model: str, *, machine: Machine, interconnect: float) -> list[str]:
    """A line for each number of ranks."""
    lines = [
        "| GPUs | batch, M tokens | micro-batches | M tokens/s | of one machine's rate a GPU | sent behind"
        " the backward pass |",
        "|---|---|---|---|---|---|",
    ]
    rates: dict[str, float] = {}
    for ranks in RANKS:
        own = max(1, round(ROWS / ranks))
        size = next(n for n in range(min(MOST_ROWS, own), 0, -1) if own % n == 0)
        cells = []
        speed = 0.0
        for how in ("reduction", "off"):
            run = run_of(model, rows=size, overlap=how, machine=machine)
            found = step_of(run, ranks=ranks, own=own, machine=machine, interconnect=interconnect)
            rate = found.tokens_per_second / ranks
            cells.append(f"{rate / rates.setdefault(how, rate):.0%}")
            speed = speed or found.tokens_per_second
        batch = own * ranks * ROW_TOKENS / 1e6
        shape = f"{own // size} of {size * ROW_TOKENS:,}"
        lines.append(
            f"| {ranks} | {batch:.2f} | {shape} | {speed / 1e6:.2f} | {' | '.join(cells)} |"
        )
    return lines


def run_of(model: str, *, rows: int, overlap: str, machine: Machine) -> RunConfig:
    """The shipped run file, with these micro-batches."""
    settings = [
        f"data.row_tokens={ROW_TOKENS}",
        f"loader.micro_batch_rows={rows}",
        f"engine.overlap={overlap}",
    ]
    run = read_run(f"configs/pretrain/modernbert_{model}.yaml", settings)
    return on_machine(run, machine)


def step_of(
    run: RunConfig, *, ranks: int, own: int, machine: Machine, interconnect: float
) -> Forecast:
    """One full step of the first phase.

    run: what is trained
    ranks: that share it
    own: rows of each
    machine: of a rank
    interconnect: bytes a second between machines
    """
    needs = count_needs(run, ranks=ranks)
    phase = run.phases[0]
    rows = own * ranks
    stretch = Stretch(
        phase=0, first_step=1, first_tokens=0, rows=rows, tokens=rows * ROW_TOKENS, steps=1
    )
    flops = phase_work(run, phase).flops / phase.tokens
    return forecast(
        run,
        steps=Steps(stretches=[stretch], flops_per_token=[flops], ranks=ranks),
        parameters=needs.parameters,
        largest=needs.largest,
        machine=machine,
        interconnect=interconnect if ranks > A_MACHINE else None,
    )


if __name__ == "__main__":
    sys.exit(main())
