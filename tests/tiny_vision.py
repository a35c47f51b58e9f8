"""Small random models that see, a Qwen3-VL and a LLaVA, with the embedded tokenizer; and pictures for them."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cepo.policy import EMBEDDED

SMALL = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
SPECIAL = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
           "vision_end": "<|vision_end|>"}  # fmt: skip


def template(image: str) -> str:
    return f"""{{% for m in messages %}}{{{{ m.role }}}}:{{% for part in m.content %}}
{{%- if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}
{{%- endfor %}};{{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"""


class Processor(Qwen3VLProcessor):
    """One without videos, whose processing needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        pass


def text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        **SMALL, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def tiny_qwen3_vl() -> tuple[Any, Any]:
    """Model and processor; positions in three dimensions, images of any size."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024)
    shown = template(SPECIAL["vision_start"] + SPECIAL["image"] + SPECIAL["vision_end"])
    processor = Processor(image_processor=images, tokenizer=tokenizer, video_processor=object(), chat_template=shown)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**text_config(tokenizer), "rope_parameters": rope},
        vision_config={
            **SMALL, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config), processor


def tiny_llava() -> tuple[Any, Any]:
    """Model and processor; positions as in a text, every image resized to the same square."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    seen = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
            "image_size": 16, "projection_dim": 32}  # fmt: skip
    config = LlavaConfig(
        vision_config={**SMALL, **seen},
        text_config={"model_type": "qwen3", **text_config(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    random = torch.Generator().manual_seed(width + 1000 * seed)
    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=random)
    return Image.fromarray(noise.numpy())
