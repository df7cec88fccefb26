"""NC1 of every layer: docs/pages.py makes the page depth.md of this script."""

# %% [markdown]
# # Collapse through depth
#
# Neural collapse is a statement about the last layer. What do the layers before it do? We train a network of eight
# layers on inputs that overlap, and measure NC1 of every layer on the way.
#
# ![NC1 of each layer before and after training](images/depth.png)

# %%
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import nn

from nclightning import Probe

generator = torch.Generator().manual_seed(0)
labels = torch.arange(6).repeat_interleave(100)
means = torch.randn(6, 30, generator=generator, dtype=torch.float64)
inputs = means[labels] + 1.0 * torch.randn(600, 30, generator=generator, dtype=torch.float64)
data = [(inputs, labels)]

torch.manual_seed(0)
depth, width = 8, 64
widths = [30] + [width] * depth
layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths)]
model = nn.Sequential(*layers, nn.Linear(width, 6)).double()

# %% [markdown]
# `layers=` names further modules. Each is read as `<layer>/nc1` and `<layer>/nc1_cdnv`, and by `<layer>/ncc_accuracy`:
# would the nearest class mean decide rightly already here?

# %%
names = [str(i) for i in range(depth)]
probe = Probe(model, layers=names)


def by_layer(measure):
    """Return a measure of each layer."""
    found = probe.read(data)
    return [found[f"{name}/{measure}"] for name in names]


model.train()
with torch.no_grad():
    for _ in range(30):
        model(inputs)  # BatchNorm learns its running statistics; no weight changes.
curves = {"initialised": by_layer("nc1")}
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-3)
for step in range(1, 401):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    if step in (20, 100, 400):
        curves[f"after {step} steps"] = by_layer("nc1")

# %%
figure = Figure(figsize=(5.5, 3.6), layout="constrained")
axis = figure.subplots()
for (name, values), style in zip(curves.items(), ("o:", "s-.", "^--", "D-"), strict=True):
    axis.semilogy(range(1, depth + 1), values, style, ms=4, label=name)
axis.set_xlabel("layer")
axis.set_ylabel("NC1")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, fontsize=9)
figure.savefig("depth.png", dpi=110)

before, after = curves["initialised"], curves["after 400 steps"]
print("before training NC1 grows from layer to layer:", all(b > a for a, b in pairwise(before)))
print("after training it falls from layer to layer:", all(b < a for a, b in pairwise(after)))
print("and by more than a factor of 50 in all:", after[0] > 50 * after[-1])
print("the second half of the layers does more than the first:", after[3] / after[7] > after[0] / after[3])

# %% [markdown]
# Before training each random layer mixes the classes more: NC1 grows with depth. After training each layer separates
# them further. Where a curve is a straight line on the logarithmic axis, each layer does the same share, as He and Su
# (2023) found in trained networks. Where it is flat, layers do no work. Here the last layers do most of it, and the
# earlier curves show that it begins there.
#
# A decision does not show any of this. The nearest class mean of *every* layer decides nearly all training samples
# rightly (Galanti et al., 2022, call the first such layer the effective depth):

# %%
print("share of right decisions above 0.97 at each layer:", min(by_layer("ncc_accuracy")) > 0.97)

# %% [markdown]
# The same works for any model: pass dotted names of its modules, with `layer_pooling="mean"` for maps and sequences. In
# a Lightning `Trainer` it is `NeuralCollapseMonitor(layers=...)`, for Hugging Face
# `NeuralCollapseCallback(layers=...)`.
