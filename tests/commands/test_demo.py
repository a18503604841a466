"""The demo: what it says when it is stopped, and that it does not go on without what it needs."""

import subprocess
import sys


def test_a_demo_that_is_stopped_ends_and_says_how_far_it_came(tmp_path):
    words = [sys.executable, "-m", "tunesmith", "demo", "--steps", "400", "--out", str(tmp_path / "demo")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step 0:"):
                process.terminate()
                break
        rest, error = process.stdout.read(), process.stderr.read()
    assert process.returncode == 1
    assert "stopped at step" in rest
    assert "2 of 6" not in rest
    assert "the demo stops here" in error
    assert "SIGTERM received" in error
    assert "Run it again: it starts from the beginning" in error
