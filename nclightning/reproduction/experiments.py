"""What is run for each figure of the paper."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ERROR_BOUND", "FIGURES", "OPTIMIZERS", "Experiment", "experiments"]

FIGURES = (1, 2, 3, 4)
ERROR_BOUND = "error_bound"  # A study of its own, which trains no run.
OPTIMIZERS = "optimizers"  # A comparison of our own, which is run only when asked for.
# Options common to all runs of a sweep; the rest is in the shipped configurations.
_MODEL, _OPTIMIZER = "--model.init_args", "--model.init_args.optimizer.init_args"
# A mild backtracking factor keeps the accepted steps, and with them the slope of a curve, nearly constant.
_MILD = (f"{_OPTIMIZER}.shrink", "0.7", f"{_OPTIMIZER}.grow", "2")


@dataclass(frozen=True)
class Experiment:
    """One run.

    Attributes:
        name: Of its folder.
        figures: That it is drawn in.
        words: What follows ``python -m nclightning fit``, apart from where to write.
    """

    name: str
    figures: tuple[int | str, ...]
    words: tuple[str, ...]


def experiments(figures: tuple[int, ...] = FIGURES, quick: bool = False) -> list[Experiment]:
    """List the runs behind figures, in the order of their curves, the long ones last.

    Args:
        figures: Out of 1, 2, 3, 4.
        quick: Fewer and shorter ones.

    Returns:
        The runs.
    """
    return [each for each in (*_ufm(quick), *_mlp(quick)) if set(each.figures) & set(figures)]


def _ufm(quick: bool) -> list[Experiment]:
    """The unconstrained feature model: Figure 1 over lambda, Figure 3 at the penalties that it states."""
    lambdas = ("5e-3", "2e-3") if quick else ("5e-3", "2e-3", "1e-3", "5e-4", "2e-4")
    cadence = {"mse": "20", "ce": "2"}
    sweep = [
        _experiment(f"ufm_{loss}", f"lambda_{value}", (1,), cadence[loss], "--lambda", value, *_MILD)
        for loss in ("mse", "ce")
        for value in lambdas
    ]
    # Parts of the features that the head does not see decay slowest and bend NC2 where their square takes over: from
    # small features on, below 1e-10. For MSE a step that varies disturbs NC3.
    stated = (f"{_MODEL}.lambda_w", "5e-4", f"{_MODEL}.lambda_h", "5e-5", f"{_MODEL}.init_scale", "0.01")
    search = {"mse": (f"{_OPTIMIZER}.grow", "1", f"{_OPTIMIZER}.initial_step", "1.4"), "ce": _MILD}
    steps = {"mse": "80000" if quick else "100000", "ce": "1000"}
    return sweep + [
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
    """The two-layer network, Figure 2 over lambda, Figure 4 at one lambda that works and one that does not."""
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
