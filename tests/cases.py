"""Problems that the theory is tested on. Add a case here."""

from nclightning.theory import UFMProblem


def at_strength(loss, sizes, kq, ratio):
    """Build the problem with ``K q = kq`` and feature to weight ratio ``ratio``."""
    K, n, d = sizes
    q = kq / K
    return UFMProblem(loss, K, n, d, lambda_w=q * ratio, lambda_h=q / (n * ratio))


# (K, n, d): two classes, one sample per class, d = K - 1, d = K, d much larger.
SIZES = [(2, 1, 1), (2, 3, 4), (3, 2, 2), (4, 3, 6), (5, 1, 4), (10, 10, 20)]
COLLAPSED = [
    at_strength(loss, sizes, kq, c) for loss in ("mse", "ce") for sizes in SIZES for kq, c in ((0.05, 3.0), (0.6, 0.5))
]
# MSE with fewer dimensions than an ETF needs.
LOW_RANK = [
    at_strength("mse", sizes, kq, c)
    for sizes, kq, c in (((3, 2, 1), 0.3, 1.0), ((6, 2, 3), 0.1, 2.0), ((10, 3, 8), 0.6, 0.5))
]
# At and above the threshold the optimum is zero.
ZERO = [
    at_strength(loss, sizes, kq, 2.0)
    for loss in ("mse", "ce")
    for sizes in ((3, 2, 2), (4, 3, 6))
    for kq in (1.0, 1.5, 40.0)
] + [at_strength("mse", (6, 2, 3), 2.0, 0.5)]
ALL = COLLAPSED + LOW_RANK + ZERO

# For the spectrum: small enough for a dense Hessian, far below, near, at and above the threshold, either penalty the
# larger. With c = 1 the penalties are the paper's, lambda_w = n lambda_h.
_SPECTRUM_SIZES = [(2, 1, 1), (2, 2, 2), (2, 3, 4), (3, 1, 2), (3, 2, 5), (4, 1, 3), (4, 3, 6), (5, 2, 4), (5, 1, 9)]
SPECTRUM = [
    at_strength(loss, sizes, kq, c)
    for loss, every in (
        ("mse", [*_SPECTRUM_SIZES, (3, 2, 1), (4, 1, 2), (6, 2, 3), (5, 1, 1)]),
        ("ce", _SPECTRUM_SIZES),
    )
    for sizes in every
    for kq in (0.02, 0.3, 0.9, 0.999, 1.0, 1.7)
    for c in (0.3, 1.0, 4.0)
]

# For the spectrum in 70 digits: eigenvalues 1e15 apart, thresholds 1e-12 away.
_EXTREME = [
    ("ce", (4, 1, 3), 1 - 1e-10, 1e2),
    ("ce", (4, 1, 3), 1e-6, 1.0),
    ("ce", (4, 1, 3), 1e-12, 1e3),
    ("ce", (3, 2, 3), 1 - 1e-6, 1e-3),
    ("ce", (5, 1, 4), 0.1, 1e3),
    ("ce", (3, 2, 2), 0.5, 1e-4),
    ("ce", (2, 2, 2), 1 - 1e-12, 10.0),
    ("ce", (3, 2, 2), 1 + 1e-9, 5.0),
    ("mse", (3, 2, 3), 1 - 1e-10, 1e3),
    ("mse", (3, 1, 2), 1e-8, 0.1),
    ("mse", (4, 1, 2), 1e-4, 1e3),
    ("mse", (3, 1, 2), 1 + 1e-9, 0.01),
]
EXTREME = [at_strength(*case) for case in _EXTREME]


def name_of(problem):
    return (
        f"{problem.loss}-K{problem.num_classes}-n{problem.samples_per_class}-d{problem.feature_dim}"
        f"-Kq{problem.num_classes * problem.q:.3g}"
    )
