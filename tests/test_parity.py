"""The same numbers as the released implementations: inputs, weights and outputs from tests/fixtures/*.npz.

PARITY_FIXTURES=FOLDER runs other files of the same names. Sizes and cases come from the files: nothing is fixed here.
"""
import dataclasses
import json
import math
import os
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
        meta = json.loads(str(self.arrays["meta"]))
        self.meta, self.config, self.names = meta, meta.get("config"), meta.get("param_names", [])

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


# --- D-AR -------------------------------------------------------------------------------------------------------------

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


def tokenizer_of(f, **overrides):
    state = {**f.state(), **{name: made(f, name) for name in f.meta["recipe"]["parameters"]}}
    return dar.tokenizer_from_released(state, f.config, image_size=f.meta["image_size"], **overrides)


def lpips_of(f):
    state = {name: made(f, name) for name in f.meta["recipe"]["parameters"]}
    return dar.lpips_from_states(state, {k: v for k, v in state.items() if k.startswith("lin")})


@torch.no_grad()
def test_dar_tokenizer_codes():
    """Encoder, mask, rotations, normalised codebook, causal layers; the codes exactly."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    features = tokenizer.features(f["in/x"])
    close(features, f["out/enc_tokens"])
    close(tokenizer.to_code(features), f["out/z_pre"])
    codes = tokenizer.encode(f["in/x"]).long()
    assert torch.equal(codes, f["out/codes"])
    close(tokenizer.quantizer.codewords()[codes], f["out/zq"])
    close(tokenizer.condition(f["out/zq"])[0], f["out/cond"])


def test_dar_tokenizer_pictures():
    """Decodings with every solver and number of steps, the released previews, and the paper's jump-estimates."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)
    solver = {"adams2": "adams", "euler": "euler"}
    for run in f.meta["runs"]:
        n, steps = run["batch"], run["steps"]
        codes, noise, seen = f["out/codes"][:n], f["in/decode_noise"][:n], []
        how = dict(steps=steps, solver=solver[run["method"]])
        tokenizer.decode(codes, noise, **how, on_step=lambda k, x: seen.append(x))
        pictures = [noise / tokenizer.config.data_std, *seen]  # after 0 .. steps steps
        k = steps if run["clip"] is None else run["clip"]
        close(pictures[k], f[f"out/{run['name']}"], 1e-4)
        ends = [0, *dar.Decoding(tokenizer, noise, **how).ends, math.inf]
        if ends[k] < ends[k + 1]:  # the same from the first tokens alone
            close(tokenizer.decode(codes[:, :ends[k]], noise, **how), f[f"out/{run['name']}"], 1e-4)
        for i in run.get("jump", []):
            jumps = []
            tokenizer.decode(codes, noise, **how, preview="v", on_step=lambda k, x: jumps.append(x))
            close(jumps[i][:1], f[f"out/jump_{run['name']}_{i}"], 1e-4)


def test_dar_tokenizer_loss():
    """Every part of Eq. 7, on the tokens that count, and the gradient of every parameter."""
    f = Fixture("dar_tokenizer")
    tokenizer = tokenizer_of(f)

    class Dino:  # hands out the file's features
        def forward_features(self, x):
            return {"x_norm_patchtokens": made(f, f.meta["recipe"]["target"]["name"])}

    tokenizer.judges, seen = (None, (Dino(), 0.5)), {}
    tokenizer.requires_grad_(True).train()
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
    for ours, theirs in (("codebook", "vq"), ("commitment", "commit"), ("flow", "fm"), ("repa", "repa")):
        close(out[ours], f[f"out/{theirs}_loss"])
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
        gap = (ours[next(iter(dar.renamed({name: torch.zeros(())})))].norm() - f[key]).abs()
        assert gap <= 5e-5 * f[key] + 1e-6, name
    close(ours["quantizer.embedding.weight"], f["out/grad/quantize.embedding.weight"], 2e-5)
    rows = f["out/grad/query_embedding.weight"]
    close(ours["query_table.weight"][:len(rows)], rows, 2e-5)

    tokenizer.judges, tokenizer.lpips_dropout = ((lpips_of(Fixture("lpips")), 0.5), (Dino(), 0.5)), 0.0
    out = tokenizer(x, u=u, noise=f["in/train_noise"])
    close(out["lpips"], f["out/lpips_x_pred"].mean(), 1e-4)
    close(out["loss"], f["out/total"], 2e-5)


def test_dar_lpips():
    """Taps, normalisation, weights of the five parts; and the gradient that the tokenizer learns from (in float64: in
    float32 rounding decides on which side of a ReLU's kink a few values lie)."""
    f = Fixture("lpips")
    network, x, y = lpips_of(f), f["in/x"], f["in/y"]
    parts = network(x, y)
    close(parts, f["out/per_layer"], 1e-4)
    close(parts.sum(0), f["out/lpips"], 1e-4)
    for k, tap in enumerate(network.taps(x)):
        close(tap.mean((2, 3)), f[f"out/feat{k}_mean"], 1e-4)
    assert torch.equal(network(x, x).sum(0), f["out/lpips_same"])
    y = y.double().requires_grad_(True)
    network.double()(x, y).sum().backward()
    assert (y.grad - f["out/grad_y"]).abs().max() <= 1e-6


def llama_of(f, **overrides):
    c = f.config
    tokenizer = dar.TokenizerConfig(codebook=c["vocab_size"], queries=c["block_size"])
    return dar.ar_from_released(f.state(), heads=c["n_head"], tokenizer=tokenizer, dropout=0.0, repa_weight=0.0,
                                label_drop=c["class_dropout_prob"], **overrides)


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
        name = next(iter(dar.renamed({key.removeprefix("out/grad_norm/"): torch.zeros(())})))
        close(ours[name].norm(), f[key], 2e-5)


@pytest.mark.parametrize("way", ["cached", "plain"])
def test_dar_ar_tokens(monkeypatch, way):
    """Every run's tokens exactly, and the probabilities that each was drawn from. The released draw (argmax of
    probabilities over exponentials) takes the place of ours."""
    f = Fixture("dar_ar")
    model, labels = llama_of(f), f["in/gen_labels"]
    N, V = f.config["block_size"], f.config["vocab_size"]
    for run in f.meta["runs"]:
        a, b = (float(x) for x in run["cfg"].split(",")) if isinstance(run["cfg"], str) else [run["cfg"]] * 2
        if isinstance(run["cfg"], str):
            a = 1.001 if a == 1 < b else a  # the released code's way of keeping guidance on
            close(torch.tensor(common.guidance_scales((a, b), N)), f[f"out/cfg_schedule/{run['cfg']}"], 1e-6)
        draws = torch.ones(N, len(labels), V) if run["argmax"] else f[f"in/exp_{run['name']}"]
        draws, probs = iter(draws), []

        def race(p, u, draws=draws, probs=probs):
            probs.append(p)
            return (p / next(draws)).argmax(-1)
        monkeypatch.setattr(dar, "pick", race)
        how = dict(cfg=(a, b), temperature=run["temperature"], top_k=run["top_k"], top_p=run["top_p"])
        theirs, noise = f[f"out/tokens_{run['name']}"], common.Noise.of(0, range(len(labels)))
        if way == "plain":
            if run["prefix"]:
                continue
            codes = model.sample_plainly(labels, noise, **how)
        else:
            prefix = torch.full_like(theirs, -1)
            prefix[:, :run["prefix"]] = theirs[:1, :run["prefix"]]
            codes = model.sample(labels, noise, prefix=prefix, **how)
        assert torch.equal(codes, theirs), run["name"]
        if f"out/probs_{run['name']}" in f:
            close(torch.stack(probs), f[f"out/probs_{run['name']}"], 2e-5)


def test_dar_ar_filters():
    f = Fixture("dar_ar")
    for case in f.meta["filters"]:
        how = {k: case[k] for k in ("temperature", "top_k", "top_p")}
        close(dar.probabilities(f["in/filter_logits"], **how), f[f"out/probs_{case['name']}"])
        if f"out/probs_{case['name']}_ties" in f:
            close(dar.probabilities(f["in/filter_logits_ties"], **how), f[f"out/probs_{case['name']}_ties"])


# --- MADFormer --------------------------------------------------------------------------------------------------------

def unet_of(c):
    """The released U-Net configuration; a level has attention if its flag is exactly 1."""
    return madformer.UNetConfig(
        tuple(c["unet_block_out_channels"]), tuple(c["unet_num_layers_per_block"]),
        tuple(int(flag == 1) for flag in c["unet_transformer_layers_per_block"]), groups=c["unet_resnet_groups"],
        heads=c["unet_num_heads"], time_dim=c["unet_time_emb_dim"])


def madformer_of(f, state, flags=(), diff_depth=None, **overrides):
    """The released model under these switches; what its shapes do not tell comes from the file."""
    c = f.config
    switches = {field: value for switch, (field, value) in madformer.SWITCHES.items() if dict(flags).get(switch)}
    assert c["head_dim"] == madformer.HEAD and c["rms_norm_eps"] == 1e-5
    model = madformer.from_released(
        state, ar_length=c["ar_len"], diffusion_depth=diff_depth or c["diff_depth"],
        unet={"groups": c["unet_resnet_groups"], "heads": c["unet_num_heads"]}, **switches, **overrides)
    u = model.config.unet
    assert (model.config.dim, model.config.mlp, model.config.depth) == (c["hidden_size"], c["intermediate_size"],
                                                                        c["depth"])
    assert u == unet_of(c)
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
    """Records what a MADFormer's downsampler, towers and upsampler give while a loss is computed."""

    def __init__(self, model):
        self.tokens, self.kept, self.rows, self.condition = None, None, None, None
        down, towers = model.down.forward, model.towers

        def watched_down(x, t):
            self.tokens, self.kept = down(x, t)
            return self.tokens, self.kept

        def watched_towers(rows, about, z):
            self.rows, self.condition = towers(rows, about, z)
            return self.rows, self.condition
        model.down.forward, model.towers = watched_down, watched_towers


def check_madformer(f, model, out, prefix, totals):
    """Outputs and losses of one forward pass, and gradients for each total: {name of norms: (weights, prefix)}."""
    model.requires_grad_(True)
    c, B = model.config, len(f["in/clean"])
    clean, eps, t = f["in/clean"], f["in/noise"], f["in/t"]
    watch = Watch(model)
    x = model.join(to_blocks(clean))
    close(from_blocks(model.noised(to_blocks(clean), to_blocks(eps), t)), f["in/noised"], 1e-6)

    def loss(**changes):
        model.config = dataclasses.replace(c, target="noise", image_weight=1.0, hidden_weight=0.1, **changes)
        return model(x, torch.zeros(B, dtype=torch.long), t=t, eps=to_blocks(eps))

    result = loss(hidden="sum")
    close(result["image"], f[f"{prefix}loss_image"])
    close(result["loss"], f[f"{prefix}loss_total"])
    if c.condition:
        close(result["hidden"], f[f"{prefix}loss_hidden"])
        if f"{prefix}loss_hidden_before_add" in f:
            close(loss(hidden="condition")["hidden"], f[f"{prefix}loss_hidden_before_add"])
    model.config = dataclasses.replace(c, target="clean")
    close(model(x, torch.zeros(B, dtype=torch.long), t=t, eps=to_blocks(eps))["image"], f[f"{prefix}loss_image_sample"])

    def up(rows, kept, m=c.ar_length):
        kept = [k.unflatten(0, (B, -1))[:, :m].flatten(0, 1) for k in kept]
        blocks = model.up(rows.unflatten(1, (m, -1)).flatten(0, 1), model.up.time(t[:, :m].flatten()), kept)
        return from_blocks(blocks.unflatten(0, (B, m)))

    of_clean, of_noisy = zip(*(k.chunk(2) for k in watch.kept))
    z = watch.tokens.chunk(2)[1].unflatten(0, (B, -1)).flatten(1, 2)
    close(up(watch.rows["noise"], of_noisy), f[f"{prefix}pred"], 2e-5)
    condition = watch.condition if c.condition else torch.zeros_like(z)
    close(up(condition + z, of_clean), f[f"{prefix}condition"], 2e-5)
    if c.condition and f"{prefix}condition_before_add" in f:
        close(up(condition, of_clean), f[f"{prefix}condition_before_add"], 2e-5)
    if c.clean_blocks:  # the last clean block is seen by nobody: here it does not run
        told = {}
        for target in ("same", "next"):
            result = loss(clean_weight=0.1, clean_target=target)
            told[target] = result["clean"]
        close(told["same"], f[f"{prefix}loss_clean_tower"])
        close(told["next"], f[f"{prefix}loss_clean_tower_next"])
        close(up(watch.rows["clean"], of_clean, c.seen), f[f"{prefix}clean_tower"][:, :c.seen], 2e-5)
    names = json.loads(str(f.arrays["meta"]))["grad_names"]
    for norms, (changes, full) in totals.items():
        model.zero_grad()
        loss(hidden="sum", **changes)["loss"].backward()
        ours = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

        def gradient(name, ours=ours):
            return ours.get(next(iter(madformer.renamed({name: torch.zeros(())}))), torch.zeros(()))
        for name, theirs in zip(names, f[norms], strict=True):
            assert (gradient(name).norm() - theirs).abs() <= 1e-4 * theirs + 1e-5, name
        for key in f.keys(full):
            gap = (gradient(key.removeprefix(full)) - f[key]).abs().max()
            assert gap <= 1e-4 * f[key].abs().max() + 1e-6, key
    return watch


def test_madformer():
    """Predictions, condition with and without the noisy latent, clean tower, every loss, every gradient."""
    f = Fixture("madformer")
    model = madformer_of(f, f.state())
    watch = check_madformer(f, model, f, "out/", {
        "out/grad_norms": ({}, "grad/"), "out/grad_norms_all": ({"clean_weight": 0.1, "clean_target": "same"},
                                                               "grad_all/")})
    T, n = model.config.ar_length, model.config.tokens
    clean, z = watch.tokens.chunk(2)
    close(clean[:T].flatten(0, 1), f["out/clean_down0"], 2e-5)
    close(z[:T].flatten(0, 1), f["out/noised_down0"], 2e-5)
    close(watch.condition[0], f["out/h_ar0"][T * n:], 2e-5)
    close(watch.rows["noise"][0], f["out/h_final0"][T * n:], 2e-5)
    close(watch.rows["clean"][0], f["out/h_final0"][:(T - 1) * n], 2e-5)


@pytest.mark.parametrize("mode,how", modes_of("madformer_ablations"), ids=lambda x: x if isinstance(x, str) else "")
def test_madformer_ablations(mode, how):
    f = Fixture("madformer_ablations")
    model = madformer_of(f, state_of(f, mode), how["flags"], how["diff_depth"])
    check_madformer(f, model, f, f"out/{mode}/", {f"out/{mode}/grad_norms": ({}, f"grad/{mode}/")})


def test_madformer_shared_set():
    """One set of parameters gives what two equal ones give; its gradient is the sum of theirs."""
    f = Fixture("madformer_ablations")
    mode = "single_set"
    state = madformer.renamed(state_of(f, mode))
    one = {k.replace(".noise.", ".all."): v for k, v in state.items() if ".sets.clean." not in k}
    config = dataclasses.replace(madformer_of(f, state_of(f, mode)).config, shared=True)
    model = madformer.MADFormer(config)
    common.load_strict(model, one, "the fixture")
    check_madformer(f, model, f, f"out/{mode}/", {})


def test_madformer_masks():
    """The rule in all variants, block by block, against the released masks."""
    f = Fixture("madformer")
    for name, clean, alone in (("default", True, False), ("mlp", True, True), ("no_clean", False, False),
                               ("mlp_no_clean", False, True)):
        model = madformer_of(f, f.state(), {"clear_clean": not clean})
        T, n = model.config.ar_length, model.config.tokens
        parts = [model.image_layout(madformer.CLEAN, 0, T)] * clean + [model.image_layout(madformer.NOISE, 0, T)]
        rows = madformer.together(parts)
        i = torch.arange(len(rows.place))
        mask = madformer.rule(rows, rows, alone)(torch.zeros(1, 1, dtype=torch.long), None, i[:, None], i)
        blocks = f[f"out/mask_{name}"].bool()
        assert torch.equal(mask, blocks.repeat_interleave(n, 0).repeat_interleave(n, 1)), name


def test_madformer_rotary():
    """Bases, frequencies that end at exactly 1 / base, and the form that is no rotation."""
    f = Fixture("madformer")
    side = f["out/rope_cos_table"].shape[0]
    rows, columns = f["in/rope_pos"]
    angles = madformer.rotary_grid(rows, columns, side)
    close(madformer.rotate(f["in/rope_q"], angles), f["out/rope_q"])
    close(madformer.rotate(f["in/rope_k"], angles), f["out/rope_k"])
    line = madformer.rotary_grid(torch.arange(side), torch.arange(side), side)[..., :madformer.HEAD // 2]
    close(line[0], f["out/rope_cos_table"])
    close(line[1], f["out/rope_sin_table"])
    model = madformer_of(f, f.state())
    r, c = f["out/position_ids"]
    close(model.rotary, madformer.rotary_grid(r, c, f.config["tokens_per_side"]))


@pytest.mark.parametrize("mode,how", modes_of("madformer_sample"), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("way", ["cached", "plain"])
def test_madformer_sample(mode, how, way):
    """Every sampler under every switch, with the caches and without."""
    f = Fixture("madformer_sample")
    for key in f.keys(f"out/{mode}/"):
        sampler = key.removeprefix(f"out/{mode}/")
        if sampler.endswith(("_timesteps", "_pred", "_x")):
            continue
        model = madformer_of(f, state_of(f, mode), how["flags"], how.get("diff_depth"), steps=f.meta["steps"],
                             target="clean" if sampler.endswith("_x0") else "noise", sampler=sampler.split("_")[0])
        noise = Replay(*to_blocks(f["in/noise"]).unbind(1))
        labels = torch.zeros(len(f["in/noise"]), dtype=torch.long)
        clip = 1.0 if sampler == "ddim" else 0.0
        latents = (model.sample if way == "cached" else model.sample_plainly)(labels, noise, clip=clip)
        close(from_blocks(model.cut(latents)), f[key], 1e-4)


def test_madformer_sample_steps():
    """The network's output and the latent after each step of each block."""
    f = Fixture("madformer_sample")
    for sampler, kind in (("ddim_noclip", "ddim"), ("dpm", "dpm")):
        model = madformer_of(f, state_of(f, "default"), steps=f.meta["steps"], sampler=kind)
        assert madformer.schedule(kind, f.meta["steps"])[0] == f[f"out/default/{sampler}_timesteps"].tolist()
        outputs, inputs, denoise = [], [], model.denoise

        def watched(x, *args, inputs=inputs, outputs=outputs, denoise=denoise):
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
        close(from_blocks(model.cut(latents)).transpose(0, 1), f[f"out/default/{sampler}_x"][:, -1], 1e-4)


def test_schedulers():
    """Timesteps exactly, and every point of every trajectory."""
    f = Fixture("schedulers")
    close(madformer.alphas_bar(), f["out/alphas_cumprod"], 1e-6)
    model = madformer.MADFormer(dataclasses.replace(madformer.PRESETS["tiny"], text=False))
    x = f["in/add_x"][:, :, None, None, None]
    close(model.noised(x.transpose(1, 2), f["in/add_noise"][:, :, None, None, None].transpose(1, 2),
                       f["in/add_t"][:, None]).flatten(1), f["out/add_noise"], 1e-6)
    for key in f.keys("out/timesteps_"):
        sampler, steps = key.removeprefix("out/timesteps_").split("/")
        assert madformer.schedule(sampler, int(steps))[0] == f[key].tolist(), key
    for key in f.keys("out/"):
        if not key.endswith("/x"):
            continue
        name, steps = key.split("/")[1:3]
        kind, theirs, ours = name.split("_")[0], f[key], []

        def network(x, i, t, ours=ours):
            ours.append(x)
            return 0.3 * x + 0.1 * math.sin(t / 100)
        clip = 1.0 if name in ("ddim", "ddim_x0_clip") else 0.0
        target = "clean" if "_x0" in name else "noise"
        ours.append(madformer.solve(network, theirs[0], kind, int(steps), target, clip))
        close(torch.stack(ours), theirs, 2e-5)


@torch.no_grad()
def test_unet_blocks():
    """Down- and upsampler, feature by feature; one step for the whole batch, too."""
    f = Fixture("unet_blocks")
    c = f.config
    unet = unet_of(c)
    config = madformer.Config(
        image_size=8 * f["in/x"].shape[-1], ar_length=1, dim=c["hidden_size"], mlp=64, depth=1, diffusion_depth=1,
        unet=unet, vae=dataclasses.replace(common.SD_VAE, channels=c["latent_channels"]))
    parts = torch.nn.ModuleDict({"down": madformer.Downsampler(config), "up": madformer.Upsampler(config)})
    common.load_strict(parts, madformer.renamed(f.state()), "the fixture")
    down, up = parts["down"], parts["up"]
    close(down.time(f["in/t"]), f["out/temb_down"])
    close(up.time(f["in/t"]), f["out/temb_up"])
    tokens, kept = down(f["in/x"], down.time(f["in/t"]))
    hidden = f["in/hidden"]
    close(tokens.transpose(1, 2).view(f["out/down"].shape), f["out/down"])
    for k, feature in enumerate(kept):
        close(feature, f[f"out/down_res_{k}"])
    close(down.levels[0].resnets[0](f["out/down_res_0"], f["out/temb_down"]), f["out/resnet0"])
    behind = 2 + unet.blocks[0]  # conv_in, the first level's blocks, its resampling
    close(down.levels[1].attentions[0](f[f"out/down_res_{behind}"]), f["out/attn0"])
    stages = []
    for level in up.levels:
        def watched(j, x, e, block=level.block):
            stages.append(block(j, x, e))
            return stages[-1]
        level.block = watched
        if level.resample is not None:
            level.resample.register_forward_hook(lambda module, args, out: stages.append(out))
    close(up(hidden.flatten(2).transpose(1, 2), up.time(f["in/t"]), kept), f["out/up"])
    for k in range(len(f.keys("out/up_stage_"))):
        close(stages[k], f[f"out/up_stage_{k}"])
    close(up(tokens, up.time(f["in/t"]), kept), f["out/up_of_down"])
    one = f["in/t_scalar"].view(1)
    tokens, kept = down(f["in/x"], down.time(one))
    close(tokens.transpose(1, 2).view(f["out/down"].shape), f["out/down_scalar_t"])
    close(up(hidden.flatten(2).transpose(1, 2), up.time(one), kept), f["out/up_scalar_t"])


# --- Evaluation -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def inception(inception_file):
    """The network with the fixture's weights, from a file like the published one; the recipe's checks hold."""
    f, state = Fixture("inception"), torch.load(inception_file, weights_only=True)
    for name in (key.removeprefix("out/param_first4/") for key in f.keys("out/param_first4/")):
        assert torch.equal(state[name].flatten()[:4], f[f"out/param_first4/{name}"]), name
        total = torch.stack([state[name].double().sum(), state[name].double().abs().sum()])
        close(total, f[f"out/param_sum/{name}"], 1e-9)
    plain = fid.Inception()
    plain.load_state_dict({**plain.state_dict(), **state})
    return {"plain": plain, "folded": fid.load_inception(inception_file)[0]}


@torch.no_grad()
@pytest.mark.parametrize("how", ["plain", "folded"])
def test_inception_features(inception, how):
    """Both resizings, every output, and the moments behind every layer, for images of all sizes in the file."""
    f, network = Fixture("inception"), inception[how]
    for name in f.meta["images"]:
        images = f[f"in/image/{name}"]
        for ours, theirs, exact in (("tf1", "tf1", 1e-6), ("pytorch", "pt", 2e-5)):
            key, x, seen = f"out/{name}/{theirs}/", fid.RESIZE[ours](images), {}
            assert (x[:, :, ::23, ::23] - f[key + "resized_grid"]).abs().max() <= exact
            hooks = [getattr(network, layer).register_forward_hook(
                lambda module, args, out, layer=layer: seen.update({layer: out.clone()})) for layer in network.trunk]
            pool3, spatial, logits = network(x)
            for hook in hooks:
                hook.remove()
            close(pool3, f[key + "pool3"], 5e-4)
            close(spatial, f[key + "spatial"], 5e-4)
            close(logits, f[key + "logits_unbiased"], 5e-4)
            close(logits + network.fc.bias, f[key + "logits"], 5e-4)
            for pooled, layer in (("pooled64", "pool_1"), ("pooled192", "pool_2"), ("pooled768", "Mixed_6e")):
                if key + pooled in f:
                    close(seen[layer].mean((2, 3)), f[key + pooled], 5e-4)
            if key + "layer_moments" in f:
                moments = torch.stack([torch.stack([h.double().mean(), h.double().square().mean().sqrt()])
                                       for h in [*seen.values(), pool3]])
                close(moments, f[key + "layer_moments"], 5e-4)


def test_inception_distances(inception_file, tmp_path):
    """FID, sFID, IS, precision and recall of two small sets, from the images on, by the way of the command line."""
    f = Fixture("inception")
    for name in ("set_a", "set_b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=f[f"in/{name}"].numpy())
    for ours, theirs in (("tf1", "tf1"), ("pytorch", "pt")):
        key = f"out/e2e/{theirs}/"
        judge = fid.Judge(None, resize=ours, weights=inception_file, cache="off")
        a, b = (judge.features(fid.Source(tmp_path / f"set_{name}.npz")) for name in "ab")
        for name, end in (("fid_exact", ""), ("sfid_exact", "_s")):
            if key + name in f:
                distance = fid.frechet(*((side[f"mu{end}"], side[f"sigma{end}"]) for side in (a, b)))
                assert distance == pytest.approx(f[key + name].item(), rel=1e-4), name
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
    """Every case, both ways round; 1e-9 where the covariances have full rank or are exact, else 1e-6 absolute."""
    f = Fixture("frechet")
    for case in f.meta["cases"]:
        one, two = ([f[f"in/{case}/{name}{k}"] for name in ("mu", "sigma")] for k in (1, 2))
        exact = f[f"out/{case}/exact"].item()
        for a, b in ((one, two), (two, one)):
            assert fid.frechet(a, b) == pytest.approx(exact, rel=1e-9, abs=1e-6 if any(
                word in case for word in ("rank", "near", "few", "identical", "float32")) else 1e-12), case


def test_frechet_moments():
    """Streamed over shards, with large means."""
    f = Fixture("frechet")
    whole = fid.Moments()
    for part in f["in/stats/features"].split(f["in/stats/shards"].tolist()):
        shard = fid.Moments()
        shard.add(part)
        whole.merge(shard)
    mean, covariance = whole.gaussian()
    assert np.abs(mean - f["out/stats/mu"].numpy()).max() <= 1e-9
    assert np.abs(covariance - f["out/stats/sigma"].numpy()).max() <= 1e-9


def test_is_pr():
    """Scores by both rules, and who lies in whose neighbourhood, ties and repeated points included."""
    f = Fixture("is_pr")
    for key in f.keys("in/is/"):
        if not key.endswith("/logits"):
            continue
        case, logits = key.split("/")[2], f[key]
        adm = dict(chunk=int(f[f"in/is/{case}/adm_split_size"]), shuffle=False)
        for how, name in ((dict(), "torch_fidelity"), (dict(shuffle=False), "torch_fidelity_noshuffle"),
                          (dict(splits=1, shuffle=False), "torch_fidelity_1split"), (adm, "adm_float64")):
            theirs = np.atleast_1d(f[f"out/is/{case}/{name}"].numpy())
            assert fid.inception_score(logits, **how)[:len(theirs)] == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    for key in f.keys("in/pr/"):
        if not key.endswith("/ref"):
            continue
        case = key.split("/")[2]
        reference, samples = f[key].double(), f[f"in/pr/{case}/sample"].double()
        assert fid.precision_recall(samples, reference) == pytest.approx(
            f[f"out/pr/{case}/precision_recall"].tolist(), abs=1e-7)
        for rows, name in ((reference, "ref"), (samples, "sample")):
            torch.testing.assert_close(fid.radii(rows), f[f"out/pr/{case}/radii_{name}"], rtol=1e-9, atol=1e-9)
        assert fid.inside(samples, reference, fid.radii(reference)).long().tolist() == f[
            f"out/pr/{case}/sample_in_ref"].tolist()
