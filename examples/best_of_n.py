"""Best of n: sample some answers from a trained policy, and take the one of the largest implicit reward.

python examples/best_of_n.py --run runs/first --prompt 'Repeat wolf leaf.'
"""

import tyro

from dpo_wrapper.evaluation import reward
from dpo_wrapper.evaluation.generate import generate, list_end_ids
from dpo_wrapper.evaluation.model_pair import load_model_pair
from dpo_wrapper.evaluation.prompts import encode_prompt
from dpo_wrapper.evaluation.samples import shorten
from dpo_wrapper.evaluation.sampling import Sampling


def main(run: str, prompt: str, n: int = 8, max_new_tokens: int = 64, temperature: float = 1.0) -> list[str]:
    """Print and return answers to a prompt, the best one first.

    Args:
        run: folder of a run with a reference.
        prompt: a question.
        n: number of answers that are sampled.
        max_new_tokens: maximum length of an answer, in tokens.
        temperature: of the samples.
    """
    pair = load_model_pair(run)
    tokenizer, sampling = pair.tokenizer, Sampling(temperature=temperature)
    prompts = [encode_prompt(tokenizer, prompt, pair.as_chat)] * n
    end_ids = list_end_ids(tokenizer)
    completions = generate(pair.policy.model, prompts, max_new_tokens, end_ids, sampling=sampling)
    answers = sorted({tokenizer.decode(completion) for completion in completions})
    rewards = reward(pair, None, prompt, answers)
    ranked = sorted(zip(rewards, answers, strict=True), reverse=True)
    for value, answer in ranked:
        print(f"{value:8.3f}  {shorten(answer)}")
    return [answer for _, answer in ranked]


if __name__ == "__main__":
    tyro.cli(main)
