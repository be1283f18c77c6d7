"""Small models of many architectures of timm and transformers."""

import timm
import torch
import transformers

import hf_specreg.encoders.small  # noqa: F401  registers the CIFAR networks
from hf_specreg.encoders.input_size import find_input_size

TIMM = {
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2},
    "botnet26t_256": {},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "coat_lite_tiny": {},
    "coat_tiny": {},
    "convit_tiny": {"img_size": 32, "depth": 3},
    "convmixer_768_32": {},
    "convnext_atto": {},
    "crossvit_tiny_240": {},
    "cs3darknet_s": {},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192)},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2},
    "densenet121": {"block_config": (1, 1, 2, 1)},
    "dla46_c": {},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "efficientnet_lite0": {},
    "tf_efficientnet_lite0": {},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "num_classes": 5},
    "fastvit_t8": {},
    "focalnet_tiny_srf": {},
    "gcvit_xxtiny": {"img_size": 224},
    "ghostnet_050": {},
    "hardcorenas_a": {},
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "levit_128s": {},
    "lcnet_035": {},
    "mambaout_femto": {},
    "coatnet_nano_rw_224": {},
    "mixer_s32_224": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "mvitv2_tiny": {},
    "nest_tiny": {},
    "nf_regnet_b0": {},
    "test_nfnet": {},
    "pit_ti_224": {"img_size": 64},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "regnetx_002": {},
    "test_byobnet": {},
    "res2net50_14w_8s": {"layers": (1, 1, 1, 1)},
    "gmlp_ti16_224": {},
    "resnet10t": {},
    "resnetv2_18": {},
    "rexnet_100": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 24,
    },
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4, "embed_dim": 24},
    "tf_efficientnet_b0": {},
    "tiny_vit_5m_224": {},
    "twins_svt_small": {"img_size": 64},
    "vgg11": {"num_classes": 5, "mlp_ratio": 0.02},
    "visformer_tiny": {},
    "vit_relpos_small_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "vovnet39a": {},
    "xception41": {},
    "xcit_nano_12_p16_224": {"depth": 2},
    "resnet20_cifar": {},
    "resnet20_cifar_fixup": {},
    "mlp_2000": {"hidden_features": 20},
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CONV = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
TRANSFORMERS = {
    "BeitConfig": TINY,
    "BitConfig": {**CONV, "hidden_sizes": [128, 128, 128, 128], "embedding_size": 32},
    "ConvNextConfig": CONV,
    "ConvNextV2Config": CONV,
    "Data2VecVisionConfig": TINY,
    "DeiTConfig": TINY,
    "Dinov2Config": TINY,
    "Dinov2WithRegistersConfig": TINY,
    "EfficientNetConfig": {
        "width_coefficient": 0.3,
        "depth_coefficient": 0.3,
        "hidden_dim": 384,
        "image_size": 64,
    },
    "FocalNetConfig": {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64},
    "HieraConfig": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 8],
        "image_size": [64, 64],
    },
    "LevitConfig": {
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "key_dim": [16, 16, 16],
        "depths": [1, 1, 1],
    },
    "MobileNetV2Config": {"depth_multiplier": 0.35, "image_size": 64},
    "MobileViTConfig": {"image_size": 64},
    "PoolFormerConfig": {**CONV, "num_encoder_blocks": 4},
    "PvtV2Config": {"image_size": 64, "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    "RegNetConfig": {"embedding_size": 16, **CONV, "groups_width": 8},
    "ResNetConfig": {
        "embedding_size": 16,
        "hidden_sizes": [32, 64, 64, 96],
        "depths": [1, 1, 1, 1],
    },
    "SwinConfig": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "Swinv2Config": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "ViTConfig": TINY,
    "ViTMSNConfig": TINY,
}


CONVOLUTIONAL = {
    "convmixer_768_32",
    "dla46_c",
    "focalnet_tiny_srf",
    "hrnet_w18_small",
    "poolformer_s12",
    "res2net50_14w_8s",
    "tf_efficientnet_b0",
    "xception41",
}


def timm_model(name):
    kwargs = {"num_classes": 5, **TIMM[name]}
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def transformers_model(name):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**TRANSFORMERS[name])
    config.num_labels = 5
    config.architectures = []
    return transformers.AutoModelForImageClassification.from_config(config).eval()


def image_size(name, model):
    """Convolutional networks of many operations are run on 64 pixels, which they take as well."""
    return (3, 64, 64) if name in CONVOLUTIONAL else find_input_size(model)


def random_images(model, size=None):
    size = size or find_input_size(model)
    return torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
