"""What the paper predicts, in closed form. Shares no code with :mod:`nclightning.functional`, which measures."""

from nclightning.theory.problem import UFMProblem
from nclightning.theory.rates import DecayRates
from nclightning.theory.solutions import Solution
from nclightning.theory.spectrum import Eigenvalue

__all__ = ["DecayRates", "Eigenvalue", "Solution", "UFMProblem"]
