"""Tiny models with trained adapters, and exports of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.run import run_export
from helpers.models import seeded


def save_trained_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter of PEFT that changes what its base says, as if it had been trained."""
    import peft
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    with seeded(0):
        model = AutoModelForCausalLM.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def export_to(out: Path, model: Path, *formats: Any, **options: Any) -> int:
    """How many exports differ; two short prompts are compared by 4 tokens each."""
    options = {"prompts": ("Hello", "def f(x):"), "num_tokens": 4} | options
    return run_export(ExportConfig(model=str(model), to=formats, out=out, **options))


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text(encoding="utf-8"))


def flip_lowest_bit(folder: Path) -> str:
    """Change one number of an export as little as can be; returns the name of its tensor."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name or "to_q" in name)
    width = {2: torch.int16, 4: torch.int32}[tensors[name].element_size()]
    tensors[name].view(-1)[3:4].view(width).bitwise_xor_(1)
    save_file(tensors, file, metadata={"format": "pt"})
    return name
