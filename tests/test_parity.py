"""The numbers of the released implementations: inputs, weights and outputs in tests/fixtures/*.npz.

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

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def below(self, prefix):
        """Return the tensors whose keys start with a prefix, by the rest of their keys."""
        keys = [key for key in self.arrays if key.startswith(prefix)]
        return {key.removeprefix(prefix): self[key] for key in keys}

    def made(self, name, about):
        """Return a tensor that was too large to store, made by the recipe, checked by its probe."""
        seed = zlib.crc32((self.meta["recipe"]["salt"] + name).encode())
        value = np.random.default_rng(seed).standard_normal(about["shape"]) * about["scale"]
        value = (np.abs(value) if about["abs"] else value).astype(np.float32)
        total = np.abs(value.astype(np.float64)).sum()
        assert np.allclose([*value.ravel()[:3], total], about["probe_first3_and_abssum"], rtol=1e-6)
        return torch.from_numpy(value)

    def state(self):
        """Return the released state dict, stored and made."""
        state = self.below("state/")
        recipe = self.meta.get("recipe", {"parameters": {}})
        for name, about in recipe["parameters"].items():
            state[name] = self.made(name, about)
        return state

    def check(self, tolerance=1e-5, prefix="out/", **ours):
        """Assert that tensors are close to those of the same names below a prefix."""
        for name, tensor in ours.items():
            close(tensor, self[prefix + name], tolerance, name=name)


def close(ours, theirs, tolerance=1e-5, absolute=0.0, name=""):
    """Assert |ours - theirs| <= tolerance * max |theirs| + absolute, and equal shapes."""
    assert ours.shape == theirs.shape, name
    gap = (ours.detach() - theirs).abs().max()
    assert gap <= tolerance * theirs.abs().max() + absolute, name


def check_gradients(model, table, theirs, tolerance, absolute=0.0):
    """Compare gradients with {released name: norm or array}; the table makes our names.

    A parameter without gradient counts as zero. An array may have the first rows only.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, expected in theirs.items():
        [own] = common.renamed({name: torch.zeros(())}, table)
        gradient = gradients.get(own, torch.zeros_like(expected))
        ours = gradient[:len(expected)] if expected.ndim else gradient.norm()
        close(ours, expected, tolerance, absolute, name)


class Replay:
    """Hands out given draws, one after another, in place of common.Noise."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def normal(self, shape):
        draw = self.draws.pop(0)
        assert draw.shape[1:] == tuple(shape)
        return draw


class Spy:
    """Takes the place of a function and keeps the arguments and the result of each call."""

    def __init__(self, function):
        self.function = function
        self.args = []
        self.results = []

    def __call__(self, *args, **options):
        self.args.append(args)
        self.results.append(self.function(*args, **options))
        return self.results[-1]


def spied(module):
    """Return a Spy on the forward pass of a module."""
    module.forward = Spy(module.forward)
    return module.forward


# --- KL-VAE ---------------------------------------------------------------------------------------

def test_vae():
    """The 16-channel architecture: epsilon, asymmetric padding, attention placement, scale."""
    f = Fixture("vae")
    vae = common.vae_from_state({**f.state(), "scale": torch.tensor(f.config["scale"])})
    moments = vae.encode(f["in/image"])
    latent = vae.codes(moments, f["in/sample_noise"])
    f.check(moments=moments, mode=moments.chunk(2, 1)[0], kl=vae.kl(moments), latent=latent,
            sample=latent / vae.scale, decoded=vae.decode(f["in/z"] * vae.scale),
            reconstruction=vae.decode(f["out/latent"]))


def test_vae_posterior():
    """Mean, deviation and KL, with extreme log-variances, which are clamped."""
    f = Fixture("vae")
    moments = f["in/dist_moments"]
    channels = moments.shape[1] // 2
    vae = common.KLVAE(dataclasses.replace(common.TINY_VAE, channels=channels, scale=1.0))
    mean, std = vae.posterior(moments)
    f.check(dist_mean=mean, dist_std=std, dist_logvar=2 * std.log(), dist_kl=vae.kl(moments),
            dist_sample=vae.codes(moments, f["in/dist_noise"]))


OLD_NAMES = r"""
to_q      -> query
to_k      -> key
to_v      -> value
to_out\.0 -> proj_attn
"""


@pytest.mark.parametrize("names", ["", OLD_NAMES], ids=["new", "old"])
def test_vae_diffusers(names):
    """The diffusers layout, with today's attention names and those of Stable Diffusion 1."""
    f = Fixture("vae")
    vae = common.vae_from_state(common.renamed(f.below("sd_state/"), names))
    moments = vae.encode(f["in/sd_image"])
    f.check(sd_moments=moments, sd_mode=moments.chunk(2, 1)[0],
            sd_decoded=vae.decode(f["in/sd_z"] * vae.scale))


# --- TransDiff ------------------------------------------------------------------------------------

TRANSDIFF = ["transdiff_1step", "transdiff_mrar"]


def transdiff_of(f, **changes):
    """Return the fixture's model with its sampler, in evaluation mode: nothing is dropped."""
    c = f.config
    return transdiff.from_released(
        {**f.state(), **changes}, heads=c["heads"], repeat=c["diffusion_batch_mul"], cfg=c["cfg"],
        steps=c["num_sampling_steps"], drift_scale=c["scale_0"], noise_scale=c["scale_1"])


def transdiff_sample(f, model, **options):
    """Return latents for the file's labels, made from its noise."""
    noise = Replay(f["in/sample_noise"], *f["in/sample_eps"].flatten(0, -4))
    return model.sample(f["in/labels"], noise, **options)[0]


def test_transdiff_1step_features():
    """With and without label: class tokens, positions, norms, qkv layout, exact GELU."""
    f = Fixture("transdiff_1step")
    model = transdiff_of(f)
    null = torch.tensor([model.config.classes])
    f.check(z=model.semantic(f["in/labels"], []) + model.ar.feature_pos,
            z_uncond=model.semantic(null, []) + model.ar.feature_pos)


def test_transdiff_mrar_features():
    """Every number of references, whose patches are channel-major, with and without label."""
    f = Fixture("transdiff_mrar")
    model = transdiff_of(f)
    references = list(f["in/latents"][:, :-1].unbind(1))
    close(model.ar.reference(references[0]), model.ar.ref_proj(f["out/ref_tokens"]))
    f.check(z_train=model.semantic(f["in/labels"], references))
    null = torch.full_like(f["in/labels"], model.config.classes)
    for name, z in f.below("out/z_eval_").items():
        labels = null if "uncond" in name else f["in/labels"]
        close(model.semantic(labels, references[:int(name[-1]) - 1]), z, name=name)


@pytest.mark.parametrize("name", TRANSDIFF)
def test_transdiff_velocity(name):
    """Time embedding, order of the AdaLN vectors, cross-attention between the modulated parts.

    MRAR: the decoder reads the features of the first three images.
    """
    f = Fixture(name)
    model = transdiff_of(f)
    if "in/dec_c" in f:
        c = f["in/dec_c"]
    else:
        h = f["out/z_eval_3"]
        c = h + model.ar.feature_pos[:, :h.shape[1]]
    modulation = model.decoder.modulation(f["in/dec_t"] / 1000)
    f.check(dec_v=model.decoder(f["in/dec_x"], modulation, model.decoder.keys_values(c)))


def test_transdiff_1step_times():
    """The sampler's grid, with its long last step."""
    f = Fixture("transdiff_1step")
    grid = transdiff.time_grid(f.config["num_sampling_steps"], "maruyama")
    f.check(t_steps=grid, tolerance=1e-6)


@pytest.mark.parametrize("name", TRANSDIFF)
def test_transdiff_samples(name):
    """The whole sampler, with and without guidance. MRAR: the same start in all rounds."""
    f = Fixture(name)
    model = transdiff_of(f)
    f.check(sample=transdiff_sample(f, model), tolerance=1e-4,
            sample_nocfg=transdiff_sample(f, model, cfg=1.0))


def test_transdiff_1step_first_update():
    """One stochastic update of Eq. 18 on its own, where a wrong scale cannot hide."""
    f = Fixture("transdiff_1step")
    model = transdiff_of(f)
    decoder = spied(model.decoder)
    transdiff_sample(f, model)
    f.check(sample_x1=decoder.args[1][0])


def test_transdiff_mrar_rounds():
    """Each round's image, not only the last."""
    f = Fixture("transdiff_mrar")
    model = transdiff_of(f)
    for r, image in enumerate(f["out/sample_rounds"]):
        close(transdiff_sample(f, model, rounds=r + 1), image, 1e-4)


@pytest.mark.parametrize("name", TRANSDIFF)
def test_transdiff_loss(name):
    """On given draws, with floored times: each round's loss, label drop and every gradient."""
    f = Fixture(name)
    model = transdiff_of(f)
    rounds = model.config.images_per_sample
    t = transdiff.logit_normal(f["in/train_normal"])
    assert torch.equal((1000 * t).round().long(), f["out/train_timestep"])
    eps = f["in/train_noise"]
    draws = {"t": t.view(rounds, -1), "eps": eps.view(rounds, -1, *eps.shape[-2:])}
    latents = f["in/latents" if "in/latents" in f else "in/train_latents"]
    out = model(latents, f["in/labels"], **draws)
    f.check(train_loss=out["loss"])
    if rounds > 1:
        f.check(train_losses=torch.stack([out[f"flow_{r}"] for r in range(rounds)]))
    out["loss"].backward()
    norms = dict(zip(f.meta["param_names"], f["out/grad_norms"], strict=True))
    arrays = {k: array for k, array in f.below("out/grad/").items() if "_wrt_" not in k}
    for theirs in (norms, arrays):
        check_gradients(model, transdiff.RELEASED, theirs, 2e-5, 1e-7)
    if "in/drop_uniform" in f:
        out = model(latents, f["in/labels"], drop=f["in/drop_uniform"] < 0.5, **draws)
        f.check(train_loss_label_drop=out["loss"])


def test_transdiff_1step_512(monkeypatch):
    """512 px: only the decoder's position table grows. The file has fewer steps than we allow."""
    f = Fixture("transdiff_1step")
    model = transdiff_of(f, **{"diffdecoder.net.diffusion_pos_embed_learned": f["in/pos512"]})
    steps = 1 + len(f["in/eps512"])
    grid = torch.cat([torch.linspace(1, 0.04, steps), torch.zeros(1)])
    monkeypatch.setattr(transdiff, "time_grid", lambda *args: grid)
    model.config = dataclasses.replace(model.config, steps=steps, repeat=1)
    label = f["in/labels"][:1]
    start = f["in/noise512"]
    x, _ = model.sample(label, Replay(start, *f["in/eps512"][:, None]))
    f.check(sample512=x, tolerance=1e-4)
    t = transdiff.logit_normal(f["in/train_normal"][:1])
    loss = model(f["in/latents512"], label, eps=start[None], t=t[None])["loss"]
    f.check(train_loss512=loss)


# --- D-AR -----------------------------------------------------------------------------------------

def tokenizer_of(f):
    """Return the fixture's tokenizer."""
    return dar.tokenizer_from_released(f.state(), f.config, image_size=f.meta["image_size"])


def lpips(x, y, dropout=0.0):
    """Return the parts of LPIPS with the fixture's weights, in the precision of the images."""
    state = {name: value.to(x.dtype) for name, value in Fixture("lpips").state().items()}
    return dar.lpips_parts(state, state, x, y, dropout)


def test_dar_tokenizer_codes():
    """Encoder, mask, rotations, normalised codebook, causal layers; the codes exactly."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    features = tokenizer.features(f["in/x"])
    codes = tokenizer.codes(tokenizer.encode(f["in/x"]))
    assert torch.equal(codes, f["out/codes"])
    f.check(enc_tokens=features, z_pre=tokenizer.to_code(features),
            zq=tokenizer.quantizer.codewords()[codes], cond=tokenizer.condition(f["out/zq"]))


@pytest.mark.parametrize("form", ["training", "no ema", "bare"])
def test_dar_tokenizer_files(tmp_path, monkeypatch, form):
    """EMA is preferred, the pickled configuration is read as data, overrides take its place."""
    f = Fixture("dar_tokenizer")
    kind = type("Config", (), {"__module__": "config_util"})
    monkeypatch.setitem(sys.modules, "config_util", types.SimpleNamespace(Config=kind))
    config = kind()
    config._data = {"model": f.config}
    state = f.state()
    other = {f"_orig_mod.{name}": value + 1 for name, value in state.items()}
    content = {"training": {"model": other, "ema": state, "config": config},
               "no ema": {"model": state, "config": config}, "bare": state}[form]
    torch.save(content, tmp_path / "x.pt")
    expected = tokenizer_of(f).config
    overrides = vars(expected) if form == "bare" else {"image_size": expected.image_size}
    tokenizer = dar.load_official(tmp_path / "x.pt", **overrides)
    assert tokenizer.config == expected
    assert torch.equal(tokenizer.encode(f["in/x"]).long(), f["out/codes"])


def previews_of(tokenizer, codes, noise, **options):
    """Return the images after 0 steps, 1 step and so on, not clamped."""
    decoding = dar.Decoding(tokenizer, noise, **options)
    images = [decoding.image]
    decoding.on_step = lambda clamped: images.append(decoding.image)
    decoding.take(codes)
    return images


def test_dar_tokenizer_pictures():
    """All solvers and numbers of steps, the released previews, and the paper's jump estimates."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    for run in f.meta["runs"]:
        codes = f["out/codes"][:run["batch"]]
        noise = f["in/decode_noise"][:run["batch"]]
        options = {"steps": run["steps"], "solver": run["method"].rstrip("2")}
        k = run["steps"] if run["clip"] is None else run["clip"]
        theirs = f[f"out/{run['name']}"]
        close(previews_of(tokenizer, codes, noise, **options)[k], theirs, 1e-4)
        for i in run.get("jump", []):
            jumps = previews_of(tokenizer, codes, noise, preview="v", **options)
            close(jumps[i + 1][:1], f[f"out/jump_{run['name']}_{i}"], 1e-4)


def tokenizer_loss(f, tokenizer):
    """Return the training loss on the given draws, with given targets for REPA."""
    target = f.meta["recipe"]["target"]
    tokenizer.requires_grad_(True).train()
    tokenizer.dino = lambda images: f.made(target["name"], target)
    tokenizer.loss_config = dar.Config(lpips_dropout=0.0)
    return tokenizer(f["in/x"], u=f["in/train_u"], noise=f["in/train_noise"])


def test_dar_tokenizer_loss():
    """Every part of Eq. 7, on the tokens that count, and what the pixel decoder is given."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    pixels = spied(tokenizer.pixels)
    out = tokenizer_loss(f, tokenizer)
    f.check(vq_loss=out["codebook"], commit_loss=out["commitment"], fm_loss=out["flow"],
            repa_loss=out["repa"], dead_code_rate=out["dead"], total_no_lpips=out["loss"])
    [(x_t, t, _)] = pixels.args
    [(v, features)] = pixels.results
    f.check(t_model=t, tolerance=1e-6)
    guess = (x_t + (1 - t.view(-1, 1, 1, 1)) * v) / tokenizer.config.data_std
    f.check(pred_x1=guess, h_repa_slice=features[:, ::16, ::16],
            h_repa_token_mean=features.mean(1), tolerance=2e-5)
    group = torch.arange(tokenizer.config.group_size)
    assert torch.equal(tokenizer.starts(f["in/train_u"])[:, None] + group, f["out/query_ids"])


def test_dar_tokenizer_gradients():
    """The gradient of every parameter, of the loss without LPIPS."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    tokenizer_loss(f, tokenizer)["loss"].backward()
    check_gradients(tokenizer, dar.RELEASED, f.below("out/grad_norm/"), 5e-5, 1e-6)
    check_gradients(tokenizer, dar.RELEASED, f.below("out/grad/"), 2e-5)


def test_dar_tokenizer_lpips():
    """LPIPS of the image that the velocity leads to."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    tokenizer.lpips = lpips
    out = tokenizer_loss(f, tokenizer)
    close(out["lpips"], f["out/lpips_x_pred"].mean(), 1e-4)
    f.check(total=out["loss"], tolerance=2e-5)


def test_dar_lpips():
    """Feature maps, normalisation and weights of the five parts."""
    f = Fixture("lpips")
    parts = lpips(f["in/x"], f["in/y"])
    f.check(per_layer=parts, lpips=parts.sum(0), tolerance=1e-4)
    assert torch.equal(lpips(f["in/x"], f["in/x"]).sum(0), f["out/lpips_same"])
    for k, feature_map in enumerate(dar.vgg_features(f.state(), f["in/x"])):
        close(feature_map.mean((2, 3)), f[f"out/feat{k}_mean"], 1e-4)


def test_dar_lpips_gradient():
    """With respect to y, in float64: in float32, rounding moves values over the kink of a ReLU."""
    f = Fixture("lpips")
    y = f["in/y"].double().requires_grad_(True)
    lpips(f["in/x"].double(), y).sum().backward()
    close(y.grad, f["out/grad_y"], 0.0, 1e-6)


FILTERS = ("temperature", "top_k", "top_p")


def llama_of(f):
    """Return the fixture's AR model, in evaluation mode."""
    c = f.config
    tokenizer = dar.TokenizerConfig(codebook=c["vocab_size"], queries=c["block_size"])
    return dar.ar_from_released(f.state(), heads=c["n_head"], tokenizer=tokenizer, dropout=0.0,
                                label_drop=c["class_dropout_prob"])


def test_dar_ar_loss():
    """Logits with and without label, the loss with some labels dropped, and every gradient."""
    f = Fixture("dar_ar")
    model = llama_of(f).requires_grad_(True)
    codes = f["in/train_codes"]
    labels = f["in/train_labels"]
    null = torch.full_like(labels, model.config.classes)
    drop = f["in/label_drop_rand"] < model.config.label_drop
    loss = model.train()(codes, labels, drop=drop)["loss"]
    f.check(eval_logits_cond=model.logits(codes, labels),
            eval_logits_uncond=model.logits(codes, null),
            train_logits=model.logits(codes, torch.where(drop, null, labels)), train_loss=loss)
    loss.backward()
    check_gradients(model, dar.RELEASED, f.below("out/grad_norm/"), 2e-5)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_dar_ar_files(tmp_path, key):
    """The plain weights are taken, not the EMA, and it is not a tokenizer."""
    f = Fixture("dar_ar")
    state = {f"_orig_mod.{name}": value for name, value in f.state().items()}
    other = {name: value + 1 for name, value in state.items()}
    torch.save({key: state, "ema": other} if key else state, tmp_path / "x.pt")
    model = dar.load_official(tmp_path / "x.pt", tokenizer=llama_of(f).config.tokenizer)
    f.check(eval_logits_cond=model.logits(f["in/train_codes"], f["in/train_labels"]))
    with pytest.raises(common.UserError, match="an AR model, not a tokenizer"):
        dar.load_tokenizer(tmp_path / "x.pt")


def test_dar_ar_tokens(monkeypatch):
    """Every run's tokens exactly, and the probabilities that each was drawn from.

    The released draw (argmax of probabilities over exponentials) takes the place of ours.
    """
    f = Fixture("dar_ar")
    model = llama_of(f)
    labels = f["in/gen_labels"]
    noise = common.Noise(0, range(len(labels)))
    even = torch.ones(f.config["block_size"], 1, 1)
    for run in f.meta["runs"]:
        name = run["name"]
        theirs = f[f"out/tokens_{name}"]
        draws = iter(f.below("in/exp_").get(name, even)[run["prefix"]:])
        draw = Spy(lambda probs, u: (probs / next(draws)).argmax(-1))
        monkeypatch.setattr(dar, "draw_token", draw)
        first, last = dar.guidance(str(run["cfg"]).replace(",", ":"))
        if first == 1 < last:
            first = 1.001  # the released code's way of keeping guidance on
        *_, codes = model.stream(labels, noise, prefix=theirs[0, :run["prefix"]], cfg=(first, last),
                                 **{option: run[option] for option in FILTERS})
        assert torch.equal(codes, theirs), name
        if f"out/probs_{name}" in f:
            close(torch.stack([probs for probs, _ in draw.args]), f[f"out/probs_{name}"], 2e-5)


def test_dar_ar_filters():
    """Temperature, top-k and top-p in this order, with ties."""
    f = Fixture("dar_ar")
    for case in f.meta["filters"]:
        options = {option: case[option] for option in FILTERS}
        for end in ("", "_ties"):
            if f"out/probs_{case['name']}{end}" in f:
                probs = dar.probabilities(f[f"in/filter_logits{end}"], **options)
                close(probs, f[f"out/probs_{case['name']}{end}"])


# --- MADFormer ------------------------------------------------------------------------------------

MODES = [("madformer", "")]
MODES += [("madformer_ablations", mode) for mode in Fixture("madformer_ablations").meta["modes"]]


def madformer_of(f, mode="", **fields):
    """Return the released model in a mode: its switches, its depth and its weights."""
    c = f.config
    how = f.meta.get("modes", {}).get(mode, {"flags": {}})
    for switch, is_on in how["flags"].items():
        field, value = madformer.ARGUMENTS[switch]
        if is_on:
            fields[field] = value
    state = {**Fixture("madformer").state(), **f.state()}
    if mode == "single_set":  # both towers have the noise tower's
        state = {name: state[name.replace("_list.0.", "_list.1.")] for name in state}
    return madformer.from_released(
        state, ar_length=c["ar_len"], diffusion_depth=how.get("diff_depth", c["diff_depth"]),
        unet={"groups": c["unet_resnet_groups"], "heads": c["unet_num_heads"]}, **fields)


def to_blocks(x):
    """Return the released layout (..., pixels, channels) of a block as (..., channels, p, p)."""
    side = math.isqrt(x.shape[-2])
    return x.transpose(-1, -2).unflatten(-1, (side, side))


def from_blocks(x):
    """Return the inverse of to_blocks."""
    return x.flatten(-2).transpose(-1, -2)


def madformer_loss(f, model, **changes):
    """Return the losses of the file's latents as released, except for these changes."""
    released = {"target": "noise", "image_weight": 1.0, "hidden": "sum", "hidden_weight": 0.1,
                "clean_weight": 0.0}
    model.config = dataclasses.replace(model.config, **{**released, **changes})
    latents = model.join(to_blocks(f["in/clean"]))
    labels = torch.zeros(len(latents), dtype=torch.long)
    return model(latents, labels, t=f["in/t"], eps=to_blocks(f["in/noise"]))


CLEAN = {"clean_weight": 0.1, "clean_target": "same"}
PASSES = {  # released loss -> our term, the released output in it, and the choices that lead to it
    "loss_image": ("image", "pred", {}),
    "loss_image_sample": ("image", "pred", {"target": "clean"}),
    "loss_hidden": ("hidden", "condition", {}),
    "loss_hidden_before_add": ("hidden", "condition_before_add", {"hidden": "condition"}),
    "loss_clean_tower": ("clean", "clean_tower", CLEAN),
    "loss_clean_tower_next": ("clean", "clean_tower", {**CLEAN, "clean_target": "next"})}


@pytest.mark.parametrize("name,mode", MODES)
def test_madformer_outputs(name, mode):
    """Each output and its loss, as released and as in the paper."""
    f = Fixture(name)
    theirs = f.below(f"out/{mode}/" if mode else "out/")
    model = madformer_of(f, mode)
    has_condition = model.config.condition
    model.noised = Spy(model.noised)
    for loss, (term, output, changes) in PASSES.items():
        if loss not in theirs or term == "hidden" and not has_condition:
            continue
        model.upsample = Spy(model.upsample)
        out = madformer_loss(f, model, **changes)
        close(out[term], theirs[loss], name=loss)
        [_, *terms] = out  # in the order in which the upsampler runs
        blocks = dict(zip(terms, model.upsample.results, strict=True))
        close(from_blocks(blocks[term]), theirs[output], 2e-5, name=output)
    close(from_blocks(model.noised.results[0]), f["in/noised"], 1e-6)
    if not has_condition:  # then the file has what the upsampler makes of the noisy latents alone
        model.run_layers = lambda rows, layout, text, z: (rows, torch.zeros_like(z))
        madformer_loss(f, model, condition=True)
        close(from_blocks(model.upsample.results[-1]), theirs["condition"], 2e-5)


@pytest.mark.parametrize("name,mode", MODES)
def test_madformer_gradients(name, mode):
    """The released total and its gradients; where the file has it, with the clean tower's loss."""
    f = Fixture(name)
    folder = f"{mode}/" if mode else ""
    for end, changes in (("", {}), ("_all", CLEAN)):
        if f"out/{folder}grad_norms{end}" not in f:
            continue
        model = madformer_of(f, mode)
        loss = madformer_loss(f, model, **changes)["loss"]
        close(loss, f[f"out/{folder}loss_total{end}"])
        loss.backward()
        norms = zip(f.meta["grad_names"], f[f"out/{folder}grad_norms{end}"], strict=True)
        for theirs in (dict(norms), f.below(f"grad{end}/{folder}")):
            check_gradients(model, madformer.RELEASED, theirs, 1e-4, 1e-6)


def test_madformer_rows():
    """Tokens of the first image, and its rows after the AR layers and after all."""
    f = Fixture("madformer")
    model = madformer_of(f)
    model.run_layers = Spy(model.run_layers)
    madformer_loss(f, model)
    [(tokens, _, _, z)] = model.run_layers.args
    [(last, condition)] = model.run_layers.results
    f.check(clean_down0=tokens["clean"][0], noised_down0=z[0], tolerance=2e-5,
            h_final0=torch.cat([last["clean"][0], last["noise"][0]]))
    close(condition[0], f["out/h_ar0"].chunk(2)[1], 2e-5)


def test_madformer_ablations_shared_set():
    """One set of parameters gives what two equal ones give."""
    f = Fixture("madformer_ablations")
    outputs = []
    for shared in (True, False):
        model = madformer_of(f, "single_set", shared=shared)
        assert (model.layers[0].towers.clean is model.layers[0].towers.noise) == shared
        up = spied(model.up)
        madformer_loss(f, model, clean_weight=0.1)
        outputs.append(torch.stack(up.results))
    close(*outputs, 1e-6)


def test_madformer_masks():
    """The rule in all variants, block by block, against the released masks."""
    f = Fixture("madformer")
    for name, blocks in f.below("out/mask_").items():
        no_clean = "no_clean" in name
        model = madformer_of(f, clean_blocks=not no_clean)
        kinds = [madformer.NOISE] if no_clean else [madformer.CLEAN, madformer.NOISE]
        layout = torch.cat([model.image_layout(kind) for kind in kinds], 1)
        mask = madformer.dense_mask(layout, torch.zeros(1, 0), isolated="mlp" in name)
        block = torch.ones(model.config.tokens, model.config.tokens)
        expected = torch.kron(blocks, block).bool()
        assert torch.equal(mask[0, 0], expected), name


def test_madformer_rotary():
    """Bases, frequencies that end at exactly 1 / base, and the form that is no rotation."""
    f = Fixture("madformer")
    side = f["out/rope_cos_table"].shape[0]
    angles = madformer.rotary_grid(*f["in/rope_pos"], side)
    f.check(rope_q=madformer.rotate(f["in/rope_q"], angles),
            rope_k=madformer.rotate(f["in/rope_k"], angles))
    diagonal = torch.arange(side)
    cos, sin = madformer.rotary_grid(diagonal, diagonal, side)[:, :, :madformer.HEAD // 2]
    f.check(rope_cos_table=cos, rope_sin_table=sin)
    model = madformer_of(f)
    assert torch.equal(model.image[1:], f["out/position_ids"])
    assert model.config.side == f.config["tokens_per_side"]


def sampler_of(f, mode, name):
    """Return the model in a mode, with a sampler such as dpm_x0."""
    target = "clean" if name.endswith("_x0") else "noise"
    kind = name.split("_")[0]
    return madformer_of(f, mode, steps=f.meta["steps"], target=target, sampler=kind)


def sampled_blocks(f, model):
    """Return the blocks that are sampled from the file's noise."""
    noise = Replay(*to_blocks(f["in/noise"]).unbind(1))
    labels = torch.zeros(len(f["in/noise"]), dtype=torch.long)
    return from_blocks(model.cut(model.sample(labels, noise)))


@pytest.mark.parametrize("mode", ["default", *Fixture("madformer_sample").meta["modes"]])
def test_madformer_sample(mode):
    """Every sampler under every switch, but for DDIM with clipping, which we do not have."""
    f = Fixture("madformer_sample")
    for name, theirs in f.below(f"out/{mode}/").items():
        if name != "ddim" and not name.endswith(("_timesteps", "_pred", "_x")):
            close(sampled_blocks(f, sampler_of(f, mode, name)), theirs, 1e-4, name=name)


@pytest.mark.parametrize("name", ["ddim_noclip", "dpm"])
def test_madformer_sample_steps(name):
    """The network's output and the latent after each step of each block."""
    f = Fixture("madformer_sample")
    theirs = f.below(f"out/default/{name}_")
    model = sampler_of(f, "default", name)
    ts, _, _ = madformer.schedule(model.config.sampler, f.meta["steps"])
    assert ts == theirs["timesteps"].tolist()
    model.denoise = Spy(model.denoise)
    last = sampled_blocks(f, model).transpose(0, 1)
    outputs = from_blocks(torch.stack(model.denoise.results))
    close(outputs.view(theirs["pred"].shape), theirs["pred"], 1e-4)
    inputs = from_blocks(torch.stack([args[0] for args in model.denoise.args]))
    inputs = inputs.view(theirs["x"].shape)
    close(torch.cat([inputs[:, 1:], last[:, None]], 1), theirs["x"], 1e-4)


def test_schedulers_noising():
    """The variances of all steps, and the noisy latents."""
    f = Fixture("schedulers")
    model = madformer.MADFormer(madformer.PRESETS["tiny"])
    x = f["in/add_x"][:, None, :, None, None]
    eps = f["in/add_noise"][:, None, :, None, None]
    f.check(alphas_cumprod=model.alphas_bar, tolerance=1e-6,
            add_noise=model.noised(x, eps, f["in/add_t"][:, None]).flatten(1))


def test_schedulers_timesteps():
    """Exactly, for every number of steps in the file."""
    for name, ts in Fixture("schedulers").below("out/timesteps_").items():
        sampler, steps = name.split("/")
        assert madformer.schedule(sampler, int(steps))[0] == ts.tolist(), name


@pytest.mark.parametrize("name", ["ddim_noclip", "ddim_x0", "dpm", "dpm_x0"])
def test_schedulers_trajectories(name):
    """Every point of every trajectory, but for those that are clipped."""
    target = "clean" if name.endswith("_x0") else "noise"
    kind = name.split("_")[0]
    for key, theirs in Fixture("schedulers").below(f"out/{name}/").items():
        steps, what = key.split("/")
        if what != "x":
            continue
        ts, _, _ = madformer.schedule(kind, int(steps))
        network = Spy(lambda x, i: 0.3 * x + 0.1 * math.sin(ts[i] / 100))
        *_, last = madformer.solve(network, theirs[0], kind, int(steps), target)
        close(torch.stack([*(x for x, _ in network.args), last]), theirs, 2e-5, name=key)


def unet_halves(f):
    """Return the fixture's downsampler and upsampler."""
    c = f.config
    unet = madformer.UNetConfig(
        c["unet_block_out_channels"], c["unet_num_layers_per_block"],
        [flag == 1 for flag in c["unet_transformer_layers_per_block"]],  # more than 1: none
        groups=c["unet_resnet_groups"], heads=c["unet_num_heads"], time_dim=c["unet_time_emb_dim"])
    config = madformer.Config(
        image_size=8 * f["in/x"].shape[-1], ar_length=1, dim=c["hidden_size"], mlp=64, depth=1,
        diffusion_depth=1, unet=unet,
        vae=dataclasses.replace(common.SD_VAE, channels=c["latent_channels"]))
    down = madformer.Downsampler(config)
    up = madformer.Upsampler(config, down.skip_widths)
    parts = torch.nn.ModuleDict({"down": down, "up": up})
    common.load_strict(parts, common.renamed(f.state(), madformer.RELEASED), "the fixture")
    return down, up


def rows(x):
    """Return feature maps (M, C, p, p) as rows (M, p^2, C)."""
    return x.flatten(2).transpose(1, 2)


def test_unet_blocks():
    """The output of every layer."""
    f = Fixture("unet_blocks")
    down, up = unet_halves(f)
    e_down = down.time(f["in/t"])
    e_up = up.time(f["in/t"])
    tokens, skips = down(f["in/x"], e_down)
    for k, skip in enumerate(skips):
        close(skip, f[f"out/down_res_{k}"])
    k = list(down.layers).index("1_0") + 1
    f.check(temb_down=e_down, temb_up=e_up, up_of_down=up(tokens, e_up, skips),
            resnet0=down.layers["0_0"](f["out/down_res_0"], e_down),
            attn0=down.layers["1_0"].attention(f[f"out/down_res_{k}"]))
    layers = [spied(layer) for layer in up.layers.values()]
    up(rows(f["in/hidden"]), e_up, skips)
    stages = f.below("out/up_stage_")
    for layer, k in zip(layers, sorted(stages), strict=True):
        close(layer.results[0], stages[k])


@pytest.mark.parametrize("key,end", [("in/t", ""), ("in/t_scalar", "_scalar_t")])
def test_unet_blocks_times(key, end):
    """Both halves, with a step for each block or one for the whole batch."""
    f = Fixture("unet_blocks")
    down, up = unet_halves(f)
    t = f[key].view(-1)
    tokens, skips = down(f["in/x"], down.time(t))
    close(tokens, rows(f[f"out/down{end}"]))
    close(up(rows(f["in/hidden"]), up.time(t), skips), f[f"out/up{end}"])


# --- Evaluation -----------------------------------------------------------------------------------

RESIZES = [("tf1", "tf1"), ("pytorch", "pt")]  # our name and the file's
EXACT = {"tf1": 1e-6, "pytorch": 2e-5}
POOLED = {"pooled64": "pool_1", "pooled192": "pool_2", "pooled768": "Mixed_6e"}


def test_inception_weights(inception_file):
    """A file like the published one, whose weights have the recipe's check values."""
    f = Fixture("inception")
    state = fid.load_inception(inception_file)[0].state_dict()
    for name, first in f.below("out/param_first4/").items():
        weights = state[name].double().flatten()
        assert torch.equal(weights[:4].float(), first), name
        total = torch.stack([weights.sum(), weights.abs().sum()])
        close(total, f[f"out/param_sum/{name}"], 1e-9)


@pytest.mark.parametrize("resize,variant", RESIZES)
def test_inception_features(inception_file, resize, variant):
    """Resizing, every output, and the moments after every layer, for images of all sizes."""
    f = Fixture("inception")
    network, _ = fid.load_inception(inception_file)
    layers = {k: spied(layer) for k, layer in network.named_children() if k != "fc"}
    for name in f.meta["images"]:
        theirs = f.below(f"out/{name}/{variant}/")
        x = fid.RESIZE[resize](f[f"in/image/{name}"])
        close(x[:, :, ::23, ::23], theirs["resized_grid"], 0.0, EXACT[resize])
        pool3, logits, spatial = network(x)
        after = {k: spy.results[-1].double() for k, spy in layers.items()}
        moments = []
        for h in (*after.values(), pool3.double()):
            moments.append((h.mean(), h.square().mean().sqrt()))
        ours = {"pool3": pool3, "spatial": spatial, "logits_unbiased": logits,
                "logits": logits + network.fc.bias, "layer_moments": torch.tensor(moments)}
        for output, layer in POOLED.items():
            ours[output] = after[layer].mean((2, 3))
        for output in ours.keys() & theirs.keys():
            close(ours[output], theirs[output], 5e-4, name=f"{name}/{output}")


@pytest.mark.parametrize("resize,variant", RESIZES)
def test_inception_distances(inception_file, tmp_path, resize, variant):
    """FID, sFID, IS, precision and recall of two small sets, as the command line computes them."""
    f = Fixture("inception")
    theirs = f.below(f"out/e2e/{variant}/")
    evaluator = fid.Evaluator(None, resize=resize, weights=inception_file)
    sides = []
    for name in ("set_a", "set_b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=f[f"in/{name}"].numpy())
        sides.append(evaluator.side(fid.Source(tmp_path / f"{name}.npz")))
    a, b = sides
    ours = {}
    ours["precision"], ours["recall"] = fid.precision_recall(a["rows"], b["rows"])
    for end in ("", "_noshuffle"):
        mean, std = fid.inception_score(a["logits"], splits=2, shuffle=not end)
        ours[f"isc_mean_2splits{end}"] = mean
        ours[f"isc_std_2splits{end}"] = std
    for name, end in (("fid_exact", ""), ("sfid_exact", "_s")):
        if name in theirs:
            moments = [side[part + end] for side in sides for part in ("mu", "sigma")]
            ours[name] = fid.frechet(*moments)
    for name in ours.keys() & theirs.keys():
        rel = 1e-2 if "std" in name else 1e-4
        assert ours[name] == pytest.approx(theirs[name].item(), rel=rel), name


def test_frechet():
    """Every case, both ways round: 1e-9 where covariances have full rank or are exact, or 1e-6."""
    f = Fixture("frechet")
    singular = ("rank", "near", "few", "identical", "float32")
    for case in f.meta["cases"]:
        given = f.below(f"in/{case}/")
        one = (given["mu1"], given["sigma1"])
        two = (given["mu2"], given["sigma2"])
        exact = f[f"out/{case}/exact"].item()
        absolute = 1e-6 if any(word in case for word in singular) else 1e-12
        for a, b in ((one, two), (two, one)):
            assert fid.frechet(*a, *b) == pytest.approx(exact, rel=1e-9, abs=absolute), case


def test_frechet_moments():
    """Of features in shards, with large means: sums in float32 lose digits."""
    f = Fixture("frechet")
    shards = f["in/stats/features"].split(f["in/stats/shards"].tolist())
    mean, covariance = fid.gaussian(*fid.added(*map(fid.moments, shards)))
    assert np.abs(mean - f["out/stats/mu"].numpy()).max() <= 1e-9
    assert np.abs(covariance - f["out/stats/sigma"].numpy()).max() <= 1e-9


def cases_of(f, prefix):
    """Return the names between a prefix and the next slash."""
    return sorted({key.split("/")[0] for key in f.below(prefix)})


IS_RULES = {"torch_fidelity": {}, "torch_fidelity_noshuffle": {"shuffle": False},
            "torch_fidelity_1split": {"splits": 1, "shuffle": False}}


def test_is_pr_scores():
    """Scores by the rules of torch-fidelity and of the ADM suite, which is one split per chunk."""
    f = Fixture("is_pr")
    for case in cases_of(f, "in/is/"):
        logits = f[f"in/is/{case}/logits"]
        for name, how in IS_RULES.items():
            theirs = f[f"out/is/{case}/{name}"].tolist()
            ours = fid.inception_score(logits, **how)
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9), (case, name)
        chunks = logits.split(int(f[f"in/is/{case}/adm_split_size"]))
        scores = [fid.inception_score(chunk, splits=1, shuffle=False)[0] for chunk in chunks]
        theirs = f[f"out/is/{case}/adm_float64"].item()
        assert np.mean(scores) == pytest.approx(theirs, rel=1e-6, abs=1e-9), case


def test_is_pr_neighbourhoods():
    """Radii, and which points lie in whose neighbourhood, with ties and repeated points."""
    f = Fixture("is_pr")
    for case in cases_of(f, "in/pr/"):
        out = f"out/pr/{case}/"
        reference = f[f"in/pr/{case}/ref"].double()
        samples = f[f"in/pr/{case}/sample"].double()
        shares = f[out + "precision_recall"].tolist()
        assert fid.precision_recall(samples, reference) == pytest.approx(shares, abs=1e-7)
        for name, points in (("ref", reference), ("sample", samples)):
            theirs = f[f"{out}radii_{name}"]
            torch.testing.assert_close(fid.radii(points), theirs, rtol=1e-9, atol=1e-9)
        within = fid.inside(samples, reference, fid.radii(reference)).long()
        assert within.tolist() == f[out + "sample_in_ref"].tolist()
