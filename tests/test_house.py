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
    "sharding": -1,
    "objective": 0,
    "heads": 0,
    "ranks": 0,
    "theory": 0,
    "functional": 0,
    "optim": 1,
    "metrics": 1,
    "features": 1,
    "sweep": 1,
    "likeness": 2,
    "observation": 2,
    "found": 3,
    "shift": 3,
    "hooks": 0,
    "effects": 4,
    "watch": 4,
    "detection": 5,
    "arguments": 1,
    "files": 1,
    "interrupts": 1,
    "configurations": 1,
    "models": 2,
    "data": 2,
    "loggers": 2,
    "callbacks": 6,
    "figures": 7,
    "reproduction": 8,
    "summaries": 8,
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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_fit_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "unit",
    ["objective", "theory", "functional", "optim", "metrics", "features", "sweep", "files", "interrupts", "figures"],
)
def test_lower_floors_do_not_load_lightning(unit):
    # torchmetrics shares Lightning's helper package, so the trainer is what is looked for.
    code = f"import sys, nclightning.{unit}; sys.exit(any(m.split('.')[0] == 'lightning' for m in sys.modules))"
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
