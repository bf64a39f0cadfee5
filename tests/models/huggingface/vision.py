"""Image models: transformers over patches, convolutional networks, and mixtures of both."""

from __future__ import annotations

from dataclasses import replace

from models.entry import Entry
from models.huggingface import inputs as kind
from models.huggingface.spec import Row, entry

IMAGE = kind.Modality(
    kind.image,
    {"pixel_values": kind.BATCH},
    kind.class_labels,
    {"labels": kind.BATCH},
    seq=32,
    unseen_seq=32,
)
FEATURES = replace(IMAGE, label=None)
LARGER = replace(IMAGE, seq=64, unseen_seq=64)
SEGMENTED = replace(IMAGE, label=kind.pixel_labels)

VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DINO = {**VIT, "mlp_ratio": 2}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
CONVNEXT = {**STAGES, "num_stages": 4, "patch_size": 2}
RESNET = {**STAGES, "embedding_size": 8}
SEGFORMER = {
    **STAGES,
    "num_encoder_blocks": 4,
    "sr_ratios": [4, 2, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16,
    "drop_path_rate": 0.0,
}
MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
    "num_attention_heads": 4,
    "mlp_ratio": 2.0,
}
MOBILENET = {
    "image_size": 32,
    "depth_multiplier": 0.35,
    "min_depth": 8,
    "finegrained_output": False,
}
EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.4,
    "depth_divisor": 4,
    "hidden_dim": 320,
}
POOLFORMER = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 2, 1],
    "num_encoder_blocks": 4,
    "drop_path_rate": 0.0,
}
PVT = {
    "image_size": 32,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "drop_path_rate": 0.0,
}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "drop_path_rate": 0,
}
FOCAL = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2],
    "hidden_sizes": [16, 32],
    "focal_levels": [1, 2],
    "focal_windows": [3, 3],
    "drop_path_rate": 0.0,
}
HIERA = {
    "image_size": [32, 32],
    "patch_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 4],
    "masked_unit_size": [4, 4],
    "query_stride": [2, 2],
    "num_query_pool": 2,
}
YOLOS = {**VIT, "image_size": [32, 32], "num_detection_tokens": 4}
DEPTH = {
    **VIT,
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 16,
    "is_hybrid": False,
}

TABLE: list[Row] = [
    ("vit", "ViTForImageClassification", IMAGE, VIT),
    ("deit", "DeiTForImageClassification", IMAGE, VIT),
    (
        "beit",
        "BeitForImageClassification",
        IMAGE,
        {**VIT, "use_relative_position_bias": True, "drop_path_rate": 0.0},
    ),
    ("dinov2", "Dinov2ForImageClassification", IMAGE, DINO),
    ("dinov3", "DINOv3ViTModel", FEATURES, VIT),
    ("ijepa", "IJepaForImageClassification", IMAGE, VIT),
    ("vit-msn", "ViTMSNForImageClassification", IMAGE, VIT),
    ("yolos", "YolosForObjectDetection", FEATURES, YOLOS),
    ("dpt", "DPTForDepthEstimation", FEATURES, DEPTH),
    ("swin", "SwinForImageClassification", IMAGE, SWIN),
    ("swinv2", "Swinv2ForImageClassification", IMAGE, SWIN),
    ("hiera", "HieraForImageClassification", IMAGE, HIERA),
    ("focalnet", "FocalNetForImageClassification", IMAGE, FOCAL),
    ("pvt", "PvtForImageClassification", IMAGE, PVT),
    ("levit", "LevitForImageClassification", LARGER, LEVIT),
    ("poolformer", "PoolFormerForImageClassification", IMAGE, POOLFORMER),
    ("convnext", "ConvNextForImageClassification", IMAGE, CONVNEXT),
    ("convnextv2", "ConvNextV2ForImageClassification", IMAGE, CONVNEXT),
    ("resnet", "ResNetForImageClassification", IMAGE, RESNET),
    ("resnet-basic", "ResNetForImageClassification", IMAGE, {**RESNET, "layer_type": "basic"}),
    ("regnet", "RegNetForImageClassification", IMAGE, {**RESNET, "groups_width": 8}),
    ("bit", "BitForImageClassification", IMAGE, {**RESNET, "num_groups": 4}),
    ("segformer", "SegformerForSemanticSegmentation", SEGMENTED, SEGFORMER),
    ("segformer-classifier", "SegformerForImageClassification", IMAGE, SEGFORMER),
    ("mobilevit", "MobileViTForImageClassification", LARGER, MOBILEVIT),
    ("mobilenet-v1", "MobileNetV1ForImageClassification", IMAGE, MOBILENET),
    ("mobilenet-v2", "MobileNetV2ForImageClassification", IMAGE, MOBILENET),
    ("efficientnet", "EfficientNetForImageClassification", IMAGE, EFFICIENT),
]

ENTRIES: list[Entry] = [entry("vision", *row) for row in TABLE]
