"""Lays the parts of a report out as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from nclightning.errors import UserError
from nclightning.figures.rates import LinearFit, fit_range
from nclightning.figures.summary import PREDICTED
from nclightning.figures.tables import error_bound_constant_of
from nclightning.files import replaced
from nclightning.quantities import measure_named
from nclightning.report.curves import charts_of
from nclightning.report.quantities import label_of
from nclightning.report.recorded import Given, Record, read_records
from nclightning.report.verdicts import Verdict, verdicts_on

__all__ = ["MARK", "render", "write_report"]
