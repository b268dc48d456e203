"""TransDiff beyond parity: samplers against closed forms, fast ways against plain ones, and what each option means."""
import argparse
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from compare import first_difference

import common
import transdiff
from common import Noise, UserError
from transdiff import Config, TransDiff

SMALL = Config(image_size=16, classes=5, dim=32, heads=2, ar_depth=2, depth=2, class_tokens=4, features=16, dropout=0.0,
               steps=4, vae=common.VAEConfig(channels=4, width=8, mult=(1, 2, 2), blocks=1, attention=(), groups=4))


def small(**changes):
    """A small model whose every weight matters (the released initialisation has zeros)."""
    torch.manual_seed(0)
    model = TransDiff(dataclasses.replace(SMALL, **changes)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def assert_same(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- Samplers against closed forms ------------------------------------------------------------------------------------

class Exact(torch.nn.Module):
    """Stands in for the decoder: a velocity v(x, t) in closed form, times handed through as the modulation."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def modulation(self, t):
        return t[:, None], t[:, None, None]

    def forward(self, x, modulation, keys_values):
        return self.velocity(x, modulation[0][0])


def run_exact(velocity, shape, steps, solver, seed=0):
    model = small()
    model.decoder = Exact(velocity)
    noise = Noise.of(seed, range(shape[0]))
    ts = transdiff.time_grid(steps, solver)
    return model.denoise(noise.normal(shape[1:]), ts, [], [1.0] * steps, noise, solver, 1.0, 1.0)


@pytest.mark.parametrize("mrar", [False, True])
def test_compiled_sampling_is_eager_sampling(traced, mrar):
    """One graph with guidance and one without, for all steps (and rounds, whose features grow in number)."""
    model, labels = small(mrar=mrar), torch.tensor([0, 1, 2])
    how = dict(cfg=2.0, steps=6, interval=(0.3, 0.8))
    eager = model.sample(labels, Noise.of(0, range(3)), **how)
    transdiff.compile_steps(model, None)
    for _ in range(2):
        assert_same(model.sample(labels, Noise.of(0, range(3)), **how), eager)
    assert len(traced) <= (4 if mrar else 2)


def test_euler_is_exact_on_straight_paths():
    """From any noise, v = eps - x lands on x in any number of steps; a wrong sign, order or step size misses it."""
    target = torch.randn(16, 4)
    for steps in (1, 7):
        out = run_exact(lambda x, t: (x - target) / t, (3, 16, 4), steps, "euler")
        torch.testing.assert_close(out, target.expand(3, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "maruyama"])
@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (1.5, 0.5), (-1.0, 2.0)])
def test_a_gaussian_keeps_its_mean_and_variance(solver, mean, std):
    """Data N(mean, std^2) has a known velocity. A wrong score, noise strength or drift ends with another variance."""
    def velocity(x, t):  # E[eps - x_0 | x_t]
        variance = ((1 - t) * std) ** 2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    out = run_exact(velocity, (64, 256, 4), 400, solver)
    assert abs(out.mean() - mean) < 0.03 * max(1, std)
    assert abs(out.std() / std - 1) < 0.03


def test_drift_is_equation_16():
    """The closed form x + (2 - t) v is v - sigma^2 / 2 * score with sigma^2 = 2 t and the score of the path."""
    x, v = torch.randn(2, 100, dtype=torch.float64)
    for t in (1.0, 0.3, 0.04):
        score = -(x + (1 - t) * v) / (t**2 + (1 - t) * t)
        torch.testing.assert_close(x + (2 - t) * v, v - t * score)


def test_one_maruyama_step_has_the_two_scales():
    """Eq. 18 by hand: s1 on the drift, s2 on the noise; the last step has neither."""
    model = small()
    model.decoder = Exact(lambda x, t: 0 * x)  # then the drift is x
    x, eps = torch.ones(1, 16, 4), torch.ones(1, 16, 4)

    class Ones:
        def normal(self, shape):
            return eps

    ts = torch.tensor([1.0, 0.5, 0.0])
    out = model.denoise(x, ts, [], [1.0, 1.0], Ones(), "maruyama", 0.8, 0.3)
    first = 1 - 0.8 * 0.5 + 0.3 * math.sqrt(2 * 0.5)
    torch.testing.assert_close(out, torch.full_like(out, first - 0.5 * first))


# --- Fast ways against plain ones -------------------------------------------------------------------------------------

@pytest.mark.parametrize("mrar", [False, True])
def test_fast_sampling_is_plain_sampling(mrar):
    """Hoisted keys, shared rows, cached blocks and the closed-form drift change nothing; labels repeat and mix."""
    model, labels = small(mrar=mrar), torch.tensor([3, 1, 3, 0])
    how = dict(cfg=1.7, steps=4, drift_scale=0.9, noise_scale=0.8)
    fast = model.sample(labels, Noise.of(0, range(4)), **how)
    plain = model.sample_plainly(labels, Noise.of(0, range(4)), **how)
    assert_same(fast, plain, 1e-4)


def test_block_causal_attention_is_masked_attention():
    """The loop over blocks gives what a dense mask 'block of j <= block of i' gives."""
    model = small(mrar=True)
    c = model.config
    attention = model.ar.blocks[0].attn
    x = torch.randn(2, c.class_tokens + c.features, c.dim)
    block = torch.cat([torch.zeros(c.class_tokens), 1 + torch.arange(c.features) // c.block])
    mask = block[:, None] >= block[None, :]
    q, k, v = attention.qkv(x).unflatten(2, (3, c.heads, -1)).permute(2, 0, 3, 1, 4)
    dense = attention.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    ours = attention(x, range(c.class_tokens, x.shape[1] + 1, c.block))[0]
    assert_same(ours, dense)


def test_cached_features_are_uncached_features():
    """Round by round with keys and values kept, and the whole prefix at once."""
    model = small(mrar=True)
    labels, references = torch.tensor([0, 4]), [torch.randn(2, 4, 4, 4) for _ in range(3)]
    h, past = model.ar(model.ar.start(labels))
    for reference in references:
        new, past = model.ar(model.ar.reference(reference), past)
        h = torch.cat([h, new], 1)
    assert_same(h, model.semantic(labels, references))


def test_later_references_do_not_change_earlier_features():
    model = small(mrar=True)
    labels, references = torch.tensor([2]), [torch.randn(1, 4, 4, 4) for _ in range(3)]
    before = model.semantic(labels, references)
    references[2] = torch.randn(1, 4, 4, 4)
    after, block = model.semantic(labels, references), model.config.block
    assert torch.equal(before[:, :3 * block], after[:, :3 * block])
    assert not torch.allclose(before[:, 3 * block:], after[:, 3 * block:])


@pytest.mark.parametrize("mrar", [False, True])
def test_an_image_does_not_depend_on_its_batch(mrar):
    model, labels = small(mrar=mrar), torch.tensor([0, 1, 2, 3, 1, 0])
    together = model.sample(labels, Noise.of(5, range(6)), cfg=2.0)
    for k in (0, 3, 5):
        alone = model.sample(labels[k:k + 1], Noise.of(5, [k]), cfg=2.0)
        assert_same(alone, together[k:k + 1], 1e-4)


def test_the_repeated_loss_is_the_loss_of_a_larger_batch():
    """m copies share keys and values; without dropout that is the loss of m batches with the same draws."""
    model, one = small(repeat=3), small(repeat=1)
    latents, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    eps, t = torch.randn(1, 6, 16, 4), torch.rand(1, 6)
    losses = [one(latents, labels, eps=eps[:, 2 * i:2 * i + 2], t=t[:, 2 * i:2 * i + 2])["loss"] for i in range(3)]
    assert_same(model(latents, labels, eps=eps, t=t)["loss"], torch.stack(losses).mean())


def test_gradients_of_micro_batches_are_those_of_the_large_batch():
    """Accumulation as train.py does it: a mean over micro-batches."""
    model = small(repeat=1)
    latents, labels, drop = torch.randn(6, 4, 4, 4), torch.arange(6) % 5, torch.tensor([1, 0, 0, 0, 1, 0]).bool()
    eps, t = torch.randn(1, 6, 16, 4), torch.rand(1, 6)
    model(latents, labels, drop=drop, eps=eps, t=t)["loss"].backward()
    large = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        (model(latents[part], labels[part], drop=drop[part], eps=eps[:, part], t=t[:, part])["loss"] / 3).backward()
    for a, b in zip(large, (p.grad for p in model.parameters() if p.grad is not None)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- What the options mean --------------------------------------------------------------------------------------------

def test_guidance_one_is_off_and_zero_is_unconditional():
    model, labels = small(), torch.tensor([1, 2])
    null = torch.full_like(labels, model.config.classes)

    def sample(labels, **how):
        return model.sample(labels, Noise.of(0, range(2)), **how)

    assert_same(sample(labels, cfg=0.0), sample(null, cfg=1.0), 1e-4)
    assert_same(sample(labels, cfg=(1.0, 1.0)), sample(labels, cfg=1.0))
    assert_same(sample(labels, cfg=3.0, interval=(2.0, 3.0)), sample(labels, cfg=1.0))
    assert not torch.allclose(sample(labels, cfg=3.0), sample(labels, cfg=1.0))
    assert not torch.allclose(sample(labels, cfg=(1.0, 3.0)), sample(labels, cfg=(3.0, 1.0)))


def test_guidance_may_differ_by_round():
    model, labels = small(mrar=True), torch.tensor([1])
    a = model.sample(labels, Noise.of(0, [0]), cfg=[2.0, 2.0, 2.0, 2.0])
    assert_same(a, model.sample(labels, Noise.of(0, [0]), cfg=2.0))
    b = model.sample(labels, Noise.of(0, [0]), cfg=[1.0, 2.0, 2.0, 2.0])
    assert not torch.allclose(a, b)  # an unguided first round changes what the last one refers to


def test_feeding_features_decodes_once():
    """Algorithm 2: the decoder runs for the last round only, on all features; training rolls the same sequence out."""
    model, labels, seen = small(mrar=True, feed="features"), torch.tensor([1, 4]), []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[2][0][0].shape[2]))
    model.sample(labels, Noise.of(0, range(2)), cfg=1.0, steps=3)
    assert seen == [model.config.features] * 3
    h = model.semantic(labels, [None] * 3)
    assert_same(model.last_features, h)
    out = model(torch.randn(2, 4, 4, 4, 4), labels)
    out["loss"].backward()
    assert model.ar.mask.grad.abs().sum() > 0


@pytest.mark.parametrize("mrar", [False, True])
def test_fusing_a_class_with_itself_changes_nothing(mrar):
    model, labels = small(mrar=mrar), torch.tensor([1, 2])
    other = torch.tensor([3, 0])

    def sample(labels, fuse=None):
        return model.sample(labels, Noise.of(0, range(2)), cfg=1.5, fuse=fuse)

    assert_same(sample(labels, labels), sample(labels), 1e-4)
    assert not torch.allclose(sample(labels, other), sample(labels))
    assert not torch.allclose(sample(labels, other), sample(other, labels))


def test_fewer_features_are_an_even_choice():
    model, labels, seen = small(), torch.tensor([1]), []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[2][0][0]))
    all_of_them = model.sample(labels, Noise.of(0, [0]), cfg=1.0, steps=1)
    some = model.sample(labels, Noise.of(0, [0]), cfg=1.0, steps=1, features=4)
    assert torch.equal(seen[1], seen[0][:, :, ::4])
    assert not torch.allclose(some, all_of_them)
    assert_same(model.sample(labels, Noise.of(0, [0]), cfg=1.0, steps=1, features=16), all_of_them)
    with pytest.raises(UserError, match="16 features"):
        model.sample(labels, Noise.of(0, [0]), features=17)


def test_label_drop_replaces_the_class_by_the_null_embedding():
    model = small()
    labels = torch.tensor([1, 2])
    h = model.semantic(labels, [], drop=torch.tensor([True, False]))
    assert_same(h[:1], model.semantic(torch.tensor([5]), []))
    assert_same(h[1:], model.semantic(labels[1:], []))


def test_training_times():
    """Logit-normal lies on k/1000 with the median 1/2; uniform does not and has the quartiles 1/4 and 3/4."""
    torch.manual_seed(0)
    released, paper = (TransDiff(dataclasses.replace(SMALL, times=kind)).draw_times(100_000, "cpu")
                       for kind in ("logit-normal", "uniform"))
    torch.testing.assert_close(1000 * released, (1000 * released).round(), rtol=0, atol=1e-3)
    assert released.max() < 1 and abs(released.median() - 0.5) < 0.01
    assert abs((released < 0.2689).float().mean() - 0.1587) < 0.01  # sigmoid(-1) and the normal distribution at -1
    for share in (0.25, 0.75):
        assert abs(paper.quantile(share) - share) < 0.01


def test_diversity():
    """Eq. 15 as a mean: 0 for orthogonal features, 1 for equal or opposite ones; the training term is signed."""
    eye = torch.eye(8)[None]
    both = torch.cat([eye, 5 * torch.ones_like(eye)])
    torch.testing.assert_close(transdiff.diversity(both), torch.tensor([0.0, 1.0]))
    opposite = torch.tensor([[[1.0, 0], [-2.0, 0]]])
    assert transdiff.diversity(opposite) == 1 and transdiff.diversity_term(opposite) == 0
    a = F.normalize(torch.randn(2, 8, 6), dim=-1)
    torch.testing.assert_close(transdiff.diversity_term(a), (a @ a.transpose(1, 2)).mean())


def test_impossible_configurations_say_why():
    for change, words in ((dict(image_size=18), "divisible"), (dict(heads=5), "heads"), (dict(times="never"), "times"),
                          (dict(mrar=True, features=20), "square")):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(SMALL, **change)


# --- Weights from elsewhere -------------------------------------------------------------------------------------------

def released_state(model):
    """Our weights under the released names: the renaming, turned round by trial."""
    names = ["fake_latent", "mask_token", "encoder_pos_embed_learned", "diffusion_pos_embed_learned"]
    names += ["class_emb.weight"]
    names += [f"{n}.{w}" for n in ("z_proj", "z_proj_ln", "encoder_norm") for w in ("weight", "bias")]
    names += [f"encoder_blocks.{i}.{n}.{w}" for i in range(model.config.ar_depth) for w in ("weight", "bias")
              for n in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    net = ["diffusion_pos_embed_learned", "final_layer.scale_shift_table"]
    net += [f"{n}.{w}" for w in ("weight", "bias") for n in (
        "time_embed.time_embedder.linear_1", "time_embed.time_embedder.linear_2", "time_embed.time_proj", "cond_embed",
        "input_proj", "final_layer.linear")]
    net += [f"res_blocks.{i}.scale_shift_table" for i in range(model.config.depth)]
    net += [f"res_blocks.{i}.{n}.{w}" for i in range(model.config.depth) for w in ("weight", "bias")
            for n in ("norm1", "norm2", "norm3", "attn1.qkv", "attn1.proj", "attn2.wq", "attn2.wk", "attn2.wv",
                      "attn2.proj", "mlp.fc1", "mlp.fc2")]
    names += [f"diffdecoder.net.{n}" for n in net]
    ours = model.state_dict()
    return {name: ours[next(iter(transdiff.renamed({name: torch.zeros(())})))].clone() for name in names}


def official(tmp_path, **content):
    """A file with this content."""
    torch.save(content, tmp_path / "checkpoint-last.pth")
    return tmp_path / "checkpoint-last.pth"


@pytest.mark.parametrize("mrar", [False, True])
def test_load_official_prefers_ema_and_reads_the_shapes(tmp_path, mrar):
    """A released file: EMA beside the raw weights, half precision, an argparse namespace; config from the shapes."""
    model, vae = small(mrar=mrar), SMALL.vae
    raw = {k: torch.zeros_like(v) for k, v in released_state(model).items()}
    path = official(tmp_path, model=raw, model_ema=released_state(model), args=argparse.Namespace(lr=1), epoch=3)
    loaded = transdiff.load_official(path, heads=2, vae=vae, image_size=16, dropout=0.0)
    for field in ("dim", "ar_depth", "depth", "class_tokens", "features", "mrar", "classes", "images"):
        assert getattr(loaded.config, field) == getattr(model.config, field), field
    shape = (1, 4, 4, 4, 4) if mrar else (1, 4, 4, 4)
    assert first_difference(loaded.ar, model.ar, model.ar.start(torch.tensor([1]))) is None
    eps, t = torch.randn(4 if mrar else 1, 4, 16, 4), torch.rand(4 if mrar else 1, 4)
    x = torch.randn(shape)
    assert_same(loaded(x, torch.tensor([1]), eps=eps, t=t)["loss"], model(x, torch.tensor([1]), eps=eps, t=t)["loss"])


def test_load_official_is_strict(tmp_path):
    state = released_state(small())
    for change, words in ((lambda s: s.pop("encoder_norm.bias"), "missing ar.norm_out.bias"),
                          (lambda s: s.update(extra=torch.zeros(1)), "unknown extra"),
                          (lambda s: s.update({"encoder_norm.bias": torch.zeros(3)}), r"ar.norm_out.bias is \(3,\)"),
                          (lambda s: s.pop("fake_latent"), "not a TransDiff checkpoint")):
        broken = dict(state)
        change(broken)
        with pytest.raises(UserError, match=words):
            transdiff.load_official(official(tmp_path, model=broken), heads=2, vae=SMALL.vae, image_size=16)


def test_weights_that_change_shape_are_carried():
    """1-step to MRAR: the mask token is repeated. 256 to 512 px: the position grid is resampled, not scrambled."""
    mask = torch.randn(1, 1, 8)
    assert torch.equal(transdiff.carry("ar.mask", mask, torch.Size([1, 4, 8])), mask.repeat(1, 4, 1))
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    table = torch.stack([y, x], -1).reshape(1, 16, 2)  # position (y, x) as its own embedding
    grown = transdiff.carry("decoder.pos", table, torch.Size([1, 64, 2])).view(8, 8, 2)
    assert abs(grown[..., 0].mean() - 1.5) < 0.05
    assert (grown[1:, :, 0] > grown[:-1, :, 0]).all() and (grown[:, 1:, 1] > grown[:, :-1, 1]).all()
    torch.testing.assert_close(grown[..., 0], grown[..., 1].T)
    assert transdiff.carry("ar.ref_proj.weight", torch.randn(8, 4), torch.Size([8, 16])) is None


def test_published_sizes():
    """The exact parameter counts of the released models, and which parameters weight decay acts on."""
    counts = {("b", False): 289_959_184, ("b", True): 290_044_432, ("l", False): 682_519_568, ("l", True): 682_633_232,
              ("h", False): 1_327_891_216, ("h", True): 1_328_033_296, ("l-512", False): 683_306_000}
    for (size, mrar), count in counts.items():
        with torch.device("meta"):
            model = TransDiff(dataclasses.replace(transdiff.PRESETS[size], mrar=mrar))
        assert sum(p.numel() for p in model.parameters()) == count
    decayed = {n for n, p in model.named_parameters() if transdiff.decays(n, p)}
    assert {"ar.class_embed.weight", "ar.null", "ar.mask", "ar.pos", "ar.feature_pos"} <= decayed
    assert not any(n.startswith("decoder.") or n.endswith(".bias") or "norm" in n for n in decayed)


def test_the_comparer_names_the_layer():
    a = small()
    b = copy.deepcopy(a)
    labels = torch.tensor([0, 1])
    assert first_difference(a.ar, b.ar, a.ar.start(labels)) is None
    b.ar.blocks[1].mlp[0].weight.data += 0.1
    assert first_difference(a.ar, b.ar, a.ar.start(labels))[0] == "blocks.1.mlp.0"
