"""Write out one training step of an image network: AVQ Eq. 6 to 9, and latent-diffusion's."""

import torch

from losses import discriminator_loss, generator_gan_loss


def textbook_step(model, discriminator, encode, x, latent_weight=1.0, perceptual=None, gan="hinge",
                  rule="paper"):
    """Compute (gradients of the generator, gradients of the discriminator, lambda) of one batch.

    encode: () -> (input of conv_out (B,ch,H,W), the latent loss or None).
    """
    h, latent_loss = encode()
    x_hat = model.decoder.conv_out(h)                                       # (B, 3, H, W)
    pixel = (x_hat - x).abs().mean()
    rec = pixel if perceptual is None else pixel + perceptual(x_hat, x).mean()          # Eq. 6
    adversarial = generator_gan_loss(discriminator(x_hat), gan)                         # Eq. 7

    # Compare the two pulls on the last layer.
    def norm(loss):
        return torch.autograd.grad(loss, model.decoder.conv_out.weight, retain_graph=True)[0].norm()

    if rule == "paper":
        lam = norm(pixel) / (norm(adversarial) + 1e-4)                                  # Eq. 9
    else:
        lam = 0.8 * (norm(rec) / (norm(adversarial) + 1e-4)).clamp(0, 1e4)
    loss = rec + lam * adversarial                                                      # Eq. 8
    if latent_loss is not None:
        loss = loss + latent_weight * latent_loss                                       # Eq. 2, 11
    generator = gradients(loss, model)
    disc = discriminator_loss(discriminator(x), discriminator(x_hat.detach()), gan)     # Eq. 7
    return generator, gradients(disc, discriminator), lam


def latent_diffusion_step(model, discriminator, x, generators, perceptual):
    """Compute latent-diffusion's loss of a KL first stage, summed over each image as there.

    Returns its gradients of the generator, the ratio before the clamp, and the GAN loss's weight.
    """
    x_hat = model.decoder.conv_out(model(x, generators)[0])                 # (B, 3, H, W)
    mean, logvar = model.quant_conv(model.encoder(x)).chunk(2, dim=1)
    # LPIPS has one number an image, which is added to each of its 3HW elements.
    rec = (x - x_hat).abs() + perceptual(x, x_hat)[:, None, None, None]
    nll = rec.sum() / len(x)                 # its logvar is in no optimiser, and so stays 0
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(x)
    adversarial = -discriminator(x_hat).mean()

    def norm(loss):
        return torch.autograd.grad(loss, model.decoder.conv_out.weight, retain_graph=True)[0].norm()

    ratio = norm(nll) / (norm(adversarial) + 1e-4)
    weight = 0.5 * ratio.clamp(0, 1e4)                                      # disc_weight 0.5
    return gradients(nll + 1e-6 * kl + weight * adversarial, model), ratio, weight


def gradients(loss, network):
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))
