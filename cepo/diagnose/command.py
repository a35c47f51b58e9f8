"""What `cepo diagnose` does with its arguments."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from cepo import checkpoint
from cepo.config import Config, DiagnoseConfig, LossConfig, PolicyConfig
from cepo.diagnose import diagnose
from cepo.diagnose.report import text
from cepo.errors import InputError
from cepo.parts import load_parts
from cepo.policy import threads


def run(
    config: Config, options: DiagnoseConfig, out: str | None, trained: Path | None, base: PolicyConfig | None
) -> str:
    """Diagnose the model of `config`, write JSON to `out` if given, and return the report as text.

    If the model is the run `trained`, leakage is shown for what it began with, `base`, and every checkpoint it keeps.
    """
    if out is not None and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        raise InputError(f"--out: expected a file in a directory that exists, got {out!r}")
    distillation = config.loss if config.loss.distils else None
    if distillation:  # which has no credit: another loss is asked what credit would be
        config = replace(config, loss=LossConfig()).check()
    others, name = {}, "model"
    parts = load_parts(config)
    if trained is not None and base is not None:
        start = replace(config.policy, model=base.model, gguf_file=base.gguf_file)
        others["base"] = partial(load_parts, replace(config, policy=start))
        *earlier, last = checkpoint.all_of(trained)
        others |= {_step(path): partial(load_parts, config, str(path)) for path in earlier}
        name = _step(last)
    with threads(parts.policy, config.policy.threads):
        report = diagnose(parts, options, name, others, distillation)
    if out is not None:
        with checkpoint.replacing(Path(out)) as temporary:
            temporary.write_text(json.dumps(report, default=asdict, indent=1) + "\n")
    return text(report)


def _step(path: Path) -> str:
    return f"step {int(path.name.removeprefix('step-'))}"
