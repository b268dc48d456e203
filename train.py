"""Train any of the models, stage by stage: the loop, checkpoints, grids and the log.

    python train.py --model transdiff                                 # drawn shapes, on a laptop
    python train.py --model dar --data fashion-mnist
    python train.py --model madformer --data FOLDER --set diffusion_depth=2
    python train.py --model transdiff --data fashion-mnist --fid-every 500
    torchrun --nproc_per_node 8 train.py --model dar --size l --data /data/imagenet --accumulate 4
    torchrun --nproc_per_node 8 train.py --model transdiff --size l --data DIR --vae kl16.ckpt

A run lives in runs/<model>/<stage>/: config.json, model.pt (averaged weights, for sample.py),
state.pt (to resume), log.jsonl, samples/. The same command resumes where it stopped and skips
finished stages. What a step draws at random follows from (seed, step, micro-batch, rank), and the
view of an image from (seed, epoch, image), so no generator's state is saved: with the same ranks
and micro-batches a resumed run repeats the same steps, on a CPU bit for bit.

what is trained
  --model NAME         transdiff, dar, madformer, or a model file of your own
  --size NAME          preset of the model file (default: tiny)
  --stage NAME         one stage, or all in order (default)
  --set FIELD=VALUE    override fields of the Config
  --vae, --tokenizer   a published or trained first stage, instead of training one
  --init FILE          weights to start from: of another size, or released
  --out DIR            folder of the run (default: runs/<model>)
  --fresh              delete what the run has and start again
on what
  --data NAME          shapes (default), mnist, fashion-mnist, cifar10, or a folder
  --data-root DIR      where named data sets are or are downloaded to (default: data)
  --image-size N       pixels (default: the preset's)
  --workers N          processes that load images (default: up to 4)
  --cache DIR          for latents or tokens (default: <out>/cache), or off
how
  --steps N            optimizer steps per stage
  --epochs X           passes over the data, if no steps are given (default: the recipe's)
  --batch-size N       samples per optimizer step over all ranks (default: the recipe's)
  --accumulate N       micro-batches per step and rank (default: 1)
  --lr X               learning rate (default: the recipe's)
  --seed N             (default: 0)
  --precision NAME     bf16 (default on CUDA) or fp32
  --compile            torch.compile (default on CUDA, but not for tiny), or --no-compile
  --device NAME        cpu, cuda, cuda:1, mps (default: a GPU if there is one)
every N steps
  --log-every N        write a line to the log (default: 50), with --tensorboard also there
  --save-every N       save the state (default: 500)
  --keep-every N       also keep model_NNNNNN.pt
  --sample-every N     make a grid of samples (default: 1000)
  --fid-every N        evaluate --fid-samples N samples (default: 1000)
"""
import argparse
import copy
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import common
import fid
from common import UserError, natural, positive

COLUMNS = 8  # pictures per class in a grid
WORKERS = min(4, os.cpu_count()) if sys.platform == "linux" else 0  # others start them slowly


def arguments():
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True)
    add("--size", default="tiny")
    add("--stage", default="all")
    add("--set", nargs="+", default=[])
    add("--vae", "--tokenizer", dest="first_stage", type=os.path.abspath)
    add("--init")
    add("--out")
    add("--fresh", action="store_true")
    add("--data", default="shapes")
    add("--data-root", default="data")
    add("--image-size", type=positive)
    add("--workers", type=natural, default=WORKERS)
    add("--cache")
    add("--steps", type=positive)
    add("--epochs", type=float)
    add("--batch-size", type=positive)
    add("--accumulate", type=positive, default=1)
    add("--lr", type=float)
    add("--seed", type=natural, default=0)
    add("--precision", choices=("bf16", "fp32"))
    add("--compile", action=argparse.BooleanOptionalAction)
    add("--device")
    add("--log-every", type=positive, default=50)
    add("--save-every", type=positive, default=500)
    add("--keep-every", type=positive)
    add("--sample-every", type=positive, default=1000)
    add("--fid-every", type=positive)
    add("--fid-samples", type=positive, default=1000)
    add("--tensorboard", action="store_true")
    return parser.parse_args()


def main():
    """Train all requested stages in order."""
    args = arguments()
    process = common.launch(args.device, args.precision)
    model_file = common.load_model(args.model)
    stages = []
    for stage in model_file.STAGES:
        is_given = stage.load and args.first_stage
        if args.stage in ("all", stage.name) and args.size in stage.recipes and not is_given:
            stages.append(stage)
    if not stages:
        raise UserError(f"nothing to train with --size {args.size} and --stage {args.stage}: sizes"
                        f" are {', '.join(model_file.PRESETS)}, stages"
                        f" {', '.join(stage.name for stage in model_file.STAGES)}")
    data = common.load_data(args.data, args.data_root,
                            args.image_size or model_file.PRESETS[args.size].image_size)
    for stage in stages:
        run = Run(args, process, model_file, stage, data)
        if run.step < run.steps:
            train(run)
        print(f"stage {stage.name}: {run.step} steps are done, see {run.folder}")


def train(run):
    """Train one stage from its last saved state to its end."""
    args, process, recipe = run.args, run.process, run.recipe
    is_main = process.rank == 0
    evaluator = None
    if args.fid_every and not run.stage.load:
        features = "classifier" if args.size == "tiny" else "inception"
        evaluator = fid.Evaluator(args.data, features, size=run.config.image_size,
                                  data_root=args.data_root, device=process.device)
    model = wrapped(run)
    batches = iter(loader(run))
    if is_main:
        start_log(run)
    on_stop_signals(run.stop)
    skipped = in_a_row = 0
    window = []
    bar = common.progress(run.steps, run.stage.name, "step", run.step)
    while run.step < run.steps:
        start = time.perf_counter()
        rate = recipe.rate(run.step, run.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        values = 0
        for micro in range(args.accumulate):
            batch, labels = next(batches)
            place = micro * process.world + process.rank
            torch.manual_seed(common.seed_of(args.seed, run.step, place))
            batch, labels = codes(run, batch), labels.to(process.device, non_blocking=True)
            # DDP reduces gradients at the last micro-batch only, as with no_sync.
            model.require_backward_grad_sync = micro == args.accumulate - 1
            with process.autocast():
                out = model(batch, labels)
            (out["loss"] / args.accumulate).backward()            # a mean over micro-batches
            values = values + torch.stack(list(out.values())).detach() / args.accumulate
        norm = nn.utils.clip_grad_norm_(run.network.parameters(), recipe.clip)
        stopping = torch.full_like(norm, run.stopping)
        values = torch.cat([values, torch.stack([norm, stopping])])
        if process.world > 1:
            dist.all_reduce(values)
        # The only line that waits for the device: two flags, the same on all ranks.
        finite, halt = torch.stack([values.isfinite().all(), values[-1] > 0]).tolist()
        if finite:
            in_a_row = 0
            run.optimizer.step()
            decay = min(recipe.ema, (1 + run.step) / (10 + run.step))  # short runs need the ramp
            common.update_ema(run.ema, run.network, decay)
            if is_main:
                window.append(values / process.world)
        else:
            skipped += 1
            in_a_row += 1
            if in_a_row == 10:
                raise UserError(f"loss or gradient not finite ten times in a row, up to step"
                                f" {run.step + 1}: the last saved state, if there is one, is"
                                f" {run.folder / 'state.pt'}; try a lower --lr")
        run.optimizer.zero_grad()
        run.step += 1
        run.seen += recipe.batch
        bar.update()

        last = run.step == run.steps
        if is_main and (run.step % args.log_every == 0 or last or halt):
            means = torch.stack(window).mean(0).tolist() if window else []
            means = dict(zip([*out, "norm"], means))
            bar.set_postfix(loss=means.get("loss"))
            log(run, **means, lr=rate, skipped=skipped,
                images_per_s=recipe.batch * run.order.group / (time.perf_counter() - start))
            window = []
        if is_main and (run.step % args.sample_every == 0 or last):
            save_grid(run)
        if evaluator and (run.step % args.fid_every == 0 or last):
            evaluate(run, evaluator)
        keep = args.keep_every and run.step % args.keep_every == 0
        if run.step % args.save_every == 0 or keep or last or halt:
            save(run, keep)  # last: a run killed before it repeats the grid and the evaluation
        if halt:
            raise UserError(f"stopped at step {run.step} of stage {run.stage.name}; saved: the same"
                            " command resumes there")
    bar.close()
    if run.board:
        run.board.close()
    on_stop_signals(signal.default_int_handler)


# --- Set-up ---------------------------------------------------------------------------------------

class Run:
    """A stage in training: what is trained, on what, how, and how far it has come."""

    def __init__(self, args, process, model_file, stage, data):
        self.args = args
        self.process = process
        self.model_file = model_file          # transdiff, dar, ...
        self.stage = stage
        self.data = data
        self.folder = Path(args.out or f"runs/{args.model}", stage.name)
        self.recipe = common.with_options(stage.recipes[args.size], lr=args.lr,
                                          batch=args.batch_size, epochs=args.epochs)
        batch, micro_batches = self.recipe.batch, process.world * args.accumulate
        if batch % micro_batches:
            raise UserError(f"a batch of {batch} is not divisible by {process.world} ranks x"
                            f" {args.accumulate} micro-batches: change --batch-size")
        self.micro = batch // micro_batches   # samples of a micro-batch of one rank
        self.first_stage = load_first_stage(self) if stage.first_stage else None
        self.config = make_config(self)
        torch.manual_seed(args.seed)
        self.network = stage.build(self.config).to(process.device)
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.network, self.recipe)
        self.order = common.Order(data.labels, getattr(self.config, "images_per_sample", 1),
                                  args.seed)
        self.board = None                     # of TensorBoard
        self.stopping = False                 # whether to end after the current step
        self.step = 0                         # steps done, skipped ones included
        self.seen = 0                         # samples used in them: the place in the order
        if args.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        if (self.folder / "state.pt").exists():
            resume(self)
        else:
            load_initial_weights(self)
        if len(set(common.gather(self.step))) > 1:
            raise UserError(
                f"the ranks found different states in {self.folder}: do all machines share it?")
        left = (self.recipe.epochs * self.order.length - self.seen) / batch
        self.steps = args.steps or max(1, self.step + int(left + 0.5))  # at the end

    def stop(self, number, frame):
        """Handle SIGTERM and SIGINT: end after this step. A second SIGINT ends at once."""
        self.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def load_first_stage(run):
    """Return the frozen stage whose codes the network is trained on."""
    args, device = run.args, run.process.device
    source = run.model_file.STAGES[0]
    if not args.first_stage and args.size not in source.recipes:
        raise UserError(f"size {args.size} needs --{source.name} FILE, a published {source.name}")
    first_stage = source.load(args.first_stage or run.folder.with_name(source.name) / "model.pt")
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return first_stage.to(device, memory_format=layout)


def make_config(run):
    """Return the preset with what data, first stage, stage and --set say, in this order."""
    args, stage, classes = run.args, run.stage, run.data.classes
    known = {"classes": len(classes), "class_names": tuple(classes), "image_size": args.image_size}
    if run.first_stage:
        known[stage.first_stage] = run.first_stage.config  # e.g. the field `vae`
    preset = common.with_options(run.model_file.PRESETS[args.size], **known)
    config = common.override(stage.adapt(preset), args.set)
    if run.first_stage and getattr(config, stage.first_stage) != run.first_stage.config:
        raise UserError(f"--set changes the {stage.first_stage}, which is trained already")
    return config


def make_optimizer(network, recipe):
    """Return an optimizer of the parameters: Muon's and AdamW's, with weight decay and without."""
    in_blocks = {p for module in network.modules() if isinstance(module, nn.ModuleList)
                 for p in module.parameters()}
    groups = {}
    for name, p in network.named_parameters():
        decays = network.decays(name, p) if hasattr(network, "decays") else p.ndim > 1
        # Muon's: the matrices of blocks, and all kernels but those of the three colours.
        matrix = p in in_blocks if p.ndim == 2 else p.ndim == 4 and 3 not in p.shape[:2]
        muon = recipe.muon and matrix
        if p.requires_grad:
            groups.setdefault((muon, decays), []).append(p)
    return common.Muon(
        [{"params": group, "muon": muon, "weight_decay": decays * recipe.weight_decay}
         for (muon, decays), group in groups.items()], recipe.lr, recipe.betas, fused=True)


def resume(run):
    """Load weights, averages, optimizer and progress of an interrupted run."""
    path = run.folder / "state.pt"
    with common.untrusted(path, "damaged or of another version: --fresh starts again, --out names"
                          " another folder"):
        state = torch.load(path, "cpu", weights_only=True)
        before = vars(common.rebuild(type(run.config), state["config"]))
        old = {name: value for name, value in before.items() if value != getattr(run.config, name)}
        if old:
            raise UserError(f"{run.folder} was started with another configuration ({old}): --fresh"
                            " starts again, --out names another folder")
        common.load_strict(run.network, state["model"], path)
        common.load_strict(run.ema, state["ema"], path)
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = state["step"]
        run.seen = state["seen"]


def load_initial_weights(run):
    """Start from --init or from the stage before, if any, else from random weights."""
    args, stage = run.args, run.stage
    path = run.folder.with_name(stage.start) / "model.pt" if stage.start else None
    if args.init and (args.stage == stage.name or not (stage.start or stage.load)):
        path = args.init
    if not path:
        if getattr(run.network, "needs_weights", False):
            raise UserError(f"size {args.size} trains a part of the model: --init gives the rest")
        return
    weights = run.network.state_dict()
    fitting = {}
    carry = getattr(run.network, "carry", lambda *misfit: None)
    with common.untrusted(path, "of another model"):
        content = common.read_checkpoint(path)
        if "stage" in content:
            old = content["model"]
        else:
            old = run.model_file.load_official(path).state_dict()
        for name, tensor in weights.items():
            weight = old.get(name)
            if weight is not None and weight.shape != tensor.shape:
                weight = carry(name, weight, tensor.shape)
            if weight is not None:
                fitting[name] = weight
    if len(fitting) < len(weights) / 2:
        raise UserError(f"few tensors of {path} fit: is it of another model?")
    weights |= fitting
    run.network.load_state_dict(weights)
    run.ema.load_state_dict(weights)
    print(f"stage {stage.name} starts from {path}: {len(fitting)} of {len(weights)} tensors")


def wrapped(run):
    """Return the network, compiled and in DDP where wanted, and print what is trained."""
    args, process, network = run.args, run.process, run.network
    if hasattr(network, "ready"):
        network.ready(run.config)
    by_default = process.device.type == "cuda" and args.size != "tiny"
    if args.compile or args.compile is None and by_default:
        compile_blocks(network)
    print(f"stage {run.stage.name}: {len(run.data.labels):,} images in {run.config.classes} classes"
          f" at {run.config.image_size} px; steps {run.step:,} to {run.steps:,} of"
          f" {run.recipe.batch} samples; {process.device}, {process.precision}")
    if process.world == 1:
        return network
    return nn.parallel.DistributedDataParallel(
        network, gradient_as_bucket_view=True,
        find_unused_parameters=getattr(network, "idle_parameters", False))


def compile_blocks(network):
    """Compile the blocks in its lists, one by one and in place: equal blocks share their code, and
    the names in the state_dict stay as they are."""
    torch._dynamo.config.optimize_ddp = False  # keep DDP from splitting the compiled blocks
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile()


def loader(run):
    """Return an endless iterable of this rank's micro-batches, from the samples that the run has
    not seen yet. The codes of the first stage are cached before."""
    args = run.args
    size = run.config.image_size
    workers = args.workers
    views = run.stage.views(run.config)
    cache = None
    if run.first_stage and args.cache != "off":
        cache = common.cached(args.cache or run.folder.with_name("cache"), run.data, size,
                              run.first_stage, views, workers)
        workers = 0
    places = itertools.count(run.seen + run.process.rank * run.micro,
                             run.process.world * run.micro)
    batches = ([run.order[k] for k in range(place, place + run.micro)] for place in places)
    return torch.utils.data.DataLoader(
        common.Samples(run.data, size, views, args.seed, cache), batch_sampler=batches,
        num_workers=workers, worker_init_fn=ignore_interrupts,
        pin_memory=run.process.device.type == "cuda")


def on_stop_signals(handler):
    """Let SIGTERM and Ctrl-C call the handler."""
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def ignore_interrupts(worker):
    """Let the main process alone handle Ctrl-C, and SIGTERM of torchrun, so that it can save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()            # torchrun's signal goes to the group of the process


def codes(run, batch):
    """Return what the network is trained on: float images, or the first stage's codes of them."""
    shape = batch.shape[:2]                       # samples, and images of each
    batch = batch.to(run.process.device, non_blocking=True).flatten(0, 1)
    if batch.dtype == torch.uint8:                # pictures: there is no cache
        batch = common.to_float(batch)
        if run.first_stage:
            batch = common.in_parts(run.first_stage.encode, batch, run.config.image_size)
    if run.first_stage:
        batch = run.first_stage.codes(batch)
    return batch.unflatten(0, shape).squeeze(1)   # a single image without that dimension


# --- Saving, grids, evaluation, logging -----------------------------------------------------------

@common.rank_zero_first()  # a barrier: no rank goes on before rank 0 has written
def save(run, keep):
    """Write config.json, model.pt, under a number too if it is to be kept, and state.pt."""
    args, stage = run.args, run.stage
    if run.process.rank > 0:
        return
    first_stage = stage.first_stage and f"../{stage.first_stage}/model.pt"  # from this folder
    about = {"model_name": args.model, "size": args.size, "stage": stage.name,
             "data": run.data.name, "first_stage": args.first_stage or first_stage,
             "config": asdict(run.config), "recipe": asdict(run.recipe),
             "step": run.step, "seed": args.seed}
    for half_written in run.folder.glob(".*.pt"):  # by a killed process
        half_written.unlink()
    common.save_json(run.folder / "config.json", about)
    if hasattr(run.ema, "finish"):
        run.ema.finish(examples(run))
    ema = run.ema.state_dict()
    for name in [f"model_{run.step:06d}.pt", "model.pt"] if keep else ["model.pt"]:
        common.save(run.folder / name, {**about, "model": ema})
    common.save(run.folder / "state.pt", {
        **about, "seen": run.seen, "model": run.network.state_dict(), "ema": ema,
        "optimizer": run.optimizer.state_dict()})


def examples(run):
    """Return the centre crops (n, 3, h, w) of up to 256 images, evenly spaced over the data."""
    n = len(run.data.labels)
    indices = torch.linspace(0, n - 1, min(n, 256)).long().tolist()
    images, _ = common.Samples(run.data, run.config.image_size, common.centre)[0, indices]
    return common.to_float(images.to(run.process.device))


def generated(run, indices, n):
    """Return images `indices` of a set of n, uint8 (b, 3, h, w), their labels, and facts. As in
    sample.py, they are made by the averaged weights and balanced over the classes."""
    labels = indices * run.config.classes // n
    noise = common.Noise(run.args.seed, indices.tolist(), run.process.device)
    with run.process.autocast():
        images, facts = run.model_file.generate(run.ema, run.first_stage,
                                                labels.to(run.process.device), noise)
    return common.to_uint8(images), labels, facts


def save_grid(run):
    """Write a picture of samples, a row per class if there are up to ten. Of a first stage, write
    images and, beside each, its reconstruction."""
    if run.stage.load:
        images = examples(run)[::8]
        noise = common.Noise(run.args.seed, range(len(images)), run.process.device)
        pairs = torch.stack([images, run.ema.reconstruct(images, noise)], 1)
        pictures = common.to_uint8(pairs.flatten(0, 1))
    else:
        n = COLUMNS * min(10, run.config.classes)
        pictures = generated(run, torch.arange(n), n)[0]
    common.save_picture(run.folder / f"samples/step_{run.step:06d}.png",
                        common.grid(pictures, COLUMNS))


def evaluate(run, evaluator):
    """Log the distance of samples to the data, and the means of facts about them, like TransDiff's
    feature similarity. Each rank makes its share of the samples."""
    features = fid.Features()
    facts = []
    n = max(run.args.fid_samples, 2 * run.process.world)
    for indices in common.rank_share(n).split(run.micro):
        images, labels, found = generated(run, indices, n)
        evaluator.extract(features, images.permute(0, 2, 3, 1), labels)
        facts.append({name: values.double().cpu() for name, values in found.items()})
    facts = sum(common.gather(facts), [])                # of all batches of all ranks
    means = {name: torch.cat([batch[name] for batch in facts]).mean().item() for name in found}
    numbers = evaluator.compare(features.gathered())
    if run.process.rank == 0:
        log(run, **numbers, **means)


def start_log(run):
    """Drop the lines of log.jsonl after the step that a run resumes at, and a half-written one.
    Open TensorBoard."""
    path = run.folder / "log.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    with common.atomic(path) as f:
        for line, step in re.findall(r'^(\{"step": (\d+), .*\}\n)', text, re.MULTILINE):
            if int(step) <= run.step:
                f.write(line.encode())
    if run.args.tensorboard:
        with common.untrusted("--tensorboard", "not installed"):
            from torch.utils.tensorboard import SummaryWriter
        run.board = SummaryWriter(run.folder, purge_step=run.step + 1)


def log(run, **values):
    """Append a line to log.jsonl, and numbers to TensorBoard."""
    with open(run.folder / "log.jsonl", "a") as f:
        print(json.dumps({"step": run.step, **values}), file=f)
    for name, value in values.items():
        if run.board:
            run.board.add_scalar(name, value, run.step)


if __name__ == "__main__":
    common.run_script(main)
