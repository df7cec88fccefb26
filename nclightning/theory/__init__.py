"""What the paper predicts, in closed form. Shares no code with :mod:`nclightning.functional`, which measures."""

from nclightning.theory.problem import UFMProblem
from nclightning.theory.solutions import Solution

__all__ = ["Solution", "UFMProblem"]
