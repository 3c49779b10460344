"""The pass that gives x0, and from it what the GAN's head reads: a network's middle block."""

import contextlib

import torch


@contextlib.contextmanager
def read_middle(family, network, total, count, x0_graph):
    """Within it a pass of `network` over `total` samples leaves what its middle block was given or
    gave in the list that this yields. The blocks above the middle see the first `count` samples
    only where family.can_cut, and without x0_graph they keep nothing for a backward pass."""
    seen = []
    grad_before = torch.is_grad_enabled()

    def keep_input(block, inputs):
        seen.append(inputs[0])

    def keep_output(block, inputs, output):
        seen.append(output)

    def stop_graph(block, inputs):
        torch.set_grad_enabled(False)

    def keep_first(block, inputs, options):
        return first_samples(inputs, total, count), first_samples(options, total, count)

    middle, above = family.middle(network)
    if family.reads == "input":
        hooks = [middle.register_forward_pre_hook(keep_input)]
    else:
        hooks = [middle.register_forward_hook(keep_output)]
    if not x0_graph and above:
        hooks.append(above[0].register_forward_pre_hook(stop_graph))
    if count < total and family.can_cut:
        for block in above:
            hooks.append(block.register_forward_pre_hook(keep_first, with_kwargs=True))
    try:
        yield seen
    finally:
        torch.set_grad_enabled(grad_before)
        for hook in hooks:
            hook.remove()


def first_samples(value, total, count):
    """The first `count` of `total` samples of a tensor, or of all tensors in a tuple or dict."""
    if isinstance(value, torch.Tensor):
        return value[:count] if value.dim() > 0 and len(value) == total else value
    if isinstance(value, (tuple, list)):
        return tuple(first_samples(part, total, count) for part in value)
    if isinstance(value, dict):
        return {name: first_samples(part, total, count) for name, part in value.items()}
    return value
