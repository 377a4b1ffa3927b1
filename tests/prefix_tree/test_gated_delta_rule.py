"""The gated delta rule, against its formula token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

from dpo_wrapper.prefix_tree.gated_delta_rule import apply_gated_delta_rule


def random_inputs(n, heads=(2, 2), widths=(4, 3), dtype=torch.float64, g=2):
    """q, k, v, the logarithm of the decay, beta, and a state."""
    generator = Generator().manual_seed(n)
    (h, v), (d, e) = heads, widths

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [
        draw(g, n, h, d),
        F.normalize(draw(g, n, h, d), dim=-1),
        draw(g, n, v, e),
        -F.softplus(draw(g, n, v)),
        draw(g, n, v).sigmoid(),
        draw(g, v, d, e),
    ]
    return [t.to(dtype).requires_grad_() for t in inputs]


def by_the_formula(q, k, v, log_decay, beta, state=None):
    """`S_t = exp(g_t) S + β_t k_t (v_t - exp(g_t) Sᵀ k_t)ᵀ` and `o_t = S_tᵀ q_t`, token by token."""
    repeats = v.shape[2] // k.shape[2]
    q, k = (t.repeat_interleave(repeats, dim=2) for t in (q, k))
    if state is None:
        state = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3])
    outputs = []
    for t in range(v.shape[1]):
        state = log_decay[:, t, :, None, None].exp() * state
        missing = v[:, t] - torch.einsum("gvde,gvd->gve", state, k[:, t])
        state = state + torch.einsum("gv,gvd,gve->gvde", beta[:, t], k[:, t], missing)
        outputs.append(torch.einsum("gvde,gvd->gve", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def with_gradients(function, inputs):
    """Outputs, the state behind, and the gradients of a weighted sum of both."""
    results = function(*inputs)
    generator = Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in results]
    loss = sum((t * weight.to(t.dtype)).sum() for t, weight in zip(results, weights, strict=True))
    return [*results, *torch.autograd.grad(loss, inputs)]


def assert_close(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("n, heads", [(1, (2, 2)), (7, (1, 1)), (5, (2, 4)), (4, (1, 3))])
def test_outputs_and_gradients_are_those_of_the_formula(n, heads, has_state):
    inputs = random_inputs(n, heads)[: 6 if has_state else 5]
    found = with_gradients(apply_gated_delta_rule, inputs)
    assert_close(found, with_gradients(by_the_formula, inputs))
    assert found[0].shape == inputs[2].shape


def test_two_halves_are_the_whole():
    *tokens, state = random_inputs(7)

    def in_halves(*inputs):
        *tokens, state = inputs
        first, state = apply_gated_delta_rule(*(t[:, :3] for t in tokens), state)
        second, state = apply_gated_delta_rule(*(t[:, 3:] for t in tokens), state)
        return torch.cat([first, second], dim=1), state

    inputs = [*tokens, state]
    assert_close(with_gradients(in_halves, inputs), with_gradients(apply_gated_delta_rule, inputs))


def test_tokens_without_decay_and_beta_leave_the_state_as_it_is():
    q, k, v, log_decay, beta, state = random_inputs(5)
    zeros = torch.zeros_like(beta)
    assert torch.equal(apply_gated_delta_rule(q, k, v * 1e30, zeros, zeros, state)[1], state)
    assert not apply_gated_delta_rule(q, k, v * 1e30, zeros, zeros)[1].any()
    log_decay, beta = (torch.cat([t[:, :3], zeros[:, 3:]], dim=1) for t in (log_decay, beta))
    first = apply_gated_delta_rule(*(t[:, :3] for t in (q, k, v, log_decay, beta)), state)
    torch.testing.assert_close(apply_gated_delta_rule(q, k, v, log_decay, beta, state)[1], first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_strong_decay_gives_finite_numbers(dtype):
    q, k, v, log_decay, beta, state = random_inputs(64, dtype=dtype)
    with torch.no_grad():
        log_decay[:, ::2] = -50.0
    inputs = [q, k, v, log_decay, beta, state]
    found = with_gradients(apply_gated_delta_rule, inputs)
    assert all(t.isfinite().all() for t in found)
    assert_close(found, with_gradients(by_the_formula, inputs), 1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("heads", [(2, 2), (2, 4)])
def test_backward_keeps_the_inputs_and_one_tensor_like_the_values_alone(heads):
    saved = {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    inputs = random_inputs(50, heads, widths=(16, 8))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        apply_gated_delta_rule(*inputs)
    numel = sum(t.untyped_storage().nbytes() // t.itemsize for t in saved.values())
    assert numel <= sum(t.numel() for t in inputs) + inputs[2].numel()


def test_gradcheck_passes():
    inputs = random_inputs(3, heads=(1, 2), widths=(2, 3), g=1)
    assert torch.autograd.gradcheck(apply_gated_delta_rule, inputs)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_its_error_is_that_of_transformers(is_autocast):
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    inputs = random_inputs(50, heads=(2, 4), widths=(16, 8), dtype=torch.float32)
    in_float64 = [t.detach().double().requires_grad_() for t in inputs]

    def of_transformers(q, k, v, log_decay, beta, state):
        q, k = (t.repeat_interleave(2, dim=2) for t in (q, k))
        q = q * q.shape[-1] ** 0.5  # by which it divides
        states = {"initial_state": state, "output_final_state": True}
        return qwen.torch_chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, **states)

    exact = with_gradients(apply_gated_delta_rule, in_float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = with_gradients(apply_gated_delta_rule, inputs)
        expected = with_gradients(of_transformers, inputs)
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        error, their_error = ((t.double() - true).norm() / true.norm() for t in (ours, theirs))
        assert error <= 1.5 * their_error
        assert their_error < (0.02 if is_autocast else 1e-5)
