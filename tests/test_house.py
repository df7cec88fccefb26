"""Rules of the house that a machine can keep."""

import ast
import functools
import importlib
import re
import subprocess
import sys

import pytest

from nclightning.quantities import GROUPS
from tests.floors import FLOORS, PACKAGE, ROOT, STRANGERS
from tests.foreign import foreign_members, foreign_uses, members

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def unit_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """Yield the modules that a file imports, including those for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    unit = unit_of(path)
    for module in imports_of(path):
        if not module.startswith("nclightning."):
            continue
        other = module.split(".")[1]
        assert other == unit or FLOORS[other] < FLOORS[unit], module
        assert (unit, other) not in STRANGERS, module


def modules_of_tests_imported(source):
    """Yield modules of tests, and ``conftest`` files, that a file imports."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        yield from (each for each in names if re.match(r"tests\.(\w+\.)*(test_\w+|conftest)(\.|$)", each))


def test_no_test_imports_from_another():
    """What several tests need is a fixture in ``conftest.py``, or in a module of its own without tests."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    found = {str(path.relative_to(ROOT)): [*modules_of_tests_imported(path.read_text())] for path in files}
    assert len(files) > 100
    assert {path: modules for path, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from tests.callbacks.test_attach import Net",
        "from tests.callbacks import test_attach",
        "import tests.test_house",
        "def f():\n    from tests.conftest import generator",
    ],
)
def test_each_way_to_import_from_a_test_is_seen(line):
    assert len([*modules_of_tests_imported(line)]) == 1


@pytest.mark.parametrize("line", ["from tests.faults.runs import run", "from tests import processes"])
def test_helpers_may_be_imported(line):
    assert not [*modules_of_tests_imported(line)]


@pytest.mark.parametrize("package", sorted({path.parent for path in FILES} - {PACKAGE}), ids=lambda p: p.name)
def test_files_of_a_package_import_in_one_direction(package):
    """Order them so that each imports only what stands before it, but for names that types alone need."""
    name = ".".join(package.relative_to(ROOT).parts)
    waiting = {}
    for path in package.glob("*.py"):
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]  # Under TYPE_CHECKING.
        needs = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith(f"{name}.")}
        waiting[path.stem] = {each.removeprefix(f"{name}.").split(".")[0] for each in needs}
    del waiting["__init__"]
    while free := {stem for stem, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {stem: needs for stem, needs in waiting.items() if stem not in free}
    assert waiting == {}


WITHOUT_LIGHTNING = [
    *("objective", "theory", "functional", "optim", "metrics", "probe.measuring", "files", "interrupts", "figures"),
    "problems",
    "report",
    "integrations.trained",
    "series.command",
]
# torchmetrics shares Lightning's helper package, so the trainer is what is looked for.
LOADS = """
import gc, importlib, os, pkgutil, sys
gc.disable()  # A third of the time of these imports.
import matplotlib.figure, torchmetrics

def loads_lightning(name):
    unit = importlib.import_module(name)
    for each in pkgutil.walk_packages(getattr(unit, "__path__", ()), name + "."):
        importlib.import_module(each.name)
    return any(module.split(".")[0] == "lightning" for module in sys.modules)

# Each unit in a fork of an interpreter that has loaded what takes seconds, and nothing of the package, which the first
# of them compiles for all.
assert not {"lightning", "nclightning"} & sys.modules.keys()
sys.dont_write_bytecode, sys.pycache_prefix, *names = False, *sys.argv[1:]
for name in names:
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            status = int(loads_lightning(name))
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), name)
"""


def test_lower_floors_do_not_load_lightning(tmp_path):
    units = [f"nclightning.{unit}" for unit in WITHOUT_LIGHTNING]
    command = [sys.executable, "-c", LOADS, str(tmp_path), *units]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"0 {unit}" for unit in units], done.stderr


def test_the_package_itself_loads_nothing():
    code = "import sys, nclightning; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'nclightning.errors')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


PENALTIES = {"lambda_w", "lambda_h", "lambda_b"}


def scaled_penalties(source):
    """Yield lines where a penalty is a factor: of a product or quotient, or of an operation on a tensor."""

    def is_penalty(node):
        return getattr(node, "attr", getattr(node, "id", None)) in PENALTIES

    for node in ast.walk(ast.parse(source)):
        factors = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div | ast.MatMult):
            factors = [node.left, node.right]
        elif isinstance(node, ast.AugAssign):
            factors = [node.target, node.value]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").rstrip("_") in FACTORS:
            factors = [node.func.value, *node.args, *(keyword.value for keyword in node.keywords)]
        # Both penalties together are a strength that is shown, not a term of the objective.
        if any(map(is_penalty, factors)) and not all(map(is_penalty, factors)):
            yield node.lineno


FACTORS = {"mul", "multiply", "div", "divide", "add", "sub", "addmm", "addcmul", "lerp", "addmv", "baddbmm", "prod"}
SINGLE_LAMBDA = ("figures/runs.py", 1)  # Compares lambda_w with n lambda_h.


def test_only_the_objective_scales_a_penalty():
    """Elsewhere only the closed forms of theory do, which must not share code with the objective."""
    found = {
        str(path.relative_to(PACKAGE)): len(set(scaled_penalties(path.read_text())))
        for path in FILES
        if unit_of(path) not in ("objective", "theory", "problems")
    }
    assert {path: count for path, count in found.items() if count} == dict([SINGLE_LAMBDA])


@pytest.mark.parametrize(
    "line",
    [
        "value = 0.5 * self.objective.lambda_w * square",
        "value = self.lambda_h / 2 * square",
        "value = square * objective.lambda_b",
        "value *= lambda_w",
        "gradient.add_(weight, alpha=self._objective.lambda_w)",
        "torch.mul(features, lambda_h, out=out)",
        "lambda_h = 3.0; weight.mul_(lambda_h)",
    ],
)
def test_each_way_to_scale_a_penalty_is_seen(line):
    assert list(scaled_penalties(line)) == [1]


TAG = re.compile(rf"\b({'|'.join((*GROUPS, 'log10'))})/")


def tags_written(source):
    """Yield lines with a tag, or the beginning of one, in a text that is no docstring."""
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners)]
    documentation = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    yield from (node.lineno for node in texts if id(node) not in documentation and TAG.search(node.value))


def test_only_the_registry_writes_tags():
    """Others ask ``nclightning.quantities``, so that a tag is changed in one place."""
    found = {str(path.relative_to(PACKAGE)): lines for path in FILES if (lines := [*tags_written(path.read_text())])}
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        'tag = "optimality/gap"',
        'tags = [f"nc/{stage}/{name}"]',
        'known = tag.startswith(("nrc/", "other"))',
        'say(f"no value of laws/sharpness in {run}")',
        'tag = "log10/" + name',
        'def f():\n    """Read nc/train/nc1."""\n    return "nc/train/nc1"',
    ],
)
def test_each_way_to_write_a_tag_is_seen(line):
    assert len(list(tags_written(line))) == 1


def test_every_erratum_is_listed_once_and_tested():
    listed = re.findall(r"^\| (E\d+) \|", (ROOT / "docs" / "paper.md").read_text(), re.MULTILINE)
    assert listed == [f"E{i}" for i in range(1, len(listed) + 1)]
    tests = (ROOT / "tests" / "theory" / "test_errata.py").read_text()
    tested = re.findall(r"def test_(e\d+)_", tests)
    assert [t.upper() for t in tested] == listed
    cited = {tag for path in FILES for tag in re.findall(r"\berrat(?:um|a) ((?:E\d+(?:, | and )?)+)", path.read_text())}
    assert {tag for group in cited for tag in re.findall(r"E\d+", group)} <= set(listed)


@pytest.mark.parametrize("init", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_public_names_exist(init):
    module = importlib.import_module(".".join(init.parent.relative_to(ROOT).parts))
    names = getattr(module, "__all__", [])
    assert [name for name in names if not hasattr(module, name)] == []
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda n: (not n.isupper(), n[0].islower(), n))
    imported = {
        alias.asname or alias.name
        for node in ast.parse(init.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nclightning.")
        for alias in node.names
    }
    assert imported <= set(names)
    # Each public name of a package has the documentation that help() shows.
    undocumented = [n for n in names if callable(getattr(module, n)) and not getattr(module, n).__doc__]
    assert undocumented == []


# What changes files, by the name of the function or method.
WRITES = {
    "write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rename", "renames", "replace", "rmtree",
    "rmdir", "removedirs", "touch", "symlink_to", "hardlink_to", "link", "symlink", "copyfile", "copy2", "move",
    "truncate", "fsync", "save", "savefig", "tofile", "savetxt", "save_hparams_to_yaml", "write_hyperparameters",
    "SummaryWriter", "FileWriter",
    "EventFileWriter", "FileLock", "SoftFileLock",
}  # fmt: skip


def writes_to_files(source):
    """Yield calls that change files, but for those to a file of ``with replaced(...) as NAME``, or in memory."""

    def visit(node, partials):
        if isinstance(node, ast.With):
            partials = partials | {
                item.optional_vars.id
                for item in node.items
                if isinstance(item.context_expr, ast.Call)
                and getattr(item.context_expr.func, "id", "") == "replaced"
                and isinstance(item.optional_vars, ast.Name)
            }
        if isinstance(node, ast.Call) and _writes(node) and not _names(node) & partials:
            yield node.lineno, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, partials)

    tree = ast.parse(source)
    assigned = [each for each in ast.walk(tree) if isinstance(each, ast.Assign)]
    in_memory = {each.targets[0].id for each in assigned if ast.unparse(each.value) == "io.BytesIO()"}
    yield from visit(tree, frozenset(in_memory))


def _names(call):
    """Names that a call is made on or given."""
    receiver = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return {each.id for each in (*receiver, *call.args) if isinstance(each, ast.Name)}


def _writes(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if ast.unparse(call.func) == "Image.open":
        return False
    if name in ("open", "fdopen"):
        position = 0 if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) != "os" else 1
        modes = [*call.args[position : position + 1], *(k.value for k in call.keywords if k.arg == "mode")]
        return any(not (isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rbt")) for mode in modes)
    if name == "replace":  # Of text it takes two arguments, of dataclasses keywords.
        return isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords
    if name == "save":  # Of torch and numpy; loggers have one, too.
        return isinstance(call.func, ast.Attribute) and len(call.args) > 1
    return name in WRITES or ast.unparse(call.func) in ("os.remove", "shutil.copy")


def test_only_the_file_layer_changes_files():
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in FILES
        if unit_of(path) not in ("files", "compat") and (calls := list(writes_to_files(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('a')",
        "path.open('w')",
        "open(path, 'ab')",
        "path.open(mode='x')",
        "path.open(mode)",
        "os.makedirs(path)",
        "partial.replace(path)",
        "torch.save(content, path)",
        "with replaced(path) as partial:\n    figure.savefig(path)",
        "file = io.BytesIO()\nfigure.savefig(path)",
        "SummaryWriter(folder)",
        "os.remove(path)",
    ],
)
def test_each_way_to_change_a_file_is_seen(line):
    assert list(writes_to_files(line))


@pytest.mark.parametrize(
    "line",
    [
        "path.open()",
        "path.open('rb')",
        "path.open(newline='')",
        "text.replace('a', 'b')",
        "replace(options, a=1)",
        "with replaced(path) as partial, partial.open('w') as file:\n    file.write('a')",
        "with replaced(path) as partial:\n    figure.savefig(partial, dpi=1)",
        "logger.save()",
        "file = io.BytesIO()\nfigure.savefig(file)",
        "Image.open(path)",
    ],
)
def test_what_changes_no_file_is_let_be(line):
    assert not list(writes_to_files(line))


COMPAT = sorted((PACKAGE / "compat").glob("*.py"))
OTHERS = [path for path in FILES if path not in COMPAT]
# Texts of our own that look like names of others: a state of metrics, a subparser.
OWN_TEXTS = {"_apart_"}


@functools.cache
def own_names():
    return {name for path in FILES for name in members(ast.parse(path.read_text()))} | OWN_TEXTS


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_compat_uses_what_other_libraries_do_not_promise(path):
    """The rule is that of ``foreign_uses``."""
    assert list(foreign_uses(path.read_text(), own_names())) == []


def classes_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    written = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
    return [getattr(importlib.import_module(name), each) for each in sorted(written)]


def test_only_compat_touches_what_it_inherits_from_other_libraries():
    """The rule is that of ``foreign_members``."""
    kinds = [kind for path in OTHERS if path.stem != "__main__" for kind in classes_of(path)]
    assert len(kinds) > 50
    touched = {kind.__qualname__: foreign_members(kind) for kind in kinds}
    assert {name: names for name, names in touched.items() if names} == {}


@pytest.mark.parametrize("path", COMPAT, ids=lambda p: p.stem)
def test_compat_says_what_it_stands_on(path):
    """Each name, the versions that have it, what breaks without it; and each entry has a test."""
    tree = ast.parse(path.read_text())
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts = [" ".join(node.value.split()) for node in documented if "Non-public:" in node.value]
    for text in texts:
        assert re.search(
            r"\((torch|torchmetrics|lightning|tensorboard|jsonargparse|accelerate|transformers|Python) \d+\.\d+", text
        ), text
        assert re.search(r"[Ww]ithout|ten times slower|would put|would", text), text
    said = " ".join(text.partition("Non-public:")[2] for text in texts)
    own = members(tree)
    used = {name.rstrip("{") for _, name in foreign_uses(path.read_text(), own - {"_get_train_description"})}
    inherited = {name for kind in classes_of(path) for name in foreign_members(kind)}
    unsaid = {name for name in used | inherited if name not in said}
    assert unsaid <= {"_global"}  # A beginning of the names that are listed.
    tests = (ROOT / "tests" / "test_compat.py").read_text()
    untested = [name for name in vars(importlib.import_module(f"nclightning.compat.{path.stem}")).get("__all__", [])
                if path.stem not in ("__init__", "hparams") and not re.search(rf"\b{name}\b", tests)]  # fmt: skip
    assert untested == []


@pytest.mark.parametrize(
    "line",
    [
        "x = tensor._version",
        "module._buffers[name] = x",
        "pl_module._trainer = None",
        "del optimizer._hook",
        "self._kwargs['a'] = 1",
        "cls._abc_impl",
        "super()._load_from_state_dict(state)",
        "optimizer.param._version",
        "self.experiment._get_file_writer()",
        "trainer.fit_loop.epoch_loop",
        "loop.batch_progress",
        "getattr(child, '_orig_mod')",
        "getattr(loop, 'fit_loop')",
        "hasattr(child, '_orig_mod')",
        "setattr(child, '_orig_mod', 1)",
        "operator.attrgetter('_orig_mod')",
        "operator.attrgetter('module._orig_mod')",
        "vars(child)['_orig_mod']",
        "child.__dict__['_orig_mod']",
        "for name in ('_forward_hooks',): pass",
        "getattr(module, f'_forward{name}')",
        "getattr(module, '_forward' + name)",
        "getattr(module, '_{}_hooks'.format(name))",
        "import torch._dynamo",
        "from torch import _dynamo",
        "from torch._dynamo import config",
        "import torch.nn.modules.module as m",
        "from torch.nn.modules import module",
        "from torch.nn import modules",
        "import torch\ntorch.nn.modules.module",
        "from torch import nn\nnn.modules.module",
        "import torch as t\nt._dynamo",
        "import lightning.fabric.utilities.exceptions",
        "from lightning.fabric.loggers.logger import rank_zero_experiment",
        "from lightning.pytorch.trainer.connectors.data_connector import x",
        "from lightning.pytorch import loops",
        "import lightning as L\nL.pytorch.loops",
        "from pytorch_lightning import Trainer",
        "from lightning_fabric.utilities import exceptions",
        "from tensorboard.compat.proto.event_pb2 import Event",
        "import_module('torch._dynamo')",
        "importlib.import_module('lightning.pytorch.loops')",
        "__import__('lightning.pytorch.loops')",
        "sys.modules['torch._dynamo']",
        "from numpy import _core",
        "from yaml._yaml import x",
        "parser._actions",
        "if True:\n    from torch.nn.modules import module",
        "def f():\n    def g(x=tensor._version): pass",
    ],
)
def test_each_way_to_use_what_is_not_promised_is_seen(line):
    assert list(foreign_uses(line))


@pytest.mark.parametrize(
    "line",
    [
        "class A:\n    _x = 1\n    def f(self, other): return other._x",
        "class A:\n    def f(self): self._x = 1; return self._x",
        "class A:\n    def f(self, other): other._f(); super()._f()\n    def _f(self): pass",
        "class A(NamedTuple):\n    _x: int",
        "named._replace(a=1)._asdict()",
        "os._exit(1)",
        "x.__class__.__name__",
        "getattr(x, 'name')",
        "getattr(x, '__name__')",
        "getattr(x, f'on_{name}_end')",
        "text.replace('_', ' ')",
        "_private_function(x)",
        "'a sentence about _names'",
        "from nclightning.theory import _anything",
        "from torch import nn\nnn.functional.linear",
        "import torch\ntorch.nn.Linear(1, 1).weight",
        "import lightning as L\nL.pytorch.callbacks",
        "from lightning.pytorch.callbacks import Checkpoint",
        "import numpy.typing",
    ],
)
def test_what_is_promised_or_our_own_is_let_be(line):
    assert not list(foreign_uses(line, members(ast.parse(line))))


@pytest.mark.parametrize(
    ("base", "body", "name"),
    [
        ("torch.nn.Module", "def f(self): return self._buffers", "_buffers"),
        ("torch.nn.Module", "def f(self): self._buffers = {}", "_buffers"),
        ("torch.nn.Module", "_version = 2", "_version"),
        ("torch.nn.Module", "def _call_impl(self): pass", "_call_impl"),
        ("torch.nn.Module", "def f(self): return super()._call_impl()", "_call_impl"),
        ("torchmetrics.Metric", "def f(self): self._computed = 1", "_computed"),
        ("lightning.LightningModule", "@property\n    def f(self): return self._trainer", "_trainer"),
        ("lightning.pytorch.callbacks.RichProgressBar", "def f(self): self.train_progress_bar_id", "train_progress_"),
    ],
)
def test_each_way_to_touch_what_is_inherited_is_seen(base, body, name, tmp_path, monkeypatch):
    (tmp_path / "made_from.py").write_text(f"import {base.rpartition('.')[0]}\nclass Made({base}):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_from", raising=False)
    (found,) = foreign_members(importlib.import_module("made_from").Made, "made_from")
    assert found.startswith(name)
    sys.modules.pop("made_from")
