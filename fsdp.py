"""Several processes on one run: how they meet, what each of them holds of a network and in which precision, and what they agree on.

    python train.py                                              # one process: nothing below does anything
    torchrun --standalone --nproc_per_node=2 train.py            # one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py --shard hybrid

Each process works on its share of the batch. Of a network's parameters, gradients and optimizer state it holds 1/N (FSDP2's
fully_shard): before a block runs, its parameters are gathered from the others, and after its backward pass each process keeps
its part of the gradient's mean over all. So N processes take the very step that one would take on the whole batch.
"""

import datetime
import json
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import errors
from errors import UserError

# Diffusers' UNets are made of these two. A block is gathered when it runs and let go after it, so at no time are there more whole
# parameters than those of two blocks (the second is the next one's, on its way) and of the few layers between blocks.
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")


class NotFinite(Exception):
    """A loss or gradient that is no number any more."""


# ---------------------------------------------------------------------------------------------------- processes

def launched():
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "WORLD_SIZE" in os.environ


def first():
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    if first():
        tqdm.write(text)  # above a progress bar, where there is one
        sys.stdout.flush()


def own_device(device):
    """A launcher's processes take one GPU each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() and device == "cuda" else device


def start(shard, device, timeout):
    """Meet the other processes. Returns the mesh that networks are sharded over, None if there is no launcher.

    full: one shard in each process. hybrid: shards within a node, whose links are fast, and a replica on each node. none: a replica
    in each process. A collective that waits for longer than `timeout` seconds is an error.
    """
    if not launched():
        return None
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout)
    store, number, count = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store outlives a restart, and would hand out the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=store, rank=number, world_size=count, timeout=limit)
    in_node = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    sizes = set(from_all(in_node))
    if shard == "hybrid" and len(sizes) > 1:
        raise UserError(f"--shard hybrid needs as many processes on each node; there are {' and '.join(map(str, sorted(sizes)))}")
    shape = {"full": (1, world()), "hybrid": (world() // in_node, in_node), "none": (world(), 1)}[shard]  # replicas, shards
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicas", "shards"))
    return mesh["shards"] if shard == "full" else mesh


def share(batch_size):
    """The samples of a batch that are this process's."""
    if batch_size % world():
        raise UserError(f"--batch-size {batch_size} cannot be shared by {world()} processes: it is no multiple of {world()}")
    each = batch_size // world()
    return range(rank() * each, (rank() + 1) * each)


def sum_over_processes(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor):
    return sum_over_processes(tensor) / world()


def largest_over_processes(number):
    """A whole number that all processes then agree on."""
    if dist.is_initialized():
        tensor = torch.tensor(number)  # on the CPU, so that no accelerator has to be waited for
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        number = tensor.item()
    return number


def from_first(decide):
    """What the first process gets from calling decide(), for all of them, which wait for it here. If decide() fails, the first process
    ends, and the others with it: see run."""
    decided = [decide() if first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(decided)
    return decided[0]


def from_all(thing, group=None):
    """[each process's thing]"""
    things = [thing]
    if dist.is_initialized():
        things = [None] * world()
        dist.all_gather_object(things, thing, group=group)
    return things


# ---------------------------------------------------------------------------------------------------- networks

def shard(module, mesh, device, dtype):
    """Leave this process its part of the module's parameters, on the device. Without a mesh it gets the whole module.

    Master weights and optimizer state are float32. With dtype bfloat16 parameters are gathered as such, which halves the
    traffic, and gradients are still averaged in float32. Inputs are left alone: autocast (models.compute_in) casts where it pays,
    and x_t has to stay float32 for the x0 arithmetic.
    """
    if mesh is None or not any(True for _ in module.parameters()):
        return module.to(device)
    # The outermost module too is let go after its forward pass. FSDP would keep it, for the backward pass that mostly follows; but
    # the averaged student has none, and would go on with what it was before its parameters moved.
    options = {"mesh": mesh, "reshard_after_forward": True,
               "mp_policy": MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)}
    blocks = [block for block in module.modules() if type(block).__name__ in BLOCKS]
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(module, **options)
    module.to(device)  # buffers: fully_shard has moved the parameters, block by block
    prefetch(module, blocks)
    return module


def prefetch(module, blocks):
    """Let each block gather the parameters of the one that runs after it. The first pass tells which that is: a UNet's blocks are not
    registered in the order in which they run."""
    order = []

    def note(block, inputs):
        order.append(block)

    def link(module, inputs, output):
        for handle in handles:
            handle.remove()
        for block, following in zip(order, order[1:]):
            block.set_modules_to_forward_prefetch([following])

    handles = [block.register_forward_pre_hook(note) for block in blocks] + [module.register_forward_hook(link)]


def whole(tensor):
    """A sharded tensor as a plain one; every process has to call this. A plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor


def whole_state(module, names=None):
    """The module's state_dict, or what it has under those names, unsharded and on the CPU, for the first process; None for the others."""
    state = {}
    for name, tensor in module.state_dict().items():  # one after another: the whole of a large network may not fit
        if names is not None and name not in names:
            continue
        tensor = whole(tensor)
        if first():
            state[name] = tensor.detach().to("cpu", copy=True)
    return state if first() else None


def clip_gradients(module, max_norm, name):
    """Scale the gradients to a norm, over all processes, of at most max_norm; returns the norm before. Raises NotFinite, before any
    optimizer has moved, so that the parameters are still the last good ones."""
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
    if not norm.isfinite():
        raise NotFinite(f"the gradient of the {name} is not finite")
    torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
    return norm


# ---------------------------------------------------------------------------------------------------- failing together

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "remote process exited", "collective operation timeout")


def run(main):
    """errors.run for a command that torchrun may start: of several processes that fail, the first one says why, and none hangs.

    The launcher ends the other processes as soon as one has failed. So a process that failed for the same reason as its
    neighbours, or because another one is gone, gives it time to do so before it says anything itself.
    """
    if not launched():
        return errors.run(main)
    try:
        main()
    except Exception as error:
        lost = isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or any(words in str(error) for words in LOST)
        time.sleep(2 * int(os.environ.get("LOCAL_RANK", "0")) + (20 if lost else 0))
        script = os.path.basename(sys.argv[0])
        if isinstance(error, UserError):
            text = f"{script}: {error}"
        else:
            text = f"{traceback.format_exc()}{script}: process {os.environ['RANK']} failed: " + ("it has lost another process: " if lost else "") + str(error)
        print(text, file=sys.stderr, flush=True)
        tell_launcher(text.splitlines()[-1])
        # No clean end: a checkpoint that is being written may wait for a process that is gone.
        os._exit(error.status if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:  # before the run has begun: it then has a handler of its own
        os._exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def tell_launcher(text):
    """torchrun ends with what it finds in this file of the process that failed first."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)
