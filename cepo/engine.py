"""What generates the rollouts: the model itself, or another engine that is given its weights.

Another engine computes in its own precision and its own kernels, so its tokens are not quite samples of the policy that
learns from them. Truncated importance sampling makes up for it: each token weighs

    min(pi(y_t) / pi_engine(y_t), cap)

in the loss, pi the policy that generated as the trainer computes it (Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Generated(NamedTuple):
    """Responses to P prompts, n each, prompt after prompt: token ids up to and with the end, and their log-probs."""

    responses: list[list[int]]
    logprobs: list[list[float]] | None = None
    """As the engine had them, at the temperature that was sampled from; None: they are the trainer's own."""


class Engine(Protocol):
    """A way to generate."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        *,
        max_new_tokens: int,
        temperature: float,
        key: tuple[int, int],
        first: int = 0,
    ) -> Generated:
        """Complete every prompt n times.

        Args:
            prompts: token ids.
            max_new_tokens: longest response, in tokens.
            temperature: T > 0; 0 is greedy.
            key: (seed, step) of the random numbers.
            first: the number of the first prompt among those of the step, which other processes complete too.

        Raises InputError if it cannot generate.
        """
        ...

    def sync(self, model: nn.Module) -> None:
        """Generate with the weights of `model` from now on."""


def importance(logprobs: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """min(exp(logprobs - behaviour), cap), without a gradient: the weight of tokens that an engine sampled.

    Args:
        logprobs: (N,) of the sampled tokens, as the trainer has them; behaviour: as the engine had them.
        cap: at least 1, or inf.
    """
    return (logprobs.detach() - behaviour).exp().clamp(max=cap)
