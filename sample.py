"""Pictures from a run or from a released checkpoint: grids, animations, folders, and sets for evaluation.

    python sample.py --model transdiff                                       # samples.png, from runs/transdiff
    python sample.py --model transdiff --classes star,heart --n 16 --cfg 3 --out stars.png
    python sample.py --model transdiff --out denoising.gif
    python sample.py --model transdiff --fuse star,heart --out fused.png
    python sample.py --model transdiff --ckpt TransDiff-L.pth --vae kl16.ckpt --classes 207,360
    torchrun --nproc_per_node 8 -- sample.py --model transdiff --n 50000 --out samples.npz

Image k of a seed is the same image whatever the batch size or the number of GPUs. An interrupted .npz or folder goes
on where it was. What was sampled, and how, is written to a meta.json beside it.
"""
import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
import transdiff
from common import UserError

MODELS = {"transdiff": transdiff}
FRAMES = 24  # of an animation, the result not counted


def arguments():
    """The command line. What is not given stays None: the model knows its own defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, required=True)
    add("--run", metavar="DIR", help="runs/<model>, or one stage in it (default: runs/<model>, its last stage)")
    add("--ckpt", metavar="FILE", help="a released checkpoint instead of a run")
    add("--vae", metavar="FILE", help="the KL-VAE (default: the one the run was trained with)")
    add("--raw", action="store_true", help="the weights themselves, not their moving average (EMA)")
    add("--classes", help="ids or names, separated by commas (default: all; of more than ten, ten for a picture)")
    add("--n", type=int, help="images, balanced over the classes and in their order (default: 8 for each)")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=64)
    add("--out", default="samples.png", help="x.png: a grid; x.gif: the denoising; x.npz: uint8 images (arr_0, NHWC)"
                                             " and labels (arr_1); folder/: PNGs")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, else fp32")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--cfg", type=guidance, help="guidance scale: 1 is off (and costs half), 0 unconditional; 1.1:10 runs linearly"
                                     " over the steps; 1,1.2,1.3,1.4: one for each MRAR round")
    add("--interval", type=numbers, metavar="A,B", help="guide only while t is in A .. B")
    add("--steps", type=int, help="denoising steps")
    add("--solver", help="transdiff: maruyama (stochastic, Eq. 18) or euler")
    add("--drift-scale", type=float, help="transdiff: s1 of Eq. 18")
    add("--noise-scale", type=float, help="transdiff: s2 of Eq. 18")
    add("--rounds", type=int, help="transdiff, MRAR: stop after this many images")
    add("--fuse", metavar="A,B", help="transdiff: half of the features from class A, half from class B")
    add("--features", type=int, metavar="K", help="transdiff: use only K of the semantic features")
    args = parser.parse_args()
    for name in ("n", "batch_size", "steps", "rounds", "features"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is 1 or more, not {value}")
    if args.seed < 0:
        parser.error(f"--seed is 0 or more, not {args.seed}")
    if args.solver not in (None, "maruyama", "euler"):
        parser.error(f"--solver is maruyama or euler, not {args.solver}")
    if args.ckpt and (args.run or args.raw):
        parser.error("--ckpt does not go with --run or --raw")
    return args


def numbers(text):
    """'0.2,0.8' as a pair of floats."""
    low, high = (float(part) for part in text.split(","))
    return low, high


def guidance(text):
    """A number, a linear pair a:b, or a list with one entry for each round."""
    def one(part):
        return tuple(float(x) for x in part.split(":")) if part.count(":") == 1 else float(part)
    return [one(part) for part in text.split(",")] if "," in text else one(text)


def load(args, device):
    """The model, its first stage, and what is known about them."""
    module = MODELS[args.model]
    if args.ckpt:
        model = module.load_official(args.ckpt)
        about, first = {"checkpoint": args.ckpt, "stage": "released", "classes": None}, args.vae
        if not first:
            raise UserError("--ckpt needs the published first stage: give --vae FILE")
    else:
        folder = Path(args.run or f"runs/{args.model}")
        stages = [stage for stage in module.STAGES if stage.first]
        found = [s / "model.pt" for s in (folder, *(folder / stage.name for stage in reversed(stages)))
                 if (s / "model.pt").exists()]
        if not found:
            raise UserError(f"no trained stage in {folder}: python train.py --model {args.model} makes one")
        content = common.read(found[0])
        if content.get("family") != args.model:
            raise UserError(f"{found[0]} is not a run of {args.model}")
        stage = next((s for s in stages if s.name == content["stage"]), None)
        if not stage:
            raise UserError(f"{found[0]} holds stage {content['stage']}, which makes no pictures of its own")
        model = stage.build(common.rebuild(module.Config, content["config"]))
        weights = common.read(found[0].with_name("state.pt"))["model"] if args.raw else content["model"]
        common.load_strict(model, weights, found[0])
        first = args.vae or found[0].parent / content["first"]
        about = {"checkpoint": str(found[0]), "classes": content["classes"], "weights": "raw" if args.raw else "EMA",
                 **{k: content[k] for k in ("stage", "size", "step", "data")}}
    model = model.to(device).eval().requires_grad_(False)
    path, first = first, next(s for s in module.STAGES if s.load).load(first).to(device)
    has, needs = ((c.channels, c.factor) for c in (first.config, model.config.vae))
    if has != needs:
        raise UserError(f"{path} has {has[0]} channels at f{has[1]}, the model needs {needs[0]} at f{needs[1]}")
    return model, first, {"model": args.model, **about, "weights_hash": common.fingerprint(model)}


def class_ids(text, names, count):
    """Class ids of 'star,heart' or '5,6'. Raises UserError for what is neither."""
    ids = []
    for part in (p.strip() for p in text.split(",")):
        if names and part.lower() in (known := [n.lower() for n in names]):
            ids.append(known.index(part.lower()))
        elif part.isdigit() and int(part) < count:
            ids.append(int(part))
        else:
            raise UserError(f"no class {part}: give ids 0 to {count - 1}"
                            + (f" or names: {', '.join(names[:20])}{', ...' * (len(names) > 20)}" if names else ""))
    return ids


def main():
    """Samples this rank's share into a table on disk; rank 0 makes the file or folder of it."""
    args = arguments()
    rank, world, device = common.distributed(args.device)
    module = MODELS[args.model]
    model, first, about = load(args, device)
    config, names = model.config, about.pop("classes")
    kind = Path(args.out).suffix.lower() or "folder"
    if kind not in (".png", ".gif", ".npz", "folder"):
        raise UserError(f"--out {args.out}: a file .png, .gif or .npz, or a folder")
    table = Path(f"{args.out.rstrip('/')}.partial")  # a job that was interrupted may have begun to fill its folder
    if kind == "folder" and Path(args.out).is_dir() and any(Path(args.out).iterdir()) and not table.exists():
        raise UserError(f"--out {args.out}: the folder is not empty")

    # Whose pictures: labels in the order of the classes, as many of each.
    options = {name: value for name in ("cfg", "interval", "steps", "solver", "drift_scale", "noise_scale", "rounds",
                                        "features") if (value := getattr(args, name)) is not None}
    if args.fuse:
        classes = class_ids(args.fuse, names, config.classes)
        if len(classes) != 2 or args.classes:
            raise UserError("--fuse takes two classes, and no --classes beside it")
        classes, other = classes[:1], classes[1]
    elif args.classes:
        classes = class_ids(args.classes, names, config.classes)
    else:
        few = kind in (".png", ".gif") and config.classes > 10
        classes = np.linspace(0, config.classes - 1, 10 if few else config.classes).round().astype(int).tolist()
    n = args.n or 8 * len(classes)
    labels = torch.tensor([classes[i * len(classes) // n] for i in range(n)])
    precision = args.precision or ("bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32")
    defaults = {name: getattr(config, name) for name in ("cfg", "steps", "solver", "drift_scale", "noise_scale")
                if hasattr(config, name)}
    meta = {**about, **defaults, **options, "fuse": args.fuse, "seed": args.seed, "count": n, "labels": "balanced",
            "classes": classes, "precision": precision, "torch": str(torch.__version__)}
    meta = json.loads(json.dumps(meta))

    # Sampling. The table holds the images (and, for an animation, the frames before them) of all ranks.
    if rank == 0 and kind in (".png", ".gif"):
        shutil.rmtree(table, ignore_errors=True)
    frames = FRAMES * (kind == ".gif") + 1
    rows = common.Rows(table, (n, frames, config.image_size, config.image_size, 3), np.uint8, meta)
    todo = rows.todo(rank, world)
    facts, begun = {}, time.perf_counter()  # facts: means over this rank's images
    bar = common.progress(len(todo), "sampling", "img", rank)
    for at in range(0, len(todo), args.batch_size):
        index = todo[at:at + args.batch_size]
        noise, seen = common.Noise.of(args.seed, index, device), []
        if args.fuse:
            options["fuse"] = torch.full((len(index),), other, device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            images, about_batch = module.generate(
                model, first, labels[index].to(device), noise, **options,
                on_step=(lambda x: seen.append(common.to_uint8(x).cpu())) if kind == ".gif" else None)
        for name, value in about_batch.items():
            facts[name] = facts.get(name, 0) + value * len(index) / len(todo)
        if not torch.isfinite(images).all():
            raise UserError("the samples are not finite: try --precision fp32, more --steps or a smaller --cfg")
        chosen = np.linspace(0, len(seen) - 1, FRAMES).round().astype(int) if seen else []
        film = torch.stack([*(seen[i] for i in chosen), common.to_uint8(images).cpu()], 1)      # (b, frames, 3, h, w)
        rows.write(index, film.permute(0, 1, 3, 4, 2).numpy())
        bar.update(len(index))
    bar.close()
    took = time.perf_counter() - begun
    if world > 1:
        dist.barrier()
    if args.fuse and names:
        names = [f"{names[classes[0]]} + {names[other]}"] * len(names)
    if rank == 0:
        write(Path(args.out), kind, rows.rows, labels, names, len(classes))
        beside = Path(args.out, "meta.json") if kind == "folder" else Path(args.out).with_suffix(".meta.json")
        facts = {name: round(value, 4) for name, value in facts.items()}
        with common.atomic(beside) as f:
            f.write(json.dumps({**meta, **facts}, indent=1).encode())
        shutil.rmtree(table)
        speed = f", {len(todo) * world / took:.2f} images/s" if todo else ""
        print(f"wrote {args.out} and {beside}: {n} images{speed}"
              + "".join(f"; {k.replace('_', ' ')} {v}" for k, v in facts.items()))
    if world > 1:
        dist.destroy_process_group()


def write(out, kind, rows, labels, names, classes):
    """The file or folder of the table's rows (n, frames, h, w, 3)."""
    n = len(rows)
    if kind == ".npz":
        with common.atomic(out) as f:
            np.savez(f, arr_0=rows[:, -1], arr_1=labels.numpy())
    elif kind == "folder":
        for k, image in enumerate(rows[:, -1]):
            common.save_picture(out / f"{k:06d}_class{int(labels[k])}.png", common.Image.fromarray(image))
    else:
        by_class = n % classes == 0 and n // classes <= 32  # then every row is a class
        columns = n // classes if by_class else math.ceil(math.sqrt(n))
        shown = [names[i] if names else str(i) for i in labels[::columns].tolist()] if by_class else None
        sheets = [common.grid(torch.from_numpy(np.array(rows[:, f])).permute(0, 3, 1, 2), columns, shown)
                  for f in range(rows.shape[1])]
        common.save_gif(out, sheets) if kind == ".gif" else common.save_picture(out, sheets[0])


if __name__ == "__main__":
    common.command(main)
