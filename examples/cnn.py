"""A convolutional network on digits, trained into neural collapse.

python examples/cnn.py --picture digits_cnn.png
"""

import lightning as L
import torch
from digits import accuracy, load, make_trainer, options, report
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nclightning.callbacks import NeuralCollapseMonitor


class CNN(L.LightningModule):
    """Two convolutions, three layers, 64 features and the head ``fc``; mean squared error on one-hot labels."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.BatchNorm1d(64)),
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return 5 * nn.functional.mse_loss(self(images), nn.functional.one_hot(labels, 10).float())

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs),
        }


def main(arguments: list[str] | None = None) -> str:
    """Train, print a table, and return the folder of the readings."""
    args = options(__doc__, epochs=60).parse_args(arguments)
    L.seed_everything(args.seed, verbose=False)
    train, test = load()
    model = CNN(args.epochs)
    trainer = make_trainer(args, callbacks=[NeuralCollapseMonitor()])  # This is all there is to add.
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    report(trainer.log_dir, args.picture)
    print(f"accuracy: {accuracy(model, train):.2%} in training, {accuracy(model, test):.2%} in test")
    return trainer.log_dir


if __name__ == "__main__":
    main()
