"""300 run files and preparation files of a fixed seed, broken in every way: sentences, or accepted and shown; nothing else."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_prep.config import PrepareConfig
from data_prep.plan import plan as prep_plan
from encoder.base.errors import UserError
from encoder.base.schema import read_settings, to_yaml
from tests.helpers.shards import random_documents, write_source

SEED, EACH = 20261128, 150
SECONDS_A_CASE = 5

RUN = {
    "name": "t",
    "out": "OUT",
    "seed": 1,
    "model": {
        "system": "modernbert",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "data": {
        "sources": [{"path": "SOURCE", "weight": 1.0}],
        "row_tokens": 64,
        "window_documents": 16,
    },
    "objective": {"name": "mlm", "mask_share": 0.3},
    "optimizer": {"weight_decay": 1e-5},
    "phases": [
        {
            "name": "a",
            "tokens": "1K",
            "max_tokens_per_document": 64,
            "batch_tokens": 128,
            "lr": {"schedule": "wsd", "peak": 1e-3, "warmup_tokens": 100, "decay_tokens": 100},
        }
    ],
    "checkpoints": {"every_tokens": "1K"},
    "loader": {"workers": 0},
    "engine": {"zero_stage": 1},
    "device": "cpu",
}
PREP = {
    "tokenizer": "SOURCE/tokenizer.json",
    "out": "OUT",
    "root": "ROOT",
    "max_tokens_per_document": 64,
    "held_out_share": 0.1,
    "shard_bytes": 4096,
    "sources": [
        {
            "name": "web",
            "format": "jsonl",
            "files": ["*.jsonl"],
            "text": "text",
            "filters": [
                {"column": "score", "at_least": 0.5},
                {"column": "lang", "one_of": ["en", "de"]},
            ],
            "estimate": {"tokens": "1M", "reference": "a guess"},
        }
    ],
    "mixtures": {"first": {"tokens": "1M", "sources": {"web": "1M"}}},
}
MIXED_RUN = {
    **RUN,
    "data": {
        "mixture": {"file": "ROOT/prep.yaml", "name": "first"},
        "row_tokens": 64,
        "window_documents": 16,
    },
    "phases": [*RUN["phases"], {**RUN["phases"][0], "name": "b", "mixture": {"name": "first"}}],
    "evaluation": {"mixture": {"name": "first"}, "every_tokens": "1K"},
}
WRONG = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**6,
    2**31,
    2**63,
    10**18,
    10**40,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\u00e9\u4e2d\U0001f600",
    "a" * 5000,
    "../..",
    "~",
    "$NOT_SET_HERE",
    "${oc.env:HOME}",
    "/dev/zero",
    "1e999999999",
    "1T",
    "9" * 30 + "T",
    "-5K",
    "2026-02-31",
    "yes",
    "null",
    "modernbert_base",
    [],
    {},
    [[]],
    [{}],
    {"a": {}},
    ["x"],
    [1, 2],
    {"preset": []},
    {"schedule": "cosine"},
    "s3://bucket/x",
    "file://",
    "{{ x }}",
    "off",
    "\u202e",
    "a\nb",
]
BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
TAILS = [
    "x: !!python/object/apply:os.system ['touch pwned']\n",
    "\tx: 1\n",
    "? {a: b}\n: c\n",
    "<<: {seed: 3}\n",
    "<<: 3\n",
    "x: \0\n",
    'name: "\\ud800"\n',
    "x: !!timestamp y\n",
    "x: 2026-13-45\n",
    "'" * 999,
    "x: 1:2:3:4:5:6:7:8:9\n",
    "name: 1e999999999\n",
    "x: 0x" + "f" * 4000 + "\n",
    "z: &z [*z]\n",
    "name: !!str 2026-02-31\n",
    "a: " * 500 + "\n",
]
TEXTS = [
    lambda t: t + "\n" + t,
    lambda t: "[" * 3000 + t,
    lambda t: t.replace(":", ": !!int", 1),
    lambda t: BOMB + t,
    lambda t: t[: len(t) // 2],
    lambda t: "",
    lambda t: "null",
    lambda t: "- " + t,
    lambda t: t.replace("1", "1" * 5000, 1),
    lambda t: t.replace(": ", ": &a ", 1) + "z: *a\n",
    lambda t: "%YAML 9\n" + t,
    lambda t: t.replace("\n", "\r"),
    lambda t: "\ufeff" + t,
    *[lambda t, tail=tail: t + tail for tail in TAILS],
]


class TooLong(BaseException):
    """A case that does not end."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value, at=()) -> list[tuple]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [found for key, item in items for found in ((*at, key), *places(item, (*at, key)))]


def broken(base: dict, chance: random.Random, paths: dict[str, str]) -> str:
    """The text of a settings file with one to three faults."""
    mapping = copy.deepcopy(base)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        *above, key = chance.choice(places(mapping))
        holder = mapping
        for part in above:
            holder = holder[part]
        kind = chance.choice(["value", "value", "value", "drop", "misspelt", "unknown"])
        if kind == "value":
            holder[key] = copy.deepcopy(chance.choice(WRONG))
        elif kind == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            letters = list(str(key))
            letters.insert(chance.randrange(len(letters) + 1), chance.choice("aex_ -\u00e9"))
            holder["".join(letters)] = (
                holder.pop(key) if kind == "misspelt" else chance.choice(WRONG)
            )
    text = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)
    for word, path in paths.items():
        text = text.replace(word, path)
    return chance.choice(TEXTS)(text) if chance.random() < 0.35 else text


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("fuzz")
    source = write_source(root / "shards" / "train", random_documents(60))
    (root / "prep.yaml").write_text(yaml.safe_dump(PREP))
    (root / "a.jsonl").write_text('{"text": "a b c", "score": 1, "lang": "en"}\n' * 20)
    return {"SOURCE": str(source), "OUT": str(root / "out"), "ROOT": str(root)}


def run_of(path: Path) -> str:
    """As launch/plan.py does it."""
    from encoder.runs.config import read_run
    from encoder.runs.filling import row_fills
    from encoder.runs.phases import planned_steps
    from encoder.tools.plan.plan import plan_text

    run = read_run(path)
    steps = planned_steps(run, fills=row_fills(run))
    return to_yaml(run) + plan_text(run, ranks=1, steps=steps)


def preparation_of(path: Path) -> str:
    config = read_settings(PrepareConfig, path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        prep_plan(config)
    return to_yaml(config) + out.getvalue()


def mixture_of(path: Path) -> str:
    """As a run file reads a preparation file."""
    from encoder.runs.config import read_run

    run = path.with_name("run.yaml")
    run.write_text(
        yaml.safe_dump(
            {**RUN, "data": {"mixture": {"file": path.name, "name": "first"}, "row_tokens": 64}}
        )
    )
    return to_yaml(read_run(run))


@pytest.mark.parametrize(
    "base, read",
    [(RUN, run_of), (MIXED_RUN, run_of), (PREP, preparation_of), (PREP, mixture_of)],
    ids=["run files", "run files with mixtures", "preparation files", "mixtures"],
)
def test_a_broken_settings_file_is_sentences_or_is_accepted_and_shown(
    tmp_path, monkeypatch, paths, base, read
):
    """150 of each; within a time limit a case, and without growing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    chance, ends, wrong = random.Random(SEED), Counter(), []
    memory, begun = 0, time.monotonic()
    for number in range(EACH):
        text = broken(base, chance, paths)
        (tmp_path / "settings.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            with limited():
                assert read(tmp_path / "settings.yaml")
            ends["accepted"] += 1
        except UserError as error:
            ends["sentence"] += 1
            if (
                not str(error).strip()
                or "\n" in str(error)
                or len(str(error)) > 4000
                or "Traceback" in str(error)
            ):
                wrong.append((number, str(error)[:500], text[:1500]))
        except (Exception, TooLong) as error:
            wrong.append((number, f"{type(error).__name__}: {error}"[:500], text[:1500]))
        if number == 20:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not wrong, f"{len(wrong)} of {EACH}: " + "\n\n".join(
        f"{n}: {said}\n{text}" for n, said, text in wrong[:5]
    )
    assert ends["accepted"] > 5 and ends["sentence"] > 50, ends
    assert not (tmp_path / "pwned").exists() and not Path(paths["OUT"]).exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB
    assert time.monotonic() - begun < 60
