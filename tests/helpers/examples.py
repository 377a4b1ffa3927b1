"""The files of examples/ in tests."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dpo_wrapper import DPO, SFT, Sigmoid
from dpo_wrapper.data import ByteTokenizer, read_examples, tokenize_examples
from helpers.runs import BUNDLED, ROOT

EXAMPLES = ROOT / "examples"


def load_example(name: str) -> ModuleType:
    """An example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"examples_{Path(name).name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tied_llama() -> Any:
    """A new, small Llama with tied weights; always the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocab_size = ByteTokenizer().vocab_size
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **sizes))


def preference_trainer(
    out: Path, num_rows: int = 12, *, lora: bool = False, callbacks: Any = None, **arguments: Any
) -> Any:
    """The `PreferenceTrainer` of examples/hf_trainer.py around a new, small Llama.

    It trains on the first rows of the bundled data, evaluates on the next five, and logs each step.
    """
    from transformers import TrainingArguments, set_seed

    policy = tied_llama()
    if lora:
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(target_modules=["q_proj", "v_proj"]))
    rows = tokenize_examples(read_examples(BUNDLED).examples[: num_rows + 5], ByteTokenizer(), 48).examples
    defaults = {"use_cpu": True, "report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_steps": 0.5}
    dpo = DPO(policy, loss=[(Sigmoid(beta=0.1), 1.0), (SFT(), 1.0)])
    set_seed(0)
    return load_example("hf_trainer").PreferenceTrainer(
        dpo,
        TrainingArguments(str(out), **{**defaults, **arguments}),
        train_dataset=rows[:num_rows],
        eval_dataset=rows[num_rows:],
        callbacks=callbacks,
    )
