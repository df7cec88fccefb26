"""Rules of the house that a machine can keep."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nclightning"
FLOORS = {
    "errors": -2,
    "overrides": -2,
    "sharding": -1,
    "objective": 0,
    "heads": 0,
    "ranks": 0,
    "theory": 0,
    "functional": 0,
    "optim": 1,
    "metrics": 1,
    "probe": 2,
    "arguments": 3,
    "files": 3,
    "table": 3,
    "interrupts": 3,
    "configurations": 4,
    "models": 4,
    "data": 4,
    "loggers": 4,
    "folders": 5,
    "resuming": 6,
    "saved_config": 6,
    "callbacks": 6,
    "figures": 7,
    "reproduction": 8,
    "summaries": 8,
    "closing": 9,
    "wording": 8,
    "parsing": 9,
    "commands": 9,
    "cli": 10,
    "__main__": 11,
}
# Pairs that share no code although their floors would allow it.
STRANGERS = {
    ("theory", "functional"), ("functional", "theory"), ("theory", "objective"), ("functional", "objective"),
    ("callbacks", "models"), ("callbacks", "data"),
}  # fmt: skip
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
        assert other == unit or FLOORS[other] < FLOORS[unit] or (unit, other) == ("theory", "theory"), module
        assert (unit, other) not in STRANGERS, module


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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_fit_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "unit",
    ["objective", "theory", "functional", "optim", "metrics", "probe", "files", "interrupts", "figures"],
)
def test_lower_floors_do_not_load_lightning(unit):
    # torchmetrics shares Lightning's helper package, so the trainer is what is looked for.
    code = (
        f"import importlib, pkgutil, sys, nclightning.{unit} as unit\n"
        "for each in pkgutil.walk_packages(getattr(unit, '__path__', ()), unit.__name__ + '.'):\n"
        "    importlib.import_module(each.name)\n"
        "sys.exit(any(name.split('.')[0] == 'lightning' for name in sys.modules))"
    )
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
        if unit_of(path) not in ("objective", "theory")
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
    "truncate", "fsync", "save", "savefig", "tofile", "savetxt", "save_hparams_to_yaml", "SummaryWriter", "FileWriter",
    "EventFileWriter", "FileLock", "SoftFileLock",
}  # fmt: skip


def writes_to_files(source):
    """Yield calls that change files, but for those to a file of ``with replaced(...) as NAME``."""

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

    yield from visit(ast.parse(source), frozenset())


def _names(call):
    """Names that a call is made on or given."""
    receiver = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return {each.id for each in (*receiver, *call.args) if isinstance(each, ast.Name)}


def _writes(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
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
        if unit_of(path) != "files" and (calls := list(writes_to_files(path.read_text())))
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
    ],
)
def test_what_changes_no_file_is_let_be(line):
    assert not list(writes_to_files(line))
