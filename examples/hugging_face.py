"""A Hugging Face model: built from a config (nothing is downloaded), saved, loaded, trained, saved.

python examples/hugging_face.py
"""

import tempfile
from pathlib import Path

import torch
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


def build(folder: Path) -> None:
    """A small Llama with a BPE tokenizer learned from the data, saved as any Hugging Face model is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(
        [str(DATA)], trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "base")

        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        tokenizer = HuggingFaceTokenizer.load(str(folder / "base"))
        dataset = PreferenceDataset.from_file(DATA, tokenizer, max_length=256)
        loader = DataLoader(
            dataset, batch_size=16, shuffle=True, collate_fn=PreferenceCollator(dataset.pad_id)
        )

        dpo = DPO(model, loss=[(Sigmoid(beta=0.1), 1.0), (SFT(), 1.0)])
        optimizer = torch.optim.AdamW(dpo.parameters(), lr=3e-4)
        done = 0
        while done < steps:
            for batch in loader:
                loss, metrics = dpo(**batch, return_metrics=True)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if done % 10 == 0:
                    print(f"step {done}: loss {loss:.3f}, accuracy {metrics['rewards/accuracies']:.2f}")
                done += 1
                if done == steps:
                    break

        dpo.policy_model.save_pretrained(folder / "better")  # the policy alone, as transformers saves it
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "better")
        again = AutoModelForCausalLM.from_pretrained(folder / "better")
        prompt = torch.tensor([tokenizer.prompt_ids("What is the capital of Spain?")])
        out = again.generate(prompt, max_new_tokens=12, do_sample=False)
        print("completion:", tokenizer.decode(out[0, prompt.shape[1] :].tolist()))
        return metrics["rewards/accuracies"].item()


if __name__ == "__main__":
    main()
