"""Names of the hub are fetched where there is a network, told the way where there is none, and give way to folders here."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from data_prep.tokenization import check_tokenizer_path
from encoder.base.dist import World
from encoder.base.errors import ConfigError, ModelError
from encoder.base.hub import _wanted, parse_hub_name, reason_in_short
from encoder.models.stored import read_stored
from encoder.runs.weights import model_facts, read_model
from launch import import_hf
from tests.helpers.hf import exported, stored, write_tokenizer_json
from tests.process.ranks import run_ranks

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("answerdotai/ModernBERT-base", ("answerdotai/ModernBERT-base", None)),
        ("answerdotai/ModernBERT-base@main", ("answerdotai/ModernBERT-base", "main")),
        ("hf://answerdotai/ModernBERT-base@v1.0", ("answerdotai/ModernBERT-base", "v1.0")),
        ("hf:/a/b", ("a/b", None)),  # as a Path spells it
        ("hf://here/model", ("here/model", None)),  # said to be of the hub
        ("here/model", None),  # a folder of that name
        ("here/other", None),  # a path into a folder that is here
        ("corpus/tokenizer.json", None),  # where our documents put things
        ("weights/wider", None),
        ("org/tokenizer.json", None),  # a file
        ("a/b/c", None),
        ("/a/b", None),
        ("../a", None),
        ("~/a", None),
        ("a", None),
        ("a/..", None),
        ("a/b@../c", None),
        ("a/b\0", None),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(tmp_path, monkeypatch, text, found):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    name = parse_hub_name(text)
    assert (name and (name.id, name.revision)) == found


def test_without_a_network_the_error_names_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    way = "hf download nobody/nothing --revision v1 --local-dir nothing"
    for ask in (read_model, model_facts):
        with pytest.raises(ModelError, match=f"no file or folder here.*cannot be asked.*{way}"):
            ask(Path("nobody/nothing@v1"))
    with pytest.raises(ConfigError, match="hf download nobody/nothing --local-dir nothing"):
        check_tokenizer_path(Path("nobody/nothing"))
    assert import_hf.main(["nobody/nothing@v1", "out"]) == 2
    said = capsys.readouterr().err
    assert way in said and "Traceback" not in said and not Path("out").exists()


def test_why_the_hub_gave_nothing_is_said_in_two_words_where_there_is_no_network():
    try:
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except socket.gaierror as cause:
            raise RuntimeError("HTTPSConnectionPool: Max retries exceeded with url") from cause
    except RuntimeError as error:
        assert reason_in_short(error) == "no network"
    assert reason_in_short(ValueError("a  b\nc")) == "a b c"
    assert len(reason_in_short(ValueError("word " * 99))) <= 120
    assert reason_in_short(ValueError()) == "ValueError"


def test_code_is_never_fetched_and_pickles_only_where_there_is_nothing_else():
    code = ["modeling_x.py", "a/model.safetensors", "onnx/model.onnx", "../config.json"]
    assert _wanted(["config.json", "model.safetensors", "pytorch_model.bin", *code], True) == [
        "config.json",
        "model.safetensors",
    ]
    assert _wanted(["config.json", "pytorch_model.bin", *code], True) == [
        "config.json",
        "pytorch_model.bin",
    ]
    assert _wanted(["config.json", "tokenizer.json", "model.safetensors"], False) == [
        "config.json",
        "tokenizer.json",
    ]


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes of the hub that a model needs, of one model."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        names = [p.name for p in self.folder.iterdir() if p.is_file()]
        headers = {"X-Repo-Commit": COMMIT}
        status, content = 404, b"{}"
        if self.path.startswith("/api/models/me/model/tree/"):
            # huggingface_hub 2 asks for it
            files = [(name, (self.folder / name).read_bytes()) for name in names]
            listed = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in files
            ]
            status, content = 200, json.dumps(listed).encode()
        elif self.path.startswith("/api/models/me/model"):
            siblings = [{"rfilename": name} for name in names]
            status, content = (
                200,
                json.dumps({"id": "me/model", "sha": COMMIT, "siblings": siblings}).encode(),
            )
        elif self.path.startswith("/me/model/resolve/"):
            content = (self.folder / self.path.split("/")[-1]).read_bytes()
            status = 200
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "served"
    exported(write_tokenizer_json(tmp_path / "t" / "tokenizer.json"), folder, stored())
    (folder / "modeling_evil.py").write_text("raise SystemExit(1)")
    (folder / "pytorch_model.bin").write_bytes(b"evil")
    kind = type("OneHub", (Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def asks_the_hub(world: World, *, place: str, imports: bool) -> tuple[str, str]:
    """What is printed, and what is said of mistakes, by a process that has not asked the hub before."""
    os.chdir(place)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if imports:
            assert import_hf.main(["me/model", "out"]) == 0, err.getvalue()
        print(read_model(Path("hf://me/model@main")).origin)
        print(model_facts(Path("me/model")).hidden_size)
        print(check_tokenizer_path(Path("me/model")).name)
        print(import_hf.main(["me/nothing", "other"]))
    return out.getvalue(), err.getvalue()


def test_a_model_is_fetched_from_the_hub_and_its_commit_recorded(hub, tmp_path, monkeypatch):
    """huggingface_hub reads its settings when it is imported, so each asks in a process of its own."""
    kind, endpoint = hub
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secretsecret",
        "no_proxy": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    place = tmp_path / "place"
    place.mkdir()

    ((said, mistakes),) = run_ranks(asks_the_hub, 1, place=str(place), imports=True)
    assert f"from Hugging Face hub me/model at commit {COMMIT}" in said
    assert "32\ntokenizer.json\n" in said and said.endswith("2\n")
    assert "the Hugging Face hub has no model of that name" in mistakes
    assert "hf_secretsecret" not in said + mistakes
    assert COMMIT in read_stored(place / "out").origin
    fetched = {path.rpartition("/")[2] for path in kind.asked if "/resolve/" in path}
    assert fetched == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }

    # the machine loses its network: what was fetched serves on
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ((said, mistakes),) = run_ranks(asks_the_hub, 1, place=str(place), imports=False)
    assert COMMIT in said and "cannot be asked from this machine" in mistakes
