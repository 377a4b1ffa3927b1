"""What the comparisons with TRL share: data, models, and losses with their gradients."""

import copy
from functools import partial
from types import SimpleNamespace

import torch
from torch import Generator, Tensor, nn

from dpo_wrapper import DPO, UnpairedBatch
from helpers.models import VOCAB, ZOO
from helpers.ranked_batches import rows_of_ids

LENGTHS = ((3, 5, 2), (1, 4, 7), (6, 1, 3), (2, 8, 8), (4, 3, 1))
"""Numbers of tokens of prompt, chosen and rejected."""
LossAndGrads = tuple[Tensor, list[Tensor]]
PAIR = {"prompt": "a", "chosen": "a", "rejected": "b"}


def random_ids() -> list[tuple[list[int], list[int], list[int]]]:
    """Ids of prompt, chosen and rejected for each pair."""
    generator = Generator().manual_seed(0)
    return [
        tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths)
        for lengths in LENGTHS
    ]


def build_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="</s>", eos_token="</s>"
    )


def build_models() -> tuple[nn.Module, nn.Module]:
    """A policy, and a reference that is near it."""
    reference = ZOO["hf-llama"](0).eval()
    policy = copy.deepcopy(reference)
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


def build_trainer(trainer: type, config: type, folder, policy: nn.Module, row: dict, **kwargs):
    """One of TRL's trainers, with `row` as its data; its model is in eval mode."""
    from datasets import Dataset

    arguments = config(
        output_dir=str(folder),
        max_length=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    data = Dataset.from_list([row] * 2)
    built = trainer(
        model=policy, args=arguments, train_dataset=data, processing_class=build_tokenizer(), **kwargs
    )
    built.model.eval()
    return built


def build_dpo_trainer(folder) -> SimpleNamespace:
    """TRL's DPOTrainer with the data of `random_ids` as `inputs`, and its `policy` and `reference`."""
    from trl import DPOConfig, DPOTrainer

    policy, reference = build_models()
    # weighting, so that it can be switched on later
    config = partial(DPOConfig, use_weighting=True, disable_dropout=True)
    trainer = build_trainer(DPOTrainer, config, folder, policy, PAIR, ref_model=reference)
    rows = [{"prompt_ids": x, "chosen_ids": y, "rejected_ids": z} for x, y, z in random_ids()]
    inputs = trainer.data_collator(rows)
    return SimpleNamespace(trainer=trainer, inputs=inputs, policy=policy, reference=reference)


def build_kto_trainer(folder, policy: nn.Module, reference: nn.Module):
    """TRL's KTOTrainer with weights 1.5 and 0.5, and the rows of `kto_batch` as it takes them."""
    from trl import KTOConfig, KTOTrainer

    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    config = partial(KTOConfig, train_sampling_strategy="sequential", **options)
    row = {"prompt": "a", "completion": "b", "label": True}
    trainer = build_trainer(KTOTrainer, config, folder, policy, row, ref_model=reference)
    names = ("prompt_ids", "completion_ids", "label", "KL_completion_ids")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*kto_columns(), strict=True)]
    return trainer, trainer.data_collator(rows)


def kto_columns() -> tuple[list, list, list, list]:
    """Prompts, completions, labels, and completions of other prompts."""
    prompts, completions, labels = rows_of_ids()
    return prompts, completions, labels, [completions[-1], *completions[:-1]]


def kto_batch() -> UnpairedBatch:
    return UnpairedBatch.from_lists(*kto_columns())


def inputs_with_labels() -> dict[str, Tensor]:
    """The batch as TRL's trainers without reference want it."""
    inputs = {}
    for side, name in ((1, "chosen"), (2, "rejected")):
        ids, prompt, real = pad_side(side)
        inputs[f"{name}_input_ids"], inputs[f"{name}_attention_mask"] = ids, real.long()
        inputs[f"{name}_labels"] = ids.masked_fill(prompt | ~real, -100)
    return inputs


def pad_side(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, prompt mask and padding mask of the chosen (1) or the rejected (2) side."""
    rows = random_ids()
    width = max(len(row[0]) + len(row[side]) for row in rows)
    ids, prompt, real = torch.zeros(3, len(rows), width, dtype=torch.long)
    for k, row in enumerate(rows):
        both = row[0] + row[side]
        ids[k, : len(both)] = torch.tensor(both)
        prompt[k, : len(row[0])], real[k, : len(both)] = 1, 1
    return ids, prompt.bool(), real.bool()


def with_gradients(loss: Tensor, policy: nn.Module) -> LossAndGrads:
    """A loss with its gradients."""
    grads = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    return loss.detach(), list(grads)


def dpo_loss_and_grads(
    policy: nn.Module, reference: nn.Module, loss, ld_alpha: float = 1.0, wpo: bool = False, **columns
) -> LossAndGrads:
    """Those of DPO, over the prefix tree and through the chunked gather."""
    options = {"share_prefix": True, "log_prob_impl": "chunked", "ld_alpha": ld_alpha, "wpo": wpo}
    dpo = DPO(policy, loss=loss, reference=reference, **options)
    (chosen, *chosen_masks), (rejected, *rejected_masks) = pad_side(1), pad_side(2)
    masks = zip(chosen_masks, rejected_masks, strict=True)
    return with_gradients(dpo(chosen, rejected, *masks, **columns), policy)


def trl_loss(setup: SimpleNamespace, types: list[str], weights=None, **options) -> Tensor:
    """The loss of TRL's DPOTrainer; `setup` holds trainer, inputs, policy and reference."""
    defaults = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_types": types,
        "loss_weights": weights or [1.0] * len(types),
        "ld_alpha": None,
        "use_weighting": False,
    }
    for name, value in (defaults | options).items():
        owner = setup.trainer.args if name == "discopop_tau" else setup.trainer
        assert hasattr(owner, name), name
        setattr(owner, name, value)
    return setup.trainer.compute_loss(setup.trainer.model, setup.inputs)


def trl_loss_and_grads(setup: SimpleNamespace, types: list[str], weights=None, **options) -> LossAndGrads:
    return with_gradients(trl_loss(setup, types, weights, **options), setup.policy)


def relative_error(found: LossAndGrads, expected: LossAndGrads) -> float:
    """The larger of the relative errors of value and of gradient, each by the largest component."""
    value = (found[0] - expected[0]).abs() / expected[0].abs()
    largest = max(float(grad.abs().max()) for grad in expected[1])
    grads = max(float((a - b).abs().max()) for a, b in zip(found[1], expected[1], strict=True))
    return max(float(value), grads / largest)
