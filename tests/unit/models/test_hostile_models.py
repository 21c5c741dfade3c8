"""Weights, configs and checkpoints made to harm: nothing executed, nothing outside the folder, no wait, no gigabytes."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from encoder.base.errors import CheckpointError, ModelError, UserError
from encoder.engine.checkpoint.folder import (
    claim_next,
    committed_folders,
    damage,
    newest_incarnation,
)
from encoder.engine.checkpoint.read import read_progress, read_weights
from encoder.engine.checkpoint.tensors import StretchReader
from encoder.models.hf.read import load_tensors, named_tensors, read_hf
from encoder.models.stored import read_safetensors


@pytest.fixture(autouse=True)
def no_gigabytes():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def said(kind: type[UserError], ask, *words) -> str:
    with pytest.raises(kind) as caught:
        ask(*words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


def hf_folder(folder: Path, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "modernbert", **config}))
    return folder


def test_a_fifo_in_place_of_weights_or_a_config_is_not_waited_for(tmp_path):
    for name in ("a.pt", "model.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    assert "it is a fifo" in said(ModelError, load_tensors, tmp_path / "a.pt")
    assert "it is a fifo" in said(ModelError, read_safetensors, tmp_path / "model.safetensors")
    assert "no config.json" in said(ModelError, read_hf, tmp_path)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "rank00000.safetensors")
    assert "it is a fifo" in said(CheckpointError, StretchReader(checkpoint).__enter__)


def test_tensors_without_their_values_are_refused_before_they_are_made(tmp_path):
    """On the meta device; and a few bytes repeated over terabytes."""
    for tensor in (
        torch.empty(10, device="meta"),
        torch.zeros(1).expand(10**6, 10**6),
        torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    ):
        torch.save({"w": tensor}, tmp_path / "a.pt")
        assert "without all of its values" in said(
            ModelError, lambda: named_tensors(load_tensors(tmp_path / "a.pt"), where="a.pt")
        )


def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/pwned",)

    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": Evil()}))
    said(ModelError, load_tensors, tmp_path / "a.pt")
    torch.save({"w": Evil()}, tmp_path / "b.pt")
    said(ModelError, load_tensors, tmp_path / "b.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["../victim.safetensors", "/etc/passwd", "", "a/b.safetensors", 7, None, ["x"]]
)
def test_names_in_the_index_of_weights_stay_in_the_folder(tmp_path, name):
    save_file({"w": torch.zeros(2)}, tmp_path / "victim.safetensors")
    folder = hf_folder(tmp_path / "hf", vocab_size=64, hidden_size=32, num_attention_heads=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert "model.safetensors.index.json names the file" in said(ModelError, read_hf, folder)
    (folder / "link.safetensors").symlink_to(tmp_path / "victim.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "link.safetensors"}})
    )
    assert "symbolic link that leaves its folder" in said(ModelError, read_hf, folder)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**18},
        {"hidden_size": 2**40},
        {"num_hidden_layers": 10**200},
        {"norm_eps": float("nan")},
        {"hidden_size": "x"},
        {"layer_types": [[[]]]},
        {"local_attention": 10**30},
    ],
)
def test_a_config_beyond_any_measure_is_refused_at_once(tmp_path, config):
    folder = hf_folder(tmp_path / "hf", **config)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    assert "config.json" in said(ModelError, read_hf, folder)
    (folder / "config.json").write_text("[" * 30_000)
    assert "levels deep" in said(ModelError, read_hf, folder)


def checkpoint(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
    return folder


def test_names_in_a_manifest_stay_in_the_checkpoint(tmp_path):
    from encoder.base.files import sha256_of

    (tmp_path / "secret").write_text("precious")
    for name in ("../secret", "/etc/passwd", "", "a/b", "run\0"):
        folder = tmp_path / f"c{len(name)}{ord(name[0]) if name else 0}"
        checkpoint(folder, MANIFEST={name: {"bytes": 8, "sha256": sha256_of(tmp_path / "secret")}})
        (folder / "COMMITTED").write_text(sha256_of(folder / "MANIFEST.json"))
        assert "names the file" in damage(folder)
        (folder / "MANIFEST.json").write_text("[" * 30_000)
        (folder / "COMMITTED").write_text(sha256_of(folder / "MANIFEST.json"))
        assert "levels deep" in damage(folder)
    (folder / "MANIFEST.json").write_text("{}")
    (folder / "COMMITTED").write_text(sha256_of(folder / "MANIFEST.json"))
    assert damage(folder) is None
    save_file({"w@0/master": torch.zeros(2)}, folder / "rank00000.safetensors")
    assert "rank00000.safetensors is not in MANIFEST.json" in damage(folder)


@pytest.mark.parametrize(
    "key, tensor",
    [
        ("w", torch.zeros(2)),
        ("w@x/master", torch.zeros(2)),
        (f"w@{10**30}/master", torch.zeros(2)),
        ("w@0/master", torch.zeros(2, 2)),
        ("w@0/master", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_slices_of_a_strange_name_shape_or_dtype_are_refused(tmp_path, key, tensor):
    folder = checkpoint(
        tmp_path / "c", state={"format": 1, "optimizer_steps": 1, "shapes": {"w": [2]}}
    )
    save_file({key: tensor}, folder / "rank00000.safetensors")
    assert "needed: slices of parameters" in said(CheckpointError, read_weights, folder)


def test_shapes_that_no_file_holds_take_no_memory(tmp_path):
    folder = checkpoint(
        tmp_path / "c", state={"format": 1, "optimizer_steps": 1, "shapes": {"w": [2**39, 2**39]}}
    )
    save_file({"w@0/master": torch.zeros(2)}, folder / "rank00000.safetensors")
    assert "holds 2 of" in said(CheckpointError, read_weights, folder)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"format": 1},
        {"format": 1, "optimizer_steps": -1, "shapes": {}},
        [],
        {"format": 1, "optimizer_steps": 1, "shapes": {"w": "x"}},
        {"format": [1]},
    ],
)
def test_a_state_or_progress_of_strange_values_is_one_sentence(tmp_path, state):
    folder = checkpoint(tmp_path / "c", state=state, progress=state)
    said(CheckpointError, read_weights, folder)
    said(CheckpointError, read_progress, folder)


def test_numbers_in_names_on_disk_are_parsed_with_bounds(tmp_path):
    """Incarnations and checkpoints of numbers that nobody counted to, and digits of other scripts."""
    (tmp_path / "incarnations").mkdir()
    for name in ("9" * 200, "0003", "\u0661\u0662", "7x", "1e5"):
        (tmp_path / "incarnations" / name).write_text("")
    for name in (
        "tokens" + "9" * 100 + "-i0001",
        "tokens0000000000010-i" + "9" * 100,
        "tokens\u06610000000000010-i0001",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMMITTED").write_text("")
    assert newest_incarnation(tmp_path) == 3 and claim_next(tmp_path) == 4
    assert committed_folders(tmp_path / "checkpoints") == []
