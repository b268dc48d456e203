"""TransDiff beyond parity: closed forms, fast ways against plain ones, and what each option means.
"""
import argparse
import dataclasses

import plain
import pytest
import torch
import torch.nn.functional as F
from test_parity import Fixture, Spy, close, replay

import common
import transdiff
from common import Noise, UserError
from transdiff import PRESETS, TransDiff

SMALL = dataclasses.replace(
    PRESETS["tiny"], image_size=16, classes=5, dim=32, heads=2, depth=2, class_tokens=4,
    features=16, steps=4, vae=dataclasses.replace(common.TINY_VAE, channels=4))
LABELS = torch.tensor([3, 1])


def small(**changes):
    """Return a small model whose every weight matters (the released initialisation has zeros)."""
    torch.manual_seed(0)
    model = TransDiff(dataclasses.replace(SMALL, **changes)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def sample(model, labels=LABELS, **options):
    """Return latents from the noise of seed 0."""
    return model.sample(labels, Noise(0, range(len(labels))), **options)[0]


def exact(velocity, **changes):
    """Return a model whose decoder computes velocity(x, t) in closed form."""
    model = small(cfg=1.0, **changes)
    model.decoder.modulation = lambda t: t
    model.decoder.forward = lambda x, t, keys_values: velocity(x, t)
    return model


def conditions(model):
    """Return a list to which sampling will append the features that the decoder reads."""
    read = []
    model.decoder.condition.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    return read


# --- Samplers against closed forms ----------------------------------------------------------------

def test_euler_is_exact_on_straight_paths():
    """From any noise, v = eps - x ends at x. A wrong sign, order or step size misses it."""
    target = torch.randn(2, 16, 4)
    model = exact(lambda x, t: (x - target) / t, solver="euler")
    close(sample(model), model.latents(target))


@pytest.mark.parametrize("solver", ["euler", "maruyama"])
@pytest.mark.parametrize("mean,std", [(1.5, 0.5), (-1.0, 2.0)])
def test_a_gaussian_keeps_its_mean_and_variance(solver, mean, std):
    """A wrong score, noise strength or drift ends with another variance."""
    def velocity(x, t):  # E[eps - x_0 | x_t] of data N(mean, std^2)
        variance = ((1 - t) * std) ** 2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    model = exact(velocity, image_size=64, solver=solver)
    x = sample(model, torch.zeros(64, dtype=torch.long), steps=400)
    assert abs(x.mean() - mean) < 0.04
    assert abs(x.std() / std - 1) < 0.03


def test_the_last_step_is_unscaled_and_inexact():
    """It adds no noise, and its drift removes twice the noise that is left."""
    x_0, eps = torch.randn(2, 1, 16, 4)
    start = 0.96 * x_0 + 0.04 * eps
    scales = dict(drift_scale=0.0, noise_scale=0.0)                 # it stays until t = 0.04
    model = exact(lambda x, t: eps - x_0, solver="maruyama", **scales)
    x, _ = model.sample(LABELS[:1], replay(start, eps, eps), steps=3)
    close(x, model.latents(x_0 - 0.04 * eps))


# --- Fast ways against plain ones -----------------------------------------------------------------

@pytest.mark.parametrize("mrar", [False, True])
@pytest.mark.parametrize("solver", ["euler", "maruyama"])
def test_fast_sampling_is_plain_sampling(mrar, solver):
    """Keys and times computed once, rows that both halves share, the drift in closed form."""
    model = small(mrar=mrar, solver=solver, cfg=1.7, steps=4, drift_scale=0.9, noise_scale=0.8)
    slow = plain.transdiff_sample(model, LABELS, Noise(0, range(2)))
    close(sample(model), slow, 1e-4)


@pytest.mark.parametrize("mrar", [False, True])
def test_compiled_sampling_is_eager_sampling(traced, mrar):
    """A graph for the first number of features and one for all others, in two jobs."""
    model = small(mrar=mrar)
    eager = sample(model)
    transdiff.compile_steps(model, None)
    sample(model, LABELS.flip(0))
    close(sample(model), eager)
    assert len(traced) == (2 if mrar else 1)


def test_block_causal_attention_is_masked_attention():
    """The loop over blocks is PyTorch's attention without the keys of later blocks."""
    attention = small().ar.blocks[0].attn
    x = torch.randn(2, 9, 32)
    q, k, v = attention.qkv(x).view(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
    block = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=block[:, None] >= block)
    close(attention(x, [3, 5, 9]), attention.proj(h.transpose(1, 2).flatten(2)))


def test_a_reference_changes_later_features_only():
    """A leak would let training read the image that it predicts."""
    model = small(mrar=True)
    references = torch.randn(3, 2, 4, 4, 4)
    before = model.semantic(LABELS, references)
    references[1] += 1
    changed = (model.semantic(LABELS, references) != before).any(2).all(0)
    assert changed.tolist() == [False] * 8 + [True] * 8


def test_an_image_does_not_depend_on_its_batch():
    """Noise belongs to the image, and both halves of guidance keep their rows."""
    model = small(mrar=True)
    alone, _ = model.sample(torch.tensor([2]), Noise(0, [1]))
    close(alone, sample(model, torch.tensor([0, 2, 1]))[1:2], 1e-4)


# --- What the options mean ------------------------------------------------------------------------

def test_scales_are_one_image_at_growing_resolution():
    """Table 4's baseline: four rounds see means over 4 x 4, 4 x 4, 2 x 2 and 1 x 1 pixels."""
    model = small(mrar=True, references="scales", dropout=0.0)
    seen = []
    model.semantic = lambda labels, references: (
        seen.extend(references), TransDiff.semantic(model, labels, references))[1]
    latents = torch.randn(2, 4, 4, 4)
    model(latents, LABELS)
    coarsest = latents.mean((2, 3), keepdim=True).expand_as(latents)
    halved = F.avg_pool2d(latents, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    close(torch.stack(seen), torch.stack([coarsest, coarsest, halved]))


def test_diffusion_alone_knows_the_class():
    """Without AR blocks the loss still reaches the class, and only that of the sample."""
    model = small(ar_depth=0, label_drop=0.0).train()
    model(torch.randn(2, 4, 4, 4), LABELS)["loss"].backward()
    learns = model.ar.class_embed.weight.grad.any(1)
    assert learns.nonzero().flatten().tolist() == sorted(LABELS.tolist())


@pytest.mark.parametrize("changes", [
    {}, {"images": 1}, {"feed": "features"}, {"references": "scales"}])
def test_every_mrar_trains_and_samples(changes):
    """DistributedDataParallel stops at a parameter that requires a gradient and gets none."""
    model = small(mrar=True, **changes).train()
    latents = torch.randn(2, model.config.images_per_sample, 4, 4, 4).squeeze(1)  # no R if 1
    model(latents, LABELS)["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert sample(model.eval()).shape == (2, 4, 4, 4)


def test_only_the_decoder_learns():
    """512 px: the AR transformer is frozen."""
    parameters = small(only_decoder=True).named_parameters()
    assert {name.split(".")[0] for name, p in parameters if p.requires_grad} == {"decoder"}


def test_guidance_zero_is_unconditional():
    """The halves are not swapped."""
    null = torch.full_like(LABELS, SMALL.classes)
    close(sample(small(), cfg=0.0), sample(small(), null, cfg=1.0), 1e-4)


def test_features_are_fed_back():
    """Algorithm 2: each round reads the features so far, and only the last one is decoded."""
    model = small(mrar=True, feed="features", cfg=1.0)
    start = model.ar.start(LABELS)
    h = model.ar(start)
    for _ in range(3):
        h = torch.cat([h, model.ar(torch.cat([start, h], 1))[:, -4:]], 1)
    read = conditions(model)
    sample(model)
    [c] = read
    close(c, h + model.ar.feature_pos)


def test_fusion_alternates_features():
    """Fig. 5: all from one class, or two halves, would make a picture, too."""
    model = small(mrar=True, feed="features", cfg=1.0)
    read = conditions(model)
    other = torch.tensor([0, 4])
    sample(model)
    sample(model, other)
    sample(model, other=other)
    a, b, fused = read
    close(fused[:, ::2], a[:, ::2])
    close(fused[:, 1::2], b[:, 1::2])


def test_fewer_features_are_an_even_choice():
    """Fig. 1: every fourth feature at its own position. Each round of MRAR adds its share."""
    model = small()
    read = conditions(model)
    sample(model)
    sample(model, features=4)
    assert torch.equal(read[1], read[0][:, ::4])
    model = small(mrar=True)
    read = conditions(model)
    sample(model, features=8, rounds=3)
    assert [c.shape[1] for c in read] == [2, 4, 6]


@pytest.mark.parametrize("option,words", [
    ({"features": 17}, "trained for 4 rounds and 16 features"),
    ({"rounds": 5}, "trained for 4 rounds"),
    ({"steps": 0}, "steps must be 1 or more"),
    ({"image_size": 18}, "image_size must be divisible by 4"),
    ({"heads": 5}, "dim must be divisible by heads"),
    ({"images": 3}, "square grid")])
def test_impossible_options_say_why(option, words):
    """One line, not an error from inside the network."""
    with pytest.raises(UserError, match=words):
        sample(small(mrar=True), **option)


def test_dropped_samples_lose_their_label():
    """Only where drop is true."""
    model = small()
    model.semantic = Spy(model.semantic)
    model(torch.randn(2, 4, 4, 4), LABELS, drop=torch.tensor([True, False]))
    [((labels, _), _)] = model.semantic
    assert labels.tolist() == [SMALL.classes, 1]


@pytest.mark.parametrize("times,mean,quartile", [
    ("logit-normal", 0, 0.3375), ("logit-normal", -0.5, 0.2360), ("uniform", 0, 0.25)])
def test_training_times(times, mean, quartile):
    """The released distribution on the grid k/1000, with less noise, and the paper's on no grid."""
    torch.manual_seed(0)
    t = small(times=times, time_mean=mean).draw_times(100_000, "cpu")
    assert abs(t.quantile(0.25) - quartile) < 0.005
    assert (len(t.unique()) <= 1000) == (times == "logit-normal")


def test_similarity():
    """Eq. 15 as a mean: 0 for orthogonal features, 1 for equal and for opposite ones."""
    h = torch.stack([torch.eye(8), torch.ones(8, 8)])
    h[1, 0] = -5
    close(transdiff.similarity(h), torch.tensor([0.0, 1.0]))


def test_previews_and_facts():
    """The last estimate, x_0 = x - t v, is the image. Similarity is that of each image's features,
    without the unconditional half."""
    model = small(solver="euler")
    previews = []
    images, facts = transdiff.generate(model, common.KLVAE(SMALL.vae), LABELS, Noise(0, range(2)),
                                       on_step=previews.append)
    close(previews[-1].clamp(-1, 1), images)
    close(facts["feature_similarity"], transdiff.similarity(model.semantic(LABELS, [])))


# --- Weights from elsewhere -----------------------------------------------------------------------

def official(folder, **content):
    """Write a file in the released layout and return its path."""
    torch.save(content, folder / "checkpoint-last.pth")
    return folder / "checkpoint-last.pth"


def test_load_official_prefers_ema(tmp_path):
    """Half precision beside raw weights and an argparse namespace."""
    ema = {k: v.half() for k, v in Fixture("transdiff_mrar").state.items()}
    path = official(tmp_path, model={}, model_ema=ema, args=argparse.Namespace())
    model = transdiff.load_official(path)
    assert torch.equal(model.ar.null, ema["fake_latent"].float())


@pytest.mark.parametrize("name,words", [
    ("encoder_norm.bias", "Missing.*ar.norm_out.bias"),
    ("class_emb.weight", "not a TransDiff checkpoint")])
def test_load_official_is_strict(tmp_path, name, words):
    """A weight that is missing would stay random."""
    state = Fixture("transdiff_1step").state
    del state[name]
    with pytest.raises(UserError, match=words):
        transdiff.load_official(official(tmp_path, model=state))


def test_weights_are_carried_to_other_shapes():
    """The mask token is repeated. The grid of positions grows: rows stay rows, first to last."""
    mask = small().carry("ar.mask", torch.tensor([[[1.0, 2.0]]]), (1, 3, 2))
    assert mask.tolist() == [[[1, 2]] * 3]
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    grown = small().carry("decoder.pos", rows, (1, 64, 1)).view(8, 8)
    assert (grown.diff(dim=0) > 0).all()
    assert abs(grown.mean() - 1.5) < 0.01


def test_weight_decay():
    """It acts on the matrices and tables of the AR transformer, as released."""
    model = small()
    decayed = {n for n, p in model.named_parameters() if model.decays(n, p)}
    assert {"ar.class_embed.weight", "ar.pos", "ar.blocks.0.mlp.0.weight"} <= decayed
    assert not [n for n in decayed if n.startswith("decoder.") or "bias" in n or "norm" in n]


@pytest.mark.parametrize("size,name,count,lr,epochs,ema,cfg,s1,s2", [
    ("b", "1step", 289_959_184, 8e-4, 800, 0.9999, 1.3, 0.87, 0.91),
    ("l", "1step", 682_519_568, 8e-4, 800, 0.9999, 1.3, 0.89, 0.95),
    ("h", "1step", 1_327_891_216, 8e-4, 800, 0.9999, 1.23, 0.87, 0.93),
    ("l-512", "1step", 683_306_000, 1e-4, 150, 0.999, 1.3, 0.87, 0.87),
    ("b", "mrar", 290_044_432, 5e-5, 40, 0.9999, 1.3, 0.87, 0.91),
    ("l", "mrar", 682_633_232, 5e-5, 40, 0.9999, 1.3, 0.925, 0.95),
    ("h", "mrar", 1_328_033_296, 5e-5, 40, 0.9999, 1.28, 0.87, 0.91)])
def test_published_models(size, name, count, lr, epochs, ema, cfg, s1, s2):
    """Parameters, recipe and sampler of each size in the paper and its released commands."""
    [stage] = [stage for stage in transdiff.STAGES if stage.name == name]
    config = stage.adapt(PRESETS[size])
    with torch.device("meta"):
        assert sum(p.numel() for p in TransDiff(config).parameters()) == count
    r = stage.recipes[size]
    assert (r.lr, r.batch, r.epochs, r.ema) == (lr, 2048, epochs, ema)
    assert (config.cfg, config.drift_scale, config.noise_scale, config.steps) == (cfg, s1, s2, 100)
    assert transdiff.published(config.dim, config.mrar, config.image_size) == config
