"""The house: which wing may import which, what stays out of `--help`, and how long a file may be."""

import ast
import re
import resource
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tunesmith import WINGS

PACKAGE = Path(__file__).parents[2] / "src" / "tunesmith"
GROUND = "ground"  # the modules that lie directly in the package; `__main__`, which starts everything, stands above all
ORDER = {wing: height for height, wing in enumerate((GROUND, *WINGS, "__main__"))}
AT_MOST_ON_THE_GROUND = 12
MOST_IMPORTS, LONGEST_FUNCTION = 12, 60
ENDING = re.compile(r"(ings?|ements?|ments?|ions?|ed|ers?|s|e)$")
WITHOUT_TORCH = {  # what reads runs and text or only knows options; a wing means every module of it
    "options", "study", "files.run", "files.answers", "generation.chat", "train.choice", "judge.two_models_page", "judge.endpoint",
    "plan.cards", "train.methods.table", "data.datasets", "data.prompts", "commands.chat_terminal",
}  # fmt: skip
WITH_TORCH = {"study.forecast"}  # times a step


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"}


def wing_of(module: str) -> str:
    return module.partition(".")[0] if "." in module or module == "__main__" else GROUND


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tunesmith":
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are absolute"
    return {name.removeprefix("tunesmith.") for name in found} & MODULES.keys()


IMPORTS = {module: imports(path) for module, path in MODULES.items()}
UPWARD = sorted(
    f"{module} imports {other}"
    for module, others in IMPORTS.items()
    for other in others
    if ORDER.get(wing_of(module), -1) < ORDER.get(wing_of(other), 0)
)


def test_a_wing_imports_only_wings_below_it(capsys):
    between = Counter(
        (wing_of(m), wing_of(o)) for m, others in IMPORTS.items() for o in others if wing_of(m) != wing_of(o)
    )
    widest = max(IMPORTS, key=lambda m: len(IMPORTS[m]))
    report = (
        f"the house: {len(MODULES)} modules; {between.total()} imports between wings ({len(between)} pairs of wings); "
        f"{len(UPWARD)} upward; {widest} imports most others, {len(IMPORTS[widest])}"
    )
    with capsys.disabled():
        print(f"\n{report}")
    assert not UPWARD, f"{report}\nthe order, lowest first: {GROUND}, {', '.join(WINGS)}"


def test_what_is_special_to_the_paper_is_known_in_its_own_folder():
    outside = {m for m, others in IMPORTS.items() for o in others if "study.paper" in o and "study.paper" not in m}
    assert outside == {"study.report"}  # which hands it to the page


def test_no_two_modules_import_each_other():
    tuple(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names them


def test_every_folder_of_modules_is_a_wing_that_says_what_it_holds():
    assert {wing_of(m) for m in MODULES} == {GROUND, *WINGS, "__main__"}
    for folder in {p.parent for p in MODULES.values()} - {PACKAGE}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), f"{folder} has no docstring"


OF_AN_ARCHITECTURE = re.compile(r"\b(wte|wpe|c_attn|c_proj|c_fc|n_embd|n_layer|n_head|Conv1D|ln_f)\b|\btransformer\.")
MAY_NAME_THEM = {  # outside models/, and why
    "options.pretraining": "option names of --model, promised by the interface",
    "options.training": "help of --lora.targets",
    "options.help": "examples, and the options shown first",
}


def test_an_architectures_own_names_stand_in_its_file():
    naming = {m for m, p in MODULES.items() if wing_of(m) != "models" and OF_AN_ARCHITECTURE.search(p.read_text())}
    assert naming == MAY_NAME_THEM.keys()


def test_only_the_table_of_families_and_architectures_themselves_import_an_architecture():
    architectures = IMPORTS["models.known"] - {"models.family", "errors"}
    assert {"models.gpt2", "models.llama"} <= architectures
    assert {m for m, others in IMPORTS.items() if others & architectures} - architectures == {"models.known"}


def test_no_two_modules_differ_only_by_an_ending():
    """Commands and methods are called as users type them; `study.paper` has figures and tables as every study."""
    by_stem = {}
    for module in MODULES:
        if not module.startswith(("commands.", "train.methods.", "study.paper.")):
            by_stem.setdefault(ENDING.sub("", module.rpartition(".")[2]), []).append(module)
    assert [modules for modules in by_stem.values() if len(modules) > 1] == []


def test_modules_outside_commands_import_few_others():
    wide = {
        module: count
        for module, others in IMPORTS.items()
        if wing_of(module) not in ("commands", "__main__")
        and (count := sum(wing_of(other) != GROUND for other in others)) > MOST_IMPORTS
    }
    assert not wide, f"more than {MOST_IMPORTS} modules that are not of the ground"


def test_functions_stay_short_enough_to_read():
    """Statements, arguments and branches are counted by ruff (pyproject.toml)."""
    long = {
        f"{module}.{node.name}": lines
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert not long


def test_few_modules_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= AT_MOST_ON_THE_GROUND


def test_modules_that_only_read_runs_and_text_load_no_torch():
    names = [m for m in MODULES if m not in WITH_TORCH and (m in WITHOUT_TORCH or wing_of(m) in WITHOUT_TORCH)]
    assert len(names) > 20
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(f'tunesmith.{name}')\n"
        "    if 'torch' in sys.modules or 'safetensors' in sys.modules: sys.exit(f'{name} loads torch or safetensors')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_report_is_rendered_without_importing_torch():
    code = "import sys, tunesmith, tunesmith.study.report, tunesmith.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_top_level_help_reads_no_options():
    """Their dataclasses would take as long as all the rest of it."""
    code = "import sys; from tunesmith.__main__ import main; main(['--help']); sys.exit('tunesmith.options' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


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


def test_the_formatter_is_kept_out_of_few_tables_only():
    assert sum(path.read_text().count("fmt: skip") for path in MODULES.values()) < 10


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
