"""The samplers as plainly as possible, as functions of a model: fast sampling must give the same.
"""
import torch

import common
import dar
import madformer
import transdiff

# --- TransDiff ------------------------------------------------------------------------------------

@torch.no_grad()
def transdiff_sample(model, labels, noise, **options):
    """Return the latents of TransDiff.sample, with nothing kept from one call of the network to the
    next, and Eq. 16 term by term."""
    c = common.with_options(model.config, **options)
    null = torch.full_like(labels, c.classes)
    ts = transdiff.time_grid(c.steps, c.solver, labels.device)
    start = noise.normal((c.latent_size**2, c.vae.channels))
    images = []
    for _ in range(c.rounds):
        h = torch.cat([model.semantic(labels, images), model.semantic(null, images)])
        condition = h + model.ar.feature_pos[:, :h.shape[1]]
        x = start
        for t, t_next in zip(ts, ts[1:]):
            dt = t_next - t
            both = torch.cat([x, x])
            modulation = model.decoder.modulation(t.expand(len(both)))
            v = model.decoder(both, modulation, model.decoder.keys_values(condition))
            if c.solver == "maruyama":
                score = -(both + (1 - t) * v) / t
                v = v - t * score                                # Eq. 16, sigma^2 = 2 t
            drift, u = v.chunk(2)
            drift = u + c.cfg * (drift - u)
            if c.solver == "euler" or t_next == 0:
                x = x + drift * dt
            else:
                eps = noise.normal(x.shape[1:])
                x = x + c.drift_scale * drift * dt + c.noise_scale * (2 * t * -dt).sqrt() * eps
        images.append(model.latents(x))
    return images[-1]


# --- D-AR -----------------------------------------------------------------------------------------

@torch.no_grad()
def llama_sample(model, labels, noise, **options):
    """Return the codes (B, N) of Llama.stream: all tokens go through the network for each one."""
    c = common.with_options(model.config, **options)
    N = c.tokenizer.queries
    null = torch.full_like(labels, c.classes)
    draws = noise.uniform((N,))
    codes = torch.zeros(len(labels), N, dtype=torch.long, device=labels.device)
    for i in range(N):
        conditional = model.logits(codes[:, :i + 1], labels)[:, i]
        unconditional = model.logits(codes[:, :i + 1], null)[:, i]
        scale = c.cfg[0] + (c.cfg[1] - c.cfg[0]) * i / (N - 1)
        logits = unconditional + scale * (conditional - unconditional)
        probs = dar.probabilities(logits, c.temperature, c.top_k, c.top_p)
        codes[:, i] = dar.draw_token(probs, draws[:, i])
    return codes


# --- MADFormer ------------------------------------------------------------------------------------


@torch.no_grad()
def madformer_sample(model, labels, noise, *, steps=None, sampler=None, prompt=None):
    """MADFormer.sample without caches: at every step all rows so far run through all layers."""
    c = common.with_options(model.config, steps=steps, sampler=sampler)
    ts = labels.new_tensor(madformer.schedule(c.sampler, c.steps)[0])
    text = labels[None, :0]
    if c.text:
        text = madformer.tokenize(madformer.conditions(c, prompt)).to(labels.device)[labels]
    blocks = []                                              # (B, z, p, p) each
    tokens = [model.boi.expand(len(labels), -1, -1)]         # before each block, (B, n, dim)
    noisy = []                                               # of each block at the last step so far

    def network(x, i):
        j = len(blocks)
        z, skips = model.down(x, ts[i:i + 1])
        noisy[j:] = [z]
        first = j if c.clean_blocks else 0  # without clean blocks noisy rows are looked back at
        end = (j + 1) * c.tokens
        rows = {}
        layouts = []
        if c.text:
            rows["text"] = model.embed(text)
            layouts.append(model.text_layout(text))
        if c.clean_blocks and j > 0:
            rows["clean"] = torch.cat(tokens[1:], 1)
            layouts.append(model.image_layout(madformer.CLEAN)[:, :j * c.tokens])
        rows["noise"] = torch.cat(tokens[first:], 1)
        layouts.append(model.image_layout(madformer.NOISE)[:, first * c.tokens:end])
        layout = torch.cat(layouts, 1)
        rows, _ = model.run_layers(rows, layout, text, torch.cat(noisy[first:], 1))
        return model.up(rows["noise"][:, -c.tokens:], ts[i:i + 1], skips)

    for _ in range(c.ar_length):
        start = noise.normal((c.vae.channels, c.block, c.block))
        *_, block = madformer.solve(network, start, c.sampler, c.steps, c.target)
        blocks.append(block)
        t = ts[-1:] if c.clean_time == "noisy" else 0 * ts[-1:]
        tokens.append(model.down(block, t)[0])
    return model.join(torch.stack(blocks, 1))
