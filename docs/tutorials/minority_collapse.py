"""Minority collapse, predicted and trained: docs/pages.py makes the page minority_collapse.md of this script."""

# %% [markdown]
# # Minority collapse: theory and training
#
# Five classes of 20 samples, and five of fewer. As the imbalance grows, the head's rows of the small classes come
# closer to each other, and beyond a threshold they are the same: the network cannot tell the small classes apart at all
# (Fang et al., 2021). The theory knows the curve; training lands on it.
#
# ![Cosine of two small classes against the imbalance, theory and training](images/minority_collapse.png)

# %%
import torch
from matplotlib.figure import Figure

from nclightning.optim import ArmijoLBFGS
from nclightning.problems import unbalanced_ce


def problem_of(small, large=20):
    """Return the problem of five large and five small classes."""
    return unbalanced_ce([large] * 5 + [small] * 5, feature_dim=10, lambda_w=4e-2, lambda_h=1e-2)


def angles(weight):
    """Return cosines of two large, two small, and a large and a small class."""
    unit = torch.nn.functional.normalize(weight.detach().double(), dim=1)
    cosines = unit @ unit.T
    return float(cosines[0, 1]), float(cosines[5, 6]), float(cosines[0, 5])


sizes = [20, 16, 12, 10, 8, 6, 5, 4, 3, 2]
theory = [angles(problem_of(size).random_optimum(torch.Generator().manual_seed(0))[0]) for size in sizes]

# %% [markdown]
# `random_optimum` is one point of the set of optima; cosines are the same at all of them. No formula is known: a solver
# finds the optimum, and a dual certificate proves it.

# %%
worst = max(problem_of(size).optimum.duality_gap for size in sizes)
print("every optimum is certified to 1e-10:", worst < 1e-10)

# %% [markdown]
# Now train: head and features as free variables, from a random start, without any knowledge of the theory.


# %%
def train(problem):
    """Return head and features at the end of a descent."""
    generator = torch.Generator().manual_seed(1)
    labels = problem.labels()
    weight, features = (torch.randn(rows, 10, generator=generator).double() for rows in (10, len(labels)))
    weight.requires_grad_()
    features.requires_grad_()
    optimizer = ArmijoLBFGS([weight, features])

    def closure():
        optimizer.zero_grad()
        value = problem.value(weight, features, labels)
        value.backward()
        return value

    for _ in range(400):
        optimizer.step(closure)
    return weight, features


checked = [20, 12, 8, 5, 3]
trained = [angles(train(problem_of(size))[0]) for size in checked]
predicted = [theory[sizes.index(size)] for size in checked]
off = (torch.tensor(trained) - torch.tensor(predicted)).abs().max()
print("cosines of training and theory agree to 1e-3:", bool(off < 1e-3))

# %%
figure = Figure(figsize=(5.5, 3.6), layout="constrained")
axis = figure.subplots()
names = ("two large classes", "two small classes", "a large and a small one")
for j, (name, color) in enumerate(zip(names, ("#0072B2", "#D55E00", "#009E73"), strict=True)):
    axis.plot([20 / size for size in sizes], [each[j] for each in theory], color=color, label=name)
    axis.plot([20 / size for size in checked], [each[j] for each in trained], "x", color=color)
axis.plot([], [], "x", color="0.4", label="trained")
axis.set_xscale("log")
axis.set_xticks([1, 2, 4, 10], ["1", "2", "4", "10"])
axis.minorticks_off()
axis.set_xlabel("samples of a large class over samples of a small one")
axis.set_ylabel("cosine between rows of the head")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, fontsize=9)
figure.savefig("minority_collapse.png", dpi=110)

print("ratio  large  small  mixed")
for size, values in zip(sizes, theory, strict=True):
    print(f"{20 / size:5.1f}", *(f"{value:6.2f}" for value in values))

# %% [markdown]
# At ratio 1 all cosines are -1/9, those of a simplex ETF. Then the small classes approach each other; where their
# cosine is 1 they have merged. Classes of n samples merge once $n \le N^2 \lambda_W \lambda_H$:

# %%
print("samples  threshold  merged by the rule  in the optimum")
for size, (_, cosine, _) in zip(sizes, theory, strict=True):
    threshold = (5 * (20 + size)) ** 2 * 4e-2 * 1e-2
    print(f"{size:7} {threshold:10.2f}  {size <= threshold!s:>18}  {cosine > 1 - 1e-6!s:>14}")

# %% [markdown]
# What to read in a network of your own: `nc2` of the head is *not* 0 at this optimum, and its growth is the imbalance
# and not a lack of training. `nc1_cdnv_worst` and `per_class()` name the pair that merges. The [optimality
# gap](../numbers/optimality.md) does vanish. [Class weights](../problems/weighted_ce.md) and [adjusted
# logits](../problems/logit_adjusted_ce.md) change the optimum.
