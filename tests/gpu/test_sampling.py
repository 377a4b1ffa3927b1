"""Samples on a GPU are those that transformers draws there for each prompt alone."""

import torch

from dpo_wrapper.evaluation.generate import generate
from dpo_wrapper.evaluation.sampling import Sampling
from helpers.models import hf_llama, x_transformer

PROMPTS = [[7, 8, 9], [11, 12, 13, 14, 15], [21], [22, 23, 24]]
ENDS = [5]


def test_samples_are_those_of_transformers_on_the_same_device(device):
    model, sampling = hf_llama(0).to(device).eval(), Sampling(temperature=0.9, top_k=20, top_p=0.95)
    given = generate(model, PROMPTS, 6, ENDS, sampling=sampling, seeds=range(4), pads=True)
    for seed, (prompt, sample) in enumerate(zip(PROMPTS, given, strict=True)):
        ids = torch.tensor([prompt], device=device)
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "pad_token_id": 5}
        output = model.generate(ids, max_new_tokens=6, eos_token_id=ENDS, **options)
        assert sample == output[0, len(prompt) :].tolist()


def test_a_decoder_samples_on_the_device_and_leaves_its_random_state(device):
    model = x_transformer(0, decoder={"rotary_pos_emb": True}).to(device).eval()
    torch.manual_seed(3)
    expected = torch.rand(2, device=device)
    torch.manual_seed(3)
    given = generate(model, PROMPTS, 6, ENDS, sampling=Sampling(), seeds=range(4), pads=True)
    torch.testing.assert_close(torch.rand(2, device=device), expected, rtol=0, atol=0)
    again = generate(model, PROMPTS[2:], 6, ENDS, sampling=Sampling(), seeds=range(2, 4), pads=True)
    assert again == given[2:]
