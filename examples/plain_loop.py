"""A training loop of your own: training and test set measured after each epoch, decisions by training class means.

python examples/plain_loop.py
"""

import torch
from digits import CNN, cosine, load, loss, options, report, sgd
from torch.utils.data import DataLoader

from nclightning import Measurement, Probe


def main(arguments: list[str] | None = None) -> list[dict[str, Measurement]]:
    args = options(__doc__).parse_args(arguments)
    torch.manual_seed(args.seed)
    train, test = (DataLoader(data, batch_size=64, shuffle=True) for data in load())
    model = CNN()
    optimizer = sgd(model)
    schedule = cosine(optimizer, args.epochs)
    probe = Probe(model, measures=("nc1", "nc2", "nc3", "accuracy", "ncc_accuracy"))
    history = []
    for _ in range(args.epochs):
        for images, labels in train:
            optimizer.zero_grad()
            loss(model(images), labels).backward()
            optimizer.step()
        schedule.step()
        history.append(probe.read({"train": train, "test": test}))
        # wandb.log(history[-1]["train"].tagged("nc/train")), or any other logger: the values are floats by tag.
    report([found["train"] for found in history], args.picture)
    print(f"in test: {dict(history[-1]['test'])}")
    return history


if __name__ == "__main__":
    main()
