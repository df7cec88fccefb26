"""Hugging Face accelerate, also with accelerate launch: the training set measured after each epoch.

python examples/accelerate_loop.py
"""

from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import CNN, load, loss, options, report, sgd
from torch.utils.data import DataLoader

from nclightning import Measurement, Probe


def main(arguments: list[str] | None = None) -> list[Measurement]:
    args = options(__doc__).parse_args(arguments)
    accelerator = Accelerator(cpu=True)
    set_seed(args.seed)
    model = CNN()
    loader = DataLoader(load()[0], batch_size=64 // accelerator.num_processes, shuffle=True)
    model, optimizer, train = accelerator.prepare(model, sgd(model), loader)
    probe, history = Probe(model), []
    for epoch in range(args.epochs):
        for images, labels in train:
            optimizer.zero_grad()
            accelerator.backward(loss(model(images), labels))
            optimizer.step()
        history.append(probe.read(train))
        accelerator.log(history[-1].tagged("nc/train"), step=epoch)
    if accelerator.is_main_process:
        report(history, args.picture)
    return history


if __name__ == "__main__":
    main()
