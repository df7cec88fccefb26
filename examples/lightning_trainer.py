"""A LightningModule in a Trainer: one added line.

python examples/lightning_trainer.py --epochs 60 --picture digits_cnn.png
"""

import lightning as L
from digits import CNN, cosine, load, loss, make_trainer, options, read_csv, report, sgd
from torch import Tensor
from torch.utils.data import DataLoader

from nclightning.callbacks import NeuralCollapseMonitor


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = CNN()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> tuple[list, list]:
        return [optimizer := sgd(self)], [cosine(optimizer, self.trainer.max_epochs)]


def main(arguments: list[str] | None = None) -> tuple[L.Trainer, Classifier]:
    args = options(__doc__).parse_args(arguments)
    L.seed_everything(args.seed, verbose=False)
    trainer = make_trainer(args, callbacks=[NeuralCollapseMonitor()])  # This is all there is to add.
    trainer.fit(module := Classifier(), DataLoader(load()[0], batch_size=64, shuffle=True))
    report(read_csv(trainer.log_dir), args.picture)  # What the monitor has logged.
    return trainer, module


if __name__ == "__main__":
    main()
