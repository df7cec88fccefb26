"""Checkpoints of a run that is over, of Lightning and of torch.save: each loaded into the network and measured.

python examples/old_checkpoints.py
"""

from pathlib import Path

import lightning_trainer
import torch
from digits import CNN, load
from torch.utils.data import DataLoader

from nclightning import Measurement, measure

PREFIX = "network."  # Before the names of the weights, as the LightningModule calls its network.


def read(path: Path, loader: DataLoader) -> Measurement:
    saved = torch.load(path, weights_only=True)
    weights = saved.get("state_dict", saved)  # Lightning keeps optimizer and progress beside them.
    model = CNN()
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in weights.items()})
    return measure(model, loader)


def main(arguments: list[str] | None = None) -> dict[str, Measurement]:
    trainer, module = lightning_trainer.main(arguments)  # The run: it leaves the checkpoint of its last epoch.
    folder = Path(trainer.log_dir)
    torch.save(CNN().state_dict(), folder / "untrained.pt")
    torch.save(module.network.state_dict(), folder / "trained.pt")
    loader = DataLoader(load()[0], batch_size=256)
    found = {path.name: read(path, loader) for path in sorted(folder.rglob("*.pt")) + sorted(folder.rglob("*.ckpt"))}
    for name, values in found.items():
        print(f"{name:24}" + "  ".join(f"{each} {value:.3g}" for each, value in values.items()))
    return found


if __name__ == "__main__":
    main()
