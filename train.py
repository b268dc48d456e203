"""Trains any of the models, stage by stage: the loop, and only the loop.

    python train.py --model transdiff                                 # drawn shapes, on a laptop
    python train.py --model dar --data fashion-mnist
    python train.py --model madformer --data FOLDER --set diffusion_depth=2
    python train.py --model transdiff --data fashion-mnist --fid-every 500   # FD-classifier, logged
    torchrun --nproc_per_node 8 train.py --model dar --size l --data /data/imagenet --accumulate 4
    torchrun --nproc_per_node 8 train.py --model transdiff --size l --data DIR --vae kl16.ckpt

A run lives in runs/<model>/<stage>/: config.json, model.pt (EMA weights, for sample.py), state.pt
(to go on from), log.jsonl, samples/. The same command goes on where it stopped; finished stages are
skipped. The models say what is trained and how in their STAGES; everything drawn at random follows
from (seed, step, micro-batch), so the step number alone is enough to resume, bit for bit.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import common
import dar
import fid
import madformer
import transdiff
from common import UserError

MODELS = {"transdiff": transdiff, "dar": dar, "madformer": madformer}
COLUMNS = 8  # pictures per class in the grids


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, required=True)
    add("--size", default="tiny", help="preset of the model file (default: tiny); b, l, ... are the papers'")
    add("--stage", default="all", help="one stage, or all: each in order, finished ones skipped (default)")
    add("--data", default="shapes", help="shapes, mnist, fashion-mnist, cifar10, or a FOLDER of class folders")
    add("--data-root", default="data", help="where named data sets are, or are downloaded to")
    add("--image-size", type=int, help="pixels (default: the preset's)")
    add("--vae", metavar="FILE", help="a published KL-VAE, instead of training one (transdiff, madformer)")
    add("--tokenizer", metavar="FILE", help="a trained or published tokenizer, instead of training one (dar)")
    add("--init", metavar="FILE", help="weights to start from: of another stage, another size, or a released file")
    add("--out", help="where the run lives (default: runs/<model>)")
    add("--fresh", action="store_true", help="begin anew where there is a run already")
    add("--steps", type=int, help="optimizer steps per stage (default: from the recipe's epochs)")
    add("--epochs", type=float, help="passes over the data per stage (default: the recipe's)")
    add("--batch-size", type=int, help="samples per optimizer step over all ranks and micro-batches")
    add("--accumulate", type=int, default=1, help="micro-batches per optimizer step and rank")
    add("--lr", type=float, help="learning rate (default: the recipe's)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA, but not for tiny")
    add("--recompute", action="store_true", help="keep no activations inside blocks, compute them again: less memory,"
                                                 " a third more work")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--workers", type=int, help="processes that load images (default: up to 4)")
    add("--cache", metavar="DIR", help="where latents or tokens are cached (default: <out>/cache); off: made anew")
    add("--log-every", type=int, default=50, metavar="N", help="steps (default: 50)")
    add("--save-every", type=int, default=500, metavar="N", help="steps (default: 500)")
    add("--sample-every", type=int, default=1000, metavar="N", help="steps between sample grids (default: 1000)")
    add("--fid-every", type=int, metavar="N", help="steps between evaluations of samples (default: never; not of a VAE"
                                                 " or tokenizer)")
    add("--fid-samples", type=int, default=1000, metavar="M", help="images that are evaluated (default: 1000)")
    add("--fid-reference", metavar="SET", help="as REFERENCE of fid.py (default: the data, or the test images of a"
                                                     " named set)")
    add("--fid-features", choices=("inception", "classifier"), help="default: classifier for tiny, else inception")
    add("--tensorboard", action="store_true", help="also log to TensorBoard, if it is installed")
    add("--seed", type=int, default=0)
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the model's Config")
    args = parser.parse_args()
    for name in ("image_size", "steps", "epochs", "batch_size", "accumulate", "lr", "log_every", "save_every",
                 "sample_every", "fid_every"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is more than 0, not {value}")
    if args.steps and args.epochs:
        parser.error("--steps or --epochs says how long: not both")
    if (args.workers or 0) < 0:
        parser.error(f"--workers is 0 or more, not {args.workers}")
    if (args.fid_reference or args.fid_features) and not args.fid_every:
        parser.error("--fid-reference and --fid-features belong to --fid-every")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed is 0 or more, of 64 bits, not {args.seed}")
    if args.fid_samples < 4:
        parser.error(f"--fid-samples is 4 or more, not {args.fid_samples}")
    args.out = Path(args.out or f"runs/{args.model}")
    return args


def main():
    """All asked-for stages, in order."""
    args = arguments()
    rank, world, device = common.distributed(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model = MODELS[args.model]
    names = [stage.name for stage in model.STAGES]
    if args.size not in model.PRESETS:
        raise UserError(f"--size {args.size}: {args.model} has {', '.join(model.PRESETS)}")
    if args.stage not in (*names, "all"):
        raise UserError(f"--stage {args.stage}: {args.model} has {', '.join(names)}, or all")
    for name in ("vae", "tokenizer"):
        if getattr(args, name) and (name not in names or args.stage == name):
            raise UserError(f"--{name}: " + (f"{name} is not trained where one is given" if name in names else
                                             f"{args.model} has none"))
    if args.init and not (able := [s.name for s in model.STAGES if s.carry and args.stage in (s.name, "all")]):
        raise UserError(f"--init: stage {args.stage} always begins afresh")
    if args.init and args.stage == "all" and len([s for s in model.STAGES if s.carry and not s.start]) > 1:
        raise UserError(f"--init: say which stage starts from it, --stage {' or '.join(able)}")
    preset = model.PRESETS[args.size]
    if args.fid_every and args.fid_reference:
        fid.Source(args.fid_reference, data_root=args.data_root)  # a mistake shows now, not after the first stage
    data = common.load_data(args.data, args.data_root, args.image_size or preset.image_size)
    if rank == 0:
        print(f"data {data.name}: {len(data.labels):,} images, {len(data.classes)} classes")
    for stage in model.STAGES:
        if args.stage not in ("all", stage.name) or getattr(args, stage.name, None):
            continue  # not asked for, or its published weights are given (--vae)
        if args.size not in stage.recipes:
            if stage.load:
                raise UserError(f"size {args.size} is trained with a published {stage.name}: give"
                                f" --{stage.name} FILE")
            if args.stage == "all":
                continue  # nothing was published of this stage at this size
            raise UserError(f"there is no recipe for stage {stage.name} at size {args.size}")
        first, first_path = frozen(args, stage, device)
        try:
            known = {stage.first: first.config} if first else {}  # e.g. vae=the config of the VAE that there is
            known |= {stage.names: tuple(data.classes)} if stage.names else {}
            config = dataclasses.replace(preset, classes=len(data.classes), **known,
                                         image_size=args.image_size or preset.image_size)
            config = common.override(stage.config(config), args.set)
        except ValueError as error:
            raise UserError(f"this configuration is impossible: {error}") from None
        if first and (asked := getattr(config, stage.first)) != first.config:
            raise UserError(f"the {stage.first} in {first_path} is another one: {differences(first.config, asked)}")
        with common.locked(args.out / f".{stage.name}.lock") if rank == 0 else contextlib.nullcontext():
            train(args, stage, config, data, first, first_path, rank, world, device)
    if world > 1:
        dist.destroy_process_group()


def train(args, stage, config, data, first, first_path, rank, world, device):
    """One stage, from its last saved state to its end. `first` is the frozen stage whose codes it eats, or None."""
    recipe = stage.recipes[args.size]
    recipe = dataclasses.replace(recipe, lr=args.lr or recipe.lr, batch=args.batch_size or recipe.batch,
                                 epochs=args.epochs or recipe.epochs)
    micro, rest = divmod(recipe.batch, world * args.accumulate)
    if rest:
        raise UserError(f"a batch of {recipe.batch} does not divide into {world} ranks x {args.accumulate}"
                        " micro-batches: change --batch-size or --accumulate")
    group = stage.group(config)
    order = common.Order(data.labels, micro, group, args.seed)
    steps = args.steps or max(1, round(recipe.epochs * order.length / recipe.batch))
    precision = args.precision or ("bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32")
    compiled = args.compile if args.compile is not None else device.type == "cuda" and args.size != "tiny"
    workers = args.workers if args.workers is not None else min(4, os.cpu_count()) * (sys.platform == "linux")
    folder = args.out / stage.name
    with common.rank_zero_first():
        if rank == 0 and args.fresh:
            shutil.rmtree(folder, ignore_errors=True)

    # What is trained, on what, from where.
    torch.manual_seed(args.seed)
    module = stage.build(config).to(device)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and stage.trains(config, name))
    ema = copy.deepcopy(module).float().eval().requires_grad_(False)
    optimizer = adamw(module, stage, recipe, device)
    state, damaged = resume(folder, module, ema, optimizer, config, rank)
    step, seen = state.get("step", 0), state.get("seen", 0)
    if len(set(common.gather(torch.tensor([step], device=device)).tolist())) > 1:
        raise UserError(f"the ranks found different states in {folder}: is it on a disk that all machines share?")
    if seen != step * recipe.batch and not args.steps:  # another batch size: the epochs stay
        steps = step + max(0, math.floor((recipe.epochs * order.length - seen) / recipe.batch + 0.5))
    if step >= steps:
        if rank == 0:
            print(f"stage {stage.name}: {step} steps are done")
        return
    order.shift = seen - step * recipe.batch  # not 0 if an earlier part had another batch size
    if not step:
        begin(args, stage, config, module, rank)
        ema.load_state_dict(module.state_dict())
    if first and args.cache != "off":
        views = stage.views(config)
        source = common.Stored(common.cached(args.cache or args.out / "cache", data, config.image_size, first, views,
                                             workers), data.labels, args.seed)
        workers = 0
    else:
        source = common.Pictures(data, config.image_size, stage.augment(config), args.seed)
    meta = {"family": args.model, "size": args.size, "stage": stage.name, "data": data.name, "classes": data.classes,
            "first": first_path, "config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe),
            "steps": steps, "seed": args.seed, "precision": precision, "ranks": world, "torch": str(torch.__version__)}

    def describe():
        with common.atomic(folder / "config.json") as f:
            f.write(json.dumps(meta, indent=1).encode())

    if rank == 0:
        changed = changes(state["meta"], {**meta, **meta["recipe"]}) if step else ""
        describe()
        count = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(f"stage {stage.name}: {count:,} parameters, {trained:,} of them trained; {config.image_size} px; steps "
              f"{step:,} to {steps:,} of {world} x {args.accumulate} x {micro} samples"
              f"{f' of {group} images' * (group > 1)}; {device.type}, {precision}{', compiling' * compiled}; "
              f"{memory(device):.2f} GB used{changed and f'; changed: {changed}'}")
    judge = None
    if first and args.fid_every:
        judge = fid.Judge(args.fid_reference or args.data, size=config.image_size, data_root=args.data_root,
                          features=args.fid_features or ("classifier" if args.size == "tiny" else "inception"),
                          device=device)
        judge.side  # a reference that is no good ends the stage before it begins
    log = Log(folder, step, args.tensorboard) if rank == 0 else None
    if rank == 0 and changed:
        log(step=step, changed=changed)
    stage.ready(module, config)
    if args.recompute:
        recompute(module)
    if compiled:
        module.compile()  # in place and before DDP: the names in state_dict stay as they are
    wrapped = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False,
                                                  gradient_as_bucket_view=True) if world > 1 else module
    chunks = itertools.count(step * args.accumulate * world + rank, world)  # this rank's micro-batches of the whole run
    batches = iter(torch.utils.data.DataLoader(
        source, batch_sampler=(order(k) for k in chunks), num_workers=workers, pin_memory=device.type == "cuda",
        worker_init_fn=lambda _: signal.signal(signal.SIGINT, signal.SIG_IGN)))
    probe, shown, row_names = probes(data, config.image_size)

    def checkpoint():
        nonlocal damaged
        if rank == 0:
            stage.finish(ema, probe["many"].to(device))
            describe()
            common.save(folder / "model.pt", {**meta, "step": step, "model": ema.state_dict()})
            common.save(folder / "state.pt", {
                "step": step, "seen": step * recipe.batch + order.shift, "model": module.state_dict(),
                "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "meta": meta},
                keep=not damaged)  # a damaged state does not take the place of the good one before it
        damaged = False

    def grids():
        if rank == 0:
            stage.finish(ema, probe["many"].to(device))
        mine = torch.arange(rank, len(shown) + -len(shown) % world, world) % len(shown)  # padded to equal shares
        noise = common.Noise.of(args.seed, mine.tolist(), device)
        with torch.no_grad():
            pictures = stage.preview(ema, first, probe["grid"][mine].to(device), shown[mine].to(device), noise)
        per = len(pictures) // len(mine)  # 2 where a picture stands beside its reconstruction
        pictures = common.gather(common.to_uint8(pictures)).unflatten(0, (world, -1, per)).transpose(0, 1).flatten(0, 2)
        if rank == 0:
            sheet = common.grid(pictures[:len(shown) * per].cpu(), COLUMNS * per, row_names)
            common.save_picture(folder / f"samples/step_{step:06d}.png", sheet)

    def evaluate():
        found, n = fid.Features(), args.fid_samples
        mine = np.array_split(np.arange(n), world)[rank]
        for index in np.array_split(mine, range(micro, len(mine), micro)) if len(mine) else ():
            labels = torch.from_numpy(index * config.classes // n)  # balanced, in the order of sample.py
            noise = common.Noise.of(args.seed, index.tolist(), device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                images, _ = MODELS[args.model].generate(ema, first, labels.to(device), noise)
            found.add(*judge.look(common.to_uint8(images).permute(0, 2, 3, 1)),
                      labels.numpy() if getattr(config, "text", True) else None)
        numbers = judge.measure(found.gathered())
        if rank == 0:
            log(step=step, **numbers, features=judge.name)
            common.tqdm.write(f"step {step}, EMA: {fid.line(numbers)}")

    stop = Stop()
    skipped = in_a_row = 0
    parts, waited, since, logged = {}, 0.0, time.perf_counter(), step
    bar = common.progress(steps, stage.name, "step", rank, step)
    while step < steps:
        rate = recipe.rate(step, steps)
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        sums = {}
        for micro_step in range(args.accumulate):
            begun = time.perf_counter()
            batch, labels = (x.to(device, non_blocking=True) for x in next(batches))
            waited += time.perf_counter() - begun
            reseed(args.seed, step, micro_step * world + rank)
            batch = batch if batch.dtype != torch.uint8 else common.to_float(batch)
            if first:
                with torch.no_grad():
                    lead = batch.shape[:2 if group > 1 else 1]
                    flat = batch.flatten(0, len(lead) - 1)
                    batch = stage.codes(first, flat if args.cache != "off" else first.encode(flat)).unflatten(0, lead)
            last = micro_step == args.accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    out = wrapped(batch, labels)
                (out["loss"] / args.accumulate).backward()
            for name, value in out.items():
                sums[name] = sums.get(name, 0) + value.detach() / args.accumulate
        norm = nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        finite = bool(torch.isfinite(norm + sums["loss"]))
        halt, bad = anywhere(world, device, stop.asked, not finite)
        if bad:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == 10:
                raise UserError(f"stage {stage.name}: loss or gradient not finite ten times in a row, up to step {step}"
                                f"; {folder / 'state.pt'} holds the last good weights. Try a lower --lr")
        else:
            in_a_row = 0
            optimizer.step()
            common.update_ema(ema, module, min(recipe.ema, (1 + step) / (10 + step)))
            for name, value in {**sums, "norm": norm}.items():
                parts.setdefault(name, []).append(value)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == steps or halt:
            line = {name: mean_over_ranks(torch.stack(values).mean(), world) for name, values in parts.items()}
            speed = (step - logged) * recipe.batch * group / (time.perf_counter() - since)
            if rank == 0:
                log(step=step, **line, lr=rate, skipped=skipped, images_per_s=speed, data_s=waited,
                    memory_gb=memory(device))
                bar.set_postfix_str(f"loss {line.get('loss', math.nan):.4f}, {speed:.0f} images/s")
            parts, waited, since, logged = {}, 0.0, time.perf_counter(), step
        if step % args.sample_every == 0 or step == steps:
            grids()
        if step % args.save_every == 0 or step == steps or halt:
            checkpoint()
        if judge and (step % args.fid_every == 0 or step == steps) and not halt:
            begun = time.perf_counter()
            evaluate()
            since += time.perf_counter() - begun
        if halt:
            bar.close()
            if world > 1:
                dist.barrier()  # nobody leaves while rank 0 is still writing
            raise UserError(f"stopped at step {step} of stage {stage.name}; saved, the same command goes on from there")
    bar.close()
    stop.restore()
    if world > 1:
        dist.barrier()
    if rank == 0:
        print(f"stage {stage.name}: done, see {folder}/samples; weights in {folder / 'model.pt'}")


def recompute(module):
    """Makes the blocks, what stands in the outermost lists of modules, keep only their input for the way back."""
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            recompute(child)
            continue
        for block in child:
            if type(block).forward is nn.Module.forward:  # a level of MADFormer's U-Net: its parts are called
                recompute(block)
            else:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def adamw(module, stage, recipe, device):
    """AdamW in two groups: with weight decay and without."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if stage.decays(n, p) == decay],
               "weight_decay": recipe.weight_decay * decay} for decay in (False, True)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=recipe.betas,
                             fused=device.type in ("cpu", "cuda"))


def resume(folder, module, ema, optimizer, config, rank):
    """Loads the newest state that is whole. What it says besides weights (step, seen: samples so far, meta with the
    recipe's entries), {} where there is none; and whether a newer one was damaged."""
    damaged = False
    for path in (folder / "state.pt", folder / "state.previous.pt"):
        if not path.exists():
            continue
        try:
            with common.foreign(path):
                state = common.read(path, sums=True)
                saved = common.rebuild(type(config), state["meta"]["config"], path)
                about = {"step": int(state["step"]), "seen": int(state["seen"]),
                         "meta": {**state["meta"], **state["meta"]["recipe"]}}
                if saved == config:
                    common.load_strict(module, state["model"], path)
                    common.load_strict(ema, state["ema"], path)
                    optimizer.load_state_dict(state["optimizer"])
        except UserError as error:
            if rank == 0:
                print(f"{error}; trying the one before")
            damaged = True
            continue
        if saved != config:
            raise UserError(f"{folder} was begun with another configuration ({differences(saved, config)}); --fresh"
                            " begins anew, --out names another place")
        return about, damaged
    if damaged:
        raise UserError(f"no state in {folder} can be used; --out names another place, --fresh deletes it")
    return {}, False


def changes(old, new):
    """What differs between two descriptions of a run: length, batch size, learning rate, data, precision, ranks."""
    return ", ".join(f"{name} {old[name]} -> {value}" for name, value in new.items()
                     if name not in ("torch", "recipe", "config", "classes") and name in old
                     and json.dumps(old[name]) != json.dumps(value))


def differences(old, new):
    """The fields of two configurations that differ."""
    return ", ".join(f"{f.name}: {getattr(old, f.name)} -> {getattr(new, f.name)}" for f in dataclasses.fields(new)
                     if f.compare and getattr(old, f.name) != getattr(new, f.name))


def begin(args, stage, config, module, rank):
    """The weights a new run starts from: --init, else those of the stage before; says what was carried over."""
    path = None
    if stage.carry and args.init and (args.stage == stage.name or not stage.start):
        path = Path(args.init)
    elif stage.start:
        path = args.out / stage.start / "model.pt"
        if not path.exists():
            raise UserError(f"stage {stage.name} goes on from {path}, which is not there: train that, or give --init")
    if path is None:
        if not all(stage.trains(config, name) for name, _ in module.named_parameters()):
            raise UserError(f"size {args.size} trains only a part of the model: give the rest with --init FILE")
        return
    content = common.read(path)
    old = content["model"] if "stage" in content else MODELS[args.model].load_official(path).state_dict()
    own, changed, fresh = module.state_dict(), [], []
    for name, tensor in own.items():
        if name in old and old[name].shape == tensor.shape:
            own[name] = old[name]
        elif name in old and (adapted := stage.carry(name, old[name], tensor.shape)) is not None:
            own[name] = adapted
            changed.append(f"{name} {tuple(old[name].shape)} -> {tuple(tensor.shape)}")
        else:
            fresh.append(name)
    unused = [name for name in old if name not in own]
    if len(fresh) > len(own) / 2:
        raise UserError(f"--init {path}: fits {len(own) - len(fresh)} of {len(own)} tensors: another model or size?")
    module.load_state_dict(own)
    if rank == 0:
        print(f"stage {stage.name} starts from {path}: {len(own) - len(fresh)} of {len(own)} tensors carried over;"
              f" changed: {', '.join(changed) or 'none'}; begun afresh: {', '.join(fresh) or 'none'}; not used:"
              f" {', '.join(unused) or 'none'}")


def frozen(args, stage, device):
    """The earlier stage whose codes this one eats, and where sample.py will find it (relative to this run)."""
    if not stage.first:
        return None, None
    given = getattr(args, stage.first)
    path = Path(given).resolve() if given else args.out / stage.first / "model.pt"
    if not path.exists():
        raise UserError(f"stage {stage.name} needs {path}, which is not there: train stage {stage.first}, or give"
                        f" --{stage.first} FILE")
    source = next(s for s in MODELS[args.model].STAGES if s.name == stage.first)
    return source.load(path).to(device), str(path) if given else f"../{stage.first}/model.pt"


def probes(data, size):
    """Images: for the grids a row of each of up to ten classes, and many to calibrate on; labels and names of rows."""
    def load(indices):
        return common.to_float(torch.stack([common.from_pil(common.centre_crop(data.read(int(i)), size))
                                            for i in indices]))

    shown = np.unique(np.linspace(0, len(data.classes) - 1, 10).round().astype(int))
    rows = [np.resize(np.flatnonzero(data.labels == c)[:COLUMNS], COLUMNS) for c in shown]
    many = np.linspace(0, len(data.labels) - 1, min(256, len(data.labels))).round().astype(int)
    return ({"grid": load(np.concatenate(rows)), "many": load(many)}, torch.from_numpy(np.repeat(shown, COLUMNS)),
            [data.classes[c] for c in shown])


def reseed(*numbers):
    """Makes what is drawn next a function of these numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def anywhere(world, device, *flags):
    """Each flag, raised if it is raised on any rank."""
    if world == 1:
        return flags
    flags = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def mean_over_ranks(value, world):
    """A scalar tensor's mean over all ranks."""
    value = value.clone()
    if world > 1:
        dist.all_reduce(value)
    return float(value) / world


def memory(device):
    """Peak memory of this process in GB: of the device on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop ends after the step; a second SIGINT ends at once."""

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore(self):
        """What the signals did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        """The signal handler."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Log:
    """log.jsonl, a line per call; a run that goes on drops the lines of steps it repeats."""

    def __init__(self, folder, step, tensorboard):
        self.path = folder / "log.jsonl"
        kept = []
        for line in self.path.read_text(errors="replace").splitlines() if step and self.path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # half a line, of a full disk
                kept += [line] if json.loads(line)["step"] <= step else []
        with common.atomic(self.path) as f:
            f.write("".join(line + "\n" for line in kept).encode())
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: pip install tensorboard") from None
            self.board = SummaryWriter(folder)

    def __call__(self, **values):
        values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have moved the folder away
        with open(self.path, "a") as f:
            f.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if self.board and not isinstance(value, str):
                self.board.add_scalar(name, value, values["step"])


if __name__ == "__main__":
    common.command(main)
