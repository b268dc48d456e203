"""Runs two modules on the same input and names the first layer whose output differs: where to look for a mistake.

    first_difference(ours, theirs, x)         # same layer names, e.g. before and after a change
    first_difference(ours, theirs, x, names={"blocks.0.attn": "layers.0.attention"})
"""
import torch


@torch.no_grad()
def outputs(module, *inputs):
    """The first output tensor of every submodule, by name, in the order in which they ran; then the whole's, as ''."""
    seen, hooks = {}, []
    for name, part in module.named_modules():
        def hook(_, args, output, name=name):
            tensors = [o for o in (output if isinstance(output, (tuple, list)) else [output])
                       if isinstance(o, torch.Tensor)]
            if tensors:
                seen.setdefault(name, tensors[0].detach().clone())
        hooks.append(part.register_forward_hook(hook))
    try:
        module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def first_difference(ours, theirs, *inputs, names=None, tolerance=1e-5):
    """(name, largest difference relative to the largest value) of the first differing layer, or None.

    Layers are compared in the order in which `ours` ran them; those that `theirs` does not have are passed over.
    """
    a, b = outputs(ours, *inputs), outputs(theirs, *inputs)
    for name, x in a.items():
        y = b.get((names or {}).get(name, name))
        if y is None:
            continue
        if x.shape != y.shape:
            return name, float("inf")
        gap = ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()
        if not gap <= tolerance:
            return name, gap
    return None
