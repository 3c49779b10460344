"""Metrics of many images, from what judges said of each, with standard errors."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from support.cli import UserError
from support.judges.inception import import_fidelity

COVERAGE_SAMPLES, COVERAGE_REPEATS = 32, 3
DRAWS = 20  # of a bootstrap
GAUGES = ("mean", "deviation", "saturation")


@dataclass
class Metric:
    """A number with its standard error. values: what it is the mean of, sample by sample; draws:
    what it is on bootstrap draws. These give the error of a difference: smaller for rows of the
    same noise, and right for rows that have nothing to do with each other."""

    value: float
    error: float
    values: torch.Tensor | None = None
    draws: torch.Tensor | None = None

    def minus(self, other):
        """(difference, its standard error)"""
        if alike(self.values, other.values):
            difference = mean_metric(self.values - other.values)
            return difference.value, difference.error
        if alike(self.draws, other.draws):
            return self.value - other.value, (self.draws - other.draws).std().item()
        return self.value - other.value, math.hypot(self.error, other.error)


def alike(a, b):
    return a is not None and b is not None and len(a) == len(b)


def mean_metric(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    error = math.nan
    if len(values) > 1:
        error = (values.std() / math.sqrt(len(values))).item()
    return Metric(values.mean().item(), error, values=values)


# ----------------------------------------------------------------------------- Frechet distance


@dataclass
class Gaussian:
    """Mean (D,) and covariance (D, D), float64. factor (N, D), where fewer samples than dimensions
    gave it: covariance = factor^T factor."""

    mean: torch.Tensor
    covariance: torch.Tensor
    factor: torch.Tensor | None = None

    @classmethod
    def of(cls, features):
        features = features.double()
        factor = (features - features.mean(0)) / math.sqrt(len(features) - 1)
        small = factor if len(factor) < features.shape[1] else None
        return cls(features.mean(0), factor.T @ factor, small)

    @functools.cached_property
    def root(self):
        """The symmetric root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).         1706.08500, equation 6

    (C_a C_b)^(1/2) has the trace of (R_b C_a R_b)^(1/2), symmetric, R_b being C_b's root. Where C_a
    = F_a^T F_a that is the trace of (F_a C_b F_a^T)^(1/2), a smaller matrix; where both have
    factors, the sum of the singular values of F_a F_b^T.
    """
    if a.factor is None and b.factor is not None:
        a, b = b, a
    if a.factor is not None and b.factor is not None:
        cross = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    else:
        if a.factor is None:
            inner = b.root @ a.covariance @ b.root
        else:
            inner = a.factor @ b.covariance @ a.factor.T
        cross = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return (shift + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def frechet_metric(features, reference, seed):
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(DRAWS):
        index = torch.randint(len(features), (len(features),), generator=generator)
        draws.append(frechet_distance(Gaussian.of(features[index]), reference))
    draws = torch.tensor(draws, dtype=torch.float64)
    value = frechet_distance(Gaussian.of(features), reference)
    return Metric(value, draws.std().item(), draws=draws)


# ----------------------------------------------------------------------------- torch-fidelity's


def has_fidelity():
    try:
        return bool(import_fidelity())
    except UserError:
        return False


def library_metrics(features, logits, reference):
    """What torch-fidelity computes of features (N, D), Inception's logits (N, 1008) or None, and
    the reference's features or None."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    metrics = {}
    if reference is not None and logits is not None:  # kid's kernel is for Inception's features
        most = min(len(features), len(reference))
        subset = min(1000, most)
        found = kid_features_to_metric(features, reference, kid_subset_size=subset, verbose=False)
        # Where subsets share most of their samples, their spread says nothing.
        independent = min(100, most // subset)
        error = math.nan
        if independent >= 10:
            error = found["kernel_inception_distance_std"] / math.sqrt(independent)
        metrics["kid"] = Metric(found["kernel_inception_distance_mean"], error)
    if reference is not None and min(len(features), len(reference)) > 3:
        shares = calculate_precision_recall_part(features, reference)
        counts = (len(features), len(reference))
        for name, share, count in zip(("precision", "recall"), shares, counts):
            metrics[name] = Metric(share, math.sqrt(share * (1 - share) / count))
    if logits is not None and len(logits) >= 10:
        found = isc_features_to_metric(logits)
        error = found["inception_score_std"] / math.sqrt(10)
        metrics["is"] = Metric(found["inception_score_mean"], error)
    return metrics


# ----------------------------------------------------------------------------- repeated prompts


def places_of(prompts):
    """{prompt: [where it stands, ...]}"""
    places = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    return places


def coverage_samples(prompts):
    """How many samples of each prompt a repetition has: 32, or what there is."""
    counts = [len(own) // COVERAGE_REPEATS for own in places_of(prompts).values()]
    return min([COVERAGE_SAMPLES, *counts])


def coverage_metric(kinds, prompts, judge):
    """kinds (N,) of right images, -1 of wrong ones. Over the first 3 x 32 samples of each prompt,
    or fewer where there are fewer."""
    places, each = places_of(prompts), coverage_samples(prompts)
    if each == 0:
        return {}
    repeats = []
    for k in range(COVERAGE_REPEATS):
        shares = []
        for prompt, own in places.items():
            found = kinds[own[k * each : (k + 1) * each]].tolist()
            shares.append(len(set(found) - {-1}) / judge.kinds(prompt))
        repeats.append(sum(shares) / len(shares))
    metric = mean_metric(repeats)
    return {"coverage": dataclasses.replace(metric, values=None)}  # three numbers are no pairs


def diversity_metric(thumbnails, prompts):
    """Mean distance of the first 32 thumbnails of each prompt that has two or more."""
    distances = []
    for prompt, own in places_of(prompts).items():
        if prompt and len(own) > 1:
            x = thumbnails[own[:32]].flatten(1).float() / 255
            distance = torch.nn.functional.pdist(x).mean().item()
            distances.append(distance / math.sqrt(x.shape[1]))
    return {"diversity": mean_metric(distances)} if distances else {}


# ----------------------------------------------------------------------------- all of a row


def metrics_of(judged, prompts, count, reference, judge, seed):
    """{name: Metric} of a row: judged {name: (N, ...)} and its prompts, of which the first `count`
    are the protocol's, the rest repeated. judge: the embedded set's, or None."""
    metrics, main = {}, {name: values[:count] for name, values in judged.items()}
    if judge:
        metrics |= judge.metrics(main["kind"] >= 0, prompts[:count])
        several = slice(count if len(prompts) > count else 0, None)
        metrics |= coverage_metric(judged["kind"][several], prompts[several], judge)
    best = "whole" if "features whole" in main else "layout"
    titles = {"layout": "frechet", "whole": "fid"}
    for name, features in main.items():
        kind, _, view = name.partition(" ")
        if kind != "features" or len(features) < 2:
            continue
        known = reference.get(view, {})
        if "gaussian" in known:
            title = titles.get(view, f"{view} fid")
            metrics[title] = frechet_metric(features, known["gaussian"], seed)
        if view == best and has_fidelity():
            logits = main.get(f"logits {view}")
            metrics |= library_metrics(features, logits, known.get("features"))
    numbers = [name for name in main if main[name].dim() == 1 and name != "kind"]
    scores = [name for name in numbers if name not in GAUGES]
    for name in [*scores, *GAUGES]:
        metrics[name] = mean_metric(main[name])
    return metrics | diversity_metric(judged["thumbnail"], prompts)
