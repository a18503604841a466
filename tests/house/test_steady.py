"""Long runs in the memory of short ones: a process takes what it took after its first steps, whatever shapes come.

The processes are the command line's own: what bounds the kernels that a CPU keeps by shape is set before torch is loaded.
"""

import json
import os
import subprocess
import sys

import pytest

from tunesmith.__main__ import _keep_few_kernels

MEASURED = """
import json, os, sys
from pathlib import Path

PAGE, taken = os.sysconf("SC_PAGE_SIZE"), []

def measured(call):
    def measure(*arguments, **more):
        taken.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
        return call(*arguments, **more)
    return measure

from tunesmith.files.run import RunLog
from tunesmith.generation.chat import ChatSession
RunLog.record = measured(RunLog.record)
ChatSession.send = measured(ChatSession.send)
out = Path(sys.argv.pop(1))
from tunesmith.__main__ import main
code = main()
out.write_text(json.dumps(taken))
sys.exit(code)
"""
UNSET = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def memory(tmp_path, argv, lines=()):
    """Bytes in memory at every logged step, or every message, of a command in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "taken.json"), *map(str, argv)],
        input="\n".join(lines), env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "taken.json").read_text())


def growth(taken):
    """From where a twentieth of the way is behind (and the bounded caches are full) to the highest."""
    return max(taken[len(taken) // 20 :]) / taken[len(taken) // 20]


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_training_takes_after_300_steps_what_it_took_at_first(tiny_directory, tmp_path, command):
    """Dialogues of all lengths: the rows of a batch and those with loss are others at every step."""
    rows = []
    for i in range(400):
        said = f"\n\nHuman: {'why ' * (i * 7 % 41 + 1)}\n\nAssistant:"
        rows.append({"chosen": f"{said}{' yes' * (i * 13 % 53 + 1)}", "rejected": f"{said}{' no' * (i * 5 % 29 + 1)}"})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [command, "--model.name", tiny_directory, "--data.name", tmp_path / "d.jsonl", "--out", tmp_path / "run"]
    argv += ["--train.steps", 300, "--train.precision", "fp32", "--train.device", "cpu", "--data.batching", "padded"]
    argv += ["--eval.every", 300, "--eval.iters", 1, "--data.block_size", 128]
    assert growth(memory(tmp_path, argv)) < 1.05


def test_a_chat_takes_after_200_prompts_what_it_took_at_first(tiny_directory, tmp_path):
    lines = [line for n in range(200) for line in ("/reset", "w " * (n % 180 + 1))]
    argv = ["chat", tiny_directory, "--device", "cpu", "--generate.max_new_tokens", 2]
    assert growth(memory(tmp_path, argv, lines)) < 1.05


def test_what_the_user_has_set_stays(monkeypatch):
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "8")
    _keep_few_kernels()
    assert [os.environ.get(name) for name in UNSET] == [None, "7", "8"]
    monkeypatch.delenv("DNNL_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "placeholder")  # so that it is put back
    del os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    _keep_few_kernels()
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 64
