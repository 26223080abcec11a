# %% [markdown]
# # 3. Known pixels, kept
#
# **Question.** A decoder gets a compressed picture, and pixels of it that must not change. How does
# it give these pixels back unharmed?
#
# Read first: AVQ Sec. 3.2, Sec. 4.1, Tables 2, 3 and 7; `asym_decoder.py`, `pconv.py`. About 75
# minutes. The third exercise needs pencil and paper.

# %%
import sys

sys.path.insert(0, "..")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from check import check

from asym_decoder import AsymDecoder, mask_guided_blend
from convert import load_model
from data import Signs, held_out_batches
from metrics import pre_error, seam
from pconv import PartialConv2d

plt.style.use("course.mplstyle")

# %% [markdown]
# ## The experiment
#
# We take street scenes that no model was trained on, and mark a hole in each. Outside the hole
# the pixels are *known*. All decoders get the same latent $z$, made from the whole picture. This is
# kind to the hole, but here we only ask about the known pixels. [AVQ Sec. 3.2] [AVQ Tab. 2]
#
# - `own`: the first stage's own decoder. It sees $z$.
# - `ours`: the asymmetric decoder. It sees $z$, the known pixels and the mask.
# - `alone`: the asymmetric decoder without the last two.
#
# `error` is the paper's Pre_error: the mean squared error of the known pixels, for images in
# $[0, 1]$, in units of $10^{-5}$.

# %%
RUN, guess = "run", None
torch.set_grad_enabled(False)
model = load_model(RUN)
first_stage, decoder = model.first_stage, model.decoder
batch = next(held_out_batches(Signs("test", 64), 48, 48, "cpu"))
x, mask = batch.x, batch.mask            # (48, 3, 64, 64) in [-1, 1]; (48, 1, 64, 64), 1 = hole
z = model.encode(x)                                                      # (48, 8, 16, 16)
own, ours, alone = first_stage.decode(z), model.decode(z, image=x, mask=mask), model.decode(z)
print(f"a picture has {x[0].numel():,} numbers, its latent {z[0].numel():,}")

# %% [markdown]
# A latent has fewer numbers than the picture, and each vector of it is one of a few hundred codes.
# So `own` cannot return the known pixels. `ours` could copy them from its second input.
#
# **Predict first.** By what factor is the error of the known pixels smaller with `ours` than with
# `own`?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# **Claim.** The known pixels' error is 145 times smaller. Without mask the new decoder still has a
# quarter less than the old one.

# %%
# figure: words. The first stage garbles the words. Ours keeps them where they are known.
def error(x_hat):
    return 1e5 * pre_error(x_hat, x[:len(x_hat)], mask[:len(x_hat)]).mean().item()
def show(axis, picture, title):
    axis.imshow((picture.clamp(-1, 1) + 1).permute(1, 2, 0) / 2)
    axis.set(title=title, xticks=[], yticks=[])
shown = {"original": x, "known pixels": x * (1 - mask), f"own: error {error(own):,.0f}": own,
         f"ours: error {error(ours):.1f}": ours, f"alone: error {error(alone):,.0f}": alone}
for i, axes in zip((0, 2), plt.subplots(2, 5, figsize=(10, 4.3))[1]):
    for axis, (title, pictures) in zip(axes, shown.items()):
        show(axis, pictures[i], "" if i else title)
print(f"you said {guess}, it is {error(own) / error(ours):.0f}")
assert abs(error(own) / error(ours) - 145) < 3
assert 0.7 < error(alone) / error(own) < 0.75

# %% [markdown]
# ## How: blend features, not pixels
#
# A small network $E$ turns the known pixels $Y$ into features $f_E^k$, one for each level $k$ of
# the decoder [AVQ Eq. 3]. There the decoder has features $f_{Dec}^k$ of its own. The mask chooses,
# pixel by pixel, which of the two go on [AVQ Eq. 4]:
#
# $$f_{Dec}^k \leftarrow f_{Dec}^k \otimes m + f_E^k \otimes (1 - m)$$
#
# The mask $m$ is 1 where the picture is to be *generated*. So in the hole the decoder's own
# features stay; everywhere else those of the known pixels replace them. (Other papers write 1 for
# known. The last section shows what comes of mixing the two up.)

# %%
# figure: blend. Follow one number: where m is 1, the result is f_Dec's.
f_dec, f_enc = torch.arange(1., 17).view(1, 1, 4, 4), -torch.arange(1., 17).view(1, 1, 4, 4)
m = torch.zeros(1, 1, 4, 4)
m[..., 1:3, 2:] = 1
panels = {"f_Dec": f_dec, "m": m, "f_E": f_enc,
          f"Eq. 4: {int(m.sum())} of 16 are f_Dec's": mask_guided_blend(f_dec, f_enc, m)}
for axis, (title, values) in zip(plt.subplots(1, 4, figsize=(10, 2.7))[1], panels.items()):
    axis.imshow(values[0, 0], cmap="RdBu", vmin=-24, vmax=24)
    for (row, column), value in zip(torch.cartesian_prod(torch.arange(4), torch.arange(4)),
                                    values.flatten()):
        axis.text(column, row, f"{value:.0f}", ha="center", va="center")
    axis.set(title=title, xticks=[], yticks=[])
    axis.grid(False)

# %% [markdown]
# **Exercise 1.** Write Eq. 4 yourself. The features of coarse levels are smaller than the mask:
# take every `step`-th pixel of the mask, rows and columns, so that it has their size.

# %%
def blend(f_dec, f_enc, mask):
    """f_dec, f_enc: (B,C,h,w); mask: (B,1,H,W), H a multiple of h. Returns (B,C,h,w)."""
    # solution
    step = mask.shape[-1] // f_dec.shape[-1]
    m = mask[..., ::step, ::step]
    return f_dec * m + f_enc * (1 - m)
    # end

a, b = torch.randn(2, 48, 5, 16, 16, generator=torch.Generator().manual_seed(0))
check("Eq. 4", lambda: blend(a, b, mask), mask_guided_blend(a, b, mask[..., ::4, ::4]),
      "m is 1 where f_Dec stays; for 16 x 16 features of a 64 x 64 mask the step is 4")

# %% [markdown]
# ## The whole method in nine lines
#
# From coarse to fine: blend, run the decoder's level, blend, and so on. The last blend, number 0,
# is at full resolution, just before the last norm and the last convolution. `blends` says which of
# the four are done. `seen` keeps what we want to look at.
#
# **Claim.** The body of this function computes what `AsymDecoder` computes, bit for bit.

# %%
def rebuilt(z, image, mask, blends=(0, 1, 2, 3)):
    features = decoder.encoder(image, mask)                              # Eq. 3
    h, seen = decoder.mid(decoder.conv_in(z)), []
    for k in reversed(range(len(features))):                             # coarse to fine
        step = mask.shape[-1] // features[k].shape[-1]
        f_dec, m = h, mask[..., ::step, ::step]
        h = mask_guided_blend(f_dec, features[k], m) if k in blends else f_dec     # Eq. 4
        seen.append((f_dec, features[k], h))
        h = decoder.run_level(k - 1, h) if k > 0 else h
    return decoder.conv_out(F.silu(decoder.norm_out(h))), seen
x_hat, seen = rebuilt(first_stage.post_quant_conv(z), x, mask)
assert torch.equal(x_hat, ours)

# %% [markdown]
# Now we can look inside. A feature map has 16 to 64 channels. Its three main axes become red, green
# and blue; the axes of a column are the same in all rows, so equal colours are equal features.

# %%
# figure: levels. Follow the word: it is in f_E, and the blend carries it on, up to the hole.
STREET = 1
figure, axes = plt.subplots(3, 5, figsize=(10.5, 6.4))
for k, triple, column in zip((3, 2, 1, 0), seen, axes.T):
    maps = torch.stack([features[STREET] for features in triple]).movedim(1, -1)   # (3, H, W, C)
    flat = maps.flatten(0, 2) - maps.mean((0, 1, 2))
    main = torch.linalg.svd(flat, full_matrices=False)[0][:, :3]
    colours = (0.5 + main / main.std(0) / 5).clamp(0, 1).view(*maps.shape[:3], 3)
    for axis, picture in zip(column, colours):
        show(axis, picture.permute(2, 0, 1) * 2 - 1, "")
    column[0].set_title(f"k = {k}: {maps.shape[3]} channels, {maps.shape[1]} px")
for row, name, last, picture in zip(axes, ("f_Dec", "f_E", "after Eq. 4"), ("Y", "alone", "ours"),
                                    (x * (1 - mask), alone, ours)):
    row[0].set_ylabel(name)
    show(row[4], picture[STREET], last)

# %% [markdown]
# ## Which blend saves the pixels?
#
# There are four blends: 3 at 16 x 16, 2 at 32 x 32, 1 and 0 at 64 x 64. The paper has one at each
# level. Are all needed?
#
# **Predict first.** We keep one of the four and leave out the others, without training again. Which
# one gives the smallest error?

# %%
guess = None   # 0, 1, 2 or 3, before you run the next cell

# %% [markdown]
# **Claim.** Blend 0 alone keeps the known pixels: its error is a third above that of all four. The
# other three without it do not: theirs is more than 300 times that of all. (The bars are of the
# first 24 of the 48 pictures.)

# %%
# figure: blends. Without blend 0 nothing is kept; with it alone nearly everything is.
half = first_stage.post_quant_conv(z[:24]), x[:24], mask[:24]
kinds = {"none": (), "all": (0, 1, 2, 3)}
kinds |= {f"only {k}": (k,) for k in (3, 2, 1, 0)}
kinds |= {f"all but {k}": {0, 1, 2, 3} - {k} for k in (3, 2, 1, 0)}
errors = {name: error(rebuilt(*half, blends)[0]) for name, blends in kinds.items()}
axis = plt.figure(figsize=(8, 3.6)).gca()
colours = ["C0" if 0 in blends else "C1" for blends in kinds.values()]
bars = axis.barh(list(errors), errors.values(), color=colours)
axis.bar_label(bars, [f" {value:,.0f}" for value in errors.values()])
axis.set(xscale="log", xlim=(5, 2e4), xlabel="error of known pixels, 1e-5",
         title=f"blend 0 alone: {errors['only 0']:.0f}, without it: {errors['all but 0']:,.0f}")
axis.invert_yaxis()
print(f"you said {guess}, it is {min(range(4), key=lambda k: errors[f'only {k}'])}")
assert 1.2 < errors["only 0"] / errors["all"] < 1.4 < 300 < errors["all but 0"] / errors["all"]

# %% [markdown]
# ## What can never reach the output
#
# Blend 0 overwrites whatever the trunk has made of the known region. So in training nobody ever
# looked at what blends 3 to 1 make there. That explains a surprise in the figure: with any of
# them but without blend 0 the known pixels are worse than with no blend at all.
#
# **Claim.** (a) What the picture has under the mask changes no bit of the result. (b) What $E$
# makes up inside the hole does not either: by Eq. 4 it meets $1 - m = 0$. (c) A mask that leaves
# nothing known is the same as no mask. (d) The known pixels do not help the *hole*: by L1 it is
# best without mask, and worse with all blends than with blend 0 alone.
#
# Because of (b) the paper has no use for partial convolutions with this blend [AVQ Sec. 4.1], and
# because of (c) one decoder serves with and without a mask. (d) is no contradiction to the paper:
# our latent was made from the whole picture, so it already knows the hole.

# %%
noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
changed = torch.where(mask == 1, noise, x)
assert torch.equal(model.decode(z, image=changed, mask=mask), ours)                      # (a)
f_dec, f_enc, h = seen[3]
assert torch.equal(mask_guided_blend(f_dec, f_enc + 1000 * mask, mask), h)               # (b)
assert torch.equal(model.decode(z, image=x, mask=torch.ones_like(mask)), alone)          # (c)
def in_hole(y):
    return (((y - x).abs() * mask).sum() / (3 * mask.sum())).item()
only_0 = rebuilt(first_stage.post_quant_conv(z), x, mask, (0,))[0]
print(f"L1 in the hole: {in_hole(ours):.3f}, only blend 0 {in_hole(only_0):.3f}, "
      f"without mask {in_hole(alone):.3f}")
assert in_hole(alone) < in_hole(only_0) < in_hole(ours)                                  # (d)

# %% [markdown]
# ## Convolving known pixels only
#
# Tables 7 and 8 print another blend: join $[f_{Dec}, f_E, m]$ and let a 1x1 convolution choose. It
# does use features inside the hole. There a plain convolution is wrong: it takes the hole for
# grey. The *partial convolution* averages known pixels only [AVQ Tab. 7]. Where a window $M$ has
# $\mathrm{sum}(M)$ known pixels of $\mathrm{sum}(1)$, the output is scaled up:
#
# $$y = W^T (X \odot M) \cdot \frac{\mathrm{sum}(1)}{\mathrm{sum}(M)} + b, \qquad
# y = 0 \text{ where } \mathrm{sum}(M) = 0$$
#
# A test whose answer everybody knows: a picture that is 1 everywhere, seen through an average of
# 5 x 5 pixels, must stay 1.
#
# **Claim.** It does, to one part in a million, at the hole and at the picture's border.

# %%
# figure: constant. The partial convolution is flat up to the hole, and 2 px into it.
layer, valid = PartialConv2d(1, 1, 5, padding=2, bias=False), torch.ones(1, 1, 48, 48)
layer.weight.fill_(1 / 25)
valid[..., 10:38, 16:32] = 0
y, valid_out = layer(valid, valid)                # the picture is 1 where it is known, else 0
plain = F.conv2d(valid, layer.weight, padding=2)
everywhere = plain / valid.mean() * valid_out     # a bug found in the field: one ratio for all
pictures = {"known pixels": valid, "plain": plain, "one ratio for all": everywhere, "partial": y}
figure, axes = plt.subplots(1, 5, figsize=(11, 2.5), width_ratios=(1, 1, 1, 1, 1.7))
for axis, (name, picture), colour in zip(axes, pictures.items(), ("0.6", "C1", "C2", "C0")):
    axis.imshow(picture[0, 0], cmap="gray", vmin=0, vmax=1.4)
    axis.set(title=name, xticks=[], yticks=[])
    axes[4].plot(picture[0, 0, 24], color=colour)
axes[4].set(xlabel="pixel of row 24", title=f"partial: {y[valid_out == 1].mean():.6f}")
assert (y[valid_out == 1] - 1).abs().max() < 1e-6

# %% [markdown]
# **Exercise 2.** Write the partial convolution with `F.conv2d`. Padding counts as missing, and the
# bias is not scaled.

# %%
def partial_convolution(x, valid, weight, bias):
    """x: (B,C,H,W); valid: (B,1,H,W), 1 = known; weight: (C',C,k,k), k odd. Returns (B,C',H,W)."""
    # solution
    k = weight.shape[-1]
    count = F.conv2d(valid, torch.ones(1, 1, k, k), padding=k // 2)      # sum(M) of known pixels
    y = F.conv2d(x * valid, weight, padding=k // 2) * (k * k / count.clamp(min=1))
    return (y + bias[:, None, None]) * (count > 0)
    # end

layer = PartialConv2d(3, 4, 3, padding=1)
check("a partial convolution", lambda: partial_convolution(x, 1 - mask, layer.weight, layer.bias),
      layer(x, 1 - mask)[0], "count the known pixels of each window: convolve valid with ones")

# %% [markdown]
# ## Why it was hard: the last norm
#
# Blend 0 is all that known pixels need. So their whole way is short: a convolution, the blend,
# GroupNorm, SiLU, a convolution. Could such a way be exact?
#
# It could, but for GroupNorm. It divides a group of channels by their deviation $\sigma$ in *this*
# picture. A picture with much contrast is divided by more, and the last convolution cannot know by
# how much. The same known colour comes out differently in every picture.
#
# Let us set the weights by hand. A group holds a colour $s$, $-s$ and two constants $D$, $-D$.
# Because $\mathrm{SiLU}(u) - \mathrm{SiLU}(-u) = u$, the way returns $s$ up to one factor,
# $\bar\sigma / \sigma$, where
#
# $$\sigma = \sqrt{\tfrac12 (\overline{s^2} + D^2)} \approx \frac{D}{\sqrt 2}
# \Big(1 + \frac{\overline{s^2}}{2 D^2}\Big)$$
#
# Large constants hide the picture's own contrast $\overline{s^2}$.
#
# **Predict first.** $D$ grows from 4 to 8. By what factor does the mean *squared* error fall?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# **Claim.** Doubling $D$ divides the error by nearly 16: what differs between pictures falls as
# $1/D^2$, its square as $1/D^4$.

# %%
def by_hand(s, D):
    """Known colours s (B,3,H,W), passed by weights set by hand: (B,3,H,W)."""
    constant = torch.full_like(s, D)
    h = torch.stack([s, -s, constant, -constant], 2).flatten(1, 2)       # (B, 12, H, W)
    h = F.silu(F.group_norm(h, num_groups=3, eps=1e-6))
    sigma = ((s.square().mean((2, 3)) + D * D) / 2).sqrt()               # (B, 3)
    return sigma.mean(0)[:, None, None] * (h[:, 0::4] - h[:, 1::4])

pasted = torch.where(mask == 1, own.clamp(-1, 1), x)
by_D = {D: error(by_hand(pasted, D)) for D in (0.5, 1, 2, 4, 8)}
print(f"you said {guess}, it is {by_D[4] / by_D[8]:.1f}")
assert 14 < by_D[4] / by_D[8] < 17

# %%
# figure: constants. A line is a picture, grey is right. Large constants make all pictures alike.
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for axis, D in zip(axes, (0.5, 2)):
    for s, y in zip(pasted[:24, 0].flatten(1), by_hand(pasted, D)[:24, 0].flatten(1)):
        ends = torch.stack([s.argmin(), s.argmax()])
        axis.plot(s[ends], (y - s)[ends], color="C0", lw=0.7)
    axis.axhline(0, color="0.5", lw=2)
    axis.set(xlabel="known red", ylabel="returned minus known", ylim=(-0.25, 0.25),
             title=f"D = {D}: error {by_D[D]:.2g}")
axes[2].loglog(list(by_D), list(by_D.values()), "o-", label="by hand")
axes[2].loglog([0.5, 8], [by_D[2] * 2 ** 8, by_D[2] / 2 ** 8], "--", color="0.5", label="1 / D⁴")
axes[2].set(xlabel="D", ylabel="error, 1e-5", title=f"4 to 8: {by_D[4] / by_D[8]:.1f} times less")
axes[2].set_xticks(list(by_D), list(by_D))
axes[2].minorticks_off()
axes[2].legend()
# %% [markdown]
# Nobody sets a decoder's weights by hand. But we can *start* with such constants: add $D$ and $-D$
# to two channels of each group, take $D$ three times the group's deviation, and let the norm's
# weight and bias undo the change. `AsymDecoder.pin_statistics` does this before training
# (deviation D56 of PAPERS.md). The paper is silent on its start.
#
# The measure is the *spread* of $\sigma$: its standard deviation over the pictures, divided by its
# mean, in the worst group.
#
# **Claim.** The constants divide the spread by about 8, and training does not undo them.

# %%
def spread(decoder):
    h = decoder.blended(latents, x, mask).unflatten(1, (decoder.norm_out.num_groups, -1))
    sigma = h.flatten(2).std(2)                                          # (48, 4)
    return (sigma.std(0) / sigma.mean(0)).max().item()
torch.manual_seed(0)
latents, start = first_stage.post_quant_conv(z), AsymDecoder.from_preset(model.config, "tiny")
start.load_trunk(first_stage.decoder)
before = spread(start)
start.pin_statistics(latents[:24])
print(f"spread: {before:.2f}, pinned {spread(start):.3f}, trained {spread(decoder):.3f}")
assert 7 < before / spread(start) < 9 < before / spread(decoder)

# %% [markdown]
# **Exercise 3.** On paper: a group $h$ of $c$ channels has the variance $s^2$, and its first two
# channels have the means $m_1$ and $m_2$. Add $D$ to the first and $-D$ to the second. What is the
# variance now? Write it with $s^2, m_1, m_2, c, D$ only. Which term makes pictures alike, and which
# does not?

# %%
def variance_with_constants(s2, m1, m2, c, D):
    # solution
    return s2 + 2 * D ** 2 / c + 2 * D * (m1 - m2) / c
    # end

h = seen[3][0][0, :4].double()                                           # a group: (4, 64, 64)
constants = torch.tensor([2., -2, 0, 0])[:, None, None]
check("the variance", lambda: variance_with_constants(h.var(correction=0), h[0].mean(), h[1].mean(),
                                                      4, 2.0),
      (h + constants).var(correction=0), "the mean over all c channels stays; expand the square")

# %% [markdown]
# ## Why not paste?
#
# There is an easier way to keep known pixels: copy them over the picture of `own`. Then their error
# is exactly 0. What is lost is the fit at the hole's border [AVQ Sec. 4.1] [AVQ Fig. 4]. We measure
# the mean step between neighbouring pixels, at each distance from the border. A step at 0 has one
# pixel known and one in the hole.
#
# One number for it is `metrics.seam`: the mean *wrong* step across the border. The mean step, drawn
# below, counts a step that was lost as none. `seam` counts it as wrong.
#
# **Claim.** Pasting over `own` makes larger steps at the border than `ours`. Yet their seams are
# equal within 2 %. (Notebook 6 asks what so few pictures can tell.) And pasting over `alone`, the
# same network without mask, has a fifth less than both.
#
# So on these latents it is the better trained decoder that makes the border fit, and not its second
# input. Keep in mind that they come from the whole picture. In the paper the hole is *new*, and
# may fit less well.

# %%
# figure: seam. Pasting jumps at 0. Ours spreads that over -1 and 0, and errs a little left of it.
place = sum(-F.max_pool2d(-mask, 2 * k + 1, 1, k) - 1 + F.max_pool2d(mask, 2 * k + 1, 1, k)
            for k in range(7))           # 1, 2, ... px into the hole; -1, -2, ... px outside
a, b = torch.cat([place, place.mT])[:, 0].unfold(2, 2, 1).unbind(3)      # two neighbours
pair = torch.where(a * b < 0, 0, torch.where(a.abs() < b.abs(), a, b))
steps, axis, best = [], plt.figure(figsize=(8, 3.6)).gca(), torch.where(mask == 1, alone, x)
for name, y, colour in (("original", x, "0.5"), ("own, pasted", pasted, "C1"),
                        ("alone, pasted", best, "C2"), ("ours", ours, "C0")):
    step = torch.cat([y, y.mT]).clamp(-1, 1).diff(dim=3).abs().mean(1) / 2
    steps.append([step[pair == d].mean().item() for d in range(-6, 7)])
    axis.plot(range(-6, 7), steps[-1], "o-", color=colour, label=f"{name}: {steps[-1][6]:.3f} at 0")
s_own, s_alone, s_ours = (seam(y, x, mask).mean().item() for y in (pasted, best, ours))
axis.legend(), axis.set(xlabel="px into the hole", ylabel="mean step", title=f"seam: own, pasted "
                        f"{s_own:.4f}; alone, pasted {s_alone:.4f}; ours {s_ours:.4f}")
assert all([steps[1][6] > steps[3][6], abs(s_own / s_ours - 1) < 0.02, s_alone / s_ours < 0.81])

# %% [markdown]
# ## Break it
#
# **Break it.** Here is a common bug of inpainting: somebody's masks have 1 for *known*.
# Nothing raises. Who looks at the hole only, as one does in inpainting, sees a triumph.
#
# **Claim.** With the mask reversed the hole's error is a ninth of the right one, and the known
# pixels' more than 100 times it. Test (a) above finds the bug: now hidden pixels change the result.

# %%
wrong = model.decode(z, image=x, mask=1 - mask)
for name, y in {"right": ours, "reversed": wrong}.items():
    print(f"{name}: L1 in the hole {in_hole(y):.3f}, error of known pixels {error(y):,.0f}")
assert 8 < in_hole(ours) / in_hole(wrong) < 10 < 100 < error(wrong) / error(ours)
assert not torch.equal(model.decode(z, image=changed, mask=1 - mask), wrong)

# %% [markdown]
# **What to remember.** (1) Eq. 4 copies features of known pixels into the decoder. The last copy,
# at full resolution, is what keeps them. (2) A norm over the whole picture ties every known pixel
# to the hole. Constants weaken the tie, as $1/D^4$. (3) 1 means *generate*, and a test that changes
# hidden pixels tells in one line whether your code agrees.
#
# To go on: how far from the border is the hole worse with the mask than without? What do other
# values of `size` in `AsymDecoder.pin_statistics` do to the spread? The solutions of the exercises
# are in the `.py` beside this notebook.
