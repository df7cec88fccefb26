"""The report of a reproduction, in Markdown."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from nclightning.figures import LinearFit, Run
from nclightning.figures.rates import LEAST_R_SQUARED
from nclightning.files import replaced
from nclightning.quantities import CONVERGING, GAP
from nclightning.reproduction.claims import METRICS_REACH, NC_TAGS, Claim
from nclightning.reproduction.error_bound import NEAR, Study, study_problem
from nclightning.reproduction.optimizers import Runs, optimizer_section

__all__ = ["write_report"]

_QUANTITIES = {1: (GAP.tag(),), 2: (GAP.tag(),), 3: NC_TAGS, 4: NC_TAGS}
_TITLES = {
    1: "Figure 1: optimality gap of the unconstrained feature model",
    2: "Figure 2: optimality gap of the two-layer network",
    3: "Figure 3: NC metrics of the unconstrained feature model",
    4: "Figure 4: NC metrics of the two-layer network",
}


def write_report(
    folder: Path,
    runs: Mapping[int, Sequence[Run]],
    claims: Sequence[Claim],
    quick: bool,
    study: Study | None = None,
    compared: Runs | None = None,
) -> Path:
    """Write ``report.md``.

    Args:
        folder: Where the figures are.
        runs: By figure.
        claims: Decided.
        quick: Whether these are the shortened runs.
        study: Of the error bound, if it was made.
        compared: Runs of several optimizers, if they were made.

    Returns:
        The file.
    """
    path = folder / "report.md"
    with replaced(path) as partial:
        partial.write_text("\n".join(_lines(runs, claims, quick, study, compared)) + "\n")
    return path


def _lines(
    runs: Mapping[int, Sequence[Run]],
    claims: Sequence[Claim],
    quick: bool,
    study: Study | None,
    compared: Runs | None,
) -> Iterator[str]:
    yield "# The paper's figures, reproduced"
    yield ""
    if quick:
        yield "**Shortened runs** (`--quick`): fewer lambdas and iterations than the full reproduction."
        yield ""
    yield from _claims_table(claims)
    for figure, own in sorted(runs.items()):
        yield ""
        yield f"## {_TITLES[figure]}"
        yield ""
        yield f"![{_TITLES[figure]}](figure{figure}.png)"
        yield ""
        yield from _rates_table(own, _QUANTITIES[figure])
    if study is not None:
        yield ""
        yield from _study_section(study)
    if compared:
        yield ""
        yield from optimizer_section(compared)
    yield ""
    yield from _method()


def _claims_table(claims: Sequence[Claim]) -> Iterator[str]:
    yield "| figure | claim | | decided by | counts as held if |"
    yield "|---|---|---|---|---|"
    for claim in claims:
        verdict = "**held**" if claim.held else "**did not hold**"
        yield f"| {claim.figure} | {claim.sentence} | {verdict} | {claim.evidence} | {claim.rule} |"


def _rates_table(runs: Sequence[Run], tags: Sequence[str]) -> Iterator[str]:
    columns = ["loss", "lambda_w", "lambda_h", "quantity", "iterations", "last value"]
    columns += ["it./decade", "R^2", "decades", "fitted range"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for run in runs:
        set_ = (run.loss.upper(), f"{run.settings['lambda_w']:g}", f"{run.settings['lambda_h']:g}")
        for tag in tags:
            reached = (CONVERGING[tag].text, str(run.summary.iteration), f"{run.summary.last[tag]:.1e}")
            yield f"| {' | '.join((*set_, *reached, *_fit_cells(run.summary.fits[tag])))} |"


def _fit_cells(fit: LinearFit | None) -> tuple[str, ...]:
    if fit is None:
        return ("-",) * 4
    return (f"{fit.iterations_per_decade:.4g}", f"{fit.r_squared:.5f}", f"{fit.decades:.1f}", f"{fit.first}-{fit.last}")


def _study_section(study: Study) -> Iterator[str]:
    yield "## The error bound"
    yield ""
    yield "![mu times distance over gradient norm, against the distance](error_bound.png)"
    yield ""
    yield (
        "Dots are perturbed optima, lines runs of gradient descent with the step 1/L. mu is the least nonzero "
        "eigenvalue of the Hessian at the optimal set, in closed form. At the threshold K q = 1 the quotient grows "
        "like the inverse square of the distance: no constant bounds it."
    )
    yield ""
    yield f"Largest mu distance / gradient norm within {NEAR:g} of the set:"
    yield ""
    yield "| loss | K | 1/mu | perturbations | descent |"
    yield "|---|---|---|---|---|"
    near = [r for r in study.readings if r.distance <= NEAR and r.kind != "threshold"]
    for loss, K in dict.fromkeys((r.loss, r.num_classes) for r in near):
        largest = [
            max(r.ratio for r in near if (r.loss, r.num_classes, r.kind) == (loss, K, kind))
            for kind in ("perturbation", "trajectory")
        ]
        kappa = study_problem(loss, K).error_bound_constant
        yield f"| {loss.upper()} | {K} | {kappa:.4g} | {largest[0]:.6f} | {largest[1]:.6f} |"
    yield ""
    yield (
        "Fact 1 along a line-search run (K = n = 10, d = 20, lambda = 5e-3), the worst over its steps with a gap "
        "between 1e-2 and 1e-20:"
    )
    yield ""
    yield "| loss | kappa_1, sufficient decrease | kappa_2, cost-to-go | kappa_3, safeguard | steps |"
    yield "|---|---|---|---|---|"
    for c in study.constants:
        yield f"| {c.loss.upper()} | {c.kappa_1:.4g} | {c.kappa_2:.4g} | {c.kappa_3:.4g} | {c.steps} |"


def _method() -> Iterator[str]:
    yield "## How it was measured"
    yield ""
    yield (
        "A line is fitted to log10 of the recorded values over the longest stretch, in decades, on which it is "
        f"straight: R^2 >= {LEAST_R_SQUARED}; in Figure 3 among the stretches that end at or below {METRICS_REACH:g}. "
        "`runs/NAME/` holds the readings in full precision (`readings.csv`), all settings (`config.yaml`) and the "
        "TensorBoard events of each run; `tensorboard --logdir runs` shows them."
    )
    yield ""
    listed = ", ".join(f"{name} {version(name)}" for name in ("nclightning", "torch", "lightning"))
    yield f"{listed}, Python {platform.python_version()}; float64, one thread per run, seed 0."
