"""Lightning Fabric in mixed precision, also on several processes: features of the ordinary forwards of training.

python examples/fabric_loop.py --devices 2
"""

import lightning as L
from digits import CNN, load, loss, options, report, sgd
from torch.utils.data import DataLoader

from nclightning import Measurement, Probe


def main(arguments: list[str] | None = None) -> list[Measurement]:
    parser = options(__doc__)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args(arguments)
    fabric = L.Fabric(accelerator="cpu", devices=args.devices, precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(args.seed, verbose=False)
    model = CNN()
    model, optimizer = fabric.setup(model, sgd(model))
    train = fabric.setup_dataloaders(DataLoader(load()[0], batch_size=64 // args.devices, shuffle=True))
    probe, history = Probe(model), []
    for _ in range(args.epochs):
        with probe.online() as epoch:
            for images, labels in epoch.batches(train):
                optimizer.zero_grad()
                fabric.backward(loss(model(images), labels))
                optimizer.step()
        history.append(epoch.measurement)
        fabric.log_dict(epoch.measurement.tagged("nc/train"))
    if fabric.is_global_zero:
        report(history, args.picture)
    return history


if __name__ == "__main__":
    main()
