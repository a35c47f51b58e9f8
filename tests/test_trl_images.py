"""In TRL with images: the teachers of a small random Qwen3-VL see what the policy sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import one_thread  # noqa: F401

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
from test_trl import GROUP, OTHER, RIGHT, WRONG, correct, make, prompt, say, step
from tiny_vision import picture, tiny_qwen3_vl

from cepo_kernels import contrastive_credit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("template", ["hint", "splice"])
def test_teachers_see_the_images(tmp_path: Path, template: str) -> None:
    model, processor = tiny_qwen3_vl()
    data = [
        {"prompt": prompt(f"add {i}"), "answer": "7", "image": picture(width, 24)} for i, width in enumerate((16, 32))
    ]
    # The first group is all right, so its images must be left out, and only its.
    said = say(*[RIGHT] * GROUP, RIGHT, WRONG, OTHER, RIGHT)
    trainer = make(
        tmp_path, data=data, reward=correct, model=model, template=template, max_steps=1,
        more={"rollout_func": said, "processing_class": processor},
    )  # fmt: skip
    output = step(trainer, data)
    model.eval()

    def logprobs(b: int, answer: str) -> torch.Tensor:
        hint, splice = (f"\nHint: the answer is {answer}.", "") if template == "hint" else ("", f"{answer}\n")
        content = [{"type": "image", "image": data[1]["image"]}, {"type": "text", "text": f"add 1{hint}"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        response = output["completion_ids"][b][output["completion_mask"][b].bool()]
        after = torch.cat([processor.tokenizer(splice, return_tensors="pt")["input_ids"][0].long(), response])[None]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], after], dim=1)
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], torch.full_like(after, fill)], dim=1)
        logits = model(**inputs).logits[0, -len(response) - 1 : -1]
        return logits.log_softmax(-1).gather(1, response[:, None])[:, 0].detach()

    assert not output["advantages"][:GROUP].any()
    size = 0.5 / (torch.tensor([1.0, 0, 0, 1]).std() + 1e-4)
    for b, sign in zip(range(GROUP, 2 * GROUP), (1, -1, -1, 1), strict=True):
        positive, negative = logprobs(b, "7"), logprobs(b, "8")
        expected = contrastive_credit(positive, negative, sign * size[None]).advantages
        assert torch.allclose(output["advantages"][b, : len(expected)], expected, atol=1e-5)
    trainer.train()
    assert trainer.state.global_step == 1
