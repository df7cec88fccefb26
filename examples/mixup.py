"""Training on mixed images with soft labels, of which none has a class: measured on the clean training set.

python examples/mixup.py
"""

import lightning as L
import torch
from digits import load, make_trainer, options, read_csv, report
from lightning_trainer import Classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from nclightning.callbacks import NeuralCollapseMonitor


def mixed(samples: list) -> tuple[Tensor, Tensor]:
    images, labels = default_collate(samples)
    share, other = torch.distributions.Beta(0.2, 0.2).sample(), torch.randperm(len(images))
    soft = nn.functional.one_hot(labels, 10).float()
    return share * images + (1 - share) * images[other], share * soft + (1 - share) * soft[other]


class OnMixtures(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def main(arguments: list[str] | None = None) -> tuple[L.Trainer, OnMixtures]:
    args = options(__doc__).parse_args(arguments)
    L.seed_everything(args.seed, verbose=False)
    clean = {"clean": DataLoader(load()[0], batch_size=256)}
    trainer = make_trainer(args, callbacks=[NeuralCollapseMonitor(stages=("val",), datasets=clean)])
    trainer.fit(module := OnMixtures(), DataLoader(load()[0], batch_size=64, shuffle=True, collate_fn=mixed))
    report(read_csv(trainer.log_dir), args.picture)
    return trainer, module


if __name__ == "__main__":
    main()
