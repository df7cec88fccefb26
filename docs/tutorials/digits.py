"""A small CNN collapses on scikit-learn's digits: docs/pages.py makes the page digits.md of this script."""

# %% [markdown]
# # Watch a small CNN collapse
#
# A convolutional network learns scikit-learn's digits: 1797 images of 8 x 8 pixels, 10 classes. We measure NC1, NC2 and
# NC3 of the training set and of the test set after each epoch, and read the curves.
#
# ![NC1, NC2, NC3 and the errors against the epoch](images/digits.png)

# %%
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nclightning import Probe

images, labels = load_digits(return_X_y=True)
split = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
train_set, test_set = TensorDataset(train_x, torch.tensor(split[2])), TensorDataset(test_x, torch.tensor(split[3]))

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    *(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU()),
    *(nn.Linear(128, 32), nn.BatchNorm1d(32)),
    nn.Linear(32, 10),
)

# %% [markdown]
# Weight decay is what lets features collapse: without it the loss falls by growing the weights. The loss is the squared
# error on one-hot labels, under which these digits collapse within some tens of epochs; cross-entropy takes longer. The
# step goes down to 0.
#
# `Probe` finds the head, the last linear layer, by itself. It reads the training set in eval mode, and leaves no trace
# in the model. Decisions on the test set are compared with the class means of the *training* set, which the probe
# keeps.

# %%
epochs = 40
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
sets = {"train": DataLoader(train_set, batch_size=512), "test": DataLoader(test_set, batch_size=512)}
probe = Probe(model, measures=("nc1", "nc2", "nc3", "accuracy", "ncc_mismatch"))

history = []
for _ in range(epochs):
    for x, y in loader:
        optimizer.zero_grad()
        (5 * nn.functional.mse_loss(model(x), nn.functional.one_hot(y, 10).float())).backward()
        optimizer.step()
    schedule.step()
    history.append({name: dict(probe.read(data)) for name, data in sets.items()})

# %%
figure = Figure(figsize=(10, 3.4), layout="constrained")
left, middle, right = figure.subplots(1, 3)
x = range(1, epochs + 1)
for axis, title, curves in (
    (left, "training set", [("train", "nc1"), ("train", "nc2"), ("train", "nc3")]),
    (middle, "test set", [("train", "nc1"), ("test", "nc1"), ("test", "nc3")]),
):
    for data, name in curves:
        style = "-" if data == "train" else "--"
        axis.semilogy(x, [each[data][name] for each in history], style, label=f"{name}, {data}")
    axis.set_title(title)
for data, style in (("train", "-"), ("test", "--")):
    right.plot(x, [100 * (1 - each[data]["accuracy"]) for each in history], style, label=f"error, {data}")
    right.plot(x, [100 * each[data]["ncc_mismatch"] for each in history], style, label=f"ncc_mismatch, {data}")
right.set_title("decisions, %")
right.set_yscale("symlog", linthresh=1)
for axis in (left, middle, right):
    axis.set_xlabel("epoch")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig("digits.png", dpi=110)

# %% [markdown]
# ## Reading the curves

# %%
first, last = history[0], history[-1]
done = next(i for i, each in enumerate(history) if each["train"]["accuracy"] == 1)
fell = {name: first["train"][name] / last["train"][name] for name in ("nc1", "nc2", "nc3")}
print("training error 0 in the first half of the run:", done < epochs / 2)
print("factors by which they fall above 10, 3 and 10:", fell["nc1"] > 10, fell["nc2"] > 3, fell["nc3"] > 10)
print("NC1 more than halves after the error is 0:", history[done]["train"]["nc1"] > 2 * last["train"]["nc1"])
print("NC1 of the test set ends more than twice as large:", last["test"]["nc1"] > 2 * last["train"]["nc1"])
print("network and nearest class mean agree on the training set:", last["train"]["ncc_mismatch"] == 0)

# %% [markdown]
# - **The training error is 0 early.** What follows is the *terminal phase of training*: nothing is left to decide, and
#   NC1 to NC3 go on falling. A decision cannot show that.
# - **NC1 is a square**, NC2 and NC3 are not: a hundredth of NC1 corresponds to a tenth of NC2
#   ([values](../numbers/nc1.md)).
# - **The curves end where the step ends.** The step goes down to 0, so the plateau at the end is the schedule and not a
#   limit. To go further, train longer: `examples/lightning_trainer.py --epochs 60` has a wider network and ends below
#   1e-3.
# - **The test set collapses less.** Its features are held against class means of their own. Its NC1 levels out at what
#   the network does not generalise. A plateau of the *training* NC1 at such a level would point at wrong labels,
#   dropout or augmentation: [pitfalls](../numbers/pitfalls.md).
# - **NC2 is that of the head**, and the same for both sets; `nc2_means` is of the class means of each.
# - **`ncc_mismatch` is 0 on the training set** long before collapse. On the test set it need not be.
