"""Train a Hugging Face model on preferences and save it. Nothing is downloaded: the model is built here.

python examples/hugging_face.py
"""

import tempfile
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dpo_wrapper import DPO, SFT, PreferenceCollator, PreferenceDataset, Sigmoid
from dpo_wrapper.data import HuggingFaceTokenizer

DATA = Path(__file__).parent / "data" / "preferences.jsonl"


def build_model(folder: Path) -> None:
    """Save a new, small Llama and a BPE tokenizer that is trained on the data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(DATA)], trainer)
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast_tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast_tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main(steps: int = 30) -> float:
    """Train a new, small Llama on the bundled preferences; returns the reward accuracy of the last batch.

    Args:
        steps: number of optimizer steps.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder / "base")

        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        tokenizer = HuggingFaceTokenizer.load(str(folder / "base"))
        dataset = PreferenceDataset.from_file(DATA, tokenizer, max_length=256)
        loader = DataLoader(
            dataset, batch_size=16, shuffle=True, collate_fn=PreferenceCollator(dataset.pad_id)
        )

        dpo = DPO(model, loss=[(Sigmoid(beta=0.1), 1.0), (SFT(), 1.0)])
        optimizer = torch.optim.AdamW(dpo.parameters(), lr=3e-4)
        epochs = chain.from_iterable(repeat(loader))
        for step, batch in enumerate(islice(epochs, steps)):
            loss, metrics = dpo(**batch, return_metrics=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                print(f"step {step}: loss {loss:.3f}, accuracy {metrics['rewards/accuracies']:.2f}")

        dpo.policy_model.save_pretrained(folder / "trained")  # the policy without the reference
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "trained")
        trained = AutoModelForCausalLM.from_pretrained(folder / "trained")
        prompt = torch.tensor([tokenizer.encode_prompt("Repeat bell boat.")])
        output = trained.generate(prompt, max_new_tokens=12, do_sample=False)
        print("completion:", tokenizer.decode(output[0, prompt.shape[1] :].tolist()))
        return metrics["rewards/accuracies"].item()


if __name__ == "__main__":
    tyro.cli(main)
