"""Bad input to the ops from hidden states: one error that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from test_linear import VOCABULARY, WIDTH, inputs

from cepo_kernels.linear import linear_contrastive_policy_loss, linear_token_logprobs

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.zeros(5, WIDTH + 1)}, ValueError, r"hidden_states: expected shape \(5, 24\)"),
        ({"hidden_states": torch.zeros(5, WIDTH, dtype=torch.int64)}, TypeError, "hidden_states: expected bfloat16"),
        ({"hidden_states": None}, TypeError, "hidden_states: expected a tensor, got NoneType"),
        ({"lm_head_weight": torch.zeros(0)}, ValueError, r"lm_head_weight: expected shape \(V, H\), not empty.*ZeRO-3"),
        ({"lm_head_weight": [1.0]}, TypeError, "lm_head_weight: expected a tensor, got list"),
        ({"lm_head_bias": torch.zeros(3)}, ValueError, r"lm_head_bias: expected shape \(301,\)"),
        ({"labels": torch.full((5,), VOCABULARY)}, ValueError, "labels: expected -100 or 0 <= label < 301, got 301"),
        ({"labels": torch.zeros(5)}, TypeError, "labels: expected int32 or int64"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number .*, got 0.0"),
        ({"logits_dtype": torch.float64}, ValueError, "logits_dtype: expected None, bfloat16 or float16, got .*64"),
        ({"logits_dtype": torch.float16, "hidden_states": torch.zeros(5, WIDTH).double()}, ValueError, "logits_dtype"),
        ({"backend": "gpu"}, ValueError, "backend: expected 'auto' or one of"),
        ({"hidden_states": torch.zeros(5, WIDTH).to_sparse()}, TypeError, "hidden_states: expected a dense tensor"),
        ({"lm_head_weight": torch.zeros(9, WIDTH).to_sparse()}, TypeError, "lm_head_weight: .* torch.sparse_coo"),
        ({"return_entropy": "yes"}, TypeError, "return_entropy: expected a bool, got str"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(change, error, message):
    hidden, weight, bias, labels, _ = inputs(shape=(5,))
    call = {"hidden_states": hidden[0], "lm_head_weight": weight, "labels": labels, "lm_head_bias": bias, **change}
    with pytest.raises(error, match=message):
        linear_token_logprobs(**call)


def test_the_loss_names_its_own_arguments():
    hidden, weight, _, labels, advantages = inputs(shape=(5,))
    with pytest.raises(ValueError, match=r"negative_hidden: expected shape \(5, 24\)"):
        linear_contrastive_policy_loss(hidden[0], hidden[1], hidden[2][:3], weight, labels, advantages)
    with pytest.raises(ValueError, match="ref_logprobs: expected log-probs of the reference policy"):
        linear_contrastive_policy_loss(hidden[0], None, None, weight, labels, advantages, kl_coef=0.1)
