"""Train with the `Trainer` of transformers: its callbacks, logs, checkpoints and resuming.

python examples/hf_trainer.py --out runs/hf_trainer
"""

from pathlib import Path

import torch
import tyro
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from dpo_wrapper import DPO, SFT, Sigmoid
from dpo_wrapper.data import (
    collate_preference,
    load_tokenizer,
    read_examples,
    split_examples,
    tokenize_examples,
)
from dpo_wrapper.evaluation.evaluate import evaluate
from dpo_wrapper.metrics import MetricSums

DATA = Path(__file__).parent / "data" / "preferences.jsonl"


def collate(examples):
    return {"preferred_seq": collate_preference(examples)}


class PreferenceTrainer(Trainer):
    """Saves and loads the policy, or its adapter, and computes the loss by the `DPO` around it."""

    def __init__(self, dpo, args, **options):
        super().__init__(dpo.policy_model, args, data_collator=collate, **options)
        self.dpo, self.metric_sums = dpo, MetricSums()
        self.wrapped_dpo = self.accelerator.prepare(dpo)

    def _wrap_model(self, *args, **options):
        return self.wrapped_dpo  # what is called: DistributedDataParallel wraps the DPO, not the policy

    def sum_over_processes(self, values):
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum")

    def get_batch_samples(self, *args):
        """The micro-batches of a step, each with the totals of the step: accumulation is exact."""
        batches = [inputs["preferred_seq"] for inputs in super().get_batch_samples(*args)[0]]
        batches = self.dpo.normalize_over_step(batches, self.sum_over_processes) if batches else []
        return [{"preferred_seq": batch} for batch in batches], None

    def compute_loss(self, model, inputs, *args, **options):
        loss, metrics = model(**inputs, return_metrics=True)
        self.metric_sums.add(metrics)
        # Trainer divides by the number of micro-batches, DistributedDataParallel by that of processes
        return loss * self.current_gradient_accumulation_steps * self.accelerator.num_processes

    def log(self, logs, *args):
        if "loss" in logs:  # of training steps
            logs |= self.metric_sums.result(self.sum_over_processes)
            self.metric_sums = MetricSums()
        super().log(logs, *args)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **options):
        self.wrapped_dpo.eval()  # training_step calls train()
        # several processes: accelerate repeats rows to fill the last batch
        batches = [inputs["preferred_seq"] for inputs in dataloader]
        metrics = evaluate(self.wrapped_dpo, batches, self.sum_over_processes)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))


def main(
    model: str | None = None,
    out: Path = Path("runs/hf_trainer"),
    steps: int = 60,
    learning_rate: float = 1e-3,
    resume: bool = False,
) -> Trainer:
    """Train a Hugging Face model on the bundled preferences with transformers' Trainer.

    Args:
        model: a causal LM by folder or name; without one a small Llama with tied weights is built.
        out: folder of the checkpoints and of the trained model.
        steps: number of optimizer steps.
        learning_rate: peak of the schedule; a pretrained model wants about 1e-6.
        resume: continue from the last checkpoint in the folder.
    """
    set_seed(0)
    tokenizer = load_tokenizer(model or "bytes")
    if model is None:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "vocab_size": tokenizer.vocab_size}
        config = LlamaConfig(tie_word_embeddings=True, **sizes)
        policy = LlamaForCausalLM(config)
    else:
        policy = AutoModelForCausalLM.from_pretrained(model)
    splits = split_examples(read_examples(DATA).examples, fraction=0.1)
    train, evaluation = (tokenize_examples(split, tokenizer, 256).examples for split in splits)
    args = TrainingArguments(
        out,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        load_best_model_at_end=True,
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
    )
    trainer = PreferenceTrainer(
        DPO(policy, loss=[(Sigmoid(beta=0.1), 1.0), (SFT(), 1.0)]),
        args,
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    tokenizer.save(out)
    return trainer


if __name__ == "__main__":
    tyro.cli(main)
