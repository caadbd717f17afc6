"""The four-layer convolutional network of few-shot classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.models.check import positive

FORMS = ("max_pool", "strided")


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm and ReLU that halve the image, and a linear head.

    Args:
        ways: outputs.
        in_channels: C of the images: 1 for Omniglot, 3 for mini-ImageNet.
        width: filters of every block: 64 for Omniglot, 32 for mini-ImageNet's MAML.
        image_size: H = W of the images, at least 16.
        form: "max_pool" halves by a 2x2 max-pool after each block, and flattens the last image.
            "strided" halves by convolutions of stride 2, and takes the mean over the last image, as
            MAML does on Omniglot. (Its code pads as TensorFlow does, images of even size only on
            the right and below; here they are padded on all sides.)

    Shapes: [N, C, H, W] -> [N, ways].

    Initialisation: Glorot's uniform convolutions, zero biases, batch norm as the identity.

    Raises:
        TypeError, ValueError: an argument is not a positive int, the image is too small, or the
            form is unknown.

    Source: Vinyals et al., "Matching Networks" (2016), section 4.1; Finn, Abbeel, Levine,
    "Model-Agnostic Meta-Learning" (2017), section 5.2 and its code (strided form).
    """

    def __init__(
        self,
        ways: int,
        *,
        in_channels: int = 1,
        width: int = 64,
        image_size: int = 28,
        form: str = "max_pool",
    ) -> None:
        super().__init__()
        for argument, value in (
            ("ways", ways),
            ("in_channels", in_channels),
            ("width", width),
            ("image_size", image_size),
        ):
            positive("Conv4", argument, value)
        if form not in FORMS:
            raise ValueError(f"Conv4: `form` must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
        if image_size < 16:
            raise ValueError(f"Conv4: `image_size` must be at least 16, got {image_size}")
        self.strided = form == "strided"
        channels = (in_channels, width, width, width)
        self.blocks = nn.Sequential(*[self._block(inputs, width) for inputs in channels])
        left = image_size // 16
        self.head = nn.Linear(width if self.strided else width * left * left, ways)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _block(self, inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride=2 if self.strided else 1, padding=1)
        layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, *([] if self.strided else [nn.MaxPool2d(2)]))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, ways]."""
        x = self.blocks(x)
        return self.head(x.mean((2, 3)) if self.strided else torch.flatten(x, 1))
