"""In TRL with images: the teachers of a small random Qwen3-VL see what the policy sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import one_thread  # noqa: F401
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
from PIL import Image
from test_trl import GROUP, OTHER, RIGHT, WRONG, correct, make, prompt, say, step
from transformers import Qwen2VLImageProcessorPil

from cepo.policy import EMBEDDED
from cepo_kernels import contrastive_credit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TEMPLATE = """{% for m in messages %}{{ m.role }}:{% for part in m.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
SPECIAL = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
           "vision_end": "<|vision_end|>"}  # fmt: skip


class Processor(Qwen3VLProcessor):
    """One without videos, whose processing needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        pass


def tiny_vision_model() -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024)
    processor = Processor(image_processor=images, tokenizer=tokenizer, video_processor=object(), chat_template=TEMPLATE)
    small = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            **small, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "rope_parameters": rope,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **small, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config), processor


def picture(width: int, height: int) -> Image.Image:
    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    return Image.fromarray(noise.numpy())


@pytest.mark.parametrize("template", ["hint", "splice"])
def test_teachers_see_the_images(tmp_path: Path, template: str) -> None:
    model, processor = tiny_vision_model()
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
