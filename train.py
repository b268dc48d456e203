"""Train any of the models, stage by stage: the loop, checkpoints, grids and the log.

    python train.py --model transdiff                                 # drawn shapes, on a laptop
    python train.py --model dar --data fashion-mnist
    python train.py --model madformer --data FOLDER --set diffusion_depth=2
    python train.py --model transdiff --data fashion-mnist --fid-every 500
    torchrun --nproc_per_node 8 train.py --model dar --size l --data /data/imagenet --accumulate 4
    torchrun --nproc_per_node 8 train.py --model transdiff --size l --data DIR --vae kl16.ckpt

A run lives in runs/<model>/<stage>/: config.json, model.pt (averaged weights, for sample.py),
state.pt (to resume), log.jsonl, samples/. The same command resumes where it stopped and skips
finished stages. All randomness follows from (seed, step, micro-batch) and, for data, from
(seed, epoch, image), so the step and the number of samples seen are enough to resume bit for bit.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import common
import fid
from common import UserError

COLUMNS = 8  # pictures per class in a grid


def arguments():
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="transdiff, dar, madformer, or a model file of your own")
    add("--size", default="tiny", help="preset of the model file (default: tiny)")
    add("--stage", default="all", help="one stage, or all in order (default)")
    add("--data", default="shapes", help="shapes, mnist, fashion-mnist, cifar10, or a FOLDER")
    add("--data-root", default="data", help="where named data sets are or are downloaded to")
    add("--image-size", type=common.positive, help="pixels (default: the preset's)")
    add("--vae", "--tokenizer", dest="first_stage", metavar="FILE",
        help="a published or trained first stage, instead of training one")
    add("--init", metavar="FILE", help="weights to start from: of another size, or released")
    add("--out", type=Path, help="folder of the run (default: runs/<model>)")
    add("--fresh", action="store_true", help="delete what the run has and start again")
    add("--steps", type=common.positive, help="optimizer steps per stage (default: by epochs)")
    add("--epochs", type=float, help="passes over the data per stage (default: the recipe's)")
    add("--batch-size", type=common.positive, help="samples per optimizer step over all ranks")
    add("--accumulate", type=common.positive, default=1, help="micro-batches per step and rank")
    add("--lr", type=float, help="learning rate (default: the recipe's)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA, not for tiny")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--workers", type=common.natural, help="processes that load images (default: up to 4)")
    add("--cache", metavar="DIR", help="for latents or tokens (default: <out>/cache), or off")
    add("--log-every", type=common.positive, default=50, metavar="STEPS")
    add("--save-every", type=common.positive, default=500, metavar="STEPS")
    add("--keep-every", type=common.positive, metavar="STEPS", help="also keep numbered weights")
    add("--sample-every", type=common.positive, default=1000, metavar="STEPS")
    add("--fid-every", type=common.positive, metavar="STEPS", help="evaluate samples")
    add("--fid-samples", type=common.positive, default=1000, metavar="N")
    add("--tensorboard", action="store_true", help="also log to TensorBoard, if it is installed")
    add("--seed", type=common.natural, default=0)
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the Config")
    args = parser.parse_args()
    if args.steps and args.epochs:
        parser.error("give --steps or --epochs, not both")
    args.out = args.out or Path("runs", args.model)
    return args


@dataclass
class Run:
    """A stage in training: what is trained, on what, how, and how far it has come."""
    args: argparse.Namespace
    process: common.Process
    model_file: ModuleType            # transdiff, dar, ...
    stage: common.Stage
    config: object
    recipe: common.Recipe
    data: common.Data
    folder: Path
    first_stage: nn.Module | None     # frozen; the network is trained on its codes
    first_stage_path: str | None      # for sample.py, relative to the folder
    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    order: common.Order
    micro: int                        # samples of a micro-batch of one rank
    step: int = 0                     # steps done, skipped ones included
    seen: int = 0                     # samples used in them: the place in the order
    steps: int = 0                    # steps at the end


def main():
    """Train all requested stages in order."""
    args = arguments()
    model_file = common.load_model(args.model)
    process = common.launch(args.device, args.precision)
    names = [stage.name for stage in model_file.STAGES]
    if args.size not in model_file.PRESETS:
        raise UserError(f"--size {args.size}: choose from {', '.join(model_file.PRESETS)}")
    if args.stage not in ("all", *names):
        raise UserError(f"--stage {args.stage}: choose from {', '.join(names)}, or all")
    preset = model_file.PRESETS[args.size]
    data = common.load_data(args.data, args.data_root, args.image_size or preset.image_size)
    if process.rank == 0:
        print(f"data {data.name}: {len(data.labels):,} images, {len(data.classes)} classes")
    for stage in model_file.STAGES:
        if should_train(stage, args):
            run = prepare(args, process, model_file, stage, data)
            if run.step < run.steps:
                train(run)
            elif process.rank == 0:
                print(f"stage {stage.name}: {run.step} steps are done")
    if process.world > 1:
        dist.destroy_process_group()


def should_train(stage, args):
    """Say whether this command trains the stage. Raise UserError if it should but cannot."""
    wanted = args.stage == stage.name
    if not wanted and args.stage != "all":
        return False
    if args.first_stage and stage.load:
        if wanted:
            raise UserError(f"--stage {stage.name}: a trained one is given, nothing is left to do")
        return False
    if args.size in stage.recipes:
        return True
    if stage.load:
        raise UserError(f"size {args.size} needs --{stage.name} FILE, a published {stage.name}")
    if wanted:
        raise UserError(f"no recipe for stage {stage.name} at size {args.size}")
    return False  # it was not published at this size


def train(run):
    """Train one stage from its last saved state to its end."""
    args, process, recipe = run.args, run.process, run.recipe
    evaluator = make_evaluator(run)
    model = wrapped(run)
    batches = iter(loader(run))
    log = Log(run)
    stop = Stop()
    skipped, in_a_row = 0, 0
    window, window_first, window_start = [], run.step, time.perf_counter()  # since the last line
    bar = common.progress(run.steps, run.stage.name, "step", process.rank, run.step)
    while run.step < run.steps:
        rate = recipe.rate(run.step, run.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        parts = {}
        for micro in range(args.accumulate):
            batch, labels = next(batches)
            reseed(args.seed, run.step, micro * process.world + process.rank)
            batch, labels = codes(run, batch), labels.to(process.device, non_blocking=True)
            is_last = micro == args.accumulate - 1
            with contextlib.nullcontext() if is_last or process.world == 1 else model.no_sync():
                with process.autocast():
                    out = model(batch, labels)
                (out["loss"] / args.accumulate).backward()        # a mean over micro-batches
            for name, value in out.items():
                parts[name] = parts.get(name, 0) + value.detach() / args.accumulate
        parts["norm"] = nn.utils.clip_grad_norm_(run.network.parameters(), recipe.clip)
        finite = torch.isfinite(parts["loss"] + parts["norm"])
        halt, bad = on_any_rank(process, stop.requested, ~finite)  # waits for the device
        if bad:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == 10:
                raise UserError(f"loss or gradient not finite ten times in a row, up to step"
                                f" {run.step}: {run.folder / 'state.pt'} has the last good"
                                " weights; try a lower --lr")
        else:
            in_a_row = 0
            run.optimizer.step()
            decay = min(recipe.ema, (1 + run.step) / (10 + run.step))  # short runs need the ramp
            common.update_ema(run.ema, run.network, decay)
            window.append(parts)
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.seen += recipe.batch
        bar.update()

        last = run.step == run.steps
        if run.step % args.log_every == 0 or last or halt:
            means = mean_over_ranks(window, process.world)
            images = (run.step - window_first) * recipe.batch * run.order.group
            speed = images / (time.perf_counter() - window_start)
            log(**means, lr=rate, skipped=skipped, images_per_s=speed,
                memory_gb=peak_memory(process.device))
            bar.set_postfix_str(f"loss {means.get('loss', math.nan):.4f}, {speed:.0f} images/s")
            window, window_first, window_start = [], run.step, time.perf_counter()
        pause = time.perf_counter()
        if run.step % args.sample_every == 0 or last:
            save_grid(run)
        if args.keep_every and run.step % args.keep_every == 0:
            save_weights(run, f"model_{run.step:06d}.pt")
        if evaluator and (run.step % args.fid_every == 0 or last):
            evaluate(run, evaluator, log)
        if run.step % args.save_every == 0 or last or halt:
            save(run)  # after what a killed run would otherwise lack
        window_start += time.perf_counter() - pause
        if halt:
            raise UserError(f"stopped at step {run.step} of stage {run.stage.name}; saved: the same"
                            " command resumes there")
    bar.close()
    stop.restore()
    if process.rank == 0:
        print(f"stage {run.stage.name}: done; {run.folder} has model.pt and samples/")


# --- Set-up ---------------------------------------------------------------------------------------

def prepare(args, process, model_file, stage, data):
    """Return the Run of a stage, resumed if it was interrupted, else with its initial weights."""
    first_stage, first_stage_path = load_first_stage(args, model_file, stage, process.device)
    config = make_config(args, model_file, stage, data, first_stage)
    recipe = common.with_options(stage.recipes[args.size], lr=args.lr, batch=args.batch_size,
                                 epochs=args.epochs)
    micro, rest = divmod(recipe.batch, process.world * args.accumulate)
    if rest:
        raise UserError(f"a batch of {recipe.batch} does not divide into {process.world} ranks x"
                        f" {args.accumulate} micro-batches: change --batch-size or --accumulate")
    folder = args.out / stage.name
    with common.rank_zero_first():
        if args.fresh and process.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        for unfinished in folder.glob(".*.pt.*"):  # a killed process was writing it
            unfinished.unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    network = stage.build(config).to(process.device)
    ema = copy.deepcopy(network).float().eval().requires_grad_(False)
    order = common.Order(data.labels, getattr(config, "images_per_sample", 1), args.seed)
    run = Run(args, process, model_file, stage, config, recipe, data, folder, first_stage,
              first_stage_path, network, ema, adamw(network, recipe, process.device), order, micro)
    if (folder / "state.pt").exists():
        resume(run)
    else:
        load_initial_weights(run)
    if len(set(common.gather(run.step))) > 1:
        raise UserError(f"the ranks found different states in {folder}: do all machines share it?")
    left = math.floor((recipe.epochs * order.length - run.seen) / recipe.batch + 0.5)
    run.steps = args.steps or max(1, run.step + max(0, left))
    return run


def load_first_stage(args, model_file, stage, device):
    """Return the frozen first stage and its path for sample.py, or None, None."""
    if not stage.first_stage:
        return None, None
    path = args.out / stage.first_stage / "model.pt"
    if args.first_stage:
        path = Path(args.first_stage).resolve()
    if not path.exists():
        raise UserError(f"stage {stage.name} needs {path}, which does not exist: train stage"
                        f" {stage.first_stage}, or give --{stage.first_stage} FILE")
    source = next(s for s in model_file.STAGES if s.name == stage.first_stage)
    kept_path = str(path) if args.first_stage else f"../{stage.first_stage}/model.pt"
    return source.load(path).to(device), kept_path


def make_config(args, model_file, stage, data, first_stage):
    """Return the preset with what data, first stage, stage and --set say, in this order."""
    preset = model_file.PRESETS[args.size]
    known = {"classes": len(data.classes), "class_names": tuple(data.classes)}
    if first_stage:
        known[stage.first_stage] = first_stage.config  # e.g. the field `vae`
    known["image_size"] = args.image_size or preset.image_size
    config = common.override(stage.adapt(common.with_options(preset, **known)), args.set)
    if first_stage and getattr(config, stage.first_stage) != first_stage.config:
        changes = differences(first_stage.config, getattr(config, stage.first_stage))
        raise UserError(f"the {stage.first_stage} has another configuration: {changes}")
    return config


def adamw(network, recipe, device):
    """Return AdamW with two groups of parameters: with weight decay and without."""
    decayed = {"params": [], "weight_decay": recipe.weight_decay}
    others = {"params": [], "weight_decay": 0.0}
    for name, parameter in network.named_parameters():
        decays = parameter.ndim > 1
        if hasattr(network, "decays"):
            decays = network.decays(name, parameter)
        if parameter.requires_grad:
            (decayed if decays else others)["params"].append(parameter)
    return torch.optim.AdamW([decayed, others], lr=recipe.lr, betas=recipe.betas,
                             fused=device.type in ("cpu", "cuda"))


def resume(run):
    """Load weights, averages, optimizer and progress of an interrupted run."""
    path = run.folder / "state.pt"
    try:
        with common.untrusted(path):
            state = common.read_checkpoint(path)
            saved = common.rebuild(type(run.config), state["config"])
            if saved != run.config:
                raise UserError(f"{run.folder} was started with another configuration"
                                f" ({differences(saved, run.config)})")
            common.load_strict(run.network, state["model"], path)
            common.load_strict(run.ema, state["ema"], path)
            run.optimizer.load_state_dict(state["optimizer"])
            run.step = int(state["step"])
            run.seen = int(state["seen"])
    except UserError as error:
        raise UserError(f"{error}; --fresh starts again, --out names another folder") from None


def differences(old, new):
    """Return in words which fields of two configurations differ."""
    changed = []
    for field in dataclasses.fields(new):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after and field.compare:
            changed.append(f"{field.name}: {before} -> {after}")
    return ", ".join(changed)


def load_initial_weights(run):
    """Start from --init or from the stage before, if any, else from random weights."""
    args, stage = run.args, run.stage
    carries = hasattr(run.network, "carry")
    if args.init and args.stage == stage.name and not carries:
        raise UserError(f"--init: stage {stage.name} always starts from random weights")
    path = args.out / stage.start / "model.pt" if stage.start else None
    if args.init and carries and (args.stage == stage.name or not stage.start):
        path = Path(args.init)
    if path is None:
        if getattr(run.network, "needs_weights", False):
            raise UserError(f"size {args.size} trains a part of the model: --init gives the rest")
        return
    content = common.read_checkpoint(path)
    if "stage" in content:
        old = content["model"]
    else:
        old = run.model_file.load_official(path).state_dict()
    own = run.network.state_dict()
    fresh = []
    for name, tensor in own.items():
        weight = old.get(name)
        if weight is not None and weight.shape != tensor.shape:
            weight = run.network.carry(name, weight, tensor.shape)
        if weight is None:
            fresh.append(name)
        else:
            own[name] = weight
    if len(fresh) > len(own) / 2:
        raise UserError(f"{path} lacks {len(fresh)} of {len(own)} tensors: another model or size?")
    run.network.load_state_dict(own)
    run.ema.load_state_dict(own)
    if run.process.rank == 0:
        print(f"stage {stage.name} starts from {path}; random: {', '.join(fresh) or 'nothing'}")


def wrapped(run):
    """Return the network, compiled and in DDP where needed; print what is trained."""
    args, process, network = run.args, run.process, run.network
    compiling = args.compile
    if compiling is None:
        compiling = process.device.type == "cuda" and args.size != "tiny"
    if hasattr(network, "ready"):
        network.ready(run.config)
    if process.rank == 0:
        count = sum(p.numel() for p in network.parameters())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        how = "compiled" if compiling else "not compiled"
        print(f"stage {run.stage.name}: {count:,} parameters, {trained:,} of them trained;"
              f" {run.config.image_size} px; steps {run.step:,} to {run.steps:,} of"
              f" {process.world} x {args.accumulate} x {run.micro} samples;"
              f" {process.device.type}, {process.precision}, {how}")
    if compiling:
        network.compile()  # in place and before DDP: the names in state_dict stay as they are
    if process.world == 1:
        return network
    idle = getattr(network, "idle_parameters", False)
    return DistributedDataParallel(network, gradient_as_bucket_view=True,
                                   find_unused_parameters=idle)


def loader(run):
    """Return this rank's micro-batches from the number of samples seen on, without an end. What the
    first stage makes of the data is cached first."""
    args, process = run.args, run.process
    views, size = run.stage.views(run.config), run.config.image_size
    cache = None
    workers = args.workers
    if workers is None:
        workers = min(4, os.cpu_count()) if sys.platform == "linux" else 0
    if run.first_stage and args.cache != "off":
        folder = args.cache or args.out / "cache"
        cache = common.cached(folder, run.data, size, run.first_stage, views, workers)
        workers = 0
    return torch.utils.data.DataLoader(
        common.Samples(run.data, size, views, args.seed, cache), batch_sampler=micro_batches(run),
        num_workers=workers, worker_init_fn=ignore_interrupts,
        pin_memory=process.device.type == "cuda")


def micro_batches(run):
    """Yield this rank's micro-batches of the order, which is the same for any ranks."""
    place = run.seen + run.process.rank * run.micro
    while True:
        yield [run.order[p] for p in range(place, place + run.micro)]
        place += run.process.world * run.micro


def ignore_interrupts(worker):
    """Let the main process alone handle Ctrl-C, so that it can save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def codes(run, batch):
    """Return what the network is trained on: float images, or the first stage's codes of them."""
    batch = batch.to(run.process.device, non_blocking=True)
    if batch.dtype == torch.uint8:
        batch = common.to_float(batch)
    if not run.first_stage:
        return batch
    several = run.order.group > 1
    flat = batch.flatten(0, 1) if several else batch
    with torch.no_grad():
        stored = run.first_stage.encode(flat) if run.args.cache == "off" else flat
        result = run.first_stage.codes(stored)
    return result.unflatten(0, batch.shape[:2]) if several else result


def reseed(seed, step, micro_batch):
    """Make all that is drawn next a function of these numbers."""
    sequence = np.random.SeedSequence(seed, spawn_key=(step, micro_batch))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def on_any_rank(process, *flags):
    """Return for each flag whether it is set on any rank."""
    flags = torch.stack([torch.as_tensor(flag, device=process.device) for flag in flags]).int()
    if process.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


# --- Saving, grids, evaluation, logging -----------------------------------------------------------

def about(run):
    """Return what config.json and the checkpoints say about the run."""
    args = run.args
    return {"model_name": args.model, "size": args.size, "stage": run.stage.name,
            "data": run.data.name, "first_stage": run.first_stage_path,
            "config": dataclasses.asdict(run.config), "recipe": dataclasses.asdict(run.recipe),
            "steps": run.steps, "seed": args.seed, "precision": run.process.precision,
            "torch": str(torch.__version__)}


def save(run):
    """Write config.json, model.pt and state.pt, each atomically."""
    if run.process.rank == 0:
        with common.atomic(run.folder / "config.json") as f:
            f.write(json.dumps(about(run), indent=1).encode())
        state = {"step": run.step, "seen": run.seen, "model": run.network.state_dict(),
                 "ema": run.ema.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "config": dataclasses.asdict(run.config)}
        save_weights(run, "model.pt")
        common.save(run.folder / "state.pt", state)
    if run.process.world > 1:
        dist.barrier()  # no rank leaves while rank 0 is writing


def save_weights(run, name):
    """Write the averaged weights."""
    if run.process.rank == 0:
        finish(run)
        weights = run.ema.state_dict()
        common.save(run.folder / name, {**about(run), "step": run.step, "model": weights})


def finish(run):
    """Let the averaged module measure what it needs on up to 256 images."""
    if hasattr(run.ema, "finish"):
        n = len(run.data.labels)
        indices = np.linspace(0, n - 1, min(256, n)).round().astype(int)
        run.ema.finish(load_images(run, indices))


def load_images(run, indices):
    """Return the centre crops (n, 3, h, w) of some images of the data, as floats on the device."""
    size = run.config.image_size
    crops = [common.from_pil(common.centre_crop(run.data.read(int(i)), size)) for i in indices]
    return common.to_float(torch.stack(crops).to(run.process.device))


@torch.no_grad()
def save_grid(run):
    """Write a picture of up to ten classes, a row each: samples of the averaged weights or, of a
    first stage, images with their reconstructions beside them."""
    if run.process.rank > 0:
        return
    classes = np.unique(np.linspace(0, run.config.classes - 1, 10).round().astype(int))
    labels = torch.from_numpy(classes.repeat(COLUMNS)).to(run.process.device)
    noise = common.Noise(run.args.seed, range(len(labels)), run.process.device)
    if not run.stage.load:
        pictures, _ = run.model_file.generate(run.ema, run.first_stage, labels, noise)
        columns = COLUMNS
    else:
        finish(run)
        members = [np.flatnonzero(run.data.labels == c)[:COLUMNS] for c in classes]
        images = load_images(run, np.concatenate([np.resize(m, COLUMNS) for m in members]))
        pictures = torch.stack([images, run.ema.reconstruct(images, noise)], 1).flatten(0, 1)
        columns = 2 * COLUMNS
    names = [run.data.classes[c] for c in classes]
    sheet = common.grid(common.to_uint8(pictures).cpu(), columns, names)
    common.save_picture(run.folder / f"samples/step_{run.step:06d}.png", sheet)


def make_evaluator(run):
    """Return the Evaluator of --fid-every, or None. Refuse an unusable reference now."""
    if run.stage.load or not run.args.fid_every:
        return None
    least = max(4, run.process.world)
    if run.args.fid_samples < least:
        raise UserError(f"--fid-samples must be {least} or more")
    features = "classifier" if run.args.size == "tiny" else "inception"
    return fid.Evaluator(run.args.data, features, size=run.config.image_size,
                         data_root=run.args.data_root, device=run.process.device)


@torch.no_grad()
def evaluate(run, evaluator, log):
    """Log the distance of samples to the data. Each rank makes its share of them."""
    process, n = run.process, run.args.fid_samples
    features = fid.Features()
    share = torch.arange(n).tensor_split(process.world)[process.rank]
    for indices in share.split(run.micro):
        labels = indices * run.config.classes // n  # as sample.py balances them
        noise = common.Noise(run.args.seed, indices.tolist(), process.device)
        with process.autocast():
            images, _ = run.model_file.generate(run.ema, run.first_stage,
                                                labels.to(process.device), noise)
        evaluator.extract(features, common.to_uint8(images).permute(0, 2, 3, 1), labels.numpy())
    numbers = evaluator.measure(features)
    if process.rank == 0:
        log(**numbers, features=evaluator.name)
        common.tqdm.write(f"step {run.step}, EMA: {fid.describe(numbers)}")


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop ends after the step. A second ends it."""

    def __init__(self):
        self.requested = False
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        """Handle the signal."""
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self):
        """Let the signals do what they did before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Log:
    """log.jsonl and TensorBoard. A resumed run drops the lines of steps that it repeats."""

    def __init__(self, run):
        self.run = run
        self.path = run.folder / "log.jsonl"
        self.board = None
        if run.process.rank > 0:
            return
        kept = []
        if run.step and self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line
                    if json.loads(line)["step"] <= run.step:
                        kept.append(line + "\n")
        with common.atomic(self.path) as f:
            f.write("".join(kept).encode())
        if run.args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: pip install tensorboard") from None
            self.board = SummaryWriter(run.folder, purge_step=run.step + 1)

    def __call__(self, **values):
        """Append a line on rank 0."""
        if self.run.process.rank > 0:
            return
        values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": self.run.step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        for name, value in values.items():
            if self.board and not isinstance(value, str):
                self.board.add_scalar(name, value, self.run.step)


def mean_over_ranks(window, world):
    """Return the means over steps, of which all may be skipped, and over ranks."""
    means = {}
    for name in window[0] if window else ():
        mean = torch.stack([parts[name] for parts in window]).mean()
        if world > 1:
            dist.all_reduce(mean)
        means[name] = mean.item() / world
    return means


def peak_memory(device):
    """Return the peak memory in GB that tensors took, where the device counts it."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


if __name__ == "__main__":
    common.run_script(main)
