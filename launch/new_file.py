#!/usr/bin/env python3
"""Write a commented run, preparation or task file to start from; the templates are the shipped files of configs/.

tessera new --list
tessera new small --data shards/web/train --out run.yaml
tessera new prep own_text > own_text.yaml
tessera new finetune rte --like roberta_large --out roberta_rte.yaml
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from encoder.base.command import CommandLine, as_typed, run_command
from encoder.base.errors import ConfigError, nearest
from encoder.base.files import write_atomic
from encoder.base.home import home
from encoder.base.paths import expand_path
from encoder.base.schema import parse_yaml

# run files of published models, by their presets (docs/families.md)
FAMILIES = (
    "bert_tiny",
    "bert_mini",
    "bert_small",
    "bert_medium",
    "bert_base",
    "bert_large",
    "roberta_base",
    "roberta_large",
    "distilbert_base",
    "albert_base",
    "albert_large",
    "albert_xlarge",
    "albert_xxlarge",
    "xlnet_base",
    "xlnet_large",
    "mini_roberta",
    "mini_roberta_readme",
    "ropert_small",
    "ettin_17m",
    "ettin_32m",
    "ettin_68m",
    "ettin_150m",
    "ettin_400m",
    "ettin_1b",
    "mmbert_small",
    "mmbert_base",
    "electra_small",
    "electra_base",
    "electra_large",
    "modernbert_rtd",
    "crammed_bert",
    "mosaic_bert",
)
RUNS = {
    "tiny": "tiny_cpu",
    "small": "small",
    "laptop": "laptop",
    "one-gpu": "one_gpu",
    "base": "modernbert_base",
    "large": "modernbert_large",
    "continue": "continue",
    "domain": "domain",
    "distilled": "modernbert_distilled",
    "four-domains": "mini_four_domains",
    **{name.replace("_", "-"): name for name in FAMILIES},
}
_ITEM = re.compile(r"^ +- \{.*\bpath: ")  # one shard folder of a list
_MIXTURES = re.compile(r"^mixtures:", re.M)
_TOKENIZER = re.compile(r"^tokenizer: (\S+)", re.M)
# from here on a task file says how its model is trained
_TRAINING = re.compile(r"^# How it is trained", re.M)
PUBLISHED = "published.yaml"
_TOP_KEY = re.compile(r"^([A-Za-z_]+):")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, writes, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="TEMPLATE",
        help=f"{', '.join(RUNS)}; or: prep {' | '.join(preparations())}; or: finetune"
        f" {' | '.join(tasks())}",
    )
    parser.add_argument("--list", action="store_true", help="what each template is for")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="SHARDS",
        help="your shard folder, instead of the template's; several: several times",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="name of the run; its folder is then runs/NAME"
    )
    parser.add_argument(
        "--like",
        metavar="MODEL",
        help=f"of a task file: with the published hyper-parameters of another model:"
        f" {', '.join(published())}",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write there instead of to standard output; never over a file",
    )
    args = parser.parse_args(argv)
    if args.list:
        return run_command(lambda: print(list_text()))
    if not args.words:
        parser.error(
            f"no template. Needed: one of {', '.join(RUNS)}, or prep and one of"
            f" {', '.join(preparations())}, or finetune and one of {', '.join(tasks())}"
        )

    def body() -> None:
        text = template(args.words)
        if args.words[0] == "finetune" and args.data:
            raise ConfigError(
                "--data is for run files. Leave it out, and edit the task file's own data."
            )
        if args.like:
            text = with_published(text, args.words, model=args.like)
        if args.words[0] == "prep" and (args.data or args.name):
            raise ConfigError(
                "--data and --name are for run files. Leave them out, and edit the preparation"
                " file."
            )
        if args.data:
            text = with_data(text, args.data, of=args.words[0])
        if args.name:
            text = with_name(text, args.name)
        if args.out is None:
            sys.stdout.write(text)
            return
        if os.path.lexists(args.out):  # also a link that leads nowhere
            raise ConfigError(f"{args.out} is there already. Name another file, or remove it.")
        write_atomic(args.out, text)
        print(f"wrote {args.out}. {next_step(text, args.out, words=args.words)}")

    return run_command(body)


def next_step(text: str, out: Path, *, words: Sequence[str]) -> str:
    """The command after this one: a preparation needs its tokenizer first, where that is not there yet."""
    if words[0] == "finetune":
        return f"Put your data and start_from in, then: {as_typed('finetune', out)}"
    if words[0] != "prep":
        return f"Look at it, then: {as_typed('plan', out)}"
    file = shlex.quote(str(out))
    prepare = f"data-prep prepare {file}"
    if _MIXTURES.search(text):
        # it is large: what it costs comes first
        prepare = f"data-prep plan {file}"
    tokenizer = _TOKENIZER.search(text)
    if tokenizer is None or Path(tokenizer[1]).exists():
        return f"Look at it, then: {prepare}"
    return (
        f"Look at it; then make the tokenizer that it names: data-prep tokenizer modernbert --out"
        f" {tokenizer[1]} (or train one: data-prep tokenizer train --help); then: {prepare}"
    )


def preparations() -> list[str]:
    """The preparation files."""
    return sorted(path.stem for path in (home() / "configs" / "prep").glob("*.yaml"))


def tasks() -> dict[str, Path]:
    """The task files, by name."""
    files = sorted((home() / "configs" / "finetune").rglob("*.yaml"))
    # a file of a sweep names one of these
    return {path.stem: path for path in files if _TRAINING.search(path.read_text("utf-8"))}


def published() -> dict[str, Any]:
    """Hyper-parameters by model: its source, those of all tasks, and each task's own."""
    path = home() / "configs" / PUBLISHED
    return parse_yaml(path.read_text(encoding="utf-8"), where=str(path))


def template(words: Sequence[str]) -> str:
    """The shipped file that one or two words name. Raises ConfigError."""
    if words[0] == "prep":
        name = words[1] if len(words) == 2 else ""
        if name not in preparations():
            raise ConfigError(
                f"prep {name or 'without a name'} is no template. {nearest(name, preparations())}"
            )
        return (home() / "configs" / "prep" / f"{name}.yaml").read_text(encoding="utf-8")
    if words[0] == "finetune":
        name, known = words[1] if len(words) == 2 else "", tasks()
        if name not in known:
            raise ConfigError(
                f"finetune {name or 'without a name'} is no template. {nearest(name, [*known])}"
            )
        return known[name].read_text(encoding="utf-8")
    if len(words) > 1:
        raise ConfigError(
            f"{words[1]} is too much: one template. Shards are given as --data {words[1]}."
        )
    if words[0] not in RUNS:
        raise ConfigError(
            f"{words[0]} is no template. {nearest(words[0], [*RUNS, 'prep', 'finetune'])}"
        )
    return (home() / "configs" / "pretrain" / f"{RUNS[words[0]]}.yaml").read_text(encoding="utf-8")


def list_text() -> str:
    """Each template with the first line of its file."""
    lines = [f"{word:<20}{_first_line([word])}" for word in RUNS]
    return "\n".join(
        [
            *lines,
            "",
            *(f"{f'prep {name}':<20}{_first_line(['prep', name])}" for name in preparations()),
            "",
            *(f"{f'finetune {name}':<20}{_first_line(['finetune', name])}" for name in tasks()),
        ]
    )


def with_data(text: str, folders: Sequence[str], *, of: str) -> str:
    """The text with other shard folders; in `evaluation` SOURCE/train becomes SOURCE/held_out. Raises ConfigError."""
    # a list further in belongs to a phase
    if re.search(r"^ {4,}(?:sources|mixture):", text, re.M):
        raise ConfigError(
            f"{of} has other shards in other phases, so one --data would not do. Leave it out, and"
            " edit the paths."
        )
    for folder in folders:
        _refuse_folder_above(expand_path(Path(folder)))
    # prepared sources have `held_out` beside `train`
    held_out = [str(Path(f).parent / "held_out") if Path(f).name == "train" else f for f in folders]
    return _replace_items(_replace_items(text, "data", folders), "evaluation", held_out)


def _refuse_folder_above(folder: Path) -> None:
    """A folder that is not there may be made later; one above shard folders never becomes one. Raises ShardError."""
    if folder.is_dir():
        # imported here: it takes numpy
        from encoder.data.shard_format import read_card, shards_meant

        if shards_meant(folder):
            read_card(folder)


def with_published(text: str, words: Sequence[str], *, model: str) -> str:
    """A task file with the published hyper-parameters of another model in place of its own. Raises ConfigError."""
    if words[0] != "finetune":
        raise ConfigError("--like is for task files: tessera new finetune rte --like bert_base.")
    known = published()
    if model not in known:
        raise ConfigError(f"--like {model}: nothing is known of it. {nearest(model, [*known])}")
    about, name = known[model], words[1]
    if name not in about["tasks"]:
        raise ConfigError(
            f"--like {model}: nothing was published for {name}. {nearest(name, [*about['tasks']])}"
        )
    values = _over(about["all"], about["tasks"][name])
    for key, indent in (("start_from", ""), ("max_tokens", "  ")):
        if key in values:
            line = f"{indent}{key}: {values.pop(key)}"
            text = re.sub(rf"^{indent}{key}: .*$", line, text, flags=re.M)
    found = _TRAINING.search(text)
    assert found, "a task file says how its model is trained"
    lines = [f"# How it is trained: as {model} was ({about['source']})"]
    lines += [f"{key}: {_flow(value)}" for key, value in values.items()]
    return text[: found.start()] + "\n".join(lines) + "\n"


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, what is above winning key by key."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _over(merged[key], value)
        merged[key] = value
    return merged


def _flow(value: Any) -> str:
    """In one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(x) for x in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_name(text: str, name: str) -> str:
    """The text with another name, and its run folder beside it."""
    text = re.sub(r"^name: .*$", lambda _: f"name: {name}", text, flags=re.M)
    return re.sub(r"^out: .*$", lambda _: f"out: runs/{name}", text, flags=re.M)


def _replace_items(text: str, key: str, folders: Sequence[str]) -> str:
    """The shard folders in the block of a top-level key."""
    lines: list[str] = []
    inside, done = "", False
    for line in text.splitlines(keepends=True):
        if found := _TOP_KEY.match(line):
            inside = found.group(1)
        if inside != key or not _ITEM.match(line):
            lines.append(line)
        # the first item gives way to all folders, the others go
        elif not done:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [f"{indent}- {{path: {_quoted(folder)}}}\n" for folder in folders]
            done = True
    return "".join(lines)


def _quoted(path: str) -> str:
    """As a YAML word: quoted unless it is plain."""
    return path if re.fullmatch(r"[A-Za-z0-9_./~-]+", path) else json.dumps(path)


def _first_line(words: Sequence[str]) -> str:
    return template(words).splitlines()[0].removeprefix("# ")


if __name__ == "__main__":
    sys.exit(main())
