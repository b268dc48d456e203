"""TransDiff: an autoregressive transformer tells a diffusion decoder what to draw (Zhen et al., 2025).

Idea      An AR transformer turns a class label into M "semantic features" c, in one pass (1-step AR). A diffusion
          transformer turns Gaussian noise into the latent of an image, looking at c by cross-attention. Both are
          trained together: the flow-matching loss flows back through c. Multi-Reference AR (MRAR) goes on from
          there: the AR transformer also reads earlier whole images of the class and predicts the features of the
          next one, so an image is made in four rounds, each looking at the results of the rounds before.
Shapes    B batch; N latent tokens, of z channels; M semantic features; D width; H heads; R images per sample
          (1-step: 1; MRAR: 4). Latents (B, z, h, w), scaled by the VAE; h w = N.
Time      t = 1 is noise, t = 0 the image: x_t = (1 - t) x + t eps, velocity v = eps - x. The network sees 1000 t.
Where     Eq. 4, 5 and 8, the loss: TransDiff.forward          Eq. 9, 11, the input: ARTransformer.start, reference
          Eq. 6, 10, 12, the features: ARTransformer           Eq. 3, 7, the velocity: Decoder
          Eq. 13 to 15, feature diversity: diversity           Eq. 16 to 18, the sampler: TransDiff.denoise
          Alg. 1, 1-step AR, Alg. 2, MRAR: TransDiff.sample; as plainly as possible: TransDiff.sample_plainly
Differs   Where the paper is silent or its released code differs, a Config field has both: `times`, `feed`,
          `diversity_weight`. The table "Where paper and code differ" in the README has all points.
"""
import dataclasses
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import TINY_VAE, Recipe, Stage, UserError, VAEConfig


@dataclass(frozen=True)
class Config:
    """Everything that fixes the shapes, the loss and the sampler's defaults."""
    image_size: int = 256           # pixels
    classes: int = 1000             # label `classes` means "no label"
    dim: int = 768                  # D, of both transformers
    heads: int = 12                 # H
    ar_depth: int = 24              # blocks of the AR transformer
    depth: int = 12                 # blocks of the diffusion decoder
    class_tokens: int = 64          # copies of the class embedding at the head of the AR sequence
    features: int = 256             # M semantic features; MRAR: all images' together
    images: int = 4                 # R of MRAR: the mask block and R - 1 references
    mrar: bool = False              # False: 1-step AR
    feed: str = "latents"           # MRAR: earlier rounds come back as image "latents" (Eq. 11, released) or as
                                    # their semantic "features" (Alg. 2: one decoding, of the last round, is enough)
    dropout: float = 0.1            # in attention, behind attention and in the MLP, 0 .. 1
    label_drop: float = 0.1         # share of training samples that lose their label, 0 .. 1
    repeat: int = 4                 # diffusion batch multiplier: draws of (t, eps) per image and AR pass
    times: str = "logit-normal"     # t in training: "logit-normal" on the grid k/1000 (released) or "uniform" (Eq. 5)
    diversity_weight: float = 0.0   # weight of the diversity term; released code: 0.001, but switched off
    mirror: bool = True             # mirror half of the training images
    only_decoder: bool = False      # 512 px: fine-tune the decoder under a frozen AR transformer
    cfg: float = 1.3                # sampler defaults: guidance scale,
    steps: int = 100                # steps of each round,
    drift_scale: float = 0.87       # s1 and
    noise_scale: float = 0.91       # s2 of Eq. 18,
    solver: str = "maruyama"        # Euler-"maruyama" (Eq. 18, stochastic) or plain "euler" (Eq. 3)
    vae: VAEConfig = VAEConfig()

    def __post_init__(self):
        for name, values in (("times", ("logit-normal", "uniform")), ("feed", ("latents", "features")),
                             ("solver", ("maruyama", "euler"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(values)}")
        if self.image_size % self.vae.factor:
            raise ValueError(f"image_size {self.image_size} is not divisible by the VAE's {self.vae.factor}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by {self.heads} heads")
        if min(self.images, self.features, self.heads) < 1:
            raise ValueError("images, features and heads are 1 or more")
        block = self.features / self.images
        if self.mrar and self.latent_size % math.sqrt(block):
            raise ValueError(f"{self.features} features for {self.images} images: the {block:g} tokens of each are no"
                             f" square grid that divides the {self.latent_size} x {self.latent_size} latent")

    @property
    def latent_size(self):
        """Side of the latent; its square is N."""
        return self.image_size // self.vae.factor

    @property
    def block(self):
        """Features of one image: the block of the block-causal mask."""
        return self.features // self.images if self.mrar else self.features

    @property
    def patch(self):
        """f, the side of a reference's patches (the 1-step model has a projection for them, too, but no use for it)."""
        return self.latent_size // math.isqrt(self.block) if self.mrar else 1


BASE = Config()
PRESETS = {
    "tiny": Config(image_size=32, classes=10, dim=128, heads=4, ar_depth=2, depth=4, class_tokens=16, features=64,
                   repeat=2, dropout=0.0, mirror=False, vae=TINY_VAE, cfg=2.0, steps=25, drift_scale=1.0,
                   noise_scale=1.0),
    "b": BASE,
    "l": dataclasses.replace(BASE, dim=1024, heads=16, ar_depth=32, depth=16, drift_scale=0.89, noise_scale=0.95),
    "h": dataclasses.replace(BASE, dim=1280, heads=16, ar_depth=40, depth=20, cfg=1.23, noise_scale=0.93),
    "l-512": dataclasses.replace(BASE, dim=1024, heads=16, ar_depth=32, depth=16, image_size=512, only_decoder=True,
                                 noise_scale=0.87)}
PUBLISHED = {"b": "290M", "l": "683M", "h": "1.3B", "l-512": "683M"}
MRAR_SAMPLING = {768: (1.3, 0.87, 0.91), 1024: (1.3, 0.925, 0.95), 1280: (1.28, 0.87, 0.91)}  # cfg, s1, s2 by width


# --- Layers -----------------------------------------------------------------------------------------------------------

class MLP(nn.Sequential):
    """D -> 4D -> D with exact GELU."""

    def __init__(self, dim, dropout):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim),
                         nn.Dropout(dropout))


class SelfAttention(nn.Module):
    """Multi-head self-attention that is causal over blocks: everything sees its own block and all blocks before it.

    No mask is needed: each block of queries meets the keys up to its own end. `edges` are the ends of the blocks in
    the whole sequence (one edge: full attention), `past` the keys and values of the positions before x.
    """

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, edges, past=None):                                                # (B, n, D)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # (B, H, n, D/H) each
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)                  # (B, H, past + n, D/H)
        begin, out = k.shape[2] - q.shape[2], []
        for start, end in zip([begin, *edges], edges):
            out.append(F.scaled_dot_product_attention(q[:, :, start - begin:end - begin], k[:, :, :end], v[:, :, :end],
                                                      dropout_p=self.dropout * self.training))
        x = torch.cat(out, 2).transpose(1, 2).flatten(2)                                   # (B, n, D)
        return F.dropout(self.proj(x), self.dropout, self.training), (k, v)


class CrossAttention(nn.Module):
    """Multi-head attention of latent tokens to the condition; its keys and values are made once per condition."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x):                                                                    # (B, n, D)
        """One slice of D per head: (B, H, n, D/H)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, q, k, v):                                                            # (B, H, n, D/H)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


# --- The AR transformer: class (and references) to semantic features --------------------------------------------------

class ARBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), SelfAttention(dim, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, dropout)

    def forward(self, x, edges, past=None):
        h, past = self.attn(self.norm1(x), edges, past)
        x = x + h
        return x + self.mlp(self.norm2(x)), past


class ARTransformer(nn.Module):
    """c = AR Transformer(input), Eq. 6: [class | mask] in 1-step AR, [class | mask | image_0 | image_1 ...] in MRAR.

    The features of image r stand at the positions of image r - 1, those of the first at the mask. 1-step AR attends
    everywhere; MRAR is causal over blocks [class], [mask], [image_0], ..., bidirectional inside.
    """

    def __init__(self, config):
        super().__init__()
        c, D = config, config.dim
        self.config = config
        self.class_embed = nn.Embedding(c.classes, D)
        self.null = nn.Parameter(torch.empty(1, D))                                        # instead of a dropped label
        self.mask = nn.Parameter(torch.empty(1, c.block if c.mrar else 1, D))
        self.ref_proj = nn.Linear(c.vae.channels * c.patch**2, D)
        self.pos = nn.Parameter(torch.empty(1, c.class_tokens + c.features, D))
        self.norm_in = nn.LayerNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList(ARBlock(D, c.heads, c.dropout) for _ in range(c.ar_depth))
        self.norm_out = nn.LayerNorm(D, eps=1e-6)
        self.feature_pos = nn.Parameter(torch.empty(1, c.features, D))                     # for the decoder
        if not c.mrar:
            self.ref_proj.requires_grad_(False)  # part of the published 1-step weights, but never used there

    def start(self, labels, drop=None):
        """[class tokens | mask tokens] (B, class_tokens + block, D), Eq. 9. Label `classes`, or drop: no label."""
        c = self.config
        none = labels == c.classes if drop is None else drop | (labels == c.classes)
        e = torch.where(none[:, None], self.null, self.class_embed(labels.clamp(max=c.classes - 1)))
        mask = self.mask.expand(len(e), c.block, -1)
        return torch.cat([e[:, None].expand(-1, c.class_tokens, -1), mask], 1)

    def reference(self, latents):
        """An earlier image (B, z, h, w) as `block` tokens (B, block, D), Eq. 11."""
        return self.ref_proj(F.pixel_unshuffle(latents, self.config.patch).flatten(2).transpose(1, 2))

    def forward(self, x, past=None):
        """Features (B, n, D) of the next n tokens, and the keys and values of all tokens so far, per block.

        Without a past the sequence begins with the class tokens, which have no features of their own.
        """
        c = self.config
        begin = past[0][0].shape[2] if past else 0
        end = begin + x.shape[1]
        edges = range(c.class_tokens, end + 1, c.block) if c.mrar else [end]
        edges = [edge for edge in edges if edge > begin]
        x = self.norm_in(x + self.pos[:, begin:end])
        new = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, edges, past[i] if past else None)                             # (B, n, D)
            new.append(kv)
        return self.norm_out(x)[:, 0 if past else c.class_tokens:], new


def diversity(h):
    """How alike the features of a sample are: mean |cosine| of two different ones (Eq. 13 to 15), (B,) of (B, M, D).

    The sum of Eq. 15 grows with M^2; the paper's figures (0.39 to 0.64) are averages, as here. Lower is more diverse.
    """
    a = F.normalize(h.float(), dim=-1)
    S = (a @ a.transpose(1, 2)).abs()                                                      # Eq. 14
    M = S.shape[1]
    return (S.sum((1, 2)) - M) / (M * M - M)                                               # Eq. 15, as a mean


def diversity_term(h):
    """The training term of the released code: the mean signed cosine of all pairs, a feature with itself included.

    That is the squared length of the mean unit vector, so no M x M matrix is needed. A scalar in 0 .. 1.
    """
    return F.normalize(h.float(), dim=-1).mean(1).square().sum(-1).mean()


# --- The diffusion decoder: noise and features to a latent ------------------------------------------------------------

class DecoderBlock(nn.Module):
    """Self-attention and MLP modulated by time (AdaLN), with cross-attention to the condition between them."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, 6, dim))                                  # added to the shared AdaLN
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), SelfAttention(dim, heads, dropout)
        self.norm2, self.cross = nn.LayerNorm(dim, eps=1e-6), CrossAttention(dim, heads, dropout)
        self.norm3, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, dropout)

    def forward(self, x, modulation, k, v):                                                # (B, N, D), (B or 1, 6, D)
        shift1, scale1, gate1, shift3, scale3, gate3 = (self.table + modulation).split(1, 1)  # (B or 1, 1, D) each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, [x.shape[1]])[0]
        q = self.cross.split(self.cross.wq(self.norm2(x)))                                 # (B, H, N, D/H)
        if len(k) > len(x):  # guidance: both halves of the batch are equal up to here, so they were computed once
            x, q = x.repeat(len(k) // len(x), 1, 1), q.repeat(len(k) // len(q), 1, 1, 1)
        x = x + self.cross(q, k, v)
        return x + gate3 * self.mlp(self.norm3(x) * (1 + scale3) + shift3)


class Decoder(nn.Module):
    """The velocity v = psi(x_t, t, c) of Eq. 3: a DiT with cross-attention.

    What depends on c alone (keys_values) and on t alone (modulation) is separate, because a sampler needs the first
    once per image and the second for all steps at once.
    """

    def __init__(self, config):
        super().__init__()
        D = config.dim
        self.input = nn.Linear(config.vae.channels, D)
        self.pos = nn.Parameter(torch.empty(1, config.latent_size**2, D))
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.modulate = nn.Linear(D, 6 * D)
        self.condition = nn.Linear(D, D)
        self.blocks = nn.ModuleList(DecoderBlock(D, config.heads, config.dropout) for _ in range(config.depth))
        self.table = nn.Parameter(torch.empty(1, 2, D))
        self.output = nn.Linear(D, config.vae.channels)

    def keys_values(self, c):
        """Keys and values (B, H, M, D/H) of each block for features c (B, M, D), any M."""
        c = self.condition(c)
        return [(b.cross.split(b.cross.wk(c)), b.cross.split(b.cross.wv(c))) for b in self.blocks]

    def modulation(self, t):
        """Times (B,) in 0 .. 1 as an embedding (B, D) and the AdaLN vectors (B, 6, D) that all blocks share."""
        angles = 1000 * t[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        return embedding, self.modulate(F.silu(embedding)).unflatten(1, (6, -1))

    def forward(self, x, modulation, keys_values):
        """Velocity of tokens x (B, N, z). The condition may have a multiple of B rows: then so has the result."""
        embedding, shared = modulation
        x = self.input(x) + self.pos                                                       # (B, N, D)
        for block, (k, v) in zip(self.blocks, keys_values):
            x = block(x, shared, k, v)
        shift, scale = (self.table + embedding[:, None]).split(1, 1)
        return self.output(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).float()


# --- The whole model --------------------------------------------------------------------------------------------------

class TransDiff(nn.Module):
    """AR transformer and diffusion decoder, trained together."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ar, self.decoder = ARTransformer(config), Decoder(config)
        self.initialise()
        if config.only_decoder:
            self.ar.requires_grad_(False)

    @torch.no_grad()
    def initialise(self):
        """Released initialisation: the velocity starts at zero, the AdaLN gates do not."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        ar, decoder = self.ar, self.decoder
        for table in (ar.class_embed.weight, ar.null, ar.mask, ar.pos, ar.feature_pos, decoder.pos):
            table.normal_(std=0.02)
        for table in (decoder.table, *(block.table for block in decoder.blocks)):
            table.normal_(std=self.config.dim**-0.5)
        decoder.output.weight.zero_()

    def semantic(self, labels, references, drop=None):
        """Features h (B, M', D) of labels (B,) and the images so far, a list of latents (B, z, h, w); Eq. 10, 12.

        M' covers one image more than there are references. The decoder's condition is h + ar.feature_pos.
        """
        x = self.ar.start(labels, drop)
        if self.config.feed == "latents":
            return self.ar(torch.cat([x, *map(self.ar.reference, references)], 1))[0]       # Eq. 11
        h, past = self.ar(x)
        for _ in references:                                                                # Alg. 2, line 8
            new, past = self.ar(h[:, -self.config.block:], past)
            h = torch.cat([h, new], 1)
        return h

    def draw_times(self, n, device):
        """t in 0 .. 1, (n,): uniform (Eq. 5), or logit-normal and floored to k/1000 (released)."""
        if self.config.times == "uniform":
            return torch.rand(n, device=device)
        return logit_normal(torch.randn(n, device=device))

    def forward(self, latents, labels, *, drop=None, eps=None, t=None):
        """Training loss (Eq. 8): flow matching for every image of the sample, on the features it may see.

        latents (B, z, h, w), in MRAR (B, R, z, h, w): images of one class, in the order of their rounds; labels (B,).
        Drawn unless given: drop (B,) bool, eps (R, m B, N, z), t (R, m B), with m = config.repeat copies of the
        batch, one whole batch behind the other.
        """
        c, m = self.config, self.config.repeat
        images = latents.unbind(1) if c.mrar else [latents]
        if drop is None:
            drop = torch.rand(len(labels), device=labels.device) < c.label_drop * self.training
        h = self.semantic(labels, images[:-1], drop)                                        # (B, M, D)
        keys_values = self.decoder.keys_values(h + self.ar.feature_pos)                     # once for all m copies
        out = {}
        for r, image in enumerate(images):
            x = image.flatten(2).transpose(1, 2).repeat(m, 1, 1)                            # (m B, N, z)
            eps_r = torch.randn_like(x) if eps is None else eps[r]
            t_r = self.draw_times(len(x), x.device) if t is None else t[r]
            x_t = torch.lerp(x, eps_r, t_r[:, None, None])                                  # Eq. 4
            seen = c.block * (r + 1)
            v = self.decoder(x_t, self.decoder.modulation(t_r),
                             [(k[:, :, :seen].repeat(m, 1, 1, 1), w[:, :, :seen].repeat(m, 1, 1, 1))
                              for k, w in keys_values])
            out[f"flow_{r}"] = F.mse_loss(v, eps_r - x)                                     # Eq. 5
        loss = torch.stack(list(out.values())).mean()                                       # Eq. 8
        if c.diversity_weight:
            out["diversity"] = diversity_term(h)
            loss = loss + c.diversity_weight * out["diversity"]
        return {"loss": loss, **(out if len(out) > 1 else {})}

    @torch.no_grad()
    def sample(self, labels, noise, *, cfg=None, steps=None, drift_scale=None, noise_scale=None, solver=None,
               rounds=None, interval=(0.0, 1.0), fuse=None, features=None, on_step=None):
        """Scaled latents (B, z, h, w) for labels (B,), from common.Noise; Alg. 1, and MRAR in `rounds` rounds.

        What is not given comes from the config. cfg is the guidance scale: 1 is off and costs half, 0 unconditional;
        a pair runs linearly over the steps of a round, a list has one entry for each round. It acts while t is in
        `interval`. fuse: labels (B,) of a second class, whose features take every other place (Fig. 5). features: use
        only K of the M (Fig. 1), evenly spread. on_step(round, step, x_0): the current estimate of the latents.
        """
        c, B = self.config, len(labels)
        cfg, steps = c.cfg if cfg is None else cfg, steps or c.steps
        most = c.images if c.mrar else 1
        rounds = rounds or most
        if rounds > most:
            raise UserError(f"this model was trained for {most} rounds, not {rounds}")
        if isinstance(cfg, list) and len(cfg) != rounds:
            raise UserError(f"{len(cfg)} guidance scales for {rounds} rounds")
        if features and not rounds <= features <= c.features:
            raise UserError(f"this model has {c.features} features, at least one for each of {rounds} rounds is needed")
        options = (solver or c.solver, c.drift_scale if drift_scale is None else drift_scale,
                   c.noise_scale if noise_scale is None else noise_scale)
        ts = time_grid(steps, options[0], labels.device)
        acts = [interval[0] <= t <= interval[1] for t in ts[:-1].tolist()]
        scales = [[g if act else 1.0 for g, act in zip(common.guidance_scales(g, steps), acts, strict=True)]
                  for g in (cfg if isinstance(cfg, list) else [cfg] * rounds)]

        # Rows of the AR transformer: all labels, then those to fuse with, then "no label". What comes before the
        # first reference depends on the label alone, so it is computed once for each distinct one.
        sets = [labels] + [fuse] * (fuse is not None) + [torch.full_like(labels, c.classes)] * (
            any(g != 1 for scale in scales for g in scale))
        distinct, row = torch.cat(sets).unique(return_inverse=True)
        h, past = self.ar(self.ar.start(distinct))
        h, past = h[row], [(k[row], v[row]) for k, v in past] if rounds > 1 else None
        keep = torch.arange(c.features, device=labels.device)
        keep = keep[(keep * (features or c.features)) % c.features < (features or c.features)]

        start, image = noise.normal((c.latent_size**2, c.vae.channels)), None               # one start for all rounds
        for r in range(rounds):
            if r > 0:                                                                       # one more block, cached
                reference = h[:, -c.block:] if c.feed == "features" else self.ar.reference(image)
                new, past = self.ar(reference.repeat(len(h) // len(reference), 1, 1), past)
                h = torch.cat([h, new], 1)
            if c.feed == "features" and r < rounds - 1:
                continue                                                                    # Alg. 2 decodes once
            z = h + self.ar.feature_pos[:, :h.shape[1]]
            if fuse is not None:
                odd = torch.arange(z.shape[1], device=z.device)[:, None] % 2 == 1
                z = torch.cat([torch.where(odd, z[B:2 * B], z[:B]), z[2 * B:]])
            keys_values = self.decoder.keys_values(z[:, keep[keep < z.shape[1]]])           # once for all steps
            x = self.denoise(start, ts, keys_values, scales[r], noise, *options,
                             on_step and (lambda i, x0: on_step(r, i, self.latents(x0))))
            image = self.latents(x)
        self.last_features = h[:B]                                                          # for `diversity`
        return image

    def latents(self, x):
        """Tokens (B, N, z) as latents (B, z, h, w)."""
        return x.transpose(1, 2).unflatten(2, (self.config.latent_size, -1))

    def denoise(self, x, ts, keys_values, scales, noise, solver, drift_scale, noise_scale, on_step=None):
        """Tokens (B, N, z) from noise at ts[0] to the image at ts[-1], by Eq. 18 ("maruyama") or Eq. 3 ("euler").

        keys_values: B conditional rows, then B unconditional ones if any of the guidance `scales` is not 1.
        """
        embedding, shared = self.decoder.modulation(ts[:-1])                                # of all steps in one call
        plain = [(k[:len(x)], v[:len(x)]) for k, v in keys_values]
        for i, g in enumerate(scales):
            t, dt = ts[i], ts[i + 1] - ts[i]                                                # dt < 0
            v = self.decoder(x, (embedding[i:i + 1], shared[i:i + 1]), plain if g == 1 else keys_values)
            if g != 1:
                v, u = v.chunk(2)
                v = u + g * (v - u)
            if on_step:
                on_step(i, x - t * v)
            if solver == "euler":
                x = x + v * dt                                                              # Eq. 3
                continue
            # Eq. 16 with sigma^2 = 2 t, and the score of a straight path, -(x + (1 - t) v) / t: v - sigma^2 / 2 score
            drift = x + (2 - t) * v
            if i < len(scales) - 1:
                x = x + drift_scale * drift * dt                                            # Eq. 18
                x = x + noise_scale * (2 * t * -dt).sqrt() * noise.normal(x.shape[1:])
            else:
                x = x + drift * dt                                                          # no scale, no noise
        return x

    @torch.no_grad()
    def sample_plainly(self, labels, noise, *, cfg, steps, drift_scale, noise_scale):
        """The same latents as `sample`, as plainly as possible: nothing is kept from one network call to the next."""
        null = torch.full_like(labels, self.config.classes)
        ts = time_grid(steps, "maruyama", labels.device)
        start = noise.normal((self.config.latent_size**2, self.config.vae.channels))
        references = []
        for _ in range(self.config.images if self.config.mrar else 1):
            c = self.semantic(labels, references)
            c = c + self.ar.feature_pos[:, :c.shape[1]]
            u = self.semantic(null, references)
            u = u + self.ar.feature_pos[:, :u.shape[1]]
            both = torch.cat([c, u])
            x = start
            for i in range(steps):
                t, dt = ts[i], ts[i + 1] - ts[i]
                v = self.decoder(torch.cat([x, x]), self.decoder.modulation(t.expand(len(both))),
                                 self.decoder.keys_values(both))
                score = -(torch.cat([x, x]) + (1 - t) * v) / t
                d_c, d_u = (v - t * score).chunk(2)                                         # Eq. 16, sigma^2 = 2 t
                d = d_u + cfg * (d_c - d_u)
                if i < steps - 1:
                    x = x + drift_scale * d * dt + noise_scale * (2 * t * -dt).sqrt() * noise.normal(x.shape[1:])
                else:
                    x = x + d * dt
            references.append(self.latents(x))
        return references[-1]


def compile_steps(model, vae):
    """Compiles what sampling repeats: the decoder."""
    model.decoder.forward = common.compiled(model.decoder.forward)


def logit_normal(normal):
    """Times k/1000, k = 0 .. 999, from standard normal values: the sigmoid, floored."""
    return (1000 * torch.sigmoid(normal).float()).floor() / 1000


def time_grid(steps, solver, device=None):
    """Times (steps + 1,) from 1 to 0. Euler-Maruyama stops at 0.04, before the score grows, and takes one last step."""
    if solver == "euler":
        return torch.linspace(1, 0, steps + 1, device=device)
    return torch.cat([torch.linspace(1, 0.04, steps), torch.zeros(1)]).to(device)


# --- Stages: what is trained, in order, and how -----------------------------------------------------------------------

def generate(model, vae, labels, noise, *, on_step=None, **options):
    """Images (B, 3, h, w) in -1 .. 1 and a dict of facts about them. options: see TransDiff.sample.

    on_step(images): the current estimate at each step, decoded.
    """
    watch = on_step and (lambda r, i, x0: on_step(vae.decode(x0)))
    images = vae.decode(model.sample(labels, noise, on_step=watch, **options)).clamp(-1, 1)
    return images, {"feature_similarity": diversity(model.last_features).mean().item()}


check = common.same_kind_of_vae


def decays(name, parameter):
    """Weight decay: matrices and tables of the AR transformer only, as released."""
    return name.startswith("ar.") and parameter.ndim > 1


def carry(name, old, shape):
    """A weight of another shape for this model: `old` repeated or resampled, or None to begin afresh.

    How the authors carried these over was never published. Mask token: repeated. Decoder positions: their grid,
    resampled bicubically. The projection of the references and class tables of other sizes begin afresh.
    """
    if name == "ar.mask" and old.shape[1] == 1:
        return old.expand(shape).clone()
    if name == "decoder.pos" and old.shape[2] == shape[2]:
        side, new = math.isqrt(old.shape[1]), math.isqrt(shape[1])
        grid = old.transpose(1, 2).unflatten(2, (side, side))                               # (1, D, side, side)
        return F.interpolate(grid, (new, new), mode="bicubic").flatten(2).transpose(1, 2)
    return None


VAE = common.vae_stage(lambda c: common.random_crop_mirror if c.mirror else common.random_crop)
AR1 = Stage("1step", build=TransDiff, first="vae", codes=lambda vae, moments: vae.sample(moments),
            recipes={"tiny": Recipe(lr=2e-3, batch=32, epochs=1, warmup=0.03, decay=0.5, clip=1.0, ema=0.999),
                     **dict.fromkeys("blh", Recipe(lr=8e-4, batch=2048, epochs=800, warmup=100 / 800)),
                     "l-512": Recipe(lr=1e-4, batch=2048, epochs=150, warmup=10 / 150, ema=0.999)},
            augment=VAE.augment, views=lambda c: common.centre_and_mirror if c.mirror else common.centre_only,
            carry=carry, decays=decays, trains=lambda c, name: name.startswith("decoder.") or not c.only_decoder,
            preview=lambda model, vae, images, labels, noise: generate(model, vae, labels, noise)[0])
MRAR = dataclasses.replace(
    AR1, name="mrar", start="1step", group=lambda c: c.images,
    config=lambda c: dataclasses.replace(c, mrar=True, repeat=2, **dict(zip(
        ("cfg", "drift_scale", "noise_scale"), MRAR_SAMPLING.get(c.dim, (c.cfg, c.drift_scale, c.noise_scale))))),
    recipes={"tiny": Recipe(lr=1e-3, batch=8, epochs=0.6, warmup=0.03, decay=0.5, clip=1.0, ema=0.999),
             **dict.fromkeys("blh", Recipe(lr=5e-5, batch=2048, epochs=40, warmup=10 / 40))})
STAGES = [VAE, AR1, MRAR]


# --- Released checkpoints ---------------------------------------------------------------------------------------------

RELEASED = [  # released name -> ours
    (r"^fake_latent", "ar.null"), (r"^mask_token", "ar.mask"), (r"^encoder_pos_embed_learned", "ar.pos"),
    (r"^diffusion_pos_embed_learned", "ar.feature_pos"), (r"^class_emb\.", "ar.class_embed."),
    (r"^z_proj_ln\.", "ar.norm_in."), (r"^z_proj\.", "ar.ref_proj."), (r"^encoder_blocks\.", "ar.blocks."),
    (r"^encoder_norm\.", "ar.norm_out."), (r"^diffdecoder\.net\.", "decoder."),
    (r"diffusion_pos_embed_learned", "pos"), (r"time_embed\.time_embedder\.linear_1", "time.0"),
    (r"time_embed\.time_embedder\.linear_2", "time.2"), (r"time_embed\.time_proj", "modulate"),
    (r"cond_embed", "condition"), (r"input_proj", "input"), (r"res_blocks", "blocks"), (r"scale_shift_table", "table"),
    (r"attn1", "attn"), (r"attn2", "cross"), (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"),
    (r"final_layer\.table", "table"), (r"final_layer\.linear", "output")]


def renamed(state):
    """A released state dict under this file's names, in float32."""
    for old, new in RELEASED:
        state = {re.sub(old, new, k): v for k, v in state.items()}
    return {k: v.float() for k, v in state.items()}


def load_official(path, **overrides):
    """The model in a released checkpoint, its EMA weights if it has them; ready to sample, config from the shapes.

    overrides: Config fields that shapes do not tell, such as heads (derived for the published widths). Strict: raises
    UserError for an entry that is missing, extra or misshapen, and for a file that is no TransDiff checkpoint.
    """
    content = common.read(path)
    with common.foreign(path, "not a TransDiff checkpoint"):
        return from_released(content.get("model_ema") or content.get("model") or content, path, **overrides)


def from_released(state, path="the checkpoint", **overrides):
    """The model of a released state dict (see load_official)."""
    state = renamed({k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    try:
        D, features, tokens = state["ar.null"].shape[1], state["ar.feature_pos"].shape[1], state["decoder.pos"].shape[1]
        mrar = state["ar.mask"].shape[1] > 1
        heads = {768: 12, 1024: 16, 1280: 16}.get(D, max(D // 64, 1))
        sampling = MRAR_SAMPLING.get(D) if mrar else next(
            ((p.cfg, p.drift_scale, p.noise_scale) for name, p in PRESETS.items()
             if p.dim == D and p.latent_size**2 == tokens), None)
        vae = VAEConfig(channels=state["decoder.input.weight"].shape[1])
        depth = {part: 1 + max(int(m[1]) for m in (re.match(rf"{part}\.blocks\.(\d+)", k) for k in state) if m)
                 for part in ("ar", "decoder")}
        config = dataclasses.replace(
            Config(), dim=D, heads=heads, ar_depth=depth["ar"], depth=depth["decoder"], features=features, mrar=mrar,
            images=features // state["ar.mask"].shape[1] if mrar else 4, vae=vae,
            class_tokens=state["ar.pos"].shape[1] - features, classes=len(state["ar.class_embed.weight"]),
            image_size=math.isqrt(tokens) * vae.factor,
            **dict(zip(("cfg", "drift_scale", "noise_scale"), sampling or ())))
        model = TransDiff(dataclasses.replace(config, **overrides))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a TransDiff checkpoint ({error})") from None
    common.load_strict(model, state, path)
    return model.eval()


def main():
    """Prints the presets with their parameter counts, and walks one batch through the tiny one."""
    print("preset    D  heads  AR blocks  decoder blocks  1-step parameters  MRAR parameters  published")
    for name, c in PRESETS.items():
        counts = []
        for config in (c, dataclasses.replace(c, mrar=True)):
            with torch.device("meta"):
                counts.append(sum(p.numel() for p in TransDiff(config).parameters()))
        print(f"{name:6s} {c.dim:4d} {c.heads:6d} {c.ar_depth:10d} {c.depth:15d} {counts[0]:18,d} {counts[1]:16,d}"
              f"  {PUBLISHED.get(name, '-'):>9s}")
    config = PRESETS["tiny"]
    for title, c, shape in (("1-step AR", config, (2,)),
                            ("MRAR", dataclasses.replace(config, mrar=True), (2, config.images))):
        latents = torch.randn(*shape, c.vae.channels, c.latent_size, c.latent_size)
        print(f"\n{title}: latents {tuple(latents.shape)} and labels (2,) through TransDiff.forward")
        loss = common.walk(TransDiff(c), latents, torch.tensor([0, 1]))
        print("  loss:", {k: round(v.item(), 3) for k, v in loss.items()})


if __name__ == "__main__":
    common.command(main)
