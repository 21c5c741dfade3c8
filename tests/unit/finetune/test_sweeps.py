"""A sweep's points and their names, what is refused before one starts, what is next, what is chosen, and the table."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from encoder.base.errors import CheckpointError, ConfigError
from encoder.base.stopping import StopFlag
from encoder.base.world import World
from encoder.finetune.best import Judge
from encoder.finetune.sweeps import board as board_module
from encoder.finetune.sweeps import results as results_module
from encoder.finetune.sweeps import worker
from encoder.finetune.sweeps.board import Board, Part
from encoder.finetune.sweeps.paired import compare, paired_bootstrap, rows_right
from encoder.finetune.sweeps.points import Setting, Sweep, read_sweeps
from encoder.finetune.sweeps.results import FAILED, Summary, chosen_of, expected_best, results_of
from encoder.finetune.sweeps.table import table_of, write_table
from tests.helpers.tasks import write_rows, write_task

GRID = {"lr.peak": ["1e-5", 3.0e-5], "epochs": [1, 2]}
ACCURACY = Judge(of="dev", metric="accuracy")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A task, and folders that count as done as soon as they have a result."""
    write_task(tmp_path)
    for module in (board_module, results_module):
        monkeypatch.setattr(
            module, "is_done", lambda folder: ((folder / "result.json").is_file(), "")
        )
    return tmp_path


def write_sweep(root: Path, name: str = "sweep", **keys) -> Path:
    path = root / f"{name}.yaml"
    whole = {"base": f"{root}/task.yaml", "out": f"{root}/{name}", "grid": GRID, "seeds": [1, 2]}
    path.write_text(yaml.safe_dump({**whole, **keys}, sort_keys=False))
    return path


def read(root: Path, name: str = "sweep", **keys) -> Sweep:
    return read_sweeps([write_sweep(root, name, **keys)])[-1]


def finish(folder: Path, accuracy: float | None, *, constant: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "sweep.yaml").write_text("")
    (folder / "ledger.jsonl").write_text("")
    numbers = {"dev": {"loss": 0.5, "accuracy": accuracy}}
    result = {"metrics": numbers, "constant_predictions": ["dev"] if constant else []}
    (folder / "result.json").write_text(json.dumps(result))


def finished(board: Board, accuracy=lambda job: 0.5) -> list[str]:
    """Trains all, one after another."""
    names = []
    while (job := board.take()) is not None:
        names.append(job.name)
        finish(job.point.folder, accuracy(job))
        board.ended(job)
    return names


def test_a_point_is_named_by_its_settings_and_its_seed(root):
    names = [point.name for point in read(root).points()]
    assert names[:3] == [
        "lr.peak=1e-05,epochs=1,seed=1",
        "lr.peak=1e-05,epochs=2,seed=1",
        "lr.peak=3e-05,epochs=1,seed=1",
    ]
    assert len(names) == len({*names}) == 8
    task = read(root).task(read(root).points()[2])
    assert (task.lr.peak, task.epochs, task.seed) == (3e-5, 1, 1)
    assert [point.name for point in read(root, grid={}).points()] == ["seed=1", "seed=2"]
    # without seeds it is the task's own
    assert [point.seed for point in read(root, grid={}, seeds=[]).points()] == [5]


def test_a_name_is_safe_short_and_its_own(root):
    values = ["a/b", "a b", "a:b", "ä" * 300, ["x", "y"], {"kind": "z"}]
    names = [Setting(values=(("start_from", value),)).name for value in values]
    assert len({*names}) == len(names)
    for name in names:
        assert re.fullmatch(r"start_from[A-Za-z0-9.=,_+-]{0,100}", name), name


def test_all_mistakes_are_told_before_a_point_starts(root):
    with pytest.raises(ConfigError) as told:
        read(
            root,
            grid={"lr.paek": [1, 2], "epochs": [1, "two", "two"], "seed": [1]},
            seeds=[1, 1],
            confirm_seeds=[1],
            choose={"metric": "acc", "of": "def"},
        )
    for words in (
        "8 mistakes",
        "lr.paek is unknown. Did you mean peak?",
        "epochs is 'two' (text); needed: a whole number.",
        "grid.epochs has two twice",
        "grid.seed is the sweep's own. Instead: list seeds.",
        "seeds has 1 twice",
        "confirm_seeds and seeds both have 1",
        "choose.metric is acc.",
        "choose.of is def, which is none of data.dev. Did you mean dev?",
    ):
        assert words in str(told.value), words


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"gird": {}}, "gird is unknown. Did you mean grid?"),
        ({"grid": {"epochs": []}}, "grid.epochs is empty"),
        ({"grid": {"lr": [1e-5], "lr.peak": [1e-5]}}, "lr.peak, which is a part of it"),
        ({"grid": {"start_from": ["nowhere"]}}, "nowhere"),
        ({"grid": {"data.train": ["none.jsonl"]}}, "none.jsonl does not exist"),
        ({"after": "none.yaml"}, "none.yaml does not exist"),
        # each value alone is right
        (
            {"grid": {"evaluate.keep": ["last"], "evaluate.metric": ["f1"]}},
            "metric has no effect with keep: last",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(root, keys, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        read(root, **keys)


def test_a_folder_of_something_else_or_of_other_settings_is_refused(root):
    sweep = read(root)
    folder = sweep.points()[1].folder
    folder.mkdir(parents=True)
    (root / "sweep" / "sweep.yaml").write_text("")
    (folder / "run.yaml").write_text((root / "task.yaml").read_text())
    (folder / "ledger.jsonl").write_text("")
    with pytest.raises(ConfigError, match="epochs=2,seed=1 was trained with other settings: "):
        read(root)
    (root / "sweep" / "sweep.yaml").unlink()
    with pytest.raises(ConfigError, match="holds files, and no sweep"):
        read(root)


def test_points_are_trained_once_and_fresh_seeds_follow_the_choice(root):
    sweep = read(root, confirm_seeds=[8, 9])
    board = Board([sweep])
    best = "lr.peak=3e-05,epochs=1"
    names = finished(board, lambda job: 0.9 if job.point.setting.name == best else 0.6)
    assert len(names) == 10 and board.chosen(sweep).name == best
    assert names[8:] == [f"sweep: {best},seed=8", f"sweep: {best},seed=9"]
    assert not board.waits and Board([sweep]).take() is None


def test_a_killed_sweep_goes_on_where_it_stood(root):
    sweep = read(root)
    board = Board([sweep])
    first = [board.take() for _ in range(3)]
    assert board.waits and len({job.name for job in first}) == 3
    finish(first[1].point.folder, 0.5)
    again = finished(Board([sweep]))
    assert first[1].name not in again and len(again) == 7


def test_a_failed_point_is_not_chosen_and_the_others_go_on(root):
    sweep = read(root, confirm_seeds=[8])
    board = Board([sweep])
    while (job := board.take()) is not None:
        # the best of all, but one of its seeds fails
        if job.point.name == "lr.peak=1e-05,epochs=1,seed=2":
            board.ended(job, failure="of memory, perhaps")
            continue
        finish(
            job.point.folder, 0.9 if job.point.setting.name.startswith("lr.peak=1e-05,ep") else 0.5
        )
        board.ended(job)
    assert board.chosen(sweep).name == "lr.peak=1e-05,epochs=2"
    failed = root / "sweep" / "lr.peak=1e-05,epochs=1,seed=2"
    assert (failed / FAILED).read_text() == "of memory, perhaps\n" and len(board.done) == 8
    table = table_of(sweep)
    assert (table.results[0].failed, len(table.results[0].done)) == (1, 1)
    # the next start tries it again
    assert Board([sweep]).take().point.folder == failed


def test_parts_share_the_points_and_none_is_trained_twice(root):
    sweep = read(root, confirm_seeds=[7, 8, 9])
    names = []
    for index in range(3):
        names += finished(Board([sweep], part=Part(index=index, count=3)))
    # the last part knows the choice, and confirms its share
    choice = [name for name in names if name.endswith(("seed=1", "seed=2"))]
    assert len(choice) == len({*choice}) == 8
    for index in range(3):
        names += finished(Board([sweep], part=Part(index=index, count=3)))
    assert len(names) == len({*names}) == 11


def test_points_come_after_the_point_of_their_seed_that_they_start_from(root):
    mnli = write_sweep(root, "mnli", grid={}, seeds=[1, 2])
    rte = write_sweep(root, "rte", grid={"epochs": [1, 2]}, seeds=[1, 2], after=str(mnli))
    sweeps = read_sweeps([rte, mnli])
    assert [sweep.name for sweep in sweeps] == ["mnli", "rte"]
    board = Board(sweeps)
    first, second = board.take(), board.take()
    assert [job.name for job in (first, second)] == ["mnli: seed=1", "mnli: seed=2"]
    assert board.take() is None and board.waits
    finish(first.point.folder, 0.7)
    board.ended(first)
    third = board.take()
    assert third.name == "rte: epochs=1,seed=1" and third.start_from == f"{root}/mnli/seed=1"
    assert f'start_from="{root}/mnli/seed=1"' in third.sweep.overrides(
        third.point, start_from=third.start_from
    )
    # without its start a point cannot be trained
    board.ended(second, failure="it broke")
    finish(third.point.folder, 0.7)
    board.ended(third)
    assert finished(board) == ["rte: epochs=2,seed=1"]
    assert board.failed[root / "rte" / "epochs=1,seed=2"].startswith("not trained: ")
    assert len(board.failed) == 3 and not board.waits


def test_a_start_from_a_grid_is_its_chosen_point_and_a_part_trains_what_it_needs(root):
    mnli = write_sweep(root, "mnli", grid={"epochs": [1, 2]}, seeds=[1, 2])
    rte = write_sweep(root, "rte", grid={}, seeds=[1, 2], after=str(mnli))
    sweeps = read_sweeps([rte])
    starts = {}
    board = Board(sweeps, part=Part(index=0, count=2))
    while (job := board.take()) is not None:
        starts[job.name] = job.start_from
        finish(job.point.folder, 0.8 if "epochs=2" in job.name else 0.6)
        board.ended(job)
    # two points of mnli are another part's, but the choice needs them
    assert len(starts) == 5 and starts["rte: seed=1"] == f"{root}/mnli/epochs=2,seed=1"
    with pytest.raises(ConfigError, match="seed 3 is none of .*mnli.yaml: 1, 2"):
        read(root, "rte", grid={}, seeds=[1, 3], after=str(mnli))
    with pytest.raises(ConfigError, match="comes after itself"):
        read(root, "mnli", after=str(mnli))


def test_the_choice_is_by_mean_or_median_and_the_earlier_of_equals(root):
    values = {"epochs=1": [0.5, 0.9, 0.7], "epochs=2": [0.8, 0.8, 0.1], "epochs=3": [0.7, 0.7, 0.7]}
    chosen = {}
    for by in ("mean", "median"):
        sweep = read(
            root, grid={"epochs": [1, 2, 3]}, seeds=[1, 2, 3], choose={"by": by, "of": "dev"}
        )
        for point in sweep.points():
            finish(point.folder, values[point.setting.name][point.seed - 1])
        chosen[by] = chosen_of(sweep, results_of(sweep)).name
    assert chosen == {"mean": "epochs=1", "median": "epochs=2"}
    lower = read(root, grid={"epochs": [1, 2, 3]}, seeds=[1, 2, 3], choose={"metric": "loss"})
    assert chosen_of(lower, results_of(lower)).name == "epochs=1"


def test_the_table_is_numpys(root):
    sweep = read(root, grid={"epochs": [1, 2]}, seeds=[1, 2, 3], confirm_seeds=[7])
    values = {"epochs=1": [0.61, 0.72, 0.55], "epochs=2": [0.8, 0.81, None]}
    for point in sweep.points():
        value = values[point.setting.name][point.seed - 1]
        finish(point.folder, value, constant=point.seed == 3)
    finish(root / "sweep" / "epochs=1,seed=7", 0.6)
    write_table(table_of(sweep))
    table = json.loads((root / "sweep" / "table.json").read_text())
    first = np.array(values["epochs=1"])
    assert table["settings"][0]["numbers"]["dev"]["accuracy"] == {
        "n": 3,
        "mean": pytest.approx(first.mean()),
        "std": pytest.approx(first.std(ddof=1)),
        "median": pytest.approx(np.median(first)),
        "least": 0.55,
        "most": 0.72,
    }
    # a point without a number cannot be part of a mean, so its setting is not chosen
    assert table["settings"][1]["numbers"]["dev"]["accuracy"]["n"] == 2
    assert table["chosen"] == "epochs=1" and table["settings"][2]["seeds"] == "fresh"
    assert [s["collapsed"] for s in table["settings"]] == [1, 1, 0]
    text = (root / "sweep" / "table.md").read_text()
    assert "| epochs=1 * | 3 | 0.6267 | 0.0862 | 0.6100 | 0.5500 | 0.7200 | 0 | 1 | 0 |" in text
    lines = (root / "sweep" / "table.csv").read_text().splitlines()
    assert lines[0].startswith("setting,seeds,set,metric,n,mean,std") and len(lines) == 7


def test_the_expected_best_is_the_mean_of_all_draws():
    """Dodge et al. 2019: of n draws with replacement, counted out."""
    values = [0.3, 0.9, 0.5, 0.6]
    for runs in (1, 2, 3):
        draws = list(itertools.product(values, repeat=runs))
        assert expected_best(values, runs, judge=ACCURACY) == pytest.approx(
            np.mean([max(draw) for draw in draws])
        )
        loss = Judge(of="dev", metric="loss")
        assert expected_best(values, runs, judge=loss) == pytest.approx(
            np.mean([min(draw) for draw in draws])
        )
    assert Summary.of([]) is None and Summary.of([0.5]).std is None


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ConfigError("a wrong word."), False),
        (RuntimeError("CUDA error"), True),
        (KeyError(1), True),
    ],
)
def test_after_a_mistake_a_process_goes_on_and_after_a_defect_it_ends(
    root, monkeypatch, capsys, error, ends
):
    def fails(*_args, **_settings):
        print("what a library says")
        raise error

    monkeypatch.setattr(worker, "finetune", fails)
    order = {"folder": f"{root}/point", "base": f"{root}/task.yaml", "overrides": []}
    # pytest's own standard output is no file that a process has
    with capsys.disabled():
        answer = worker._train(order, World(), StopFlag(), began=0.0, last=worker.LastRows())
    assert (answer["ended"], answer["ends"]) == ("failed", ends)
    log = (root / "point" / worker.LOG).read_text()
    assert "what a library says" in log and ("Traceback" in log) == ends


@pytest.mark.parametrize("content", ["{}", '{"metrics": 3}', '{"metrics": {"dev": 0.5}}'])
def test_a_result_of_something_else_is_told_in_a_line(root, content):
    sweep = read(root, grid={}, seeds=[1])
    (point,) = sweep.points()
    finish(point.folder, 0.5)
    (point.folder / "result.json").write_text(content)
    with pytest.raises(CheckpointError, match="result.json has no metrics by data set"):
        results_of(sweep)


def test_the_paired_bootstrap_is_scipys(root):
    from scipy.stats import bootstrap

    draw = np.random.default_rng(3)
    ours, theirs = (draw.random(200) < share for share in (0.85, 0.8))
    found = paired_bootstrap(ours.astype(float), theirs.astype(float))
    expected = bootstrap(
        (ours.astype(float), theirs.astype(float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    # two draws of 10,000: the ends differ by one row of 200 at most
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.005)
    assert found.ours - found.theirs == pytest.approx(ours.mean() - theirs.mean())
    same = paired_bootstrap(ours.astype(float), ours.astype(float))
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert paired_bootstrap(np.ones(50), np.zeros(50)).p == 0.0


def test_two_sweeps_are_compared_row_by_row_over_their_seeds(root):
    tables = []
    for name, right in (("a", [[1, 1, 0], [1, 0, 0]]), ("b", [[0, 1, 0], [0, 1, 0]])):
        sweep = read(root, name, grid={}, seeds=[1, 2])
        for point, rows in zip(sweep.points(), right, strict=True):
            finish(point.folder, 0.5)
            (point.folder / "predictions").mkdir()
            lines = [{"label": "ba"[is_right], "target": "a"} for is_right in rows]
            write_rows(point.folder / "predictions" / "dev.jsonl", lines)
        tables.append(table_of(sweep))
    found = compare(*tables, of="dev")
    assert (found.rows, found.ours, found.theirs) == (3, pytest.approx(0.5), pytest.approx(1 / 3))
    with pytest.raises(ConfigError, match="more.jsonl is not there. Known sets: dev."):
        compare(*tables, of="more")
    assert rows_right([{"value": 1.5, "target": 1.0}]).tolist() == [-0.25]
    assert rows_right([{"labels": ["x"], "target": ["x"]}]).tolist() == [1.0]
    # of an answer the F1 of SQuAD's script: 2 of 3 words are right, 2 of 2 were found; of tags the share
    assert rows_right([{"answer": "a Denver Broncos team", "target": ["Denver Broncos", "x"]}]) == (
        pytest.approx(0.8)
    )
    assert rows_right([{"answer": "", "target": []}]).tolist() == [1.0]
    tagged = {"tags": ["O", "B-X", "O"], "target": ["O", "B-X", "B-X"]}
    assert rows_right([tagged]).tolist() == pytest.approx([2 / 3])
    with pytest.raises(ConfigError, match="predictions have row; needed: one of label, labels"):
        rows_right([{"row": 0}])
