"""A fourth model is one file: the scripts train, resume and sample it unchanged, and know no model
by name."""
import ast
import json
import re

import numpy as np
import pytest
from conftest import ROOT, log_of, run

FLOW = '''
"""A rectified flow on pixels, without a first stage. t = 0 is the image, t = 1 is noise."""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Recipe, Stage


@dataclass(frozen=True)
class Config:
    image_size: int = 16
    classes: int = 10
    class_names: tuple[str, ...] = ()
    dim: int = 16
    steps: int = 4

    def __post_init__(self):
        common.check(self, {"steps must be 1 or more": self.steps > 0})


class Flow(nn.Module):
    """Velocity network and its training loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.label = nn.Embedding(config.classes, config.dim)
        self.input = nn.Conv2d(4, config.dim, 3, padding=1)
        self.output = nn.Conv2d(config.dim, 3, 3, padding=1)

    def velocity(self, x, t, labels):
        """Return v (B, 3, h, w) of x (B, 3, h, w) at times t (B,)."""
        time = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        h = self.input(torch.cat([x, time], 1)) + self.label(labels)[:, :, None, None]
        return self.output(F.silu(h))

    def forward(self, images, labels):
        """Return the loss of images (B, 3, h, w)."""
        t = torch.rand(len(images))
        eps = torch.randn_like(images)
        x_t = torch.lerp(images, eps, t.view(-1, 1, 1, 1))
        return {"loss": F.mse_loss(self.velocity(x_t, t, labels), eps - images)}


def generate(model, first_stage, labels, noise, *, on_step=None, steps=None):
    """Return images by Euler steps, and the number of steps of each."""
    c = common.with_options(model.config, steps=steps)
    x = noise.normal((3, c.image_size, c.image_size))
    for k in range(c.steps):
        t = torch.full((len(x),), 1 - k / c.steps)
        x = x - model.velocity(x, t, labels) / c.steps
        if on_step:
            on_step(x)
    return x.clamp(-1, 1), {"taken": torch.full((len(x),), c.steps)}


def views(config):
    """Views that the model is trained on."""
    return common.centre_and_mirror


PRESETS = {"tiny": Config()}
OPTIONS = {"steps": dict(type=int, help="Euler steps")}
STAGES = [Stage("flow", Flow, {"tiny": Recipe(lr=1e-3, batch=8, epochs=1)}, views)]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """A folder with the model's file, data, and a run of two steps."""
    folder = tmp_path_factory.mktemp("fourth")
    (folder / "flow.py").write_text(FLOW)
    (folder / "data").symlink_to(pictures)
    train(folder, "--steps", 2)
    return folder


def train(folder, *arguments):
    run(ROOT / "train.py", "--model", "flow", "--data", "data", "--device", "cpu", "--workers", 0,
        "--log-every", 1, *arguments, cwd=folder)


def sample(folder, *arguments):
    run(ROOT / "sample.py", "--model", "flow", "--device", "cpu", *arguments, cwd=folder)


def test_it_resumes_and_is_evaluated(folder):
    """The loop asks the module for what only a first stage or one of the three models has."""
    train(folder, "--steps", 3, "--fid-every", 3, "--fid-samples", 9)
    *lines, found = log_of(folder / "runs/flow/flow")
    assert [line["step"] for line in lines] == [1, 2, 3] and found["fd_classifier"] > 0


def test_it_is_sampled_with_its_own_option(folder):
    """A first stage is required, or the option is not passed on and written down."""
    sample(folder, "--classes", "star", "--n", 3, "--steps", 7, "--out", "x.npz")
    with np.load(folder / "x.npz") as content:
        assert content["arr_0"].shape == (3, 16, 16, 3) and content["arr_1"].tolist() == [1] * 3
    meta = json.loads((folder / "x.meta.json").read_text())
    assert (meta["steps"], meta["taken"], meta["model"]) == (7, 7, "flow")


def test_it_is_streamed(folder):
    """--stream works for some models only."""
    sample(folder, "--stream", "--out", "x.gif")
    assert (folder / "x.gif").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_scripts_know_no_model_by_name(script):
    """`if model == ...`: a special case for one of the models."""
    tree = ast.parse((ROOT / script).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                node.body.pop(0)
    code = ast.unparse(tree)
    assert "common" in code and not re.search(r"\b(transdiff|dar|madformer)\b", code, re.I)
