"""EDM's class-conditional networks (2206.00364) as diffusers UNet2DModels.

    python -m support.edm edm-imagenet-64x64-cond-adm.pkl --out imagenet64      # a diffusers folder

The released pickle is read without executing anything in it.
"""

import collections
import difflib
import functools
import io
import pickle
import re
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F

from support import cli
from support.checkpoint import replace_folder
from support.cli import UserError
from support.weights import (
    Unpickler,
    check_finite,
    in_one_line,
    load_pretrained,
    load_tensors,
    read_json,
)

SIGMA_DATA = 0.5


# ----------------------------------------------------------------------------- the released pickle


class Record:
    """Stands for an object of a class that we do not have: its state, and nothing that runs."""

    def __init__(self, *arguments):
        first = arguments[0] if arguments else None
        self.state = first["state"] if isinstance(first, dict) and "state" in first else {}

    def __setstate__(self, state):
        self.state = state


class Values(dict):
    """Stands for dnnlib.util.EasyDict."""

    def __setstate__(self, state):
        self.update(state)


def load_storage(content):
    """Stands for torch.storage._load_from_bytes, which would execute what is in the bytes."""
    return load_tensors(io.BytesIO(content))


def rebuild_tensor(storage, offset, size, stride, *rest):
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    count = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    negative = min((offset, *size, *stride), default=0) < 0
    if negative or (last >= count and 0 not in size):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, size, stride)


def rebuild_parameter(tensor, *rest):
    return tensor


def encode_latin1(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def ignore(*arguments):
    """Stands for numpy's scalars and dtypes, which are initialisation constants there."""
    return Record()


# What EDM's pickles ask for by name. Source text in them stays text.
STANDS_FOR = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Record,
    ("torch.nn.modules.container", "ModuleDict"): Record,
    ("dnnlib.util", "EasyDict"): Values,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): load_storage,
    ("numpy.core.multiarray", "scalar"): ignore,
    ("numpy._core.multiarray", "scalar"): ignore,
    ("numpy", "dtype"): ignore,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): encode_latin1,
}


def tensors_of(record, prefix=""):
    """{name: tensor} as the module's state_dict would have been."""
    found = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in record.state.get(kind, {}).items():
            if tensor is not None:
                found[prefix + name] = tensor
    for name, module in record.state.get("_modules", {}).items():
        if module is not None:
            found |= tensors_of(module, f"{prefix}{name}.")
    return found


def read_pickle(path):
    """EDM's weights by EDM's names."""
    with in_one_line(f"the model {path} is not one of EDM's pickles"):
        with open(path, "rb") as file:
            content = Unpickler(file, STANDS_FOR).load()
        named = tensors_of(content["ema"])
        tensors = {name.removeprefix("model."): tensor.float() for name, tensor in named.items()}
    check_finite(tensors, path)
    return tensors


# ----------------------------------------------------------------------------- as a diffusers UNet


def unet_options(size, channels, layers, attends, labels, embedding=None, in_channels=3):
    """UNet2DModel's options for EDM's ADM architecture.

    channels of each level; residual blocks a level; the levels that attend. The table of labels
    gets one row more, for no label.
    """
    down = ["AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in attends]
    up = ["AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in attends]
    return dict(
        sample_size=size,
        in_channels=in_channels,
        out_channels=in_channels,
        time_embedding_dim=embedding or 4 * channels[0],
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=tuple(down),
        up_block_types=tuple(reversed(up)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=64,
        norm_num_groups=min(32, channels[0] // 4),
        attn_norm_num_groups=min(32, channels[-1] // 4),
        num_class_embeds=labels + 1,
    )


def architecture(tensors):
    """unet_options, read off EDM's weights."""
    blocks = {}  # resolution -> numbers of its blocks
    for name in tensors:
        match = re.match(r"enc\.(\d+)x\1_block(\d+)\.", name)
        if match:
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    sizes = sorted(blocks, reverse=True)
    channels, attends = [], []
    for size in sizes:
        last = max(blocks[size])
        channels.append(tensors[f"enc.{size}x{size}_block{last}.conv1.weight"].shape[0])
        attends.append(f"enc.{size}x{size}_block0.qkv.weight" in tensors)
    labels = tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0
    embedding = tensors["map_layer0.weight"].shape[0]
    in_channels = tensors[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"].shape[1]
    layers = len(blocks[sizes[0]])
    return unet_options(sizes[0], channels, layers, attends, labels, embedding, in_channels)


INSIDE = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {"norm2": "group_norm", "proj": "to_out.0"}
OUTSIDE = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


def diffusers_weights(tensors, config):
    """EDM's weights under diffusers' names. The table of labels gets a row of zeros: no label.
    config: the network's."""
    sizes = [config.sample_size // 2**level for level in range(len(config.block_out_channels))]
    renamed = {}
    for name, tensor in tensors.items():
        first, *rest = name.split(".")
        if name.endswith("resample_filter"):
            if not (tensor == 0.25).all():
                raise UserError(
                    f"the filter {name} is not the mean of four pixels that diffusers resamples by"
                )
        elif first in OUTSIDE:
            renamed[f"{OUTSIDE[first]}.{rest[0]}"] = tensor
        elif first == "map_label":
            renamed["class_embedding.weight"] = torch.cat([tensor.T, torch.zeros(1, len(tensor))])
        elif first in ("enc", "dec"):
            renamed |= block_weights(first, rest, tensor, sizes)
        else:
            raise UserError(f"EDM's network has an unknown weight {name}")
    return renamed


def block_weights(side, rest, tensor, sizes):
    """One weight of the encoder or decoder under diffusers' names, of which q, k, v are three."""
    size, what = re.fullmatch(r"(\d+)x\d+_(\w+)", rest[0]).groups()
    if what == "conv":
        return {f"conv_in.{rest[1]}": tensor}
    level = sizes.index(int(size))
    up = len(sizes) - 1 - level
    digits = re.sub(r"\D", "", what)
    place = {
        "enc_block": f"down_blocks.{level}.resnets.{digits}",
        "enc_down": f"down_blocks.{level - 1}.downsamplers.0",
        "dec_in": f"mid_block.resnets.{digits}",
        "dec_block": f"up_blocks.{up}.resnets.{digits}",
        "dec_up": f"up_blocks.{up - 1}.upsamplers.0",
    }[f"{side}_{re.sub(r'[0-9]', '', what)}"]
    inside, kind = rest[1], rest[2]
    attention = place.replace("resnets", "attentions")
    if inside in ("qkv", "proj") and kind == "weight":
        tensor = tensor[:, :, 0, 0]  # 1x1 convolutions, where diffusers has linear layers
    if inside == "qkv":  # rows are (head * 64 + channel) * 3 + which
        return {f"{attention}.to_{part}.{kind}": tensor[k::3] for k, part in enumerate("qkv")}
    if inside in ATTENTION:
        return {f"{attention}.{ATTENTION[inside]}.{kind}": tensor}
    return {f"{place}.{INSIDE[inside]}.{kind}": tensor}


def network_of(tensors):
    """Raises UserError where a weight is missing or does not fit its neighbours."""
    with in_one_line("this is not EDM's network with the ADM architecture"):
        network = diffusers.UNet2DModel(**architecture(tensors))
        network.load_state_dict(diffusers_weights(tensors, network.config))
    return network


def student_weights(weights, config):
    """The weights of one of DMD2's students, which have EDM's names, under diffusers'; any other's
    as they are."""
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if "map_layer0.weight" not in weights:
        return weights
    return diffusers_weights(weights, config)


# ----------------------------------------------------------------------------- precision and groups


class Float32Linear(torch.nn.Linear):
    """Computes in float32 under autocast too."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


@functools.cache
def network_class():
    """Made when it is asked for: diffusers takes three seconds to import its own."""

    class UNet2DModel(diffusers.UNet2DModel):
        """diffusers casts the sinusoids of time to `dtype`. In bfloat16 the embedding's error would
        be several times the step between two of the 1,000 noise levels."""

        @property
        def dtype(self):
            return torch.float32

    return UNet2DModel


def prepare_network(network):
    """The network with EDM's numbers of groups, min(32, channels / 4) a layer where diffusers has
    one number for all, and with its embedding of time in float32."""
    network.__class__ = network_class()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = min(32, module.num_channels // 4)
        if name.startswith("time_embedding.linear") or name.endswith("time_emb_proj"):
            module.__class__ = Float32Linear
    return network


def with_row_for_no_label(network):
    """A table of labels whose last row is not zero gets one that is, for no label."""
    table = network.class_embedding.weight.data
    if table[-1].any():
        extended = torch.cat([table, torch.zeros(1, table.shape[1])])
        network.class_embedding = torch.nn.Embedding.from_pretrained(extended, freeze=False)
        network.register_to_config(num_class_embeds=len(extended))
    return network


# ----------------------------------------------------------------------------- labels


def label_names(path, rows, assets):
    """The lines of labels.txt in the model's folder or beside its pickle; of 1,000 labels without
    one, ImageNet's. rows: of the network's table."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    file = folder / "labels.txt"
    if not file.is_file():
        if rows not in (1000, 1001):
            return []
        file = assets / "imagenet_labels.txt"
    names = file.read_text(encoding="utf-8").splitlines()
    if len(names) not in (rows - 1, rows):
        raise UserError(f"{file} has {len(names)} names for {rows - 1} labels")
    return names


def find_label(prompt, names, labels, model_name):
    """The number of a class that is given by number or name; `labels` for the empty prompt."""
    known = {name.lower(): label for label, name in reversed(list(enumerate(names)))}
    known |= {"": labels} | {str(label): label for label in range(labels)}
    asked = prompt.strip().lower()
    if asked in known:
        return known[asked]
    close = difflib.get_close_matches(asked, known, 1)
    hint = f". Did you mean {close[0]!r}?" if close and not asked.isdecimal() else ""
    listed = f", or their names, such as {names[0]!r}" if names else ""
    raise UserError(
        f"{prompt!r} is no prompt of {model_name}: its prompts are the labels 0 to "
        f"{labels - 1}{listed}{hint}"
    )


# ----------------------------------------------------------------------------- loading


def is_edm(path):
    """Whether that is a pickle, or a folder with a UNet2DModel."""
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file():
        return read_json(path / "config.json").get("_class_name") == "UNet2DModel"
    return path.suffix == ".pkl"


def load_network(path):
    """The UNet2DModel of EDM's pickle or of a diffusers folder."""
    if not Path(path).is_dir():
        return network_of(read_pickle(path))
    with in_one_line(f"the model {path} cannot be loaded"):
        network = load_pretrained(diffusers.UNet2DModel, path, use_safetensors=True)
    config = network.config
    if config.num_class_embeds is None or config.in_channels != config.out_channels:
        raise UserError(f"the model {path} is no class-conditional network of EDM's kind")
    return network


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("model", help="EDM's pickle")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new diffusers folder")
    args = parser.parse_args(arguments)
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} exists already")
    network = network_of(read_pickle(args.model))
    replace_folder(args.out, network.save_pretrained)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    labels = network.config.num_class_embeds - 1
    print(f"{args.out}: {millions:.1f} million parameters, {labels} labels")


if __name__ == "__main__":
    cli.run(main)
