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
          Eq. 13 to 15: similarity. In each round, Eq. 10 and 12 apply Eq. 6 and then Eq. 7.
          Eq. 1 and 2 define autoregressive models in general; nothing here computes them.
Differs   Where the paper is silent or its released code differs, a Config field selects one:
          `times`, `feed`. docs/paper_and_code.md lists all points.
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import TINY_VAE, Recipe, Stage, UserError, VAEConfig


@dataclass(frozen=True)
class Config:
    """Everything that fixes the shapes, the loss and the sampler's defaults."""
    image_size: int = 256               # pixels
    classes: int = 1000                 # label `classes` means "no label"
    class_names: tuple[str, ...] = ()   # from the data
    dim: int = 768                      # D, of both transformers
    heads: int = 12
    ar_depth: int = 24                  # blocks of the AR transformer
    depth: int = 12                     # blocks of the diffusion decoder
    class_tokens: int = 64              # copies of the class embedding that begin the AR sequence
    features: int = 256                 # M semantic features; MRAR: of all images together
    images: int = 4                     # R of MRAR: images of a sample, rounds of sampling
    mrar: bool = False                  # False: 1-step AR
    feed: str = "latents"               # MRAR feeds back "latents" (Eq. 11, released) or
                                        # "features" (Alg. 2: only the last round is decoded)
    dropout: float = 0.1                # in attention, after attention and in the MLP, 0 .. 1
    label_drop: float = 0.1             # share of training samples that lose their label, 0 .. 1
    repeat: int = 4                     # draws of (t, eps) per image and AR pass
    times: str = "logit-normal"         # t in training: "logit-normal", on the grid k/1000
                                        # (released), or "uniform" (Eq. 5)
    mirror: bool = True                 # mirror half of the training images
    only_decoder: bool = False          # 512 px: train the decoder under a frozen AR transformer
    cfg: float = 1.3                    # sampler defaults: guidance scale,
    steps: int = 100                    # steps of each round,
    drift_scale: float = 0.87           # s1 and
    noise_scale: float = 0.91           # s2 of Eq. 18,
    solver: str = "maruyama"            # Euler-"maruyama" (Eq. 18, stochastic) or "euler" (Eq. 3)
    vae: VAEConfig = VAEConfig()

    def __post_init__(self):
        rules = {
            "images, features, heads and steps must be 1 or more":
                min(self.images, self.features, self.heads, self.steps) > 0,
            f"image_size must be divisible by {self.vae.factor}":
                self.image_size % self.vae.factor == 0,
            "dim must be divisible by heads": self.dim % max(self.heads, 1) == 0,
            "cfg, drift_scale and noise_scale must be finite":
                math.isfinite(self.cfg + self.drift_scale + self.noise_scale)}
        if self.mrar:
            side = math.isqrt(self.features_per_image)
            rules["the features of an image must be a square grid that divides the latent"] = (
                self.features == self.images * side**2 and self.latent_size % side == 0)
        common.check(self, rules, times=("logit-normal", "uniform"), feed=("latents", "features"),
                     solver=("maruyama", "euler"))

    @property
    def latent_size(self):
        """Side of the latent; its square is N."""
        return self.image_size // self.vae.factor

    @property
    def images_per_sample(self):
        """R: images of one class that make one training sample, and rounds of sampling."""
        return self.images if self.mrar else 1

    @property
    def features_per_image(self):
        """Features of one image: the block of the block-causal attention."""
        return self.features // self.images_per_sample

    @property
    def patch(self):
        """Side of a reference's patches, in latent pixels."""
        return self.latent_size // math.isqrt(self.features_per_image) if self.mrar else 1


BASE = Config()
PRESETS = {
    "tiny": Config(image_size=32, classes=10, dim=128, heads=4, ar_depth=2, depth=4,
                   class_tokens=16, features=64, repeat=2, dropout=0.0, mirror=False, vae=TINY_VAE,
                   cfg=2.0, steps=25, drift_scale=1.0, noise_scale=1.0),
    "b": BASE,
    "l": dataclasses.replace(BASE, dim=1024, heads=16, ar_depth=32, depth=16, drift_scale=0.89,
                             noise_scale=0.95),
    "h": dataclasses.replace(BASE, dim=1280, heads=16, ar_depth=40, depth=20, cfg=1.23,
                             noise_scale=0.93),
    "l-512": dataclasses.replace(BASE, dim=1024, heads=16, ar_depth=32, depth=16, image_size=512,
                                 only_decoder=True, noise_scale=0.87)}
PUBLISHED = {"b": "290M", "l": "683M", "h": "1.3B", "l-512": "683M"}
MRAR_SAMPLING = {  # width -> published sampler settings of MRAR
    768: dict(cfg=1.3, drift_scale=0.87, noise_scale=0.91),
    1024: dict(cfg=1.3, drift_scale=0.925, noise_scale=0.95),
    1280: dict(cfg=1.28, drift_scale=0.87, noise_scale=0.91)}


# --- Layers ---------------------------------------------------------------------------------------

class MLP(nn.Sequential):
    """D -> 4D -> D with exact GELU."""

    def __init__(self, dim, dropout):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout),
                         nn.Linear(4 * dim, dim), nn.Dropout(dropout))


class SelfAttention(nn.Module):
    """Multi-head self-attention that is causal over blocks and full inside them.

    No mask is needed: each block of queries is given the keys up to its own end. `ends` are the
    ends of the blocks; a single end is full attention.
    """

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, ends):                                     # (B, n, D)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout_p = self.dropout.p if self.training else 0.0
        blocks = []                                                 # q, k, v (B, heads, n, D/heads)
        for start, end in zip([0, *ends], ends):
            blocks.append(F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :end], v[:, :, :end], dropout_p=dropout_p))
        x = torch.cat(blocks, 2).transpose(1, 2).flatten(2)         # (B, n, D)
        return self.dropout(self.proj(x))


class CrossAttention(nn.Module):
    """Multi-head attention of latent tokens to the condition, in two halves: a sampler needs the
    condition's keys and values once, the queries at every step."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.wq = nn.Linear(dim, dim)
        self.wk = nn.Linear(dim, dim)
        self.wv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def queries(self, x):
        """Return queries (B, heads, N, D/heads) of x (B, N, D)."""
        return self.wq(x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, c):
        """Return keys and values (B, heads, M, D/heads) of a condition c (B, M, D)."""
        k = self.wk(c).unflatten(2, (self.heads, -1)).transpose(1, 2)
        v = self.wv(c).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return k, v

    def forward(self, q, k, v):                                     # (B, heads, n, D/heads)
        dropout_p = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))


# --- The AR transformer: class and references to semantic features --------------------------------

class ARBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, dropout)

    def forward(self, x, ends):
        x = x + self.attn(self.norm1(x), ends)
        return x + self.mlp(self.norm2(x))


class ARTransformer(nn.Module):
    """The AR transformer of Eq. 6, over [class | mask], and in MRAR [class | mask | image_0 |
    image_1 ...].

    The features of image r are the outputs at the positions of image r - 1, those of image 0 at the
    mask. 1-step AR attends everywhere. MRAR is causal over the blocks class, mask, image_0, ...
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.class_embed = nn.Embedding(c.classes, c.dim)
        self.null = nn.Parameter(torch.empty(1, c.dim))             # in place of a dropped label
        self.mask = nn.Parameter(torch.empty(1, c.features_per_image if c.mrar else 1, c.dim))
        self.ref_proj = nn.Linear(c.vae.channels * c.patch**2, c.dim)
        self.pos = nn.Parameter(torch.empty(1, c.class_tokens + c.features, c.dim))
        self.norm_in = nn.LayerNorm(c.dim, eps=1e-6)
        self.blocks = nn.ModuleList(ARBlock(c.dim, c.heads, c.dropout) for _ in range(c.ar_depth))
        self.norm_out = nn.LayerNorm(c.dim, eps=1e-6)
        self.feature_pos = nn.Parameter(torch.empty(1, c.features, c.dim))  # added for the decoder
        if c.images_per_sample == 1 or c.feed == "features":
            self.ref_proj.requires_grad_(False)  # published weights have it; nothing goes through

    def start(self, labels, drop=None):
        """Return [class | mask] (B, class_tokens + block, D); drop (B,): no label."""
        c = self.config
        unlabelled = labels == c.classes
        if drop is not None:
            unlabelled = unlabelled | drop
        embedding = self.class_embed(labels.clamp(max=c.classes - 1))
        embedding = torch.where(unlabelled[:, None], self.null, embedding)  # (B, D)
        class_tokens = embedding[:, None].expand(-1, c.class_tokens, -1)
        mask = self.mask.expand(len(labels), c.features_per_image, -1)
        return torch.cat([class_tokens, mask], 1)                   # Eq. 9

    def reference(self, latents):
        """Return an earlier image (B, z, h, w) as tokens (B, block, D), Eq. 11."""
        patches = F.pixel_unshuffle(latents, self.config.patch)
        return self.ref_proj(patches.flatten(2).transpose(1, 2))    # Eq. 11

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
    S = (unit @ unit.transpose(1, 2)).abs()                         # Eq. 14, (B, M, M)
    M = S.shape[1]
    return (S.sum((1, 2)) - M) / (M * M - M)                        # Eq. 15, as a mean


# --- The diffusion decoder: noise and features to a latent ----------------------------------------

class DecoderBlock(nn.Module):
    """Self-attention and MLP modulated by time (AdaLN), with cross-attention to c between them."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, 6, dim))           # added to the shared AdaLN
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.cross = CrossAttention(dim, heads, dropout)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, dropout)

    def forward(self, x, modulation, k, v):                         # (B, N, D), (B or 1, 6, D)
        shift1, scale1, gate1, shift3, scale3, gate3 = (self.table + modulation).split(1, 1)
        h = self.norm1(x) * (1 + scale1) + shift1                   # scales etc.: (B or 1, 1, D)
        x = x + gate1 * self.attn(h, [x.shape[1]])
        q = self.cross.queries(self.norm2(x))                       # (B, heads, N, D/heads)
        if len(k) > len(x):  # guidance: 2 B conditions for B images, which were equal up to here
            x = x.repeat(2, 1, 1)
            q = q.repeat(2, 1, 1, 1)
        x = x + self.cross(q, k, v)
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
        self.pos = nn.Parameter(torch.empty(1, c.latent_size**2, dim))
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.modulate = nn.Linear(dim, 6 * dim)
        self.condition = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, c.heads, c.dropout) for _ in range(c.depth))
        self.table = nn.Parameter(torch.empty(1, 2, dim))
        self.output = nn.Linear(dim, c.vae.channels)

    def keys_values(self, c):
        """Return each block's keys and values (B, heads, M, D/heads) of c (B, M, D)."""
        c = self.condition(c)
        return [block.cross.keys_values(c) for block in self.blocks]

    def modulation(self, t):
        """Return the embedding (B, D) of times (B,) and all blocks' AdaLN (B, 6, D)."""
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = 1000 * t[:, None] * frequencies
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], 1))
        return embedding, self.modulate(F.silu(embedding)).unflatten(1, (6, -1))

    def forward(self, x, modulation, keys_values):
        """Return the velocity (B, N, z) of tokens x, or (2 B, N, z) for 2 B conditions."""
        embedding, shared = modulation
        x = self.input(x) + self.pos                                # (B, N, D)
        for block, (k, v) in zip(self.blocks, keys_values):
            x = block(x, shared, k, v)
        shift, scale = (self.table + embedding[:, None]).split(1, 1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.output(x).float()


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
        """Initialise as released: the velocity starts at zero, the AdaLN gates do not."""
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
        """Return features (B, M', D) of labels (B,) and the images so far, a list of latents.

        M' covers one image more than there are references, of which only the number is used if
        `feed` is "features". The decoder's condition is h + feature_pos.
        """
        start = self.ar.start(labels, drop)
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
        return logit_normal(torch.randn(n, device=device))

    def forward(self, latents, labels, *, drop=None, eps=None, t=None):
        """Return the training loss (Eq. 8): flow matching of each image on the features it may use.

        latents (B, z, h, w), or (B, R, z, h, w) if R > 1: images of one class in the order of their
        rounds. labels (B,). Drawn unless given: drop (B,) bool, the samples that lose their label;
        eps (R, m B, N, z) and t (R, m B), where m = config.repeat copies of the batch follow one
        another.
        """
        c = self.config
        m = c.repeat
        images = latents.unbind(1) if c.images_per_sample > 1 else [latents]
        if drop is None:
            share = c.label_drop if self.training else 0.0
            drop = torch.rand(len(labels), device=labels.device) < share
        h = self.semantic(labels, images[:-1], drop)                # (B, M, D)
        keys_values = self.decoder.keys_values(h + self.ar.feature_pos)  # once for all m copies
        losses = []
        for r, image in enumerate(images):
            x = image.flatten(2).transpose(1, 2).repeat(m, 1, 1)    # (m B, N, z)
            eps_r = torch.randn_like(x) if eps is None else eps[r]
            t_r = self.draw_times(len(x), x.device) if t is None else t[r]
            x_t = torch.lerp(x, eps_r, t_r[:, None, None])          # Eq. 4
            known = []
            for k, v in keys_values:  # the features of images 0 .. r
                end = c.features_per_image * (r + 1)
                known.append((k[:, :, :end].repeat(m, 1, 1, 1), v[:, :, :end].repeat(m, 1, 1, 1)))
            v = self.decoder(x_t, self.decoder.modulation(t_r), known)
            losses.append(F.mse_loss(v, eps_r - x))                 # Eq. 5
        parts = {f"flow_{r}": loss for r, loss in enumerate(losses)} if c.mrar else {}
        return {"loss": torch.stack(losses).mean(), **parts}        # Eq. 8

    @torch.no_grad()
    def sample(self, labels, noise, *, other=None, features=None, rounds=None, on_step=None,
               **options):
        """Return scaled latents (B, z, h, w) and features (B, M', D) for labels (B,).

        noise: common.Noise. other: labels (B,) of classes whose features take every second place
        (Fig. 5). features: use only K of the M features, evenly spread (Fig. 1). rounds: stop MRAR
        after this many images. on_step(x_0): the current estimate of the latents. options: cfg,
        steps, drift_scale, noise_scale and solver, in place of the config's. Raise UserError for a
        bad value.
        """
        c = common.with_options(self.config, **options)
        rounds = c.images_per_sample if rounds is None else rounds
        features = c.features if features is None else features
        if not 1 <= rounds <= c.images_per_sample:
            raise UserError(f"rounds: this model was trained for {c.images_per_sample}")
        if not rounds <= features <= c.features:
            raise UserError(f"features: choose {rounds} to {c.features}")
        places = torch.arange(c.features, device=labels.device)
        kept = places[(places * features) % c.features < features]  # K of 0 .. M - 1
        null = torch.full_like(labels, c.classes)
        start = noise.normal((c.latent_size**2, c.vae.channels))    # one start for all rounds
        first = rounds - 1 if c.feed == "features" else 0           # Alg. 2 decodes the last round
        images = [None] * first
        for _ in range(first, rounds):
            h = self.semantic(labels, images)                       # Eq. 6
            used = kept[kept < h.shape[1]]
            condition = h
            if other is not None:
                condition = h.clone()
                condition[:, used[1::2]] = self.semantic(other, images)[:, used[1::2]]
            if c.cfg != 1:
                condition = torch.cat([condition, self.semantic(null, images)])
            condition = condition + self.ar.feature_pos[:, :h.shape[1]]  # ([2] B, M', D)
            keys_values = self.decoder.keys_values(condition[:, used])
            x = self.denoise(start, keys_values, c, noise, on_step)  # Eq. 7, 10, 12
            images.append(self.latents(x))
        return images[-1], h

    def latents(self, x):
        """Return tokens (B, N, z) as latents (B, z, h, w)."""
        return x.transpose(1, 2).unflatten(2, (self.config.latent_size, -1))

    def denoise(self, x, keys_values, c, noise, on_step=None):
        """Take tokens x (B, N, z) from noise to the image, with the sampler settings of a config c.

        keys_values have B conditional rows, then B unconditional ones unless c.cfg is 1.
        """
        ts = time_grid(c.steps, c.solver, x.device)
        embedding, shared = self.decoder.modulation(ts[:-1])        # of all steps at once
        for i in range(c.steps):
            t, dt = ts[i], ts[i + 1] - ts[i]                        # dt < 0
            v = self.decoder(x, (embedding[i:i + 1], shared[i:i + 1]), keys_values)
            if c.cfg != 1:
                v, u = v.chunk(2)
                v = u + c.cfg * (v - u)
            if on_step:
                on_step(self.latents(x - t * v))
            # Eq. 16 with sigma^2 = 2 t. A straight path has the score -(x + (1 - t) v) / t, so the
            # drift v - sigma^2 / 2 score is:
            drift = x + (2 - t) * v                                 # Eq. 16
            if c.solver == "euler":
                x = x + v * dt                                      # Eq. 3
            elif i < c.steps - 1:
                x = x + c.drift_scale * drift * dt                  # Eq. 17, 18
                x = x + c.noise_scale * (2 * t * -dt).sqrt() * noise.normal(x.shape[1:])
            else:
                x = x + drift * dt          # the last step: noise would stay in the image
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
            return old.expand(shape).clone()
        if name == "decoder.pos" and old.shape[2] == shape[2]:
            side, new_side = math.isqrt(old.shape[1]), math.isqrt(shape[1])
            grid = old.transpose(1, 2).unflatten(2, (side, side))   # (1, D, side, side)
            grid = F.interpolate(grid, (new_side, new_side), mode="bicubic")
            return grid.flatten(2).transpose(1, 2)
        return None


def logit_normal(normal):
    """Return times k/1000, k = 0 .. 999, for standard normal values: their sigmoid, floored."""
    return (1000 * torch.sigmoid(normal).float()).floor() / 1000


def time_grid(steps, solver, device=None):
    """Return times (steps + 1,) from 1 to 0. Euler-Maruyama goes to 0.04 in equal steps and takes a
    last one, without noise, from there to 0, as released. Fewer than three steps would leave mostly
    noise: they raise UserError."""
    if solver == "euler":
        return torch.linspace(1, 0, steps + 1, device=device)
    if steps < 3:
        raise UserError(f"{steps} steps are too few for Euler-Maruyama: use 3 or --solver euler")
    return torch.cat([torch.linspace(1, 0.04, steps), torch.zeros(1)]).to(device)


# --- Sampling options, stages and recipes ---------------------------------------------------------

OPTIONS = {
    "cfg": dict(type=float, help="guidance scale: 1 is off and costs half, 0 is unconditional"),
    "steps": dict(type=int, help="denoising steps of each round"),
    "solver": dict(choices=("maruyama", "euler"), help="stochastic (Eq. 18) or not (Eq. 3)"),
    "drift_scale": dict(type=float, metavar="S1", help="s1 of Eq. 18"),
    "noise_scale": dict(type=float, metavar="S2", help="s2 of Eq. 18"),
    "rounds": dict(type=int, help="MRAR: stop after this many images"),
    "features": dict(type=int, metavar="K", help="use only K of the semantic features (Fig. 1)"),
    "fuse": dict(metavar="CLASS", help="take every second feature from this class (Fig. 5)")}


def generate(model, vae, labels, noise, *, fuse=None, on_step=None, **options):
    """Return images (B, 3, h, w) in -1 .. 1 and {"feature_similarity": (B,)}; see OPTIONS.

    on_step(images): the current estimate at each step, decoded.
    """
    other = None
    if fuse is not None:
        [label] = common.class_ids([fuse], model.config)
        other = torch.full_like(labels, label)

    def decode_step(x_0):
        on_step(vae.decode(x_0))

    watch = decode_step if on_step else None
    latents, h = model.sample(labels, noise, other=other, on_step=watch, **options)
    return vae.decode(latents).clamp(-1, 1), {"feature_similarity": similarity(h)}


def compile_steps(model, vae):
    """Compile what sampling repeats: the decoder."""
    model.decoder.forward = common.compiled(model.decoder.forward)


check = common.check_vae


def vae_views(config):
    """Crops that the VAE is trained on."""
    return common.random_square_and_mirror if config.mirror else common.random_square


def model_views(config):
    """Crops whose latents the model is trained on."""
    return common.centre_and_mirror if config.mirror else common.centre


def mrar_config(config):
    """Return the MRAR config: half the repetitions, and its published sampler settings."""
    return dataclasses.replace(config, mrar=True, repeat=2, **MRAR_SAMPLING.get(config.dim, {}))


TINY = Recipe(lr=2e-3, batch=32, epochs=1, warmup=0.03, decay=0.5, clip=1.0, ema=0.999)
PAPER = Recipe(lr=8e-4, batch=2048, epochs=800, warmup=100 / 800)
PAPER_512 = Recipe(lr=1e-4, batch=2048, epochs=150, warmup=10 / 150, ema=0.999)
TINY_MRAR = dataclasses.replace(TINY, lr=1e-3, batch=8, epochs=0.6)
PAPER_MRAR = Recipe(lr=5e-5, batch=2048, epochs=40, warmup=10 / 40)
STAGES = [
    common.vae_stage(vae_views),
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
    try:
        dim = state["ar.null"].shape[1]
        features = state["ar.feature_pos"].shape[1]
        block = state["ar.mask"].shape[1]
        mrar = block > 1
        vae = VAEConfig(channels=state["decoder.input.weight"].shape[1])
        config = Config(
            dim=dim, heads=min(16, max(dim // 64, 1)), mrar=mrar, vae=vae,
            image_size=math.isqrt(state["decoder.pos"].shape[1]) * vae.factor,
            classes=len(state["ar.class_embed.weight"]), features=features,
            class_tokens=state["ar.pos"].shape[1] - features,
            images=features // block if mrar else Config.images,
            ar_depth=len(common.numbered(state, r"ar\.blocks\.(\d+)")),
            depth=len(common.numbered(state, r"decoder\.blocks\.(\d+)")))
        config = dataclasses.replace(config, **{**published_sampling(config), **overrides})
        model = TransDiff(config)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a TransDiff checkpoint ({error})") from None
    common.load_strict(model, state, path)
    return model.eval()


def published_sampling(config):
    """Return the published sampler settings of a model of this width, kind and image size."""
    if config.mrar:
        return MRAR_SAMPLING.get(config.dim, {})
    for preset in PRESETS.values():
        if (preset.dim, preset.image_size) == (config.dim, config.image_size):
            return {name: getattr(preset, name) for name in ("cfg", "drift_scale", "noise_scale")}
    return {}


def main():
    """Print the presets with their parameter counts, and walk one batch through the tiny one."""
    print("preset    D  heads  AR blocks  decoder blocks     1-step parameters  MRAR  published")
    for name, c in PRESETS.items():
        with torch.device("meta"):
            one_step = sum(p.numel() for p in TransDiff(c).parameters())
            mrar = sum(p.numel() for p in TransDiff(mrar_config(c)).parameters())
        print(f"{name:6s} {c.dim:4d} {c.heads:6d} {c.ar_depth:10d} {c.depth:15d} {one_step:15,d}"
              f" {mrar:15,d}  {PUBLISHED.get(name, '-'):>6s}")
    for title, c in (("1-step AR", PRESETS["tiny"]), ("MRAR", mrar_config(PRESETS["tiny"]))):
        shape = (2, c.images) if c.mrar else (2,)
        latents = torch.randn(*shape, c.vae.channels, c.latent_size, c.latent_size)
        print(f"\n{title}: latents {tuple(latents.shape)} through TransDiff.forward")
        loss = common.walk(TransDiff(c), latents, torch.tensor([0, 1]))
        print("  loss:", {name: round(part.item(), 3) for name, part in loss.items()})


if __name__ == "__main__":
    common.run_script(main)
