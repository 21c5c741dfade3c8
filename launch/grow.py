#!/usr/bin/env python3
"""Grow a trained model into a larger one, as ModernBERT-large was grown from base: features tiled, layers repeated.

    python launch/grow.py SOURCE OUT --preset modernbert_large
    python launch/grow.py SOURCE OUT --run RUN.yaml                          the model of that run file
    python launch/grow.py SOURCE OUT hidden_size=256 num_attention_heads=4   the source's settings, these put over them

Then train OUT on with `init_from: OUT` in a run file. What cannot grow (heads cut in two, another vocabulary, a smaller
size) is refused and nothing is written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder.base.command import CommandLine, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, grows, prints, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.takes_model_and_out()
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings of the new model, put over those of the source, preset or run file",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--preset", metavar="NAME", help="a published shape, for example modernbert_large"
    )
    target.add_argument(
        "--run", type=Path, metavar="RUN.yaml", help="the run file that will train the new model"
    )
    parser.add_argument(
        "--mode",
        choices=("middle", "edge", "centre"),
        default="middle",
        help=(
            "middle: the source in the centre of each axis, wrapped around (published, default);"
            " edge: the source first, then again; centre: the source in the centre, the new model's"
            " chance around it"
        ),
    )
    parser.add_argument(
        "--layer-map",
        choices=("modernbert", "same_kind"),
        default="modernbert",
        help=(
            "modernbert: layer i from round(i L_old / L_new) (published, default); same_kind: the"
            " same rule, but global layers come from global ones and local from local"
        ),
    )
    parser.add_argument(
        "--final-norm",
        choices=("copy", "ones"),
        default="copy",
        help="ones: as ModernBERT's code left it, which forgot this norm alone (default copy)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="draws what is not inherited (default 0)"
    )
    args = parser.parse_intermixed_args(argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: needed is at least 0")

    def body() -> None:
        from encoder.models.growth import GrowthConfig
        from encoder.tools.weights.grow import grow_model, growth_text

        grown = grow_model(
            args.source,
            args.out,
            preset=args.preset,
            run=args.run,
            overrides=args.overrides,
            settings=GrowthConfig(
                mode=args.mode, layer_map=args.layer_map, final_norm=args.final_norm, seed=args.seed
            ),
        )
        print(growth_text(grown))
        print(
            f"wrote {args.out}; to train it on, a run file with init_from: {args.out}, whose model"
            " is then that of the weights"
        )

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
