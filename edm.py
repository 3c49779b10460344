"""EDM's class-conditional networks (2206.00364), ImageNet-64 above all: the released pickle read without executing anything in it, as a
diffusers UNet2DModel.

    python edm.py edm-imagenet-64x64-cond-adm.pkl --out imagenet64          # a diffusers directory, which --model then takes
    python train.py @recipes/imagenet64_dmd2.args --model edm-imagenet-64x64-cond-adm.pkl --real imagenet-64x64_lmdb

To the rest of the code it is one more model: its schedule is a table (models.edm_schedule), its network an x0 predictor with EDM's
preconditioning (models.x0_from_output), its condition a class label.
"""

import collections
import difflib
import io
import pickle
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel as DiffusersUNet

import data
import errors
import models
from errors import UserError


# ---------------------------------------------------------------------------------------------------- the released pickle

class Record:
    """A thing of a class that we do not have: what it holds, and nothing that runs."""

    def __init__(self, *arguments):
        self.state = arguments[0]["state"] if arguments and isinstance(arguments[0], dict) and "state" in arguments[0] else {}

    def __setstate__(self, state):
        self.state = state


class Values(dict):
    """dnnlib.util.EasyDict, without its attributes."""

    def __setstate__(self, state):
        self.update(state)


def load_storage(content):
    """torch.storage._load_from_bytes, which would execute what is in the bytes."""
    with warnings.catch_warnings():  # of storages with a type, which is what the file has
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def rebuild_tensor(storage, offset, size, stride, *rest):
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if min((offset, *size, *stride), default=0) < 0 or last >= storage._untyped_storage.nbytes() // storage.dtype.itemsize and 0 not in size:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


def encode_latin1(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


def nothing(*arguments):
    """Of numpy's scalars and dtypes, which are only initialisation constants there."""
    return Record()


STANDS_FOR = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Record,
    ("torch.nn.modules.container", "ModuleDict"): Record,
    ("dnnlib.util", "EasyDict"): Values,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): load_storage,
    ("numpy.core.multiarray", "scalar"): nothing, ("numpy._core.multiarray", "scalar"): nothing, ("numpy", "dtype"): nothing,
    ("builtins", "set"): set, ("__builtin__", "set"): set, ("_codecs", "encode"): encode_latin1,
}


class Unpickler(pickle.Unpickler):
    """Gives stand-ins for what EDM's pickles name, and nothing else. The source text in them stays text."""

    def find_class(self, module, name):
        if (module, name) not in STANDS_FOR:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and nothing in a file is executed")
        return STANDS_FOR[module, name]


def tensors_of(record, prefix=""):
    """{name: tensor} as the module's state_dict would have been."""
    state, found = record.state, {}
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + name: tensor for name, tensor in state.get(kind, {}).items() if tensor is not None}
    for name, module in state.get("_modules", {}).items():
        if module is not None:
            found |= tensors_of(module, f"{prefix}{name}.")
    return found


def read_pickle(path):
    """EDM's weights by EDM's names."""
    try:
        with open(path, "rb") as file:
            content = Unpickler(file).load()
        tensors = {name.removeprefix("model."): tensor.float() for name, tensor in tensors_of(content["ema"]).items()}
    except OSError as error:
        raise UserError(f"the model {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"the model {path} is not one of EDM's pickles: {str(error) or type(error).__name__}") from None
    if "map_layer0.weight" not in tensors or "out_conv.weight" not in tensors:
        raise UserError(f"the model {path} is not EDM's network with the ADM architecture: it has no map_layer0 or out_conv")
    return tensors


# ---------------------------------------------------------------------------------------------------- as a diffusers UNet

INSIDE = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2", "skip": "conv_shortcut"}
ATTENTION = {"norm2": "group_norm", "proj": "to_out.0"}


def unet_options(size, channels, layers, attends, labels, embedding=None, in_channels=3):
    """UNet2DModel's options for EDM's ADM architecture: channels of each level, residual blocks a level, at which levels there is attention; a
    row of the table of labels more, for no label."""
    return dict(sample_size=size, in_channels=in_channels, out_channels=in_channels, center_input_sample=False, time_embedding_type="positional", freq_shift=0,
                flip_sin_to_cos=True, time_embedding_dim=embedding or 4 * channels[0], block_out_channels=tuple(channels), layers_per_block=layers,
                down_block_types=tuple("AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in attends),
                up_block_types=tuple("AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in reversed(attends)),
                mid_block_type="UNetMidBlock2D", add_attention=True, mid_block_scale_factor=1, downsample_type="resnet", upsample_type="resnet",
                resnet_time_scale_shift="scale_shift", attention_head_dim=64, norm_num_groups=min(32, channels[0] // 4), attn_norm_num_groups=min(32, channels[-1] // 4),
                norm_eps=1e-5, act_fn="silu", class_embed_type=None, num_class_embeds=labels + 1, dropout=0.0)


IMAGENET64 = dict(size=64, channels=(192, 384, 576, 768), layers=3, attends=(False, True, True, True), labels=1000)  # edm-imagenet-64x64-cond-adm


def architecture(tensors):
    """unet_options, read off EDM's weights."""
    sizes = sorted({int(match[1]) for name in tensors if (match := re.match(r"enc\.(\d+)x\1_", name))}, reverse=True)
    per_level = [sorted({int(match[1]) for name in tensors if (match := re.match(rf"enc\.{size}x{size}_block(\d+)\.", name))}) for size in sizes]
    channels = [tensors[f"enc.{size}x{size}_block{blocks[-1]}.conv1.weight"].shape[0] for size, blocks in zip(sizes, per_level)]
    attends = [f"enc.{size}x{size}_block0.qkv.weight" in tensors for size in sizes]
    labels = tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0
    return unet_options(sizes[0], channels, len(per_level[0]), attends, labels, tensors["map_layer0.weight"].shape[0],
                        tensors[f"enc.{sizes[0]}x{sizes[0]}_conv.weight"].shape[1])


def diffusers_weights(tensors, sizes):
    """EDM's weights under diffusers' names. The table of labels gets one more row, of zeros: no label."""
    level = {size: number for number, size in enumerate(sizes)}
    renamed = {}
    for name, tensor in tensors.items():
        first, *rest = name.split(".")
        if name.endswith("resample_filter"):
            if not (tensor == 0.25).all():
                raise UserError(f"the filter {name} is not the mean of four pixels, which diffusers resamples by")
            continue
        if first in ("map_layer0", "map_layer1"):
            renamed[f"time_embedding.linear_{int(first[-1]) + 1}.{rest[0]}"] = tensor
        elif first == "map_label":
            renamed["class_embedding.weight"] = torch.cat([tensor.T, torch.zeros(1, len(tensor))])
        elif first in ("out_norm", "out_conv"):
            renamed[f"conv_{'norm_out' if first == 'out_norm' else 'out'}.{rest[0]}"] = tensor
        elif first in ("enc", "dec"):
            size, what = re.fullmatch(r"(\d+)x\d+_(\w+)", rest[0]).groups()
            number, up = level[int(size)], len(sizes) - 1 - level[int(size)]
            digits = re.sub(r"\D", "", what)
            if what == "conv":
                renamed[f"conv_in.{rest[1]}"] = tensor
                continue
            place = {"enc_block": f"down_blocks.{number}.resnets.{digits}", "enc_down": f"down_blocks.{number - 1}.downsamplers.0",
                     "dec_in": f"mid_block.resnets.{digits}", "dec_block": f"up_blocks.{up}.resnets.{digits}", "dec_up": f"up_blocks.{up - 1}.upsamplers.0"}
            inside, kind, place = rest[1], rest[2], place[f"{first}_{re.sub(r'[0-9]', '', what)}"]
            attention = place.replace("resnets", "attentions")
            if inside in ("qkv", "proj") and kind == "weight":
                tensor = tensor[:, :, 0, 0]  # 1x1 convolutions, where diffusers has linear layers
            if inside == "qkv":  # rows are (head * 64 + channel) * 3 + which
                renamed |= {f"{attention}.to_{part}.{kind}": tensor[k::3] for k, part in enumerate("qkv")}
            elif inside in ATTENTION:
                renamed[f"{attention}.{ATTENTION[inside]}.{kind}"] = tensor
            else:
                renamed[f"{place}.{INSIDE[inside]}.{kind}"] = tensor
        else:
            raise UserError(f"EDM's network has an unknown weight {name}")
    return renamed


def network_of(tensors):
    """Raises UserError where a weight is missing or has another shape than its neighbours ask for."""
    try:
        options = architecture(tensors)
        network = DiffusersUNet(**options)
        sizes = [options["sample_size"] // 2 ** k for k in range(len(options["block_out_channels"]))]
        network.load_state_dict(diffusers_weights(tensors, sizes))
    except (KeyError, IndexError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"this is not EDM's network with the ADM architecture: {' '.join(str(error).split())[:200]}") from None
    return network


# ---------------------------------------------------------------------------------------------------- precision and groups

class UNet2DModel(DiffusersUNet):
    """What tells noise levels apart stays in float32 when the rest computes in bfloat16: there the embedding's error would be several
    times the step between two of the 1,000 levels. (diffusers casts the embedding of time to `dtype`.)"""

    @property
    def dtype(self):
        return torch.float32


class Float32Linear(torch.nn.Linear):
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


def as_edm(network):
    """The network with the numbers of groups that EDM's layers have, min(32, channels / 4) each where diffusers has one for all, and its
    embedding of time in float32."""
    network.__class__ = UNet2DModel
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = min(32, module.num_channels // 4)
        if name.startswith("time_embedding.linear") or name.endswith("time_emb_proj"):
            module.__class__ = Float32Linear
    return network


# ---------------------------------------------------------------------------------------------------- the model

class Model:
    """What the rest of the code uses of models.Model. A prompt is a class, by its number or its name; without one, the last row of the network's
    table of labels, which is zero. Pictures are their own latents."""

    network_class = UNet2DModel
    encoder_print, decodes = None, True
    default_guidance, default_teacher_steps = 1.0, 18  # the latter as in EDM's generate.py

    def __init__(self, name, network, device="cpu", dtype=torch.float32, teacher_device=None):
        self.name, self.device, self.dtype, self.frozen_dtype = name, torch.device(device), dtype, torch.float32
        self.vae_device = self.text_device = self.device
        self.schedule, self.prediction = models.edm_schedule().to(self.device), "edm"
        self.teacher = self.denoiser(with_no_label(network).to(teacher_device or device, torch.float32)).requires_grad_(False).eval()
        self.origin = self.teacher
        self.labels, self.picture_size = network.config.num_class_embeds - 1, network.config.sample_size
        self.sample_shape = (network.config.in_channels, self.picture_size, self.picture_size)
        self.names = label_names(name, self.labels)
        self.prompts = [str(label) for label in range(self.labels)]
        self.sample_prompts = self.prompts[::max(1, self.labels // 8)][:8]

    def denoiser(self, network):
        return models.Denoiser(as_edm(network), self.schedule, self.prediction, self.dtype)

    def encode(self, prompts):
        """Classes by number or by name, "" for none -> cond."""
        known = {name.lower(): label for label, name in reversed(list(enumerate(self.names)))}  # of two classes with one name the first
        known |= {"": self.labels} | {str(label): label for label in range(self.labels)}
        for prompt in prompts:
            if prompt.strip().lower() not in known:
                close = difflib.get_close_matches(prompt.lower(), known, 1)
                names = f", or their names, such as {self.names[0]!r}" if self.names else ""
                guess = f". Did you mean {close[0]!r}?" if close and not prompt.isdecimal() else ""
                raise UserError(f"{prompt!r} is no prompt of {self.name}: its prompts are the labels 0 to {self.labels - 1}{names}{guess}")
        return {"class_labels": torch.tensor([known[prompt.strip().lower()] for prompt in prompts], device=self.device)}

    def caption(self, prompt):
        """What a picture's column is called."""
        return f"{prompt} {self.names[int(prompt)]}" if self.names and prompt.isdecimal() else prompt

    @property
    def uncond(self):
        return self.encode([""])

    def pixels(self, x):
        return x

    def decode(self, x, batch_size=None):
        """(B, 3, H, W) in about [-1, 1] -> in [0, 1], on the CPU."""
        return (x.float().cpu() / 2 + 0.5).clamp(0, 1)

    def latents(self, pictures):
        return pictures.to(self.device)

    def own_names(self, weights):
        """DMD2's students, whose weights have EDM's names, as ours; any other as they are."""
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        if "map_layer0.weight" not in weights:
            return weights
        size = self.picture_size
        return diffusers_weights(weights, [size // 2 ** k for k in range(len(self.origin.network.config.block_out_channels))])


def label_names(path, labels):
    """Of labels.txt in the model's folder or beside its pickle, a name a line; of 1,000 labels without one, ImageNet's."""
    file = (Path(path).parent if Path(path).is_file() else Path(path)) / "labels.txt"
    if not file.is_file():
        if labels != 1000:
            return []
        file = data.ASSETS / "imagenet_labels.txt"
    names = file.read_text(encoding="utf-8").splitlines()
    if len(names) != labels:
        raise UserError(f"{file} has {len(names)} names for {labels} labels")
    return names


def with_no_label(network):
    """A table of labels without a row for no label gets one, of zeros."""
    table = network.class_embedding.weight.data
    if table[-1].any():
        network.class_embedding = torch.nn.Embedding.from_pretrained(torch.cat([table, torch.zeros(1, table.shape[1])]), freeze=False)
        network.register_to_config(num_class_embeds=len(table) + 1)
    return network


def is_edm(path):
    """Whether that is a pickle, or a folder with a UNet2DModel."""
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file():
        return models.read_json(path / "config.json").get("_class_name") == "UNet2DModel"
    return path.suffix == ".pkl"


def load_model(path, device="cpu", dtype=torch.float32, teacher_device=None):
    path = Path(path)
    if not path.is_dir():
        return Model(str(path), network_of(read_pickle(path)), device, dtype, teacher_device)
    try:
        network = DiffusersUNet.from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, TypeError, RuntimeError, models.SafetensorError) as error:
        raise UserError(f"the model {path} cannot be loaded: {models.first_line(error)}") from None
    if network.config.num_class_embeds is None or network.config.in_channels != network.config.out_channels:
        raise UserError(f"the model {path} is not class-conditional, or gives other channels than it takes: EDM's networks only")
    return Model(str(path), network, device, dtype, teacher_device)


def main():
    import checkpoint
    parser = errors.Parser(__doc__)
    parser.add_argument("model", help="EDM's pickle")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the diffusers network")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} exists already")
    network = network_of(read_pickle(args.model))
    with models.quiet_libraries():
        checkpoint.replace_folder(args.out, network.save_pretrained)
    print(f"{args.out}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters, {network.config.num_class_embeds - 1} labels")


if __name__ == "__main__":
    errors.run(main)
