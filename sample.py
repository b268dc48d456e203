"""Make pictures with a run or a released checkpoint: grids, animations, sets for evaluation.

    python sample.py --model transdiff                                   # samples.png
    python sample.py --model transdiff --classes star heart --n 16 --cfg 3 --out stars.png
    python sample.py --model transdiff --out denoising.gif
    python sample.py --model transdiff --ckpt TransDiff-L.pth --vae kl16.ckpt --classes 207 360
    python sample.py --model dar --stream --out previews.png             # grows while it is sampled
    python sample.py --model dar --reconstruct photo.jpg drawing.png     # the first stage alone
    python sample.py --model madformer --prompt star heart --nfe 84
    torchrun --nproc_per_node 8 -- sample.py --model transdiff --n 50000 --out samples.npz

--model NAME --help lists the options of that model's sampler. Without a run of your own, the
weights in weights/<model> beside this script are used. Image k of a seed is the same whatever the
batch size or the number of GPUs. An interrupted command resumes. A meta.json beside the output
says what was sampled and how.

of what
  --model NAME         transdiff, dar, madformer, or a model file of your own
  --run DIR            runs/<model> (default), or one stage in it (default: its last stage)
  --ckpt FILE          a released checkpoint instead of a run
  --vae, --tokenizer   the first stage (default: the run's own)
  --raw                the last weights instead of their average (EMA)
what
  --classes CLASS ...  ids or names (default: all)
  --n N                images, balanced over the classes (default: 8 of each, at most 80)
  --seed N             (default: 0)
  --out PATH           x.png (default: samples.png), x.gif, x.npz (arr_0, labels arr_1), or a folder
  --stream             show every step in x.png or x.gif, while it is made
  --reconstruct FILE   encode and decode pictures or a data set
  --image-size N       pixels for a VAE that reconstructs (default: 32)
how
  --batch-size N       images at a time (default: 64)
  --precision NAME     bf16 (default on CUDA) or fp32
  --compile            torch.compile (default on CUDA, but not for tiny), or --no-compile
  --device NAME        cpu, cuda, cuda:1, mps (default: the best there is)
"""
import argparse
import dataclasses
import json
import math
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
from common import UserError, natural, positive

STRIPS = 16  # images at most in a picture of steps
FRAMES = 48  # of a GIF, at most


def arguments():
    """Return the command line, the model's file, and the options of its sampler that are given."""
    first_look = argparse.ArgumentParser(add_help=False)
    first_look.add_argument("--model")
    name = first_look.parse_known_args()[0].model
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True)
    add("--run")
    add("--ckpt")
    add("--vae", "--tokenizer", dest="first_stage")
    add("--raw", action="store_true")
    add("--classes", nargs="+")
    add("--n", type=positive)
    add("--seed", type=natural, default=0)
    add("--batch-size", type=positive, default=64)
    add("--out", default="samples.png")
    add("--stream", action="store_true")
    add("--reconstruct", nargs="+")
    add("--image-size", type=positive, default=32)
    add("--precision", choices=("bf16", "fp32"))
    add("--compile", action=argparse.BooleanOptionalAction)
    add("--device")
    if name:
        model_file = common.load_model(name)
        group = parser.add_argument_group(f"options of {name}")
        for option, how in model_file.OPTIONS.items():
            group.add_argument(f"--{option.replace('_', '-')}", default=argparse.SUPPRESS, **how)
    args = parser.parse_args()  # ends here without a model
    options = {key: value for key, value in vars(args).items() if key in model_file.OPTIONS}
    args.ending = Path(args.out).suffix.lower()
    is_picture = args.ending in common.ENDINGS
    if args.stream and not is_picture:
        parser.error("--stream writes a picture")
    args.shows_steps = bool(args.stream or args.ending == ".gif" or args.reconstruct and is_picture)
    return args, model_file, options


def main():
    """Make the images, and write them with a meta.json beside them."""
    args, model_file, options = arguments()
    out = Path(args.out)
    if out.is_dir():
        raise UserError(f"--out {out} is an existing folder: name another one")
    process = common.launch(args.device, "fp32" if args.reconstruct else args.precision)
    prepare = reconstruction if args.reconstruct else generation
    job = prepare(args, process, model_file, options)
    n = len(job.labels)
    about = {**job.about, **vars(args), "count": n, "precision": process.precision,
             "torch": torch.__version__}
    digest = common.short_hash(json.dumps(about).encode())
    unfinished = out.with_name(f"{out.name}.{digest}.partial")
    films = make_all(job, unfinished)
    if process.rank == 0:
        write(job, films, unfinished)
        facts = [common.read_checkpoint(file) for file in sorted(unfinished.glob("[0-9]*.pt"))]
        for name in facts[0]:  # their means over all images, whatever batches and ranks made them
            values = torch.cat([batch[name] for batch in facts])[:n]
            about[name] = values.double().mean(0).tolist()
        folder = unfinished / "set"
        beside = folder / "meta.json" if folder.exists() else out.with_suffix(".meta.json")
        common.save_json(beside, about)
        if folder.exists():
            folder.rename(out)
        shutil.rmtree(unfinished)
        print(f"wrote {out} and {beside.name}: {n} images")


# --- What is made ---------------------------------------------------------------------------------

@dataclasses.dataclass
class Job:
    """Images to make, and what is known about them."""
    args: argparse.Namespace
    process: common.Process
    function: partial            # (inputs (b,), noise, on_step=None) -> images (b, 3, h, w), facts
    inputs: np.ndarray           # each image's label, or its place in the data
    labels: np.ndarray           # (n,); when compiled, more inputs than labels fill the last batch
    names: list                  # what the labels stand for
    about: dict                  # for meta.json

    def make(self, indices):
        """Return films, uint8 (b, steps, 3, h, w), whose last images are the result, and facts."""
        device = self.process.device
        inputs = torch.tensor(self.inputs[indices], device=device)
        noise = common.Noise(self.args.seed, indices, device)
        self.frames = []
        with self.process.autocast():
            images, facts = self.function(
                inputs, noise, on_step=self.keep if self.args.shows_steps else None)
        del self.frames[-1:]  # the last estimate: the result takes its place
        self.keep(images)
        if not images.isfinite().all():
            raise UserError("the images are not finite: try --precision fp32 or other options")
        return torch.stack(self.frames, 1), facts

    def keep(self, images):
        """Keep a step of a batch. With --stream, write the picture of the steps so far."""
        self.frames.append(common.to_uint8(images).cpu())
        if self.args.stream:
            write_picture(self, torch.stack(self.frames, 1))


def generation(args, process, model_file, options):
    """Return the Job of sampling a model: images balanced over the classes and in their order."""
    model, first_stage, about = load(args, model_file, process.device)
    config = model.config
    class_names = [str(name) for name in config.class_names or range(config.classes)]
    names = class_names
    if hasattr(model_file, "conditions"):
        names = model_file.conditions(config, **options)
    classes = range(len(names))
    if args.classes:
        if names != class_names:
            raise UserError("--classes: this model, or an option here, does not go by classes")
        classes = common.class_ids(args.classes, config)
    n = args.n or min(len(classes), 10) * (1 if args.stream else 8)
    args.image_size = config.image_size
    labels = np.take(classes, np.arange(n) * len(classes) // n)
    args.batch_size = n if args.stream else min(n, args.batch_size)  # a stream grows as a whole
    if process.precision == "bf16":
        common.cast_once(model, *(first_stage.sampled() if first_stage else []))
    if args.compile is None:
        args.compile = process.device.type == "cuda" and about.get("size") != "tiny"
    inputs = labels
    if args.compile:  # a compiled step has one shape: whole batches
        model_file.compile_steps(model, first_stage)
        inputs = np.resize(labels, n + -n % args.batch_size)
    about = {**dataclasses.asdict(config), **options, **about,
             "labels": "balanced" if names == class_names else "none"}
    return Job(args, process, partial(model_file.generate, model, first_stage, **options),
               inputs, labels, names, about)


def reconstruction(args, process, model_file, options):
    """Return the Job of encoding and decoding picture files, or images of a data set."""
    path = args.first_stage or find_weights(args, model_file)[2]
    first_stage = model_file.STAGES[0].load(path).to(process.device)
    with common.untrusted("--reconstruct", "not possible with these options"):
        common.with_options(first_stage.config, **options)
    size = getattr(first_stage.config, "image_size", args.image_size)
    files = args.reconstruct
    data = common.Data("files", np.arange(len(files)), files,
                       lambda i: common.open_picture(files[i], size), "", files)
    if not Path(files[0]).is_file():
        data = common.load_data(files[0], size=size, split="test")
        args.n = args.n or STRIPS
    labels = data.labels[:args.n]
    about = {"checkpoint": str(path), "weights_hash": common.fingerprint(first_stage)}
    samples = common.Samples(data, size, common.centre)
    return Job(args, process, partial(reconstruct, first_stage, samples, **options),
               np.arange(len(labels)), labels, data.classes, about)


def reconstruct(first_stage, samples, indices, noise, on_step=None, **options):
    """Return reconstructions (b, 3, h, w) and the PSNR (b, steps) after each step, in dB."""
    originals, _ = samples[0, indices.tolist()]
    originals = originals.to(indices.device)
    images = common.to_float(originals)
    steps = []
    result = first_stage.reconstruct(images, noise, on_step=steps.append, **options)
    steps = steps or [result]  # a first stage without steps
    for shown in (images, *steps) if on_step else ():
        on_step(shown)
    errors = common.to_uint8(torch.stack(steps, 1)) - originals[:, None].float()
    psnr = 10 * torch.log10(255**2 / errors.square().mean((2, 3, 4)))
    return result, {"psnr_after_each_step": psnr}


# --- Weights --------------------------------------------------------------------------------------

def find_weights(args, model_file):
    """Return the path and content of the weights of a run's last stage that has some, and the path
    of their first stage (their own if they are one). Without a run, use those beside this script.
    """
    folder = Path(args.run or f"runs/{args.model}")
    shipped = Path(__file__).with_name("weights") / args.model
    if not args.run and not folder.exists() and shipped.exists():
        print(f"no run in {folder}: sampling from the weights that come with it")
        folder = shipped
    for stage in reversed(model_file.STAGES):
        for path in (folder / "model.pt", folder / stage.name / "model.pt"):
            if path.exists():
                content = common.read_checkpoint(path)
                return path, content, path.parent / str(content.get("first_stage") or "model.pt")
    raise UserError(f"no trained stage in {folder}: python train.py --model {args.model} makes one")


def load(args, model_file, device):
    """Return the model, its first stage or None, and what is known about them."""
    source = model_file.STAGES[0]
    if args.ckpt:
        if source.load and not args.first_stage:
            raise UserError(f"--ckpt needs the published first stage: give --{source.name} FILE")
        path, first_stage, about = args.ckpt, None, {}
        model = model_file.load_official(path)
    else:
        path, content, first_stage = find_weights(args, model_file)
        with common.untrusted(path, f"no model of {args.model} that makes pictures"):
            builds = {stage.name: stage.build for stage in model_file.STAGES if not stage.load}
            config = common.rebuild(model_file.Config, content["config"])
            model = builds[content["stage"]](config)
            about = {name: content[name] for name in ("stage", "size", "step", "data")}
            state = common.read_checkpoint(path.with_name("state.pt")) if args.raw else content
            common.load_strict(model, state["model"], path)
        about["weights"] = "raw" if args.raw else "EMA"
    about |= {"checkpoint": str(path), "weights_hash": common.fingerprint(model)}
    if source.load:
        first_stage = source.load(args.first_stage or first_stage)
        model_file.check(model, first_stage)
    else:
        first_stage = None
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    torch.nn.ModuleList([model, first_stage]).to(device, memory_format=layout).eval()
    return model, first_stage, about


# --- Where it goes --------------------------------------------------------------------------------

@torch.no_grad()
def make_all(job, unfinished):
    """Return a Cache of all films in the folder `unfinished`, which also stores their facts. Ranks
    share the work, and what is there is not made again."""
    n = len(job.inputs)
    films = common.Cache(unfinished, n, job.args.batch_size)
    bar = common.progress(n // job.process.world, "sampling", "img")
    for batch in films.missing():
        film, facts = job.make(batch)
        common.save(unfinished / f"{batch[0]:08d}.pt", facts)
        films.write(batch, film.numpy())
        bar.update(len(batch))
    common.gather(None)  # wait for the other ranks
    return films


def write(job, films, unfinished):
    """Write a picture of the films (steps, 3, h, w), or a set of their last images."""
    args = job.args
    n = len(job.labels)
    if args.ending in common.ENDINGS:
        write_picture(job, torch.from_numpy(np.stack([films[k] for k in range(n)])))
    elif args.ending == ".npz":
        shape = (n, *films[0].shape[2:], 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with common.atomic(args.out) as f, zipfile.ZipFile(f, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as images:
                np.lib.format.write_array_header_1_0(images, header)
                for k in range(n):  # one by one: the set may not fit into memory
                    images.write(films[k][-1].transpose(1, 2, 0).tobytes())
            with archive.open("arr_1.npy", "w") as labels:
                np.save(labels, job.labels)
    else:
        shutil.rmtree(unfinished / "set", ignore_errors=True)  # of a killed process
        for k, label in enumerate(job.labels):
            picture = common.Image.fromarray(films[k][-1].transpose(1, 2, 0))
            common.save_picture(unfinished / f"set/{k:06d}_class{label}.png", picture)


def write_picture(job, films):
    """Write films (n, steps, 3, h, w) as an animation, or as a picture with a row for each class.
    Streams and reconstructions are pictures of all steps, a row for each image."""
    args = job.args
    names = [job.names[label] for label in job.labels]
    columns = names.count(names[0])
    rows = names[::columns]
    if max(columns, len(rows)) > 32 or np.repeat(rows, columns).tolist() != names:
        columns, rows = 8, ()
    if args.ending == ".gif":
        every = math.ceil(films.shape[1] / FRAMES)
        steps = films[:, (films.shape[1] - 1) % every::every].unbind(1)  # the last one included
        common.save_gif(args.out, [common.grid(step, columns, rows) for step in steps])
        return
    if args.shows_steps:
        films, columns, rows = films[:STRIPS], films.shape[1], names
    common.save_picture(args.out, common.grid(films.flatten(0, 1), columns, rows))


if __name__ == "__main__":
    common.run_script(main)
