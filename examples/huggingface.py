"""An image classifier of Hugging Face transformers, built from a config, with its mappings as batches.

python examples/huggingface.py
"""

import lightning as L
import torch
from digits import load, make_trainer, options, report
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from transformers import ViTConfig, ViTForImageClassification

from nclightning.callbacks import NeuralCollapseMonitor


class Classifier(L.LightningModule):
    """The usual wrapper: the model takes the batch by keyword and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ViTForImageClassification(
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                num_labels=10,
            )
        )

    def forward(self, **batch: Tensor) -> object:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)


def as_mapping(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Collate samples as an image processor of transformers would."""
    images, labels = default_collate(samples)
    return {"pixel_values": images, "labels": labels}


def main(arguments: list[str] | None = None) -> tuple[L.Trainer, Classifier]:
    """Train, print a table, and return trainer and module."""
    args = options(__doc__, epochs=30).parse_args(arguments)
    L.seed_everything(args.seed, verbose=False)
    model = Classifier()
    trainer = make_trainer(args, callbacks=[NeuralCollapseMonitor()])  # Head and labels are found.
    trainer.fit(model, DataLoader(load()[0], batch_size=64, shuffle=True, collate_fn=as_mapping))
    report(trainer.log_dir, args.picture)
    return trainer, model


if __name__ == "__main__":
    main()
