"""What is made of a run's checkpoints: branches, which go on with its weights and optimizer state, and means of weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from encoder.base.dist import World
from encoder.base.errors import CheckpointError, ConfigError, LedgerError, ModelError
from encoder.base.units import Progress
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress, read_weights
from encoder.engine.checkpoint.tensors import StretchReader
from encoder.engine.engine import Engine
from encoder.models.stored import read_stored
from encoder.runs.branch import find_parent
from encoder.runs.config import read_run
from encoder.runs.facts import check_data
from encoder.runs.folder import LEDGER, read_jsonl
from encoder.runs.ledger import follow_chain
from encoder.tools.plan.plan import plan_text
from encoder.tools.report.report import verify_ledger
from encoder.train.pretraining import Pretraining, pretrain
from encoder.train.start import start_run
from launch import average
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks
from tests.process.test_one_curve import RUN
from tests.process.tiny import counts_of, share_of_step

BRANCH = [
    "seed=4",
    (
        "phases=[{name: decay, tokens: 2K, max_tokens_per_document: 64, batch_tokens: 448, "
        "model: {global_rope_theta: 160000}, "
        "lr: {schedule: one_minus_sqrt, peak: 5e-3}}]"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """parent: two phases on one rank; again: cut back to the end of its first; branches of that checkpoint on 2 ranks."""
    root = tmp_path_factory.mktemp("branch")
    for name, seed in (("a", 1), ("b", 2), ("held", 3)):
        write_source(root / name, random_documents(60, seed=seed, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root))
    run_ranks(parent, 1, folder=str(root))
    run_ranks(branches, 2, folder=str(root))
    return root


def end_of_first_phase(run: Path) -> Path:
    return next(
        p.parent for p in (run / "checkpoints").glob("*/MILESTONE") if p.read_text() == "short"
    )


def parent(world: World, *, folder: str) -> None:
    root = Path(folder)
    pretrain(read_run(root / "run.yaml", [f"out={root}/parent"]), world)
    shutil.copytree(root / "parent", root / "again")
    (root / "again" / "done.json").unlink()
    kept = end_of_first_phase(root / "again")
    for path in (root / "again" / "checkpoints").iterdir():
        if path != kept:
            shutil.rmtree(path)
    first_step(world, root=root, name="again")


def branches(world: World, *, folder: str) -> None:
    """Its first step at two stages, weights alone for comparison, and the whole of one, cut off and resumed."""
    root = Path(folder)
    checkpoint = end_of_first_phase(root / "parent")
    for stage in (1, 3):
        first_step(
            world,
            root=root,
            name=f"stage{stage}",
            settings=[*BRANCH, f"branch_from={checkpoint}", f"engine.zero_stage={stage}"],
        )
    first_step(
        world, root=root, name="weights_alone", settings=[*BRANCH, f"init_from={checkpoint}"]
    )
    whole = read_run(
        root / "run.yaml",
        [f"out={root}/whole", *BRANCH, f"branch_from={checkpoint}", "checkpoints.every_tokens=448"],
    )
    pretrain(whole, world)
    if world.first:
        (root / "whole" / "done.json").unlink()
        for path in sorted((root / "whole" / "checkpoints").iterdir())[1:]:
            shutil.rmtree(path)
        (root / "whole" / LEDGER).rename(root / "before.jsonl")
        shutil.copy(root / "before.jsonl", root / "whole" / LEDGER)
    torch.distributed.barrier()
    pretrain(whole, world)


def first_step(world: World, *, root: Path, name: str, settings: list[str] = ()) -> None:
    """Starts a run, writes the state it starts with and the state after one step on fixed batches."""
    from encoder.runs.initial import read_initial

    run = read_run(root / "run.yaml", [f"out={root}/{name}", *settings])
    facts = check_data(run)
    initial = read_initial(run, facts, hashed=False) if run.init_from else None
    device = torch.device("cpu")
    course = Pretraining(run, facts, world=world, device=device, initial=initial)
    with contextlib.ExitStack() as held:
        started = start_run(course, world, device, held)
    engine = started.engine
    write_state(engine, root / f"{name}_before")
    batches = share_of_step(1, rank=world.rank, world_size=world.size, micro_batch_rows=2)
    engine.step(batches, counts=counts_of(1), lr=5e-3, max_lr=5e-3)
    write_state(engine, root / f"{name}_after")
    if world.first:
        (root / f"{name}.json").write_text(
            json.dumps(
                {
                    "optimizer_steps": engine.optimizer_steps,
                    "progress": (
                        started.progress == Progress(ledger_hash=started.progress.ledger_hash)
                    ),
                    "ledger_hash": started.progress.ledger_hash,
                    "parent": course.origin().get("parent"),
                }
            )
        )


def write_state(engine: Engine, folder: Path) -> None:
    """As a checkpoint has it, nothing else."""
    folder.mkdir(exist_ok=True)
    save_file(
        {
            f"{piece.name}@{piece.start}/{kind}": tensor.clone()
            for piece in engine.owned_pieces()
            for kind, tensor in piece.tensors.items()
        },
        folder / f"rank{engine.world.rank:05d}.safetensors",
    )


def state(folder: Path, *, like: Path) -> dict[str, torch.Tensor]:
    """Everything in rank files, by name and kind, as one vector each."""
    shapes = json.loads((like / "state.json").read_text())["shapes"]
    found = {}
    with StretchReader(folder) as reader:
        for name, shape in shapes.items():
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                found[f"{name} {kind}"] = torch.empty(int(torch.Size(shape).numel()))
                reader.copy_into(found[f"{name} {kind}"], name=name, start=0, kind=kind)
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_branch_starts_with_the_parents_weights_and_moments_to_the_last_bit_on_a_clock_of_its_own(
    folder, stage
):
    checkpoint = end_of_first_phase(folder / "parent")
    saved, found = (
        state(f, like=checkpoint) for f in (checkpoint, folder / f"stage{stage}_before")
    )
    assert all(torch.equal(saved[key], found[key]) for key in saved) and any(
        "exp_avg" in key for key in saved
    )
    facts = json.loads((folder / f"stage{stage}.json").read_text())
    progress = read_progress(checkpoint)[0]
    assert facts["progress"] and facts["ledger_hash"] == progress.ledger_hash
    assert facts["optimizer_steps"] == progress.step + 1
    assert facts["parent"] == {
        "run": "t",
        "checkpoint": str(checkpoint),
        "step": progress.step,
        "tokens": progress.tokens,
        "ledger_hash": progress.ledger_hash,
        "seeds": [3],
    }


def test_its_first_step_is_that_of_the_run_going_on_and_not_that_of_the_weights_alone(folder):
    checkpoint = end_of_first_phase(folder / "parent")
    went_on, alone = (
        state(folder / f"{name}_after", like=checkpoint) for name in ("again", "weights_alone")
    )
    for stage in (1, 3):
        found = state(folder / f"stage{stage}_after", like=checkpoint)
        assert all(
            torch.allclose(found[key], went_on[key], rtol=1e-5, atol=1e-7) for key in went_on
        )
    moved = max(
        float((alone[key] - went_on[key]).abs().max()) for key in went_on if key.endswith("master")
    )
    assert moved > 1e-3


def test_a_branch_says_where_it_comes_from_and_resumes_like_any_run(folder):
    run, checkpoint = folder / "whole", end_of_first_phase(folder / "parent")
    head, *steps = read_jsonl(run / LEDGER)
    assert (
        head["parent"]["checkpoint"] == str(checkpoint)
        and head["chain"] == read_progress(checkpoint)[0].ledger_hash
    )
    assert steps[0]["step"] == 1 and steps[0]["phase"] == "decay" and (run / "done.json").exists()
    assert read_jsonl(folder / "before.jsonl") == [head, *steps] and verify_ledger(run) == len(
        steps
    )
    with pytest.raises(LedgerError, match="chain breaks at step 1"):
        follow_chain(steps, run / LEDGER)
    events = [e for e in read_jsonl(run / "events.jsonl") if e["event"] in ("start", "resume")]
    assert [(e["event"], e["parent"]) for e in events] == [
        ("start", head["parent"]),
        ("resume", head["parent"]),
    ]
    assert read_progress(newest_checkpoint(run / "checkpoints"))[1]["parent"] == head["parent"]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (
            ["seed=3"],
            ConfigError,
            "seed 3 is that of a run which this one branches off: .* for example 4",
        ),
        (
            ["model.hidden_size=128"],
            ModelError,
            "branch_from .* has another shape: hidden_size 64 there, 128 in the run",
        ),
        (
            ["model.vocab_size=128"],
            ModelError,
            "branch_from .* has another shape: vocab_size 64 there, 128 in the run",
        ),
        (
            ["optimizer.name=adamw"],
            ConfigError,
            "has the state of StableAdamW, the run's optimizer is AdamW",
        ),
        (
            ["branch_from=nowhere"],
            CheckpointError,
            "branch_from nowhere does not exist; needed: a run folder or one of",
        ),
        (
            ["branch_from={root}/a"],
            CheckpointError,
            "branch_from .*/a is no checkpoint and no run folder; .* Weights alone: init_from",
        ),
    ],
)
def test_what_a_run_cannot_branch_off_is_refused_in_one_line(folder, settings, error, said):
    run = read_run(
        folder / "run.yaml",
        [*BRANCH, f"branch_from={folder}/parent", *(s.format(root=folder) for s in settings)],
    )
    with pytest.raises(error, match=said):
        find_parent(run, World())


def test_a_branch_of_a_branch_takes_neither_seed_and_a_plan_says_what_it_branches_off(folder):
    run = read_run(folder / "run.yaml", [*BRANCH, f"branch_from={folder}/whole", "seed=5"])
    assert find_parent(run, World()).seeds == (4, 3)
    with pytest.raises(ConfigError, match="seed 3 is that of .* for example 5"):
        find_parent(
            read_run(folder / "run.yaml", [*BRANCH, f"branch_from={folder}/whole", "seed=3"]),
            World(),
        )
    assert "branched off run t, checkpoint tokens" in plan_text(run, ranks=1)
    with pytest.raises(ConfigError, match="init_from and branch_from both"):
        read_run(
            folder / "run.yaml", [f"branch_from={folder}/parent", f"init_from={folder}/parent"]
        )


def test_the_mean_of_checkpoints_is_the_mean_by_hand_and_a_model_like_any_other(folder, capsys):
    saved = [
        p
        for p in sorted((folder / "whole" / "checkpoints").iterdir())
        if not p.name.startswith(".")
    ]
    assert len(saved) >= 3
    assert average.main([*map(str, saved), "--out", str(folder / "mean")]) == 0
    assert f"mean of {len(saved)} checkpoints: run t, checkpoint tokens" in capsys.readouterr().out
    mean, parts = read_stored(folder / "mean"), [read_weights(path) for path in saved]
    for name, value in mean.weights.items():
        by_hand = sum(p[name].double() for p in parts) / len(parts)
        assert torch.equal(value, by_hand.float()), name
    assert (
        mean.config.global_rope_theta == 160000
        and mean.max_tokens == 64
        and mean.tokenizer_json is not None
    )


def test_one_checkpoint_and_a_run_folder_become_a_weights_folder_of_their_own(folder, capsys):
    last = newest_checkpoint(folder / "parent" / "checkpoints")
    for source, out in ((last, "one"), (folder / "parent", "newest")):
        assert average.main([str(source), "--out", str(folder / out)]) == 0
        assert f"run t, checkpoint {last.name}" in capsys.readouterr().out
        found = read_stored(folder / out).weights
        assert all(torch.equal(found[n], w) for n, w in read_weights(last).items())


def test_checkpoints_that_have_no_mean_are_refused_in_one_line(folder, capsys):
    first, last = (
        end_of_first_phase(folder / "parent"),
        newest_checkpoint(folder / "parent" / "checkpoints"),
    )
    moved = shutil.copytree(folder / "parent", folder / "other_words") / "checkpoints" / last.name
    tokenizer = folder / "other_words" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("t7", "u7"))
    torn = shutil.copytree(folder / "parent", folder / "torn") / "checkpoints" / last.name
    next(torn.glob("rank*")).write_bytes(b"")
    for sources, said in [
        ([first, last], "global_rope_theta 160000.0"),
        ([last, moved], "another tokenizer.json"),
        ([last, last], "a mean of 2 checkpoints, 1 different"),
        ([last, folder / "parent"], "a mean of 2 checkpoints, 1 different"),
        ([last, folder / "nowhere"], "does not exist"),
        ([last, torn], "has 0 bytes"),
    ]:
        assert average.main([*map(str, sources), "--out", str(folder / "none")]) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and said in line and "\n" not in line, line
    assert not (folder / "none").exists()
