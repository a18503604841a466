"""The house: who may import whom, what stays out of `--help`, and how long a file may be."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tunesmith"

LAYERS = [
    {"errors", "models.linear", "outofmemory", "models.recompute", "capture"},
    {
        "options.training",
        "options.commands",
        "options.parse",
        "hub",
        "files.run",
        "data.prompts",
        "progress",
        "data.tokenizer",
        "data.dialogue",
        "device",
        "data.readers",
    }
    | {
        "stats",
        "page",
        "models.attention",
        "train.losses",
        "models.lora",
        "train.optim",
        "judge.answers",
        "train.choice",
        "judge.endpoint",
        "options.pretraining",
    }
    | {"train.prefetch", "options.planning"},
    {
        "models.gpt2",
        "train.step",
        "train.splitting",
        "data.datasets",
        "judge.language_model",
        "data.audit.rows",
        "data.bits",
        "study.read",
        "study.verdicts",
        "study.figures",
        "plan.memory",
    }
    | {"study.definition"},
    {
        "files.weights",
        "data.tokenstore",
        "train.recorded",
        "data.audit.overlap",
        "study.paper.select",
        "study.matrix",
        "plan.workload",
        "generation.recorded",
    },
    {
        "files.adapters",
        "models.scored",
        "train.checkpoint",
        "data.texts",
        "study.lines",
        "study.paper.tables",
        "study.paper.claims",
        "study.ledger",
    }
    | {"study.executors", "plan.cards"},
    {
        "files.names",
        "data.pairs",
        "train.token_loss",
        "study.paper.figures",
        "study.parts",
        "study.view",
        "study.on_ray",
    },
    {
        "generation.engine",
        "train.loop",
        "train.pair_loss",
        "train.trainee",
        "judge.scoring",
        "data.audit.cuts",
        "train.scratch",
        "study.study_page",
        "study.runner",
    }
    | {"study.forecast"},
    {
        "judge.judging",
        "train.resolve",
        "train.reference",
        "generation.logprobs",
        "judge.comparison",
        "data.audit.survey",
        "plan.planning",
    },
    {"train.session", "judge.comparison_page", "plan.probe"},
    {"commands.sft", "commands.dpo", "commands.reward", "commands.data", "commands.evaluate", "commands.score"}
    | {"commands.compare", "commands.chat", "commands.pretrain", "commands.plan"},
    {"study.report"},
    {"commands.study"},
    {"commands.demo"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
WITHOUT_TORCH = {
    "options.pretraining",
    "errors",
    "judge.endpoint",
    "judge.language_model",
    "options.training",
    "options.commands",
    "options.parse",
    "hub",
    "files.run",
    "data.prompts",
    "progress",
    "data.dialogue",
    "data.datasets",
    "data.readers",
    "judge.answers",
    "train.choice",
    "plan.memory",
    "plan.workload",
    "plan.cards",
    "options.planning",
    "study.definition",
    "study.matrix",
    "study.ledger",
    "study.executors",
    "study.view",
    "study.on_ray",
    "study.runner",
    "stats",
    "page",
    "judge.comparison",
    "judge.comparison_page",
    "study.read",
    "study.paper.select",
    "study.verdicts",
    "study.paper.claims",
    "study.figures",
    "study.lines",
    "study.paper.figures",
    "study.paper.tables",
    "study.parts",
    "study.study_page",
    "study.report",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_imports_its_own_layer_or_a_higher_one(path):
    name = module_name(path)
    assert name in LEVEL, f"{name} has no layer yet: give it one in LAYERS"
    ours = {m.removeprefix("tunesmith.") for m in imports(path) if m.startswith("tunesmith.")} & LEVEL.keys()
    upward = {m for m in ours if LEVEL[m] >= LEVEL[name]}
    same_ground = {m for m in upward if LEVEL[m] == LEVEL[name] == 1 and m in WITHOUT_TORCH}
    assert upward <= same_ground, f"{name} (layer {LEVEL[name]}) imports {sorted(upward - same_ground)}"


def test_every_layer_entry_is_a_file():
    assert set(LEVEL) == {module_name(p) for p in MODULES}


@pytest.mark.parametrize("path", [p for p in MODULES if module_name(p) in WITHOUT_TORCH], ids=module_name)
def test_modules_that_only_read_runs_and_text_need_no_torch(path):
    for node in ast.parse(path.read_text()).body:  # the top level: a function may import it when called
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(n.split(".")[0] in ("torch", "safetensors") for n in names)


def test_report_is_rendered_without_importing_torch():
    code = "import sys, tunesmith, tunesmith.study.report, tunesmith.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def processor_seconds():
    """Of all ended child processes: what else runs beside the tests does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["sft", "--help"], ["pretrain", "--help"], ["data", "--help"], ["plan", "--help"]],
    ids=" ".join,
)
def test_help_comes_in_half_a_second(argv):
    times = []
    for _ in range(3):
        start = processor_seconds()
        done = subprocess.run([sys.executable, "-m", "tunesmith", *argv], capture_output=True, text=True, check=True)
        times.append(processor_seconds() - start)
        assert "usage: tunesmith" in done.stdout
    assert min(times) < 0.5


def test_files_stay_short_enough_to_read():
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_answers_are_given_without_torchs_compiler():
    code = (
        "import sys, tunesmith as ts; model, tokenizer = ts.load('sample', device='cpu')\n"
        "ts.generate(model, tokenizer, [[{'role': 'user', 'content': 'Hello'}]], max_new_tokens=3)\n"
        "import tunesmith.commands.chat, tunesmith.train.session; sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_opens_no_socket_and_prints_nothing():
    code = (
        "import socket, pkgutil, importlib, tunesmith\n"
        "def refuse(*a, **k): raise SystemExit('a module opened a socket at import')\n"
        "socket.socket.connect = refuse\n"
        "for m in pkgutil.walk_packages(tunesmith.__path__, 'tunesmith.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
