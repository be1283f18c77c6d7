"""Encoders for small images, registered with timm: CIFAR ResNets and the network of the paper.

Importing this module is enough for `timm.create_model("resnet18_cifar")`, and for loading what was
saved from it.

- resnet18_cifar: a 3x3 stem with stride 1 and no pooling, stages of 64, 128, 256 and 512 channels
  (Yang et al., arXiv:2405.17181, and much CIFAR work). `stem_stride=2` makes any of these cheaper.
- resnet20_cifar, resnet32_cifar, resnet56_cifar: three stages of 16, 32 and 64 channels (He et al.
  2016, section 4.2), with 1x1 convolutions where the paper pads the shortcuts.
- resnet18_cifar_fixup, resnet20_cifar_fixup, resnet32_cifar_fixup, resnet56_cifar_fixup: the same
  without norms, by Fixup (Zhang, Dauphin, Ma, "Fixup Initialization", arXiv:1901.09321): scalar
  biases and multipliers, and weights that let the network begin as if it had few layers.
- mlp_2000: 784-2000-10 with GELU, all weights and biases from N(0, 0.01^2), logits divided by
  sqrt(2000) (Yang et al.).
"""

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn


class CifarResNet(nn.Module):
    """A ResNet of basic blocks whose stem is one 3x3 convolution, with timm's interface."""

    block: type[nn.Module] = BasicBlock
    norm_layer: type[nn.Module] = nn.BatchNorm2d

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        layers: tuple[int, ...] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        stem_stride: int = 1,
    ):
        super().__init__()
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool ({global_pool!r}) must be 'avg' or ''")
        self.num_features = self.head_hidden_size = channels[-1]
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = self.norm_layer(channels[0])
        self.act1 = nn.ReLU(inplace=True)
        stages, width = [], channels[0]
        for i, (planes, depth) in enumerate(zip(channels, layers, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                shortcut = (
                    downsample_conv(width, planes, 1, stride, norm_layer=self.norm_layer)
                    if stride != 1 or width != planes
                    else None
                )
                blocks.append(self.block(width, planes, stride, shortcut))
                width = planes
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.reset_classifier(num_classes)
        self.init_convolutions()

    def init_convolutions(self) -> None:
        """Draw the convolutions' weights, by He et al. 2015."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return which parameters are of which layer, as timm's layer decay reads it."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; no classes for none."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, [B, D, H, W]."""
        return self.stages(self.act1(self.bn1(self.conv1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with `pre_logits` the pooled features [B, D]."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [B, K]."""
        return self.forward_head(self.forward_features(x))


class FixupBlock(nn.Module):
    """A basic block without norms: relu(shortcut + scale * conv2(...) + bias), with a scalar bias
    before each convolution and before the ReLU.
    """

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (
            nn.Parameter(torch.zeros(1)) for _ in range(4)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, [B, planes, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x + self.bias1a)
        x = F.relu(self.conv1(x + self.bias1a) + self.bias1b)
        x = self.scale * self.conv2(x + self.bias2a) + self.bias2b
        return F.relu(x + shortcut)


class FixupResNet(CifarResNet):
    """A CIFAR ResNet without norms.

    Of L blocks of m = 2 convolutions each, the first is drawn L^(-1 / (2 m - 2)) times as large as
    by He et al. 2015, the second and the head begin at 0. The 1x1 convolutions of shortcuts are
    drawn as those of `CifarResNet`.

    Source: Zhang, Dauphin, Ma, arXiv:1901.09321, section 3.
    """

    block = FixupBlock
    norm_layer = nn.Identity

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias1, self.bias2 = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    @torch.no_grad()
    def init_convolutions(self) -> None:
        """Draw the convolutions' weights, by He et al. 2015, smaller in the blocks."""
        super().init_convolutions()
        blocks = [module for module in self.modules() if isinstance(module, FixupBlock)]
        for block in blocks:
            block.conv1.weight *= len(blocks) ** -0.5
            nn.init.zeros_(block.conv2.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return which parameters are of which layer, as timm's layer decay reads it."""
        return {**super().group_matcher(coarse), "stem": r"^conv1|^bias1$"}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by one of zeros; no classes for none."""
        super().reset_classifier(num_classes, global_pool)
        for parameter in self.fc.parameters():
            nn.init.zeros_(parameter)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, [B, D, H, W]."""
        return self.stages(self.act1(self.conv1(x) + self.bias1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with `pre_logits` the pooled features [B, D]."""
        return super().forward_head(x + self.bias2, pre_logits)


class OneHiddenLayer(nn.Module):
    """A network of one hidden layer whose logits are divided by the square root of its width."""

    def __init__(
        self,
        hidden_features: int = 2000,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        global_pool: str = "",
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.input_size = (in_chans, height, width)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = hidden_features
        self.hidden = nn.Linear(in_chans * height * width, hidden_features)
        self.act = nn.GELU()
        self.reset_classifier(num_classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return which parameters are of which layer, as timm's layer decay reads it."""
        return {"stem": r"^hidden"}

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; no classes for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, std=0.01)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the hidden activations, [B, D]."""
        return self.act(self.hidden(x.flatten(1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with `pre_logits` the features."""
        if pre_logits or not self.num_classes:
            return x
        return self.head(x) / self.num_features**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [B, K]."""
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs) -> dict:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **{
            f"resnet{depth}_cifar{by}": _cfg()
            for depth in (18, 20, 32, 56)
            for by in ("", "_fixup")
        },
        "mlp_2000": _cfg(
            input_size=(1, 28, 28),
            mean=(0.0,),  # it is fed [0, 1] pixels as they are
            std=(1.0,),
            first_conv=None,
            classifier="head",
            fixed_input_size=True,
        ),
    }
)


def _resnet(variant: str, pretrained: bool, depth: int | None = None, **kwargs) -> CifarResNet:
    if depth is not None:
        kwargs = {"channels": (16, 32, 64), "layers": ((depth - 2) // 6,) * 3, **kwargs}
    kind = FixupResNet if variant.endswith("_fixup") else CifarResNet
    return build_model_with_cfg(kind, variant, pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 with a 3x3 stem of stride 1 and no pooling."""
    return _resnet("resnet18_cifar", pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20 of He et al. 2016, section 4.2."""
    return _resnet("resnet20_cifar", pretrained, depth=20, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32 of He et al. 2016, section 4.2."""
    return _resnet("resnet32_cifar", pretrained, depth=32, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56 of He et al. 2016, section 4.2."""
    return _resnet("resnet56_cifar", pretrained, depth=56, **kwargs)


@register_model
def resnet18_cifar_fixup(pretrained: bool = False, **kwargs) -> FixupResNet:
    """resnet18_cifar without norms, by Fixup."""
    return _resnet("resnet18_cifar_fixup", pretrained, **kwargs)


@register_model
def resnet20_cifar_fixup(pretrained: bool = False, **kwargs) -> FixupResNet:
    """resnet20_cifar without norms, by Fixup."""
    return _resnet("resnet20_cifar_fixup", pretrained, depth=20, **kwargs)


@register_model
def resnet32_cifar_fixup(pretrained: bool = False, **kwargs) -> FixupResNet:
    """resnet32_cifar without norms, by Fixup."""
    return _resnet("resnet32_cifar_fixup", pretrained, depth=32, **kwargs)


@register_model
def resnet56_cifar_fixup(pretrained: bool = False, **kwargs) -> FixupResNet:
    """resnet56_cifar without norms, by Fixup."""
    return _resnet("resnet56_cifar_fixup", pretrained, depth=56, **kwargs)


@register_model
def mlp_2000(pretrained: bool = False, **kwargs) -> OneHiddenLayer:
    """The 784-2000-10 network of Yang et al., arXiv:2405.17181."""
    return build_model_with_cfg(OneHiddenLayer, "mlp_2000", pretrained, **kwargs)
