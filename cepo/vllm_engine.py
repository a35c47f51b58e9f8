"""Rollouts by vLLM, in this process' own engine, whose workers are handed the policy's weights after every update.

Only what vLLM documents is used: `LLM`, `SamplingParams`, `collective_rpc` into a worker extension, `sleep`, `wake_up`.
Weights travel as a checkpoint in a temporary directory, which works for any number of workers on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cepo.engine import Generated
from cepo.errors import InputError, one_line


class WorkerExtension:
    """What vLLM adds to each of its workers (`worker_extension_cls`)."""

    model_runner: Any

    def cepo_load_weights(self, folder: str) -> None:
        """Take the weights of the checkpoint in `folder`, under their names in it."""
        self.model_runner.model.load_weights(_weights(Path(folder)))


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                yield name, tensors.get_tensor(name)


class VllmEngine:
    """vLLM as an `Engine`. Raises InputError if it is not there, or does not start.

    Args:
        source: directory or name of the model: its config, and weights to begin with.
        model: whose weights it is to have.
        eos_ids: tokens that end a response.
        dtype: "bfloat16" or "float32".
        options: of `vllm.LLM`, on top of ours; with enable_sleep_mode it frees its memory whenever it is done.
    """

    def __init__(self, source: str, model: Any, eos_ids: Sequence[int], dtype: str, options: dict[str, Any]) -> None:
        try:
            import vllm
        except ImportError as error:
            raise InputError(f"rollout.engine: vllm cannot be imported ({error}); pip install vllm") from error
        self._params = vllm.SamplingParams
        self._eos_ids, self._dtype = list(eos_ids), getattr(torch, dtype)
        self._sleeps, self._asleep = bool(options.get("enable_sleep_mode")), False
        ours = {
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",  # of what is sampled from, temperature and all
            "worker_extension_cls": f"{__name__}.{WorkerExtension.__name__}",
        }
        try:
            self._llm: Any = vllm.LLM(model=source, **ours | options)
        except Exception as error:  # a program of its own, on a device of its own
            raise InputError(f"rollout.engine: vllm does not start: {one_line(error)[:300]}") from error
        self.sync(model)

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
        """As `Engine.generate`; the same key gives the same random numbers, and vLLM decides what comes of them."""
        from cepo.rollout import seed_of

        self._wake()
        drawn = n if temperature else 1  # vLLM refuses several that would be the same
        params = [
            self._params(
                n=drawn, temperature=temperature, top_p=1.0, seed=seed_of(key, first + p), max_tokens=max_new_tokens,
                stop_token_ids=self._eos_ids, logprobs=0, detokenize=False,
            )
            for p in range(len(prompts))
        ]  # fmt: skip
        outputs = self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = True
        responses, logprobs = [], []
        for output in outputs:
            for completion in output.outputs * (n // drawn):
                ids = list(completion.token_ids)
                responses.append(ids)
                logprobs.append([step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)])
        return Generated(responses, logprobs)

    def sync(self, model: Any) -> None:
        """As `Engine.sync`; what it has cached of the old weights is forgotten."""
        self._wake()
        with TemporaryDirectory(prefix="cepo-weights-") as folder:
            state = {
                name: value.to(self._dtype) if value.is_floating_point() else value
                for name, value in model.state_dict().items()
            }
            model.save_pretrained(folder, state_dict=state)
            self._llm.collective_rpc("cepo_load_weights", args=(folder,))
        self._llm.reset_prefix_cache()

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
