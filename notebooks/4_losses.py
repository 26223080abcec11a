# %% [markdown]
# # 4. What trains the decoder
#
# **Question.** Which loss makes a decoder draw letters, and who keeps the balance between the
# losses?
#
# Read first: AVQ Appendix A, Eq. 5-9; `losses.py`, and `Autoencoder.step` in
# `train_autoencoder.py`. About 75 minutes.

# %%
import json
import sys
from pathlib import Path

sys.path.insert(0, "..")
import matplotlib.pyplot as plt
import torch
from check import check

import losses
from convert import load
from data import Signs, pixels, views
from signs import word_mask

plt.style.use("course.mplstyle")

# %% [markdown]
# ## 1. The pixel loss votes against letters
#
# A latent is coarse. It may say: here is a board with HOTEL on it, but its place is open by two
# pixels. Then 25 pictures are equally likely: up to two pixels up or down, up to two left or right.
# The decoder must give *one* answer. Which answer has the smallest mean error to all 25?
#
# - By the squared error of [AVQ Eq. 2] it is the **mean** of the 25 pictures.
# - By the absolute error of [AVQ App. A], L1, it is the **median**. A pixel is ink only if more
#   than half of the 25 pictures have ink there. It is a vote.
#
# **Predict first.** The strokes of the small word are one pixel wide. How many per cent of its ink
# are left in the best answer by L1?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# The cell does not assume mean or median. It tries 101 greys at every pixel.
#
# **Claim.** The best answer by L1 is the median, and it keeps less than a tenth of the small word.
# By L1 an empty board is a better answer than the right word at one of its 25 places.

# %%
# figure: strokes. L1 erases the thin strokes, squared error smears them.
_, axes = plt.subplots(2, 3, figsize=(10, 3.6))
for row, scale in zip(axes, (2, 1)):
    word = word_mask("HOTEL", scale)
    ink = torch.tensor([*word.tobytes()]).view(word.height, word.width) / 255
    ink = torch.nn.functional.pad(ink, (4,) * 4)
    board = torch.stack([ink.roll((i // 5 - 2, i % 5 - 2), (0, 1)) for i in range(25)])
    off = (grey := torch.linspace(0, 1, 101)).view(-1, 1, 1, 1) - board      # (101, 25, H, W)
    l2, l1 = grey[off.square().mean(1).argmin(0)], grey[off.abs().mean(1).argmin(0)]
    for axis, answer, name in zip(row, (ink, l2, l1), ("one of 25", "best by L2", "best by L1")):
        axis.imshow(answer, cmap="gray_r", vmin=0, vmax=1)
        axis.set(title=f"{name}: ink {answer.sum() / ink.sum():.0%}", xticks=[], yticks=[])
assert (l1 - board.median(0).values).abs().max() < 0.01 < l1.sum() / ink.sum() < 0.1
assert board.mean() < losses.pixel_loss(ink, board)                  # empty board, one word
print(f"you said {guess} %, it is {100 * l1.sum() / ink.sum():.0f} %")

# %% [markdown]
# So a decoder that is trained by L1 does not leave small letters out because it is too weak. It
# leaves them out because that is the right answer to the question that L1 asks. A different
# question needs a different loss.
#
# **LPIPS** [AVQ Eq. 5] compares features of a trained network instead of pixels. It forgives a
# small shift, because the features do. [AVQ Eq. 6] adds it to L1. Its weights are a download, so
# the run of this course does without it.
#
# **The GAN loss** [AVQ Eq. 7] asks another question: could this be a real picture? A sharp word
# could, at any of the 25 places. A smear or an empty board could not.
#
# ## 2. A judge of patches
#
# The discriminator $D$ is a small convolutional network. It gives a map of logits. Each judges one
# patch: positive means *real*. The next cell loads the run's first stage and the discriminator that
# trained against it, and measures the patch: which pixels move one logit?
#
# **Claim.** A patch is 34 pixels wide with the demo's two strided layers, and 70 with the papers'
# three.

# %%
model = load("run", stages=["vqgan"]).model.requires_grad_(True)
D = losses.PatchDiscriminator(ndf=32, n_layers=2)
D.load_state_dict(torch.load("run/vqgan/last.pt")["extra"]["discriminator"])
x = pixels(next(views(Signs("val", 64), [range(24)])), "cpu")
x_hat = model.decode(model.encode(x).detach())
for layers, width, middle in ((2, 34, 14), (3, 70, 7)):
    picture = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = losses.PatchDiscriminator(ndf=4, n_layers=layers).eval()(picture)
    slope, = torch.autograd.grad(logits[0, 0, middle, middle], picture)
    seen = int((slope.abs().sum((0, 1, 2)) > 0).sum())
    assert seen == width
    print(f"{layers} strided layers: one logit sees {seen} pixels")

# %% [markdown]
# **Claim.** On held-out pictures, in batches of one kind as in training, the discriminator of the
# run tells original from reconstruction nearly everywhere: its loss is far below the value of one
# who cannot tell, which is 1.

# %%
# figure: patches. The discriminator's logits: the original is blue (real) nearly everywhere,
# the reconstruction red (generated).
_, axes = plt.subplots(1, 4, figsize=(11, 2.9))
with torch.no_grad():
    real, fake = D(x), D(x_hat)
for axis, picture, name in zip(axes[::2], (x[1], x_hat[1]), ("original", "reconstruction")):
    axis.imshow((picture.detach().permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
    axis.set(title=name, xticks=[], yticks=[])
for axis, logits in zip(axes[1::2], (real, fake)):
    shown = axis.imshow(logits[1, 0], cmap="RdBu", vmin=-3, vmax=3)
    axis.set(title=f"its logits; mean of 24: {logits.mean():.1f}", xticks=[], yticks=[])
plt.colorbar(shown, label="logit")
assert fake.mean() < -0.5 < 0.5 < real.mean()
assert losses.discriminator_loss(real, fake) < 0.3

# %% [markdown]
# **Claim.** The same judge fails on the same pictures if originals and reconstructions come in one
# batch: its loss is more than four times as high.
#
# BatchNorm subtracts the mean of the *batch*. The judge has learnt its threshold on batches of one
# kind. A mixed batch has other means, so all logits move, and most of its skill is gone. So `step`
# calls $D$ once for each kind, and a low loss says how it judges such batches, not single pictures.

# %%
with torch.no_grad():
    mixed_real, mixed_fake = D(torch.cat([x, x_hat])).chunk(2)
apart = losses.discriminator_loss(real, fake)
mixed = losses.discriminator_loss(mixed_real, mixed_fake)
print(f"one call for each kind {apart:.3f}, one call for both {mixed:.3f}")
assert mixed > 4 * apart

# %% [markdown]
# ## 3. Eq. 7 twice
#
# [AVQ Eq. 7] prints the *log* form, with $D = \mathrm{sigmoid}(\mathrm{logit})$. The authors' code
# has the *hinge* form, and so has ours by default. Both are in `losses.py`.
#
# **Predict first.** A judge who cannot tell gives every patch the logit 0. What does it pay in the
# log form?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# **Claim.** It pays 1 by hinge, and $2 \log 2$ by log. Where the judge is sure, at a logit of -4,
# the log form has lost all but 2 % of its slope for the decoder. Hinge keeps all of it.

# %%
# figure: eq7. Left: what the judge pays. Right: what the decoder feels. Where a generated patch
# is found out (right panel, left end) the log form hardly says how to improve.
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
logit, cost, pull = torch.linspace(-6, 6, 121).requires_grad_(), {}, {}
for gan in ("hinge", "log"):
    cost[gan] = torch.stack([losses.discriminator_loss(v, -v, gan) for v in logit]).detach()
    loss = sum(losses.generator_gan_loss(v, gan) for v in logit)
    pull[gan] = -torch.autograd.grad(loss, logit)[0]
    left.plot(logit.detach(), cost[gan], label=gan), left.legend()
    right.plot(logit.detach(), pull[gan])
left.set(title=f"judge's loss: 1 or {cost['log'][60]:.2f} at 0", xlabel="logit (generated: -logit)")
right.set(title=f"pull at -4: 1 or {pull['log'][20]:.3f}", xlabel="logit of a generated patch")
print(f"you said {guess}, it is {cost['log'][60]:.3f}")
assert max(abs(cost["hinge"][60] - 1), abs(cost["log"][60] - 2 * torch.tensor(2).log())) < 1e-5
assert pull["log"][20] < 0.02 < pull["hinge"][20] == 1

# %% [markdown]
# ## 4. Who keeps the balance?
#
# How hard should the GAN loss pull? Its gradient depends on the judge's scale, which changes all
# the time. So [AVQ Eq. 8] multiplies it by a weight, and [AVQ Eq. 9] measures the weight in every
# step:
#
# $$\lambda = \frac{\lVert\nabla_{G_L}\mathcal{L}_{pixel}\rVert}
# {\lVert\nabla_{G_L}\mathcal{L}_{GAN}\rVert + \delta}$$
#
# $G_L$ is the last layer's weight, `decoder.conv_out.weight`. There, both losses pull equally hard
# by definition. Nothing is promised for the other layers. Let us look at them.
#
# **Claim.** One number balances the whole decoder: after the weighting the two gradients agree in
# size within a factor of two at every convolution. Before it, the GAN's is more than fifty times as
# large.

# %%
# figure: lambda. Each dot is a convolution of the run's decoder. One number balances them all.
pixel = losses.pixel_loss(x_hat, x)
with losses.frozen(D):
    gan = losses.generator_gan_loss(D(x_hat))
weights = [p for p in model.decoder.parameters() if p.ndim == 4]
lam = losses.adaptive_weight(pixel, gan, model.decoder.conv_out.weight)
pulls = [torch.stack([g.norm() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
         for loss in (pixel, gan)]
ratio = pulls[1] / pulls[0]
_, axis = plt.subplots(figsize=(8, 3))
axis.semilogy(ratio, "oC1", label="as it is")
axis.semilogy(lam * ratio, "oC0", label=f"times λ = {lam:.4f}")
axis.set(title=f"GAN / pixel gradient: {ratio.median():.0f}, then {lam * ratio.median():.2f}",
         xlabel="the convolutions, in order", ylabel="ratio", ylim=(0.3, 1000)), axis.legend()
assert 0.5 < (lam * ratio).min() < (lam * ratio).max() < 2 < 50 < ratio.min()

# %% [markdown]
# **Predict first.** The judge's last layer is multiplied by ten, so all its logits are ten times as
# large. By what factor does the GAN's pull on the decoder change?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# **Claim.** By 1. The weight falls by ten and the product stays. The form of Eq. 7 hardly matters
# either: the log form, too, pulls as hard as the pixel loss.
#
# **Claim.** The *value* of the weighted term says nothing about its pull. It is less than a tenth
# of the pixel loss, and the pull is the same.

# %%
last = model.decoder.conv_out.weight
with losses.frozen(D):
    terms = {"hinge": gan, "ten times": 10 * gan,
             "log": losses.generator_gan_loss(D(x_hat), "log")}
for name, term in terms.items():
    weight = losses.adaptive_weight(pixel, term, last)
    pull = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (pixel, weight * term)]
    print(f"{name}: weight {weight:.3g}, value / pixel loss {weight * term / pixel:.3f}, "
          f"pull / pixel loss's {pull[1] / pull[0]:.2f}")
    assert (weight * term / pixel).abs() < 0.1 < 0.99 < pull[1] / pull[0] < 1.001
print(f"you said {guess}, it is 1")

# %% [markdown]
# So a small $\lambda$ in a log does not mean that the GAN is off. It means that the judge's
# gradient is large. A judge who has won is one way to get there.
#
# ## 5. The GAN loss brings the stroke back
#
# Back to the vote, as small as it can be: a line of 21 pixels, and a stroke of one pixel at one of
# seven places, all equally likely. The decoder's answer is one line. There is no network: the
# answer itself is the last layer. The judge sees three neighbouring pixels at a time. It cannot
# know *where* a stroke should be, only what one looks like.

# %%
strokes = torch.eye(21)[7:14, None]                                   # (7, 1, 21)

def both_losses(kind, answer, judge):
    """Compute what the decoder minimises and what the judge does: two 0-d tensors."""
    pixel = losses.pixel_loss(answer.expand_as(strokes), strokes, kind[:2])
    if "GAN" not in kind:
        return pixel, torch.zeros(())
    with losses.frozen(judge):
        gan = losses.generator_gan_loss(judge(answer))                # [AVQ Eq. 7]
    lam = losses.adaptive_weight(pixel, gan, answer)                  # [AVQ Eq. 9]
    seen = answer if "leak" in kind else answer.detach()
    return pixel + lam * gan, losses.discriminator_loss(judge(strokes), judge(seen))

# %%
def best_line(kind, steps=400, rate=0.02):
    torch.manual_seed(0)
    judge = torch.nn.Sequential(torch.nn.Conv1d(1, 16, 3), torch.nn.LeakyReLU(0.2),
                                torch.nn.Conv1d(16, 1, 1))
    answer = (0.1 + 0.02 * torch.randn(1, 1, 21)).requires_grad_()
    adam = torch.optim.Adam([answer, *judge.parameters()], betas=(0.5, 0.9))
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        adam.zero_grad()
        sum(both := both_losses(kind, answer, judge)).backward()
        adam.step()
    return answer.detach()[0, 0], both[1].item()

# %% [markdown]
# **Claim.** With the GAN loss the answer has one stroke, with all its ink. In the end the judge
# cannot tell: it pays 1. And the pixel loss is *higher* than that of the empty line, because six of
# seven times the stroke is at the wrong place.

# %%
# figure: stroke. Squared error spreads one stroke over seven places, L1 erases it, and L1 with
# the GAN loss decides for one place.
lines = {kind: best_line(kind) for kind in ("l2", "l1", "l1 + GAN")}
_, axes = plt.subplots(4, 1, figsize=(8, 3.4), sharex=True, subplot_kw={"xticks": []})
axes[0].imshow(strokes[4], cmap="gray_r", vmin=0, vmax=1, aspect="auto")
axes[0].set(title="one of seven equally likely lines", yticks=[])
for axis, (kind, (line, _)) in zip(axes[1:], lines.items()):
    axis.imshow(line[None], cmap="gray_r", vmin=0, vmax=1, aspect="auto")
    loss = losses.pixel_loss(line.expand_as(strokes), strokes)
    axis.set(title=f"{kind}: most ink {abs(line.max()):.2f}, L1 {loss:.3f}", yticks=[])
axes[3].set_xlabel("21 pixels")
paid = lines["l1 + GAN"][1]
print(f"with the GAN: ink {line.sum():.1f}, the judge pays {paid:.1f}")
assert lines["l1"][0].max() < 0.05 < 0.9 < min(line.max(), paid)
assert loss > 1.4 * strokes.mean()                                    # the mean: L1 of no ink

# %% [markdown]
# This is a trade. The GAN makes the answer possible, not true: a word that it draws may be another
# word. Known pixels need more than a loss, and that is the paper's idea (notebook 3).
#
# ## 6. Reading a log
#
# Two games of the run, from their `log.jsonl`. Step 0 is where each one's judge begins.
#
# - *The pixel loss went up when the GAN began. Is it broken?* No. Section 5 says why it can.
# - *The discriminator's loss is 1.* It cannot tell yet, or not any more.
# - *It is near 0.* On batches of one kind it has won (section 2). The first stage cannot draw what
#   its codes do not carry. Look at section 7 before you accept this.
# - *λ fell and fell.* The judge's gradient grew. The pull did not change (section 4).
#
# **Claim.** In the first stage the pixel loss rises by 6 % after the start, and the judge wins.
# Against the asymmetric decoder, who sees known pixels in half of its pictures, it stays near 1.
#
# Is the rise noise? Each step has other pictures. But it is more than four standard errors of the
# difference of the two means. (That of the asymmetric decoder is less than one.) This is one run:
# another one may rise by more or less.

# %%
# figure: log. Red: the first stage, blue: the asymmetric decoder. Thick: means of 100 steps.
ends, (_, axes) = [], plt.subplots(1, 3, figsize=(11, 3))
for stage, colour in (("decoder", "C0"), ("vqgan", "C1")):
    log = [json.loads(line) for line in Path(f"run/{stage}/log.jsonl").read_text().splitlines()]
    start = next(row["step"] for row in log if "disc" in row)
    for axis, name in zip(axes, ("lambda", "disc", "pixel")):
        t, v = torch.tensor([(row["step"] - start, row[name]) for row in log if name in row]).T
        ends.append((late := v[t > t[-1] - 100]).mean())
        axis.plot(t, v, colour, lw=0.6, label=f"{stage}: {ends[-1]:.2g}"), axis.legend()
        axis.hlines(ends[-1], t[-1] - 100, t[-1], colour, lw=4)
        axis.set(title=name, xlabel="steps after the judge's start", xlim=(-250, 325))
    (a, var_a), (b, var_b) = ((w.mean(), w.var() / len(w)) for w in (v[(t < 0) & (t > -100)], late))
    print(f"{stage}: pixel {b / a - 1:+.1%}, {(b - a) / (var_a + var_b)**0.5:.1f} standard errors")
axes[0].set_yscale("log"), axes[1].axhline(1, ls=":", color="k"), axes[2].set_ylim(0.05, 0.25)
assert all([b / a > 1.05, b - a > 4 * (var_a + var_b)**0.5, ends[1] > 0.7, ends[4] < 0.2])

# %% [markdown]
# ## 7. Two players, one graph
#
# Both players train on the same $\hat{x}$. The decoder's loss must not move the judge: `frozen`
# sees to that. The judge's loss must not move the decoder: `x_hat.detach()` sees to that.
#
# **Break it.** Forget the `detach`, and add up all losses before one `backward`. Nothing raises,
# and the values of the step are the same. But now the decoder minimises the judge's loss too. It
# helps the judge.
#
# For a judge who cannot tell, hinge has the slope 0.5 in the judge's loss and -1 in the decoder's.
# So of the decoder's GAN gradient $\lambda - 0.5$ is left. This holds as long as all logits are
# between -1 and 1. Beyond, the judge's loss is flat, so the run's judge has less than 0.5.
#
# **Claim.** The leak takes exactly 0.5 away for a judge who cannot tell. For the run's judge it
# takes more than three times the run's $\lambda$. In both cases the GAN's pull is *reversed*. In
# the toy the stroke is gone, and the judge pays nothing.

# %%
# figure: leak. What is left of the GAN gradient. Below 0 (dotted: the run) it helps the judge.
(dull := losses.PatchDiscriminator(ndf=32, n_layers=2)).main[-1].weight.data *= 0.1
axis = plt.subplots(figsize=(8, 3.4))[1]
axis.plot(at := torch.logspace(-3, 0, 200), at, "C5", label="detached")
for name, judge, colour in (("a judge who cannot tell", dull, "C2"), ("the run's judge", D, "C4")):
    seen = judge(x_hat)
    both = losses.generator_gan_loss(seen), losses.discriminator_loss(judge(x), seen)
    g, h = (torch.autograd.grad(loss, x_hat, retain_graph=True)[0] for loss in both)
    share = ((g * h).sum() / g.square().sum()).item()
    axis.plot(at, at + share, colour, label=f"{name}: {share:.2f}")
    assert -0.5001 < share < (-3 * lam if judge is D else -0.4999)
    assert (judge is D) == (seen.abs().max() > 1).item()
axis.axvline(lam.item(), 0, 0.65, ls=":", color="k"), axis.axhline(0, color="k"), axis.legend()
axis.set(title=f"the run's λ = {lam:.4f}: the pull is reversed", xlabel="λ",
         ylabel="what is left", xscale="log"), axis.set_yscale("symlog", linthresh=0.01)

# %%
line, disc = best_line("l1 + GAN, leak")
print(f"leak: brightest pixel {line.max():.1f}, the judge pays {disc:.1f}")
assert max(line.max(), disc) < 0.1

# %% [markdown]
# In a log this looks like the red curve of section 6: a loss near 0, a small $\lambda$, no alarm.
# The values do not tell the two apart. One assertion does, and exercise 3 asks for it.
#
# ## Exercises
#
# The `.py` beside this notebook has solutions.
#
# **1. Build** the hinge form of [AVQ Eq. 7] for both players.

# %%
def hinge(logits_real, logits_fake):
    """Compute (the judge's loss, the decoder's loss), 0-d tensors."""
    # solution
    judge = 0.5 * ((1 - logits_real).relu().mean() + (1 + logits_fake).relu().mean())
    return judge, -logits_fake.mean()
    # end


check("hinge", lambda: hinge(real, fake),
      (losses.discriminator_loss(real, fake), losses.generator_gan_loss(fake)),
      "a patch that is right by more than 1 costs the judge nothing; mind the factor 0.5")

# %% [markdown]
# **2. Build** the first stage's weight: taming's rule, from the two gradients at the last layer. It
# bounds the ratio of the norms by $10^4$, then multiplies by 0.8. Why is a bound needed at all?
# (The answer is below the checks.)

# %%
def weight_of(pixel_grad, gan_grad):
    """Compute lambda from two gradients."""
    # solution
    return 0.8 * (pixel_grad.norm() / (gan_grad.norm() + losses.DELTA)).clamp(max=1e4)
    # end


check("lambda", lambda: weight_of(torch.ones(9), torch.ones(4)), 1.2,
      "the norms are 3 and 2: 0.8 * 3 / (2 + losses.DELTA)")
check("its bound", lambda: weight_of(torch.ones(9), torch.zeros(4)), 8000.0,
      "3 / losses.DELTA is more than the bound; the factor 0.8 comes after it")

# %% [markdown]
# Why a bound? At the last layer the GAN's weighted pull is never above that of the pixels, bound or
# not. But where its gradient there is next to nothing, the weight is enormous, and it multiplies
# the gradients of all other layers as well, where nothing was measured.
#
# **3. Find the leak** with one measurement: does the judge's loss send a gradient to the answer?
# `both_losses(kind, answer, judge)` of section 5 returns the decoder's loss, then the judge's. With
# `allow_unused=True`, `torch.autograd.grad` gives `None` where there is no way.

# %%
def leaks(kind):
    """Say whether the judge's loss of this kind reaches the decoder's answer: True or False."""
    answer = torch.full((1, 1, 21), 0.1, requires_grad=True)
    judge = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.Conv1d(4, 1, 1))
    # solution
    loss = both_losses(kind, answer, judge)[1]
    return torch.autograd.grad(loss, answer, allow_unused=True)[0] is not None
    # end


check("the right step", lambda: leaks("l1 + GAN"), False, "the judge's loss must not reach it")
check("the leaking step", lambda: leaks("l1 + GAN, leak"), True, "take the second loss")
