"""What stages hand to the gather."""

import pytest
import torch

from dpo_wrapper.batches import normalize_over_step
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import collate_sft
from dpo_wrapper.scoring import token_log_probs as scoring
from dpo_wrapper.training.stages import SFTModule
from helpers.models import ZOO
from helpers.shareable_models import hf


@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_supervised_tokens_are_groups_of_their_own_below_a_system_prompt(monkeypatch, share_prefix):
    """In one group for all of them, softmaxes of all but a chunk would be computed twice."""
    system, given = tuple(range(1, 9)), []

    def recorded(*args, fused_loss, **kwargs):
        given.append(fused_loss)
        return log_probs_from_hidden(*args, fused_loss=fused_loss, **kwargs)

    log_probs_from_hidden = scoring.log_probs_from_hidden
    monkeypatch.setattr(scoring, "log_probs_from_hidden", recorded)
    module = SFTModule(ZOO["xt-rotary"](0)).train()
    module.scorer.share_prefix = share_prefix
    examples = [TokenizedExample((*system, k), ((k, 3), (4,))) for k in range(9, 13)]
    (batch,) = normalize_over_step([collate_sft([example.as_document() for example in examples])])
    loss = module(batch)
    groups = given[-1].groups
    num_entries = 7 + 4 * 3 if share_prefix else 4 * 10
    assert len(groups) == len(groups.unique()) == num_entries
    assert len(given[-1].split(4, torch.device("cpu"))) > 4

    loss.backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    (-module.scorer(batch.sequences).sums.sum() / batch.denominator).backward()
    for grad, parameter in zip(grads, module.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_supervised_training_balances_experts_where_the_model_asks_for_it():
    make = hf("Mixtral", output_router_logits=True, router_aux_loss_coef=0.5, num_local_experts=3)
    examples = [TokenizedExample((), ((1, 2, k, k, 3, 4),)) for k in range(9, 13)]
    parts = normalize_over_step([collate_sft(examples[:1]), collate_sft(examples[1:])])
    module, plain = SFTModule(make(0)).train(), SFTModule(make(0), router_aux_loss_coef=0.0).train()
    for part, share in zip(parts, (0.25, 0.75), strict=True):
        ids = part.sequences.ids
        aux_loss = module.model(input_ids=ids, attention_mask=torch.ones_like(ids)).aux_loss
        torch.testing.assert_close(module(part), plain(part) + 0.5 * share * aux_loss)
        with torch.no_grad():
            assert module(part) == plain(part)
