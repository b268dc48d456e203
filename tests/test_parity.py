"""The numbers of the released implementations: inputs, weights and outputs in tests/fixtures/*.npz.

PARITY_FIXTURES=FOLDER runs other files of the same names. Sizes and cases come from the files. The
argument `f` of a test is the file that its name contains. pytest -l shows which case failed.
"""
import dataclasses
import json
import math
import os
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import common
import dar
import fid
import madformer
import transdiff

FOLDER = Path(os.environ.get("PARITY_FIXTURES", Path(__file__).parent / "fixtures"))


class Fixture(dict):
    """The tensors of a file. The inputs are attributes too: f.labels is f["in/labels"].

    state: the released state dict. config: the released configuration.
    """

    def __init__(self, name):
        arrays = dict(np.load(FOLDER / f"{name}.npz", allow_pickle=False))
        self.meta = json.loads(str(arrays.pop("meta")))
        super().__init__({key: torch.from_numpy(array) for key, array in arrays.items()})
        vars(self).update(self.below("in/"))
        self.config = self.meta.get("config")
        self.state = self.below("state/")
        recipe = self.meta.get("recipe", {"parameters": {}})
        for name, about in recipe["parameters"].items():
            self.state[name] = self.made(name, about)

    def below(self, prefix):
        """Return the tensors whose keys start with a prefix, by the rest of their keys."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}

    def names_below(self, prefix):
        """Return the names between a prefix and the next slash."""
        return {key.split("/")[0] for key in self.below(prefix)}

    def made(self, name, about):
        """Return a tensor that was too large to store, made by the recipe, checked by its probe."""
        seed = zlib.crc32((self.meta["recipe"]["salt"] + name).encode())
        value = np.random.default_rng(seed).standard_normal(about["shape"]) * about["scale"]
        value = (np.abs(value) if about["abs"] else value).astype(np.float32)
        probe = [*value.ravel()[:3], np.abs(value).sum(dtype=np.float64)]
        assert np.allclose(probe, about["probe_first3_and_abssum"], rtol=1e-6)
        return torch.from_numpy(value)

    def check(self, tolerance=1e-5, **ours):
        """Assert that tensors are close to the outputs of those names."""
        for name, tensor in ours.items():
            close(tensor, self[f"out/{name}"], tolerance)


@pytest.fixture
def f(request):
    """The file with the longest name that the test's name, with its parameters, contains."""
    names = [path.stem for path in FOLDER.glob("*.npz") if path.stem in request.node.name]
    return Fixture(max(names, key=len))


def close(ours, theirs, tolerance=1e-5, absolute=0.0):
    """Assert |ours - theirs| <= tolerance * max |theirs| + absolute, and equal shapes."""
    assert ours.shape == theirs.shape
    gap = (ours.detach() - theirs).abs().max()
    assert gap <= tolerance * theirs.abs().max() + absolute


def check_gradients(model, table, theirs, tolerance, absolute=0.0):
    """Compare gradients with {released name: norm or array}; the table makes our names.

    A parameter without gradient counts as zero. An array may have the first rows only.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, expected in common.renamed(theirs, table).items():
        gradient = gradients.get(name, torch.zeros_like(expected))
        ours = gradient[:len(expected)] if expected.ndim else gradient.norm()
        close(ours, expected, tolerance, absolute)


def replay(*draws):
    """Return what hands out given draws, one after another, in place of common.Noise."""
    return mock.Mock(normal=mock.Mock(side_effect=draws))


class Spy(list):
    """Takes the place of a function and keeps (arguments, result) of each call."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **options):
        result = self.function(*args, **options)
        self.append((args, result))
        return result


def spied(module):
    """Return a Spy on the forward pass of a module."""
    module.forward = Spy(module.forward)
    return module.forward


# --- KL-VAE ---------------------------------------------------------------------------------------

OLD_NAMES = r"""
to_q      -> query
to_k      -> key
to_v      -> value
to_out\.0 -> proj_attn
"""


def test_vae(f):
    """The 16-channel architecture: epsilon, asymmetric padding, attention placement, scale.

    Mean, deviation and KL of a posterior with extreme log-variances, which are clamped.
    """
    vae = common.vae_from_state({**f.state, "scale": torch.tensor(f.config["scale"])})
    moments = vae.encode(f.image)
    latent = vae.codes(moments, f.sample_noise)
    f.check(moments=moments, mode=moments.chunk(2, 1)[0], kl=vae.kl(moments), latent=latent,
            sample=latent / vae.scale, decoded=vae.decode(f.z * vae.scale),
            reconstruction=vae.decode(f["out/latent"]))
    moments = f.dist_moments
    mean, std = vae.posterior(moments)
    f.check(dist_mean=mean, dist_std=std, dist_logvar=2 * std.log(), dist_kl=vae.kl(moments),
            dist_sample=vae.codes(moments, f.dist_noise) / vae.scale)


def test_vae_diffusers(f):
    """The diffusers layout, with today's attention names and those of Stable Diffusion 1."""
    for names in ("", OLD_NAMES):
        vae = common.vae_from_state(common.renamed(f.below("sd_state/"), names))
        moments = vae.encode(f.sd_image)
        f.check(sd_moments=moments, sd_mode=moments.chunk(2, 1)[0],
                sd_decoded=vae.decode(f.sd_z * vae.scale))


# --- TransDiff ------------------------------------------------------------------------------------

both = pytest.mark.parametrize("f", ["transdiff_1step", "transdiff_mrar"], indirect=True)


def transdiff_of(f):
    """Return the fixture's model with its sampler, in evaluation mode: nothing is dropped."""
    c = f.config
    return transdiff.from_released(
        f.state, heads=c["heads"], repeat=c["diffusion_batch_mul"], cfg=c["cfg"],
        steps=c["num_sampling_steps"], drift_scale=c["scale_0"], noise_scale=c["scale_1"])


def transdiff_sample(f, model, **options):
    """Return latents for the file's labels, made from its noise."""
    noise = replay(f.sample_noise, *f.sample_eps.flatten(0, -4))
    return model.sample(f.labels, noise, **options)[0]


def test_transdiff_1step_features(f):
    """With and without label: class tokens, positions, norms, qkv layout, exact GELU."""
    model = transdiff_of(f)
    null = torch.tensor([model.config.classes])
    f.check(z=model.semantic(f.labels, []) + model.ar.feature_pos,
            z_uncond=model.semantic(null, []) + model.ar.feature_pos)


def test_transdiff_mrar_features(f):
    """Every number of references, whose patches are channel-major, with and without label."""
    model = transdiff_of(f)
    references = list(f.latents[:, :-1].unbind(1))
    close(model.ar.reference(references[0]), model.ar.ref_proj(f["out/ref_tokens"]))
    f.check(z_train=model.semantic(f.labels, references))
    null = torch.full_like(f.labels, model.config.classes)
    for name, z in f.below("out/z_eval_").items():
        labels = null if "uncond" in name else f.labels
        close(model.semantic(labels, references[:int(name[-1]) - 1]), z)


@both
def test_transdiff_velocity(f):
    """Time embedding, order of the AdaLN vectors, cross-attention between the modulated parts.

    MRAR: the decoder reads the features of the first three images.
    """
    model = transdiff_of(f)
    if "in/dec_c" in f:
        c = f.dec_c
    else:
        h = f["out/z_eval_3"]
        c = h + model.ar.feature_pos[:, :h.shape[1]]
    modulation = model.decoder.modulation(f.dec_t / 1000)
    f.check(dec_v=model.decoder(f.dec_x, modulation, model.decoder.keys_values(c)))


def test_transdiff_1step_steps(f):
    """The grid with its long last step, and an update of Eq. 18, where no wrong scale can hide."""
    model = transdiff_of(f)
    f.check(t_steps=transdiff.time_grid(model.config.steps, "maruyama"), tolerance=1e-6)
    decoder = spied(model.decoder)
    transdiff_sample(f, model)
    f.check(sample_x1=decoder[1][0][0])  # of the second call the first argument


@both
def test_transdiff_samples(f):
    """The whole sampler, with and without guidance. MRAR: each round's image, from one start."""
    model = transdiff_of(f)
    f.check(sample=transdiff_sample(f, model), tolerance=1e-4,
            sample_nocfg=transdiff_sample(f, model, cfg=1.0))
    for r, image in enumerate(f.get("out/sample_rounds", [])):
        close(transdiff_sample(f, model, rounds=r + 1), image, 1e-4)


@both
def test_transdiff_loss(f):
    """On given draws, with floored times: each round's loss, label drop and every gradient."""
    model = transdiff_of(f)
    t = transdiff.logit_normal(f.train_normal)
    assert torch.equal((1000 * t).round().long(), f["out/train_timestep"])
    draws = {"t": t, "eps": f.train_noise}
    if not model.config.mrar:  # one round
        draws = {name: draw[None] for name, draw in draws.items()}
    latents = f["in/latents" if "in/latents" in f else "in/train_latents"]
    loss, *rounds = model(latents, f.labels, **draws).values()
    f.check(train_loss=loss)
    if "out/train_losses" in f:
        f.check(train_losses=torch.stack(rounds))
    loss.backward()
    norms = dict(zip(f.meta["param_names"], f["out/grad_norms"], strict=True))
    arrays = {name: f[f"out/grad/{name}"] for name in f.config["full_grads"]}
    for theirs in (norms, arrays):
        check_gradients(model, transdiff.RELEASED, theirs, 2e-5, 1e-7)
    out = model(latents, f.labels, drop=f.drop_uniform < 0.5, **draws)
    f.check(train_loss_label_drop=out["loss"])


def test_transdiff_1step_512(f, monkeypatch):
    """512 px: only the decoder's position table grows. The file has fewer steps than we allow."""
    f.state["diffdecoder.net.diffusion_pos_embed_learned"] = f.pos512
    model = transdiff_of(f)
    steps = 1 + len(f.eps512)
    grid = torch.cat([torch.linspace(1, 0.04, steps), torch.zeros(1)])
    monkeypatch.setattr(transdiff, "time_grid", lambda *args: grid)
    model.config = dataclasses.replace(model.config, steps=steps, repeat=1)
    label = f.labels[:1]
    x, _ = model.sample(label, replay(f.noise512, *f.eps512[:, None]))
    f.check(sample512=x, tolerance=1e-4)
    t = transdiff.logit_normal(f.train_normal[:1])
    loss = model(f.latents512, label, eps=[f.noise512], t=[t])["loss"]
    f.check(train_loss512=loss)


# --- D-AR -----------------------------------------------------------------------------------------

def tokenizer_of(f):
    """Return the fixture's tokenizer."""
    return dar.from_released(f.state, f.config, image_size=f.meta["image_size"])


def lpips(x, y, dropout=0.0):
    """Return the parts of LPIPS with the fixture's weights, in the precision of the images."""
    state = {name: value.to(x.dtype) for name, value in Fixture("lpips").state.items()}
    return dar.lpips_parts(state, x, y, dropout)


def test_dar_tokenizer_codes(f):
    """Encoder, mask, rotations, normalised codebook, causal layers; the codes exactly."""
    tokenizer = tokenizer_of(f)
    features = tokenizer.features(f.x)
    codes = tokenizer.codes(tokenizer.encode(f.x))
    assert torch.equal(codes, f["out/codes"])
    f.check(enc_tokens=features, z_pre=tokenizer.to_code(features),
            zq=tokenizer.quantizer.codewords()[codes], cond=tokenizer.condition(f["out/zq"]))


@pytest.mark.parametrize("key", ["ema", "model", None])
def test_dar_tokenizer_files(f, tmp_path, monkeypatch, key):
    """EMA is preferred, the pickled configuration is read as data, overrides take its place."""
    config = type("Config", (), {"__module__": "config_util"})()
    config._data = {"model": f.config}
    monkeypatch.setitem(sys.modules, "config_util", mock.Mock(Config=type(config)))
    other = dict.fromkeys(f.state, torch.zeros(1))
    content = {"model": other, "config": config, key: f.state} if key else f.state
    torch.save(content, tmp_path / "x.pt")
    expected = tokenizer_of(f).config
    overrides = {"image_size": expected.image_size} if key else vars(expected)
    tokenizer = dar.load_official(tmp_path / "x.pt", **overrides)
    assert tokenizer.config == expected
    assert torch.equal(tokenizer.encode(f.x).long(), f["out/codes"])


def previews_of(f, run, **options):
    """Return the images of a run after 1 step, 2 steps and so on, not clamped."""
    n = run["batch"]
    images = []
    tokenizer_of(f).decode([f["out/codes"][:n]], replay(f.decode_noise[:n]), images.append,
                           steps=run["steps"], solver=run["method"].rstrip("2"), **options)
    return images


def test_dar_tokenizer_pictures(f):
    """All solvers and numbers of steps, the released previews, and the paper's jump estimates."""
    for run in f.meta["runs"]:
        name = run["name"]
        steps = run["clip"] or run["steps"]
        close(previews_of(f, run)[steps - 1], f[f"out/{name}"], 1e-4)
        for i in run.get("jump", []):
            close(previews_of(f, run, preview="v")[i][:1], f[f"out/jump_{name}_{i}"], 1e-4)


def tokenizer_loss(f, tokenizer):
    """Return the training loss on the given draws, with given targets for REPA."""
    target = f.meta["recipe"]["target"]
    tokenizer.requires_grad_(True).train()
    tokenizer.dino = lambda images: f.made(target["name"], target)
    tokenizer.loss_config = dar.Config(lpips_dropout=0.0)
    return tokenizer(f.x, u=f.train_u, noise=f.train_noise)


def test_dar_tokenizer_loss(f):
    """Every part of Eq. 7 but LPIPS, on the tokens that count, and the gradient of every parameter;
    what the pixel decoder is given."""
    tokenizer = tokenizer_of(f)
    pixels = spied(tokenizer.pixels)
    out = tokenizer_loss(f, tokenizer)
    f.check(vq_loss=out["codebook"], commit_loss=out["commitment"], fm_loss=out["flow"],
            repa_loss=out["repa"], dead_code_rate=out["dead"], total_no_lpips=out["loss"])
    [((x_t, t, _), (v, features))] = pixels
    f.check(t_model=t, tolerance=1e-6)
    guess = (x_t + (1 - t.view(-1, 1, 1, 1)) * v) / tokenizer.config.data_std
    f.check(pred_x1=guess, h_repa_slice=features[:, ::16, ::16],
            h_repa_token_mean=features.mean(1), tolerance=2e-5)
    group = torch.arange(tokenizer.config.group_size)
    assert torch.equal(tokenizer.starts(f.train_u)[:, None] + group, f["out/query_ids"])
    out["loss"].backward()
    check_gradients(tokenizer, dar.RELEASED, f.below("out/grad_norm/"), 5e-5, 1e-6)
    check_gradients(tokenizer, dar.RELEASED, f.below("out/grad/"), 2e-5)


def test_dar_tokenizer_lpips(f):
    """LPIPS of the image that the velocity leads to."""
    tokenizer = tokenizer_of(f)
    tokenizer.lpips = lpips
    out = tokenizer_loss(f, tokenizer)
    close(out["lpips"], f["out/lpips_x_pred"].mean(), 1e-4)
    f.check(total=out["loss"], tolerance=2e-5)


def test_dar_lpips(f):
    """Feature maps, normalisation and weights of the five parts.

    The gradient in float64: in float32, rounding moves values over the kink of a ReLU.
    """
    x, y = f.x, f.y
    parts = lpips(x, y)
    f.check(per_layer=parts, lpips=parts.sum(0), tolerance=1e-4)
    assert torch.equal(lpips(x, x).sum(0), f["out/lpips_same"])
    for k, feature_map in enumerate(dar.vgg_features(f.state, x)):
        close(feature_map.mean((2, 3)), f[f"out/feat{k}_mean"], 1e-4)
    y = y.double().requires_grad_(True)
    lpips(x.double(), y).sum().backward()
    close(y.grad, f["out/grad_y"], 0.0, 1e-6)


FILTERS = ("temperature", "top_k", "top_p")


def llama_of(f):
    """Return the fixture's AR model, in evaluation mode."""
    c = f.config
    tokenizer = dar.TokenizerConfig(codebook=c["vocab_size"], queries=c["block_size"])
    return dar.from_released(f.state, {}, heads=c["n_head"], tokenizer=tokenizer, dropout=0.0,
                             label_drop=c["class_dropout_prob"])


def test_dar_ar_loss(f):
    """Logits with and without label, the loss with some labels dropped, and every gradient."""
    model = llama_of(f).requires_grad_(True)
    codes = f.train_codes
    labels = f.train_labels
    null = torch.full_like(labels, model.config.classes)
    drop = f.label_drop_rand < model.config.label_drop
    loss = model.train()(codes, labels, drop=drop)["loss"]
    f.check(eval_logits_cond=model.logits(codes, labels),
            eval_logits_uncond=model.logits(codes, null),
            train_logits=model.logits(codes, torch.where(drop, null, labels)), train_loss=loss)
    loss.backward()
    check_gradients(model, dar.RELEASED, f.below("out/grad_norm/"), 2e-5)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_dar_ar_files(f, tmp_path, key):
    """The plain weights are taken, not the EMA, and it is not a tokenizer."""
    path = tmp_path / "x.pt"
    state = {f"_orig_mod.{name}": value for name, value in f.state.items()}
    torch.save({key: state, "ema": {}} if key else state, path)
    model = dar.load_official(path, tokenizer=llama_of(f).config.tokenizer)
    f.check(eval_logits_cond=model.logits(f.train_codes, f.train_labels))
    with pytest.raises(common.UserError, match="an AR model, not a tokenizer"):
        dar.load_tokenizer(path)


def test_dar_ar_tokens(f, monkeypatch):
    """Every run's tokens exactly, and the probabilities that each was drawn from.

    The released draw (argmax of probabilities over exponentials) takes the place of ours.
    """
    model = llama_of(f)
    noise = common.Noise(0, range(len(f.gen_labels)))
    even = torch.ones(f.config["block_size"], 1, 1)
    for run in f.meta["runs"]:
        name = run["name"]
        theirs = f[f"out/tokens_{name}"]
        draws = iter(f.get(f"in/exp_{name}", even)[run["prefix"]:])
        draw = Spy(lambda probs, u: (probs / next(draws)).argmax(-1))
        monkeypatch.setattr(dar, "draw_token", draw)
        first, last = dar.guidance(str(run["cfg"]).replace(",", ":"))
        if first == 1 < last:
            first = 1.001  # the released code's way of keeping guidance on
        *_, codes = model.stream(f.gen_labels, noise, prefix=theirs[0, :run["prefix"]],
                                 cfg=(first, last), **{option: run[option] for option in FILTERS})
        assert torch.equal(codes, theirs)
        if f"out/probs_{name}" in f:
            close(torch.stack([probs for (probs, _), _ in draw]), f[f"out/probs_{name}"], 2e-5)


def test_dar_ar_filters(f):
    """Temperature, top-k and top-p in this order, with ties."""
    for case in f.meta["filters"]:
        options = {option: case[option] for option in FILTERS}
        for end in ("", "_ties"):
            if f"out/probs_{case['name']}{end}" in f:
                probs = dar.probabilities(f[f"in/filter_logits{end}"], **options)
                close(probs, f[f"out/probs_{case['name']}{end}"])


# --- MADFormer ------------------------------------------------------------------------------------

MODES = [("madformer", "")]
MODES += [("madformer_ablations", mode) for mode in Fixture("madformer_ablations").meta["modes"]]
in_all_modes = pytest.mark.parametrize("f,mode", MODES, indirect=["f"])


def madformer_of(f, mode="", **fields):
    """Return the released model in a mode: its switches, its depth and its weights."""
    c = f.config
    how = f.meta.get("modes", {}).get(mode, {"flags": {}})
    fields.update(madformer.ARGUMENTS[key] for key, is_on in how["flags"].items() if is_on)
    state = {**Fixture("madformer").state, **f.state}
    if mode == "single_set":  # both towers have the noise tower's
        state = {name: state[name.replace("_list.0.", "_list.1.")] for name in state}
    return madformer.from_released(
        state, ar_length=c["ar_len"], diffusion_depth=how.get("diff_depth", c["diff_depth"]),
        unet={"groups": c["unet_resnet_groups"], "heads": c["unet_num_heads"]}, **fields)


def to_blocks(x):
    """Return the released layout (..., pixels, channels) of a block as (..., channels, p, p)."""
    side = math.isqrt(x.shape[-2])
    return x.mT.unflatten(-1, (side, side))


def from_blocks(x):
    """Return the inverse of to_blocks."""
    return x.flatten(-2).mT


def madformer_loss(f, model, **changes):
    """Return the losses of the file's latents as released, except for these changes."""
    released = {"target": "noise", "image_weight": 1.0, "hidden": "sum", "hidden_weight": 0.1,
                "clean_weight": 0.0}
    model.config = dataclasses.replace(model.config, **{**released, **changes})
    latents = model.join(to_blocks(f.clean))
    labels = torch.zeros(len(latents), dtype=torch.long)
    return model(latents, labels, t=f.t, eps=to_blocks(f.noise))


CLEAN = {"clean_weight": 0.1, "clean_target": "same"}
PASSES = {  # released loss -> our term, the released output in it, and the choices that lead to it
    "loss_image": ("image", "pred", {}),
    "loss_image_sample": ("image", "pred", {"target": "clean"}),
    "loss_hidden": ("hidden", "condition", {}),
    "loss_hidden_before_add": ("hidden", "condition_before_add", {"hidden": "condition"}),
    "loss_clean_tower": ("clean", "clean_tower", CLEAN),
    "loss_clean_tower_next": ("clean", "clean_tower", {**CLEAN, "clean_target": "next"})}


@in_all_modes
def test_madformer_outputs(f, mode):
    """Each output and its loss, as released and as in the paper.

    A shared set of parameters gives what the released code gives with two equal ones.
    """
    theirs = f.below(f"out/{mode}/" if mode else "out/")
    model = madformer_of(f, mode, shared=mode == "single_set")
    has_condition = model.config.condition
    model.noised = Spy(model.noised)
    for loss, (term, output, changes) in PASSES.items():
        if loss not in theirs or term == "hidden" and not has_condition:
            continue
        model.upsample = Spy(model.upsample)
        out = madformer_loss(f, model, **changes)
        close(out[term], theirs[loss])
        [_, *terms] = out  # in the order in which the upsampler runs
        _, blocks = model.upsample[terms.index(term)]
        close(from_blocks(blocks), theirs[output], 2e-5)
    _, noised = model.noised[0]
    close(from_blocks(noised), f.noised, 1e-6)
    if not has_condition:  # then the file has what the upsampler makes of the noisy latents alone
        model.run_layers = lambda rows, layout, text, z: (rows, torch.zeros_like(z))
        madformer_loss(f, model, condition=True)
        _, blocks = model.upsample[-1]
        close(from_blocks(blocks), theirs["condition"], 2e-5)


@in_all_modes
def test_madformer_gradients(f, mode):
    """The released total and its gradients; where the file has it, with the clean tower's loss."""
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


def test_madformer_rows(f):
    """Tokens of the first image, and its rows after the AR layers and after all."""
    model = madformer_of(f)
    model.run_layers = Spy(model.run_layers)
    madformer_loss(f, model)
    [((tokens, _, _, z), (last, condition))] = model.run_layers
    f.check(clean_down0=tokens["clean"][0], noised_down0=z[0], tolerance=2e-5,
            h_final0=torch.cat([last["clean"][0], last["noise"][0]]))
    close(condition[0], f["out/h_ar0"].chunk(2)[1], 2e-5)


def test_madformer_masks(f):
    """The rule in all variants, block by block, against the released masks."""
    model = madformer_of(f)
    for name, blocks in f.below("out/mask_").items():
        layout = model.image_layout(madformer.NOISE)
        if "no_clean" not in name:
            layout = torch.cat([model.image_layout(madformer.CLEAN), layout], 1)
        mask = madformer.attention_mask(layout, torch.zeros(1, 0), isolated="mlp" in name)
        expected = torch.kron(blocks, torch.ones(model.config.tokens, model.config.tokens))
        assert torch.equal(mask[0, 0], expected.bool())


def test_madformer_rotary(f):
    """Bases, frequencies that end at exactly 1 / base, and the form that is no rotation."""
    diagonal = torch.arange(len(f["out/rope_cos_table"]))
    angles = madformer.rotary_grid(*f.rope_pos, len(diagonal), 64)
    cos, sin = madformer.rotary_grid(diagonal, diagonal, len(diagonal), 64)[:, :, :32]
    f.check(rope_q=madformer.rotate(f.rope_q, angles),
            rope_k=madformer.rotate(f.rope_k, angles), rope_cos_table=cos, rope_sin_table=sin)
    model = madformer_of(f)
    assert torch.equal(model.image[1:], f["out/position_ids"])
    assert model.config.side == f.config["tokens_per_side"]


SAMPLERS = ["ddim_noclip", "ddim_x0", "dpm", "dpm_x0"]  # all but DDIM with clipping


def choices(name):
    """Return the choices of a sampler's name, such as dpm_x0."""
    return {"sampler": name.split("_")[0], "target": "clean" if "_x0" in name else "noise"}


def sampled_blocks(f, model):
    """Return the blocks that are sampled from the file's noise."""
    noise = replay(*to_blocks(f.noise).unbind(1))
    labels = torch.zeros(len(f.noise), dtype=torch.long)
    return from_blocks(model.cut(model.sample(labels, noise)))


def test_madformer_sample(f):
    """Every sampler under every switch."""
    for mode in ["default", *f.meta["modes"]]:
        for name, theirs in f.below(f"out/{mode}/").items():
            if name in SAMPLERS:
                model = madformer_of(f, mode, steps=f.meta["steps"], **choices(name))
                close(sampled_blocks(f, model), theirs, 1e-4)


@pytest.mark.parametrize("name", ["ddim_noclip", "dpm"])
def test_madformer_sample_steps(f, name):
    """The network's output and the latent after each step of each block."""
    theirs = f.below(f"out/default/{name}_")
    model = madformer_of(f, steps=f.meta["steps"], **choices(name))
    ts, _, _ = madformer.schedule(model.config.sampler, f.meta["steps"])
    assert ts == theirs["timesteps"].tolist()
    model.denoise = Spy(model.denoise)
    last = sampled_blocks(f, model).transpose(0, 1)
    shape = theirs["x"].shape
    outputs = from_blocks(torch.stack([output for _, output in model.denoise])).view(shape)
    close(outputs, theirs["pred"], 1e-4)
    inputs = from_blocks(torch.stack([x for (x, *_), _ in model.denoise])).view(shape)
    close(torch.cat([inputs[:, 1:], last[:, None]], 1), theirs["x"], 1e-4)


def test_schedulers_noising(f):
    """The variances of all steps, and the noisy latents."""
    model = madformer.MADFormer(madformer.PRESETS["tiny"])
    noised = model.noised(f.add_x[..., None, None], f.add_noise[..., None, None], f.add_t)
    f.check(alphas_cumprod=model.alphas_bar, add_noise=noised.flatten(1), tolerance=1e-6)


def test_schedulers_timesteps(f):
    """Exactly, for every number of steps in the file."""
    for name, ts in f.below("out/timesteps_").items():
        sampler, steps = name.split("/")
        assert madformer.schedule(sampler, int(steps))[0] == ts.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedulers_trajectories(f, name):
    """Every point of every trajectory, for a network that is a function."""
    for steps in f.names_below(f"out/{name}/"):
        theirs = f.below(f"out/{name}/{steps}/")
        ts = theirs["timesteps"].tolist()
        network = Spy(lambda x, i: 0.3 * x + 0.1 * math.sin(ts[i] / 100))
        *_, last = madformer.solve(network, theirs["x"][0], steps=int(steps), **choices(name))
        close(torch.stack([*(x for (x, _), _ in network), last]), theirs["x"], 2e-5)


def unet_halves(f):
    """Return the fixture's downsampler and upsampler."""
    c = f.config
    unet = madformer.UNetConfig(
        c["unet_block_out_channels"], c["unet_num_layers_per_block"],
        [flag == 1 for flag in c["unet_transformer_layers_per_block"]],  # more than 1: none
        groups=c["unet_resnet_groups"], heads=c["unet_num_heads"], time_dim=c["unet_time_emb_dim"])
    down = madformer.UNetHalf(unet, c["latent_channels"], c["hidden_size"])
    up = madformer.UNetHalf(unet, c["hidden_size"], c["latent_channels"], down.skip_widths)
    parts = torch.nn.ModuleDict({"down": down, "up": up})
    common.load_strict(parts, common.renamed(f.state, madformer.RELEASED), "the fixture")
    return down, up


def test_unet_blocks(f):
    """The output of every layer; both halves, with a step for each block or one for the batch."""
    down, up = unet_halves(f)
    hidden = f.hidden.flatten(2).mT
    for t, end in ((f.t_scalar[None], "_scalar_t"), (f.t, "")):
        tokens, skips = down(f.x, t)
        close(tokens, f[f"out/down{end}"].flatten(2).mT)
        close(up(hidden, t, skips), f[f"out/up{end}"])
    for k, skip in enumerate(skips):
        close(skip, f[f"out/down_res_{k}"])
    k = list(down.layers).index("1_0") + 1
    f.check(temb_down=down.time(t), temb_up=up.time(t), up_of_down=up(tokens, t, skips),
            resnet0=down.layers["0_0"](f["out/down_res_0"], down.time(t)),
            attn0=down.layers["1_0"].attention(f[f"out/down_res_{k}"]))
    layers = [spied(layer) for layer in up.layers.values()]
    up(hidden, t, skips)
    for k, layer in enumerate(layers):
        [(_, output)] = layer
        close(output, f[f"out/up_stage_{k}"])


# --- Evaluation -----------------------------------------------------------------------------------

resized = pytest.mark.parametrize("resize,variant", [("tf1", "tf1"), ("pytorch", "pt")])
EXACT = {"tf1": 1e-6, "pytorch": 2e-5}
POOLED = {"pooled64": "pool_1", "pooled192": "pool_2", "pooled768": "Mixed_6e"}


def test_inception_weights(f, inception_file):
    """A file like the published one, whose weights have the recipe's check values."""
    state = fid.load_inception(inception_file)[0].state_dict()
    for name, first in f.below("out/param_first4/").items():
        weights = state[name].double().flatten()
        assert torch.equal(weights[:4].float(), first)
        total = torch.stack([weights.sum(), weights.abs().sum()])
        close(total, f[f"out/param_sum/{name}"], 1e-9)


@resized
def test_inception_features(f, inception_file, resize, variant):
    """Resizing, every output, and the moments after every layer, for images of all sizes."""
    network, _ = fid.load_inception(inception_file)
    layers = {k: spied(layer) for k, layer in network.named_children() if k != "fc"}
    for name in f.meta["images"]:
        theirs = f.below(f"out/{name}/{variant}/")
        x = fid.RESIZE[resize](f[f"in/image/{name}"])
        close(x[:, :, ::23, ::23], theirs["resized_grid"], 0.0, EXACT[resize])
        pool3, logits, spatial = network(x)
        after = {k: spy[-1][1].double() for k, spy in layers.items()}
        after["pool3"] = pool3.double()
        moments = [(h.mean(), h.square().mean().sqrt()) for h in after.values()]
        ours = {"pool3": pool3, "spatial": spatial, "logits_unbiased": logits,
                "logits": logits + network.fc.bias, "layer_moments": torch.tensor(moments)}
        for output, layer in POOLED.items():
            ours[output] = after[layer].mean((2, 3))
        for output in ours.keys() & theirs.keys():
            close(ours[output], theirs[output], 5e-4)


@resized
def test_inception_distances(f, inception_file, tmp_path, resize, variant):
    """FID, sFID, IS, precision and recall of two small sets, as the command line computes them."""
    theirs = f.below(f"out/e2e/{variant}/")
    evaluator = fid.Evaluator(None, resize=resize, weights=inception_file)
    sides = []
    for name in ("set_a", "set_b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=f[f"in/{name}"].numpy())
        sides.append(evaluator.side(fid.Source(tmp_path / f"{name}.npz")))
    samples, reference = sides
    evaluator.reference = {**reference, "n": 0}  # of unknown size: that saves computing the floor
    ours = evaluator.compare(samples)
    ours |= {"fid_exact": ours["fid"], "sfid_exact": ours["sfid"]}
    for end in ("", "_noshuffle"):
        mean, std = fid.inception_score(samples["logits"], splits=2, shuffle=not end)
        ours |= {f"isc_mean_2splits{end}": mean, f"isc_std_2splits{end}": std}
    for name in ours.keys() & theirs.keys():
        rel = 1e-2 if "std" in name else 1e-4
        assert ours[name] == pytest.approx(theirs[name].item(), rel=rel)


def test_frechet(f):
    """Every case, both ways round: 1e-9 where covariances have full rank or are exact, or 1e-6."""
    singular = ("rank", "near", "few", "identical", "float32")
    for case in f.meta["cases"]:
        m1, s1, m2, s2 = f.below(f"in/{case}/").values()
        exact = f[f"out/{case}/exact"].item()
        absolute = 1e-6 if any(word in case for word in singular) else 1e-12
        for ours in (fid.frechet(m1, s1, m2, s2), fid.frechet(m2, s2, m1, s1)):
            assert ours == pytest.approx(exact, rel=1e-9, abs=absolute)


def test_frechet_moments(f):
    """Of features in shards, with large means: sums in float32 lose digits."""
    shards = f["in/stats/features"].split(f["in/stats/shards"].tolist())
    mean, covariance = fid.gaussian(sum(map(fid.moments, shards)))
    np.testing.assert_allclose(mean, f["out/stats/mu"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(covariance, f["out/stats/sigma"], rtol=0, atol=1e-9)


IS_RULES = {"torch_fidelity": {}, "torch_fidelity_noshuffle": {"shuffle": False},
            "torch_fidelity_1split": {"splits": 1, "shuffle": False}}


def test_is_pr_scores(f):
    """Scores by the rules of torch-fidelity and of the ADM suite, which is one split per chunk."""
    for case in f.names_below("in/is/"):
        logits = f[f"in/is/{case}/logits"]
        theirs = f.below(f"out/is/{case}/")
        ours = {name: fid.inception_score(logits, **how) for name, how in IS_RULES.items()}
        chunks = logits.split(int(f[f"in/is/{case}/adm_split_size"]))
        scores = [fid.inception_score(chunk, splits=1, shuffle=False)[0] for chunk in chunks]
        ours["adm_float64"] = np.mean(scores)
        for name, score in ours.items():
            assert score == pytest.approx(theirs[name].tolist(), rel=1e-6, abs=1e-9)


def test_is_pr_neighbourhoods(f):
    """Radii, and which points lie in whose neighbourhood, with ties and repeated points."""
    for case in f.names_below("in/pr/"):
        theirs = f.below(f"out/pr/{case}/")
        points = {name: x.double() for name, x in f.below(f"in/pr/{case}/").items()}
        radii = {name: fid.radii(x) for name, x in points.items()}
        for name, x in radii.items():
            squares = theirs[f"radii_{name}"]
            torch.testing.assert_close(x.square(), squares, rtol=1e-9, atol=1e-9)
        within = fid.inside(points["sample"], points["ref"], radii["ref"])
        assert torch.equal(within.long(), theirs["sample_in_ref"])
        shares = fid.precision_recall(points["sample"], points["ref"])
        assert shares == pytest.approx(theirs["precision_recall"].tolist(), abs=1e-7)
