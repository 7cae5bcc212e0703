"""Vision models of transformers, and the two towers of CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.zoo.batches import captioned_images, labelled_images
from tests.zoo.rows import Family, Size

_LABELS = {"num_labels": 16, "problem_type": "single_label_classification"}
_IMAGENET = {"num_labels": 1000, "problem_type": "single_label_classification"}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_dropout": 0.1,
}

VISION: Mapping[str, Family] = MappingProxyType(
    {
        "vit": Family(
            "image classification on sixteen patches and the class token",
            "ViTConfig",
            "ViTForImageClassification",
            labelled_images,
            {
                **_LABELS,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            },
            {
                "vit-l": Size(
                    304.3,
                    0,
                    {
                        **_IMAGENET,
                        "hidden_size": 1024,
                        "intermediate_size": 4096,
                        "num_hidden_layers": 24,
                        "num_attention_heads": 16,
                    },
                )
            },
        ),
        "swin": Family(
            "attention in windows that shift, patches merged between stages",
            "SwinConfig",
            "SwinForImageClassification",
            labelled_images,
            {
                **_LABELS,
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [4, 8],
                "window_size": 4,
                "hidden_dropout_prob": 0.1,
                "attention_probs_dropout_prob": 0.1,
                "drop_path_rate": 0.0,
            },
            {
                "swin-b": Size(
                    87.8,
                    0,
                    {
                        **_IMAGENET,
                        "embed_dim": 128,
                        "depths": [2, 2, 18, 2],
                        "num_heads": [4, 8, 16, 32],
                        "drop_path_rate": 0.0,
                    },
                )
            },
        ),
        "convnext": Family(
            "depthwise convolutions, channels last between them",
            "ConvNextConfig",
            "ConvNextForImageClassification",
            labelled_images,
            {
                **_LABELS,
                "image_size": 32,
                "hidden_sizes": [16, 32, 64, 128],
                "depths": [1, 1, 1, 1],
            },
            {
                "convnext-b": Size(
                    88.6,
                    0,
                    {
                        **_IMAGENET,
                        "hidden_sizes": [128, 256, 512, 1024],
                        "depths": [3, 3, 27, 3],
                    },
                )
            },
        ),
        "clip": Family(
            "two towers and a contrastive loss over the pairs of a batch",
            "CLIPConfig",
            "CLIPModel",
            captioned_images,
            {
                "projection_dim": 16,
                "text_config": {
                    **_TOWER,
                    "vocab_size": 128,
                    "max_position_embeddings": 16,
                    "bos_token_id": 0,
                    "eos_token_id": 127,
                },
                "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4},
            },
            {
                "clip-vit-l": Size(
                    427.6,
                    77,
                    {
                        "projection_dim": 768,
                        "text_config": {
                            "hidden_size": 768,
                            "intermediate_size": 3072,
                            "num_attention_heads": 12,
                        },
                        "vision_config": {
                            "hidden_size": 1024,
                            "intermediate_size": 4096,
                            "num_hidden_layers": 24,
                            "num_attention_heads": 16,
                            "patch_size": 14,
                        },
                    },
                )
            },
            equal_rows=False,
        ),
    }
)
