"""The same numbers as the released implementations: inputs, weights and outputs from tests/fixtures/*.npz.

PARITY_FIXTURES=FOLDER runs other files of the same names. Sizes and cases come from the files: nothing is fixed here.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import transdiff

FOLDER = Path(os.environ.get("PARITY_FIXTURES", Path(__file__).parent / "fixtures"))


class Fixture:
    """One file: fixture["out/z"] is a tensor, fixture.config the released configuration."""

    def __init__(self, name):
        self.arrays = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
        meta = json.loads(str(self.arrays["meta"]))
        self.config, self.names = meta["config"], meta.get("param_names", [])

    def __contains__(self, key):
        return key in self.arrays.files

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def state(self, prefix="state/"):
        return {k[len(prefix):]: self[k] for k in self.arrays.files if k.startswith(prefix)}

    def keys(self, prefix):
        return [k for k in self.arrays.files if k.startswith(prefix)]


def close(ours, theirs, tolerance=1e-5):
    """Within `tolerance` of the largest magnitude of the released array."""
    assert ours.shape == theirs.shape
    largest = theirs.abs().max().clamp(min=1e-30)
    assert ((ours.detach() - theirs).abs().max() / largest) <= tolerance


class Replay:
    """In place of common.Noise: hands out a fixture's draws, one after another."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def normal(self, shape):
        draw = self.draws.pop(0)
        assert draw.shape[1:] == tuple(shape)
        return draw


# --- KL-VAE -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_vae():
    """The 16-channel architecture: epsilon, asymmetric padding, attention placement, scale."""
    f = Fixture("vae")
    style = f.config["kl16_style"]
    vae = common.vae_from_state({**f.state(), "scale": torch.tensor(f.config["scale"])})
    assert (vae.config.width, vae.config.mult) == (style["ch"], tuple(style["ch_mult"]))
    moments = vae.encode(f["in/image"])
    close(moments, f["out/moments"])
    close(moments.chunk(2, 1)[0], f["out/mode"])
    close(vae.kl(moments), f["out/kl"])
    close(vae.sample(moments, f["in/sample_noise"]), f["out/latent"])
    close(vae.sample(moments, f["in/sample_noise"]) / vae.scale, f["out/sample"])
    close(vae.decode(f["in/z"] * vae.scale), f["out/decoded"])
    close(vae.decode(f["out/latent"]), f["out/reconstruction"])


def test_vae_posterior():
    """Extreme log-variances are clamped."""
    f = Fixture("vae")
    moments = f["in/dist_moments"]
    vae = common.KLVAE(common.VAEConfig(moments.shape[1] // 2, 8, (1,), 1, (), groups=8, scale=1.0))
    mean, std = vae.posterior(moments)
    close(mean, f["out/dist_mean"])
    close(std, f["out/dist_std"])
    close(2 * std.log(), f["out/dist_logvar"])
    close(vae.sample(moments, f["in/dist_noise"]), f["out/dist_sample"])
    close(vae.kl(moments), f["out/dist_kl"])


@torch.no_grad()
@pytest.mark.parametrize("names", ["new", "old"])
def test_vae_diffusers(names):
    """The diffusers layout, with the attention names of today and of the Stable Diffusion 1 files."""
    f = Fixture("vae")
    state = f.state("sd_state/")
    if names == "old":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {k.replace(new, old): v for k, v in state.items()}
    vae = common.vae_from_state(state)
    close(vae.encode(f["in/sd_image"]), f["out/sd_moments"])
    close(vae.encode(f["in/sd_image"]).chunk(2, 1)[0], f["out/sd_mode"])
    close(vae.decode(f["in/sd_z"] * vae.scale), f["out/sd_decoded"])


# --- TransDiff --------------------------------------------------------------------------------------------------------

def model_of(f, **overrides):
    """The fixture's model, without dropout and label drop."""
    return transdiff.from_released(f.state(), heads=f.config["heads"], dropout=0.0, label_drop=0.0,
                                   repeat=f.config["diffusion_batch_mul"], **overrides)


def times(normal):
    return transdiff.logit_normal(normal)


def gradients(model, loss):
    """Gradients under the released names; zeros where none arrives."""
    model.zero_grad()
    loss.backward()
    ours = {k: p.grad if p.grad is not None else torch.zeros_like(p) for k, p in model.named_parameters()}
    return lambda name: ours[next(iter(transdiff.renamed({name: torch.zeros(())})))]


def check_gradients(f, gradient, prefix="out/grad/", norms="out/grad_norms"):
    ours = torch.stack([gradient(name).norm() for name in f.names])
    close(ours, f[norms], 2e-5)
    for key in f.keys(prefix):
        if "_wrt_" not in key:
            theirs = f[key]
            assert (gradient(key[len(prefix):]) - theirs).abs().max() <= 2e-5 * theirs.abs().max() + 1e-7


@torch.no_grad()
def test_transdiff_1step_features():
    f = Fixture("transdiff_1step")
    model = model_of(f)
    h = model.semantic(f["in/labels"], [])
    close(h + model.ar.feature_pos, f["out/z"])
    close(model.semantic(torch.tensor([model.config.classes]), []) + model.ar.feature_pos, f["out/z_uncond"])
    close(transdiff.diversity_term(h), f["out/diversity"])


@torch.no_grad()
def test_transdiff_1step_velocity():
    f = Fixture("transdiff_1step")
    decoder = model_of(f).decoder
    v = decoder(f["in/dec_x"], decoder.modulation(f["in/dec_t"] / 1000), decoder.keys_values(f["in/dec_c"]))
    close(v, f["out/dec_v"])


def sampling(f):
    return dict(steps=f.config["num_sampling_steps"], drift_scale=f.config["scale_0"], noise_scale=f.config["scale_1"])


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_transdiff_1step_samples(way):
    f = Fixture("transdiff_1step")
    model = model_of(f)
    sample = model.sample if way == "fast" else model.sample_plainly
    close(transdiff.time_grid(f.config["num_sampling_steps"], "maruyama"), f["out/t_steps"], 1e-6)
    noise = Replay(f["in/sample_noise"], *f["in/sample_eps"])
    close(sample(f["in/labels"], noise, cfg=f.config["cfg"], **sampling(f)), f["out/sample"], 1e-4)
    noise = Replay(f["in/sample_noise"], *f["in/sample_eps"])
    close(sample(f["in/labels"], noise, cfg=1.0, **sampling(f)), f["out/sample_nocfg"], 1e-4)


def test_transdiff_1step_first_update():
    """One stochastic update of Eq. 18 on its own, where a wrong scale cannot hide."""
    f = Fixture("transdiff_1step")
    model, seen = model_of(f), []
    decoder = model.decoder
    decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.sample(f["in/labels"], Replay(f["in/sample_noise"], *f["in/sample_eps"]), cfg=f.config["cfg"], **sampling(f))
    close(seen[1], f["out/sample_x1"])


def test_transdiff_1step_loss():
    f = Fixture("transdiff_1step")
    model = model_of(f)
    t = times(f["in/train_normal"])
    assert torch.equal((1000 * t).round().long(), f["out/train_timestep"])
    given = dict(eps=f["in/train_noise"][None], t=t[None])
    out = model(f["in/train_latents"], f["in/labels"], **given)
    close(out["loss"], f["out/train_loss"])
    check_gradients(f, gradients(model, out["loss"]))
    if "in/drop_uniform" in f:
        drop = f["in/drop_uniform"] < 0.5
        close(model(f["in/train_latents"], f["in/labels"], drop=drop, **given)["loss"], f["out/train_loss_label_drop"])


def test_transdiff_1step_diversity():
    """The released training term, its weight, and its gradient."""
    f = Fixture("transdiff_1step")
    model = model_of(f, diversity_weight=0.001)
    out = model(f["in/train_latents"], f["in/labels"], eps=f["in/train_noise"][None],
                t=times(f["in/train_normal"])[None])
    close(out["diversity"], f["out/train_diversity"])
    close(out["loss"], f["out/train_loss_with_diversity"])
    check_gradients(f, gradients(model, out["loss"]), norms="out/grad_norms_with_diversity", prefix="none/")
    alone = gradients(model, transdiff.diversity_term(model.semantic(f["in/labels"], [])))
    for key in f.keys("out/grad/diversity_wrt_"):
        close(alone(key.removeprefix("out/grad/diversity_wrt_")), f[key], 2e-5)


def test_transdiff_1step_512():
    """512 px: only the decoder's position table grows."""
    f = Fixture("transdiff_1step")
    state = {**f.state(), "diffdecoder.net.diffusion_pos_embed_learned": f["in/pos512"]}
    model = transdiff.from_released(state, heads=f.config["heads"], dropout=0.0, label_drop=0.0, repeat=1)
    label = f["in/labels"][:1]
    steps = 1 + len(f["in/eps512"])
    out = model.sample(label, Replay(f["in/noise512"], *f["in/eps512"][:, None]), cfg=f.config["cfg"],
                       **{**sampling(f), "steps": steps})
    close(out, f["out/sample512"], 1e-4)
    loss = model(f["in/latents512"], label, eps=f["in/noise512"][None], t=times(f["in/train_normal"][:1])[None])["loss"]
    close(loss, f["out/train_loss512"])


@torch.no_grad()
def test_transdiff_mrar_features():
    """Every prefix of references, one at a time and all at once; patch order; label-free features."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    references = list(f["in/latents"][:, :-1].unbind(1))
    patch = model.config.patch
    tokens = torch.nn.functional.pixel_unshuffle(references[0], patch).flatten(2).transpose(1, 2)
    close(tokens, f["out/ref_tokens"])
    for key in f.keys("out/z_eval_"):
        *_, which, k = key.split("_")
        labels = f["in/labels"] if which == "eval" else torch.full_like(f["in/labels"], model.config.classes)
        close(model.semantic(labels, references[:int(k) - 1]), f[key])
    close(model.semantic(f["in/labels"], references), f["out/z_train"])


@torch.no_grad()
def test_transdiff_mrar_velocity():
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    key = max(f.keys("out/z_eval_3"))
    z = f[key] + model.ar.feature_pos[:, :f[key].shape[1]]
    decoder = model.decoder
    v = decoder(f["in/dec_x"], decoder.modulation(f["in/dec_t"] / 1000), decoder.keys_values(z))
    close(v, f["out/dec_v"])


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_transdiff_mrar_samples(way):
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    sample = model.sample if way == "fast" else model.sample_plainly
    noise = Replay(f["in/sample_noise"], *f["in/sample_eps"].flatten(0, 1))
    close(sample(f["in/labels"], noise, cfg=f.config["cfg"], **sampling(f)), f["out/sample"], 1e-4)
    noise = Replay(f["in/sample_noise"], *f["in/sample_eps"].flatten(0, 1))
    close(sample(f["in/labels"], noise, cfg=1.0, **sampling(f)), f["out/sample_nocfg"], 1e-4)


def test_transdiff_mrar_rounds():
    """Each round's image, not only the last."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    for r, image in enumerate(f["out/sample_rounds"]):
        noise = Replay(f["in/sample_noise"], *f["in/sample_eps"].flatten(0, 1))
        close(model.sample(f["in/labels"], noise, cfg=f.config["cfg"], rounds=r + 1, **sampling(f)), image, 1e-4)


def test_transdiff_mrar_loss():
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    t = times(f["in/train_normal"])
    assert torch.equal((1000 * t).round().long(), f["out/train_timestep"])
    out = model(f["in/latents"], f["in/labels"], eps=f["in/train_noise"], t=t)
    close(torch.stack([out[f"flow_{r}"] for r in range(len(t))]), f["out/train_losses"])
    close(out["loss"], f["out/train_loss"])
    check_gradients(f, gradients(model, out["loss"]))
    drop = f["in/drop_uniform"] < 0.5
    out = model(f["in/latents"], f["in/labels"], drop=drop, eps=f["in/train_noise"], t=t)
    close(out["loss"], f["out/train_loss_label_drop"])
