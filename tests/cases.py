"""Problems that the theory is tested on. Add a case here."""

from nclightning.theory import UFMProblem


def _problem(loss, sizes, kq, ratio):
    """Build the problem with ``K q = kq`` and feature to weight ratio ``ratio``."""
    K, n, d = sizes
    q = kq / K
    return UFMProblem(loss, K, n, d, lambda_w=q * ratio, lambda_h=q / (n * ratio))


# (K, n, d): two classes, one sample per class, d = K - 1, d = K, d much larger.
SIZES = [(2, 1, 1), (2, 3, 4), (3, 2, 2), (4, 3, 6), (5, 1, 4), (10, 10, 20)]
COLLAPSED = [
    _problem(loss, sizes, kq, c) for loss in ("mse", "ce") for sizes in SIZES for kq, c in ((0.05, 3.0), (0.6, 0.5))
]
# MSE with fewer dimensions than an ETF needs.
LOW_RANK = [
    _problem("mse", sizes, kq, c)
    for sizes, kq, c in (((3, 2, 1), 0.3, 1.0), ((6, 2, 3), 0.1, 2.0), ((10, 3, 8), 0.6, 0.5))
]
# At and above the threshold the optimum is zero.
ZERO = [
    _problem(loss, sizes, kq, 2.0)
    for loss in ("mse", "ce")
    for sizes in ((3, 2, 2), (4, 3, 6))
    for kq in (1.0, 1.5, 40.0)
] + [_problem("mse", (6, 2, 3), 2.0, 0.5)]
ALL = COLLAPSED + LOW_RANK + ZERO


def name_of(problem):
    return (
        f"{problem.loss}-K{problem.num_classes}-n{problem.samples_per_class}-d{problem.feature_dim}"
        f"-Kq{problem.num_classes * problem.q:.3g}"
    )
