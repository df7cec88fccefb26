"""The transformer on two processes: readings of both together against those of one on the same weights.

python examples/ddp.py
"""

import lightning as L
import torch
from digits import NAMES, load, make_trainer, options, report
from torch.utils.data import DataLoader, Subset, default_collate
from transformer import VisionTransformer

from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.functional import class_statistics
from nclightning.metrics import NeuralCollapse
from nclightning.probe.features import capture_features


def main(arguments: list[str] | None = None) -> float:
    """Train on two processes, read on one, and return the largest relative difference of the readings."""
    parser = options(__doc__, epochs=3)
    parser.add_argument("--strategy", default="ddp")
    args = parser.parse_args(arguments)
    L.seed_everything(args.seed, verbose=False)
    train = Subset(load()[0], range(1435))  # Odd: a distributed sampler shows one sample twice.
    model = VisionTransformer(args.epochs)
    trainer = make_trainer(args, [NeuralCollapseMonitor()], devices=2, strategy=args.strategy)
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    both, folder = trainer.callback_metrics, trainer.log_dir  # Both processes must ask for the folder.
    if not trainer.is_global_zero:
        return 0.0
    report(folder)

    images, labels = default_collate(list(train))
    with torch.no_grad():
        features = capture_features(model.eval(), model.head, images)
    metric = NeuralCollapse(10, 64, model.head)
    alone = metric.read(class_statistics(features, labels, 10))
    difference = max(abs(float(both[f"nc/train/{name}"] / alone[name]) - 1) for name in NAMES)
    print(f"largest relative difference from one process: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
