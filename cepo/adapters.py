"""LoRA (arXiv 2106.09685) through peft: the model keeps its weights, small factors beside its layers learn.

The factors sit in the model's own layers, so everything else sees a model like any other, of which little has a
gradient: the head's weight has none, and the kernels then compute none.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from cepo import checkpoint
from cepo.config import LoraConfig
from cepo.errors import InputError, one_line

FILE = "adapter_config.json"
NAME = "default"


def base_of(source: str) -> str | None:
    """The model that the adapter in directory `source` belongs to; None: there is no adapter. Raises InputError."""
    path = Path(source) / FILE
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"policy.model: {path}: expected the name of a base model: {one_line(error)}") from error
    if not isinstance(base, str):
        raise InputError(f"policy.model: {path}: expected the name of a base model, got {base!r}")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(
            f"policy.model: {source} is an adapter of {base}, which is gone (a run deletes its old checkpoints)"
        )
    return base


def digests(base: str, adapter: str | None = None) -> dict[str, Any]:
    """Of the weights and config in directory `base`, by file; nothing of a model that is known by a name.

    Raises InputError where they are not what they were when the checkpoint `adapter` was saved.
    """
    files = [file for end in ("*.safetensors", "*.bin", "config.json") for file in sorted(Path(base).glob(end))]
    found = {file.name: checkpoint.digest(file) for file in files}
    kept = None if adapter is None else checkpoint.base_of(Path(adapter))
    if kept is not None and kept != found:
        names = [name for name in {**kept, **found} if kept.get(name) != found.get(name)]
        raise InputError(
            f"policy.model: {adapter} is an adapter of {base} as it was before {', '.join(names)} changed there"
        )
    return found


def settings(model: Any) -> LoraConfig | None:
    """What the factors in `model` are; None: it has none."""
    has = getattr(model, "peft_config", {}).get(NAME)
    if has is None:
        return None
    names = has.target_modules
    return LoraConfig(has.r, float(has.lora_alpha), names if isinstance(names, str) else sorted(names or ()))


def add(model: Any, config: LoraConfig, source: str) -> None:
    """Give `model`, which was loaded from `source`, factors that change nothing yet, and freeze its weights.

    They are drawn from seed 0, whatever the run's. Raises InputError for modules that are not there, or the head.
    """
    names = config.target_modules
    if isinstance(names, str) and names.isidentifier():  # else peft would look for a layer whose whole path this is
        names = [names]
    made = _peft().LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=names, task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.add_adapter(made, adapter_name=NAME)
    except (ValueError, re.error) as error:  # a text that is no name is a pattern to peft
        raise InputError(f"policy.lora.target_modules: {one_line(error)[:300]}") from error
    _refuse_head(model)
    if Path(source).is_dir():  # or it could be loaded from this working directory alone
        made.base_model_name_or_path = str(Path(source).resolve())


def load(model: Any, source: str, wanted: LoraConfig | None) -> None:
    """Give the base `model` the factors in `source`, to train on; on the meta device their shapes alone.

    Raises InputError if they are not as `wanted`.
    """
    peft = _peft()
    try:
        if model.device.type == "meta":
            model.add_adapter(peft.PeftConfig.from_pretrained(source), adapter_name=NAME)
        else:
            model.load_adapter(source, adapter_name=NAME, is_trainable=True)
    except Exception as error:  # a damaged file fails in whatever way the library that reads it does
        raise InputError(f"policy.model: cannot load the adapter {source!r}: {one_line(error)[:300]}") from error
    kind = model.peft_config[NAME].peft_type
    if kind != "LORA":
        raise InputError(f"policy.model: expected an adapter of LoRA in {source}, got one of {kind}")
    _refuse_head(model)
    if wanted is None:
        return
    with torch.device("meta"):
        other = type(model)(copy.deepcopy(model.config))
        add(other, wanted, source)
    # Modules can be named in many ways, and which are meant depends on the model.
    has, alike = settings(model), _places(model) == _places(other)
    assert has is not None
    for field in fields(wanted):
        got, name = getattr(wanted, field.name), field.name
        if got != getattr(has, name) and not (name == "target_modules" and alike):
            raise InputError(
                f"policy.lora.{name}: expected {getattr(has, name)!r}, which the adapter {source} has, got {got!r}"
            )


def _places(model: torch.nn.Module) -> set[str]:
    """Names of the layers that have factors."""
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


def frozen_names(model: torch.nn.Module) -> set[str]:
    """Names of the weights that do not learn, in the model's state."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("policy.lora: peft is not installed; pip install 'cepo[lora]'") from None
    return peft


def _refuse_head(model: Any) -> None:
    if hasattr(model.get_output_embeddings(), "lora_A"):
        raise InputError(
            "policy.lora.target_modules: expected none to be the head, as log-probs are computed from its weight, "
            "which factors beside it would not be in"
        )
