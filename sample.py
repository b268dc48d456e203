"""Pictures from a run or a released checkpoint: grids, animations, folders, sets for evaluation.

    python sample.py --model transdiff                          # samples.png, from runs/transdiff
    python sample.py --model transdiff --classes star,heart --n 16 --cfg 3 --out stars.png
    python sample.py --model transdiff --out denoising.gif
    python sample.py --model transdiff --fuse star,heart --out fused.png
    python sample.py --model transdiff --ckpt TransDiff-L.pth --vae kl16.ckpt --classes 207,360
    python sample.py --model dar --stream --classes star,heart --out growing.png    # previews
    python sample.py --model dar --prefix-image photo.jpg --prefix-tokens 0,8,16
    python sample.py --model dar --reconstruct photo.jpg drawing.png
    python sample.py --model madformer --prompt star heart --nfe 84 --out stars.png
    python sample.py --model madformer --sampler dpm --steps 9 --out growing.gif
    torchrun --nproc_per_node 8 -- sample.py --model transdiff --n 50000 --out samples.npz
    python sample.py --model transdiff --cfg-sweep 1,1.5,2,3 --n 1000 --out sweep

Image k of a seed is the same image whatever the batch size or the number of GPUs. An interrupted
.npz or folder goes on where it was. What was sampled, and how, is written to a meta.json beside it.
"""
import argparse
import contextlib
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
import dar
import fid
import madformer
import transdiff
from common import UserError

MODELS = {"transdiff": transdiff, "dar": dar, "madformer": madformer}
FRAMES = 24  # of an animation, the result not counted
SAMPLER = {"transdiff": ("cfg", "interval", "steps", "solver", "drift_scale", "noise_scale", "rounds", "features"),
           "dar": ("cfg", "interval", "steps", "solver", "preview", "temperature", "top_k", "top_p", "tokens"),
           "madformer": ("cfg", "interval", "steps", "nfe", "sampler")}
OTHERS = {"transdiff": ("vae", "fuse"), "dar": ("tokenizer", "stream", "prefix_image", "prefix_tokens", "reconstruct"),
          "madformer": ("vae", "prompt")}
SOLVERS = {"transdiff": ("maruyama", "euler"), "dar": ("adams", "euler")}


def arguments():
    """The command line. What is not given stays None: the model knows its own defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, required=True)
    add("--run", metavar="DIR", help="runs/<model>, or one stage in it (default: runs/<model>, its last stage)")
    add("--ckpt", metavar="FILE", help="a released checkpoint instead of a run")
    add("--vae", metavar="FILE", help="transdiff, madformer: the KL-VAE (default: the run's own)")
    add("--tokenizer", metavar="FILE", help="dar: the tokenizer (default: the run's own)")
    add("--raw", action="store_true", help="the weights themselves, not their moving average (EMA)")
    add("--classes", help="ids or names, separated by commas (default: all; of more than ten, ten for a picture)")
    add("--n", type=int, help="images, balanced over the classes and in their order (default: 8 for each)")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=64)
    add("--out", default="samples.png", help="x.png: a grid; x.gif: the denoising; x.npz: uint8 images (arr_0, NHWC)"
                                             " and labels (arr_1); folder/: PNGs")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="the inner step (default: on CUDA, but not for tiny)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--cfg", type=guidance, help="guidance scale: 1 is off (and costs half), 0 unconditional; 1.1:10 runs linearly"
                                     " over the steps or tokens; 1,1.2,1.3,1.4: one for each MRAR round")
    add("--cfg-sweep", type=scales, metavar="A,B,...", help="samples with each of these guidance scales, in the"
                                                            " folder --out; one grid, and one table by fid.py")
    add("--fid-reference", metavar="SET", help="--cfg-sweep: as REFERENCE of fid.py (default: the run's named data)")
    add("--fid-features", choices=("inception", "classifier"), help="--cfg-sweep: default classifier for tiny, else"
                                                                    " inception")
    add("--interval", type=numbers, metavar="A,B", help="guide only while t (dar: the share of tokens, madformer:"
                                                        " t / 1000) is in A .. B")
    add("--steps", type=int, help="denoising steps (madformer: of each block)")
    add("--nfe", type=int, help="madformer: as many steps as fit this number of layer evaluations per block")
    add("--sampler", choices=("ddim", "dpm"), help="madformer: DDIM or DPM-Solver++ (2M)")
    add("--prompt", nargs="+", metavar="TEXT", help="madformer: instead of --classes; a row for each (the labels in an"
                                                       " .npz count the prompts)")
    add("--solver", help="transdiff: maruyama (stochastic, Eq. 18) or euler; dar: adams or euler")
    add("--drift-scale", type=float, help="transdiff: s1 of Eq. 18")
    add("--noise-scale", type=float, help="transdiff: s2 of Eq. 18")
    add("--rounds", type=int, help="transdiff, MRAR: stop after this many images")
    add("--fuse", metavar="A,B", help="transdiff: half of the features from class A, half from class B")
    add("--features", type=int, metavar="K", help="transdiff: use only K of the semantic features")
    add("--temperature", type=float, help="dar: of the tokens; 0 takes the most likely one")
    add("--top-k", type=int, help="dar: draw from the k most likely tokens (0: from all)")
    add("--top-p", type=float, help="dar: draw from the most likely tokens that together have this probability")
    add("--tokens", type=int, help="dar: stop after so many tokens; the picture is the preview (Table 5)")
    add("--preview", choices=("solver", "v"), help="dar: previews by the solver's step or along v (Sec. 5.1)")
    add("--stream", action="store_true", help="dar: x.png (a row per image, a column per step) or x.gif grows while the"
                                              " tokens are generated")
    add("--prefix-image", metavar="FILE", help="dar: the first tokens come from this picture (Fig. 6)")
    add("--prefix-tokens", type=counts, metavar="K[,K...]", help="dar: how many; of several, a row for each")
    add("--reconstruct", nargs="+", metavar="FILE", help="dar: picture files, a folder, or a data set's name (its test"
                                                         " images): original, previews, reconstruction")
    add("--data-root", default="data", help="where --reconstruct and --cfg-sweep find named data sets")
    args = parser.parse_args()
    for name in ("n", "batch_size", "steps", "nfe", "rounds", "features", "tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is 1 or more, not {value}")
    for name in ("drift_scale", "noise_scale", "temperature"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is a number from 0 on, not {value}")
    if args.top_k is not None and args.top_k < 0 or args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top-k is 0 or more, --top-p is more than 0 and at most 1")
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for name in {x for options in (SAMPLER, OTHERS) for own in options.values() for x in own} & given:
        if name not in (*SAMPLER[args.model], *OTHERS[args.model]):
            parser.error(f"--{name.replace('_', '-')} is not an option of {args.model}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed is 0 or more, of 64 bits, not {args.seed}")
    if args.nfe and args.steps:
        parser.error("--nfe says how many steps: not both")
    if args.prompt and args.classes:
        parser.error("--prompt takes the place of --classes")
    if args.solver and args.solver not in SOLVERS[args.model]:
        parser.error(f"--solver is {' or '.join(SOLVERS[args.model])}, not {args.solver}")
    if isinstance(args.cfg, list) and args.model != "transdiff":
        parser.error("--cfg with commas is for TransDiff's rounds: give one scale, or first:last")
    if args.cfg_sweep and (args.cfg is not None or Path(args.out).suffix.lower() in (".png", ".gif", ".npz")):
        parser.error("--cfg-sweep goes without --cfg, and its --out is a folder")
    if not args.cfg_sweep and (args.fid_reference or args.fid_features):
        parser.error("--fid-reference and --fid-features belong to --cfg-sweep")
    if args.ckpt and (args.run or args.raw):
        parser.error("--ckpt does not go with --run or --raw")
    for name in {"raw", "classes", "precision", "cfg", "cfg_sweep", "interval", "temperature", "top_k", "top_p",
                 "tokens", "stream", "prefix_image", "prefix_tokens"} & given:
        if args.reconstruct:
            parser.error(f"--reconstruct does not go with --{name.replace('_', '-')}: no tokens are generated")
    if bool(args.prefix_image) != (args.prefix_tokens is not None):
        parser.error("--prefix-image and --prefix-tokens go together")
    if args.stream and (args.prefix_image or args.tokens or Path(args.out).suffix.lower() not in (".png", ".gif")):
        parser.error("--stream writes a .png or .gif, of all tokens and without a prefix")
    return args


def numbers(text):
    """'0.2,0.8' as a pair of floats in 0 .. 1."""
    low, high = (float(part) for part in text.split(","))
    if not 0 <= low <= high <= 1:
        raise ValueError
    return low, high


def counts(text):
    """'0,8,16' as a list."""
    return [int(part) for part in text.split(",")]


def guidance(text):
    """A number, a linear pair a:b, or a list with one entry for each round."""
    def one(part):
        values = tuple(float(x) for x in part.split(":"))
        if len(values) > 2 or not all(map(math.isfinite, values)):
            raise ValueError
        return values if len(values) == 2 else values[0]
    return [one(part) for part in text.split(",")] if "," in text else one(text)


def scales(text):
    """Guidance scales to compare, as they are written."""
    return {part: guidance(part) for part in text.split(",")}


def run_file(args, stages):
    """The weights of the last of these stages that the run has."""
    folder = Path(args.run or f"runs/{args.model}")
    for path in (folder, *(folder / stage.name for stage in reversed(stages))):
        if (path / "model.pt").exists():
            return path / "model.pt"
    raise UserError(f"no trained stage in {folder}: python train.py --model {args.model} makes one")


def load(args, device):
    """The model, its first stage, and what is known about them."""
    module = MODELS[args.model]
    source = next(stage for stage in module.STAGES if stage.load)
    given = getattr(args, source.name)
    if args.ckpt:
        model = module.load_official(args.ckpt)
        about, first = {"checkpoint": args.ckpt, "stage": "released", "classes": None}, given
        if not first:
            raise UserError(f"--ckpt needs the published first stage: give --{source.name} FILE")
    else:
        stages = [stage for stage in module.STAGES if stage.first]
        path = run_file(args, stages)
        content = common.read(path)
        if str(content.get("family")) != args.model:
            raise UserError(f"{path} is not a run of {args.model}")
        with common.foreign(path, f"not a run of {args.model}"):
            stage = next((s for s in stages if s.name == content["stage"]), None)
            if not stage:
                raise UserError(f"{path} holds stage {content['stage']}, which makes no pictures of its own")
            model = stage.build(common.rebuild(module.Config, content["config"], path))
            weights = common.read(path.with_name("state.pt"))["model"] if args.raw else content["model"]
            common.load_strict(model, weights, path)
            first = given or path.parent / content["first"]
            about = {"checkpoint": str(path), "classes": content["classes"], "weights": "raw" if args.raw else "EMA",
                     **{k: content[k] for k in ("stage", "size", "step", "data")}}
    if not hasattr(model, "sample"):
        raise UserError(f"{args.ckpt} holds a {source.name}, which makes no pictures of its own")
    # Channels last makes convolutions quicker. Not on the CPU, where it changes the rounding by too much.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=layout).eval().requires_grad_(False)
    first = source.load(first).to(device, memory_format=layout)
    module.check(model, first)
    return model, first, {"model": args.model, **about, "weights_hash": common.fingerprint(model)}


def prefix(args, tokenizer, device):
    """--prefix-image: its pixels (h, w, 3) as uint8, and its codes (N,)."""
    most = tokenizer.config.queries
    if wrong := [k for k in args.prefix_tokens if not 0 <= k <= most]:
        raise UserError(f"--prefix-tokens {wrong[0]}: the tokenizer has {most} tokens")
    image = common.from_pil(picture_file(args.prefix_image, tokenizer.config.image_size))
    return image.permute(1, 2, 0).numpy(), tokenizer.encode(common.to_float(image[None]).to(device))[0].long()


def class_ids(text, names, count):
    """Class ids of 'star,heart' or '5,6'. Raises UserError for what is neither."""
    ids = []
    for part in (p.strip() for p in text.split(",")):
        if names and part.lower() in (known := [n.lower() for n in names]):
            ids.append(known.index(part.lower()))
        elif part.isdecimal() and len(part) < 10 and int(part) < count:
            ids.append(int(part))
        else:
            raise UserError(f"no class {part}: give ids 0 to {count - 1}"
                            + (f" or names: {', '.join(names[:20])}{', ...' * (len(names) > 20)}" if names else ""))
    return ids


def main():
    """Pictures, reconstructions, or a sweep."""
    args = arguments()
    rank, world, device = common.distributed(args.device)
    if args.reconstruct:
        if world > 1:
            raise UserError("--reconstruct is a job for one process")
        reconstruct(args, device)
    else:
        (sweep if args.cfg_sweep else draw)(args, rank, world, device)
    if world > 1:
        dist.destroy_process_group()


def draw(args, rank, world, device):
    """Samples this rank's share into a table on disk; rank 0 makes the file or folder of it."""
    module = MODELS[args.model]
    model, first, about = load(args, device)
    config, names = model.config, about.pop("classes")
    kind = Path(args.out).suffix.lower() or "folder"
    if kind not in (".png", ".gif", ".npz", "folder"):
        raise UserError(f"--out {args.out}: a file .png, .gif or .npz, or a folder")
    if args.stream and world > 1:
        raise UserError("--stream is a job for one process")
    table = Path(f"{args.out.rstrip('/')}.partial")  # a job that was interrupted may have begun to fill its folder
    if kind == "folder" and Path(args.out).is_dir() and any(Path(args.out).iterdir()) and not table.exists():
        raise UserError(f"--out {args.out}: the folder is not empty")

    # Whose pictures: labels in the order of the classes, as many of each; all of them again for each prefix length.
    options = {name: value for name in SAMPLER[args.model] if (value := getattr(args, name)) is not None}
    if args.fuse:
        classes = class_ids(args.fuse, names, config.classes)
        if len(classes) != 2 or args.classes:
            raise UserError("--fuse takes two classes, and no --classes beside it")
        classes, other = classes[:1], classes[1]
    elif args.prompt:
        classes, names = list(range(len(args.prompt))), [text[:24] for text in args.prompt]
        if not config.text:
            raise UserError("--prompt: this model has no text tower")
        known = {text.lower() for text in config.texts}
        if rank == 0 and (strange := [text for text in args.prompt if text.strip().lower() not in known]):
            print(f"note: not a text of the training data: {', '.join(strange)}")
    elif not getattr(config, "text", True):  # madformer without text: images of no class
        classes, names = [0], None
        if args.classes:
            raise UserError("--classes: this model has no text tower, so it knows no classes")
    elif args.classes:
        classes = class_ids(args.classes, names, config.classes)
    else:
        few = kind in (".png", ".gif") and config.classes > 10
        classes = np.linspace(0, config.classes - 1, 10 if few else config.classes).round().astype(int).tolist()
    prefixes = args.prefix_tokens or [0]
    each = args.n or (1 if args.stream or len(prefixes) > 1 else 8) * len(classes)
    labels = torch.tensor([classes[i * len(classes) // each] for i in range(each)] * len(prefixes))
    n = len(labels)
    if args.prefix_image:
        reference, codes = prefix(args, first, device)
    precision = args.precision or ("bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32")
    defaults = {name: getattr(config if hasattr(config, name) else first.config, name)
                for name in SAMPLER[args.model] if hasattr(config, name) or hasattr(first.config, name)}
    meta = {**about, **defaults, **options, "fuse": args.fuse, "seed": args.seed, "count": n,
            "labels": "balanced" if getattr(config, "text", True) else "none",
            "classes": classes, "precision": precision, "torch": str(torch.__version__),
            **({"prefix_image": args.prefix_image, "prefix_tokens": prefixes} if args.prefix_image else {})}
    meta["steps"] = meta["steps"] or first.config.groups  # dar: 0 is one for each group
    if args.nfe:
        meta["steps"] = config.steps_within(args.nfe)
    if args.prompt:
        meta |= {"prompt": args.prompt, "classes": None}
    meta = json.loads(json.dumps(meta))
    beside = Path(args.out, "meta.json") if kind == "folder" else Path(args.out).with_suffix(".meta.json")
    if args.cfg_sweep and beside.exists() and Path(args.out).exists():
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # no JSON, or no dict: sampled again
            if meta.items() <= json.loads(beside.read_text()).items():
                return  # of a sweep that was interrupted
    compiled = args.compile if args.compile is not None else device.type == "cuda" and about.get("size") != "tiny"
    if compiled:
        torch.compiler.reset()  # of an earlier set of a sweep
        module.compile_steps(model, first)
        if rank == 0:
            print("compiling: the first batch takes a minute or so longer")
    if precision == "bf16":
        for linear in (part for part in model.modules() if isinstance(part, torch.nn.Linear)):
            linear.bfloat16()  # once: autocast would do it again at each step

    # Sampling. The table holds the images (and, for an animation or a stream, the previews before them) of all ranks.
    if rank == 0 and kind in (".png", ".gif"):
        shutil.rmtree(table, ignore_errors=True)
    frames = meta["steps"] if args.stream else FRAMES * (kind == ".gif") + 1
    rows = common.Rows(table, (n, frames, config.image_size, config.image_size, 3), np.uint8, meta)
    todo = rows.todo(rank, world)
    facts, begun = {}, time.perf_counter()  # facts: means over this rank's images
    bar = common.progress(len(todo), "sampling", "img", rank)
    for at in range(0, len(todo), args.batch_size):
        index = todo[at:at + args.batch_size]
        noise, seen = common.Noise.of(args.seed, [i % each for i in index], device), []
        if args.fuse:
            options["fuse"] = torch.full((len(index),), other, device=device)
        if args.prefix_image:
            given = torch.tensor([prefixes[i // each] for i in index], device=device)[:, None]
            options["prefix"] = torch.where(torch.arange(len(codes), device=device) < given, codes, -1)
        if args.prompt:
            options["text"] = model.tokenizer.encode([args.prompt[int(labels[i])] for i in index]).to(device)

        def on_step(images, seen=seen, index=index):
            seen.append(common.to_uint8(images).cpu())
            if args.stream:
                rows.rows[index, len(seen) - 1] = seen[-1].permute(0, 2, 3, 1).numpy()
                shown = rows.rows if kind == ".png" or index[0] else rows.rows[:, :len(seen)]
                write(Path(args.out), kind, shown, labels, names, len(classes), strip=True)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            images, about_batch = module.generate(model, first, labels[index].to(device), noise, **options,
                                                  on_step=on_step if kind == ".gif" or args.stream else None)
        for name, value in about_batch.items():
            facts[name] = facts.get(name, 0) + value * len(index) / len(todo)
        if not torch.isfinite(images).all():
            raise UserError("the samples are not finite: try --precision fp32, more --steps or a smaller --cfg")
        if not args.stream:
            chosen = np.linspace(0, len(seen) - 1, frames - 1).round().astype(int) if seen else []
            seen = [*(seen[i] for i in chosen), common.to_uint8(images).cpu()]
        film = torch.stack(seen, 1)                                                        # (b, frames, 3, h, w)
        rows.write(index, film.permute(0, 1, 3, 4, 2).numpy())
        bar.update(len(index))
    bar.close()
    took = time.perf_counter() - begun
    if world > 1:
        dist.barrier()
    if args.fuse and names:
        names = [f"{names[classes[0]]} + {names[other]}"] * len(names)
    if rank == 0:
        headings = None
        if args.prefix_image:
            meta["distance_to_reference"] = [round(float(np.sqrt(((block / 127.5 - reference / 127.5)**2).mean())), 4)
                                             for block in rows.rows[:, -1].astype(float).reshape(len(prefixes), each,
                                                                                                 *reference.shape)]
            print("root mean square distance to the reference (images in -1 .. 1): " + ", ".join(
                f"{d:.3f} with {k} tokens" for k, d in zip(prefixes, meta["distance_to_reference"], strict=True)))
            headings = [f"{k} tokens" for k in prefixes] if len(prefixes) > 1 else None
        write(Path(args.out), kind, rows.rows, labels, names, len(classes), args.stream, headings)
        facts = {name: int(value) if value == int(value) else value
                 for name, value in ((name, round(value, 4)) for name, value in facts.items())}
        with common.atomic(beside) as f:
            f.write(json.dumps({**meta, **facts}, indent=1).encode())
        shutil.rmtree(table)
        speed = f", {len(todo) * world / took:.2f} images/s" if todo else ""
        print(f"wrote {args.out} and {beside}: {n} images{speed}"
              + "".join(f"; {k.replace('_', ' ')} {v}" for k, v in facts.items()))


def sweep(args, rank, world, device):
    """--cfg-sweep: sets that differ in their guidance alone, a grid with a row for each, a table of their numbers."""
    model, first, about = load(args, device)
    size = model.config.image_size
    del model, first  # draw loads them for each set
    reference, folder, numbers = args.fid_reference or about.get("data"), Path(args.out), {}
    if not args.fid_reference and not fid.named(reference):
        raise UserError("--cfg-sweep: say with --fid-reference what the samples are compared to")
    judge = fid.Judge(reference, args.fid_features or ("classifier" if about.get("size") == "tiny" else "inception"),
                      size=size, data_root=args.data_root, device=device)
    files = {text: folder / f"cfg-{text.replace(':', '-')}.npz" for text in args.cfg_sweep}
    for text, file in files.items():
        draw(argparse.Namespace(**{**vars(args), "cfg": args.cfg_sweep[text], "out": str(file)}), rank, world, device)
        if world > 1:
            dist.barrier()  # rank 0 has written the file
        numbers[text] = judge.results(fid.Source(file))
    if rank > 0:
        return
    rows = []
    for file in files.values():
        images = fid.stored_array(file, "arr_0")
        rows.append(torch.from_numpy(images[np.linspace(0, len(images) - 1, min(20, len(images))).astype(int)]))
    sheet = common.grid(torch.cat(rows).permute(0, 3, 1, 2), len(rows[0]), [f"cfg {text}" for text in files])
    common.save_picture(folder / "sweep.png", sheet)
    columns = [name for name, value in numbers[text].items() if isinstance(value, float)]
    table = [["cfg", *(fid.NAMES.get(name, name) for name in columns)], ["---"] * (1 + len(columns)),
             *([text, *(f"{found[name]:.4g}" for name in columns)] for text, found in numbers.items())]
    table = "".join(f"| {' | '.join(row)} |\n" for row in table)
    with common.atomic(folder / "sweep.md") as f:
        f.write(table.encode())
    with common.atomic(folder / "sweep.json") as f:
        f.write(json.dumps({"reference": reference, "features": judge.name, **numbers}, indent=1).encode())
    print(f"{table}{numbers[text]['n']:,} images each; reference {reference}, {numbers[text]['reference_n']:,} images;"
          f" {judge.name}\nwrote {folder}/sweep.png, sweep.md, sweep.json and {len(files)} sets")


def picture_file(path, size):
    """The centre of a picture file, RGB."""
    try:
        with common.open_picture(path, size) as image:
            return common.centre_crop(common.rgb(image), size)
    except common.UNREADABLE as error:
        raise UserError(f"cannot read {path} as a picture: {error}") from None


def reconstruct(args, device):
    """--reconstruct: originals, previews from more and more tokens, and reconstructions in one picture."""
    source = next(stage for stage in MODELS[args.model].STAGES if stage.load)
    path = getattr(args, source.name) or args.ckpt or run_file(args, [source])
    tokenizer = source.load(path).to(device)
    c = tokenizer.config
    if len(args.reconstruct) == 1 and not Path(args.reconstruct[0]).is_file():
        data = common.load_data(args.reconstruct[0], args.data_root, c.image_size, "test")
        n = min(args.n or 16, len(data.labels))
        originals = [common.centre_crop(data.read(i), c.image_size) for i in range(n)]
        names = [data.classes[label] for label in data.labels[:n]]
    else:
        originals = [picture_file(file, c.image_size) for file in args.reconstruct]
        names = [Path(file).stem[:16] for file in args.reconstruct]
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: --reconstruct writes a .png")
    images = torch.stack([common.from_pil(image) for image in originals])
    strips, codes, errors = [], [], []
    bar = common.progress(len(images), "reconstructing", "img")
    for index in torch.arange(len(images)).split(args.batch_size):
        noise = common.Noise.of(args.seed, index.tolist(), device).normal((3, c.image_size, c.image_size))
        seen = [images[index]]
        codes.append(tokenizer.encode(common.to_float(images[index]).to(device)).cpu())
        tokenizer.decode(codes[-1].to(device), noise, steps=args.steps, solver=args.solver, preview=args.preview,
                         on_step=lambda k, x, seen=seen: seen.append(common.to_uint8(x).cpu()))
        strip = common.to_float(torch.stack(seen, 1))                                      # (b, 1 + steps, 3, h, w)
        errors.append((strip[:, :1] - strip[:, 1:]).square().mean((2, 3, 4)))
        strips += torch.stack(seen, 1) if index[0] < 16 else []
        bar.update(len(index))
    bar.close()
    psnr = (10 * torch.log10(4 / torch.cat(errors).clamp(min=1e-9))).mean(0).tolist()
    usage = len(torch.cat(codes).unique()) / c.codebook
    strips = torch.stack(strips[:16])
    common.save_picture(args.out, common.grid(strips.flatten(0, 1), strips.shape[1], names))
    beside = Path(args.out).with_suffix(".meta.json")
    with common.atomic(beside) as f:
        f.write(json.dumps({"tokenizer": str(path), "weights_hash": common.fingerprint(tokenizer), "count": len(images),
                            "pictures": args.reconstruct, "seed": args.seed, "psnr_after_each_step": psnr,
                            "usage": usage, "torch": str(torch.__version__)}, indent=1).encode())
    print(f"wrote {args.out} and {beside}: original and image after each step for {len(strips)} pictures; of"
          f" {len(images)}: {psnr[-1]:.2f} dB PSNR (after each step {', '.join(f'{p:.1f}' for p in psnr)}),"
          f" {100 * usage:.1f} % of {c.codebook} codes used")


def write(out, kind, rows, labels, names, classes, strip=False, headings=None):
    """The file or folder of the table's rows (n, frames, h, w, 3)."""
    n, frames = rows.shape[:2]
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
        if headings:
            columns, shown = n // len(headings), headings
        if strip and kind == ".png":  # a row per image, a column per frame
            columns, shown = frames, [names[i] if names else str(i) for i in labels.tolist()]
            rows, frames = np.array(rows).reshape(-1, 1, *rows.shape[2:]), 1
        sheets = [common.grid(torch.from_numpy(np.array(rows[:, f])).permute(0, 3, 1, 2), columns, shown)
                  for f in range(frames)]
        common.save_gif(out, sheets) if kind == ".gif" else common.save_picture(out, sheets[0])


if __name__ == "__main__":
    common.command(main)
