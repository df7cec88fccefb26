"""NC2 where a simplex ETF has no room: docs/pages.py makes the page many_classes.md of this script."""

# %% [markdown]
# # Why NC2 does not fall when K > d + 1
#
# Ten classes need nine dimensions to stand at equal angles. We train the same unconstrained feature model with d = 9
# features and with d = 4, and see what NC1, NC2 and NC3 do where there is not enough room.
#
# ![NC1, NC2 and NC3 for nine and for four features](images/many_classes.png)

# %%
import math

import torch
from matplotlib.figure import Figure

from nclightning import functional as F
from nclightning.objective import Objective
from nclightning.optim import ArmijoLBFGS

K, n = 10, 10
labels = torch.arange(K).repeat_interleave(n)
objective = Objective("ce", lambda_w=1e-3, lambda_h=1e-4)


def train(dim, iterations=300):
    """Return head, statistics and the measures of each iteration."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(K, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    features = torch.randn(K * n, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    optimizer = ArmijoLBFGS([weight, features])

    def closure():
        optimizer.zero_grad()
        value = objective(weight, features, labels)
        value.backward()
        return value

    history = []
    for _ in range(iterations):
        optimizer.step(closure)
        stats = F.class_statistics(features.detach(), labels, K)
        measures = F.within_class_variability(stats), F.etf_deviation(weight.detach()), F.self_duality(stats, weight)
        history.append([*map(float, measures), float(F.duality_difference(stats, weight.detach()))])
    return weight.detach(), stats, history


runs = {dim: train(dim) for dim in (9, 4)}

# %% [markdown]
# The Gram matrix of ten rows in four dimensions has rank 4, and that of a simplex ETF has nine equal eigenvalues. The
# best that rank 4 can do is $\sqrt{2 - 2\sqrt{4/9}}$, the floor.

# %%
floor = math.sqrt(2 - 2 * math.sqrt(4 / 9))
figure = Figure(figsize=(9, 3.4), layout="constrained")
for axis, (dim, (_, _, history)) in zip(figure.subplots(1, 2, sharey=True), runs.items(), strict=True):
    for name, curve in zip(("NC1", "NC2", "NC3", "NC3, difference"), zip(*history, strict=True), strict=True):
        axis.semilogy(curve, "--" if "diff" in name else "-", label=name)
    axis.set_title(f"K = 10 classes, d = {dim}")
    axis.set_xlabel("iteration of L-BFGS")
    axis.spines[["top", "right"]].set_visible(False)
axis.axhline(floor, color="0.5", lw=0.8, ls=":")
axis.text(150, floor * 40, "floor of NC2", color="0.4", fontsize=9)
axis.legend(frameon=False, fontsize=9)
figure.savefig("many_classes.png", dpi=110)

for dim, (*_, history) in runs.items():
    last = ["below 1e-9" if value < 1e-9 else f"{value:.2f}" for value in history[-1]]
    print(f"d = {dim}: NC1 {last[0]}, NC2 {last[1]}, NC3 {last[2]}, NC3 difference {last[3]}")
print(f"floor: {floor:.2f}, reached to 1e-9: {abs(runs[4][2][-1][1] - floor) < 1e-9}")

# %% [markdown]
# With d = 9 all of them fall to round-off. With d = 4:
#
# - **NC1 still vanishes.** Collapse of features to their means needs no room.
# - **NC2 and NC3 stop at the floor**: they compare with an ETF that does not exist. That is no failure of training.
#   Here the floor is reached: the optimum is a tight frame. For other K and d NC2 may end above it.
# - **The difference form of NC3 vanishes.** Head and means are dual, and need no room for that.
#
# `python -m nclightning fit --config ufm_mse --model.init_args.num_classes 8 --model.init_args.feature_dim 3` shows the
# same: the run ends with NC2 and NC3 at their floor.
#
# How good is the arrangement, then? Ask for the *spread* of the directions instead.

# %%
weight, stats, _ = runs[4]
generator = torch.Generator().manual_seed(0)
random = [torch.randn(K, 4, generator=generator, dtype=torch.float64) for _ in range(20)]
energies = [float(F.hyperspherical_energy(rows).mean) for rows in random]
margins = [float(F.one_vs_rest_distance(rows)) for rows in random]
energy, margin = float(F.hyperspherical_energy(weight).mean), float(F.one_vs_rest_distance(weight))
print(f"energy: trained {energy:.3f}, least of 20 random heads {min(energies):.3f}")
print(f"one vs rest: trained {margin:.3f}, largest of 20 random heads {max(margins):.3f}")

# %% [markdown]
# The energy of pairs and the distance of one class from the hull of the others compare with what is possible in d
# dimensions: [many classes](../numbers/many_classes.md) has both. A language model, with more tokens than features, is
# always in this regime.
