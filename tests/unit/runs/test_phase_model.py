"""What a phase changes of the model: its place in a run file, and runs that were saved before it had one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from encoder.base.errors import ConfigError
from encoder.base.schema import to_plain, to_yaml
from encoder.runs.config import changed_settings, read_run, todays_form
from encoder.runs.weights import read_saved_run

TINY = Path(__file__).resolve().parents[2] / "helpers" / "three_phases.yaml"


def old_form(run) -> dict:
    """A resolved run file as versions before 2026-11-29 wrote it: thetas in the phase itself."""
    plain = to_plain(run)
    plain["phases"] = [
        {key: value for key, value in phase.items() if key != "model"} | phase["model"]
        for phase in plain["phases"]
    ]
    return plain


def test_a_phase_that_says_nothing_runs_with_the_models_own_settings():
    run = read_run(TINY, ["model.local_rope_theta=500"])
    assert [p.model["global_rope_theta"] for p in run.phases] == [1e4, 16e4, 16e4]
    assert all(p.model["local_rope_theta"] == 500 for p in run.phases)
    assert run.model_of(run.phases[1]).global_rope_theta == 16e4
    assert "RoPE theta 160,000" in " ".join(
        f"{label} {text}" for label, text in run.model_of(run.phases[1]).phase_texts.items()
    )


def test_the_old_place_of_a_theta_is_refused_with_the_new_key():
    with pytest.raises(ConfigError, match=r"phases\.0\.model: \{global_rope_theta: 160000\}"):
        read_run(TINY, ["phases.0.global_rope_theta=10000"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.0.model.hidden_size=64", "hidden_size is nothing that a phase may change"),
        ("phases.0.model.globl_rope_theta=1e4", "Did you mean global_rope_theta"),
        ("phases.0.model.global_rope_theta=-1", "global_rope_theta is -1.0; needed: more than 0"),
    ],
)
def test_what_a_phase_may_not_change_is_told(override, said):
    with pytest.raises(ConfigError, match=said):
        read_run(TINY, [override])


def test_a_run_that_was_saved_in_the_old_form_is_the_same_run(tmp_path):
    run = read_run(TINY)
    old = old_form(run)
    assert "global_rope_theta" in old["phases"][0] and todays_form(old) == to_plain(run)
    assert changed_settings(old, run) == []
    assert changed_settings(old, read_run(TINY, ["phases.1.model.global_rope_theta=10000"])) == [
        ("phases.1.model.global_rope_theta", 160000.0, 10000.0)
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    assert to_yaml(read_saved_run(tmp_path / "run.yaml")) == to_yaml(run)
