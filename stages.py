"""The training stages, one class each: first those of the edge generator, then of the HR generator.

A stage owns its networks and knows its losses; `training.fit` steps, logs and saves them.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import files
import images
import losses
import metrics
import weights
from device import Device
from inference import Enlarger, for_inference
from metrics import Metrics
from models import Discriminator, EdgeDiscriminator, EdgeGenerator, Generator, SRResNet
from tiles import SCALE

Batch = dict[str, Tensor]
Losses = dict[str, dict[str, Tensor]]  # for each network, its loss terms by name, to be summed
Samples = dict[str, list[np.ndarray]]  # images to log: columns of HR size, uint8, by title
HALF_LIFE = 250_000  # batches after which `halving` halves


def halving(step: int, recipe: "Recipe") -> float:
    """Returns the learning rate relative to its start, halved every 250 000 batches.

    Trainings shorter than that follow `cosine`.
    """
    if recipe.steps * recipe.accumulate < HALF_LIFE:
        return cosine(step, recipe)
    return 0.5 ** (step * recipe.accumulate // HALF_LIFE)


def cosine(step: int, recipe: "Recipe") -> float:
    """Returns the learning rate relative to its peak: a short warm-up, then a cosine to 2 %."""
    warm_up = min(200, recipe.steps / 10)
    return min(1, (step + 1) / warm_up) * (0.51 + 0.49 * math.cos(math.pi * step / recipe.steps))


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a stage."""

    steps: int  # updates of the weights
    crops: tuple[int, int]  # smallest and largest, LR pixels a side
    batch_size: int = 8  # crops per batch in each process
    accumulate: int = 1  # batches per step
    learning_rate: float = 4e-4  # of Adam, peak value
    trunk_rate: float = 1.0  # trunk's learning rate relative to the other layers'
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam
    schedule: Callable[[int, "Recipe"], float] = cosine
    live_norms: float = 0.85  # fraction of the steps before the generator's batch norms are frozen
    color: bool = False  # vary colours, besides flips and quarter turns
    jpeg: float = 0.5  # probability that an LR crop passes through JPEG
    edges: tuple[str, ...] = ("lr", "hr")  # Canny edges the losses need
    true_edges: float = 0.0  # fraction of each batch given ground-truth edges, not predicted ones


class Stage:
    """One training stage: its networks, `gen` and perhaps `dis`, on the device, and its losses.

    By default it trains the HR generator, without edges, on squared error.
    """

    recipe: Recipe
    name: ClassVar[str]  # of its runs
    publishes: ClassVar[str]  # name of its weights, mostly its own
    kinds: ClassVar[tuple[type[nn.Module], ...]]  # accepted generators; a new one is of the first
    starts_from: ClassVar[str] = ""  # name of the weights it starts from unless `--init` is given
    needs: ClassVar[tuple[str, ...]] = ()  # other networks whose weights must exist
    best_by: ClassVar[str] = "SSIM"  # metric that selects the best weights; "": the latest are best
    compared_with: ClassVar[str] = "bicubic"  # name of the baseline that `reference` measures
    judge_rate: ClassVar[float] = 1.0  # discriminator's learning rate relative to the generator's
    edge_generator: EdgeGenerator | None = None  # for predicted edges, see `for_inference`

    def __init__(self, recipe: Recipe, options: Namespace, device: Device) -> None:
        """Creates the networks from the weights they start from.

        Args:
            options: `init`, `ckpts` and `vgg` of the command line.

        Raises:
            UserError: a file to start from is missing or does not fit.
        """
        self.recipe, self.device = recipe, device
        self.networks: dict[str, nn.Module] = {}
        self.generator = self.add("gen", self.start(options))

    def load(self, path: Path, *kinds: type[nn.Module]) -> nn.Module:
        """Returns the network in a weight file; the first process reads it for all."""
        return weights.build_network(self.device.from_first(weights.load_state, path), path, *kinds)

    def start(self, options: Namespace) -> nn.Module:
        """Returns the generator that training starts from, a new one if there are no weights."""
        weights_of = self.starts_from
        path = options.init or (weights_of and files.weight_path(options.ckpts, weights_of))
        return self.load(path, *self.kinds) if path else self.kinds[0]()

    def add(self, key: str, network: nn.Module) -> nn.Module:
        """Registers a network as one that the stage trains; returns it."""
        self.networks[key] = self.device.place(network).train()
        return network

    def parameter_groups(self, key: str) -> list[dict]:
        """Returns a network's parameter groups for Adam, each with a learning-rate `factor`."""
        trained = [each for each in self.networks[key].parameters() if each.requires_grad]
        return [{"params": trained, "factor": self.judge_rate if key == "dis" else 1.0}]

    def add_judges(self, options: Namespace, width: int, **perceptual: object) -> None:
        """Adds a discriminator of images, and the perceptual loss with the given arguments."""
        self.discriminator = self.add("dis", Discriminator(width))
        state = self.device.from_first(losses.vgg_state, options.vgg)
        self.perceptual = self.device.place(losses.PerceptualLoss(state, **perceptual))

    def answers(self, sr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns `judge`'s logits and the perceptual loss, a scalar, all float32."""
        with self.device.autocast():
            return *judge(self.discriminator, hr, sr), self.perceptual(sr, hr)

    def generate(self, batch: Batch) -> Tensor:
        """Returns HR images (N, 3, 4H, 4W) in [0, 1], float32."""
        with self.device.autocast():
            return self.generator(batch["lr"])

    def loss_terms(self, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
        """Returns the weighted terms of each network's loss, and scalars to log.

        Args:
            batch: from `PairedTiles`, on the device, images and edges float in [0, 1].
        """
        sr = self.generate(batch)
        return {"gen": {"mse": losses.squared_error(sr, batch["hr"])}}, {}

    def make_enlarger(self, network: nn.Module) -> Enlarger:
        """Returns an enlarger that makes whole images with a generator, for validation."""
        return Enlarger(network, self.edge_generator, self.device)

    def upscale(self, enlarger: Enlarger, lr: np.ndarray, hr: np.ndarray) -> np.ndarray:
        """Returns the HR image of an LR image, with the kind of edges the stage trains for."""
        return enlarger(lr)

    def compare(self, sr: np.ndarray, hr: np.ndarray) -> Metrics:
        """Returns the metrics of an image, `(4H, 4W, 3)` uint8."""
        return metrics.compare(sr, hr, self.device)

    def validate(self, enlarger: Enlarger, lr: np.ndarray, hr: np.ndarray) -> Metrics:
        """Returns a generator's metrics for one LR and HR image, uint8."""
        return self.compare(self.upscale(enlarger, lr, hr), hr)

    def reference(self, lr: np.ndarray, hr: np.ndarray) -> Metrics:
        """Returns the baseline's metrics: those of the LR image, or its edges, simply enlarged."""
        return self.compare(images.bicubic(lr, SCALE), hr)

    def samples(self, enlarger: Enlarger, lr: np.ndarray, hr: np.ndarray) -> Samples:
        """Returns the samples to log for one LR and HR image: images, edges, or both."""
        found = {}
        if enlarger.generator:
            columns = [images.repeat(lr, SCALE), self.upscale(enlarger, lr, hr), hr]
            found["LR, generated, HR"] = columns
        if enlarger.edge_generator:
            plain, true = images.repeat(images.canny(lr), SCALE), images.canny(hr)
            found["edges of LR, predicted, of HR"] = [plain, enlarger.predict_edges(lr), true]
        return found

    def better(self, found: Metrics, than: Metrics) -> bool:
        """Returns whether weights are better than others, by their metrics; {} is the worst."""
        if not self.best_by:
            return bool(found)
        return found.get(self.best_by, -math.inf) > than.get(self.best_by, -math.inf)


def judge(
    discriminator: nn.Module, real: Tensor, made: Tensor, *condition: Tensor
) -> tuple[object, object, object]:
    """Returns a discriminator's output for real images, and twice for generated ones.

    The second output is for its own loss and sends no gradient to the generator; the third is for
    the generator's loss and sends none to the discriminator's weights.
    """
    on_real, on_detached = (discriminator(*condition, each) for each in (real, made.detach()))
    discriminator.requires_grad_(False)
    on_made = discriminator(*condition, made)
    discriminator.requires_grad_(True)
    return on_real, on_detached, on_made


def scores(on_hr: Tensor, on_sr: Tensor) -> dict[str, Tensor]:
    """Returns the means of a discriminator's outputs, to log."""
    return {"discriminator/hr": on_hr.float().mean(), "discriminator/sr": on_sr.float().mean()}


# The edge generator ---------------------------------------------------------------------------


class EdgePreModel(Stage):
    """The edge generator, on cross-entropy with the Canny edges of HR."""

    name, publishes = "EdgePreModel", "EdgeModel"
    recipe = Recipe(steps=5_000, crops=(32, 32))
    kinds = (EdgeGenerator,)
    best_by, compared_with = "F1", "edges of LR"

    def logits(self, batch: Batch) -> Tensor:
        """Returns the logits of HR edges, (N, 1, 4H, 4W), float32."""
        with self.device.autocast():
            return self.generator.logits(batch["lr"], batch["lr_edges"])

    def loss_terms(self, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
        logits = self.logits(batch)
        terms = {"cross-entropy": losses.edge_cross_entropy(logits, batch["hr_edges"])}
        return {"gen": terms}, self.scalars(logits.sigmoid(), batch)

    def scalars(self, edges: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Returns precision and recall of a batch, without tolerance."""
        precision, recall = metrics.precision_recall(edges, batch["hr_edges"])
        return {"edges/precision": precision, "edges/recall": recall}

    def make_enlarger(self, network: nn.Module) -> Enlarger:
        return Enlarger(None, network, self.device)

    def validate(self, enlarger: Enlarger, lr: np.ndarray, hr: np.ndarray) -> Metrics:
        return metrics.compare_edges(enlarger.predict_edges(lr), images.canny(hr), self.device)

    def reference(self, lr: np.ndarray, hr: np.ndarray) -> Metrics:
        enlarged = images.repeat(images.canny(lr), SCALE)
        return metrics.compare_edges(enlarged, images.canny(hr), self.device)


class EdgeModel(EdgePreModel):
    """The edge generator against its discriminator (Edge-Informed SISR, section 3.1)."""

    name = publishes = "EdgeModel"
    starts_from = "EdgeModel"
    recipe = Recipe(
        steps=20_000, crops=(64, 64), learning_rate=1e-4, betas=(0.0, 0.9), schedule=halving
    )

    def __init__(self, recipe: Recipe, options: Namespace, device: Device) -> None:
        super().__init__(recipe, options, device)
        width = self.generator.arguments["width"]
        self.discriminator = self.add("dis", EdgeDiscriminator(width))

    def loss_terms(self, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
        edges = self.logits(batch).sigmoid()
        with self.device.autocast():
            answers = judge(self.discriminator, batch["hr_edges"], edges, batch["hr"])
        (on_hr, hr_features), (on_detached, _), (on_predicted, features) = answers
        generator = {
            "adversarial": losses.hinge_generator(on_predicted.float()),
            "feature matching": losses.feature_matching(features, hr_features),
        }
        hinge = losses.hinge_discriminator(on_hr.float(), on_detached.float())
        watched = self.scalars(edges, batch) | scores(on_hr, on_detached)
        return {"gen": generator, "dis": {"hinge": hinge}}, watched


# The HR generator -----------------------------------------------------------------------------


class SRResNetModel(Stage):
    """The HR generator without edges, which is the SRResNet of Ledig et al."""

    name = publishes = "SRResNet"
    kinds = (SRResNet,)
    recipe = Recipe(steps=20_000, crops=(24, 24), batch_size=16, edges=())


class SRGANModel(SRResNetModel):
    """The SRResNet against a discriminator, with ESRGAN's losses, for texture."""

    name = publishes = "SRGAN"
    starts_from = "SRResNet"
    best_by = ""  # no metric here can judge adversarial training
    judge_rate = 2.0  # or it never notices what the generator paints (TTUR, arXiv 1706.08500)
    recipe = Recipe(steps=20_000, crops=(32, 32), learning_rate=1e-4, live_norms=0, edges=())

    def __init__(self, recipe: Recipe, options: Namespace, device: Device) -> None:
        super().__init__(recipe, options, device)
        width = self.generator.arguments["width"] // 2  # a full one wins, and slows a step by 40 %
        layers = losses.RELU1_2, losses.RELU2_2, losses.RELU3_1
        self.add_judges(options, width, layers=layers, distance=F.l1_loss, smooth=True)

    def loss_terms(self, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
        hr = batch["hr"]
        sr = self.generate(batch)
        on_hr, on_detached, on_sr, perceptual = self.answers(sr, hr)
        terms = losses.texture_terms(sr, hr, perceptual, on_sr, on_hr.detach())
        relativistic = losses.relativistic(on_hr, on_detached)
        return {"gen": terms, "dis": {"relativistic": relativistic}}, scores(on_hr, on_detached)

    def compare(self, sr: np.ndarray, hr: np.ndarray) -> Metrics:
        """Returns the metrics of an image, and the distance of its features from HR's."""
        hr = hr[: sr.shape[0], : sr.shape[1]]
        distance = metrics.by_strips(self.perceptual, sr, hr, self.device)
        return super().compare(sr, hr) | {"VGG19 distance": distance}


class EdgeStageModel(Stage):
    """The HR generator's edge stage alone, on ground-truth edges; the trained trunk is frozen."""

    name = publishes = "EdgeStageModel"
    kinds = SRResNet, Generator
    starts_from = "SRResNet"
    recipe = Recipe(steps=2_000, crops=(24, 24), learning_rate=5e-4, jpeg=0.0, edges=("hr",))

    def __init__(self, recipe: Recipe, options: Namespace, device: Device) -> None:
        super().__init__(recipe, options, device)
        for module in self.generator.trunk_layers:
            module.requires_grad_(False).eval()

    def start(self, options: Namespace) -> nn.Module:
        network = super().start(options)
        return network if isinstance(network, Generator) else Generator.from_trunk(network)

    def generate(self, batch: Batch) -> Tensor:
        with self.device.autocast():
            return self.generator(batch["lr"], batch["hr_edges"])

    def upscale(self, enlarger: Enlarger, lr: np.ndarray, hr: np.ndarray) -> np.ndarray:
        return enlarger(lr, images.canny(hr))


class PreModel(Stage):
    """The whole HR generator on squared error, half of every batch with ground-truth edges.

    Shown crisp edges and predicted ones, it learns to trust the former and to doubt the latter.
    """

    name = publishes = "PreModel"
    starts_from = "EdgeStageModel"
    kinds = (Generator,)
    needs = ("EdgeModel",)
    recipe = Recipe(steps=6_000, crops=(24, 24), trunk_rate=0.5, true_edges=0.5)

    def __init__(self, recipe: Recipe, options: Namespace, device: Device) -> None:
        super().__init__(recipe, options, device)
        path = files.weight_path(options.ckpts, "EdgeModel")
        self.edge_generator = for_inference(self.load(path, EdgeGenerator), self.device)

    def parameter_groups(self, key: str) -> list[dict]:
        (group,), rate = super().parameter_groups(key), self.recipe.trunk_rate
        if key != "gen" or rate == 1:
            return [group]
        slower = dict.fromkeys(p for each in self.generator.trunk_layers for p in each.parameters())
        rest = [p for p in group["params"] if p not in slower]
        return [group | {"params": rest}, group | {"params": [*slower], "factor": rate}]

    def hr_edges(self, batch: Batch) -> Tensor:
        """Returns HR edges (N, 1, 4H, 4W) in [0, 1]: first the true ones, then the predicted."""
        count = math.ceil(self.recipe.true_edges * len(batch["lr"]))
        predicted = self.edge_generator(batch["lr"][count:], batch["lr_edges"][count:])
        return torch.cat([batch["hr_edges"][:count], predicted])

    def generate(self, batch: Batch) -> Tensor:
        with self.device.autocast():
            return self.generator(batch["lr"], self.hr_edges(batch))

    def validate(self, enlarger: Enlarger, lr: np.ndarray, hr: np.ndarray) -> Metrics:
        found = super().validate(enlarger, lr, hr)
        true = self.compare(enlarger(lr, images.canny(hr)), hr)
        return found | {f"{key} true edges": true[key] for key in ("PSNR", "SSIM")}


class SRModel(PreModel):
    """The whole HR generator with all of Edge.SRGAN's losses, against its discriminator."""

    name = publishes = "SRModel"
    starts_from = "PreModel"
    best_by = ""
    recipe = Recipe(
        steps=250_000,
        crops=(16, 31),
        accumulate=2,
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        schedule=halving,
        live_norms=0,  # recoloured crops have different statistics from photographs
        color=True,
        true_edges=0.5,
    )

    def __init__(self, recipe: Recipe, options: Namespace, device: Device) -> None:
        super().__init__(recipe, options, device)
        self.add_judges(options, self.generator.arguments["width"])

    def loss_terms(self, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
        hr = batch["hr"]
        sr = self.generate(batch)
        on_hr, on_detached, on_sr, perceptual = self.answers(sr, hr)
        terms = losses.generator_terms(sr, hr, perceptual, on_sr)
        cross_entropy = losses.discriminator_loss(on_hr, on_detached, batch["softness"])
        watched = {"training SSIM": 1 - terms["ssim"], **scores(on_hr, on_detached)}
        return {"gen": terms, "dis": {"cross-entropy": cross_entropy}}, watched


ALL = EdgePreModel, EdgeModel, SRResNetModel, EdgeStageModel, PreModel, SRModel, SRGANModel
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in ALL}
