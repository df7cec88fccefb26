"""Hugging Face's Trainer with a vision transformer: one added line, logged where the trainer logs.

python examples/hf_trainer.py
"""

from digits import load, options, report
from torch import Tensor
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from nclightning.integrations.huggingface import NeuralCollapseCallback

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def as_mapping(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return dict(zip(("pixel_values", "labels"), default_collate(samples), strict=True))


def main(arguments: list[str] | None = None) -> Trainer:
    args = options(__doc__).parse_args(arguments)
    set_seed(args.seed)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **LAYERS)
    settings = {"learning_rate": 3e-3, "per_device_train_batch_size": 64, "report_to": "none", "save_strategy": "no"}
    trainer = Trainer(
        ViTForImageClassification(config),
        TrainingArguments(args.folder / "hf", num_train_epochs=args.epochs, use_cpu=True, seed=args.seed, **settings),
        data_collator=as_mapping,
        train_dataset=load()[0],
        callbacks=[NeuralCollapseCallback()],  # This is all there is to add.
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "nc/nc1" in row]
    report([{name.removeprefix("nc/"): value for name, value in row.items()} for row in rows], args.picture)
    return trainer


if __name__ == "__main__":
    main()
