"""How good is a rollout? `f(prompts, completions, completion_ids, **columns) -> list[float | None]`.

Each member is a module with a function of its own name; None means that a rollout cannot be scored and is left out of
its group. `columns` holds one value per rollout: `problem`, `truncated`; and the `task` itself. `SUPERVISION` says
what of the task the reward takes.
"""
