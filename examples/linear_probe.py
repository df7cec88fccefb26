"""A frozen backbone, trained to tell even digits from odd ones, with a linear probe for all ten.

python examples/linear_probe.py
"""

import torch
from digits import CNN, load, options, report, sgd
from torch import nn
from torch.utils.data import DataLoader

from nclightning import Measurement, Probe


def main(arguments: list[str] | None = None) -> list[Measurement]:
    args = options(__doc__).parse_args(arguments)
    torch.manual_seed(args.seed)
    train, backbone = DataLoader(load()[0], batch_size=64, shuffle=True), CNN(num_classes=2)
    optimizer = sgd(backbone)
    for images, labels in train:  # One epoch of what it was trained for.
        optimizer.zero_grad()
        nn.functional.cross_entropy(backbone(images), labels % 2).backward()
        optimizer.step()

    model = nn.Sequential(backbone.body.requires_grad_(False).eval(), head := nn.Linear(64, 10))
    optimizer, history = torch.optim.Adam(head.parameters(), lr=1e-2), []
    probe = Probe(model, measures=("nc1", "nc2", "nc3", "accuracy", "ncc_accuracy"))
    for _ in range(args.epochs):
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        history.append(probe.read(train))
    return report(history, args.picture)


if __name__ == "__main__":
    main()
