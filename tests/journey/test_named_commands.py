"""Every command that README, docs, --help, errors and settings files name is run here, or stands in the list of those left out.

A workspace holds small things under the names that the documents use. Placeholders (RUN.yaml, SOURCE, {}) stand for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import cli
from launch import tessera
from tests.helpers.composer import flexbert, flexbert_config, write_composer
from tests.helpers.hf import CONFIG, stored, write_tokenizer_json
from tests.helpers.named_commands import ROOT, named_commands
from tests.helpers.shards import mds_writer

COMMANDS = named_commands()
OURS = re.compile(
    r"^(?:srun )?(?:python"
    r" )?(?:launch/(?P<launch>\w+)\.py|slurm/(?P<slurm>submit)\.py|(?P<verb>tessera|data-prep))(?= |$)"
)

# what no test of one small machine can run, and why
LEFT_OUT = {
    r"(?:sbatch )?slurm/\w+\.(?:sbatch|sh)": (
        "needs a cluster; tests/cluster and tests/unit/slurm/test_scripts.py run them"
    ),
    r"slurm/(?:submit|job)\.py": (
        "needs a cluster; tests/cluster and tests/unit/tools/test_slurm_submit.py"
    ),
    r"tessera (?:submit|status)": "needs a cluster; tests/unit/tools/test_slurm_submit.py",
    r"srun ": "needs a cluster; tests/cluster/test_doctor.py",
    r"(?:bash )?benchmarks/": "needs a GPU, or is a file's name",
    r"(?:python )?launch/bench\.py|tessera bench|python -m benchmarks": (
        "minutes; tests/unit/launch/test_bench.py"
    ),
    r"(?:deepspeed|torchrun) .*(?:configs/|29511|small\.yaml|sentiment\.yaml)": (
        "8 GPUs, hours, or part of a command"
    ),
    r"tessera plan --gpu$|pip": "part of a command",
    r"(?:python )?launch/pretrain\.py configs/": (
        "hours; tests/unit/runs/test_recipes.py reads the recipes"
    ),
    r"tessera pretrain (?!RUN|run|\{\})": (
        "hours; tests/unit/runs/test_recipes.py reads the recipes"
    ),
    r"tessera plan domain\.yaml": (
        "refuses so little text as is here; tests/unit/runs/test_recipes.py"
    ),
    r"tessera (?:plan|pretrain) averages\.yaml": (
        "a family that is not in the catalog; tests/unit/models/test_adding_a_model.py"
    ),
    r"tessera plan (?:continue|distilled)\.yaml": "needs the weights of ModernBERT-base",
    r"tessera shrink|(?:python )?launch/shrink\.py": (
        "of models with more layers; tests/unit/launch/test_shrink.py"
    ),
    r".*modernbert_large": "writes 1.6 GB; tests/unit/launch/test_grow.py grows small ones",
    r".*answerdotai/ModernBERT-base": (
        "needs a network; tests/unit/base/test_hub.py has a hub of its own"
    ),
    r"tessera embed|(?:python )?launch/embed\.py": (
        "trains and measures; tests/unit/tools/test_embedding.py"
    ),
    r"tessera serve|(?:python )?launch/serve\.py": (
        "serves until it is stopped; tests/process/test_page.py"
    ),
    r"tessera sweep .*--compare": (
        "needs two sweeps that were trained; tests/unit/finetune/test_sweeps.py"
    ),
    r"tessera push|python launch/push_hub\.py": (
        "needs a network; tests/unit/models/test_hf_card.py"
    ),
    r"hf |pip |wandb ": "another program, or needs a network",
    r"pytest|make ": "tests of tests; the targets are looked up in the Makefile",
    r"python -m (?:encoder|data_prep)": "a module's name",
    r"(?:python )?launch/demo\.py": "minutes; tests/journey/test_journey.py",
    r"python launch/export_hf\.py SOURCE OUT --onnx": (
        "10 s; tests/unit/models/test_hf_serves.py exports with --onnx"
    ),
    r"tessera export RUN OUT --onnx": (
        "10 s; tests/unit/models/test_hf_task.py and test_hf_serves.py export with --onnx"
    ),
    r"data-prep environment-corpus": (
        "reads all of this environment; tests/unit/prep/test_environment_corpus.py"
    ),
    r"data-prep upload": "needs a network; tests/unit/prep/test_upload.py",
    r"data-prep tokenizer modernbert": "needs a network; tests/unit/prep/test_tokenizer_files.py",
    r"data-prep prepare .*mixture_2t": "2T tokens from a network",
    r"data-prep prepare --part I/N": "a way of writing; with numbers it is run",
    r"data-prep merge": "needs all 100 parts; tests/unit/prep/test_segments.py merges",
}

RUN = """
name: small
out: runs/small
seed: 1
model: {system: modernbert, hidden_size: 128, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
        max_position_embeddings: 256}
data: {sources: [{path: shards/four_domains/web/train}], row_tokens: 256, window_documents: 64}
objective: {name: mlm}
phases: [{name: a, tokens: 4K, max_tokens_per_document: 128, batch_tokens: 1024, lr: {schedule: constant, peak: 1e-3}}]
evaluation: {sources: [{path: shards/four_domains/web/held_out}], every_tokens: 2K, rows: 1}
checkpoints: {every_tokens: 2K, keep_last: 3}
loader: {workers: 0}
device: cpu
"""
TASK = """
name: sentiment
start_from: runs/small
task: {kind: classify, texts: [text], label: label}
data: {train: rows.jsonl, dev: {dev: rows.jsonl}, max_tokens: 16}
epochs: 1
lr: 1.0e-3
device: cpu
"""
# two points, of which the second starts no process; whichever file is named first trains them for all
SWEEP = """
base: sentiment.yaml
out: runs/points
grid: {lr.peak: [1.0e-3, 2.0e-3]}
"""
AFTER = """
base: sentiment.yaml
after: mnli.yaml
"""
WORDS = {
    "TASK.yaml": "sentiment.yaml",
    "SWEEP.yaml": "rates.yaml",
    "configs/finetune/sentiment.yaml": "sentiment.yaml",
    "RUN.yaml": "run.yaml",
    "SOURCE": "runs/small",
    "RUN": "runs/small",
    "RUN_FOLDER": "runs/small",
    "HF_FOLDER": "hf/tiny",
    "CONFIG": "prep.yaml",
    "FILE.yaml": "prep.yaml",
    "configs/prep/web.yaml": "prep.yaml",
    "root=FOLDER": "root=corpus",
    "root=FOLDER_OF_THE_CORPUS": "root=corpus",
    "SHARDS": "shards/elsewhere/train",
    "FOLDER": "shards/elsewhere/train",
    "YOUR_FILES": "corpus/web.jsonl",
    "$SLURM_ARRAY_TASK_ID/100": "3/100",
    "processes=8": "processes=1",
    "N": "2",
    "STATE_DICT.pt": "STATE_DICT.pt",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Small things under the names of the documents; the run is trained by the command that they name."""
    place = tmp_path_factory.mktemp("workspace")
    before = Path.cwd()
    os.chdir(place)
    for name in ("launch", "slurm", "benchmarks", "configs"):
        Path(name).symlink_to(ROOT / name)
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("etaoinshrdlu"), 5)) for _ in range(200)]
    for folder in ("corpus",):
        Path(folder).mkdir()
        for name in ("web", "books", "science", "code", "prose", "text"):
            lines = [json.dumps({"text": " ".join(draw.choice(words, 40))}) for _ in range(150)]
            Path(folder, f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copy("corpus/books.jsonl", "held_out.jsonl")
    long = json.dumps({"text": " ".join(draw.choice(words, 400))})
    Path("books.jsonl").write_text(long + "\n")
    pair = {"sentence_good": words[0], "sentence_bad": words[1], "UID": "a"}
    Path("blimp.jsonl").write_text(json.dumps(pair) + "\n")
    Path("reviews").mkdir()
    rows = [json.dumps({"text": f"{words[i % 9]} film", "label": i % 2}) for i in range(40)]
    for name in ("train", "test"):
        Path("reviews", f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    Path("demo").mkdir()
    Path("demo/corpus").symlink_to("../corpus")
    must(
        "data-prep tokenizer train --files corpus/web.jsonl --vocab-size 400 --out "
        "corpus/tokenizer.json"
    )
    for path in ("t.json", "FILE"):
        shutil.copy("corpus/tokenizer.json", path)
    prep = Path("configs/prep/four_domains.yaml").read_text()
    Path("prep.yaml").write_text(
        prep.replace("shards/four_domains", "shards/prep") + "processes: 1\n"
    )
    templates = ("laptop", "one_gpu", "small", "domain")
    for name in templates:
        shutil.copy(ROOT / "configs" / "pretrain" / f"{name}.yaml", f"{name}.yaml")
    shutil.copy(ROOT / "configs" / "pretrain" / "modernbert_base.yaml", "base.yaml")
    shutil.copy(ROOT / "configs" / "prep" / "own_text.yaml", "own_text.yaml")
    shutil.copy(ROOT / "configs" / "prep" / "mixture_2t.yaml", "mixture.yaml")
    must("data-prep prepare configs/prep/four_domains.yaml root=corpus processes=1")
    Path("shards/own_text/text").parent.mkdir(parents=True)
    Path("shards/own_text/text").symlink_to("../four_domains/web")
    made_elsewhere()
    Path("run.yaml").write_text(RUN)
    # one run under the names that documents give it
    for name in ("sentiment", "reviews", "start"):
        Path(f"{name}.yaml").write_text(TASK)
    for name, text in (("rates", SWEEP), ("mnli", SWEEP), ("rte", AFTER)):
        Path(f"{name}.yaml").write_text(text)
    rows = [{"text": f"{words[n]} {words[n % 7]}", "label": n % 2} for n in range(40)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done, _ = [
        subprocess.run(
            [sys.executable, ROOT / "launch" / f"{verb}.py", file],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        for verb, file in (("pretrain", "run.yaml"), ("finetune", "sentiment.yaml"))
    ]
    for name in ("base", "laptop", "continue", "domain"):
        Path("runs", name).symlink_to("small")
    Path("runs", "reviews").symlink_to("sentiment")
    Path("large.yaml").write_text(
        RUN.replace("hidden_size: 128", "hidden_size: 256, vocab_size: 448")
        .replace("num_attention_heads: 2", "num_attention_heads: 4")
        .replace("runs/small", "runs/large")
    )
    must("tessera export runs/small hf/tiny")
    for out in ("hf/small", "hf/laptop", "hf/domain", "runs/small-hf", "models/ModernBERT-base"):
        shutil.copytree("hf/tiny", out)
    model = stored(
        CONFIG.__class__(
            vocab_size=280,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,
        )
    )
    torch.save(flexbert(model.weights), "STATE_DICT.pt")
    write_composer(Path("ep0-ba1000-rank0.pt"), model.weights, flexbert_config(model.config))
    write_tokenizer_json(Path("tokenizer.json"))
    yield done.stdout
    os.chdir(before)


def made_elsewhere() -> None:
    """MDS of other makers: as streaming writes it, padded, and in another column."""
    web = Path("shards/four_domains/web/train")
    target = Path("shards/elsewhere/train")
    shutil.copytree(web, target)
    for name in ("card.json", "lengths.bin", "hashes.json", "tokenizer.json"):
        (target / name).unlink(missing_ok=True)
    specials = {
        t["content"]: t["id"] for t in json.loads(Path("t.json").read_text())["added_tokens"]
    }
    body = [specials["[CLS]"], 7, 8, 9, 10, specials["[SEP]"]]
    for name, column, ids in (
        ("padded", "input_ids", [*body, specials["[PAD]"], specials["[PAD]"]]),
        ("tokens", "tokens", body[1:-1]),
    ):
        kind = np.uint16 if column == "input_ids" else np.int64
        with mds_writer(
            out=f"shards/{name}", columns={column: f"ndarray:{np.dtype(kind)}"}
        ) as writer:
            for _ in range(20):
                writer.write({column: np.array(ids, dtype=kind)})


def run(command: str) -> tuple[int, str]:
    """A command in this process: its exit code, and what it said."""
    words = shlex.split(command)
    words = words[1:] if words[0] == "python" else words
    out = io.StringIO()
    argv = words[1:]
    if words[0] == "data-prep":
        main = cli.main
    elif words[0] == "tessera":
        main = tessera.main
    else:
        main = importlib.import_module(f"launch.{Path(words[0]).stem}").main
    before = sys.argv
    with redirect_stdout(out), redirect_stderr(out):
        try:
            code = main(argv)
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        finally:
            sys.argv = before
    return int(code or 0), out.getvalue()


def must(command: str) -> str:
    code, said = run(command)
    assert code == 0, f"{command}\n{said[-3000:]}"
    return said


def why_left_out(command: str) -> str | None:
    return next((why for pattern, why in LEFT_OUT.items() if re.match(pattern, command)), None)


def is_mention(command: str) -> bool:
    """A program or verb without arguments: a name in a sentence."""
    words = command.removeprefix("python ").split()
    return (
        len(words) == 1
        or words[0] in ("tessera", "data-prep")
        and len(words) == 2
        and not words[1].startswith("-")
        or (words[:2] == ["data-prep", "tokenizer"] and len(words) == 3)
    )


def as_run(command: str, number: int) -> str:
    """A command with things of the workspace for its placeholders."""
    text = re.sub(r"\s*\[(?:key=value \.\.\.|\.\.\.)\]", "", command)
    text = (
        re.sub(r"(?<=\s)\[(?!MASK)([^\[\]]*(?:\[[^\[\]]*\]?)?)\]?", "", text)
        if "[--" in text
        else text
    )
    saved = sorted(
        p.name for p in Path("runs/small/checkpoints").iterdir() if not p.name.startswith(".")
    )
    text = re.sub(r"(RUN|runs/base)/checkpoints/A", f"runs/small/checkpoints/{saved[0]}", text)
    text = re.sub(r"(RUN|runs/base)/checkpoints/B", f"runs/small/checkpoints/{saved[-1]}", text)
    words = text.split(" ")
    fresh = f"out/{number}"
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        if word == "OUT":
            asks = "fill_mask" in text
            words[i] = "hf/tiny" if asks else fresh
        elif before == "--tokenizer" and word in ("FILE", "{}", "{}/tokenizer.json"):
            words[i] = "t.json"
        elif word == "{}":
            words[i] = hole(text, before, fresh)
        elif word.startswith("{}"):
            words[i] = word.replace("{}", "runs/small")
        else:
            words[i] = WORDS.get(word, word)
    text = " ".join(words)
    if "grow" in text:
        text = text.replace("--run run.yaml", "--run large.yaml")
    if "import_hf.py" in text or "tessera import" in text:
        text = text.replace("runs/small ", "hf/tiny ")
    if "tokenizer train" in text:  # of little text
        entries = 100 if "unigram" in text else 400
        text = f"{re.sub('--vocab-size [0-9]+', '', text)} --vocab-size {entries}"
        text = text.replace("--out corpus/tokenizer.json", f"--out {fresh}.json")
    if "prepare" in words or "prepare" in text.split(" ")[:2]:
        text += f" out=out/shards{number} processes=1"
        text = text if "own_text" not in text else f"{text} tokenizer=t.json"
    if re.search(r"tessera (?:export|import|grow)|(?:export_hf|import_hf|grow)\.py", text):
        text = re.sub(
            r"((?:export|import|grow)\S* \S+) (?!-)\S+", rf"\1 {fresh}-made", text, count=1
        )
    if "average" in text:
        text = re.sub(r"--out \S+", f"--out {fresh}-made", text)
    if "tessera new" in text:  # never over a file that is there
        text = re.sub(r"--out \S+", f"--out new{number}.yaml", text)
    if re.search(r"tessera plan|launch/plan", text):  # of a run that has not begun
        text += f" out={fresh}-run"
    # steps of a small run are measured, and a small run is looked at
    return text.replace("laptop.yaml --measure", "run.yaml --measure").replace(
        "doctor small.yaml", "doctor run.yaml"
    )


def on_a_copy(text: str, number: int) -> str:
    """`data-prep index` on shards of its own: they are indexed once."""
    if "data-prep index" not in text:
        return text
    source = next(word for word in text.split(" ") if word.startswith("shards/"))
    copy = f"out/{number}"
    shutil.copytree(source, copy)
    return text.replace(source, copy, 1)


SEEN_TO_WORK: set[str] = set()
# links and copies that the workspace made of one run and of one exported model
SAME = {
    r"runs/(?:base|laptop|continue|domain)(?![\w-])": "runs/small",
    r"hf/(?:laptop|small|domain)(?![\w-])|runs/small-hf|models/ModernBERT-base": "hf/tiny",
}
BY_MODULE = {verb.module: word for word, verb in tessera.VERBS.items()}


def same_work(text: str) -> str:
    """A command as its verb, on the things that other names stand for."""
    for names, one in SAME.items():
        text = re.sub(names, one, text)
    script = re.match(r"(?:python )?launch/(\w+)\.py", text)
    if script and script[1] in BY_MODULE:
        text = text.replace(script[0], f"tessera {BY_MODULE[script[1]]}", 1)
    return " ".join(text.split())


def hole(text: str, before: str, fresh: str) -> str:
    if before == "--out":
        return fresh if "average" in text else f"{fresh}.json"
    if "verify" in text:
        return "shards/four_domains/web/train"
    if before == "--again":
        return "--strip-padding"
    if before == "--column":
        return "input_ids"
    if "data-prep index" in text:
        return "shards/elsewhere/train"
    if "fill-mask" in text:
        return "hf/tiny"
    if "pretrain" in text:
        return "run.yaml"
    if "data-prep prepare" in text or "data-prep plan" in text:
        return "prep.yaml"
    return "runs/small" if before != "runs/small" else fresh


RUNNABLE = [
    c for c in sorted(COMMANDS) if OURS.match(c) and not is_mention(c) and why_left_out(c) is None
]


LAUNCHED = [
    c
    for c in sorted(COMMANDS)
    if re.match("deepspeed|torchrun", c) and re.search("RUN.yaml|TASK.yaml", c)
]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.matrix) if "torchrun" in command else command
        for command in LAUNCHED
    ],
)
def test_a_named_launcher_starts_the_run_on_its_ranks(workspace, command):
    """On the run that is done: what is asked is whether the launchers take the line as it stands.

    A line that differs from one before it by pretrain for finetune starts no launcher again.
    """
    words = as_run(command, 0).split()
    launch = re.sub(r"launch/\w+\.py \S+", "", " ".join(words)).strip()
    if launch in SEEN_TO_WORK:
        return
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [program, *words[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert done.returncode == 0 and "is done already" in done.stdout + done.stderr, done.stderr[
        -2000:
    ]
    SEEN_TO_WORK.add(launch)


def test_every_named_command_is_run_here_or_left_out_for_a_reason():
    tried = {*RUNNABLE, *LAUNCHED}
    lost = [c for c in COMMANDS if c not in tried and not is_mention(c) and not why_left_out(c)]
    assert not lost, f"neither run nor listed in LEFT_OUT: {[(c, COMMANDS[c]) for c in lost]}"
    unused = [p for p in LEFT_OUT if not any(re.match(p, c) for c in COMMANDS)]
    assert not unused, f"LEFT_OUT names what no text names any more: {unused}"


def test_every_named_option_and_file_is_there():
    """Also of what is left out: an option must stand in its command's --help, a file and a target must exist."""
    helps: dict[str, str] = {}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command, places in COMMANDS.items():
        for path in re.findall(
            r"(?:launch|slurm|benchmarks|configs)/[\w/]+\.(?:py|sh|sbatch|yaml)", command
        ):
            assert (ROOT / path).exists() or path == "configs/prep/web.yaml", (
                f"{command} in {places}: no {path}"
            )
        if command.startswith("make "):
            assert command.split()[1] in targets, f"{command} in {places}"
        match = OURS.match(command)
        if match is None:
            continue
        program = match[0].removeprefix("srun ").removeprefix("python ")
        rest = command[match.end() :].split()
        if match["verb"] and rest and not rest[0].startswith("-"):
            program = f"{program} {rest[0]}" + (
                f" {rest[1]}" if rest[0] == "tokenizer" and len(rest) > 1 else ""
            )
        if program not in helps:
            helps[program] = help_of(program)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", command[match.end() :]):
            assert option in helps[program], f"{command} in {places}: {program} has no {option}"


def help_of(program: str) -> str:
    if program == "slurm/submit.py" or program in ("tessera submit", "tessera status"):
        done = subprocess.run(
            [sys.executable, ROOT / "slurm" / "submit.py", "--help"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout
    code, said = run(f"{program} --help")
    assert code == 0, f"{program} --help: {said[-500:]}"
    return said


@pytest.mark.parametrize("command", RUNNABLE)
def test_a_named_command_works(workspace, command):
    """Or does what one before it did under another name, as `tessera plan` and `launch/plan.py` do."""
    work = same_work(as_run(command, 0))
    if work in SEEN_TO_WORK:
        return
    number = RUNNABLE.index(command)
    must(on_a_copy(as_run(command, number), number))
    SEEN_TO_WORK.add(work)


def test_what_a_run_names_at_its_end_works_as_it_stands(workspace):
    lines = [line for line in workspace.splitlines() if "tessera " in line]
    typed = [shlex.split(line[line.index("tessera ") :].split("   ")[0]) for line in lines]
    assert [words[1] for words in typed] == ["report", "export", "fill-mask"]
    shutil.rmtree("runs/small-hf", ignore_errors=True)
    for words in typed:
        must(shlex.join(words))


def test_the_card_of_an_exported_run_says_what_trained_it(workspace):
    card = Path("hf/tiny/README.md").read_text()
    for words in (
        "# small",
        " steps, 4",
        "data web",
        "masked tokens, 30%",
        "held out loss",
        "torch 2",
        "the same logits within",
    ):
        assert words in card, words
    assert str(Path.cwd()) not in card and "shards/" not in card
