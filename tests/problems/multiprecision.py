"""Losses and their derivatives in the precision of mpmath."""

import mpmath
from mpmath import mpf


def softplus(z):
    return mpmath.log1p(mpmath.exp(z)) if z < 0 else z + mpmath.log1p(mpmath.exp(-z))


def cross_entropy(z, y, loss):
    offset = [0] * len(z) if loss.offset is None else [mpf(o) for o in loss.offset.tolist()]
    weights = [1] * len(z) if loss.class_weights is None else [mpf(w) for w in loss.class_weights.tolist()]
    z, y = [a + o for a, o in zip(z, offset, strict=True)], [a * w for a, w in zip(y, weights, strict=True)]
    top = max(z)
    total = mpmath.fsum(mpmath.exp(a - top) for a in z)
    value = mpmath.fsum(b * (top + mpmath.log(total) - a) for a, b in zip(z, y, strict=True))
    mass = mpmath.fsum(y)
    return value, [mass * mpmath.exp(a - top) / total - b for a, b in zip(z, y, strict=True)]


def binary_cross_entropy(z, y, loss):
    value = mpmath.fsum(softplus(a) - a * b for a, b in zip(z, y, strict=True))
    return value, [1 / (1 + mpmath.exp(-a)) - b for a, b in zip(z, y, strict=True)]


def squared_error(z, y, loss):
    off = [a - b for a, b in zip(z, y, strict=True)]
    return mpmath.fsum(a * a for a in off) / 2, off


def squared_hinge(z, y, loss):
    off = [max(1 - a * b, mpf(0)) for a, b in zip(z, y, strict=True)]
    return mpmath.fsum(a * a for a in off) / 2, [-a * b for a, b in zip(off, y, strict=True)]


LOSSES = {
    "CrossEntropy": cross_entropy,
    "BinaryCrossEntropy": binary_cross_entropy,
    "SquaredError": squared_error,
    "SquaredHinge": squared_hinge,
}
