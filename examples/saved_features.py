"""Features that were written to a file: measured without the model.

python examples/saved_features.py
"""

import numpy as np
import torch
from digits import CNN, load, loss, options, sgd
from torch.utils.data import DataLoader

from nclightning import Measurement, measure


def main(arguments: list[str] | None = None) -> Measurement:
    args = options(__doc__).parse_args(arguments)
    torch.manual_seed(args.seed)
    train, model = load()[0], CNN()
    optimizer = sgd(model)
    for _ in range(args.epochs):
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()

    images, labels = train.tensors
    with torch.no_grad():
        features = model.eval().body(images)
    head = {name: value.detach().numpy() for name, value in model.fc.named_parameters()}  # weight and bias
    np.savez(args.folder / "features.npz", features=features.numpy(), labels=labels.numpy(), **head)

    found = measure(**np.load(args.folder / "features.npz"))
    print(found)
    return found


if __name__ == "__main__":
    main()
