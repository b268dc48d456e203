"""TransDiff: an autoregressive transformer tells a diffusion decoder what to draw (Zhen et al.,
2025).

Idea      An AR transformer turns a class label into M "semantic features" c in one pass (1-step
          AR). A diffusion transformer turns Gaussian noise into the latent of an image and reads c
          by cross-attention. Both are trained together: the flow-matching loss reaches the AR
          transformer through c. Multi-Reference AR (MRAR) continues from there: the AR transformer
          also reads earlier whole images of the class and predicts the features of the next one,
          so an image takes four rounds. Each makes a whole image; the last one is the result.
Shapes    B batch, N latent tokens of z channels, M semantic features, D width, R images per sample
          (1-step: 1; MRAR: 4). Latents (B, z, h, w), scaled by the VAE; h w = N.
Time      t = 1 is noise, t = 0 the image: x_t = (1 - t) x + t eps, velocity v = eps - x. The
          network is given 1000 t.
Where     Eq. 4, 5, 8, the loss: TransDiff.forward    Eq. 9, 11, the input: ARTransformer
          Eq. 6, features: TransDiff.semantic         Eq. 3, the velocity: Decoder
          Eq. 7, Alg. 1 and 2: TransDiff.sample       Eq. 16 to 18, a step: TransDiff.denoise
          Eq. 13 to 15: similarity. Eq. 10 and 12 are a round of MRAR: Eq. 6, then Eq. 7.
          Eq. 1 and 2 define autoregressive models in general; nothing here computes them.
Differs   Where the paper is silent or its released code differs, a Config field selects one:
          `times`, `feed`. docs/paper_and_code.md lists all points.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import (TINY_VAE, LayerNorm, Recipe, Stage, UserError, VAEConfig, merge_heads,
                    plain_norm, split_heads)


@dataclass(frozen=True)
class Config:
    """Everything that fixes the shapes, the loss and the sampler's defaults."""
    image_size: int = 256               # pixels
    classes: int = 1000                 # label `classes` means "no label"
    class_names: tuple[str, ...] = ()   # from the data
    dim: int = 768                      # D, of both transformers
    heads: int = 12
    ar_depth: int = 24                  # blocks of the AR transformer; 0: the decoder alone
    depth: int = 12                     # blocks of the diffusion decoder
    class_tokens: int = 64              # copies of the class embedding that begin the AR sequence
    features: int = 256                 # M semantic features; MRAR: of all images together
    images: int = 4                     # R of MRAR: images of a sample, rounds of sampling
    mrar: bool = False                  # False: 1-step AR
    references: str = "images"          # of MRAR: other "images" of the class, or "scales": the
                                        # same image at growing resolution (Table 4's baseline)
    feed: str = "latents"               # MRAR feeds back "latents" (Eq. 11, released) or
                                        # "features" (Alg. 2: only the last round is decoded)
    dropout: float = 0.1                # in attention, after attention and in the MLP, 0 .. 1
    label_drop: float = 0.1             # share of training samples that lose their label, 0 .. 1
    repeat: int = 4                     # draws of (t, eps) per image and AR pass
    times: str = "logit-normal"         # t in training: "logit-normal", on the grid k/1000
                                        # (released), or "uniform" (Eq. 5)
    time_mean: float = 0.0              # mean of the logit-normal times' logits: less noise below 0
    mirror: bool = True                 # mirror half of the training images
    only_decoder: bool = False          # 512 px: train the decoder under a frozen AR transformer
    cfg: float = 1.3                    # sampler defaults: guidance scale,
    steps: int = 100                    # steps of each round,
    drift_scale: float = 0.87           # s1 and
    noise_scale: float = 0.91           # s2 of Eq. 18,
    solver: str = "maruyama"            # Euler-"maruyama" (Eq. 18, stochastic) or "euler" (Eq. 3)
    vae: VAEConfig = VAEConfig()

    def __post_init__(self):
        side = math.isqrt(self.features_per_image)
        common.check(
            self,
            {"steps must be 1 or more": self.steps > 0,
             f"image_size must be divisible by {self.vae.factor}":
                 self.image_size % self.vae.factor == 0,
             "dim must be divisible by heads": self.dim % self.heads == 0,
             "ar_depth must be 0 or more": self.ar_depth >= 0,
             "the features of an image must be a square grid that divides the latent":
                 not self.mrar
                 or self.features == self.images * side**2 and self.latent_size % side == 0},
            times=("logit-normal", "uniform"), feed=("latents", "features"),
            references=("images", "scales"), solver=("maruyama", "euler"))

    @property
    def latent_size(self):
        """Side of the latent; its square is N."""
        return self.image_size // self.vae.factor

    @property
    def rounds(self):
        """R: images of a training sample, and rounds of sampling."""
        return self.images if self.mrar else 1

    @property
    def images_per_sample(self):
        """How many images of the data make one training sample."""
        return self.rounds if self.references == "images" else 1

    @property
    def features_per_image(self):
        """Features of one image: the block of the block-causal attention."""
        return self.features // self.rounds

    @property
    def patch(self):
        """Side of a reference's patches, in latent pixels."""
        return self.latent_size // math.isqrt(self.features_per_image) if self.mrar else 1


LARGE = Config(dim=1024, heads=16, ar_depth=32, depth=16, drift_scale=0.89, noise_scale=0.95)
PRESETS = {
    "tiny": Config(image_size=32, classes=10, dim=128, heads=4, ar_depth=2, depth=4,
                   class_tokens=16, features=64, repeat=2, dropout=0.0, mirror=False, vae=TINY_VAE,
                   time_mean=-0.5, cfg=2.5, steps=25, drift_scale=1.0, noise_scale=1.0,
                   solver="euler"),
    "b": Config(),
    "l": LARGE,
    "h": Config(dim=1280, heads=16, ar_depth=40, depth=20, cfg=1.23, noise_scale=0.93),
    "l-512": replace(LARGE, image_size=512, only_decoder=True, drift_scale=0.87, noise_scale=0.87)}
PUBLISHED = {"b": "290M", "l": "683M", "h": "1.3B", "l-512": "683M"}
MRAR_SAMPLING = {  # width -> where published MRAR models differ from their 1-step models
    1024: dict(drift_scale=0.925),
    1280: dict(cfg=1.28, noise_scale=0.91)}


# --- Layers ---------------------------------------------------------------------------------------

def table(rows, dim):
    """Return learned vectors (1, rows, dim), which TransDiff.initialise fills."""
    return nn.Parameter(torch.empty(1, rows, dim))


def mlp(dim, dropout):
    """Return D -> 4D -> D with exact GELU."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout),
                         nn.Linear(4 * dim, dim), nn.Dropout(dropout))


def attend(q, k, v, dropout):
    """Return the attention (B, n, D) of q, k and v (B, heads, n, D/heads)."""
    dropout_p = dropout.p if dropout.training else 0.0
    return merge_heads(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p))


class SelfAttention(nn.Module):
    """Multi-head self-attention that is causal over blocks and full inside them.

    No attention mask is needed: each block of queries is given the keys up to its own end. `ends`
    are the ends of the blocks; a single end is full attention.
    """

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, ends):                                     # (B, n, D)
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 1)
        blocks = []                                                 # q, k, v (B, heads, n, D/heads)
        for start, end in zip([0, *ends], ends):
            blocks.append(attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], self.dropout))
        return self.dropout(self.proj(torch.cat(blocks, 1)))        # (B, n, D)


class CrossAttention(nn.Module):
    """Multi-head attention of latent tokens to the condition, whose keys and values are computed
    apart: a sampler needs them once, the queries at every step."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.wq = nn.Linear(dim, dim)
        self.wk = nn.Linear(dim, dim)
        self.wv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, c):
        """Return keys and values (2, B, heads, M, D/heads) of a condition c (B, M, D)."""
        return split_heads(torch.stack([self.wk(c), self.wv(c)]), self.heads)

    def forward(self, x, keys_values):                              # (B, N, D)
        q = split_heads(self.wq(x), self.heads)                     # (B, heads, N, D/heads)
        return self.dropout(self.proj(attend(q, *keys_values, self.dropout)))


# --- The AR transformer: class and references to semantic features --------------------------------

class ARBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, dropout)
        self.norm2 = LayerNorm(dim)
        self.mlp = mlp(dim, dropout)

    def forward(self, x, ends):
        x = x + self.attn(self.norm1(x), ends)
        return x + self.mlp(self.norm2(x))


class ARTransformer(nn.Module):
    """The AR transformer of Eq. 6, over [class | mask], and in MRAR [class | mask | image_0 |
    image_1 ...], where "mask" is a block of learned mask tokens.

    The features of image r are the outputs at the positions of image r - 1, those of image 0 at the
    mask. 1-step AR attends everywhere. MRAR is causal over the blocks class, mask, image_0, ...
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        dim = c.dim
        self.class_embed = nn.Embedding(c.classes, dim)
        self.null = nn.Parameter(torch.empty(1, dim))               # the embedding of "no label"
        self.mask = table(c.features_per_image if c.mrar else 1, dim)
        self.ref_proj = nn.Linear(c.vae.channels * c.patch**2, dim)
        self.pos = table(c.class_tokens + c.features, dim)
        self.norm_in = LayerNorm(dim)
        self.blocks = nn.ModuleList(ARBlock(dim, c.heads, c.dropout) for _ in range(c.ar_depth))
        self.norm_out = LayerNorm(dim)
        self.feature_pos = table(c.features, dim)                   # added for the decoder
        # Published weights always have ref_proj, but only latents that are fed back go through it.
        self.ref_proj.requires_grad_(c.rounds > 1 and c.feed == "latents")

    def start(self, labels):
        """Return [class | mask] (B, class_tokens + block, D)."""
        c = self.config
        embeddings = torch.cat([self.class_embed.weight, self.null])
        class_tokens = embeddings[labels][:, None].expand(-1, c.class_tokens, -1)
        mask = self.mask.expand(len(labels), c.features_per_image, -1)
        if not self.blocks:  # the diffusion decoder alone: none brings the class to the mask
            mask = mask + class_tokens[:, :1]
        return torch.cat([class_tokens, mask], 1)                   # Eq. 9

    def reference(self, latents):
        """Return an earlier image (B, z, h, w) as tokens (B, block, D), Eq. 11."""
        patches = F.pixel_unshuffle(latents, self.config.patch)
        return self.ref_proj(patches.flatten(2).mT)                 # Eq. 11

    def forward(self, x):
        """Return the features (B, n - class_tokens, D) of a sequence (B, n, D)."""
        c = self.config
        n = x.shape[1]
        ends = range(c.class_tokens, n + 1, c.features_per_image) if c.mrar else [n]
        x = self.norm_in(x + self.pos[:, :n])
        for block in self.blocks:
            x = block(x, ends)                                      # (B, n, D)
        return self.norm_out(x)[:, c.class_tokens:]


def similarity(h):
    """Return the mean |cosine| of different features of each sample (B,), for features h (B, M, D).

    The sum of Eq. 15 grows with M^2; the paper's figures (0.39 to 0.64) are means, as here. A lower
    value means more diverse features.
    """
    unit = F.normalize(h.float(), dim=-1)                           # Eq. 13
    S = (unit @ unit.mT).abs()                                      # Eq. 14, (B, M, M)
    M = S.shape[1]
    return (S.sum((1, 2)) - M) / (M * M - M)                        # Eq. 15, as a mean


# --- The diffusion decoder: noise and features to a latent ----------------------------------------

class DecoderBlock(nn.Module):
    """Self-attention and MLP modulated by time (AdaLN), with cross-attention to c between them."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.table = table(6, dim)                                  # added to the shared AdaLN
        self.norm1 = LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, dropout)
        self.norm2 = LayerNorm(dim)
        self.cross = CrossAttention(dim, heads, dropout)
        self.norm3 = LayerNorm(dim)
        self.mlp = mlp(dim, dropout)

    def forward(self, x, modulation, keys_values):                  # (B, N, D), (B or 1, 6, D)
        shift1, scale1, gate1, shift3, scale3, gate3 = (self.table + modulation).split(1, 1)
        h = self.norm1(x) * (1 + scale1) + shift1                   # scales etc.: (B or 1, 1, D)
        x = x + gate1 * self.attn(h, [x.shape[1]])
        if keys_values.shape[1] > len(x):  # guidance: 2 B conditions for B images, equal up to here
            x = x.repeat(2, 1, 1)
        x = x + self.cross(self.norm2(x), keys_values)
        h = self.norm3(x) * (1 + scale3) + shift3
        return x + gate3 * self.mlp(h)


class Decoder(nn.Module):
    """The velocity v = psi(x_t, t, c) of Eq. 3: a DiT with cross-attention.

    What depends on c alone (keys_values) and on t alone (modulation) is computed apart: a sampler
    needs the first once per image and the second once for all steps.
    """

    def __init__(self, config):
        super().__init__()
        c, dim = config, config.dim
        self.input = nn.Linear(c.vae.channels, dim)
        self.pos = table(c.latent_size**2, dim)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.modulate = nn.Linear(dim, 6 * dim)
        self.condition = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, c.heads, c.dropout) for _ in range(c.depth))
        self.table = table(2, dim)
        self.output = nn.Linear(dim, c.vae.channels)

    def keys_values(self, c):
        """Return all blocks' keys and values (depth, 2, B, heads, M, D/heads) of c (B, M, D)."""
        c = self.condition(c)
        return torch.stack([block.cross.keys_values(c) for block in self.blocks])

    def modulation(self, t):
        """Return the embedding of times t (B,), then the AdaLN of all blocks, (B, 7, D)."""
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = 1000 * t[:, None] * frequencies
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        return torch.cat([embedding, self.modulate(F.silu(embedding))], 1).unflatten(1, (7, -1))

    def forward(self, x, modulation, keys_values):
        """Return the velocity (B, N, z) of tokens x, or (2 B, N, z) for 2 B conditions."""
        embedding, shared = modulation.split((1, 6), 1)
        x = self.input(x) + self.pos                                # (B, N, D)
        for block, own in zip(self.blocks, keys_values):
            x = block(x, shared, own)
        shift, scale = (self.table + embedding).split(1, 1)
        x = plain_norm(x) * (1 + scale) + shift
        return self.output(x).float()


def scales(latents, rounds):
    """Return latents (B, z, h, w) at 1/8, 1/4, 1/2 and all of their resolution, for four rounds,
    each enlarged again to the full size."""
    sides = [latents.shape[2] >> r for r in reversed(range(rounds))]
    return [F.interpolate(F.adaptive_avg_pool2d(latents, max(1, side)), latents.shape[2:])
            for side in sides]


# --- The whole model ------------------------------------------------------------------------------

class TransDiff(nn.Module):
    """AR transformer and diffusion decoder, trained together."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.ar = ARTransformer(config)
        self.decoder = Decoder(config)
        self.initialise()
        self.needs_weights = config.only_decoder  # the AR transformer's, from another run
        if config.only_decoder:
            self.ar.requires_grad_(False)

    @torch.no_grad()
    def initialise(self):
        """Initialise as released: the output layer is zero, the AdaLN gates are not."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        ar, decoder = self.ar, self.decoder
        for rows in (ar.class_embed.weight, ar.null, ar.mask, ar.pos, ar.feature_pos, decoder.pos):
            rows.normal_(std=0.02)
        for part in (decoder, *decoder.blocks):
            part.table.normal_(std=self.config.dim**-0.5)
        decoder.output.weight.zero_()

    def semantic(self, labels, references):
        """Return features (B, M', D) of labels (B,) and the images so far, a list of latents.

        M' is the number of features of all images up to the next one. With feed = "features" only
        the number of references matters. The decoder's condition is h + feature_pos.
        """
        start = self.ar.start(labels)
        if self.config.feed == "latents":
            tokens = [self.ar.reference(image) for image in references]
            return self.ar(torch.cat([start, *tokens], 1))          # Eq. 6, 10, 12
        h = self.ar(start)
        for _ in references:                                        # Alg. 2, line 8
            h = self.ar(torch.cat([start, h], 1))
        return h

    def draw_times(self, n, device):
        """Draw t (n,) in 0 .. 1: uniform (Eq. 5), or logit-normal (released)."""
        if self.config.times == "uniform":
            return torch.rand(n, device=device)
        return logit_normal(self.config.time_mean + torch.randn(n, device=device))

    def forward(self, latents, labels, *, drop=None, eps=None, t=None):
        """Return the training loss (Eq. 8): flow matching of each image on the features it may use.

        latents (B, z, h, w), or (B, R, z, h, w): R images of one class in the order of their
        rounds. labels (B,). Drawn unless given: drop (B,) bool, the samples that lose their label;
        eps (R, m B, N, z) and t (R, m B), where m = config.repeat copies of the batch follow one
        another.
        """
        c = self.config
        m = c.repeat
        images = latents.unbind(1) if c.images_per_sample > 1 else scales(latents, c.rounds)
        labels = common.drop_labels(self, labels, drop)
        h = self.semantic(labels, images[:-1])                      # (B, M, D)
        keys_values = self.decoder.keys_values(h + self.ar.feature_pos).repeat(1, 1, m, 1, 1, 1)
        parts = {}
        for r, image in enumerate(images):
            x = image.flatten(2).mT.repeat(m, 1, 1)                 # (m B, N, z)
            eps_r = torch.randn_like(x) if eps is None else eps[r]
            t_r = self.draw_times(len(x), x.device) if t is None else t[r]
            x_t = torch.lerp(x, eps_r, t_r[:, None, None])          # Eq. 4
            end = c.features_per_image * (r + 1)                    # features of images 0 .. r
            v = self.decoder(x_t, self.decoder.modulation(t_r), keys_values[..., :end, :])
            parts[f"flow_{r}"] = F.mse_loss(v, eps_r - x)           # Eq. 5
        return {"loss": sum(parts.values()) / len(images), **parts}  # Eq. 8

    @torch.no_grad()
    def sample(self, labels, noise, *, other=None, features=None, rounds=None, on_step=None,
               **options):
        """Return scaled latents (B, z, h, w) and features (B, M', D) for labels (B,).

        noise: common.Noise. other: labels (B,) of classes whose features replace every second one
        (Fig. 5). features: use only K of the M features, evenly spread (Fig. 1). rounds: stop MRAR
        after this many images. on_step(x_0): the current estimate of the latents. options: cfg,
        steps, drift_scale, noise_scale and solver, in place of the config's. Raise UserError for a
        bad value.
        """
        c = common.with_options(self.config, **options)
        if c.solver == "euler" and {*options} & {"drift_scale", "noise_scale"}:
            raise UserError("--drift-scale and --noise-scale need --solver maruyama")
        rounds = rounds or c.rounds
        features = features or c.features
        if rounds > c.rounds or features > c.features:
            raise UserError(f"this model was trained for {c.rounds} rounds"
                            f" and {c.features} features")
        kept = torch.arange(features, device=labels.device) * c.features // features
        start = noise.normal((c.latent_size**2, c.vae.channels))    # one start for all rounds
        images = []
        if c.feed == "features":  # Alg. 2 decodes the last round only
            images = [None] * (rounds - 1)
        while len(images) < rounds:
            h = self.semantic(labels, images)                       # Eq. 6
            used = kept[kept < h.shape[1]]
            condition = h[:, used]                                  # (B, K', D)
            if other is not None:
                condition[:, 1::2] = self.semantic(other, images)[:, used[1::2]]
            if c.cfg != 1:
                h_null = self.semantic(torch.full_like(labels, c.classes), images)
                condition = torch.cat([condition, h_null[:, used]])  # (2 B, K', D)
            condition = condition + self.ar.feature_pos[:, used]
            keys_values = self.decoder.keys_values(condition)
            x = self.denoise(start, keys_values, c, noise, on_step)  # Eq. 7, 10, 12
            images.append(self.latents(x))
        return images[-1], h

    def latents(self, x):
        """Return tokens (B, N, z) as latents (B, z, h, w)."""
        return x.mT.unflatten(2, (self.config.latent_size, -1))

    def denoise(self, x, keys_values, c, noise, on_step):
        """Take tokens x (B, N, z) from noise to the image, with the sampler settings of a config c.

        The keys and values have B conditional rows, then B unconditional ones unless c.cfg is 1.
        """
        ts = time_grid(c.steps, c.solver, x.device)
        modulation = self.decoder.modulation(ts[:-1])               # of all steps at once
        for i, (t, dt) in enumerate(zip(ts, ts.diff())):            # dt < 0
            v = self.decoder(x, modulation[i:i + 1], keys_values)
            if c.cfg != 1:
                v, u = v.chunk(2)
                v = u + c.cfg * (v - u)
            if on_step:
                on_step(self.latents(x - t * v))
            # With sigma^2 = 2 t and, on a straight path, the score -(x + (1 - t) v) / t, the drift
            # v - (sigma^2 / 2) score of Eq. 16 is:
            drift = x + (2 - t) * v                                 # Eq. 16
            if c.solver == "euler":
                x = x + v * dt                                      # Eq. 3
            elif i < c.steps - 1:
                x = x + c.drift_scale * drift * dt                  # Eq. 17, 18
                x = x + c.noise_scale * (2 * t * -dt).sqrt() * noise.normal(x.shape[1:])
            else:
                x = x + drift * dt          # no s1, and no noise, which would stay in the image
        return x

    def decays(self, name, parameter):
        """Return whether to decay: matrices and tables of the AR transformer, as released."""
        return name.startswith("ar.") and parameter.ndim > 1

    def carry(self, name, old, shape):
        """Return an old weight made to fit this model, or None to start it afresh.

        How the authors start one model from another's weights is not published. Here the mask token
        is repeated and the decoder's grid of positions is resampled; the projection of references
        and class tables of another size start afresh.
        """
        if name == "ar.mask" and old.shape[1] == 1:
            return old.expand(shape)
        if name == "decoder.pos" and old.shape[2] == shape[2]:
            grid = old.mT.unflatten(2, (math.isqrt(old.shape[1]), -1))  # (1, D, side, side)
            grid = F.interpolate(grid, math.isqrt(shape[1]), mode="bicubic")
            return grid.flatten(2).mT
        return None


def logit_normal(normal):
    """Return times k/1000, k = 0 .. 999, for standard normal values: their sigmoid, floored."""
    return (1000 * torch.sigmoid(normal).float()).floor() / 1000


def time_grid(steps, solver, device=None):
    """Return times (steps + 1,) from 1 to 0. Euler-Maruyama goes to 0.04 in equal steps, then to 0
    in one, as released. With fewer than three steps the result is mostly noise."""
    if solver == "euler":
        return torch.linspace(1, 0, steps + 1, device=device)
    return F.pad(torch.linspace(1, 0.04, steps), (0, 1)).to(device)


# --- Sampling options, stages and recipes ---------------------------------------------------------

OPTIONS = {
    "cfg": dict(type=float, help="guidance scale: 1 is off and costs half, 0 is unconditional"),
    "steps": dict(type=int, help="denoising steps of each round; Euler-Maruyama: 3 or more"),
    "solver": dict(choices=("maruyama", "euler"), help="stochastic (Eq. 18) or not (Eq. 3)"),
    "drift_scale": dict(type=float, help="s1 of Eq. 18, with maruyama"),
    "noise_scale": dict(type=float, help="s2 of Eq. 18, with maruyama"),
    "rounds": dict(type=common.positive, help="MRAR: stop after this many images"),
    "features": dict(type=common.positive, help="use only so many semantic features (Fig. 1)"),
    "fuse": dict(metavar="CLASS", help="take every second feature from this class (Fig. 5)")}


def generate(model, vae, labels, noise, *, fuse=None, on_step=None, **options):
    """Return images (B, 3, h, w) in -1 .. 1 and {"feature_similarity": (B,)}; see OPTIONS.

    on_step(images): the current estimate at each step, decoded.
    """
    if fuse:
        [label] = common.class_ids([fuse], model.config)
        options["other"] = torch.full_like(labels, label)

    def show(x_0):
        on_step(vae.decode(x_0))

    latents, h = model.sample(labels, noise, on_step=show if on_step else None, **options)
    return vae.decode(latents).clamp(-1, 1), {"feature_similarity": similarity(h)}


def compile_steps(model, vae):
    """Compile what sampling repeats, the decoder, and record it, a graph for each round."""
    model.decoder.forward = common.recorded(torch.compile(model.decoder.forward))


check = common.check_vae


def model_views(config):
    """Crops whose latents the model is trained on."""
    return common.centre_and_mirror if config.mirror else common.centre


def mrar_config(config):
    """Return the MRAR config: two repetitions, and its published sampler settings."""
    return replace(config, mrar=True, repeat=2, **MRAR_SAMPLING.get(config.dim, {}))


TINY = Recipe(muon=True, lr=4e-3, batch=32, epochs=1.8, warmup=0.03, decay=0.5, clip=1.0, ema=0.999)
PAPER = Recipe(lr=8e-4, batch=2048, epochs=800, warmup=100 / 800)
PAPER_512 = Recipe(lr=1e-4, batch=2048, epochs=150, warmup=10 / 150, ema=0.999)
TINY_MRAR = replace(TINY, lr=1e-3, batch=8, epochs=0.6)
PAPER_MRAR = Recipe(lr=5e-5, batch=2048, epochs=40, warmup=10 / 40)
STAGES = [
    common.vae_stage(),
    Stage("1step", TransDiff,
          {"tiny": TINY, "b": PAPER, "l": PAPER, "h": PAPER, "l-512": PAPER_512},
          model_views, first_stage="vae"),
    Stage("mrar", TransDiff, {"tiny": TINY_MRAR, "b": PAPER_MRAR, "l": PAPER_MRAR, "h": PAPER_MRAR},
          model_views, first_stage="vae", start="1step", adapt=mrar_config)]


# --- Released checkpoints -------------------------------------------------------------------------

# Released name -> ours, applied in order.
RELEASED = r"""
^fake_latent                        -> ar.null
^mask_token                         -> ar.mask
^encoder_pos_embed_learned          -> ar.pos
^diffusion_pos_embed_learned        -> ar.feature_pos
^class_emb\.                        -> ar.class_embed.
^z_proj_ln\.                        -> ar.norm_in.
^z_proj\.                           -> ar.ref_proj.
^encoder_blocks\.                   -> ar.blocks.
^encoder_norm\.                     -> ar.norm_out.
^diffdecoder\.net\.                 -> decoder.
diffusion_pos_embed_learned         -> pos
time_embed\.time_embedder\.linear_1 -> time.0
time_embed\.time_embedder\.linear_2 -> time.2
time_embed\.time_proj               -> modulate
cond_embed                          -> condition
input_proj                          -> input
res_blocks                          -> blocks
scale_shift_table                   -> table
attn1                               -> attn
attn2                               -> cross
mlp\.fc1                            -> mlp.0
mlp\.fc2                            -> mlp.3
final_layer\.table                  -> table
final_layer\.linear                 -> output
"""


def load_official(path, **overrides):
    """Return the model in a released checkpoint, its EMA weights if there are any, ready to sample.

    The shapes give the config; overrides are Config fields that they do not show, such as heads.
    Raise UserError for an entry that is missing, extra or misshapen, and for a file that is no
    TransDiff checkpoint.
    """
    content = common.read_checkpoint(path)
    with common.untrusted(path, "not a TransDiff checkpoint"):
        return from_released(common.unwrap(content, "model_ema", "model"), path, **overrides)


def from_released(state, path="the checkpoint", **overrides):
    """Return the model of a released state dict (see load_official)."""
    state = common.renamed(state, RELEASED)
    classes, dim = state["ar.class_embed.weight"].shape
    _, features, _ = state["ar.feature_pos"].shape
    block = state["ar.mask"].shape[1]
    mrar = block > 1
    vae = VAEConfig(channels=len(state["decoder.output.bias"]))
    image_size = math.isqrt(state["decoder.pos"].shape[1]) * vae.factor
    shapes = dict(
        dim=dim, mrar=mrar, image_size=image_size, vae=vae, classes=classes, features=features,
        images=features // block if mrar else Config.images,
        class_tokens=state["ar.pos"].shape[1] - features,
        ar_depth=len(common.numbered(state, r"ar\.blocks\.(\d+)")),
        depth=len(common.numbered(state, r"decoder\.blocks\.(\d+)")))
    config = replace(published(dim, mrar, image_size), **shapes | overrides)
    return common.load_strict(TransDiff(config), state, path).eval()


def published(dim, mrar, image_size):
    """Return the published config of this width, kind and image size, else a new one."""
    for preset in PRESETS.values():
        config = mrar_config(preset) if mrar else preset
        if (config.dim, config.image_size) == (dim, image_size):
            return config
    return Config(dim=dim, heads=min(16, max(dim // 64, 1)))


def main():
    """Print the presets with their parameter counts, and walk one batch through a tiny MRAR."""
    common.print_presets(PRESETS, PUBLISHED, parameters=TransDiff)
    print("\nTiny MRAR: latents (2, 4, 16, 8, 8) and labels (2,) through TransDiff.forward")
    common.walk(TransDiff(mrar_config(PRESETS["tiny"])), torch.randn(2, 4, 16, 8, 8),
                torch.arange(2))


if __name__ == "__main__":
    common.run_script(main)
