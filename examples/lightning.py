"""Train with PyTorch Lightning: `pip install pytorch-lightning`.

python examples/lightning.py --out runs/lightning
"""

from pathlib import Path

import pytorch_lightning as pl  # in a file of another name `import lightning.pytorch as pl` is the same
import torch
import tyro
from torch.utils.data import DataLoader

from dpo_wrapper import DPO, SFT, Sigmoid
from dpo_wrapper.data import collate_preference, read_examples, split_examples, tokenize_examples
from dpo_wrapper.pretrained import load_pretrained, save_pretrained

DATA = Path(__file__).parent / "data" / "preferences.jsonl"


class LitDPO(pl.LightningModule):
    def __init__(self, dpo, learning_rate):
        super().__init__()
        self.dpo, self.learning_rate = dpo, learning_rate

    def shared_step(self, batch, part):
        loss, metrics = self.dpo(batch, return_metrics=True)
        # weighted by pairs, the means of an epoch are over all of its pairs
        num_pairs = int(metrics["pairs/valid"])
        metrics = {f"{part}/{name}": value for name, value in metrics.items()}
        self.log_dict(metrics, batch_size=num_pairs, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def training_step(self, batch, batch_index):
        return self.shared_step(batch, "train")

    def validation_step(self, batch, batch_index):
        self.shared_step(batch, "eval")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.dpo.policy_model.parameters(), lr=self.learning_rate)


def main(
    model: str = "tiny",
    out: Path = Path("runs/lightning"),
    epochs: int = 2,
    learning_rate: float = 1e-3,
    resume: bool = False,
) -> pl.Trainer:
    """Train on the bundled preferences with PyTorch Lightning.

    Args:
        model: tiny, small or medium (a new decoder), or a Hugging Face model by folder or name.
        out: folder of the checkpoint, and of the trained model in `model/`.
        epochs: passes over the data.
        learning_rate: of AdamW; a pretrained model wants about 1e-6.
        resume: continue from the last checkpoint in the folder.
    """
    pl.seed_everything(0)
    pretrained = load_pretrained(model, None, 256)
    splits = split_examples(read_examples(DATA).examples, fraction=0.1)
    train, evaluation = (
        DataLoader(
            tokenize_examples(split, pretrained.tokenizer, 256).examples,
            batch_size=16,
            shuffle=split is splits[0],
            collate_fn=collate_preference,
        )
        for split in splits
    )
    dpo = DPO(pretrained.model, loss=[(Sigmoid(beta=0.1), 1.0), (SFT(), 1.0)])
    checkpoint = pl.callbacks.ModelCheckpoint(out, save_last=True)  # of policy, reference and optimizer
    # accumulate_grad_batches takes the mean over micro-batches: exact if all have as many pairs
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir=out, callbacks=[checkpoint])
    trainer.fit(
        LitDPO(dpo, learning_rate), train, evaluation, ckpt_path=out / "last.ckpt" if resume else None
    )
    save_pretrained(pretrained, dpo.policy_model, out / "model")
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
