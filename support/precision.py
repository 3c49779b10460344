"""Matrix products in bfloat16, with weights in float32 (autocast)."""

import contextlib
import functools

import torch
import torch.utils.checkpoint

# Tokens from which fused attention in bfloat16 is faster on a CPU with its backward pass too.
# Measured: .29 of the time without one and 1.58 with it at 64 tokens, .32 and .61 at 256, .24 and
# .36 at 1,024.
FUSED_FROM = 256


@contextlib.contextmanager
def compute_in(dtype, x_t):
    """Matrix products in `dtype` for inputs like x_t; master weights stay float32. On the CPU the
    backward pass of bfloat16's fused attention is slow on small maps: they take plain products."""
    if dtype == torch.float32:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(x_t.device.type, dtype))
        tokens = x_t.shape[-2] * x_t.shape[-1]
        if x_t.device.type == "cpu" and torch.is_grad_enabled() and tokens < FUSED_FROM:
            math_only = torch.nn.attention.SDPBackend.MATH
            stack.enter_context(torch.nn.attention.sdpa_kernel(math_only))
        yield


@contextlib.contextmanager
def keep_casts():
    """Within it compute_in casts a trained weight to bfloat16 once, not once a pass. Whoever moves
    the weights calls forget_casts."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        forget_casts()


def forget_casts(*_):
    """The weights have moved: what keep_casts has kept of them is old."""
    torch.clear_autocast_cache()


def checkpoint_activations(denoiser, sample_shape):
    """Recompute activations in the backward pass, with the kernels of the forward pass."""
    like = torch.empty(sample_shape, device=denoiser.schedule.alpha.device)

    def contexts():
        return contextlib.nullcontext(), compute_in(denoiser.dtype, like)

    recompute = functools.partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=contexts
    )
    denoiser.network.enable_gradient_checkpointing(recompute)
