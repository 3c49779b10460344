"""Several processes on one run: how they meet, what each holds of a network, what they agree on.

    python train.py                                             # one process: nothing here acts
    torchrun --standalone --nproc_per_node=2 train.py           # one machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        train.py --shard hybrid

Each rank works on its slice of the batch. Of a network's parameters, gradients and optimizer state
it holds 1/N (FSDP2's fully_shard): a block's parameters are gathered before it runs, and after its
backward pass each rank keeps its part of the gradient, averaged over the ranks. So N ranks take the
very step that one would take on the whole batch.
"""

import datetime
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from support import cli
from support.cli import UserError

# The units that are sharded: what diffusers' UNets and transformers are made of. At any time a rank
# holds the whole parameters of one block, of the next one on its way, and of the layers between.
BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "JointTransformerBlock")
BLOCKS += ("SanaTransformerBlock", "ZImageTransformerBlock", "Lumina2TransformerBlock")
BLOCKS += ("FluxTransformerBlock", "FluxSingleTransformerBlock", "QwenImageTransformerBlock")
BLOCKS += ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
TIMEOUT = 600  # seconds that a rank waits for another


class NotFinite(Exception):
    """A loss or a gradient is NaN or infinite."""


# ----------------------------------------------------------------------------- ranks


def launched():
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "WORLD_SIZE" in os.environ


def is_main():
    """Whether this rank prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print_main(text):
    if is_main():
        tqdm.write(text)  # above a progress bar, if there is one
        sys.stdout.flush()


def own_device(device):
    """Under a launcher each process takes one GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() and device == "cuda" else device


def device_and_dtype(args):
    """--device and --dtype where the command line leaves them open."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(args.device)
    args.dtype = args.dtype or default_dtype(args.device)
    return own_device(args.device), getattr(torch, args.dtype)


def default_dtype(device):
    """bfloat16 where the hardware multiplies in it: GPUs, and CPUs that say so."""
    if torch.device(device).type == "cpu":
        can = getattr(torch.cpu, "get_capabilities", dict)()  # of newer versions of torch
        return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"
    return "bfloat16"


def check_device(device):
    try:
        (torch.ones(1, device=device) + 1).item()  # meta, which computes nothing, fails here
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {cli.first_line(error)}") from None


def start(shard, device):
    """Meet the other ranks. Returns the mesh that networks are sharded over, or None without a
    launcher.

    full: one shard a rank. hybrid: shards within a node, whose links are fast, and a replica on
    each node. none: a replica on each rank.
    """
    if not launched():
        return None
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=TIMEOUT)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=limit))
    except dist.DistNetworkError as error:
        raise UserError(
            f"the ranks cannot meet at {os.environ.get('MASTER_ADDR')}, port "
            f"{os.environ.get('MASTER_PORT')} ({cli.first_line(error)}); is it in use by another "
            "job? Name another port",
            status=1,
        ) from None
    # torchrun's store outlives a restart and would hand out the addresses of dead processes.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=limit)
    in_node = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    sizes = set(gather_objects(in_node))
    if shard == "hybrid" and len(sizes) > 1:
        listed = " and ".join(map(str, sorted(sizes)))
        raise UserError(f"--shard hybrid needs as many ranks on each node; there are {listed}")
    shapes = {"full": (1, count), "hybrid": (count // in_node, in_node), "none": (count, 1)}
    mesh = init_device_mesh(kind, shapes[shard], mesh_dim_names=("replicas", "shards"))
    return mesh["shards"] if shard == "full" else mesh


def local_slice(batch_size):
    """The samples of a batch that are this rank's, as a range."""
    if batch_size % world_size():
        raise UserError(f"--batch-size {batch_size} is no multiple of the {world_size()} ranks")
    each = batch_size // world_size()
    return range(rank() * each, (rank() + 1) * each)


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor):
    return sum_over_ranks(tensor) / world_size()


def max_over_ranks(number):
    """A whole number that all ranks then agree on."""
    if dist.is_initialized():
        tensor = torch.tensor(number)  # on the CPU, so that no accelerator has to be waited for
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        number = tensor.item()
    return number


def broadcast_from_main(decide, *arguments):
    """decide(*arguments), called by the main rank, for all ranks, which wait for it here."""
    decided = [decide(*arguments) if is_main() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(decided)
    return decided[0]


def gather_objects(thing):
    """[each rank's thing]"""
    things = [thing]
    if dist.is_initialized():
        things = [None] * world_size()
        dist.all_gather_object(things, thing)
    return things


# ----------------------------------------------------------------------------- networks


def shard(module, mesh, device, dtype):
    """Leave this rank its part of the module's parameters, on the device; all without a mesh.

    Master weights and optimizer state are float32. With dtype bfloat16 parameters are gathered as
    such, which halves the traffic, and gradients are still averaged in float32. Inputs stay as they
    are: autocast (precision.compute_in) casts where it pays, and x_t is needed in float32.
    """
    if mesh is None or not any(True for _ in module.parameters()):
        return module.to(device)
    gathered = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    # The outermost module too is resharded after its forward pass. FSDP would keep it for the
    # backward pass, but the averaged student has none, and would go on with its old parameters.
    options = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": policy}
    for block in module.modules():
        if type(block).__name__ in BLOCKS:
            fully_shard(block, **options)
    fully_shard(module, **options)
    return module.to(device)  # buffers; fully_shard has moved the parameters


def reduce_gradients(module, now):
    """Whether the next backward pass averages the gradients over the ranks. Of micro-batches only
    the last one's has to; until then each rank adds up whole gradients of its own."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def full_state(module):
    """The module's state_dict, unsharded and on the CPU, for the main rank; {} for the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def clip_gradients(module, max_norm, name):
    """Scale the gradients to a norm, over all ranks, of at most max_norm (0: any). Returns the
    norm.

    Raises NotFinite before any optimizer has moved: the parameters are still the last good ones.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if isinstance(norm, dist.tensor.DTensor):
        norm = norm.full_tensor()
    if not norm.isfinite():
        raise NotFinite(f"the gradient of the {name} is not finite")
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# ----------------------------------------------------------------------------- failing together

# What gloo and NCCL say when another rank is gone.
LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "collective operation timeout",
)


def run(main):
    """cli.run for a command that torchrun may start: one rank says what went wrong, none hangs.

    The launcher ends the other ranks as soon as one has failed. So a rank that failed for the same
    reason as its neighbours, or because another one is gone, waits before it says anything.
    """
    if not launched():
        return cli.run(main)

    @record  # torchrun's summary then names the error of the rank that failed first
    def guarded():
        try:
            main()
        except Exception as error:
            lost = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
            lost = lost or any(words in str(error) for words in LOST_RANK)
            time.sleep(2 * int(os.environ.get("LOCAL_RANK", "0")) + 20 * lost)
            raise

    try:
        guarded()
    except (Exception, KeyboardInterrupt) as error:
        unknown = f"{traceback.format_exc()}rank {os.environ['RANK']} failed: {error}"
        text, status = cli.explain(error) or (unknown, 1)
        print(text, file=sys.stderr, flush=True)
        os._exit(status)  # at once: a clean end may wait for a rank that is gone
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
