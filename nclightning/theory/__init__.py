"""Closed forms of what the paper predicts. No code is shared with :mod:`nclightning.functional`, which measures."""

from nclightning.problems import Eigenvalue, Solution
from nclightning.theory.problem import UFMProblem
from nclightning.theory.rates import DecayRates

__all__ = ["DecayRates", "Eigenvalue", "Solution", "UFMProblem"]
