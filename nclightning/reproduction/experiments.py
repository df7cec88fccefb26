"""The training runs behind each figure of the paper."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ERROR_BOUND", "FIGURES", "OPTIMIZERS", "Experiment", "experiments"]

FIGURES = (1, 2, 3, 4)
ERROR_BOUND = "error_bound"  # A separate study, without training runs.
OPTIMIZERS = "optimizers"  # A comparison that is not in the paper; it runs only on request.
# Prefixes of options. All other settings are those of the shipped configurations.
_MODEL, _OPTIMIZER = "--model.init_args", "--model.init_args.optimizer.init_args"
# A mild backtracking factor keeps the accepted steps, and with them the slope of a curve, nearly constant.
_MILD = (f"{_OPTIMIZER}.shrink", "0.7", f"{_OPTIMIZER}.grow", "2")


@dataclass(frozen=True)
class Experiment:
    """One training run.

    Attributes:
        name: Name of its folder.
        figures: Figures that show it.
        words: Arguments of ``python -m nclightning fit``, except for the output folder.
    """

    name: str
    figures: tuple[int | str, ...]
    words: tuple[str, ...]


def experiments(figures: tuple[int, ...] = FIGURES, quick: bool = False) -> list[Experiment]:
    """List the runs behind figures, in the order of their curves, the long ones last.

    Args:
        figures: Any of 1, 2, 3, 4.
        quick: Whether to list fewer and shorter runs.

    Returns:
        The runs.
    """
    return [each for each in (*_ufm(quick), *_mlp(quick)) if set(each.figures) & set(figures)]


def _ufm(quick: bool) -> list[Experiment]:
    """List runs of the unconstrained feature model: several lambda for Figure 1, stated penalties for 3."""
    lambdas = ("5e-3", "2e-3") if quick else ("5e-3", "2e-3", "1e-3", "5e-4", "2e-4")
    cadence = {"mse": "20", "ce": "2"}
    over_lambda = [
        _experiment(f"ufm_{loss}", f"lambda_{value}", (1,), cadence[loss], "--lambda", value, *_MILD)
        for loss in ("mse", "ce")
        for value in lambdas
    ]
    # Components of the features orthogonal to the rows of the head decay slowest. Their square changes the slope of NC2
    # once it dominates. Small initial features delay that until NC2 is below 1e-10. For MSE, NC3 is not straight if
    # the step varies.
    stated = (f"{_MODEL}.lambda_w", "5e-4", f"{_MODEL}.lambda_h", "5e-5", f"{_MODEL}.init_scale", "0.01")
    search = {"mse": (f"{_OPTIMIZER}.grow", "1", f"{_OPTIMIZER}.initial_step", "1.4"), "ce": _MILD}
    steps = {"mse": "80000" if quick else "100000", "ce": "1000"}
    return over_lambda + [
        _experiment(
            f"ufm_{loss}",
            "lambda_w_5e-4_lambda_h_5e-5",
            (3,),
            cadence[loss],
            *(*stated, *search[loss], "--trainer.max_steps", steps[loss]),
        )
        for loss in ("mse", "ce")
    ]


def _mlp(quick: bool) -> list[Experiment]:
    """List runs of the two-layer network: several lambda in Figure 2, one that collapses and one that does not in 4."""
    lambdas = {"mse": ("8e-4", "6e-4", "4e-4", "2e-5", "5e-6"), "ce": ("9e-4", "4e-4", "2e-4", "2e-5", "5e-6")}
    in_figure_4 = {"mse": ("6e-4", "5e-6"), "ce": ("4e-4", "5e-6")}
    steps = {"mse": "1200", "ce": "600"} if quick else {"mse": "4000", "ce": "3000"}
    return [
        _experiment(
            f"mlp_{loss}",
            f"lambda_{value}",
            (2, 4) if value in in_figure_4[loss] else (2,),
            "10",
            *("--lambda", value, "--trainer.max_steps", steps[loss]),
        )
        for loss in ("mse", "ce")
        for value in (in_figure_4[loss] if quick else lambdas[loss])
    ]


def _experiment(config: str, variant: str, figures: tuple[int, ...], cadence: str, *words: str) -> Experiment:
    both = ("--optimality.every_n_iterations", cadence, "--neural_collapse.every_n_iterations", cadence)
    fixed = ("--config", config, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    return Experiment(f"{config}_{variant}", figures, (*fixed, *both, *words))
