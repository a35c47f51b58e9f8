"""CEPO in TRL, on a CPU in about a minute: `pip install 'cepo[trl]' && python examples/trl/train.py`.

A `GRPOTrainer` script but for three words: the two classes and `parse_answer`, which finds the answer of a completion.
"""

from datasets import Dataset

from cepo.integrations.trl import CEPOConfig, CEPOTrainer
from cepo.policy import EMBEDDED
from cepo.tasks import get_task

task = get_task("addition")
problems = [task.train(index, seed=0) for index in range(1000)]
data = [{"prompt": [{"role": "user", "content": p.prompt}], "answer": p.answer} for p in problems]


def correct(completions, answer, **columns):
    return [float(task.parse_answer(c[0]["content"]) == a) for c, a in zip(completions, answer, strict=True)]


config = CEPOConfig("runs/trl", max_steps=20, learning_rate=3e-4, per_device_train_batch_size=64, bf16=False,
                    max_completion_length=task.max_new_tokens, logging_steps=1, report_to="none")  # fmt: skip
CEPOTrainer(str(EMBEDDED), correct, config, Dataset.from_list(data), parse_answer=task.parse_answer).train()
