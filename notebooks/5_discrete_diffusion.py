# %% [markdown]
# # 5. Discrete diffusion, enumerated
#
# **Question.** How can noise on codes be undone, and what must the network know for that?
#
# A code has no neighbours: code 17 is not "a little less" than code 18. So noise cannot be added to
# it. It can only be replaced. This notebook follows DDM from that noise to generated pictures.
# Most of it happens on maps so small that *every* map can be listed, so each statement is checked
# against the exact truth.
#
# Read first: DDM Sec. 2.1 (Eq. 7 only), 3.1 and 4.3; the head of `diffusion.py`. 75 minutes.

# %%
import io
import sys

sys.path.insert(0, "..")
import matplotlib.pyplot as plt
import torch
from check import check
from PIL import Image

from convert import load_prior
from data import Signs, pixels, views
from diffusion import MultinomialDiffusion, draw_codes, frequency_nats, held_out_bound

# %% [markdown]
# ## Noise that replaces
#
# In one step a code stays with probability $\alpha_t$. Otherwise one of all $K$ codes is drawn,
# each with the same probability. [DDM Sec. 3.1] [DDM Eq. 15] [DDM Eq. 16] Many steps do the same
# with one number: after $t$ steps a code is *kept* with probability
# $\bar\alpha_t = \alpha_1 \cdots \alpha_t$. [DDM Eq. 17] [DDM Eq. 18] The schedule chooses
# $\bar\alpha_t$ and goes from 1 to almost 0. [DDM Eq. 19] A draw may also hit the old code again.
#
# **Claim.** After $t$ steps a share $\bar\alpha_t + (1 - \bar\alpha_t)/K$ of the codes is
# unchanged.

# %%
# figure: forward. A code is either untouched or replaced. At t = 55 the sign is hard to find.
plt.style.use("course.mplstyle")
prior, guess = load_prior("run"), None               # a small trained model, see make_run.py
first_stage, diffusion, K = prior.first_stage, prior.diffusion, prior.diffusion.K
maps = first_stage.indices(pixels(next(views(Signs("val", 64), [range(16)])), "cpu"))  # (16,16,16)
def picture(*codes):                   # side by side, in 24 colours, which make small files
    x = torch.cat(list(first_stage.decode_indices(torch.stack(codes)).clamp(-1, 1)), 2)
    x = (x * 127.5 + 127.5).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(x).quantize(24, dither=Image.Dither.NONE).convert("RGB")
for axis, t in zip(plt.subplots(1, 5, figsize=(9, 2.1))[1], (0, 15, 35, 55, 100)):
    z_t = diffusion.q_sample(maps, torch.full((16,), t), torch.Generator().manual_seed(t))
    same, a = (z_t == maps).float().mean().item(), diffusion.alpha_bar_t[t].item()
    assert abs(same - (a + (1 - a) / K)) < 0.02
    axis.imshow(picture(z_t[1]))
    axis.set(xticks=[], yticks=[], title=f"t = {t}: {same:.1%} same")

# %% [markdown]
# **Exercise 5.1, build.** Noise codes `z_0` (any shape, values 0 to 4) to a given $\bar\alpha_t$.
# Two draws a cell are enough. No loop over steps.

# %%
def noised(z_0, a):
    """Draw z_t ~ q(z_t|z_0) for K = 5, where a is alpha_bar_t: int64, of z_0's shape."""
    # solution
    return torch.where(torch.rand(z_0.shape) < a, z_0, torch.randint(5, z_0.shape))
    # end

def shares(z):
    return None if z is None else torch.bincount(z.flatten(), minlength=5) / z.numel()

torch.manual_seed(0)
check("noise on codes", lambda: shares(noised(torch.full((200_000,), 2), 0.6)),
      [0.08, 0.08, 0.68, 0.08, 0.08], "a replaced code may be replaced by itself", atol=0.01)

# %% [markdown]
# ## One step back, if the end were known
#
# Suppose $z_t$ and the clean $z_0$ are both known. Then Bayes' rule gives the law of the code one
# step earlier [DDM Eq. 20]:
#
# $$q(z_{t-1}=k \mid z_t, z_0) \propto q(z_t \mid z_{t-1}=k)\; q(z_{t-1}=k \mid z_0).$$
#
# The first factor is a *column* of the step's matrix $Q_t$: where can $z_t$ have come from? The
# second is a *row* of $\bar Q_{t-1}$: how far can $z_0$ have got? With uniform noise $Q_t$ is
# symmetric, so a row will do for the column, and the paper's Eq. 21 uses one. With other noise it
# will not: *absorbing* noise turns a code into a mask (here code 4) that never comes back.
#
# **Claim.** The module's posterior is Bayes' rule, for all $z_t$, $z_0$ and $t$. Row and column
# agree for uniform noise only.

# %%
ten, uniform = MultinomialDiffusion(5, 10), torch.ones(5).double() / 5
absorbing = torch.eye(5).double()[4]                     # every replaced code becomes code 4
def Q(s, t, noise):                                      # from s to t; row: from, column: to
    a = ten.alpha_bar_t[t] / ten.alpha_bar_t[s]
    return a * torch.eye(5).double() + (1 - a) * noise
def bayes(t, noise):                                     # q(z_{t-1}|z_t,z_0) as [z_t, z_0, z_{t-1}]
    joint = Q(t - 1, t, noise).T[:, None] * Q(0, t - 1, noise)[None]
    return joint / joint.sum(2, keepdim=True)
z_t, z_0 = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T[..., None, None]
for t in torch.arange(1, 11)[:, None].expand(10, 25):
    ours = ten.log_posterior(z_t, z_0, t - 1, t, uniform).exp().view(5, 5, 5)
    assert torch.allclose(ours, bayes(t[0], uniform), rtol=0, atol=1e-12)

# %%
# figure: posterior. One step back the code is what it is now (blue), what it was at first (grey),
# or, with uniform noise only, anything else (yellow).
fig, axes = plt.subplots(2, 4, figsize=(9, 3.8), width_ratios=(1, 1.3, 1.3, 1.3))
for row, name, noise, now in zip(axes, ("uniform", "absorbing"), (uniform, absorbing), (1, 4)):
    assert torch.equal(Q(4, 5, noise)[now], Q(4, 5, noise)[:, now]) == (name == "uniform")
    row[0].imshow(Q(4, 5, noise), cmap="Blues", vmin=0, vmax=1)
    row[0].add_patch(plt.Rectangle((now - 0.5, -0.5), 1, 5, fill=False, ec="C1", lw=2))
    row[0].grid(False)
    row[0].set(title=f"{name} noise: $Q_5$", xlabel=f"to (framed: {now})", ylabel="from")
    for t, axis in zip((2, 6, 9), row[1:]):
        axis.bar(range(5), bayes(t, noise)[now, 3],
                 color=["C5" if k == 3 else "C0" if k == now else "C2" for k in range(5)])
        axis.set(ylim=(0, 1), xticks=range(5), xlabel="$z_{t-1}$", yticks=(0, 0.5, 1),
                 title=f"$z_0$ = 3, $z_{t}$ = {now}")

# %% [markdown]
# **Exercise 5.2, build.** Training compares two such laws, cell by cell: the posterior $q$, which
# knows $z_0$, and the model's $p$, by Kullback and Leibler's distance
# $\sum_k q_k \log (q_k / p_k)$ [DDM Eq. 24]. The model does not know $z_0$. It has a guess, the law
# $\hat x_0$ over the codes, and puts it where the posterior has $z_0$ [DDM Eq. 21]:
#
# $$\theta_k(z_t, \hat x_0) = Q_t[k, z_t] \cdot \sum_j \hat x_{0,j}\, \bar Q_{t-1}[j, k]$$
#
# The model's $p$ is $\theta$, *normalised* [DDM Eq. 22]. Build the distance from `bayes` and `Q`
# for $z_t = 1$, $z_0 = 3$.

# %%
def kl_term(x, t):
    """KL(q || p) in nats at z_t = 1, z_0 = 3, for x0_hat = x (5,) at time t: a 0-d tensor."""
    # solution
    q = bayes(t, uniform)[1, 3]
    theta = Q(t - 1, t, uniform)[:, 1] * (x @ Q(0, t - 1, uniform))
    return (q * (q / (theta / theta.sum())).log()).sum()
    # end

x = torch.tensor([0.1, 0.2, 0.1, 0.4, 0.2]).double()
one, three = torch.tensor([[[1]]]), torch.tensor([[[3]]])
check("a term of the bound", lambda: kl_term(x, 6),
      ten.terms(x.log().view(1, 5, 1, 1), one, three, torch.tensor([6]))[0, 0, 0],
      "x @ Q is the law after some steps of a code drawn from x; divide theta by its sum")

# %% [markdown]
# ## A world of nine maps
#
# Now the end is not known. Take maps of two cells with three codes each: nine maps, whose law is
# the table `JOINT`. The two cells mostly agree, as neighbours in a picture do.
#
# What should $\hat x_0$ be? Bayes' rule has a clear answer (PAPERS.md D32). The first factor of
# $\theta$, $Q_t[k, z_t]$, already holds what the cell's own $z_t$ tells. So $\hat x_0$, in the
# second, must *not* hold it again: it should be the law of $z_0$ in a cell, given the **other**
# cells. In this world it can be written down (`x0_hat` with `full=False`). No network, no error of
# training. What is left is the method.

# %%
JOINT = torch.tensor([[30, 2, 1], [3, 25, 4], [5, 2, 28]]).double() / 100     # [first, second cell]
MAPS, toy = torch.cartesian_prod(*2 * [torch.arange(3)])[:, :, None], MultinomialDiffusion(3, 64)
def x0_hat(d, t, full=False):            # log-law of z_0 in each cell, for each z_t: (9,3,2,1)
    a = d.alpha_bar_t[t]
    seen = a * (torch.arange(3) == MAPS) + (1 - a) / 3                     # q(z_t|z_0=k): (9,2,3)
    x = torch.stack([seen[:, 1] @ JOINT.T, seen[:, 0] @ JOINT], 2)      # given the other cell
    return (x * (seen.mT if full else 1))[..., None].log().log_softmax(1)
def law_of_samples(steps, step, full=False, p=JOINT * 0 + 1 / 9):
    for t, s in torch.tensor(toy.reverse_times(steps))[..., None].expand(steps, 2, 9):
        q = step(x0_hat(toy, t[0], full), MAPS, s, t).exp()[..., 0]     # of each cell: (9,3,2)
        p = torch.einsum("z,zi,zj->ij", p.flatten(), *q.unbind(2))      # cells independently
    return p

# %% [markdown]
# **Predict first.** Sample this world by a *perfect* $\hat x_0$ in a single step from $t = T$ to 0.
# The total variation between two laws is half the sum of their differences: 0 for equal laws, 1
# for laws without a common map. How far are the samples from the data?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# **Claim.** One step draws from the product of the cells' own laws: it knows each cell and nothing
# of their agreement. With more steps the law comes to the data's, because each step sees what the
# one before has drawn.

# %%
# figure: laws. The exact law of the samples: one step loses the diagonal, 64 steps have it back.
def distance(p):
    return 0.5 * (p - JOINT).abs().sum().item()

laws = {n: law_of_samples(n, toy.log_theta) for n in (1, 2, 4, 8, 16, 64)}
print(f"you said {guess}, it is {distance(laws[1]):.3f}")
assert torch.allclose(laws[1], JOINT.sum(1)[:, None] * JOINT.sum(0), rtol=0, atol=1e-8)
assert distance(laws[64]) < 0.02
fig, axes = plt.subplots(1, 7, figsize=(11, 2))
for axis, (n, p) in zip(axes, {"data": JOINT, **laws}.items()):
    axis.imshow(p, cmap="Blues", vmin=0, vmax=0.3)
    axis.grid(False)
    axis.set(xticks=[], yticks=[], title=n if n == "data" else f"{n} step(s): {distance(p):.3f}")
    for i, j in MAPS[..., 0].tolist():
        axis.text(j, i, f"{p[i, j]:.0%}", ha="center", va="center", c="wk"[int(p[i, j] < 0.15)])

# %% [markdown]
# Why are cells drawn independently? Because a joint draw would need a table of all maps: nine here,
# $128^{256}$ for the maps of a small picture.
#
# **Predict first.** Within a step the cells do not see each other's draws, so $\hat x_0$ can be
# perfect and the samples still wrong. Going from 32 to 64 steps: by which factor does the distance
# fall?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# **Break it.** The paper does not say what $\hat x_0$ estimates. "The law of $z_0$ given the noisy
# map" sounds right, and that is the law given **all** cells, `full=True`. Put it into $\theta$, and
# a cell's own noise counts twice. Nothing fails: every law is normalised, the samples look like
# maps. D3PM has another reverse step, the *mixture* of posteriors
# $\sum_j \hat x_{0,j}\, q(z_{t-1} \mid z_t, z_0=j)$. It does not add the evidence, so there the
# same $\hat x_0$ is right [PAPERS.md D31, D32].
#
# **Claim.** Each form has its own $\hat x_0$. With it both take the *same* steps. With the other's
# the samples stay wrong, however many steps are taken.

# %%
def mixture(log_x, z_t, s, t):
    each = [log_x[:, j:j + 1] + toy.log_posterior(z_t, torch.full_like(z_t, j), s, t, log_x)
            for j in range(3)]
    return torch.stack(each).logsumexp(0)                # log sum_j x_j q(z_s|z_t,z_0=j)

N = (1, 2, 4, 8, 16, 32, 64)
forms = {"θ": toy.log_theta, "mixture": mixture}
far = {(form, full): [distance(law_of_samples(n, forms[form], full)) for n in N]
       for form in forms for full in (False, True)}
print(f"you said {guess}, it is {far['θ', False][5] / far['θ', False][6]:.2f}")
assert all(abs(a - b) < 1e-9 for a, b in zip(far["θ", False], far["mixture", True]))
assert min(far["θ", True] + far["mixture", False]) > 0.25

# %%
# figure: knows. A right pair halves its distance with each doubling of the steps. A wrong pair
# never arrives.
plt.figure(figsize=(7.5, 3.4))
for form, full, look in (("θ", True, "C1o-"), ("mixture", False, "C2o-"),
                         ("mixture", True, "C3o"), ("θ", False, "C0-")):
    label = f"{form}, x̂0 given {'all' if full else 'the other'} cells"
    plt.loglog(N, far[form, full], look, label=f"{label}: {far[form, full][-1]:.3f}")
plt.xticks(N, N)
plt.title(f"Its own noise counted twice: {far['θ', True][6] / far['θ', False][6]:.0f} times as far")
plt.gca().set(xlabel="steps", ylabel="distance from the data's law")
plt.legend(title="in 64 steps", loc="lower left")
plt.show()

# %% [markdown]
# **Exercise 5.3, build.** Undo *absorbing* noise, where code 4 is the mask. A cell that is not
# masked is known for good. A masked cell at time $t$ was, at the earlier time $s$, masked as well
# or one of the codes 0 to 3. Write the law of $z_s$ in closed form, without `Q`. (Here
# nothing can count twice: a mask says nothing about its code.)

# %%
def unmask(x, a_0s, a_0t):
    """The law (5,) of z_s in a masked cell. x (5,): the law of z_0 by the other cells, x[4] = 0."""
    # solution
    still_masked = (1 - a_0s) / (1 - a_0t)
    return torch.cat([(1 - still_masked) * x[:4], still_masked[None]])
    # end

x = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.0]).double()
right = Q(3, 6, absorbing)[:, 4] * (x @ Q(0, 3, absorbing))
check("absorbing noise, undone", lambda: unmask(x, *ten.alpha_bar_t[[3, 6]]), right / right.sum(),
      "masked at s given masked at t: divide one probability of being masked by the other")

# %% [markdown]
# ## Who tells the network?
#
# The network *sees* the cell's own $z_t$; it gets the whole map. Nobody forbids it to use it. So
# why should it learn the law given the others? Because the bound is lowest there.
#
# Here is the proof by training. The denoiser is a table: free logits for each $t$, each map and
# each cell. It starts with zeros and follows the gradient of [DDM Eq. 7], summed over *all* $z_0$,
# $t$ and $z_t$. No sampling noise, no network that could be too small.
#
# **Claim.** It ends at the law given the other cells, and far from the law given all.

# %%
# figure: learnt. The table was free to choose. The bound led it to what the other cells tell.
d, logits = MultinomialDiffusion(3, 8), torch.zeros(9, 9, 3, 2, 1).double().requires_grad_()
t, z_t, z_0 = torch.cartesian_prod(torch.arange(1, 9), torch.arange(9), torch.arange(9)).T
q = d.log_q(MAPS[z_t][:, None], MAPS[z_0][:, None], 0 * t, t, JOINT).sum((1, 2, 3)).exp()
adam, weight = torch.optim.Adam([logits], 0.1), q * JOINT.flatten()[z_0]    # of each (t, z_t, z_0)
for _ in range(200):
    bound = (weight * d.closed_terms(logits[t, z_t], MAPS[z_t], MAPS[z_0], t).sum((1, 2))).sum()
    adam.zero_grad(), bound.backward(), adam.step()
learnt = logits[1:].detach().softmax(2).flatten()
for axis, who in zip(plt.subplots(1, 2, figsize=(8, 3.6))[1], ("the other", "all")):
    best = torch.stack([x0_hat(d, n, who == "all").exp() for n in range(1, 9)]).flatten()
    off = (best - learnt).abs().max().item()
    assert off > 0.7 if who == "all" else off < 0.01
    axis.plot(best, learnt, ".", c="C1" if who == "all" else "C0")
    axis.set(xlabel=f"x̂0 given {who} cells", ylabel="learnt x̂0", title=f"off by up to {off:.1g}")

# %% [markdown]
# ## The bound is a code length
#
# Eq. 7 adds up to a bound on $-\log p(z_0)$: the length of $z_0$ in nats, if it were written to a
# file by this model. 1 nat is $1/\log 2$ = 1.44 bits. Each term is what one step back costs.
#
# Take one cell with five codes, so that nothing is lost by independence. Then the sum should be the
# entropy of the cell's law exactly. That depends on the last step. Eq. 22 has another formula for
# $t = 1$: there $\hat x_0$ itself is the law of $z_0$, without $\theta$, so without the evidence of
# $z_1$. But $\hat x_0$ has learnt to leave that evidence to $\theta$. We use one formula for all
# $t$ [PAPERS.md D30].
#
# **Claim.** With one formula the terms add up to the entropy. With Eq. 22's first line they exceed
# it by all that the other steps have already paid for.

# %%
# figure: last-step. The blue bars are the entropy, cut into steps. The red bar pays it once more.
p0, d = torch.tensor([8, 5, 4, 2, 1]).double() / 20, MultinomialDiffusion(5, 8)
z_t, z_0 = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T[..., None, None]
L, entropy = [], -(p0 * p0.log()).sum().item()
for t in torch.arange(1, 9)[:, None].expand(8, 25):
    weight = p0[z_0] * d.log_q(z_t[:, None], z_0[:, None], 0 * t, t, p0).exp()[:, 0]
    L.append((weight * d.terms(p0.log().view(1, 5, 1, 1).expand(25, -1, -1, -1), z_t, z_0, t)
              ).sum().item())
assert abs(sum(L) - entropy) < 1e-6 < 0.5 < sum(L[1:])
plt.figure(figsize=(7, 3))
plt.bar(1, entropy, color="C1", label=f"Eq. 22's first line: {sum(L[1:]) + entropy:.2f} in all")
plt.bar(range(1, 9), L, color="C0", label=f"one formula: {sum(L):.2f} = entropy {entropy:.2f}")
plt.gca().set(xlabel="t", ylabel="$L_{t-1}$ in nats", title="A cell's code length, step by step")
plt.legend()
plt.show()

# %% [markdown]
# ## The same sum for pictures
#
# Now the trained network. A map of a picture has 16 x 16 codes of 128. A model for which all codes
# are alike needs $\log_2 128 = 7$ bits for each. Counting helps a little: some codes are common,
# and a cell at the top is often sky.
#
# **Predict first.** How many bits does the prior need for a code of a held-out picture, on average?

# %%
guess = None   # your number, before you run the next cell

# %% [markdown]
# **Claim.** The prior needs less than 0.8 of what the best counting needs. $L_T$, the cost of not
# ending in pure noise, is nothing.

# %%
# figure: length. Half-noisy maps cost most. What cells tell each other is worth more than counting.
train = first_stage.indices(pixels(next(views(Signs("train", 64), [range(200)])), "cpu"))
counted, g, L = frequency_nats(train.numpy(), maps.numpy(), K), torch.Generator().manual_seed(0), []
for t in torch.arange(1, 101)[:, None].expand(100, 16):
    z_t = diffusion.q_sample(maps, t, g)
    L.append(diffusion.terms(diffusion.logits(prior.unet, z_t, t), z_t, maps, t).mean().item())
counted = [counted[name].mean().item() / 256 for name in ("unigram", "histogram")]
bits = [7, *(n / torch.tensor(2.0).log().item() for n in (*counted, sum(L)))]
print(f"you said {guess}, it is {bits[3]:.2f} bits; counted {bits[1]:.2f}, by cell {bits[2]:.2f}")
left, right = plt.subplots(1, 2, figsize=(10, 2.8))[1]
left.bar(range(1, 101), L, width=1)
left.set(xlabel="t", ylabel="$L_{t-1}$ in nats a code", title=f"Sum: {sum(L):.2f} nats")
right.barh(["equal", "counted", "by cell", "prior"], bits, color=["C5", "C5", "C5", "C0"])
right.set(xlabel="bits a code", title=f"The prior: {1 - bits[3] / bits[2]:.0%} less than counting")
assert (bits[3] < 0.8 * min(bits[:3])) & (diffusion.prior_kl() < 1e-9)

# %% [markdown]
# ## The way back
#
# A sample begins as noise. At each step the network looks at the whole map, all cells at once, and
# the codes of the next map are drawn from $\theta$ [DDM Eq. 22] [DDM Fig. 7]. The sampler takes any
# function for its model. So one that notes what passes through is enough to film it.

# %%
# figure: film. The network has decided on road and sky while the map still looks like noise.
film = []
def watching(z_t, t):
    film.append((z_t[1], (logits := prior.unet(z_t, t))[1].argmax(0)))
    return logits
def small():                           # the figure in 64 colours, which make a small file
    plt.savefig(file := io.BytesIO()), plt.close()
    return Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)
samples = diffusion.sample(watching, (8, 16, 16), 100, torch.Generator().manual_seed(2))
shown = zip(*(film[100 - t] for t in (100, 85, 70, 60, 45, 30, 1)))
titles = "the map at t = 100, 85, 70, 60, 45, 30 and 1", "the likeliest code of each cell, then"
for axis, codes, title in zip(plt.subplots(2, 1, figsize=(9, 3.2))[1], shown, titles):
    axis.imshow(picture(*codes))
    axis.set(xticks=[], yticks=[], title=title)
small()

# %% [markdown]
# ## Fewer steps, and a shortcut
#
# Each step costs a call of the network. The paper draws in 2 to 4,000 steps [DDM Fig. 5]. Any two
# times can be joined by one step, and for a cell alone that step is exact [PAPERS.md D36]. What is
# lost is known from the nine maps: the agreement of cells that are drawn at once.
#
# A tempting shortcut is to *choose* cells. In the noise a cell is still untouched at time $s$ with
# probability $\bar\alpha_s$, by chance. So keep just that share of the cells, but the ones of whose
# codes the network is surest, and renew all others.

# %%
def surest(n, steps):                    # draw n maps; keep the cells of the surest codes
    g = torch.Generator().manual_seed(0)
    z, kept = torch.zeros(n, 16, 16, dtype=torch.int64), torch.zeros(n, 16, 16, dtype=torch.bool)
    for now, then in diffusion.reverse_times(steps):
        z = torch.where(kept, z, torch.randint(K, z.shape, generator=g))
        log_x = diffusion.logits(prior.unet, z, torch.full((n,), now)).log_softmax(1)
        drawn = draw_codes(log_x, torch.rand(z.shape, generator=g, dtype=torch.float64))
        z = torch.where(kept, z, drawn)
        rank = log_x.gather(1, z[:, None]).flatten(1).argsort(1, descending=True).argsort(1)
        kept = (rank < round(256 * diffusion.alpha_bar_t[then].item())).view(z.shape)
    return z

# %% [markdown]
# How good are samples? Two numbers. Their code length by the prior itself: *longer* than real
# pictures means that cells do not fit. And the perplexity of their codes, which is $K$ if all are
# used alike: *lower* than real pictures means that some are left out.
#
# **Claim.** Maps of a single step are longer than maps of equally likely codes, $256 \log 128$
# nats. Between 25 and 100 steps these eight maps cannot tell: their means differ by less than a
# standard error. (RESULTS.md has 64 maps, and no difference either.) The shortcut's maps are
# *shorter* than real ones, with fewer codes.

# %%
# figure: steps. The shortcut's streets are the cleanest, and they are not the data's law: the
# prior's favourites, with fewer codes.
def judged(z):
    p = torch.bincount(z.flatten(), minlength=K) / z.numel()
    nats = held_out_bound(diffusion, prior.unet, z, 0, training=True)     # at 5 of 100 t: a sketch
    return nats.mean().item(), torch.special.entr(p).sum().exp().item(), nats.std().item() / 8**0.5
ways = {f"{n} step(s)": diffusion.sample(prior.unet, samples.shape, n, g.manual_seed(2))
        for n in (1, 4, 25)} | {"100 steps": samples, "real": maps[:8], "25, surest": surest(8, 25)}
one, _, some, most, real, chosen = found = [judged(z) for z in ways.values()]
assert abs(some[0] - most[0]) < most[2] < one[0] - 256 * torch.tensor(K).log()
assert (chosen[0] < 0.95 * real[0]) & (chosen[1] < 0.95 * real[1])
for axis, name, (nats, codes, _) in zip(plt.subplots(2, 3, figsize=(11, 2.7))[1].flat, ways, found):
    axis.imshow(picture(*ways[name][:4]))
    axis.set(xticks=[], yticks=[], title=f"{name}: {nats:.0f} nats, perplexity {codes:.0f}")
small()

# %% [markdown]
# The blur of the other samples is honest: a small network does not know more. The shortcut hides it
# by never going where the network is unsure. A picture that looks better may come from a law that
# is worse, and the eye cannot tell. Here a sum over all maps could, and there a code length can.
#
# What to take along:
#
# - Noise on codes replaces them. Two numbers describe any stretch of it.
# - $\theta$ holds what a cell's own code tells, so $\hat x_0$ must not. The bound teaches that.
# - Within a step cells are drawn independently. More steps repair it, at a rate of one over their
#   number.
# - The bound is a code length, and $t = 1$ is a step like all others.
#
# Solutions of the exercises are in `5_discrete_diffusion.py` beside this notebook.
