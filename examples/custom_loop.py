"""A training loop of your own: language modelling with AutoregressiveWrapper, then DPO, on the same model.

python examples/custom_loop.py
"""

from itertools import chain, islice, repeat
from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from dpo_wrapper import DPO, PreferenceCollator, PreferenceDataset
from dpo_wrapper.data import ByteTokenizer

DATA = Path(__file__).parent / "data" / "preferences.jsonl"


def main(sft_steps: int = 60, dpo_steps: int = 20, batch_size: int = 16) -> float:
    """Train a new decoder on the bundled preferences; returns the reward accuracy of the last batch.

    Args:
        sft_steps: optimizer steps of language modelling.
        dpo_steps: optimizer steps on preferences.
        batch_size: pairs of a step.
    """
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    dataset = PreferenceDataset.from_file(DATA, tokenizer, max_length=256)
    collate = PreferenceCollator(tokenizer.pad_id)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, collate_fn=collate, drop_last=True)

    def first_batches(count: int):
        epochs = chain.from_iterable(repeat(loader))
        return islice(epochs, count)

    layers = Decoder(dim=128, depth=4, heads=2, rotary_pos_emb=True, attn_flash=True)
    model = TransformerWrapper(
        num_tokens=tokenizer.vocab_size, max_seq_len=256, use_abs_pos_emb=False, attn_layers=layers
    )

    # 1. language modelling on the prompt and the preferred completion
    language_model = AutoregressiveWrapper(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step, batch in enumerate(first_batches(sft_steps)):
        preferred_mask, _ = batch["seq_mask"]
        targets = batch["preferred_seq"].masked_fill(~preferred_mask, language_model.ignore_index)
        loss = language_model(targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"language modelling, step {step}: loss {loss.item():.3f}")

    # 2. preferences: DPO makes a frozen copy of the model as it is now, the reference
    dpo = DPO(model, beta=0.1)
    optimizer = torch.optim.AdamW(dpo.parameters(), lr=1e-4)
    for step, batch in enumerate(first_batches(dpo_steps)):
        loss, metrics = dpo(**batch, return_metrics=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == dpo_steps - 1:
            print(f"preferences, step {step}: loss {loss:.3f}, accuracy {metrics['rewards/accuracies']:.2f}")
    return metrics["rewards/accuracies"].item()


if __name__ == "__main__":
    tyro.cli(main)
