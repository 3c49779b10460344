"""What the makers of teachers and judge share: flags, and stages that can be interrupted."""

from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fsdp import default_dtype
from support import checkpoint, cli
from support.precision import compute_in


def maker_parser(doc, work, batch_size):
    """With the flags that all makers have."""
    parser = cli.Parser(doc)
    add = parser.add_argument
    add("--work", default=work, metavar="DIR", help="where the state of a stage is kept")
    add("--batch-size", type=cli.positive, default=batch_size)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=cli.natural, default=0)
    return parser


def learning_rate_scale(iteration, iterations, warmup=200):
    """Linear warm-up, constant, and linear to zero over the last third."""
    return min(1.0, (iteration + 1) / warmup, 3 * (1 - iteration / iterations))


def save_state(path, **state):
    def write(partial):
        torch.save(state, partial)

    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_file(path, write)


def average_of(networks):
    return AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(0.999))


def train(stage, iterations, modules, loss_of, args, average=None, rate=1e-3, beta2=0.99):
    """AdamW with clipping, its rate as above; a checkpoint every 500 iterations.
    loss_of(generator) draws a batch and returns its loss."""
    path = Path(args.work) / f"{stage}.pt"
    modules = torch.nn.ModuleDict(modules)
    parameters = list(modules.parameters())
    options = {"lr": rate, "betas": (0.9, beta2), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(parameters, **options)
    generator = torch.Generator().manual_seed(args.seed)
    dtype = getattr(torch, default_dtype(args.device))
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        if average:
            average.load_state_dict(state["average"])
        start = state["iteration"]
    progress = tqdm(range(start, iterations), initial=start, total=iterations, desc=stage)
    for iteration in progress:
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_scale(iteration, iterations)
        with compute_in(dtype, torch.empty(8, 8, device=args.device)):
            loss = loss_of(generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(modules)
        if iteration % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (iteration + 1) % 500 == 0 or iteration + 1 == iterations:
            save_state(
                path,
                modules=modules.state_dict(),
                optimizer=optimizer.state_dict(),
                generator=generator.get_state(),
                average=average.state_dict() if average else {},
                iteration=iteration + 1,
            )
