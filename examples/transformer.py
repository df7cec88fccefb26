"""A small vision transformer on digits, trained into neural collapse.

python examples/transformer.py --picture digits_transformer.png
"""

import lightning as L
import torch
from digits import accuracy, load, make_trainer, options, report
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nclightning.callbacks import NeuralCollapseMonitor


class VisionTransformer(L.LightningModule):
    """Sixteen patches of 2x2, two layers, the mean over patches, a projection to 64 features, and the head."""

    def __init__(self, epochs: int, dim: int = 32) -> None:
        super().__init__()
        self.epochs = epochs
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, dim))
        layer = nn.TransformerEncoderLayer(dim, nhead=4, dim_feedforward=2 * dim, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2)
        self.project = nn.Sequential(
            *(nn.Linear(dim, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.BatchNorm1d(64)),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.project(self.layers(tokens).mean(dim=1)))

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
    model = VisionTransformer(args.epochs)
    trainer = make_trainer(args, callbacks=[NeuralCollapseMonitor()])  # This is all there is to add.
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    report(trainer.log_dir, args.picture)
    print(f"accuracy: {accuracy(model, train):.2%} in training, {accuracy(model, test):.2%} in test")
    return trainer.log_dir


if __name__ == "__main__":
    main()
