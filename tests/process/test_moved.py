"""A run is known by its content: shards and models may be moved and named by another path, and not exchanged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from encoder.base.dist import World
from encoder.base.errors import UserError
from encoder.base.schema import to_yaml
from encoder.data.loader import Loader
from encoder.data.shard_format import tokenizer_fingerprint
from encoder.runs import foreign_files
from encoder.runs.config import read_run
from encoder.runs.folder import CHECKPOINTS, DONE, LEDGER, read_jsonl
from encoder.train import checkpointing, pretraining
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks

RUN = """
name: moved
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/a/train}}, {{path: {root}/b/train}}], row_tokens: 64, window_documents: 30}}
objective: {{name: mlm}}
phases: [{{name: one, tokens: 3K, max_tokens_per_document: 48, batch_tokens: 256, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 1K, keep_last: 99}}
engine: {{precision: fp32}}
loader: {{micro_batch_rows: 4, workers: 0}}
tracking: {{print_every_steps: 100}}
"""


def start(world: World, root: Path, out: str, *settings: str, stop_at: int = 0) -> str:
    """One start; its error, or nothing. `stop_at`: it fails before this step, as a kill would end it."""
    plain, calls = Loader.next_step, [0]

    def next_step(self):
        calls[0] += 1
        if calls[0] == stop_at:
            raise UserError("stopped here")
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "next_step", next_step)
        try:
            pretrain(read_run(root / "run.yaml", [f"out={root}/{out}", *settings]), world)
        except UserError as error:
            return str(error)
    return ""


def paths(a: object, b: object) -> list[str]:
    return [f"data.sources.0.path={a}", f"data.sources.1.path={b}"]


def moves(world: World, *, folder: str) -> dict[str, str]:
    """Starts, stops, moves and goes on, in one process; what each start said."""
    root, said = Path(folder), {}
    said["whole"] = start(world, root, "whole")
    for name in ("new", "old", "other", "swapped"):
        with pytest.MonkeyPatch.context() as patch:
            # as runs were recorded before: a source's name only where the run file has one
            if name == "old":
                patch.setattr(pretraining, "named_sources", lambda run: run)
            said[f"{name} stops"] = start(world, root, name, stop_at=9)
    begun = root / "branch", root / "grown"
    said["branch stops"] = start(
        world, root, "branch", f"branch_from={root}/whole", "seed=4", stop_at=9
    )
    said["grown stops"] = start(world, root, "grown", f"init_from={root}/whole", stop_at=9)
    assert all(path.is_dir() for path in begun)

    (root / "elsewhere").mkdir()
    shutil.move(root / "a", root / "elsewhere" / "a")
    os.symlink(root / "elsewhere" / "a", root / "link")
    os.chdir(root)
    moved = paths("./elsewhere/../link/train/", f"{root}/b/train//")
    said["new"] = start(world, root, "new", *moved)
    said["old"] = start(world, root, "old", *moved)
    said["swapped"] = start(world, root, "swapped", *paths("b/train", "link/train"))
    said["weight"] = start(world, root, "swapped", *moved, "data.sources.0.weight=2")

    shutil.copytree(root / "whole", root / "copy")
    said["branch of another"] = start(
        world, root, "branch", *moved, f"branch_from={root}/other", "seed=4"
    )
    said["branch"] = start(world, root, "branch", *moved, "branch_from=copy", "seed=4")
    said["grown of another"] = start(world, root, "grown", *moved, f"init_from={root}/other")
    said["grown"] = start(world, root, "grown", *moved, "init_from=copy/")

    shutil.rmtree(root / "elsewhere" / "a")
    write_source(
        root / "elsewhere" / "a" / "train", random_documents(90, seed=9, longest=60), vocab_size=64
    )
    said["other"] = start(world, root, "other", *moved)
    return said


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("moved")
    for name, seed in (("a", 1), ("b", 2)):
        write_source(
            root / name / "train", random_documents(90, seed=seed, longest=60), vocab_size=64
        )
    (root / "run.yaml").write_text(RUN.format(root=root))
    (said,) = run_ranks(moves, 1, folder=str(root))
    return root, said


@pytest.mark.parametrize("name", ["new", "old"])
def test_a_run_goes_on_over_moved_shards_however_their_path_is_spelt(told, name):
    root, said = told
    assert (
        said[f"{name} stops"] == "stopped here"
        and said[name] == ""
        and (root / name / DONE).is_file()
    )
    assert read_jsonl(root / name / LEDGER) == read_jsonl(root / "whole" / LEDGER)
    assert len(list((root / name / CHECKPOINTS).glob("tokens*"))) > 1


def test_other_text_under_the_same_path_is_refused_with_both_hashes(told):
    _, said = told
    assert said["other"].startswith("source a in ") and "has a card of SHA-256" in said["other"]
    assert "this run was trained on" in said["other"] and "\n" not in said["other"]


def test_sources_in_another_order_or_of_another_weight_are_another_run(told):
    _, said = told
    assert (
        "source 0 of this run was a, the run file has b there" in said["swapped"]
        or "sources.0.name was a" in said["swapped"]
    )
    assert "data.sources.0.weight was 1.0, now 2.0" in said["weight"]


def test_a_model_or_a_parent_is_known_by_its_content_and_not_its_path(told):
    root, said = told
    assert said["branch"] == said["grown"] == ""
    assert (
        "branch_from" in said["branch of another"]
        and "is not what this run branched off" in said["branch of another"]
    )
    assert "holds weights of SHA-256" in said["grown of another"]
    assert (root / "branch" / DONE).is_file() and (root / "grown" / DONE).is_file()


def ends(world: World, *, folder: str) -> dict[str, str]:
    """A finished run started again: with its data moved, gone, or of other text; and with other models."""
    root, said = Path(folder), {}
    said["parent"] = start(world, root, "parent")
    for name, settings in (
        ("done", []),
        ("grown", [f"init_from={root}/parent"]),
        ("branch", [f"branch_from={root}/parent", "seed=4"]),
    ):
        said[f"{name} ends"] = start(world, root, name, *settings)
    said["another"] = start(world, root, "another", "seed=5")

    # removed to save room, once the run is exported
    shutil.copytree(root / "done", root / "bare")
    shutil.rmtree(root / "bare" / "checkpoints")
    said["checkpoints gone"] = start(world, root, "bare")
    said["checkpoints gone, other settings"] = start(world, root, "bare", "seed=9")

    other = paths(root / "few" / "train", root / "b" / "train")
    few = root / "few" / "train"
    write_source(few, random_documents(90, seed=9, longest=60), vocab_size=64)
    said["other name"] = start(world, root, "done", *other)
    said["other text"] = start(world, root, "done", *other, "data.sources.0.name=a")
    said["not there"] = start(world, root, "done", *paths(root / "none", root / "b" / "train"))
    said["other weights"] = start(world, root, "grown", f"init_from={root}/another")
    said["other parent"] = start(world, root, "branch", f"branch_from={root}/another", "seed=4")
    (root / "elsewhere").mkdir()
    shutil.move(root / "a", root / "elsewhere" / "a")
    said["gone"] = start(world, root, "done")
    said["gone, named"] = start(world, root, "done", "data.sources.0.name=a")
    said["moved"] = start(
        world, root, "done", *paths(root / "elsewhere/a/train", root / "b" / "train")
    )
    shutil.rmtree(root / "b")
    write_source(root / "b" / "train", random_documents(90, seed=9, longest=60), vocab_size=64)
    said["one gone, one other"] = start(world, root, "done")
    shutil.rmtree(root / "b")
    shutil.rmtree(root / "parent")
    said["all gone"] = start(world, root, "done")
    said["all gone, grown"] = start(world, root, "grown", f"init_from={root}/parent")
    said["all gone, branch"] = start(world, root, "branch", f"branch_from={root}/parent", "seed=4")
    return said


def test_a_finished_run_refuses_other_data_and_models_and_not_that_they_are_gone(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_source(
            tmp_path / name / "train", random_documents(90, seed=seed, longest=60), vocab_size=64
        )
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    (said,) = run_ranks(ends, 1, folder=str(tmp_path))
    refused = {
        "other name": "data.sources.0.name was a, now few",
        "other text": "has a card of SHA-256",
        "one gone, one other": "source b in ",
        "not there": "does not exist",
        "other weights": "init_from ",
        "other parent": "is not what this run branched off",
        "checkpoints gone, other settings": "seed was 3, now 9",
    }
    for name, text in said.items():
        assert refused[name] in text if name in refused else text == "", (name, text)


def restarts(world: World, *, folder: str) -> dict[str, str]:
    """A run recorded before there were some settings: as it goes on, and as it does not."""
    root, said = Path(folder), {}
    old = ["objective.random_tokens=all"]
    said["whole"] = start(world, root, "whole", *old)
    with pytest.MonkeyPatch.context() as patch:
        added = ("random_tokens", "shuffle_shards")
        for writer in (checkpointing, foreign_files):
            patch.setattr(
                writer,
                "to_yaml",
                lambda run: "".join(
                    line
                    for line in to_yaml(run).splitlines(keepends=True)
                    if not any(key in line for key in added)
                ),
            )
        said["stops"] = start(world, root, "before", *old, stop_at=9)
    said["wider"] = start(world, root, "before", "data.shuffle_shards=9")
    said["used"] = start(world, root, "before", "objective.random_tokens=used")
    said["before"] = start(world, root, "before")
    said["new"] = start(world, root, "new")
    return said


def test_a_run_from_before_a_setting_goes_on_with_what_it_meant_then(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_source(
            tmp_path / name / "train", random_documents(90, seed=seed, longest=60), vocab_size=64
        )
        path = tmp_path / name / "train" / "tokenizer.json"
        path.write_text(
            path.read_text().replace('"t9"', '"[unused9]"').replace('"t12"', '"[unused12]"')
        )
        card = json.loads((path.parent / "card.json").read_text())
        (path.parent / "card.json").write_text(
            json.dumps({**card, "tokenizer_sha256": tokenizer_fingerprint(path)})
        )
    (tmp_path / "run.yaml").write_text(RUN.format(root=tmp_path))
    (said,) = run_ranks(restarts, 1, folder=str(tmp_path))
    assert (said["whole"], said["stops"], said["before"], said["new"]) == (
        "",
        "stopped here",
        "",
        "",
    )
    assert (
        "objective.random_tokens was all, now used" in said["used"]
        and "data.shuffle_shards was 8, now 9" in said["wider"]
    )
    before, whole, new = (
        read_jsonl(tmp_path / name / LEDGER) for name in ("before", "whole", "new")
    )
    assert before == whole and new != whole, "the masks of a new run are others"
    assert "random_tokens: all" in (tmp_path / "before" / "run.yaml").read_text()
    assert "random_tokens: used" in (tmp_path / "new" / "run.yaml").read_text()
