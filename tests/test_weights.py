"""The weights that come with the code make what is asked for."""
import numpy as np
import pytest
import torch
from conftest import ROOT, run

CLASSES = [0, 1, 5, 7, 8, 9]  # t-shirt, trousers, sandal, sneaker, bag, ankle boot


@pytest.mark.parametrize("model", ["transdiff", "dar", "madformer"])
def test_samples_of_the_shipped_weights_look_like_their_classes(tmp_path, model):
    """Wrong labels, a wrong scale of the latents, or half precision that is too coarse."""
    said = run(ROOT / "sample.py", "--model", model, "--classes", *CLASSES, "--n", 24,
               "--out", "s.npz", cwd=tmp_path)
    assert "the weights that come with it" in said
    images = torch.from_numpy(np.load(tmp_path / "s.npz")["arr_0"])[..., 0].double()
    means = torch.from_numpy(np.load(ROOT / "tests/fixtures/fashion_means.npz")["means"]).double()
    nearest = torch.cdist(images.flatten(1), means[CLASSES].flatten(1)).argmin(1)
    assert (nearest == torch.arange(6).repeat_interleave(4)).double().mean() > 0.8
