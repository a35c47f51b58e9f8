"""`cepo train --dry-run`: what a run would do in a step and how much memory it would take, before any weights are read.

A closed form over the config of the model, for decoders of the Llama kind (RMS norms, gated MLP, attention that keeps
no S x S weights), every rollout at full length. Weights, gradients and AdamW's two moments are float32. Of a layer the
backward keeps, per token: of each norm its input, the normalised and the scaled; queries, keys and values after the
rotation, and before it if they are normed; the attention's output twice; four vectors of the MLP; under autocast also
what each product and norm has cast for itself. A backward begins with three more vectors of an MLP. The two halves of a
step, rollouts and update, do not overlap; the peak is that of the larger. What stays is exact; `benchmarks/dry_run.py`
holds the peak against measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cepo import adapters
from cepo.config import Config
from cepo.errors import InputError, one_line
from cepo.parts import load_task
from cepo.policy import Policy, resolve, tokens_of
from cepo.teacher import teacher_context
from cepo.vision import auto_classes, separate
from cepo_kernels.linear_products import chunk_rows

MIB = 1 << 20
# Of one entry of the logits that a token is drawn from: themselves in float32, divided, and the noise's hash in int64.
SAMPLING_BYTES = 44


@dataclass(frozen=True)
class Estimate:
    """What a step takes; memory in bytes."""

    parameters: int
    trained: int
    rollouts: int
    prompt: int
    """Tokens of the longest prompt of the first step."""
    response: int
    memory: dict[str, int]
    """By part."""
    peak: int
    """Without the process itself."""


def estimate(config: Config) -> Estimate:
    """Of a run of `config`, from its model's config and its first problems. Raises InputError if they are not there."""
    from transformers import AutoConfig

    named = resolve(config.policy.model)
    source = adapters.base_of(named) or named
    options: dict[str, Any] = {} if config.policy.gguf_file is None else {"gguf_file": config.policy.gguf_file}
    try:
        shape = AutoConfig.from_pretrained(source, **options)
        auto, tokenizer = auto_classes(named, shape, **options)
        with torch.device("meta"):
            model: Any = auto.from_config(shape, dtype=torch.float32)
    except Exception as error:  # as in `load_policy`
        raise InputError(f"policy.model: cannot load {config.policy.model!r}: {one_line(error)[:300]}") from error
    task, text = load_task(config), shape.get_text_config()
    text_only, sight = separate(tokenizer, model)
    policy = Policy(model, text_only, (0,), 0, 1 << 30, vision=sight)
    problems = [task.train(i, config.train.seed) for i in range(config.rollout.prompts)]
    prompt = max(len(tokens_of(policy, p.prompt)) for p in problems)
    told = max(len(teacher_context(policy, config.teacher, p, p.answer)) for p in problems)
    response = config.rollout.max_new_tokens or task.max_new_tokens

    size = 2 if config.policy.compute_dtype == "bfloat16" else 4
    layers, hidden, vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * width, (getattr(text, "num_key_value_heads", None) or heads) * width
    parameters = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    if source != named:
        adapters.load(model, named, config.policy.lora)
    elif config.policy.lora is not None:
        adapters.add(model, config.policy.lora, source)
    config.policy.lora = adapters.settings(model) if config.policy.lora is None else config.policy.lora
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    rollouts = config.rollout.prompts * config.rollout.group_size
    at_once = min(config.rollout.batch_size or rollouts, rollouts)
    in_pass = min(config.train.prompts_per_pass or config.rollout.prompts, config.rollout.prompts)
    rows = in_pass * config.rollout.group_size
    cached = 2 * keys * size  # of one token in one layer
    tokens = rows * (prompt + response)
    normed = 2 * (queries + keys) if any(name.endswith("q_norm") for name, _ in model.named_modules()) else 0
    layer = 4 * 6 * hidden + size * (normed + 4 * queries + 3 * keys + 4 * _inner(text))
    if size == 2:  # the inputs of five products, and norms in float32
        layer += 2 * 5 * hidden + normed
    kept = layers * layer
    if config.train.gradient_checkpointing:
        kept = layers * 4 * hidden + layer
    backward = size * 3 * _inner(text) + 4 * 2 * hidden
    contexts = 1 if config.loss.distils else 3
    logits = min(rows * response, chunk_rows(contexts, vocabulary, torch.float32)) * contexts * vocabulary * 4
    head = 0 if config.policy.lora else 2 * vocabulary * hidden * 4  # its gradient, and the copy that is added to
    copies = {"policy": 0}.get(config.loss.teacher or "policy", trained)
    memory = {
        "weights": 4 * (parameters + copies) + (2 * parameters if size == 2 else 0),
        "gradients": 4 * trained,
        "optimiser": 8 * trained,
        "rollout KV cache": at_once * (prompt + response) * cached * (layers + 1),
        "sampling": at_once * vocabulary * SAMPLING_BYTES,
        "teachers' KV cache": rows * (told + response) * cached * (layers + 1),
        "activations": tokens * (kept + backward) + layers * rows * (prompt + response) ** 2 * 4,
        "kernels' chunks": logits + head + (contexts + 1) * rows * response * hidden * 4,
    }
    held = memory["gradients"]
    update = memory["activations"] + memory["kernels' chunks"]
    phases = (
        held + memory["rollout KV cache"] + memory["sampling"],
        memory["teachers' KV cache"] * (contexts > 1) + held * (in_pass < config.rollout.prompts),
        update + held if in_pass < config.rollout.prompts else max(update, held),
        held + 3 * 4 * largest,  # a step of the optimiser
    )
    peak = memory["weights"] + memory["optimiser"] + max(phases)
    return Estimate(parameters, trained, rollouts, prompt, response, memory, peak)


def report(config: Config) -> str:
    """The resolved config, tokens and memory of a step, as text."""
    from cepo.cli import dump

    found = estimate(config)
    of_process = _resident()
    lines = [f"  {name:20}{value / MIB:12,.1f} MiB" for name, value in found.memory.items()]
    passes = -(-config.rollout.prompts // (config.train.prompts_per_pass or config.rollout.prompts))
    return (
        f"{dump(config)}\n"
        f"parameters: {found.parameters:,}, of which {found.trained:,} learn\n"
        f"a step: {found.rollouts} rollouts of at most {found.prompt} + {found.response} tokens, "
        f"{found.rollouts * found.response:,} generated and {found.rollouts * (found.prompt + found.response):,} "
        f"read by the policy, in {passes} pass(es)\n"
        f"memory, estimated, if every rollout is of full length:\n" + "\n".join(lines) + "\n"
        f"  {'peak of a step':20}{found.peak / MIB:12,.1f} MiB, and {of_process / MIB:,.0f} MiB of the process itself"
    )


def _inner(text: Any) -> int:
    """The MLP's inner size."""
    return int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size)


def _resident() -> int:
    """Bytes that this process has in memory, 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
