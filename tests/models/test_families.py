"""Models inside wrappers: compiled, data parallel, subclassed, sharded."""

import pytest
import torch
from torch import nn

from dpo_wrapper import DPO
from helpers.dpo_calls import nudged
from helpers.models import VOCAB, ZOO, hf_llama
from helpers.naive_dpo import ARGUMENTS, naive_loss, train


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
@pytest.mark.filterwarnings("ignore:a Hugging Face model should be compiled")
@pytest.mark.parametrize("name", ["xt-tied", "xt-wrapped", "hf-llama", "plain-transformer"])
def test_a_compiled_model_is_of_its_family(name):
    plain = DPO(ZOO[name](0))
    dpo = DPO(torch.compile(ZOO[name](0), backend="eager"))
    for each in (plain, dpo):
        nudged(each.policy_model, 0.1)
    assert torch.allclose(dpo(**ARGUMENTS), plain(**ARGUMENTS), atol=1e-6)
    assert dpo.policy.probe.head_applies == plain.policy.probe.head_applies
    assert dpo.policy.probe.vocab_size == VOCAB
    torch._dynamo.reset()


def test_compiling_that_cannot_act_is_told():
    with pytest.warns(UserWarning, match=r"compiled as a whole: compile model.model instead"):
        DPO(torch.compile(hf_llama(0), backend="eager"))


def test_a_policy_in_data_parallel_scores_right_and_is_told():
    with pytest.warns(UserWarning, match="inside DataParallel .* wrap DPO in DistributedDataParallel"):
        dpo = DPO(nn.DataParallel(hf_llama(0)))
    nudged(dpo.policy_model)
    assert torch.allclose(dpo(**ARGUMENTS), naive_loss(dpo.policy_model, hf_llama(0).eval()), atol=1e-5)


def test_a_subclass_of_a_wrapper_is_of_its_family():
    from x_transformers import AutoregressiveWrapper

    class Mine(AutoregressiveWrapper):
        pass

    dpo = DPO(Mine(ZOO["xt-rotary"](0)))
    dpo(**ARGUMENTS)
    assert dpo.policy.probe.head_applies


@pytest.mark.pitfall(19)
@pytest.mark.filterwarnings("ignore:all logits")
@pytest.mark.parametrize("of_policy", [True, False], ids=["policy", "dpo"])
@pytest.mark.parametrize("name", ["hf-llama", "xt-tied"])
def test_sharded_parameters_train_alike(name, of_policy, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, sharded = DPO(ZOO[name](0)), DPO(ZOO[name](0))
        fully_shard(sharded.policy_model if of_policy else sharded)
        for dpo in (plain, sharded):
            train(dpo)
        assert torch.allclose(sharded(**ARGUMENTS), plain(**ARGUMENTS), atol=1e-5)
        assert sharded.policy.probe.head_applies != of_policy
    finally:
        distributed.destroy_process_group()
