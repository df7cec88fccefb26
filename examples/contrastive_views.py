"""Supervised contrastive training on two views of each image, with a linear head that learns beside it.

python examples/contrastive_views.py
"""

import torch
from digits import CNN, load, options, report, sgd
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from nclightning import Measurement, Probe


def two_views(samples: list) -> tuple[list[Tensor], Tensor]:
    images, labels = default_collate(samples)
    return [images + 0.2 * torch.randn_like(images) for _ in range(2)], labels


def main(arguments: list[str] | None = None) -> list[Measurement]:
    args = options(__doc__).parse_args(arguments)
    torch.manual_seed(args.seed)
    train, model = DataLoader(load()[0], batch_size=64, shuffle=True, collate_fn=two_views), CNN()
    probe = Probe(model, batch_fn=lambda batch: (torch.cat(batch[0]), batch[1].repeat(2)))  # Each view is a sample.
    optimizer, history = sgd(model), []
    for _ in range(args.epochs):
        for views, labels in train:
            features, both = model.body(torch.cat(views)), labels.repeat(2)
            rows, others = nn.functional.normalize(features, dim=1), ~torch.eye(len(both), dtype=torch.bool)
            log_share = (rows @ rows.T / 0.1).masked_fill(~others, -torch.inf).log_softmax(dim=1)
            loss = -log_share[(both[:, None] == both) & others].mean()
            optimizer.zero_grad()
            (loss + nn.functional.cross_entropy(model.fc(features.detach()), both)).backward()
            optimizer.step()
        history.append(probe.read(train))
    return report(history, args.picture)


if __name__ == "__main__":
    main()
