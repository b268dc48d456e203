"""The same numbers as the released implementations: inputs, weights and outputs from
tests/fixtures/*.npz.

PARITY_FIXTURES=FOLDER runs other files of the same names. Sizes and cases come from the files.
"""
import dataclasses
import json
import math
import os
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import plain
import pytest
import torch

import common
import dar
import fid
import madformer
import transdiff

FOLDER = Path(os.environ.get("PARITY_FIXTURES", Path(__file__).parent / "fixtures"))


class Fixture:
    """One file: fixture["out/z"] is a tensor, fixture.config the released configuration."""

    def __init__(self, name):
        self.arrays = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
        self.meta = json.loads(str(self.arrays["meta"]))
        self.config = self.meta.get("config")
        self.names = self.meta.get("param_names", [])

    def __contains__(self, key):
        return key in self.arrays.files

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def state(self, prefix="state/"):
        return {k[len(prefix):]: self[k] for k in self.arrays.files if k.startswith(prefix)}

    def keys(self, prefix):
        return [k for k in self.arrays.files if k.startswith(prefix)]


def close(ours, theirs, tolerance=1e-5):
    """Assert that ours is within `tolerance` of the largest magnitude of the released array."""
    assert ours.shape == theirs.shape
    largest = theirs.abs().max().clamp(min=1e-30)
    assert (ours.detach() - theirs).abs().max() / largest <= tolerance


class Replay:
    """Hands out given draws, one after another, in place of common.Noise."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def normal(self, shape):
        draw = self.draws.pop(0)
        assert draw.shape[1:] == tuple(shape)
        return draw


# --- KL-VAE ---------------------------------------------------------------------------------------

@torch.no_grad()
def test_vae():
    """The 16-channel architecture: epsilon, asymmetric padding, attention placement, scale."""
    f = Fixture("vae")
    style = f.config["kl16_style"]
    vae = common.vae_from_state({**f.state(), "scale": torch.tensor(f.config["scale"])})
    assert vae.config.width == style["ch"]
    assert vae.config.mult == tuple(style["ch_mult"])
    moments = vae.encode(f["in/image"])
    close(moments, f["out/moments"])
    close(moments.chunk(2, 1)[0], f["out/mode"])
    close(vae.kl(moments), f["out/kl"])
    latents = vae.codes(moments, f["in/sample_noise"])
    close(latents, f["out/latent"])
    close(latents / vae.scale, f["out/sample"])
    close(vae.decode(f["in/z"] * vae.scale), f["out/decoded"])
    close(vae.decode(f["out/latent"]), f["out/reconstruction"])


def test_vae_posterior():
    """Extreme log-variances are clamped."""
    f = Fixture("vae")
    moments = f["in/dist_moments"]
    channels = moments.shape[1] // 2
    vae = common.KLVAE(dataclasses.replace(common.TINY_VAE, channels=channels, scale=1.0))
    mean, std = vae.posterior(moments)
    close(mean, f["out/dist_mean"])
    close(std, f["out/dist_std"])
    close(2 * std.log(), f["out/dist_logvar"])
    close(vae.codes(moments, f["in/dist_noise"]), f["out/dist_sample"])
    close(vae.kl(moments), f["out/dist_kl"])


@torch.no_grad()
@pytest.mark.parametrize("names", ["new", "old"])
def test_vae_diffusers(names):
    """The diffusers layout, with today's attention names and those of the Stable Diffusion 1 files.
    """
    f = Fixture("vae")
    state = f.state("sd_state/")
    if names == "old":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                         (r"to_out\.0", "proj_attn")):
            state = common.renamed(state, f"{new} -> {old}")
    vae = common.vae_from_state(state)
    moments = vae.encode(f["in/sd_image"])
    close(moments, f["out/sd_moments"])
    close(moments.chunk(2, 1)[0], f["out/sd_mode"])
    close(vae.decode(f["in/sd_z"] * vae.scale), f["out/sd_decoded"])


# --- TransDiff ------------------------------------------------------------------------------------

def model_of(f):
    """Return the fixture's model, in evaluation mode: without dropout and label drop."""
    return transdiff.from_released(f.state(), heads=f.config["heads"],
                                   repeat=f.config["diffusion_batch_mul"])


def check_gradients(f, model, loss):
    """Compare the norms of all gradients, and the few gradients that are stored. Where none arrives
    it is zero."""
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {}
    for released in f.names:
        [name] = common.renamed({released: torch.zeros(())}, transdiff.RELEASED)
        p = parameters[name]
        gradients[released] = torch.zeros_like(p) if p.grad is None else p.grad
    norms = torch.stack([gradient.norm() for gradient in gradients.values()])
    close(norms, f["out/grad_norms"], 2e-5)
    for key in f.keys("out/grad/"):
        if "_wrt_" not in key:
            gap = (gradients[key.removeprefix("out/grad/")] - f[key]).abs().max()
            assert gap <= 2e-5 * f[key].abs().max() + 1e-7


def transdiff_sample(f, model, way="fast", **changes):
    """Return the latents of the fixture's labels, noise and sampler settings."""
    options = dict(cfg=f.config["cfg"], steps=f.config["num_sampling_steps"],
                   drift_scale=f.config["scale_0"], noise_scale=f.config["scale_1"])
    options.update(changes)
    noise = Replay(f["in/sample_noise"], *f["in/sample_eps"].flatten(0, -4))
    if way == "plain":
        return plain.transdiff_sample(model, f["in/labels"], noise, **options)
    return model.sample(f["in/labels"], noise, **options)[0]


@torch.no_grad()
def test_transdiff_1step_features():
    """With and without label: class tokens, positions, norms, qkv layout, exact GELU."""
    f = Fixture("transdiff_1step")
    model = model_of(f)
    null = torch.tensor([model.config.classes])
    close(model.semantic(f["in/labels"], []) + model.ar.feature_pos, f["out/z"])
    close(model.semantic(null, []) + model.ar.feature_pos, f["out/z_uncond"])


@torch.no_grad()
def test_transdiff_1step_velocity():
    """Time embedding, order of the AdaLN vectors, cross-attention between the modulated parts."""
    f = Fixture("transdiff_1step")
    decoder = model_of(f).decoder
    modulation = decoder.modulation(f["in/dec_t"] / 1000)
    close(decoder(f["in/dec_x"], modulation, decoder.keys_values(f["in/dec_c"])), f["out/dec_v"])


def test_transdiff_1step_times():
    """The sampler's grid, and the floored times of training."""
    f = Fixture("transdiff_1step")
    close(transdiff.time_grid(f.config["num_sampling_steps"], "maruyama"), f["out/t_steps"], 1e-6)
    k = 1000 * transdiff.logit_normal(f["in/train_normal"])
    assert torch.equal(k.round().long(), f["out/train_timestep"])


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_transdiff_1step_samples(way):
    """The whole sampler, with and without guidance."""
    f = Fixture("transdiff_1step")
    model = model_of(f)
    close(transdiff_sample(f, model, way), f["out/sample"], 1e-4)
    close(transdiff_sample(f, model, way, cfg=1.0), f["out/sample_nocfg"], 1e-4)


def test_transdiff_1step_first_update():
    """One stochastic update of Eq. 18 on its own, where a wrong scale cannot hide."""
    f = Fixture("transdiff_1step")
    model = model_of(f)
    inputs = []
    model.decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    transdiff_sample(f, model)
    close(inputs[1], f["out/sample_x1"])


def test_transdiff_1step_loss():
    """The loss on given draws, with and without label drop, and every gradient."""
    f = Fixture("transdiff_1step")
    model = model_of(f)
    t = transdiff.logit_normal(f["in/train_normal"])[None]
    draws = dict(eps=f["in/train_noise"][None], t=t)
    loss = model(f["in/train_latents"], f["in/labels"], **draws)["loss"]
    close(loss, f["out/train_loss"])
    check_gradients(f, model, loss)
    if "in/drop_uniform" in f:
        drop = f["in/drop_uniform"] < 0.5
        loss = model(f["in/train_latents"], f["in/labels"], drop=drop, **draws)["loss"]
        close(loss, f["out/train_loss_label_drop"])


def test_transdiff_1step_512(monkeypatch):
    """512 px: only the decoder's position table grows. The file has fewer steps than we allow."""
    f = Fixture("transdiff_1step")
    state = {**f.state(), "diffdecoder.net.diffusion_pos_embed_learned": f["in/pos512"]}
    model = transdiff.from_released(state, heads=f.config["heads"], repeat=1)
    steps = 1 + len(f["in/eps512"])
    grid = torch.cat([torch.linspace(1, 0.04, steps), torch.zeros(1)])
    monkeypatch.setattr(transdiff, "time_grid", lambda *args: grid)
    label = f["in/labels"][:1]
    noise = Replay(f["in/noise512"], *f["in/eps512"][:, None])
    x, _ = model.sample(label, noise, cfg=f.config["cfg"], steps=steps,
                        drift_scale=f.config["scale_0"], noise_scale=f.config["scale_1"])
    close(x, f["out/sample512"], 1e-4)
    t = transdiff.logit_normal(f["in/train_normal"][:1])[None]
    loss = model(f["in/latents512"], label, eps=f["in/noise512"][None], t=t)["loss"]
    close(loss, f["out/train_loss512"])


@torch.no_grad()
def test_transdiff_mrar_patches():
    """Inside a reference's patch the values are channel-major."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    model.ar.ref_proj = torch.nn.Identity()
    close(model.ar.reference(f["in/latents"][:, 0]), f["out/ref_tokens"])


@torch.no_grad()
def test_transdiff_mrar_features():
    """Every number of references, with and without label."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    references = list(f["in/latents"][:, :-1].unbind(1))
    null = torch.full_like(f["in/labels"], model.config.classes)
    for key in f.keys("out/z_eval_"):
        labels = null if "uncond" in key else f["in/labels"]
        close(model.semantic(labels, references[:int(key[-1]) - 1]), f[key])
    close(model.semantic(f["in/labels"], references), f["out/z_train"])


@torch.no_grad()
def test_transdiff_mrar_velocity():
    """The decoder on the features of the first three images."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    h = f["out/z_eval_3"]
    keys_values = model.decoder.keys_values(h + model.ar.feature_pos[:, :h.shape[1]])
    modulation = model.decoder.modulation(f["in/dec_t"] / 1000)
    close(model.decoder(f["in/dec_x"], modulation, keys_values), f["out/dec_v"])


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_transdiff_mrar_samples(way):
    """All rounds, with and without guidance: the same start, references in both halves."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    close(transdiff_sample(f, model, way), f["out/sample"], 1e-4)
    close(transdiff_sample(f, model, way, cfg=1.0), f["out/sample_nocfg"], 1e-4)


def test_transdiff_mrar_rounds():
    """Each round's image, not only the last."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    for r, image in enumerate(f["out/sample_rounds"]):
        close(transdiff_sample(f, model, rounds=r + 1), image, 1e-4)


def test_transdiff_mrar_loss():
    """Each round's loss on the features it may use, their mean, label drop and every gradient."""
    f = Fixture("transdiff_mrar")
    model = model_of(f)
    t = transdiff.logit_normal(f["in/train_normal"])
    assert torch.equal((1000 * t).round().long(), f["out/train_timestep"])
    out = model(f["in/latents"], f["in/labels"], eps=f["in/train_noise"], t=t)
    close(torch.stack([out[f"flow_{r}"] for r in range(len(t))]), f["out/train_losses"])
    close(out["loss"], f["out/train_loss"])
    check_gradients(f, model, out["loss"])
    drop = f["in/drop_uniform"] < 0.5
    out = model(f["in/latents"], f["in/labels"], drop=drop, eps=f["in/train_noise"], t=t)
    close(out["loss"], f["out/train_loss_label_drop"])


# --- D-AR -----------------------------------------------------------------------------------------

def made(f, name):
    """A tensor that was too large to store, by the file's recipe; checked against its probe."""
    recipe = f.meta["recipe"]
    about = recipe["parameters"].get(name) or recipe["target"]
    rng = np.random.default_rng(zlib.crc32((recipe["salt"] + name).encode()))
    value = rng.standard_normal(about["shape"]) * about["scale"]
    value = (np.abs(value) if about["abs"] else value).astype(np.float32)
    probe = [*value.ravel()[:3], np.abs(value.astype(np.float64)).sum()]
    assert np.allclose(probe, about["probe_first3_and_abssum"], rtol=1e-6)
    return torch.from_numpy(value)


def state_of_tokenizer(f):
    return {**f.state(), **{name: made(f, name) for name in f.meta["recipe"]["parameters"]}}


def tokenizer_of(f):
    size = f.meta["image_size"]
    return dar.tokenizer_from_released(state_of_tokenizer(f), f.config, image_size=size)


def lpips(x, y, dropout=0.0):
    """LPIPS with the fixture's weights, in the precision of the images."""
    f = Fixture("lpips")
    state = {name: made(f, name).to(x.dtype) for name in f.meta["recipe"]["parameters"]}
    return dar.lpips_parts(state, state, x, y, dropout)


def our_name(name):
    return next(iter(dar.with_our_names({name: torch.zeros(())})))


@torch.no_grad()
def test_dar_tokenizer_codes():
    """Encoder, mask, rotations, normalised codebook, causal layers; the codes exactly."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    features = tokenizer.features(f["in/x"])
    close(features, f["out/enc_tokens"])
    close(tokenizer.to_code(features), f["out/z_pre"])
    codes = tokenizer.codes(tokenizer.encode(f["in/x"]))
    assert torch.equal(codes, f["out/codes"])
    close(tokenizer.quantizer.codewords()[codes], f["out/zq"])
    close(tokenizer.condition(f["out/zq"]), f["out/cond"])


@pytest.mark.parametrize("form", ["training", "no ema", "bare"])
def test_dar_tokenizer_files(tmp_path, monkeypatch, form):
    """EMA is preferred, the pickled configuration is read as data, overrides take its place."""
    f = Fixture("dar_tokenizer")
    state, expected = state_of_tokenizer(f), tokenizer_of(f).config
    monkeypatch.setitem(sys.modules, "config_util", types.ModuleType("config_util"))
    exec("class Config: pass", sys.modules["config_util"].__dict__)
    config = sys.modules["config_util"].Config()
    config._data = {"model": f.config}
    other = {f"_orig_mod.{name}": value + 1 for name, value in state.items()}
    content = {"training": {"model": other, "ema": state, "config": config},
               "no ema": {"model": state, "config": config}, "bare": state}[form]
    torch.save(content, tmp_path / "x.pt")
    overrides = vars(expected) if form == "bare" else dict(image_size=expected.image_size)
    tokenizer = dar.load_official(tmp_path / "x.pt", **overrides)
    assert tokenizer.config == expected
    assert torch.equal(tokenizer.encode(f["in/x"]).long(), f["out/codes"])


def previews_of(tokenizer, codes, noise, **options):
    """The image after 0 .. steps steps, not clamped."""
    decoding = dar.Decoding(tokenizer, noise, **options)
    images = [decoding.image]
    decoding.on_step = lambda clamped: images.append(decoding.image)
    with torch.no_grad():
        decoding.take(codes)
    return images


def test_dar_tokenizer_pictures():
    """All solvers and numbers of steps, the released previews, and the paper's jump estimates."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    solver = {"adams2": "adams", "euler": "euler"}
    for run in f.meta["runs"]:
        n, steps = run["batch"], run["steps"]
        codes, noise = f["out/codes"][:n], f["in/decode_noise"][:n]
        options = dict(steps=steps, solver=solver[run["method"]])
        k = steps if run["clip"] is None else run["clip"]
        close(previews_of(tokenizer, codes, noise, **options)[k], f[f"out/{run['name']}"], 1e-4)
        ends = [0, *dar.Decoding(tokenizer, noise, **options).ends, math.inf]
        if ends[k] < ends[k + 1]:  # the same from the first tokens alone
            image = tokenizer.decode(codes[:, :ends[k]], noise, **options)
            close(image, f[f"out/{run['name']}"], 1e-4)
        for i in run.get("jump", []):
            jumps = previews_of(tokenizer, codes, noise, preview="v", **options)
            close(jumps[i + 1][:1], f[f"out/jump_{run['name']}_{i}"], 1e-4)


def test_dar_tokenizer_loss():
    """Every part of Eq. 7, on the tokens that count, and the gradient of every parameter."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f).requires_grad_(True).train()
    tokenizer.dino = lambda images: made(f, f.meta["recipe"]["target"]["name"])
    tokenizer.loss_config = dar.Config(lpips_dropout=0.0)
    seen = {}
    pixels = tokenizer.pixels.forward

    def watched(x, t, c, repa):
        seen.update(t=t, x=x)
        seen["v"], seen["features"] = pixels(x, t, c, repa)
        return seen["v"], seen["features"]
    tokenizer.pixels.forward = watched
    u, x = f["in/train_u"], f["in/x"]
    q = f["out/query_ids"].shape[1]
    assert torch.equal(tokenizer.starts(u)[:, None] + torch.arange(q), f["out/query_ids"])
    out = tokenizer(x, u=u, noise=f["in/train_noise"])
    close(seen["t"], f["out/t_model"], 1e-6)
    for ours, theirs in (("codebook", "vq"), ("commitment", "commit"), ("flow", "fm")):
        close(out[ours], f[f"out/{theirs}_loss"])
    close(out["repa"], f["out/repa_loss"])
    close(out["dead"], f["out/dead_code_rate"])
    close(out["loss"], f["out/total_no_lpips"])
    close(seen["features"][:, ::16, ::16], f["out/h_repa_slice"], 2e-5)
    close(seen["features"].mean(1), f["out/h_repa_token_mean"], 2e-5)
    guess = (seen["x"] + (1 - seen["t"].view(-1, 1, 1, 1)) * seen["v"]) / tokenizer.config.data_std
    close(guess, f["out/pred_x1"], 2e-5)
    out["loss"].backward()
    ours = {name: p.grad for name, p in tokenizer.named_parameters()}
    for key in f.keys("out/grad_norm/"):
        name = key.removeprefix("out/grad_norm/")
        assert (ours[our_name(name)].norm() - f[key]).abs() <= 5e-5 * f[key] + 1e-6, name
    close(ours["quantizer.embedding.weight"], f["out/grad/quantize.embedding.weight"], 2e-5)
    rows = f["out/grad/query_embedding.weight"]
    close(ours["query_table.weight"][:len(rows)], rows, 2e-5)

    tokenizer.lpips = lpips
    out = tokenizer(x, u=u, noise=f["in/train_noise"])
    close(out["lpips"], f["out/lpips_x_pred"].mean(), 1e-4)
    close(out["loss"], f["out/total"], 2e-5)


def test_dar_lpips():
    """Feature maps, normalisation, weights of the five parts, and the gradient with respect to y.

    The latter in float64: in float32, rounding decides on which side of a ReLU's kink a value is.
    """
    f = Fixture("lpips")
    x, y = f["in/x"], f["in/y"]
    parts = lpips(x, y)
    close(parts, f["out/per_layer"], 1e-4)
    close(parts.sum(0), f["out/lpips"], 1e-4)
    vgg = {name: made(f, name) for name in f.meta["recipe"]["parameters"]}
    for k, feature_map in enumerate(dar.vgg_features(vgg, x)):
        close(feature_map.mean((2, 3)), f[f"out/feat{k}_mean"], 1e-4)
    assert torch.equal(lpips(x, x).sum(0), f["out/lpips_same"])
    y = y.double().requires_grad_(True)
    lpips(x.double(), y).sum().backward()
    assert (y.grad - f["out/grad_y"]).abs().max() <= 1e-6


def llama_of(f):
    c = f.config
    tokenizer = dar.TokenizerConfig(codebook=c["vocab_size"], queries=c["block_size"])
    return dar.ar_from_released(f.state(), heads=c["n_head"], tokenizer=tokenizer, dropout=0.0,
                                label_drop=c["class_dropout_prob"]).requires_grad_(True)


def test_dar_ar_loss():
    f = Fixture("dar_ar")
    model = llama_of(f)
    codes, labels = f["in/train_codes"], f["in/train_labels"]
    null = torch.full_like(labels, model.config.classes)
    drop = f["in/label_drop_rand"] < model.config.label_drop
    close(model.logits(codes, torch.where(drop, null, labels)), f["out/train_logits"])
    close(model.logits(codes, labels), f["out/eval_logits_cond"])
    close(model.logits(codes, null), f["out/eval_logits_uncond"])
    loss = model.train()(codes, labels, drop=drop)["loss"]
    close(loss, f["out/train_loss"])
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    for key in f.keys("out/grad_norm/"):
        close(ours[our_name(key.removeprefix("out/grad_norm/"))].norm(), f[key], 2e-5)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_dar_ar_files(tmp_path, key):
    """The plain weights are taken, not the EMA, and it is not a tokenizer."""
    f = Fixture("dar_ar")
    state = {f"_orig_mod.{name}": value for name, value in f.state().items()}
    other = {name: value + 1 for name, value in state.items()}
    torch.save({key: state, "ema": other} if key else state, tmp_path / "x.pt")
    loaded = dar.load_official(tmp_path / "x.pt", tokenizer=llama_of(f).config.tokenizer)
    close(loaded.logits(f["in/train_codes"], f["in/train_labels"]), f["out/eval_logits_cond"])
    with pytest.raises(common.UserError, match="an AR model, not a tokenizer"):
        dar.load_tokenizer(tmp_path / "x.pt")


@pytest.mark.parametrize("way", ["cached", "plain"])
def test_dar_ar_tokens(monkeypatch, way):
    """Every run's tokens exactly, and the probabilities that each was drawn from.

    The released draw (argmax of probabilities over exponentials) takes the place of ours.
    """
    f = Fixture("dar_ar")
    model, labels = llama_of(f), f["in/gen_labels"]
    N, V = f.config["block_size"], f.config["vocab_size"]
    for run in f.meta["runs"]:
        if way == "plain" and run["prefix"]:
            continue
        a, b = dar.guidance(str(run["cfg"]).replace(",", ":"))
        if a == 1 < b and isinstance(run["cfg"], str):
            a = 1.001  # the released code's way of keeping guidance on
        draws = torch.ones(N, len(labels), V) if run["argmax"] else f[f"in/exp_{run['name']}"]
        draws, probs = iter(draws[run["prefix"]:]), []

        def race(p, u, draws=draws, probs=probs):
            probs.append(p)
            return (p / next(draws)).argmax(-1)
        monkeypatch.setattr(dar, "draw_token", race)
        options = {name: run[name] for name in ("temperature", "top_k", "top_p")}
        theirs, noise = f[f"out/tokens_{run['name']}"], common.Noise(0, range(len(labels)))
        if way == "plain":
            codes = plain.llama_sample(model, labels, noise, cfg=(a, b), **options)
        else:
            prefix = theirs[0, :run["prefix"]]
            *_, codes = model.stream(labels, noise, prefix=prefix, cfg=(a, b), **options)
        assert torch.equal(codes, theirs), run["name"]
        if f"out/probs_{run['name']}" in f:
            close(torch.stack(probs), f[f"out/probs_{run['name']}"], 2e-5)


def test_dar_ar_filters():
    f = Fixture("dar_ar")
    for case in f.meta["filters"]:
        how = {k: case[k] for k in ("temperature", "top_k", "top_p")}
        close(dar.probabilities(f["in/filter_logits"], **how), f[f"out/probs_{case['name']}"])
        if f"out/probs_{case['name']}_ties" in f:
            ties = dar.probabilities(f["in/filter_logits_ties"], **how)
            close(ties, f[f"out/probs_{case['name']}_ties"])


# --- MADFormer ------------------------------------------------------------------------------------

def unet_of(c):
    """The released U-Net configuration; a level has attention if its flag is exactly 1."""
    attention = tuple(int(flag == 1) for flag in c["unet_transformer_layers_per_block"])
    return madformer.UNetConfig(
        tuple(c["unet_block_out_channels"]), tuple(c["unet_num_layers_per_block"]), attention,
        groups=c["unet_resnet_groups"], heads=c["unet_num_heads"], time_dim=c["unet_time_emb_dim"])


def madformer_of(f, state, flags=(), diff_depth=None, **overrides):
    """The released model under these switches; what its shapes do not tell comes from the file."""
    c = f.config
    for switch, (field, value) in madformer.ARGUMENTS.items():
        if dict(flags).get(switch):
            overrides[field] = value
    assert c["head_dim"] == madformer.HEAD and c["rms_norm_eps"] == 1e-5
    model = madformer.from_released(
        state, ar_length=c["ar_len"], diffusion_depth=diff_depth or c["diff_depth"],
        unet={"groups": c["unet_resnet_groups"], "heads": c["unet_num_heads"]}, **overrides)
    shapes = (model.config.dim, model.config.mlp, model.config.depth)
    assert shapes == (c["hidden_size"], c["intermediate_size"], c["depth"])
    assert model.config.unet == unet_of(c)
    return model


def to_blocks(x):
    """The released layout (..., pixels, channels) of a block as (..., channels, p, p)."""
    return x.transpose(-1, -2).unflatten(-1, (math.isqrt(x.shape[-2]),) * 2)


def from_blocks(x):
    return x.flatten(-2).transpose(-1, -2)


def modes_of(name):
    """(mode, its switches and depth) of a fixture."""
    f = Fixture(name)
    modes = {"default": {"flags": {}}} if name == "madformer_sample" else {}
    return [(mode, how) for mode, how in {**modes, **f.meta["modes"]}.items()]


def state_of(f, mode):
    state = {**Fixture("madformer").state(), **f.state()}
    if mode == "single_set":  # one set for both: the file says that the noise tower's is it
        state = {k: state[k.replace("_list.0.", "_list.1.")] for k in state}
    return state


class Watch:
    """Records what a MADFormer's downsampler and layers return while a loss is computed."""

    def __init__(self, model):
        self.down = model.down.forward
        self.run_layers = model.run_layers
        model.down.forward = self.watched_down
        model.run_layers = self.watched_layers

    def watched_down(self, x, e):
        self.tokens, self.skips = self.down(x, e)
        return self.tokens, self.skips

    def watched_layers(self, rows, layout, text, z):
        self.z = z
        self.rows, self.condition = self.run_layers(rows, layout, text, z)
        return self.rows, self.condition


def check_madformer(f, model, out, prefix, totals):
    """Outputs and losses of one forward pass, and gradients for each total: {name of norms:
    (weights, prefix)}."""
    model.requires_grad_(True)
    c = model.config
    clean = to_blocks(f["in/clean"])
    eps = to_blocks(f["in/noise"])
    t = f["in/t"]
    watch = Watch(model)
    close(from_blocks(model.noised(clean, eps, t)), f["in/noised"], 1e-6)

    def loss(**changes):
        released = dict(target="noise", image_weight=1.0, hidden_weight=0.1)
        model.config = dataclasses.replace(c, **{**released, **changes})
        return model(model.join(clean), torch.zeros(len(t), dtype=torch.long), t=t, eps=eps)

    result = loss(hidden="sum")
    close(result["image"], f[f"{prefix}loss_image"])
    close(result["loss"], f[f"{prefix}loss_total"])
    if c.condition:
        close(result["hidden"], f[f"{prefix}loss_hidden"])
        if f"{prefix}loss_hidden_before_add" in f:
            close(loss(hidden="condition")["hidden"], f[f"{prefix}loss_hidden_before_add"])
    close(loss(target="clean")["image"], f[f"{prefix}loss_image_sample"])

    def up(rows, skips):
        return from_blocks(model.upsample(rows, t, skips))

    clean_skips, noisy_skips = zip(*(skip.chunk(2) for skip in watch.skips))
    close(up(watch.rows["noise"], noisy_skips), f[f"{prefix}pred"], 2e-5)
    condition = watch.condition if c.condition else torch.zeros_like(watch.z)
    close(up(condition + watch.z, clean_skips), f[f"{prefix}condition"], 2e-5)
    if c.condition and f"{prefix}condition_before_add" in f:
        close(up(condition, clean_skips), f[f"{prefix}condition_before_add"], 2e-5)
    if c.clean_blocks:
        for target, name in (("same", "loss_clean_tower"), ("next", "loss_clean_tower_next")):
            result = loss(clean_weight=0.1, clean_target=target)
            close(result["clean"], f[f"{prefix}{name}"])
        close(up(watch.rows["clean"], clean_skips), f[f"{prefix}clean_tower"], 2e-5)
    names = f.meta["grad_names"]
    for norms, (changes, full) in totals.items():
        model.zero_grad()
        loss(hidden="sum", **changes)["loss"].backward()
        ours = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

        def gradient(name):
            [own] = common.renamed({name: torch.zeros(())}, madformer.RELEASED)
            return ours.get(own, torch.zeros(()))
        for name, theirs in zip(names, f[norms], strict=True):
            assert (gradient(name).norm() - theirs).abs() <= 1e-4 * theirs + 1e-5, name
        for key in f.keys(full):
            gap = (gradient(key.removeprefix(full)) - f[key]).abs().max()
            assert gap <= 1e-4 * f[key].abs().max() + 1e-6, key
    return watch


def test_madformer():
    """Predictions, condition with and without the noisy latent, clean tower, losses, gradients."""
    f = Fixture("madformer")
    model = madformer_of(f, f.state())
    watch = check_madformer(f, model, f, "out/", {
        "out/grad_norms": ({}, "grad/"),
        "out/grad_norms_all": ({"clean_weight": 0.1, "clean_target": "same"}, "grad_all/")})
    T, n = model.config.ar_length, model.config.tokens
    clean, z = watch.tokens.chunk(2)
    close(clean[:T].flatten(0, 1), f["out/clean_down0"], 2e-5)
    close(z[:T].flatten(0, 1), f["out/noised_down0"], 2e-5)
    close(watch.condition[0], f["out/h_ar0"][T * n:], 2e-5)
    close(torch.cat([watch.rows["clean"][0], watch.rows["noise"][0]]), f["out/h_final0"], 2e-5)


@pytest.mark.parametrize("mode,how", modes_of("madformer_ablations"),
                         ids=lambda x: x if isinstance(x, str) else "")
def test_madformer_ablations(mode, how):
    f = Fixture("madformer_ablations")
    model = madformer_of(f, state_of(f, mode), how["flags"], how["diff_depth"])
    check_madformer(f, model, f, f"out/{mode}/", {f"out/{mode}/grad_norms": ({}, f"grad/{mode}/")})


def test_madformer_shared_set():
    """One set of parameters gives what two equal ones give; its gradient is the sum of theirs."""
    f = Fixture("madformer_ablations")
    mode = "single_set"
    model = madformer_of(f, state_of(f, mode), shared=True)
    assert len({id(tower) for tower in model.layers[0].towers.values()}) == 1
    check_madformer(f, model, f, f"out/{mode}/", {})


def test_madformer_masks():
    """The rule in all variants, block by block, against the released masks."""
    f = Fixture("madformer")
    for name, clean, isolated in (("default", True, False), ("mlp", True, True),
                                  ("no_clean", False, False), ("mlp_no_clean", False, True)):
        model = madformer_of(f, f.state(), {"clear_clean": not clean})
        n = model.config.tokens
        kinds = [madformer.CLEAN, madformer.NOISE] if clean else [madformer.NOISE]
        layout = torch.cat([model.image_layout(kind) for kind in kinds], 1)
        blocks = f[f"out/mask_{name}"].bool()
        expected = blocks.repeat_interleave(n, 0).repeat_interleave(n, 1)
        mask = madformer.dense_mask(layout, torch.zeros(1, 0), isolated)
        assert torch.equal(mask[0, 0], expected), name


def test_madformer_rotary():
    """Bases, frequencies that end at exactly 1 / base, and the form that is no rotation."""
    f = Fixture("madformer")
    side = f["out/rope_cos_table"].shape[0]
    rows, columns = f["in/rope_pos"]
    angles = madformer.rotary_grid(rows, columns, side)
    close(madformer.rotate(f["in/rope_q"], angles), f["out/rope_q"])
    close(madformer.rotate(f["in/rope_k"], angles), f["out/rope_k"])
    line = madformer.rotary_grid(torch.arange(side), torch.arange(side), side)
    close(line[0, :, :madformer.HEAD // 2], f["out/rope_cos_table"])
    close(line[1, :, :madformer.HEAD // 2], f["out/rope_sin_table"])
    model = madformer_of(f, f.state())
    assert torch.equal(model.image[1:], f["out/position_ids"])
    assert model.config.side == f.config["tokens_per_side"]


@pytest.mark.parametrize("mode,how", modes_of("madformer_sample"),
                         ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("way", [madformer.MADFormer.sample, plain.madformer_sample])
def test_madformer_sample(mode, how, way):
    """Every sampler under every switch, with the caches and without. Clipping is not ours."""
    f = Fixture("madformer_sample")
    for key in f.keys(f"out/{mode}/"):
        sampler = key.removeprefix(f"out/{mode}/")
        if sampler == "ddim" or sampler.endswith(("_timesteps", "_pred", "_x")):
            continue
        target = "clean" if sampler.endswith("_x0") else "noise"
        model = madformer_of(f, state_of(f, mode), how["flags"], how.get("diff_depth"),
                             steps=f.meta["steps"], target=target, sampler=sampler.split("_")[0])
        noise = Replay(*to_blocks(f["in/noise"]).unbind(1))
        latents = way(model, torch.zeros(len(f["in/noise"]), dtype=torch.long), noise)
        close(from_blocks(model.cut(latents)), f[key], 1e-4)


def test_madformer_sample_steps():
    """The network's output and the latent after each step of each block."""
    f = Fixture("madformer_sample")
    for sampler, kind in (("ddim_noclip", "ddim"), ("dpm", "dpm")):
        model = madformer_of(f, state_of(f, "default"), steps=f.meta["steps"], sampler=kind)
        ts = madformer.schedule(kind, f.meta["steps"])[0]
        assert ts == f[f"out/default/{sampler}_timesteps"].tolist()
        outputs, inputs, denoise = [], [], model.denoise

        def watched(x, *args):
            inputs.append(x)
            outputs.append(denoise(x, *args))
            return outputs[-1]
        model.denoise = watched
        noise = Replay(*to_blocks(f["in/noise"]).unbind(1))
        latents = model.sample(torch.zeros(len(f["in/noise"]), dtype=torch.long), noise)
        shape = f[f"out/default/{sampler}_pred"].shape
        close(from_blocks(torch.stack(outputs)).view(shape), f[f"out/default/{sampler}_pred"], 1e-4)
        after = from_blocks(torch.stack(inputs)).view(shape)[:, 1:]
        close(after, f[f"out/default/{sampler}_x"][:, :-1], 1e-4)
        last = from_blocks(model.cut(latents)).transpose(0, 1)
        close(last, f[f"out/default/{sampler}_x"][:, -1], 1e-4)


def test_schedulers():
    """Timesteps exactly, and every point of every trajectory that is not clipped."""
    f = Fixture("schedulers")
    close(madformer.alphas_bar(), f["out/alphas_cumprod"], 1e-6)
    model = madformer.MADFormer(dataclasses.replace(madformer.PRESETS["tiny"], text=False))
    x, eps = (f[key][:, None, :, None, None] for key in ("in/add_x", "in/add_noise"))
    close(model.noised(x, eps, f["in/add_t"][:, None]).flatten(1), f["out/add_noise"], 1e-6)
    for key in f.keys("out/timesteps_"):
        sampler, steps = key.removeprefix("out/timesteps_").split("/")
        assert madformer.schedule(sampler, int(steps))[0] == f[key].tolist(), key
    for key in f.keys("out/"):
        name, *rest = key.split("/")[1:]
        if rest[1:] != ["x"] or name in ("ddim", "ddim_x0_clip"):
            continue
        kind, steps, theirs, ours = name.split("_")[0], int(rest[0]), f[key], []
        ts = madformer.schedule(kind, steps)[0]

        def network(x, i):
            ours.append(x)
            return 0.3 * x + 0.1 * math.sin(ts[i] / 100)
        target = "clean" if "_x0" in name else "noise"
        *_, last = madformer.solve(network, theirs[0], kind, steps, target)
        close(torch.stack([*ours, last]), theirs, 2e-5)


@torch.no_grad()
def test_unet_blocks():
    """Down- and upsampler, feature by feature; one step for the whole batch, too."""
    f = Fixture("unet_blocks")
    c = f.config
    unet = unet_of(c)
    config = madformer.Config(
        image_size=8 * f["in/x"].shape[-1], ar_length=1, dim=c["hidden_size"], mlp=64, depth=1,
        diffusion_depth=1, unet=unet,
        vae=dataclasses.replace(common.SD_VAE, channels=c["latent_channels"]))
    down = madformer.Downsampler(config)
    up = madformer.Upsampler(config, down.skip_widths)
    parts = torch.nn.ModuleDict({"down": down, "up": up})
    common.load_strict(parts, common.renamed(f.state(), madformer.RELEASED), "the fixture")
    e_down = down.time(f["in/t"])
    e_up = up.time(f["in/t"])
    close(e_down, f["out/temb_down"])
    close(e_up, f["out/temb_up"])
    tokens, skips = down(f["in/x"], e_down)
    hidden = f["in/hidden"].flatten(2).transpose(1, 2)
    close(tokens.transpose(1, 2).view(f["out/down"].shape), f["out/down"])
    for k, skip in enumerate(skips):
        close(skip, f[f"out/down_res_{k}"])
    close(down.layers["0_0"](f["out/down_res_0"], e_down), f["out/resnet0"])
    first = f[f"out/down_res_{2 + unet.blocks[0]}"]  # of the second level
    close(down.layers["1_0"].attention(first), f["out/attn0"])
    stages = []
    for layer in up.layers.values():
        layer.register_forward_hook(lambda module, args, out: stages.append(out))
    close(up(hidden, e_up, skips), f["out/up"])
    for stage, key in zip(stages, sorted(f.keys("out/up_stage_")), strict=True):
        close(stage, f[key])
    close(up(tokens, e_up, skips), f["out/up_of_down"])
    one = f["in/t_scalar"].view(1)
    tokens, skips = down(f["in/x"], down.time(one))
    close(tokens.transpose(1, 2).view(f["out/down"].shape), f["out/down_scalar_t"])
    close(up(hidden, up.time(one), skips), f["out/up_scalar_t"])


# --- Evaluation -----------------------------------------------------------------------------------

def test_inception_features(inception_file):
    """Both resizings, every output, and the moments after every layer, for images of all sizes.

    The weights come from a file like the published one, and the recipe's check values hold.
    """
    f = Fixture("inception")
    network = fid.load_inception(inception_file)[0]
    state = network.state_dict()
    for key in f.keys("out/param_first4/"):
        name = key.removeprefix("out/param_first4/")
        assert torch.equal(state[name].flatten()[:4], f[key]), name
        total = torch.stack([state[name].double().sum(), state[name].double().abs().sum()])
        close(total, f[f"out/param_sum/{name}"], 1e-9)
    for name in f.meta["images"]:
        images = f[f"in/image/{name}"]
        for ours, theirs, exact in (("tf1", "tf1", 1e-6), ("pytorch", "pt", 2e-5)):
            key = f"out/{name}/{theirs}/"
            x = fid.RESIZE[ours](images)
            assert (x[:, :, ::23, ::23] - f[key + "resized_grid"]).abs().max() <= exact
            after = {}
            hooks = [layer.register_forward_hook(
                lambda module, args, out, name=name: after.update({name: out.clone()}))
                for name, layer in network.named_children()]
            pool3, logits, spatial = network(x)
            for hook in hooks:
                hook.remove()
            close(pool3, f[key + "pool3"], 5e-4)
            close(spatial, f[key + "spatial"], 5e-4)
            close(logits, f[key + "logits_unbiased"], 5e-4)
            close(logits + network.fc.bias, f[key + "logits"], 5e-4)
            pooled = {"pooled64": "pool_1", "pooled192": "pool_2", "pooled768": "Mixed_6e"}
            for output, layer in pooled.items():
                if key + output in f:
                    close(after[layer].mean((2, 3)), f[key + output], 5e-4)
            if key + "layer_moments" in f:
                moments = [torch.stack([h.double().mean(), h.double().square().mean().sqrt()])
                           for h in [*after.values(), pool3]]
                close(torch.stack(moments), f[key + "layer_moments"], 5e-4)


def test_inception_distances(inception_file, tmp_path):
    """FID, sFID, IS, precision and recall of two small sets, by the way of the command line."""
    f = Fixture("inception")
    for name in ("set_a", "set_b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=f[f"in/{name}"].numpy())
    for ours, theirs in (("tf1", "tf1"), ("pytorch", "pt")):
        key = f"out/e2e/{theirs}/"
        evaluator = fid.Evaluator(None, resize=ours, weights=inception_file)
        a, b = [evaluator.side(fid.Source(tmp_path / f"set_{name}.npz")) for name in "ab"]
        for name, end in (("fid_exact", ""), ("sfid_exact", "_s")):
            if key + name in f:
                sides = [side[f"{part}{end}"] for side in (a, b) for part in ("mu", "sigma")]
                assert fid.frechet(*sides) == pytest.approx(f[key + name].item(), rel=1e-4), name
        for end, shuffle in (("", True), ("_noshuffle", False)):
            if (name := f"{key}isc_mean_2splits{end}") in f:
                score, _ = fid.inception_score(a["logits"], splits=2, shuffle=shuffle)
                assert score == pytest.approx(f[name].item(), rel=1e-4)
        if key + "isc_std_2splits" in f:
            _, deviation = fid.inception_score(a["logits"], splits=2)
            assert deviation == pytest.approx(f[key + "isc_std_2splits"].item(), rel=1e-2)
        if key + "precision" in f:
            assert fid.precision_recall(a["rows"], b["rows"]) == pytest.approx(
                (f[key + "precision"].item(), f[key + "recall"].item()), abs=1e-7)


def test_frechet():
    """Every case, both ways round: 1e-9 where covariances are of full rank or exact, else 1e-6."""
    f = Fixture("frechet")
    singular = ("rank", "near", "few", "identical", "float32")
    for case in f.meta["cases"]:
        one, two = [[f[f"in/{case}/{name}{k}"] for name in ("mu", "sigma")] for k in (1, 2)]
        exact = f[f"out/{case}/exact"].item()
        absolute = 1e-6 if any(word in case for word in singular) else 1e-12
        for a, b in ((one, two), (two, one)):
            assert fid.frechet(*a, *b) == pytest.approx(exact, rel=1e-9, abs=absolute), case


def test_frechet_moments():
    """Streamed over shards, with large means."""
    f = Fixture("frechet")
    shards = f["in/stats/features"].split(f["in/stats/shards"].tolist())
    mean, covariance = fid.gaussian(*fid.added(*map(fid.moments, shards)))
    assert np.abs(mean - f["out/stats/mu"].numpy()).max() <= 1e-9
    assert np.abs(covariance - f["out/stats/sigma"].numpy()).max() <= 1e-9


def test_is():
    """Scores by the rules of torch-fidelity and of the ADM suite, which is one split per chunk."""
    f = Fixture("is_pr")
    for key in f.keys("in/is/"):
        if not key.endswith("/logits"):
            continue
        case = key.split("/")[2]
        logits = f[key]
        for how, name in ((dict(), "torch_fidelity"),
                          (dict(shuffle=False), "torch_fidelity_noshuffle"),
                          (dict(splits=1, shuffle=False), "torch_fidelity_1split")):
            theirs = np.atleast_1d(f[f"out/is/{case}/{name}"].numpy())
            ours = fid.inception_score(logits, **how)[:len(theirs)]
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9), (case, name)
        chunks = logits.split(int(f[f"in/is/{case}/adm_split_size"]))
        scores = [fid.inception_score(chunk, splits=1, shuffle=False)[0] for chunk in chunks]
        theirs = np.atleast_1d(f[f"out/is/{case}/adm_float64"].numpy())
        ours = (np.mean(scores), np.std(scores))[:len(theirs)]
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9), case


def test_pr():
    """Radii, and which points lie in whose neighbourhood, with ties and repeated points."""
    f = Fixture("is_pr")
    for key in f.keys("in/pr/"):
        if not key.endswith("/ref"):
            continue
        case = key.split("/")[2]
        reference, samples = f[key].double(), f[f"in/pr/{case}/sample"].double()
        shares = f[f"out/pr/{case}/precision_recall"].tolist()
        assert fid.precision_recall(samples, reference) == pytest.approx(shares, abs=1e-7)
        for rows, name in ((reference, "ref"), (samples, "sample")):
            theirs = f[f"out/pr/{case}/radii_{name}"]
            torch.testing.assert_close(fid.radii(rows), theirs, rtol=1e-9, atol=1e-9)
        within = fid.inside(samples, reference, fid.radii(reference)).long()
        assert within.tolist() == f[f"out/pr/{case}/sample_in_ref"].tolist()
