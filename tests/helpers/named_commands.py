"""Every command that the product names: in README and docs, in --help, in error messages and in settings files.

Text is taken from Markdown, from the strings of Python sources (an f-string's holes become {}) and from comments of YAML. In it a
command begins with a program that we ship or tell people to use, and ends where prose goes on:

    "Grow it: launch/grow.py {path} OUT --run RUN.yaml, then init_from: OUT."   ->   launch/grow.py {} OUT --run RUN.yaml
"""

from __future__ import annotations

import ast
import re
import shlex
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from launch import tessera

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ("encoder", "data_prep", "launch", "slurm", "benchmarks")
OURS = r"(?:python |srun python |srun )?(?:launch|slurm|benchmarks)/\w+\.(?:py|sh|sbatch)"
THEIRS = (
    r"deepspeed(?= -)|torchrun(?= -)|pip (?:install|download)|python -m \w+|hf"
    r" (?:download|auth|upload)|wandb sync|pytest(?= -)|"
    r"make(?= (?:demo|test|test-cluster|check|clean|install|help)\b)|bash(?= \w+/)|sbatch(?= \w*/)"
)
VERBS = "data-prep|tessera"
PROSE = r"(?!(?:is|are|was|makes|command|that|which)\b)"  # "another data-prep is making it"
START = re.compile(rf"(?<![\w/.-])(?:{OURS}|{THEIRS}|(?:{VERBS})(?= {PROSE}[a-z-]))")
WORD = re.compile(
    r"--?[A-Za-z][\w-]*(?:=\S+)?"  # an option
    r"|\"[^\"]*\"|'[^']*'"  # a quoted text
    r"|\{\}\S*|\[[^\]]*\]|\.\.\.|[A-Z][A-Z_0-9]*(?:[/.]\S*)?(?![\w-])"  # a hole, a choice, a placeholder
    r"|[\w.-]+=\S*|\S*[/.]\S*\w\S*|\d\S*|\$\w+\S*"  # a setting, a path, a number, a variable
)
STOPS = r"(?:has|and|or|is|puts|says|gives|tells|then|where|for|of|in|to)\b"  # a sentence goes on
SECOND = {
    "tokenizer": "train|modernbert|from-hf",
    "new": r"[\w-]+",
    "new finetune": r"[\w-]+",
    "prep": r"[\w-]+",
    "bench": "step",
}


def named_commands() -> dict[str, list[str]]:
    """Each command, as it is written but for holes, with the places that name it."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in _texts():
        for command in commands_in(text):
            place = str(path.relative_to(ROOT))
            if place not in found[command]:
                found[command].append(place)
    return dict(found)


def commands_in(text: str) -> list[str]:
    """The commands of one text, in order."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [_whole(joined, match) for match in START.finditer(joined)]


def _whole(text: str, match: re.Match) -> str:
    """From a program's name on, word by word, as long as they can be arguments."""
    words, at = [match[0]], match.end()
    takes_verb = bool(re.fullmatch(VERBS, match[0])) or match[0].startswith(("python -m", "make"))
    while at < len(text) and text[at] == " " and text[at + 1 : at + 2] not in ("", " "):
        word = WORD.match(text, at + 1)
        plain = re.compile(rf"(?!{STOPS})[A-Za-z][\w-]*").match(text, at + 1)
        option = len(words) > 1 and words[-1].startswith("--") and "=" not in words[-1]
        second = None
        if words[0] in VERBS.split("|"):
            second = SECOND.get(" ".join(words[-2:])) or SECOND.get(words[-1])
        follows = plain and second and re.fullmatch(second, plain[0])
        verb = takes_verb and len(words) == 1
        if plain and (word is None or len(plain[0]) > len(word[0])) and (verb or option or follows):
            word = plain
        if word is None:
            break
        whole = word[0].rstrip(".,;:)`")
        words.append(whole)
        at = word.end()
        if whole != word[0] or not whole:
            break
    return " ".join(w for w in words if w)


def _texts() -> list[tuple[Path, str]]:
    found = [
        (p, p.read_text(encoding="utf-8"))
        for p in sorted(
            (
                *ROOT.glob("*.md"),
                *ROOT.glob("docs/*.md"),
                *ROOT.glob("slurm/*.md"),
                *ROOT.glob("benchmarks/*.md"),
            )
        )
        if p.name != "log.md"
    ]  # the log tells what was done on a day
    for folder in PYTHON:
        for path in sorted((ROOT / folder).rglob("*.py")):
            # the demo types its commands itself, and test_journey.py runs all of them
            if path == ROOT / "launch" / "demo.py":
                continue
            found += [(path, text) for text in _strings(path)]
    found += [
        (ROOT / "launch" / "tessera.py", f"tessera {verb.example}")
        for verb in tessera.VERBS.values()
    ]
    for path in sorted(ROOT.glob("configs/**/*.yaml")):
        found += [
            (path, line.partition("#")[2])
            for line in path.read_text(encoding="utf-8").splitlines()
            if "#" in line
        ]
    return found


def _strings(path: Path) -> list[str]:
    texts = []
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "as_typed":
            words = [a.value if isinstance(a, ast.Constant) else "{}" for a in node.args]
            quoted = [word if word == "{}" else shlex.quote(word) for word in words]
            texts.append(" ".join(["tessera", *quoted]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            texts.append(
                "".join(
                    part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
                )
            )
    return texts


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All but those inside of f-strings, whose parts are read as one text."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        if not isinstance(node, ast.JoinedStr):
            waiting.extend(ast.iter_child_nodes(node))


if __name__ == "__main__":
    for command, places in sorted(named_commands().items()):
        print(f"{command:<110} {', '.join(places)}")
