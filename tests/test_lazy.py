"""Public names that are imported when they are first asked for, and what is loaded before that."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nclightning

ROOT = Path(__file__).resolve().parents[1]
LAZY = ("nclightning", "nclightning.figures", "nclightning.metrics")
# Each takes a tenth of a second or more, or stands for a library that does.
HEAVY = {
    "lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "PIL", "tensorboard", "jsonargparse", "scipy",
    "pandas", "sklearn", "transformers", "sympy", "torch._dynamo", "torch._inductor", "torch.utils.tensorboard",
}  # fmt: skip
ARRAYS = "features=[[2.0, 0.1], [1.9, 0.0], [-2.0, 0.0], [-2.1, 0.1]], labels=[0, 0, 1, 1]"
MAIN = "from nclightning.cli import main; main({})"


def typed(package):
    """Return what a package imports for type checkers: module by name."""
    (block,) = (
        node
        for node in ast.parse(Path(importlib.import_module(package).__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {alias.name: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_what_is_imported_when_it_is_asked_for(package):
    module, names = importlib.import_module(package), typed(package)
    assert set(names) == set(module.__all__)
    for name, home in names.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
        assert vars(module)[name] is getattr(module, name)  # Asked for once.


@pytest.mark.parametrize("package", LAZY)
def test_names_are_listed_before_they_are_imported(package):
    code = (
        f"import {package} as package\n"
        "assert {*package.__all__} <= {*dir(package)}\n"
        "assert not {*package.__all__} & {*vars(package)}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_is_not_there_is_refused_as_python_does():
    with pytest.raises(AttributeError, match=r"^module 'nclightning.figures' has no attribute 'draw_gap'$"):
        nclightning.figures.draw_gap  # noqa: B018
    with pytest.raises(ImportError, match=r"cannot import name 'draw_gap' from 'nclightning.figures'"):
        exec("from nclightning.figures import draw_gap")
    assert not hasattr(nclightning, "__wrapped__")
    assert not hasattr(nclightning, "_private")
    assert not hasattr(nclightning, "not.a.name")


def test_modules_can_be_asked_for_without_an_import_of_their_own():
    code = "import nclightning; assert nclightning.theory.UFMProblem; assert nclightning.figures.rates.fit_rate"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_error_within_a_module_is_not_taken_for_a_name_that_is_missing(tmp_path):
    package = tmp_path / "own"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from nclightning.lazy import lazy_names\n__getattr__, __dir__ = lazy_names(__name__, {'broken': ('name',)})\n"
    )
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    code = (
        "import own\ntry:\n    own.name\nexcept ModuleNotFoundError as error:\n    assert error.name[:8] == 'a_module'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})


# What follows runs in forks of an interpreter that has loaded torch, which takes a second, and nothing of the package.
FORKS = f"""
import gc, json, os, sys, traceback, torch

assert "nclightning" not in sys.modules
for code in sys.argv[1:]:
    if os.fork() == 0:
        error = None
        sys.argv[1:] = ["theory", "--config", "ufm_mse"]
        try:
            exec(code)
        except SystemExit:
            pass
        except BaseException:
            error = traceback.format_exc()
        loaded = sorted({HEAVY} & {{*sys.modules}})
        report = code, error, loaded, gc.isenabled(), gc.get_freeze_count() > 100_000
        print("report", json.dumps(report), sep="\t", file=sys.stderr, flush=True)
        os._exit(0)
    os.wait()
"""
LIGHT = {
    "import nclightning.functional": set(),
    "import nclightning.theory": set(),
    "import nclightning.problems": set(),
    "import nclightning.objective": set(),
    "import nclightning.optim": set(),
    "from nclightning.metrics import MEASURES": set(),
    "from nclightning.figures import read_run, fit_rate": set(),
    f"from nclightning import measure; measure({ARRAYS}, weight=[[1.0, 0], [-1, 0]], measures=('all',))": set(),
    MAIN.format(["theory", "--config", "ufm_mse"]): set(),
    MAIN.format(["theory", "--help"]): set(),
    MAIN.format(["theory", "--config", "ufm_mse", "--lamda", "1"]): set(),
    MAIN.format(["measure", "--help"]): {"matplotlib", "PIL", "tensorboard", "torch.utils.tensorboard"},
    MAIN.format(["plot", "nothing"]): {"matplotlib", "PIL"},
}
OWN_PROCESS = "import runpy; runpy.run_module('nclightning', run_name='__main__', alter_sys=True)"
# Whether garbage is collected at the end, and whether what was imported is frozen.
COLLECTS = {
    OWN_PROCESS: [True, True],
    MAIN.format(""): [True, False],
    f"gc.disable(); {MAIN.format('')}": [False, False],
}
COLLECTIONS = (
    "from nclightning.cli import main\n"
    "collections = []\n"
    "module = lambda: sys.modules.get('nclightning.commands.theory')\n"
    "gc.callbacks.append(lambda *_: collections.append(hasattr(module(), 'print_theory')))\n"
    "main()\n"
    "assert collections and all(collections), collections"
)


@pytest.fixture(scope="module")
def reports():
    """Return by code: its error, heavy libraries that it loads, and what it does to the garbage collector."""
    codes = [*LIGHT, *COLLECTS, COLLECTIONS]
    ended = subprocess.run([sys.executable, "-c", FORKS, *codes], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.partition("\t")[2] for line in ended.stderr.splitlines() if line.startswith("report\t")]
    return {code: found for code, *found in map(json.loads, lines)}


@pytest.mark.parametrize(("code", "loads"), LIGHT.items())
def test_light_things_load_no_heavy_libraries(code, loads, reports):
    error, loaded, *_ = reports[code]
    assert error is None, error
    assert {*loaded} == loads


@pytest.mark.parametrize("code", ["import nclightning.metrics", MAIN.format(["theroy"]), MAIN.format([])])
def test_the_lightest_load_no_torch(code):
    code = f"import atexit, sys; atexit.register(lambda: print({HEAVY | {'torch'}} & {{*sys.modules}})); {code}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == "set()\n"
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("code", "collects"), COLLECTS.items())
def test_only_a_process_of_its_own_freezes_what_it_imports(code, collects, reports):
    error, _, *found = reports[code]
    assert error is None, error
    assert found == collects


def test_a_command_is_imported_without_garbage_collection(reports):
    assert reports[COLLECTIONS][0] is None, reports[COLLECTIONS][0]
