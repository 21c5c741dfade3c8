"""What families cost: each part of a step is told apart, forward and backward, and the table has what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.families import cost
from benchmarks.families.shares import seconds_by_part, shares_of
from encoder.base.errors import ConfigError
from encoder.models.catalog import build_model
from tests.helpers.xlnet import TINY, batch_of, objective_of


def test_every_part_of_a_step_of_xlnet_is_seen_and_all_are_one():
    model = build_model(TINY, seed=0)
    objective = objective_of()
    batch = batch_of(objective, [40, 24])
    found = shares_of(model, lambda: objective.loss(model, batch)["plm"].total.backward())
    assert found.keys() == {"matrices", "attention", "embedding", "loss", "order", "other"}
    assert sum(found.values()) == pytest.approx(1.0) and min(found.values()) > 0.0
    # what said in which part it is says it no more
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_backward_pass_counts_for_the_part_of_its_forward():
    class Event:
        cpu_parent = None
        sequence_nr = -1

        def __init__(self, name: str, microseconds: float, **more) -> None:
            self.name, self.self_cpu_time_total = name, microseconds
            vars(self).update(more)

    whole = Event("part: other", 1e6)
    attention = Event("part: attention", 2e6, cpu_parent=whole)
    forward = Event("aten::bmm", 3e6, cpu_parent=attention, sequence_nr=7)
    around = Event(
        "autograd::engine::evaluate_function: BmmBackward0", 4e6, cpu_parent=whole, sequence_nr=7
    )
    backward = Event("aten::bmm", 5e6, cpu_parent=around)
    step = Event("Optimizer.step#AdamW.step", 6e6, cpu_parent=whole)
    found = seconds_by_part([whole, attention, forward, around, backward, step])
    assert found == pytest.approx({"other": 1.0, "attention": 14.0, "optimizer": 6.0})


FIGURES = {
    "tokens_per_cpu_second": 5000.0,
    "parameters": 1234567,
    "shares": {"matrices": 0.75, "data": 0.25},
}
FOUND = {
    "sides": {
        "bert_mlm": FIGURES,
        "xlnet": {
            **FIGURES,
            "ratio": [0.4, 0.5, 0.6],
            "cpu_ratio": 0.55,
            "shares": {"attention": 1.0},
        },
    }
}


def test_the_table_stands_between_its_marks_and_is_written_again(tmp_path, monkeypatch, capsys):
    page, file = tmp_path / "page.md", tmp_path / "cost.json"
    page.write_text(f"before\n{cost.BEGIN}\nold\n{cost.END}\nbehind\n")
    file.write_text(json.dumps(FOUND))
    monkeypatch.setattr(cost, "PAGE", page)
    monkeypatch.setattr(cost, "RESULT", file)
    for _ in range(2):
        assert cost.main(["--draw", "--json", str(file)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nbehind\n") and "old" not in text
    assert "| XLNet | 1,234,567 | 5,000 | 0.55 | 0.50 (0.40 to 0.60) |" in text
    assert "| BERT, masks alone | 1,234,567 | 5,000 | 1 | 1 |" in text
    assert "| share of CPU time | matrices | attention | data |" in text
    page.write_text("nothing")
    assert cost.main(["--draw", "--json", str(file)]) == 2
    assert "has no line <!-- cost" in capsys.readouterr().err


def test_a_family_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="gpt is no family here; needed: one of bert_mlm, bert"):
        cost.compare(cost._with_references(["gpt"]), rounds=1)
    assert cost._with_references(["modernbert_rtd"]) == ["modernbert_mlm", "modernbert_rtd"]


@pytest.mark.parametrize("name", cost.SIDES)
def test_all_sides_have_one_body(name):
    model = cost._run_of(cost.SIDES[name]).model
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (4, 256, 4)
    assert model.intermediate_size == 1024
