"""How many evaluations do optimizers need on each member of the unconstrained feature model? Prints a table.

    python benchmarks/optimizers.py [--members NAME ...] [--optimizers NAME ...] [--seeds N]

Each shipped configuration ``ufm_*.yaml`` is a member, and so are the two problems of the paper with a tenth and a
hundredth of their penalties. All optimizers begin where a fit begins, in float64, and get value and gradient at every
evaluation, of which each counts one. An evaluation within a distance of the optimal set is where that distance is
reached. The table has, over all seeds, the most evaluations to 1e-10 and to 1e-12, and the smallest distance that was
seen where some run ended before it reached 1e-12: the worst of these. A run ends when its optimizer does, or after
40,000 evaluations. Add an optimizer to OPTIMIZERS and a member to MEMBERS.
"""

import argparse
import contextlib
import math
from functools import partial
from typing import NamedTuple

import scipy.optimize
import torch
import yaml
from quiet import settle

from nclightning.configurations import shipped_configs
from nclightning.models import UFM
from nclightning.optim import ArmijoCG, ArmijoGD, ArmijoLBFGS, ArmijoNewtonCG, HeavyBall
from nclightning.problems import Problem

DISTANCES, MOST, SEEDS = (1e-10, 1e-12), 40_000, 5
PATIENCE = 100  # Iterations without a new smallest distance after which an optimizer of others is stopped.


def shipped(name, **changes):
    """Make the UFM of a shipped configuration."""
    arguments = yaml.safe_load(shipped_configs()[name].read_text())["model"]["init_args"] | changes
    if "problem" in arguments:
        return UFM(problem=Problem.from_description(arguments["problem"]))
    del arguments["optimizer"]
    arguments["lambda_"] = arguments.pop("lambda")
    return UFM(**arguments)


MEMBERS = {
    **{name.removeprefix("ufm_"): partial(shipped, name) for name in shipped_configs() if name.startswith("ufm_")},
    "mse, lambda 5e-4": partial(shipped, "ufm_mse", **{"lambda": 5e-4}),
    "ce, lambda 5e-5": partial(shipped, "ufm_ce", **{"lambda": 5e-5}),
}


class Arrived(Exception):
    """Raised where a run need not go on."""


class Counted:
    """Counts evaluations of a model's objective, and sees how near each comes to the optimal set."""

    def __init__(self, model):
        self.model, self.params = model, [p for p in model.parameters() if p.requires_grad]
        self.problem, self.labels = model.problem, model.problem.labels()
        self.line = model.make_closure((torch.arange(len(self.labels)), self.labels), self.params)
        self.evaluations, self.nearest, self.reached = 0, math.inf, {}

    def __call__(self):
        """Set the gradients and return the value."""
        for p in self.params:
            p.grad = None
        value = self.make_closure()
        for p in self.params:
            p.grad = p.grad.clone()  # The line keeps its own.
        self.evaluations += 1
        self._look()
        return value

    @torch.no_grad()
    def _look(self):
        head = self.model.head
        point = head.weight, self.model.features, self.labels, head.bias
        self.nearest = min(self.nearest, float(self.problem.distance(*point, check_labels=False)))
        for distance in DISTANCES:
            if self.nearest <= distance:
                self.reached.setdefault(distance, self.evaluations)
        if len(self.reached) == len(DISTANCES) or self.evaluations >= MOST:
            raise Arrived

    def vector(self):
        return torch.cat([p.detach().flatten() for p in self.params])


def of_ours(make):
    """Step until the search finds no step."""

    def run(objective):
        optimizer = make(objective.params)
        while True:
            optimizer.step(objective)
            if not optimizer.outcome.accepted:
                return

    return run


def of_torch(make):
    """Step until nothing has come nearer for a while."""

    def run(objective):
        optimizer, nearest, waited = make(objective), math.inf, 0
        while waited < PATIENCE:
            optimizer.step(objective)
            waited = 0 if objective.nearest < nearest else waited + 1
            nearest = objective.nearest

    return run


def scipy_lbfgs(objective):
    sizes = [p.numel() for p in objective.params]

    def evaluate(x):
        with torch.no_grad():
            for p, part in zip(objective.params, torch.from_numpy(x).split(sizes), strict=True):
                p.copy_(part.view_as(p))
        value = float(objective())
        return value, torch.cat([p.grad.flatten() for p in objective.params]).numpy()

    options = {"maxiter": MOST, "maxfun": MOST, "ftol": 0.0, "gtol": 0.0}
    scipy.optimize.minimize(evaluate, objective.vector().numpy(), jac=True, method="L-BFGS-B", options=options)


def torch_lbfgs(objective):
    return torch.optim.LBFGS(
        objective.params, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
    )


def heavy_ball(objective):
    optimizer = HeavyBall(objective.params)
    optimizer.tune(objective.problem.mu, objective.problem.smoothness)
    return optimizer


OPTIMIZERS = {
    "ArmijoGD": of_ours(ArmijoGD),
    "ArmijoLBFGS": of_ours(ArmijoLBFGS),
    "ArmijoCG": of_ours(ArmijoCG),
    "ArmijoNewtonCG": of_ours(ArmijoNewtonCG),  # With closures: products are differences of gradients.
    "HeavyBall": of_torch(heavy_ball),
    "scipy L-BFGS-B": scipy_lbfgs,
    "torch LBFGS, strong Wolfe": of_torch(torch_lbfgs),
}


class Row(NamedTuple):
    """Worst of all seeds: evaluations to each distance, infinite where a run did not arrive, and its last distance."""

    evaluations: list[float]
    nearest: float


def worst(member, run, seeds):
    done = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        objective = Counted(MEMBERS[member]())
        with contextlib.suppress(Arrived):
            run(objective)
        done.append(objective)
    evaluations = [max(each.reached.get(distance, math.inf) for each in done) for distance in DISTANCES]
    return Row(evaluations, max(each.nearest for each in done))


def line(member, name, row):
    counts = " | ".join("-" if count == math.inf else str(count) for count in row.evaluations)
    return f"| {member} | {name} | {counts} | {'' if row.nearest <= DISTANCES[-1] else f'{row.nearest:.0e}'} |"


def main(arguments=None):
    """Print one line per member and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", nargs="+", default=list(MEMBERS), choices=list(MEMBERS), metavar="NAME")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args(arguments)
    settle()
    print("| member | optimizer | evaluations to 1e-10 | to 1e-12 | ends at |\n|---|---|---|---|---|")
    for member in given.members:
        for name in given.optimizers:
            print(line(member, name, worst(member, OPTIMIZERS[name], given.seeds)), flush=True)


if __name__ == "__main__":
    main()
