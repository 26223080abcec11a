"""One training step of an image network, written out: AVQ Eq. 6 to 9, nothing shared or saved."""

import torch

from losses import discriminator_loss, generator_gan_loss


def textbook_step(model, discriminator, encode, x, latent_weight=1.0, perceptual=None, gan="hinge",
                  rule="paper"):
    """(gradients of the generator, gradients of the discriminator, lambda) of one batch.

    encode: () -> (input of conv_out (B,ch,H,W), the latent's loss or None).
    """
    h, latent = encode()
    x_hat = model.decoder.conv_out(h)
    pixel = (x_hat - x).abs().mean()
    rec = pixel if perceptual is None else pixel + perceptual(x_hat, x).mean()
    adversarial = generator_gan_loss(discriminator(x_hat), gan)
    last = model.decoder.conv_out.weight
    numerator, denominator = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
                              for loss in (pixel if rule == "paper" else rec, adversarial))
    weight = numerator / (denominator + 1e-4)
    if rule == "taming":
        weight = 0.8 * weight.clamp(0, 1e4)
    loss = rec + weight.detach() * adversarial
    if latent is not None:
        loss = loss + latent_weight * latent
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = dict(zip(ours, torch.autograd.grad(loss, list(ours.values()))))
    theirs = dict(discriminator.named_parameters())
    disc = discriminator_loss(discriminator(x), discriminator(x_hat.detach()), gan)
    return generator, dict(zip(theirs, torch.autograd.grad(disc, list(theirs.values())))), weight
