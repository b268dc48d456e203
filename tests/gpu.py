"""What a CUDA card makes of the models: first whether it is right, then how fast it is.

    python tests/gpu.py                              # on a CUDA card, meant to take eight minutes
    python tests/gpu.py --only agree "graphs dar"    # checks whose names contain one of these
    python tests/gpu.py --device cpu                 # a dry run: tiny sizes, nothing is compiled

agree   loss, gradients and samples are those of the CPU, in true float32 and in bf16
finite  gradients are finite in bf16, with dropout and masks, at a paper's widths and lengths
graphs  compiled samplers record CUDA graphs, compile nothing again for the next batch, and give
        what they give without compilation
speed   the rows of tests/bench.py, compiled: what share of the card's ceilings is reached

Each check prints one line, speed a line for each row. The exit code is 1 if a check failed. Weights
are random. A gap is the norm of the difference over the norm of what is expected.
"""
import argparse
import dataclasses
import sys
import time
from functools import partial
from unittest import mock

import bench
import torch
from torch._dynamo.utils import counters

import common

SIZES = {  # tiny, and a paper's size with a quarter of its layers, which samples in a few steps
    "transdiff": {"tiny": [], "l": ["ar_depth=8", "depth=4", "steps=20"]},
    "dar": {"tiny": [], "l": ["depth=6", "tokenizer.depth=2", "tokenizer.decoder_depth=2",
                              "tokenizer.pixel_depth=3", "tokenizer.repa_layer=0"]},
    "madformer": {"tiny": [], "imagenet": ["depth=7", "diffusion_depth=3", "steps=20"]}}
CPU = common.Process(0, 1, torch.device("cpu"), "fp32")
TOLERANCES = {  # precision -> largest gaps
    "fp32": {"loss": 1e-4, "gradient": 2e-3, "samples": 1e-2},
    "bf16": {"loss": 2e-2, "gradient": 0.15, "samples": 0.3}}


def same_draws():
    """Return a context in which what is drawn at random is the same on all devices."""
    draws = {}
    for name in ("rand", "randn", "randint"):
        def draw(*shape, device="cpu", function=getattr(torch, name), **options):
            return function(*shape, **options).to(device)
        draws[name] = draw
    draws["randn_like"] = lambda x: draws["randn"](x.shape, device=x.device)
    torch.manual_seed(1)
    return mock.patch.multiple(torch, **draws)


def gap(ours, theirs):
    """Return the norm of the difference over the norm of what is expected."""
    return ((ours - theirs).norm() / theirs.norm()).item()


class Case:
    """A stage's network and first stage with random weights, and a batch, on the CPU."""

    def __init__(self, args, model_file, stage):
        torch.manual_seed(0)
        self.generate = model_file.generate if stage.first_stage else None
        config = bench.make_config(args, model_file, stage)
        self.network = stage.build(config)
        first_stage = model_file.STAGES[0].build(config)
        for parameter in [*self.network.parameters(), *first_stage.parameters()]:
            if not parameter.any():  # as outputs are at first
                torch.nn.init.normal_(parameter, std=0.02)
        self.first_stage = bench.frozen(first_stage, CPU.device)
        self.inputs = bench.training_batch(4, stage, config, self.first_stage, CPU.device)

    def outcome(self, process):
        """Return the loss, all gradients as one vector, and samples if the stage makes pictures."""
        device = process.device
        network = self.network.to(device)
        first_stage = self.first_stage.to(device)
        batch, labels = [x.to(device) for x in self.inputs]
        network.zero_grad()
        with same_draws(), process.autocast():
            loss = network(batch, labels)["loss"]
        loss.backward()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found = {"loss": loss.detach(), "gradient": torch.cat(gradients)}
        if self.generate:
            noise = common.Noise(0, range(len(labels)), device)
            with torch.no_grad(), process.autocast():
                network.eval()
                found["samples"], _ = self.generate(network, first_stage, labels, noise)
        return {name: value.float().cpu() for name, value in found.items()}


def agree(args, model_file, stage, process):
    """Compare the device with the CPU. Return the gaps in words."""
    case = Case(args, model_file, stage)
    case.network.eval()
    words = []
    passed = True
    with common.true_float32():
        expected = case.outcome(CPU)
        for precision, limits in TOLERANCES.items():
            found = case.outcome(dataclasses.replace(process, precision=precision))
            if precision == "bf16" and hasattr(case.network, "stream"):
                del found["samples"]  # another token changes all that follow
            for name, value in found.items():
                distance = gap(value, expected[name])
                words.append(f"{precision} {name} {distance:.1e}")
                passed = passed and distance <= limits[name]
    assert passed, words
    return ", ".join(words)


def finite(args, model_file, stage, process):
    """Train and sample in bf16. Return the number of gradients."""
    case = Case(args, model_file, stage)
    found = case.outcome(dataclasses.replace(process, precision="bf16"))
    for name, value in found.items():
        assert value.isfinite().all(), name
    return f"{len(found['gradient']):,} gradients"


def graphs(args, model_file, stage, process):
    """Compare the compiled sampler with itself before, in true float32. Return what was counted."""
    case = Case(args, model_file, stage)
    process = dataclasses.replace(process, precision="fp32")
    first_stage = bench.frozen(case.first_stage, process.device)
    sampling = bench.Sampling(model_file, case.network, first_stage, process)
    counters.clear()
    with (torch.no_grad(), common.true_float32(),
          mock.patch.object(torch.cuda, "graph", wraps=torch.cuda.graph) as record):
        expected = sampling.images(4)
        if args.compile:
            model_file.compile_steps(sampling.model, first_stage)
        other, noise = sampling.inputs(4)
        model_file.generate(sampling.model, first_stage, other.flip(0), noise)
        compiled, recorded = counters["stats"]["unique_graphs"], record.call_count
        distance = gap(sampling.images(4), expected)
    again = counters["stats"]["unique_graphs"] - compiled + record.call_count - recorded
    words = f"gap {distance:.1e}, {compiled} graphs, {recorded} recorded, {again} made again"
    assert distance <= 1e-3 and again == 0, words
    assert recorded > 0 or not args.compile, words
    return words


def speed(args, process):
    """Measure training and sampling: bench.py prints the rows."""
    table = bench.Table(args, process)
    done = [attempt(name, measure) for name, measure in bench.parts(args, table)]
    assert all(done), "see above"


def checks(process):
    """Yield the name of each check, and the function that makes it."""
    on_cuda = process.device.type == "cuda"
    how = dict(only=["train", "sample"], plain=False, compile=on_cuda, repeats=3)
    how |= dict(batch=64, train_batch=32) if on_cuda else dict(batch=2, train_batch=2)
    for model, sizes in SIZES.items():
        jobs = []
        for size, fields in sizes.items() if on_cuda else [("tiny", [])]:
            jobs.append(argparse.Namespace(model=model, size=size, set=fields, **how))
        model_file = common.load_model(model)
        for stage in model_file.STAGES:
            rest = (model_file, stage, process)
            yield f"agree {model} {stage.name}", partial(agree, jobs[0], *rest)
            yield f"finite {model} {stage.name}", partial(finite, jobs[-1], *rest)
            if stage.first_stage:
                yield f"graphs {model} {stage.name}", partial(graphs, jobs[0], *rest)
        for args in jobs:
            yield f"speed {model} {args.size}", partial(speed, args, process)


def attempt(name, check):
    """Run a check, print its words, and return whether it passed."""
    start = time.perf_counter()
    mark = "ok"
    try:
        words = check()
    except Exception as error:
        mark = "FAILED"
        words = f"{type(error).__name__} {error}".splitlines()[0]
    torch.compiler.reset()
    torch.cuda.empty_cache()  # without a CUDA card: no effect
    if words:
        print(f"{mark} {name}, {time.perf_counter() - start:.0f} s: {words}", flush=True)
    return mark == "ok"


def main():
    """Run the checks that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", default=[""])
    args = parser.parse_args()
    failed = 0
    for name, check in checks(common.launch(args.device)):
        if any(part in name for part in args.only) and not attempt(name, check):
            failed += 1
    print(f"{failed} failed")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    common.run_script(main)
