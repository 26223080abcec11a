"""Compute the losses of images: L1, LPIPS, the discriminator's game, and the adaptive weight.

[AVQ App. A], in the paper's order. train_autoencoder.Autoencoder.step adds them up (Eq. 6 and 8).
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from distributed import mean_over_ranks
from weight_files import read_weights

DELTA = 1e-4             # of Eq. 9: keeps lambda finite where the GAN's gradient vanishes


def pixel_loss(x_hat, x, kind="l1"):
    """Average the error over all pixels and channels: a 0-d tensor. [AVQ App. A]

    kind: "l1", the absolute error as in the released code, which sums it over each image; "l2", the
    squared error of [AVQ Eq. 2].  deviation D4
    """
    _check(kind, "pixel", ("l1", "l2"))
    return (x_hat - x).abs().mean() if kind == "l1" else (x_hat - x).square().mean()


class LPIPS(nn.Module):
    """Measure the perceptual distance of a and b, both (B,3,H,W) in [-1,1]: (B,). [AVQ Eq. 5]

    net: "vgg" as in the paper, "alex" or "squeeze". weights: the folder of the published files
    (default: torch hub's cache), or a state dict with the float32 weights of both.
    Eq. 5 prints no normalisation of the features. Here phi^k has unit length over its channels, as
    in LPIPS, which the paper cites and measures with [42].  deviation D5
    Frozen, and in float32 even under autocast.
    """

    def __init__(self, net="vgg", weights=None):
        super().__init__()
        _check(net, "LPIPS net", TRUNKS)
        build, trunk_file, self.taps, widths = TRUNKS[net]
        self.least_side = {"vgg": 16, "alex": 31, "squeeze": 17}[net]      # px, for all the pools
        with torch.device("meta"):  # no random start, because all weights come from the files
            self.features = build()
            for k, width in enumerate(widths):
                # f^k of Eq. 5. The published names count a dropout, which only its fitting used.
                fitted = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
                self.add_module(f"lin{k}", nn.ModuleDict({"model": fitted}))
        if not isinstance(weights, dict):
            trunk = self.features.state_dict(prefix="features.")
            heads = {key: value for key, value in self.state_dict().items() if key not in trunk}
            weights = (read_weights(trunk_file, trunk, weights, ignore="classifier.")
                       | read_weights(f"{net}.pth", heads, weights))
        self.load_state_dict(weights, assign=True)
        # ImageNet's mean and deviation, moved from [0,1] to [-1,1], rounded as LPIPS was fitted.
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            f = (getattr(self, f"lin{k}").model for k in range(len(self.taps)))
            return sum(f_k((phi_a - phi_b) ** 2).mean((1, 2, 3))               # (B,)
                       for f_k, phi_a, phi_b in zip(f, self._phi(a), self._phi(b)))

    def _phi(self, image):
        """Yield phi^k of Eq. 5, k = 0, 1, ...: unit-length features after each tapped layer."""
        h = (image.to(self.shift.dtype) - self.shift) / self.scale
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self.taps:
                yield _unit_length(h)                                          # (B, C^k, H^k, W^k)


def _unit_length(features):
    """Divide `features` (B,C,H,W) by their Euclidean length over C; zero vectors stay zero."""
    square = features.square().sum(1, keepdim=True)                            # (B, 1, H, W)
    # A zero vector is divided by 1: sqrt's infinite slope at 0 would make its gradient NaN.
    length = torch.where(square > 0, square, 1).sqrt()
    return features / (length + 1e-10)


# The three trunks as torchvision numbers their layers, up to the last one that LPIPS reads.
def _conv(channels, width, kernel, stride=1, padding=0):
    return [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)]


def _vgg16():
    layers, channels = [], 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            layers += _conv(channels, width, 3, padding=1)
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def _alexnet():
    return nn.Sequential(
        *_conv(3, 64, 11, stride=4, padding=2), nn.MaxPool2d(3, 2),
        *_conv(64, 192, 5, padding=2), nn.MaxPool2d(3, 2),
        *_conv(192, 384, 3, padding=1), *_conv(384, 256, 3, padding=1),
        *_conv(256, 256, 3, padding=1))


def _squeezenet():
    # Version 1.1. Its pools round sizes up, unlike AlexNet's.
    return nn.Sequential(
        *_conv(3, 64, 3, stride=2), nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(64, 16, 64), _Fire(128, 16, 64), nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(128, 32, 128), _Fire(256, 32, 128), nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256))


class _Fire(nn.Module):
    """SqueezeNet's block: a narrow 1x1 convolution, then 1x1 and 3x3 side by side."""

    def __init__(self, channels, narrow, wide):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, h):
        h = self.squeeze(h).relu()                                             # (B, narrow, H, W)
        return torch.cat((self.expand1x1(h), self.expand3x3(h)), 1).relu()     # (B, 2 wide, H, W)


TRUNKS = {
    # net: (layers, file, indices of the tapped layers, their widths)
    "vgg": (_vgg16, "vgg16-397923af.pth", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
    "alex": (_alexnet, "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "squeeze": (_squeezenet, "squeezenet1_1-b8a52dc0.pth", (1, 4, 7, 9, 10, 11, 12),
                (64, 128, 256, 384, 384, 512, 512)),
}


class PatchDiscriminator(nn.Module):
    """Judge patches, D of [AVQ Eq. 7]: image (B,C,H,W) in [-1,1] -> logits (B,1,h,w).

    Layout, keys (`main.N.*`) and initialisation are taming's. H and W are at least 3 · 2^n_layers.
    In training mode pass real and generated images in separate calls: BatchNorm would mix the two.
    """

    def __init__(self, in_channels=3, ndf=64, n_layers=3):
        super().__init__()
        widths = [ndf * min(2 ** n, 8) for n in range(n_layers + 1)]
        layers = [nn.Conv2d(in_channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        for n in range(1, n_layers + 1):
            stride = 2 if n < n_layers else 1
            layers += [nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=False),
                       nn.BatchNorm2d(widths[n]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image):
        return self.main(image)                                                # (B, 1, h, w)


def discriminator_loss(logits_real, logits_fake, gan="hinge"):
    """Compute what the discriminator minimises, a 0-d tensor [AVQ Eq. 7].

    "hinge": the loss of taming's and the authors' code, with their factor 0.5. It is 1.0 if all
    logits are 0, and 0 if every patch is right by a margin of 1.  deviation D6
    "log": Eq. 7 times -1, with D = sigmoid(logit). It is 2 log 2 = 1.386 if all logits are 0.
    """
    _check(gan, "gan", ("hinge", "log"))
    if gan == "log":
        # softplus(-l) = -log sigmoid(l) and softplus(l) = -log(1 - sigmoid(l)) never overflow.
        return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def generator_gan_loss(logits_fake, gan="hinge"):
    """Compute what the decoder minimises, a 0-d tensor [AVQ Eq. 7].

    "hinge": -mean(logit). "log": mean log(1 - D(x_hat)), the decoder's term of Eq. 7, not the usual
    substitute -log D(x_hat). Where the discriminator wins its gradient is tiny, but lambda (Eq. 9)
    scales it up again, as long as its norm is well above DELTA.
    """
    _check(gan, "gan", ("hinge", "log"))
    if gan == "log":
        return -F.softplus(logits_fake).mean()
    return -logits_fake.mean()


@contextmanager
def frozen(network):
    """Give the network's parameters no gradient in the block; its input still gets one."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def adaptive_weight(pixel, gan, last_layer, rule="paper", elements=1):
    """Compute lambda = |grad pixel| / (|grad gan| + delta), the GAN loss's weight. [AVQ Eq. 9]

    pixel, gan: 0-d losses, whose graphs are kept. last_layer: the decoder's last weight G_L.
    Returns a 0-d tensor. Eq. 9 prints gradients and means their norms.
    rule: "paper" is Eq. 9. "taming" is the rule of taming and of the authors' code, clamped and
    times 0.8; "ldm" is latent-diffusion's, times 0.5. The callers of these two give pixel +
    perceptual in the place of `pixel`.  deviation D7
    elements: 3HW. LDM clamps at 1e4 a ratio with the *sum* over them, 3HW times that with our mean.
    Why at the last layer: every gradient of the image passes through it. With Eq. 9 the GAN pulls
    as hard there as the pixel loss, and so about as hard on the whole decoder. It is cheap, because
    neither backward pass enters the layers before.
    On several processes the gradients are averaged first, so lambda is that of the whole batch.
    """
    _check(rule, "lambda", ("paper", "taming", "ldm"))
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                 for loss in (pixel, gan)]
    pixel_grad, gan_grad = mean_over_ranks(torch.stack(gradients))          # (3, C, 3, 3) each
    lam = pixel_grad.norm() / (gan_grad.norm() + DELTA)
    factor, most = {"paper": (1, torch.inf), "taming": (0.8, 1e4),
                    "ldm": (0.5, 1e4 / elements)}[rule]
    return factor * lam.clamp(max=most)


def _check(value, flag, allowed):
    if value not in allowed:
        raise ValueError(f"{flag} {value!r}: expected one of {', '.join(allowed)}")
