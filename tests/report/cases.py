"""Curves whose end is known, as cases: kind of trend, and values at 0, 1, ..., R - 1."""

import numpy as np

STEPS = np.arange(300.0)
_noise = np.random.default_rng(0).normal(size=300)

CURVES = {
    "straight": ("falling", 10.0 ** (-STEPS / 50)),
    "straight with scatter": ("falling", 10.0 ** (-STEPS / 50 + 0.02 * _noise)),
    "one over t": ("slowing", 1 / (1 + STEPS)),
    "a floor": ("flat", 10.0 ** (-STEPS / 10) + 7.5e-13),
    "a noisy floor": ("flat", 3e-4 * 10.0 ** (0.03 * _noise)),
    "slow and straight": ("falling", 0.5 * 10.0 ** (-STEPS / 3000)),
    "very slow and straight": ("falling", 0.5 * 10.0 ** (-STEPS / 100_000)),
    "one over a logarithm": ("slowing", 1 / np.log(3 + STEPS)),
    "one over t to a floor": ("flat", 0.5 + 1 / (1 + STEPS)),
    "exponentially to a floor": ("flat", 0.5 + 1e-3 * 10.0 ** (-STEPS / 1000)),
    "constant": ("flat", np.full(300, 0.5)),
    "swings": ("oscillating", 10.0 ** np.sin(STEPS / 3)),
    "grows": ("rising", 10.0 ** (STEPS / 100)),
    "a cliff at the end": ("unclear", np.where(STEPS < 290, 1.0, 1e-3)),
    "zero at the end": ("at zero", np.where(STEPS < 299, 1.0, 0.0)),
    "negative at the end": ("negative", np.where(STEPS < 299, 1e-20, -1e-20)),
    "nan only": ("none", np.full(300, np.nan)),
    "nan in the middle": ("falling", np.where((STEPS > 100) & (STEPS < 200), np.nan, 10.0 ** (-STEPS / 50))),
    "every tenth": ("falling", np.where(STEPS % 10 == 0, 10.0 ** (-STEPS / 50), np.nan)),
    "one reading": ("few", np.where(STEPS == 0, 1.0, np.nan)),
    "zeros between": ("falling", np.where(STEPS % 7 == 3, 0.0, 10.0 ** (-STEPS / 50))),
}
