"""Models and data sets by their hub names, from a small server on this machine that answers as the Hugging Face hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load as load_safetensors

from hanging import HANGS
from tunesmith.files.adapters import save_adapter
from tunesmith.files.names import load_tokenizer
from tunesmith.files.weights import load_model, weights_fingerprint
from tunesmith.models.lora import apply_lora, lora_layers, merge

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(6)
]


def lines(count):
    return "".join(json.dumps(row) + "\n" for row in ROWS[:count]).encode()


class Hub:
    """`repos` maps ("models", "owner/name") to its files. Weights are served as the hub serves large files: by a
    redirect to another host; those of someone/broken end in their middle."""

    def __init__(self):
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.respond(b"")

            def do_GET(self):
                self.respond(None)

            def respond(self, body):
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                status, data, headers = hub.answer(path.strip("/").split("/"))
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                broken = path.startswith("/cdn/someone/broken")
                self.wfile.write((data[: len(data) // 2] if broken else data) if body is None else body)
                self.close_connection = broken

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, parts):
        """Status, body and headers for the parts of a path."""
        if parts[0] == "api":
            name, rest = "/".join(parts[2:4]), parts[4:]
            repo = self.repos.get((parts[1], name))
            if repo is None:
                return 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
            found = {"id": name, "sha": COMMIT, "private": False, "siblings": [{"rfilename": p} for p in repo]}
            if rest[:1] == ["tree"]:
                found = [{"type": "file", "path": p, "size": len(d), "oid": digest(d)[:40]} for p, d in repo.items()]
            return 200, json.dumps(found).encode(), {}
        if parts[0] == "cdn":
            data = self.repos["models", "/".join(parts[1:3])]["/".join(parts[3:])]
            return 200, data, {"ETag": f'"{digest(data)}"'}
        kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        data = self.repos.get((kind, name), {}).get(file)
        if data is None:
            return 404, b"Entry not found", {"X-Error-Code": "EntryNotFound"}
        if not file.endswith((".safetensors", ".bin")):
            return 200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(data)[:40]}"'}
        elsewhere = f"http://localhost:{self.server.server_port}/cdn/{name}/{file}"
        linked = {"X-Linked-Etag": f'"{digest(data)}"', "X-Linked-Size": str(len(data)), "Location": elsewhere}
        return 302, b"", {"X-Repo-Commit": COMMIT} | linked


def digest(data):
    return hashlib.sha256(data).hexdigest()


def write_adapter(base, directory):
    """An adapter with weights that matter, on the hub's someone/tiny."""
    model = load_model(base)
    mark = weights_fingerprint(model)
    apply_lora(model, rank=2, alpha=4.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    save_adapter(model, directory, base="someone/tiny", fingerprint=mark)
    return model


@pytest.fixture(scope="module")
def hub(tiny_directory, tmp_path_factory):
    hub = Hub()
    tiny = {p.name: p.read_bytes() for p in tiny_directory.iterdir()}
    weights = tmp_path_factory.mktemp("old") / "pytorch_model.bin"
    torch.save(load_safetensors(tiny["model.safetensors"]), weights)
    bare = {name: data for name, data in tiny.items() if name != "model.safetensors"}
    clutter = {"README.md": b"# tiny", "flax_model.msgpack": b"\0" * 1000}
    adapter = tmp_path_factory.mktemp("adapter")
    write_adapter(tiny_directory, adapter)
    hub.repos = {
        ("models", "someone/tiny"): tiny | clutter,
        ("models", "someone/old"): bare | clutter | {"pytorch_model.bin": weights.read_bytes()},
        ("models", "someone/adapter"): clutter | {p.name: p.read_bytes() for p in adapter.iterdir()},
        ("models", "someone/broken"): tiny,
        ("models", "someone/bare"): bare,
        ("datasets", "someone/dialogues"): {
            "data/train.jsonl": lines(6),
            "data/test.jsonl": lines(2),
            "README.md": b"#",
        },
        ("datasets", "someone/dialogues-2.5"): {"train.json": json.dumps(ROWS).encode(), "test.json": lines(3)},
        ("datasets", "someone/pictures"): {"train/cat.png": b"\x89PNG"},
    }
    yield hub
    hub.server.shutdown()


DRIVER = """
import json, os, sys, tempfile, traceback

def load(name):
    import torch, tunesmith
    model, tokenizer = tunesmith.load(name, device="cpu")
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer.encode("Hello there")]))
    print(model.parameter_count(), [round(x, 5) for x in hidden.flatten()[:5].tolist()])
    return 0

from tunesmith.__main__ import main
results = []
for words in json.loads(sys.argv[1]):
    told = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    kept = [os.dup(1), os.dup(2)]
    for stream, file in zip((1, 2), told):
        os.dup2(file.fileno(), stream)
    try:
        code = load(words[1]) if words[0] == "load" else main(words)
    except Exception:
        traceback.print_exc()
        code = "crashed"
    for stream, file, before in zip((sys.stdout, sys.stderr), told, kept):
        stream.flush()
        os.dup2(before, stream.fileno())
        file.seek(0)
    results.append([code, *(file.read().decode() for file in told)])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def ask(hub, tmp_path_factory):
    """Commands in one fresh process that sees the hub and a Hugging Face cache of its own: (exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("hf")
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "*"}

    def run(commands, **more):
        words = [sys.executable, "-c", DRIVER, json.dumps(commands)]
        done = subprocess.run(words, env=env | more, capture_output=True, text=True, timeout=HANGS)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


FAILING = {
    "model": ("evaluate someone/nothing sample", ["model 'someone/nothing'", "check the name", "directory"]),
    "data set": ("data someone/nothing", ["dataset 'someone/nothing'", "check the name", "DIR"]),
    "no name": ("data someone/no--such", ["'someone/no--such'", "owner/name"]),
    "no weights": ("evaluate someone/bare sample", ["no weights", "model.safetensors"]),
    "no rows": ("data someone/pictures", ["no train.* file", "train{.jsonl"]),
    "broken off": (
        "evaluate someone/broken sample",
        ["model 'someone/broken' is not a directory here and cannot be downloaded", "directory"],
    ),
}
LOADED = ["someone/tiny", "someone/old"]
COUNTED = {"someone/dialogues": ["6", "2"], "someone/dialogues-2.5": ["6", "3"]}


@pytest.fixture(scope="module")
def answers(ask, tiny_directory):
    """Everything that needs the hub, in one process: it takes seconds to start."""
    commands = {name: ["load", name] for name in [str(tiny_directory), *LOADED]}
    commands |= {name: ["data", name] for name in COUNTED}
    commands |= {what: words.split() for what, (words, _) in FAILING.items()}
    return dict(zip(commands, ask(list(commands.values())), strict=True))


@pytest.mark.parametrize("name", LOADED)
def test_model_by_name_is_the_model(answers, hub, tiny_directory, name):
    """From safetensors, or from pytorch_model.bin where there are none."""
    assert answers[name][:2] == answers[str(tiny_directory)][:2]
    assert any(f"GET /cdn/{name}/" in request for request in hub.requests)


def test_only_what_is_needed_is_downloaded(answers, hub):
    asked = " ".join(hub.requests)
    assert "config.json" in asked
    assert "msgpack" not in asked
    assert "README" not in asked


@pytest.mark.parametrize("name", COUNTED)
def test_data_set_by_name(answers, name):
    """Also one whose name ends in what could be a file's suffix."""
    code, out, err = answers[name]
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if "rows used" in line)
    assert [word for word in row.replace("│", " ").split() if word.isdigit()] == COUNTED[name]


@pytest.mark.parametrize("what", FAILING)
def test_what_cannot_be_had_is_one_line_with_the_way_out(answers, what):
    code, _, err = answers[what]
    assert code == 1, err
    assert len(err.splitlines()) == 1, err
    assert all(part in err for part in FAILING[what][1]), err


def test_a_second_start_needs_no_hub_and_a_first_one_says_so_in_one_line(answers, ask, tiny_directory):
    """Nobody listens at port 9."""
    commands = [["load", "someone/tiny"], ["data", "someone/dialogues"], ["data", "someone/new"]]
    model, rows, (code, _, err) = ask(commands, HF_ENDPOINT="http://127.0.0.1:9")
    assert model == answers[str(tiny_directory)]
    assert rows == answers["someone/dialogues"]
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert "cannot be downloaded" in err
    assert "DIR" in err


def test_an_adapter_by_name_finds_its_base_by_name(ask, tiny_directory, tmp_path):
    model = write_adapter(tiny_directory, tmp_path)
    merge(model)
    with torch.no_grad():
        hidden = model(torch.tensor([load_tokenizer(tiny_directory).encode("Hello there")])).flatten()[:5].tolist()
    ((code, told, _),) = ask([["load", "someone/adapter"]])
    assert code == 0
    assert json.loads(told[told.index("[") :]) == pytest.approx(hidden, abs=2e-5)


def test_the_reports_own_judge_is_found_by_its_name(hub, ask, tiny_directory, deberta, tmp_path):
    """As it lies there: weights in the old format, a tokenizer of its own. Scored as from the local directory."""
    files = {p.name: p.read_bytes() for p in deberta.iterdir()}
    torch.save(load_safetensors(files.pop("model.safetensors")), tmp_path / "pytorch_model.bin")
    files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.repos["models", "OpenAssistant/reward-model-deberta-v3-large-v2"] = files | {"README.md": b"#"}
    words = ["score", str(tiny_directory), "--limit", "3", "--generate.max_new_tokens", "4", "--out"]
    done = ask([[*words, str(tmp_path / "a")], [*words, str(tmp_path / "b"), "--reward", str(deberta)]])
    assert [code for code, _, _ in done] == [0, 0], done
    assert "scored by OpenAssistant/reward-model-deberta-v3-large-v2" in done[0][1]
    named, local = (json.loads((tmp_path / side / "scores.json").read_text())["models"] for side in "ab")
    assert named[str(tiny_directory)]["reward"]["mean"] == pytest.approx(
        local[str(tiny_directory)]["reward"]["mean"], abs=1e-6
    )
    assert not any("README" in request for request in hub.requests if "OpenAssistant" in request)
