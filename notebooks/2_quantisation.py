# %% [markdown]
# # 2. The quantisation loss, seen
# **Question.** A first stage replaces each vector of its encoder by the nearest of $K$ codes. What
# does that cost, who pays, and why do so many codes die?
#
# Read first: AVQ Sec. 3.1 with Eq. 1 and 2, DDM Sec. 2.2 and 3.2, then `quantize.py` and
# `refit.py`. About 75 minutes with the exercises. The cells run for half a minute.

# %%
import sys

sys.path.insert(0, "..")
import matplotlib.pyplot as plt
import numpy as np
import torch
from check import check
from PIL import Image, ImageDraw

from convert import load_first_stage
from data import Signs, pixels, views
from quantize import VectorQuantizer, code_statistics, nearest_code
from refit import kmeans, rebuild_codebook, sample_features

plt.style.use("course.mplstyle")

# %% [markdown]
# ## 1. A codebook moves
# Begin where everything can be seen: vectors in the plane, a ring and a blob. They play the outputs
# $\hat z$ of an encoder that stands still, so that only the codes learn. Two formulas are at work.
#
# - Each vector takes its nearest code: $q(\hat z) = \arg\min_k \|\hat z - z_k\|$. [AVQ Eq. 1]
# - The loss $\|\mathrm{sg}[\hat z] - z\|^2$ pulls that code towards the vector. sg means stop
#   gradient: what stands inside counts as a constant. It is the third term of [AVQ Eq. 2], the
#   second of [DDM Eq. 14].
#
# **Predict first.** 32 codes start at random within $\pm 1/32$ of the origin, as taming's VQGAN
# starts in $\pm 1/K$. How many of the 32 will be in use after 300 steps?

# %%
torch.manual_seed(0)
angle = 2 * torch.pi * torch.rand(1600)
ring = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 0.12 * torch.randn(1600, 1))
z = torch.cat([ring, torch.tensor([1.6, 1.4]) + 0.15 * torch.randn(400, 2)])           # (2000, 2)

def used(codes):             # which codes are nearest to at least one vector: (K,) bool
    return nearest_code(z, codes).bincount(minlength=len(codes)) > 0

def near(a, b):              # the mean squared difference
    return (a - b).square().mean()

guess = None   # your number, before you run the next cell

# %%
def film(code_range, steps=300):
    torch.manual_seed(1)
    quantizer, path = VectorQuantizer(32, d=2, code_range=code_range), []
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
    for _ in range(steps):
        path.append(quantizer.embedding.weight.detach().clone())
        optimizer.zero_grad()
        quantizer(z.T[None, :, :, None])[2].backward()        # as from an encoder: (1, d, h, w)
        optimizer.step()
    return torch.stack(path), quantizer.embedding.weight.grad                        # (steps, K, d)
(narrow, slope), (wide, _) = film(1 / 32), film(1.0)
print(f"you said {guess}, it is {used(narrow[-1]).sum()} of 32")

# %%
# figure: moving. Paths of 32 codes from two starts. Colours: the region of each code, drawn by
# nearest_code itself. Red: codes in use. Crosses: codes that no vector takes.
side, fig = torch.linspace(-1.8, 2.5, 200), plt.figure(figsize=(8, 3.6))
for place, (path, step) in enumerate((p, s) for p in (narrow, wide) for s in (0, 10, 30, 80, 299)):
    panel, codes, live = fig.add_subplot(2, 5, place + 1), path[step], used(path[step])
    owner = nearest_code(torch.cartesian_prod(side, side), codes).view(200, 200).T
    panel.imshow(owner, "twilight", alpha=0.35, origin="lower", extent=(-1.8, 2.5, -1.8, 2.5))
    panel.scatter(*z[::12].T, s=0.8, c="0.5")
    panel.plot(*path[:step + 1].permute(2, 0, 1), c="0.2", lw=0.5)
    panel.scatter(*codes[live].T, s=16, c="C1", zorder=3)
    panel.scatter(*codes[~live].T, s=16, c="k", marker="x", zorder=3)
    panel.set(title=f"step {step}: {live.sum()} in use", xticks=[], yticks=[], aspect="equal")
    if step == 0:
        panel.set_ylabel("start in ±1/32" if path is narrow else "start in ±1")

# %%
side, (grey, red, black) = torch.linspace(-1.7, 2.5, 300), (32, 33, 34)
pale = 166 + 89 * plt.colormaps["twilight"](torch.linspace(0, 1, 32))[:, :3]
palette = [*pale.astype(int).flatten().tolist(), 130, 130, 130, 209, 73, 91, 40, 40, 40]
dots, paths = (71.2 * (torch.tensor([1.7, 2.5]) + a * torch.tensor([1, -1])) for a in (z, narrow))
grid, frames = torch.cartesian_prod(side.flip(0), side).flip(1), []
for step in [*range(0, 60, 2), *range(60, 300, 10), 299]:
    frames.append(Image.fromarray(nearest_code(grid, narrow[step]).view(300, 300).byte().numpy()))
    frames[-1].putpalette(palette)
    draw, live = ImageDraw.Draw(frames[-1]), used(narrow[step])
    draw.point(dots.flatten().tolist(), grey)
    for k in live.int().argsort().tolist():
        draw.line(paths[:step + 1, k].flatten().tolist(), black)
        draw.circle(paths[step, k].tolist(), 4 if live[k] else 2, red if live[k] else black)
    draw.text((6, 4), f"step {step}: {live.sum()} of 32 codes in use", black)
frames[0].save("film.gif", save_all=True, append_images=frames[1:], duration=90, loop=0)

# %% [markdown]
# ![Film of the first row](codebook.gif)
#
# (The film of *your* run is `film.gif`, beside this notebook. Break the codebook: put `lr=3` into
# `film`. Then the Claim's `assert` below stops the run, for the claim is no longer true.)
#
# In the first row all codes begin in one small heap. The twelve on its rim are nearest to
# everything, so only they move. The others look on. Four follow later, when the winners leave a
# gap. Sixteen stay where they were born.
#
# **Claim.** A code that no vector takes has no term in the sum. Its gradient is exactly zero, not
# small. The same loss with a wider start uses nearly all codes. So the start decides, not the
# formula. And k-means finds better codes than both, for the same vectors. Remember that for the
# end.

# %%
best, _ = rebuild_codebook(z, 32, generator=torch.Generator().manual_seed(0))
errors, taken = [], torch.stack([used(codes) for codes in narrow])              # (steps, 32)
for start, codes in ("±1/32", narrow[-1]), ("±1", wide[-1]), ("k-means", best):
    errors.append(1000 * near(z, codes[nearest_code(z, codes)]).item())
    print(f"{start:8} {used(codes).sum():2} codes in use, error {errors[-1]:.1f} / 1000")
assert (taken[0].sum(), taken.any(0).sum()) == (12, 12 + 4)
assert (narrow == narrow[0]).all(2).all(0).sum() == 16
assert errors == sorted(errors, reverse=True)
assert used(wide[-1]).sum() > 0.85 * 32
dead = ~used(narrow[-1])                               # at the last gradient
assert (slope[dead] == 0).all()
assert (slope[~dead] != 0).all()

# %% [markdown]
# ## 2. What the encoder feels
# Now let the encoder learn too. Its output $\hat z$ reaches the decoder only through $q$, and $q$
# is a staircase. Move $\hat z$ a little: the code stays, so the picture stays, so every loss of the
# picture stays. Its true gradient is zero, except on the edges, where it does not exist. Two
# remedies stand in `VectorQuantizer.forward`.
#
# - **Straight-through.** Write $z_q = z + (\hat z - \mathrm{sg}[\hat z])$, with $z$ held constant.
#   The bracket is 0, but its derivative is 1: the decoder's gradient at $z_q$ is handed to $\hat z$
#   as it is.
# - **Commitment.** $\beta\|\mathrm{sg}[z] - \hat z\|^2$ is a spring from each vector to its own
#   code. It is the last term of [AVQ Eq. 2].
#
# **Claim.** Straight-through sends the same arrow from every place of a region, bit for bit. It
# asks "where should the *code* go?", because the decoder's gradient was taken there. It does not
# know where $\hat z$ itself lies.

# %%
torch.manual_seed(3)
quantizer, target = VectorQuantizer(7, d=2, code_range=1.0), torch.tensor([0.9, 0.2])
codes, side = quantizer.embedding.weight.detach(), torch.linspace(-1.2, 1.2, 240)
spots = torch.cartesian_prod(*2 * [torch.linspace(-1.1, 1.1, 11)])                      # (121, 2)
z_e = spots.T[None, :, :, None].requires_grad_()
z_q, indices, latent_loss = quantizer(z_e)
task = (z_q - target[None, :, None, None]).square().sum()        # the decoder wants z_q at target
through, spring = (-torch.autograd.grad(loss, z_e)[0][0, :, :, 0].T for loss in (task, latent_loss))
for k in indices.unique():
    assert (through[indices.flatten() == k] == 2 * (target - codes[k])).all()
stairs = (codes - target).square().sum(1)[nearest_code(torch.cartesian_prod(side, side), codes)]
stairs = stairs.view(240, 240).T

# %%
# figure: arrows. Shade: the task's loss as a function of z_e, a staircase. Circles: codes. Star:
# where the task wants the code. Left no arrow, in the middle one a region, right one to each code.
flat = (stairs.diff(dim=0)[:, 1:] == 0) & (stairs.diff(dim=1)[1:] == 0)
fig, panels = plt.subplots(1, 3, figsize=(8.4, 3.1))
for panel, arrows, title in zip(panels, (0 * spots, through, spring), (
        f"true gradient: 0 at {flat.float().mean():.0%} of all places",
        f"straight-through: {len(through.unique(dim=0))} different arrows",
        f"commitment: {len(spring.unique(dim=0))} different arrows")):
    panel.imshow(stairs, "Greys", vmax=9, origin="lower", extent=(-1.2, 1.2, -1.2, 1.2))
    panel.quiver(*spots.T, *(arrows / arrows.norm(dim=1).max().clamp(1e-9)).T, color="C0", scale=11)
    panel.scatter(*codes.T, s=45, c="C1", edgecolors="w", zorder=3)
    panel.plot(*target, "*", c="C2", ms=18, mec="k")
    panel.set(title=title, xlabel="first number of z_e", xticks=[], yticks=[], aspect="equal")
panels[0].set_ylabel("second number of z_e")
assert flat.float().mean() > 0.9

# %% [markdown]
# Look right of the star: the arrows in the middle still point to the right, away from it. They were
# computed at the code, which lies to its left. Such arrows are honest only near a code. The spring
# on the right keeps $\hat z$ there.
#
# ## 3. Six ways to write four lines
# One of these is right. The others are slips that are easily made. Read slowly: each differs in a
# word or two.
#
# The second puts $\beta = 0.25$ on the codes' term, not on commitment. Taming's VQGAN was trained
# like that, and so were its public weights (`legacy_beta` here, PAPERS.md D3). It works, but it is
# not Eq. 2.
#
# **Predict first.** By what factor does the second variant change the pull on the encoder?

# %%
sg, beta = torch.Tensor.detach, 0.25
variants = {       # z = z_e and e = its codes give z_q for the decoder, and the latent loss
    "right": lambda z, e: (z + sg(e - z), near(e, sg(z)) + beta * near(z, sg(e))),
    "beta on the codes' term": lambda z, e: (z + sg(e - z), beta * near(e, sg(z)) + near(z, sg(e))),
    "loss of the new z_q": lambda z, e: (
        z_q := z + sg(e - z), near(z_q, sg(z)) + beta * near(z, sg(z_q))),
    "no straight-through": lambda z, e: (e, near(e, sg(z)) + beta * near(z, sg(e))),
    "no sg in z_q": lambda z, e: (z + (e - z), near(e, sg(z)) + beta * near(z, sg(e))),
    "no sg in the loss": lambda z, e: (z + sg(e - z), (1 + beta) * near(e, z)),
}
guess = None   # your number, before you run the next cell

# %%
values, slopes = [], []
for variant in variants.values():
    a, b = (t.clone().requires_grad_() for t in (z, wide[-1][nearest_code(z, wide[-1])]))
    z_q, latent_loss = variant(a, b)
    values.append((1000 * latent_loss.item(), near(z_q, 0.5).item()))          # 0.5: any task
    slopes.append([torch.autograd.grad(loss, at, retain_graph=True, materialize_grads=True)[0]
                   for loss in (latent_loss, near(z_q, 0.5)) for at in (b, a)])
codes_up, encoder_up, _, task_up = slopes[0]        # of the right variant, the unit of each column
units = codes_up, encoder_up, task_up, task_up
table = torch.tensor([[(s * u).sum() / (u * u).sum() for s, u in zip(r, units)] for r in slopes])
print(f"you said {guess}, it is {table[1, 1]:.2f}")

# %% [markdown]
# **Claim.** All six print the same two losses. At a given step no test of the loss's value can tell
# them apart. The gradients tell at once. The third one is the worst: its codebook hears
# nothing at all, and its encoder is pushed *away* from its codes, with $(1-\beta)/\beta = 3$ times
# the right force.

# %%
# figure: variants. The losses, then who gets which gradient, in units of the right one. Coloured:
# wrong. Every variant prints the same losses.
assert torch.tensor(values).allclose(torch.tensor(values[0]), rtol=1e-5)
assert table.allclose(torch.tensor([[1, 1, 0, 1], [beta, 1 / beta, 0, 1], [0, 1 - 1 / beta, 0, 1],
    [1, 1, 1, 0], [1, 1, 1, 0], [1 + beta, 1 + 1 / beta, 0, 1]]), atol=1e-3)
fig, panel = plt.subplots(figsize=(9, 2.8))
wrong = torch.cat([torch.zeros(6, 2), (table - table[0]).abs() > 0.01], 1)
panel.imshow(wrong, cmap="Reds", vmax=2.5, aspect="auto")
for i, row in enumerate(torch.cat([torch.tensor(values), table], 1)):
    for j, value in enumerate(row.tolist()):
        panel.text(j, i, f"{value + 0.0:.3g}", ha="center", va="center")
panel.set_xticks(range(6), ["1000 x\nlatent loss", "task's loss", "latent loss\nto codes",
    "latent loss\nto encoder", "task\nto codes", "task\nto encoder"])
panel.set_yticks(range(6), variants)
panel.set_title(f"six variants, one value, {int(wrong.any(1).sum())} with wrong gradients")

# %% [markdown]
# **Break it.** Train with the third variant: a linear encoder, a linear decoder, 32 codes, our ring
# and blob. This bug lives long, because the loss that everybody watches goes down at first, as it
# should: to less than a quarter, nearly as fast as the right one. Later it comes up again, but not
# to where it began.

# %%
def learn(variant, steps=120):
    torch.manual_seed(1)
    encoder, decoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    book = torch.randn(32, 2, requires_grad=True)
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters(), book], lr=0.1)
    for _ in range(steps):
        z_e = encoder(z)
        z_q, latent_loss = variant(z_e, book[nearest_code(z_e, book)])
        loss = near(decoder(z_q), z)
        yield loss.item(), z_e.abs().max().item(), book.detach().clone()
        optimizer.zero_grad(), (loss + latent_loss).backward(), optimizer.step()

# %% [markdown]
# **Claim.** The codes of the bug move by exactly 0, and its latents leave for the horizon: each
# step pushes them away from codes that cannot follow. Watch how far the codes have moved: that
# number finds the bug after a single step.

# %%
# figure: deaf. Red: the bug. Its loss falls at first, but latents explode and codes stand still.
fig, panels = plt.subplots(1, 3, figsize=(9.6, 2.6))
for name, colour in ("right", "C0"), ("loss of the new z_q", "C1"):
    loss, size, books = zip(*learn(variants[name]))
    moved = [(book - books[0]).norm(dim=1).max().item() for book in books]
    print(f"{name}: loss {loss[0]:.2f}, {loss[30]:.2f} at step 30, {loss[-1]:.2f} at the end; "
          f"codes moved by {moved[-1]:.2f}")
    for panel, curve in zip(panels, (loss, size, moved)):
        panel.plot(curve, c=colour)
panels[0].set(title=f"bug: loss {loss[0]:.2f}, {loss[30]:.2f}, {loss[-1]:.2f}", xlabel="step")
panels[1].set(title=f"bug: largest |z_e| {size[-1]:.0e}", xlabel="step", yscale="log")
panels[2].set(title=f"bug: the codes have moved by {moved[-1]:.1f}", xlabel="step")
assert 4 * loss[30] < loss[0] > 2 * loss[-1]
assert size[-1] > 1000
assert moved[-1] == 0

# %% [markdown]
# Blue is the right variant: the codes travel to the latents and the latents stay.
#
# **Exercise 1 (build).** Eq. 1 without a loop: `vectors` (n,d) and `codes` (K,d) give the nearest
# codes' indices (n,), the lowest where two are equally near. **Exercise 2 (build).** Eq. 2's two
# latent terms of vectors `a` and their codes `b`, both (n,d), as a mean over all numbers, and *by
# hand* its gradients at `a` and at `b`: return all three.

# %%
def my_nearest(vectors, codes):
    # solution
    return (vectors[:, None] - codes).square().sum(2).argmin(1)
    # end

def my_latent_loss(a, b, beta):
    # solution
    difference = 2 * (a - b) / a.numel()
    return (1 + beta) * near(a, b), beta * difference, -difference
    # end
a, b = (t.clone().requires_grad_() for t in (z, best[nearest_code(z, best)]))
loss = variants["right"](a, b)[1]
right = loss.detach(), *torch.autograd.grad(loss, (a, b))
check("Eq. 1", lambda: my_nearest(z, best), nearest_code(z, best), "argmin over which axis?")
check("Eq. 2", lambda: my_latent_loss(z, b.detach(), beta), right, "which term reaches which?")

# %% [markdown]
# ## 4. What do K codes buy?
# Now real latents: the first stage of the small run in `run/`, trained on drawn street signs. Its
# encoder makes 16 x 16 vectors of 8 numbers from 64 x 64 pixels. Its own codebook has 256 codes.
#
# Keep encoder and decoder as they are. Throw the codebook away, cluster the encoder's outputs, and
# put the $K$ centres in its place, for $K$ = 2, 4, 8, ... This is the first half of ReFiT.
# [DDM Sec. 3.2] It tells what a codebook of that size could do. And leave the quantiser out: that
# is the floor.
#
# **Predict first.** How many codes does it take until the picture's error (L1) is within 10 % of
# *no quantiser at all*?

# %%
trained, refitted = (load_first_stage(f"run/{stage}/last.pt").model for stage in ("vqgan", "refit"))

def read(split, lists):
    return (pixels(image, "cpu") for image in views(Signs(split, 64), lists))

x = next(read("test", [range(64)]))                                              # (64, 3, 64, 64)
z_e = trained.moments(x)                                                         # (64, 8, 16, 16)
vectors = z_e.movedim(1, -1).flatten(0, 2)                                       # (16384, 8)
features = sample_features(trained.moments, lambda lists: read("train", lists), 96, 6000, (0, 0))
guess = None   # your number, before you run the next cell

# %%
def cost(codes, model):
    z_q = codes[nearest_code(vectors, codes)].view(64, 16, 16, 8).movedim(-1, 1)
    x_hat = model.decode(z_q)
    return near(z_q, z_e).item(), (x_hat - x).abs().mean().item(), x_hat[6]
bits = np.arange(1, 9)
books = [rebuild_codebook(features, 2**int(b), 20, 50, torch.Generator().manual_seed(0))[0]
         for b in bits]
errors, L1, shown = zip(*(cost(book, trained) for book in books))
own_error, own_L1, _ = cost(trained.quantize.embedding.weight, trained)
without = trained.decode(z_e)
floor = (without - x).abs().mean().item()
print(f"you said {guess}, it is {2 ** bits[np.array(L1) < 1.1 * floor].min()}")

# %% [markdown]
# $K$ codes cost $\log_2 K$ bits a cell. In $D$ free dimensions the quantisation error falls as
# $K^{-2/D}$.
#
# **Claim.** The error falls as in fewer than 5 dimensions, although a latent has 8 numbers. The
# trained 256 codes are about as good as 128 rebuilt ones. Yet rounding makes less than 6 % of this
# first stage's L1.

# %%
# figure: rate-distortion. A column for each K. Star: trained codebook. Dashed: no quantiser.
power, slow = np.polyfit(bits, np.log2(errors), 1)[0], errors[0] * 2 ** (0.25 - bits / 4)
fig, (top, middle, low) = plt.subplots(3, 1, figsize=(9.6, 4.6), height_ratios=(0.8, 1.2, 1.2))
for place, image in enumerate(torch.stack([*shown, without[6], x[6]]).movedim(1, -1), 1):
    shades = (16 * image.clamp(-1, 1)).round() / 32 + 0.5           # 33 a colour: a smaller file
    top.imshow(shades, extent=(place - 0.47, place + 0.47, 0, 1))
top.set(xlim=(0.5, 10.5), aspect="auto", yticks=[], xticks=range(1, 11),
        xticklabels=[*(f"K = {2**b}" for b in bits), "no quantiser", "original"])
middle.plot(bits, L1, ".-", 8, own_L1, "C1*", [0.5, 10.5], [floor, floor], "C5--", ms=13)
low.semilogy(bits, errors, ".-", 8, own_error, "C1*", bits, slow, "C5:", ms=13)
middle.set(xlim=(0.5, 10.5), xticks=bits, title=f"L1 against bits a cell; no quantiser {floor:.3f}")
low.set(xlim=(0.5, 10.5), xticks=bits, title=f"mean (z_q - z_e)² as in {-2 / power:.1f} dimensions")
assert -2 / power < 5
assert abs(own_error / errors[6] - 1) < 0.1
assert own_L1 - floor < 0.06 * own_L1

# %% [markdown]
# Read the columns from left to right.
#
# - **The pictures.** Two codes give a ghost, a few dozen give the street. The word is lost in
#   *every* column but the original, also where nothing is rounded.
# - **The line.** It is steeper than the dotted one of 8 dimensions: the encoder fills only some of
#   its 8 numbers.
# - **The star.** In the latents it lies well above the line: half as many well placed codes do
#   as well. In the pictures it lies on the line: there the waste costs almost nothing.
#
# AVQ Sec. 1 finds the cause of lost words in the quantisation. Here the encoder has already left
# out what its codes could not carry, so that finer rounding does not bring the word back. (To be
# fair: the decoder was trained on codes, so the latents without quantiser are new to it.)
#
# ## 5. Where the dead codes lie
# Why is the trained codebook poor? Look at all latents, and at the codes among them, along the two
# directions in which the latents vary most.
#
# **ReFiT** is the cure. Keep the trained encoder. Make the centres of its outputs the new codebook:
# seeds by AFK-MC², a quick k-means++, then Lloyd's algorithm. Then fine-tune the decoder alone.
# [DDM Sec. 3.2] [DDM Tab. 1]

# %%
# figure: refit. Grey: latents. Dots: codes in use. Crosses: codes that no cell takes, a heap where
# they were born. Right: how often each code is taken, sorted.
axes = torch.linalg.eigh(torch.cov(vectors.T)).eigenvectors[:, [-1, -2]]
fig, (*panels, last) = plt.subplots(1, 3, figsize=(8.4, 3))
for panel, model, name in zip(panels, (trained, refitted), ("trained", "ReFiT")):
    codes, colour = model.quantize.embedding.weight, "C1" if model is trained else "C0"
    counts = nearest_code(vectors, codes).bincount(minlength=len(codes))
    panel.scatter(*(vectors[::29] @ axes).T, s=1, c="0.7")
    panel.scatter(*(codes[counts > 0] @ axes).T, s=9, c=colour)
    panel.scatter(*(codes[counts == 0] @ axes).T, s=16, c="k", marker="x", linewidths=0.8)
    panel.set(title=f"{name}: {(counts > 0).sum()} of {len(codes)} codes in use", aspect="equal",
              xlabel="axis 1 of the latents", ylabel="axis 2", xlim=(-4, 4), ylim=(-4, 4))
    last.plot(100 * counts.sort(descending=True).values / counts.sum(), c=colour)
last.set(title="% of the cells that take a code", xlabel="rank of the code", yscale="log")

# %% [markdown]
# **Claim.** Of the codes that no cell takes, nine in ten lie where they were born (this run's codes
# start within $\pm 0.3$ in each number). ReFiT halves the number of codes, uses all of them, and
# keeps the latent error. L1 grows by less than 4 %.

# %%
rows = []
for model, codes in ((m, m.quantize.embedding.weight) for m in (trained, refitted)):
    counts = nearest_code(vectors, codes).bincount(minlength=len(codes))
    K, usage, perplexity = code_statistics(counts).values()
    error, loss, _ = cost(codes, model)
    rows.append((error, loss, codes[counts == 0]))
    print(f"K {K}: {usage:.0%} used, perplexity {perplexity:.0f}, error {error:.3f}, L1 {loss:.3f}")
(old_error, old_loss, dead), _ = rows
assert (dead.abs().amax(1) <= 0.3).float().mean() > 0.9
assert (K, usage) == (128, 1)
assert error < 1.02 * old_error
assert loss < 1.04 * old_loss

# %% [markdown]
# Perplexity is the number of codes that would be as varied if all were taken equally often. Count
# it over many pictures: one picture uses few codes, however good the codebook. [DDM Sec. 4.2]
#
# **Exercise 3 (build).** One step of Lloyd's algorithm, the engine of ReFiT: each vector (n,d) goes
# to its nearest centre (K,d), each centre to the mean of its vectors. (Here each centre starts on a
# vector, so none is empty. `kmeans` moves an empty one to a far vector.)

# %%
def my_lloyd_step(vectors, centres):
    # solution
    taken = nearest_code(vectors, centres)
    return torch.stack([vectors[taken == k].mean(0) for k in range(len(centres))])
    # end

check("Lloyd", lambda: my_lloyd_step(z, z[::250]), kmeans(z, z[::250], iterations=1)[0],
      "means of the vectors, over which axis?")

# %% [markdown]
# **Exercise 4 (explain).** Run `film(1 / 32)` with more steps. Do the dead codes come back? Then
# add one line to it: every 50 steps, put each dead code on a random vector. What happens to the
# quantisation error, and what would that line do to a decoder that is being trained on these codes?
#
# The `.py` beside this notebook has the solutions.
