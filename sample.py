"""Make pictures with a run or a released checkpoint: grids, animations, sets for evaluation.

    python sample.py --model transdiff                                   # samples.png
    python sample.py --model transdiff --classes star heart --n 16 --cfg 3 --out stars.png
    python sample.py --model transdiff --out denoising.gif
    python sample.py --model transdiff --ckpt TransDiff-L.pth --vae kl16.ckpt --classes 207 360
    python sample.py --model dar --stream --out previews.png             # grows while it is sampled
    python sample.py --model dar --reconstruct photo.jpg drawing.png     # the first stage alone
    python sample.py --model madformer --prompt star heart --nfe 84
    torchrun --nproc_per_node 8 -- sample.py --model transdiff --n 50000 --out samples.npz

--model NAME --help lists the options of that model's sampler. Image k of a seed is the same
whatever the batch size or the number of GPUs. An interrupted .npz or folder resumes. A meta.json
beside the output says what was sampled and how.
"""
import argparse
import hashlib
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
from common import UserError

FRAMES = 48  # at most, in an animation
STRIPS = 16  # images at most in a picture of steps


def arguments():
    """Return the command line, the model's file, and the options of its sampler that are given."""
    choose = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choose.add_argument("--model", metavar="NAME",
                        help="transdiff, dar, madformer, or a model file of your own")
    name = choose.parse_known_args()[0].model
    parser = argparse.ArgumentParser(description=__doc__, parents=[choose], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", metavar="DIR", help="runs/<model>, or one stage in it (default: its last stage)")
    add("--ckpt", metavar="FILE", help="a released checkpoint instead of a run")
    add("--vae", "--tokenizer", dest="first_stage", metavar="FILE", help="default: the run's own")
    add("--raw", action="store_true", help="the last weights instead of their average (EMA)")
    add("--classes", nargs="+", metavar="CLASS", help="ids or names (default: all)")
    add("--n", type=common.positive, help="images, balanced over the classes (default: 8 of each)")
    add("--seed", type=common.natural, default=0)
    add("--batch-size", type=common.positive, default=64)
    add("--out", default="samples.png", help="x.png, x.gif, x.npz (arr_0, labels arr_1), folder/")
    add("--stream", action="store_true", help="show every step in x.png or x.gif, while it is made")
    add("--reconstruct", nargs="+", metavar="FILE", help="encode and decode pictures or a data set")
    add("--data-root", default="data", help="where --reconstruct finds named data sets")
    add("--image-size", type=common.positive, default=32, help="pixels for a VAE that reconstructs")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA, not for tiny")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    if name is None:
        parser.parse_args()  # --help
        parser.error("give --model NAME")
    model_file = common.load_model(name)
    group = parser.add_argument_group(f"options of {name}")
    for name, how in model_file.OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", **how)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in model_file.OPTIONS}
    return args, model_file, {name: value for name, value in given.items() if value is not None}


def main():
    """Make the images, and write them with a meta.json beside them."""
    args, model_file, options = arguments()
    process = common.launch(args.device, args.precision)
    ending = Path(args.out).suffix.lower()
    is_picture = ending in (".png", ".gif") and not args.out.endswith("/")
    if ending in common.ENDINGS and not is_picture:
        raise UserError(f"--out {args.out}: pictures are written as .png or .gif")
    if process.world > 1 and is_picture:
        raise UserError("several ranks write an .npz or a folder, not a picture")
    if args.stream and not is_picture:
        raise UserError("--stream writes a .png or .gif")
    if args.reconstruct:
        job = Reconstruction(args, model_file, options, process.device)
    else:
        job = Generation(args, model_file, options, process)
    meta = {**job.about, "seed": args.seed, "count": len(job.labels),
            "precision": process.precision, "torch": str(torch.__version__)}
    facts = draw(args, job) if is_picture else store(args, process, job, meta)
    if process.rank == 0:
        beside = Path(args.out).with_suffix(".meta.json")
        if ending != ".npz" and not is_picture:
            beside = Path(args.out, "meta.json")
        with common.atomic(beside) as f:
            f.write(json.dumps({**meta, **facts}, indent=1).encode())
        found = "".join(f"; {name.replace('_', ' ')} {value}" for name, value in facts.items())
        print(f"wrote {args.out} and {beside}: {len(job.labels)} images{found}")
    if process.world > 1:
        dist.destroy_process_group()


# --- What is made ---------------------------------------------------------------------------------

class Generation:
    """Images of a model, balanced over the classes and in their order."""

    def __init__(self, args, model_file, options, process):
        self.model_file = model_file
        self.options = options
        self.process = process
        self.seed = args.seed
        model, first_stage, about = load(args, model_file, process.device)
        self.model = model
        self.first_stage = first_stage
        self.about = about
        config = model.config
        self.size = config.image_size
        class_names = list(config.class_names) or [str(k) for k in range(config.classes)]
        self.names = class_names
        if hasattr(model_file, "conditions"):
            self.names = model_file.conditions(config, **options)
        by_class = self.names == class_names
        classes = list(range(len(self.names)))
        if args.classes and not by_class:
            raise UserError("--classes: this model, or an option here, does not go by classes")
        if args.classes:
            classes = common.class_ids(args.classes, config)
        elif len(classes) > 10 and not args.n:  # a few of each of ten classes
            classes = np.linspace(0, len(classes) - 1, 10).round().astype(int).tolist()
        n = args.n or len(classes) * (1 if args.stream else 8)
        self.labels = [classes[k * len(classes) // n] for k in range(n)]
        defaults = dict(vars(config))
        if self.first_stage:
            defaults = {**vars(self.first_stage.config), **defaults}
        for name in model_file.OPTIONS:
            self.about[name] = options.get(name, defaults.get(name))
        self.about["labels"] = "balanced" if by_class else "none"
        self.batch_size = args.batch_size
        self.compiles = args.compile
        if args.compile is None:
            self.compiles = process.device.type == "cuda" and self.about["size"] != "tiny"
        if self.compiles:
            model_file.compile_steps(self.model, self.first_stage)
        if process.precision == "bf16":
            for part in self.model.modules():  # once: autocast would cast them again at each step
                if isinstance(part, torch.nn.Linear):
                    part.bfloat16()

    def make(self, indices, on_step=None):
        """Return images (b, 3, h, w) and lists of facts about each."""
        n = len(indices)
        if self.compiles:  # a compiled step has one shape, so the last batch is filled up
            indices = indices + indices[-1:] * (self.batch_size - n)
        labels = torch.tensor([self.labels[i] for i in indices], device=self.process.device)
        noise = common.Noise(self.seed, indices, self.process.device)
        with self.process.autocast():
            images, facts = self.model_file.generate(self.model, self.first_stage, labels, noise,
                                                     on_step=on_step, **self.options)
        if not torch.isfinite(images).all():
            raise UserError("the samples are not finite: try --precision fp32 or other options")
        return images[:n], {name: values[:n].tolist() for name, values in facts.items()}


class Reconstruction:
    """Picture files, or images of a data set, encoded and decoded by the first stage."""

    def __init__(self, args, model_file, options, device):
        stage = next(stage for stage in model_file.STAGES if stage.load)
        path = args.first_stage or args.ckpt or find_run(args, [stage])
        self.first_stage = stage.load(path).to(device)
        for name in options:
            if not hasattr(self.first_stage.config, name):
                raise UserError(f"--{name.replace('_', '-')} does not act on reconstructions")
        self.options = options
        self.seed = args.seed
        self.device = device
        self.size = getattr(self.first_stage.config, "image_size", args.image_size)
        self.files = args.reconstruct
        self.data = None
        self.labels = list(range(len(self.files)))
        self.names = [Path(file).stem[:16] for file in self.files]
        if len(self.files) == 1 and not Path(self.files[0]).is_file():
            self.data = common.load_data(self.files[0], args.data_root, self.size, "test")
            self.labels = self.data.labels[:args.n or STRIPS].tolist()
            self.names = self.data.classes
        self.about = {"checkpoint": str(path), "weights_hash": common.fingerprint(self.first_stage),
                      "reconstruct": self.files, "labels": "of the data", **options}

    def original(self, index):
        """Return an image to reconstruct, uint8 (3, h, w)."""
        if self.data is None:
            return common.load_picture(self.files[index], self.size)
        return common.from_pil(common.centre_crop(self.data.read(index), self.size))

    def make(self, indices, on_step=None):
        """Return reconstructions (b, 3, h, w) and the PSNR (b, steps) after each step, in dB."""
        images = common.to_float(torch.stack([self.original(i) for i in indices]).to(self.device))
        estimates = []
        noise = common.Noise(self.seed, indices, self.device)
        result = self.first_stage.reconstruct(images, noise, on_step=estimates.append,
                                              **self.options)
        estimates = estimates or [result]  # a first stage without steps
        for estimate in [images, *estimates] if on_step else ():
            on_step(estimate)
        rounded = common.to_float(common.to_uint8(torch.stack(estimates, 1)))
        errors = (rounded - images[:, None]).square().mean((2, 3, 4))
        psnr = 10 * torch.log10(4 / errors.clamp(min=1e-9))
        return result, {"psnr_after_each_step": psnr.tolist()}


def find_run(args, stages):
    """Return the weights of the last of these stages that the run has."""
    folder = Path(args.run or f"runs/{args.model}")
    for path in (folder, *(folder / stage.name for stage in reversed(stages))):
        if (path / "model.pt").exists():
            return path / "model.pt"
    raise UserError(f"no trained stage in {folder}: python train.py --model {args.model} makes one")


def load(args, model_file, device):
    """Return the model, its first stage, and what is known about them."""
    source = next((stage for stage in model_file.STAGES if stage.load), None)
    first_stage = args.first_stage
    if args.ckpt:
        if source and not first_stage:
            raise UserError(f"--ckpt needs the published first stage: give --{source.name} FILE")
        model = model_file.load_official(args.ckpt)
        about = {"checkpoint": args.ckpt, "size": "released"}
    else:
        stages = {stage.name: stage for stage in model_file.STAGES if not stage.load}
        path = find_run(args, list(stages.values()))
        content = common.read_checkpoint(path)
        if content.get("model_name") != args.model or content.get("stage") not in list(stages):
            raise UserError(f"{path} is not a model of {args.model} that makes pictures")
        with common.untrusted(path):
            config = common.rebuild(model_file.Config, content["config"])
            model = stages[content["stage"]].build(config)
            weights = content["model"]
            if args.raw:
                weights = common.read_checkpoint(path.with_name("state.pt"))["model"]
            common.load_strict(model, weights, path)
            if source and not first_stage:
                first_stage = path.parent / content["first_stage"]
            about = {name: content[name] for name in ("stage", "size", "step", "data")}
        about |= {"checkpoint": str(path), "weights": "raw" if args.raw else "EMA"}
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=layout).eval().requires_grad_(False)
    if source:
        first_stage = source.load(first_stage).to(device, memory_format=layout)
        model_file.check(model, first_stage)
    about |= {"model": args.model, "weights_hash": common.fingerprint(model)}
    return model, first_stage, about


# --- Where it goes --------------------------------------------------------------------------------

@torch.no_grad()
def draw(args, job):
    """Write a picture or an animation, and return the mean facts."""
    shows_steps = args.stream or args.reconstruct or args.out.lower().endswith(".gif")
    batch_size = len(job.labels) if args.stream else args.batch_size
    films, all_facts = [], []
    bar = common.progress(len(job.labels), "sampling", "img")
    for batch in torch.arange(len(job.labels)).split(batch_size):
        film = Film(args, job)
        images, facts = job.make(batch.tolist(), film.add if shows_steps else None)
        film.frames[-1:] = [common.to_uint8(images).cpu()]     # the last estimate is the result
        steps = [frame[:len(batch)] for frame in film.frames]  # without what filled up the batch
        films.append(torch.stack(steps, 1))                                 # (b, steps, 3, h, w)
        all_facts.append(facts)
        bar.update(len(batch))
    bar.close()
    write_picture(args, job, torch.cat(films))
    return means(all_facts)


class Film:
    """The steps of a batch so far, of which --stream makes a picture each time."""

    def __init__(self, args, job):
        self.args = args
        self.job = job
        self.frames = []  # uint8 (b, 3, h, w)

    def add(self, images):
        """Keep a step."""
        self.frames.append(common.to_uint8(images).cpu())
        if self.args.stream:
            film = torch.stack(self.frames, 1)[:len(self.job.labels)]  # a batch may be filled up
            write_picture(self.args, self.job, film)


def write_picture(args, job, film):
    """Write a film (n, steps, 3, h, w) as an animation, or as a picture of its last step with a row
    for each class. Streams and reconstructions are pictures of all steps, a row for each image."""
    steps = film.shape[1]
    names = [job.names[label] for label in job.labels]
    columns = job.labels.count(job.labels[0])
    rows = names[::columns]
    if columns > 32 or columns * len(set(names)) != len(names):
        columns, rows = math.ceil(math.sqrt(len(names))), None
    if args.out.lower().endswith(".gif"):
        shown = np.linspace(0, steps - 1, min(steps, FRAMES)).round().astype(int)
        common.save_gif(args.out, [common.grid(film[:, k], columns, rows) for k in shown])
    elif args.stream or args.reconstruct:
        film = film[:STRIPS]
        common.save_picture(args.out, common.grid(film.flatten(0, 1), steps, names[:STRIPS]))
    else:
        common.save_picture(args.out, common.grid(film[:, -1], columns, rows))


@torch.no_grad()
def store(args, process, job, meta):
    """Fill an .npz or a folder; return the mean facts. Ranks share the work, and what an
    interrupted job has made is kept in <out>.<hash of its settings>.partial."""
    out, n = Path(args.out), len(job.labels)
    about = json.dumps([meta, args.batch_size])
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    partial = out.with_name(f"{out.name}.{digest}.partial")
    is_npz = out.suffix.lower() == ".npz"
    if not is_npz and out.is_dir() and any(out.iterdir()) and not partial.exists():
        raise UserError(f"--out {out}: the folder is not empty")
    cache = common.Cache(partial, n, args.batch_size)
    todo = cache.missing(process.rank, process.world)
    bar = common.progress(n // process.world, "sampling", "img", process.rank)
    for batch in todo:
        images, facts = job.make(list(batch))
        with common.atomic(partial / f"{batch[0]:08d}.json") as f:
            f.write(json.dumps(facts).encode())
        cache.write(batch, common.to_uint8(images).cpu().permute(0, 2, 3, 1).numpy())
        bar.update(len(batch))
    bar.close()
    if process.world > 1:
        dist.barrier()
    if process.rank > 0:
        return {}
    if is_npz:
        with common.atomic(out) as f, zipfile.ZipFile(f, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                shape = (n, job.size, job.size, 3)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for k in range(n):
                    member.write(cache[k].tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.save(member, np.array(job.labels))
    else:
        for k, label in enumerate(job.labels):
            picture = common.Image.fromarray(cache[k])
            common.save_picture(out / f"{k:06d}_class{label}.png", picture)
    facts = [json.loads(file.read_text()) for file in sorted(partial.glob("*.json"))]
    shutil.rmtree(partial)
    return means(facts)


def means(facts):
    """Return the mean of each fact over all images, whatever batches and ranks made them."""
    result = {}
    for name in facts[0]:
        values = np.concatenate([batch[name] for batch in facts])
        result[name] = values.mean(0).round(4).tolist()
    return result


if __name__ == "__main__":
    common.run_script(main)
