"""What the decoder is trained with: its losses and their balance [AVQ App. A].

In the order of the paper: L1 and LPIPS (Eq. 5), the patch discriminator and its two-player loss
(Eq. 7), the adaptive weight lambda (Eq. 9), and the sum of all three (Eq. 6, 8) as one gradient
with respect to the image:

    x_hat ──► L1, LPIPS, D ──► dL/dx_hat (B,3,H,W) ──► x_hat.backward(dL/dx_hat), the one
                 │                                        walk back through the decoder
                 └──► their gradients at conv_out.weight (from its input features) ──► lambda

Not here: the published files that LPIPS reads (weight_files.py), the codebook loss (quantize.py),
the KL term (Eq. 10-11: quantize.py, stages.py), who steps in which order (stages.py) and when the
discriminator starts (train.py).
"""

import torch
import torch.nn.functional as F
from torch import nn

from distributed import mean_over_ranks
from weight_files import read_weights

# ---------------------------------------------------------------- reconstruction, Eq. 5-6


def pixel_loss(x_hat, x):
    """Mean absolute error over all pixels and channels of the batch, a 0-d tensor [AVQ App. A].

    Neither Eq. 2's squared error nor the released code's sum over each image.  deviation D4
    """
    return (x_hat - x).abs().mean()


class LPIPS(nn.Module):
    """Perceptual distance: `LPIPS(net)(a, b)`, both (B,3,H,W) in [-1,1] -> (B,) [AVQ Eq. 5].

    net: "vgg" as in the paper, "alex" or "squeeze".
    weights: the folder of the published files (default: torch hub's cache; see `find_weights`), or
    a float32 state dict with the keys of both files, `features.*` and `lin{k}.model.1.weight`.

    Eq. 5 prints no normalisation of the features; phi^k here has unit length over its channels, as
    in the LPIPS that the paper cites and measures with [42].  deviation D5
    Frozen, always in eval mode, in float32 also under autocast. Raises UserError for a missing,
    unreadable or foreign file, ValueError for an unknown net.
    """

    def __init__(self, net="vgg", weights=None):
        super().__init__()
        if net not in TRUNKS:
            raise ValueError(f"LPIPS net {net!r}: expected one of {', '.join(TRUNKS)}")
        self.net = net
        build, file, self.taps, widths = TRUNKS[net]
        with torch.device("meta"):  # all numbers come from the files; none is drawn at random
            self.features = build()
            for k, width in enumerate(widths):
                self.add_module(f"lin{k}", _Head(width))
        if not isinstance(weights, dict):
            weights = self._read(file, weights)
        self.load_state_dict(weights, assign=True)
        # ImageNet's mean and deviation, moved from [0,1] to [-1,1], rounded as LPIPS was fitted.
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def _read(self, trunk_file, folder):
        wanted = self.state_dict()
        trunk = {key: value for key, value in wanted.items() if key.startswith("features.")}
        heads = {key: value for key, value in wanted.items() if key.startswith("lin")}
        return (read_weights(trunk_file, trunk, folder, ignore="classifier.")
                | read_weights(f"{self.net}.pth", heads, folder))

    def train(self, mode=True):
        """Stays in eval mode: a parent's `.train()` must not reach a frozen measure."""
        return super().train(False)

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            distance = 0
            for k, (phi_a, phi_b) in enumerate(zip(self._phi(a), self._phi(b))):
                head = getattr(self, f"lin{k}")                                # f^k of Eq. 5
                distance = distance + head((phi_a - phi_b) ** 2).mean((1, 2, 3))  # (B,)
            return distance

    def _phi(self, image):
        """phi^k of Eq. 5 for k = 0, 1, ...: unit-length features after each tapped layer."""
        h = (image.to(self.shift.dtype) - self.shift) / self.scale
        levels = []
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self.taps:
                levels.append(_unit_length(h))                                 # (B, C^k, H^k, W^k)
        return levels


def _unit_length(features):
    """`features` (B,C,H,W) divided by their Euclidean length over C; zero vectors stay zero."""
    square = features.square().sum(1, keepdim=True)                            # (B, 1, H, W)
    # sqrt has an infinite slope at 0, and infinity times the zero features would be a NaN gradient;
    # a zero vector may be divided by anything.
    length = torch.where(square > 0, square, 1).sqrt()
    return features / (length + 1e-10)


class _Head(nn.Module):
    """f^k of Eq. 5: a 1x1 convolution to one channel, after a dropout used only to fit it."""

    def __init__(self, channels):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, difference):
        return self.model(difference)                                          # (B, 1, H^k, W^k)


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


# ---------------------------------------------------------------- the two players, Eq. 7


class PatchDiscriminator(nn.Module):
    """D of [AVQ Eq. 7]: image (B,C,H,W) in [-1,1] -> one logit for each patch (B,1,h,w).

    Layout, key names (`main.N.*`) and initialisation are taming-transformers'. n_layers strides of
    2; ndf channels after the first, doubled up to eightfold. In training mode real and generated
    images must come in separate calls: BatchNorm would otherwise see the two mixed.
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
    """What the discriminator minimises, a 0-d tensor [AVQ Eq. 7].

    "hinge": taming's and the authors' code, with their factor 0.5: 1.0 for a discriminator that
    answers 0, and 0 for one that is right by a margin of 1 everywhere. The default.  deviation D6
    "log": Eq. 7 with its sign turned, D = sigmoid(logit), no factor: 2 log 2 = 1.386 for one that
    answers 0. (taming halves this one, too; Adam does not see a constant factor.)
    """
    if _check(gan, "gan", ("hinge", "log")) == "log":
        # -log sigmoid(l) = softplus(-l), -log(1 - sigmoid(l)) = softplus(l): neither overflows
        return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def generator_gan_loss(logits_fake, gan="hinge"):
    """What the decoder minimises, a 0-d tensor [AVQ Eq. 7].

    "hinge": -mean(logit).
    "log": mean log(1 - D(x_hat)), literally the decoder's term of Eq. 7, not the usual substitute
    -log D(x_hat). Its gradient fades where the discriminator wins, which lambda (Eq. 9) undoes: it
    divides by that gradient's norm, until the norm comes down to delta = 1e-4. From there on the
    term fades out instead of blowing up.
    """
    if _check(gan, "gan", ("hinge", "log")) == "log":
        return -F.softplus(logits_fake).mean()
    return -logits_fake.mean()


# ---------------------------------------------------------------- the balance, Eq. 6, 8, 9


def adaptive_weight(rec_grad, gan_grad, rule="paper"):
    """lambda, a 0-d tensor on the gradients' device: nothing waits for it [AVQ Eq. 9].

    rec_grad, gan_grad: gradients of the reconstruction and the GAN loss with respect to the last
    layer's weight. Eq. 9 divides gradients; their norms are meant.
    "paper": the ratio as printed. "taming": clamped to [0, 1e4] and times 0.8, as taming and the
    authors' code.  deviation D7
    """
    weight = _wide(rec_grad).norm() / (_wide(gan_grad).norm() + 1e-4)
    if _check(rule, "lambda", ("paper", "taming")) == "taming":
        weight = 0.8 * weight.clamp(0, 1e4)
    return weight.detach()


def last_layer_gradient(features, image_gradient, weight_shape):
    """The gradient of `conv_out.weight` (3x3, stride 1, padding 1), in float32.

    features: conv_out's input (B,C,H,W). image_gradient: the loss's gradient with respect to
    conv_out's output (B,3,H,W). The chain rule through this one layer needs no graph, so the
    decoder's stays whole for its one backward.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, image_gradient = _wide(features.detach()), _wide(image_gradient)
        return torch.nn.grad.conv2d_weight(
            features, weight_shape, image_gradient, padding=1)                 # (3, C, 3, 3)


def generator_gradient(x_hat, x, features, weight_shape, perceptual=None, discriminator=None,
                       gan="hinge", rule="paper"):
    """The whole objective's gradient with respect to the image [AVQ Eq. 6] [AVQ Eq. 8].

    x_hat, x: the decoder's output and its target (B,3,H,W) in [-1,1]. features, weight_shape:
    conv_out's input (B,C,H,W) and its weight's shape. perceptual: an LPIPS or None. discriminator:
    a bare PatchDiscriminator (not wrapped in DistributedDataParallel, which would wait for its
    parameters' gradients), or None before it starts.
    rule: lambda's; "paper" has the pixel gradient in the numerator, "taming" pixel + perceptual.

    Returns (image_gradient (B,3,H,W), {"pixel", "perceptual", "gan", "lambda"}: detached 0-d
    tensors, those that exist). The losses are this process's means; lambda is the same on every
    process. The caller goes on with

        x_hat.backward(image_gradient)

    which gives the decoder the gradients of L_pixel + L_percep + lambda L_GAN. Each loss is walked
    back once, to the image; no graph is retained, which compiled decoders do not allow. The
    discriminator's `.grad` stays untouched.
    """
    image = _wide(x_hat.detach()).requires_grad_()
    values = {}

    def gradient(name, loss):
        values[name] = loss.detach()
        return torch.autograd.grad(loss, image)[0]                             # (B, 3, H, W)

    with torch.autocast(image.device.type, enabled=False):
        pixel = total = gradient("pixel", pixel_loss(image, x))
        if perceptual is not None:
            total = pixel + gradient("perceptual", perceptual(image, x).mean())
        if discriminator is not None:
            adversarial = gradient("gan", generator_gan_loss(discriminator(image), gan))
            numerator = pixel if rule == "paper" else total
            both = torch.stack([last_layer_gradient(features, g, weight_shape)
                                for g in (numerator, adversarial)])            # (2, 3, C, 3, 3)
            # The norm of the mean over processes, not the mean of their norms: the whole batch's
            # lambda, the same everywhere.
            values["lambda"] = adaptive_weight(*mean_over_ranks(both), rule)
            total = total + values["lambda"] * adversarial
    return total.to(x_hat.dtype), values


def _wide(tensor):
    """`tensor` in float32; float64, which only tests use, stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(value, flag, allowed):
    if value not in allowed:
        raise ValueError(f"{flag} {value!r}: expected one of {', '.join(allowed)}")
    return value
