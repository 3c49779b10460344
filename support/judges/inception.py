"""Inception features, for FID and its kin."""

from pathlib import Path

import torch

from support.checkpoint import file_digest
from support.cli import UserError, first_line, import_package
from support.protocols import clean_resize
from support.weights import read_weights

FLAGS = {
    "--inception": {
        "metavar": "FILE",
        "help": "weights of the Inception network, weights-inception-2015-12-05-6726825d.pth "
        "(default: where torch-fidelity keeps them)",
    }
}
# The weights that FID is defined by: Inception of 2015-12-05, as torch-fidelity converted it. The
# name ends in the beginning of its SHA-256.
URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


def import_fidelity():
    return import_package("torch_fidelity", "--inception", "torch-fidelity torchvision")


class Inception:
    """2,048 features and 1,008 logits of torch-fidelity's network: TensorFlow's to rounding."""

    def __init__(self, path, resize, device):
        make = import_fidelity().FeatureExtractorInceptionV3
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"there is no file of Inception weights at {path}: curl -LO {URL}, then "
                f"--inception {Path(URL).name}"
            )
        read_weights(path, "the Inception network")  # torch-fidelity would execute what is in it
        layers = ["2048", "logits_unbiased"]
        try:
            network = make("inception-v3-compat", layers, feature_extractor_weights_path=str(path))
        except (RuntimeError, KeyError) as error:
            why = first_line(error)
            raise UserError(f"--inception {path} is no network of torch-fidelity: {why}") from None
        self.network, self.resize, self.device = network.to(device), resize, device
        digest = file_digest(path)
        self.published = digest.startswith(Path(URL).stem.rsplit("-", 1)[-1])
        self.about = {"inception": digest, "resize": resize}

    @torch.no_grad()
    def __call__(self, images, views, prompts):
        found = {}
        for name, seen in views.items():
            seen = clean_resize(seen) if self.resize == "clean" else seen * 255
            features, logits = self.network(seen.round().to(torch.uint8).to(self.device))
            found[f"features {name}"] = features.cpu()
            found[f"logits {name}"] = logits.cpu()
        return found


def in_cache():
    """Where torch-fidelity keeps what it has fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name


def make(args, setting):
    if not (args.inception or args.reference):
        return []
    path = args.inception or in_cache()
    return [Inception(path, setting.protocol.resize, args.device)]
