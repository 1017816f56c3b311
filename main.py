"""Step 2: trains Edge.SRGAN and makes HR tiles with it.

    python main.py                  # runs what the last lines leave uncommented
    python main.py train --resume   # runs one of them, with options
    torchrun --nproc-per-node=2 main.py train

Its commands: train_edges, pretrain, train, test, evaluate.
"""

import argparse
import contextlib
import csv
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import PairedTiles, canny, split
from inference import enlarge, for_inference, predict_edges, render
from losses import (
    PerceptualLoss,
    discriminator_loss,
    edge_cross_entropy,
    feature_matching,
    generator_loss,
    hinge_discriminator,
    hinge_generator,
    judge_edges,
    judge_picture,
    mean_of,
    precision_recall,
)
from models import (
    Discriminator,
    EdgeDiscriminator,
    EdgeGenerator,
    Generator,
    SRResNet,
    WeightError,
    load_network,
)
from tiles import (
    HR,
    JOINED,
    LR,
    OUTPUT,
    ROOT,
    SCALE,
    TEST,
    TILES,
    Grid,
    PictureError,
    cut_tile,
    find_pictures,
    find_tiles,
    join,
    picture_size,
    read_picture,
    read_stamp,
    replacing,
    tile_name,
    write_png,
)
from training import GRID_ROWS, Losses, Recipe, Runtime, Training, cosine, runtime, set_aside

# How each network is trained ------------------------------------------------------------------

EDGE_PIXELS = Recipe(  # the edge generator, on the cross-entropy
    steps=5_000,
    crops=(32, 32),
    betas=(0.9, 0.99),
    learning_rate=4e-4,
    schedule=cosine,
    edges=("lr", "hr"),
)
EDGES = Recipe(  # the edge generator, against its discriminator
    steps=20_000,
    crops=(64, 64),
    betas=(0.0, 0.9),
    edges=("lr", "hr"),
)
TRUNK = Recipe(  # the generator's LR stage by itself, as an SRResNet
    steps=10_000,
    crops=(24, 24),
    batch_size=16,
    learning_rate=4e-4,
    betas=(0.9, 0.99),
    schedule=cosine,
    edges=(),
)
PIXELS = Recipe(  # the whole generator, on the mean squared error
    steps=2_000,
    crops=(16, 40),
    accumulate=2,
    betas=(0.9, 0.99),
    learning_rate=2e-4,
    schedule=cosine,
    norms_until=0.5,
)
GAN = Recipe(  # the whole generator, on the full loss
    steps=500_000,
    crops=(16, 40),
    accumulate=2,
    colour=True,
    norms_until=0,  # crops are recoloured, pictures are not
)


CORES = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # a process


@dataclass(frozen=True)
class Settings:
    """What to work on and with; every field is also a command-line option."""

    root: Path = field(default=ROOT, metadata={"help": "holds TrainingSet/ and TestSet/"})
    ckpts: Path = field(default=ROOT / "ckpts", metadata={"help": "holds the weights"})
    ckpt: Path | None = field(
        default=None, metadata={"help": "generator to test; default: SRModel_gen.pth in --ckpts"}
    )
    runs: Path = field(default=ROOT / "runs", metadata={"help": "TensorBoard's files"})
    steps: int | None = field(default=None, metadata={"help": "updates, instead of the recipe's"})
    epochs: float | None = field(default=None, metadata={"help": "the same in passes over the set"})
    batch_size: int | None = field(
        default=None, metadata={"help": "crops a process, instead of the recipe's"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "at its highest, instead of the recipe's"}
    )
    crop: int | None = field(
        default=None, metadata={"help": "LR pixels a side of the crops, instead of the recipe's"}
    )
    held_out: int = field(default=4, metadata={"help": "pictures kept for validation"})
    resume: bool = field(default=False, metadata={"help": "go on where the last training stopped"})
    init: Path | None = field(
        default=None, metadata={"help": "weights the generator starts from, in a new training"}
    )
    vgg: Path | None = field(
        default=None, metadata={"help": "file with VGG19's weights; default: download them"}
    )
    true_edges: bool = field(
        default=False,
        metadata={"help": "train the generator on the HR pictures' own edges; use other --ckpts"},
    )
    tiles: int = field(default=6, metadata={"help": "as the pictures were sliced"})
    pad: int = field(default=8, metadata={"help": "as the pictures were sliced"})
    workers: int = field(
        default=max(1, min(8, CORES)), metadata={"help": "processes that load training data"}
    )
    precision: str = field(default="auto", metadata={"choices": ["auto", "fp32", "bf16"]})
    device: str = field(default="auto", metadata={"choices": ["auto", "cpu", "cuda"]})
    seed: int = field(default=0, metadata={"help": "of everything random"})


settings = Settings()


# Training -------------------------------------------------------------------------------------


def train_edges() -> None:
    """Trains the edge generator: first on pixels alone, then against its discriminator.

    The second part is that of Edge-Informed SISR, section 3.1.
    """
    with runtime(settings.device, settings.precision) as run:
        torch.manual_seed(settings.seed)
        generator, discriminator = starting(EdgeGenerator), EdgeDiscriminator()

        def pixel_losses(batch: dict[str, Tensor]) -> Losses:
            with run.autocast():
                predicted = generator(batch["lr"].float() / 255, batch["lr_edges"].float())
            loss = edge_cross_entropy(predicted, batch["hr_edges"].float())
            return edge_losses(batch, predicted, {"cross-entropy": loss})

        def losses(batch: dict[str, Tensor]) -> Losses:
            lr, hr = batch["lr"].float() / 255, batch["hr"].float() / 255
            lr_edges, true = batch["lr_edges"].float(), batch["hr_edges"].float()
            with run.autocast():
                predicted = generator(lr, lr_edges)
                on_true, true_features = discriminator(hr, true)
                on_fixed, _ = discriminator(hr, predicted.detach())
                with frozen(discriminator):
                    on_predicted, features = discriminator(hr, predicted)
            terms = {
                "adversarial": hinge_generator(on_predicted.float()),
                "feature matching": 10 * feature_matching(features, true_features),
            }
            judged = hinge_discriminator(on_true.float(), on_fixed.float())
            return edge_losses(batch, predicted, terms, judged)

        def judge(generator: nn.Module, lr: np.ndarray, hr: np.ndarray) -> dict[str, float]:
            return judge_edges(predict_edges(lr, generator, run), canny(hr))

        if run.rank == 0 and not settings.resume:
            set_aside(settings.ckpts, "EdgeModel")
        generator = fit(
            "EdgePreModel", EDGE_PIXELS, {"gen": generator}, pixel_losses, judge, "F1", run
        )
        networks = {"gen": generator, "dis": discriminator}
        fit("EdgeModel", EDGES, networks, losses, judge, "F1", run)


def edge_losses(
    batch: dict[str, Tensor],
    predicted: Tensor,
    terms: dict[str, Tensor],
    judged: Tensor | None = None,
) -> Losses:
    """What a batch of edges came to, with the precision and recall of the predicted ones."""
    true = batch["hr_edges"].float()
    precision, recall = precision_recall(predicted, true)
    minimise = {"gen": sum(terms.values())}
    scalars = {f"loss/{key}": value for key, value in terms.items()}
    if judged is not None:
        minimise["dis"] = scalars["loss/discriminator"] = judged
    return Losses(
        minimise,
        scalars | {"precision": precision, "recall": recall},
        lambda: {
            "LR edges, predicted, true": [nearest(batch["lr_edges"].float()), predicted, true]
        },
    )


def pretrain() -> None:
    """Trains the generator on pixels alone: first its LR stage, as an SRResNet, then the whole."""
    with runtime(settings.device, settings.precision) as run:
        torch.manual_seed(settings.seed)
        trunk, edge_generator = starting(SRResNet), EdgeStage(run)

        def trunk_losses(batch: dict[str, Tensor]) -> Losses:
            lr, hr = to_tanh(batch["lr"]), to_tanh(batch["hr"])
            with run.autocast():
                sr = trunk(lr)
            loss = F.mse_loss(sr, hr)
            return Losses({"gen": loss}, {"loss/mse": loss}, lambda: picture_grids(lr, sr, hr))

        def judge_trunk(generator: nn.Module, lr: np.ndarray, hr: np.ndarray) -> dict[str, float]:
            return judge_picture(lr, hr, enlarge(lr, generator, None, run))

        if run.rank == 0 and not settings.resume:
            set_aside(settings.ckpts, "PreModel")
        trunk = fit("SRResNet", TRUNK, {"gen": trunk}, trunk_losses, judge_trunk, "SSIM", run)
        generator = Generator.from_trunk(trunk.cpu())

        def losses(batch: dict[str, Tensor]) -> Losses:
            lr, hr = to_tanh(batch["lr"]), to_tanh(batch["hr"])
            hr_edges = edge_generator(batch)
            with run.autocast():
                sr = generator(lr, hr_edges * 2 - 1)
            loss = F.mse_loss(sr, hr)
            return Losses(
                {"gen": loss},
                {"loss/mse": loss},
                lambda: picture_grids(lr, sr, hr) | edge_grids(batch, hr_edges),
            )

        judge = edge_generator.judge
        fit("PreModel", PIXELS, {"gen": generator}, losses, judge, "SSIM", run)


def train() -> None:
    """Trains the generator with all of its losses against its discriminator: SRGAN."""
    with runtime(settings.device, settings.precision) as run:
        torch.manual_seed(settings.seed)
        usual = settings.ckpts / "PreModel_gen.pth"
        untrained = not (settings.init or usual.exists())
        recipe = replace(GAN, norms_until=1) if untrained else GAN
        generator, discriminator = starting(Generator, usual), Discriminator()
        edge_generator = EdgeStage(run)
        perceptual = run.place(PerceptualLoss(settings.vgg))

        def losses(batch: dict[str, Tensor]) -> Losses:
            lr, hr = to_tanh(batch["lr"]), to_tanh(batch["hr"])
            hr_edges = edge_generator(batch)
            with run.autocast():
                sr = generator(lr, hr_edges * 2 - 1)
                on_true, on_fixed = discriminator(hr), discriminator(sr.detach())
                with frozen(discriminator):
                    on_generated = discriminator(sr)
                perceived = perceptual(sr, hr)
            terms = generator_loss(sr, hr, perceived, on_generated)
            judged = discriminator_loss(on_true, on_fixed, batch["softness"])
            return Losses(
                {"gen": sum(terms.values()), "dis": judged},
                {f"loss/{key}": value for key, value in terms.items()}
                | {
                    "loss/discriminator": judged,
                    "discriminator/true": on_true.mean(),
                    "discriminator/generated": on_fixed.mean(),
                },
                lambda: picture_grids(lr, sr, hr) | edge_grids(batch, hr_edges),
            )

        networks = {"gen": generator, "dis": discriminator}
        fit("SRModel", recipe, networks, losses, edge_generator.judge, "SSIM", run)


def fit(
    name: str,
    recipe: Recipe,
    networks: dict[str, nn.Module],
    losses: Callable[[dict[str, Tensor]], Losses],
    judge: Callable[[nn.Module, np.ndarray, np.ndarray], dict[str, float]],
    best_by: str,
    run: Runtime,
) -> nn.Module:
    """Trains on the pictures of the training set that are not held out, as `settings` say.

    Args:
        judge: figures of a generator for one LR and HR picture.

    Returns:
        The averaged generator.
    """
    if settings.batch_size:
        recipe = replace(recipe, batch_size=settings.batch_size)
    if settings.learning_rate:
        recipe = replace(recipe, learning_rate=settings.learning_rate)
    if settings.crop:
        recipe = replace(recipe, crops=(settings.crop, settings.crop))
    if settings.true_edges and recipe.edges:
        recipe = replace(recipe, edges=("lr", "hr"))
    names, held_out = split(settings.root, settings.held_out)
    dataset = PairedTiles(settings.root, names, recipe.crops[1], recipe.colour, recipe.edges)
    if settings.epochs:
        update = recipe.batch_size * recipe.accumulate * run.world
        recipe = replace(recipe, steps=math.ceil(settings.epochs * len(dataset) / update))
    if settings.steps is not None:
        recipe = replace(recipe, steps=settings.steps)

    def validate(average: nn.Module) -> dict[str, float]:
        generator = for_inference(average, run)
        mine = list(held_out.values())[run.rank :: run.world]
        bar = tqdm(mine, "Validating", unit="picture", leave=False, disable=run.rank > 0)
        figures = run.gather([judge(generator, *map(read_picture, pair)) for pair in bar])
        return mean_of(figures) if figures else {}

    training = Training(name, recipe, networks, run, ckpts=settings.ckpts, resume=settings.resume)
    options = {"logs": settings.runs, "seed": settings.seed, "workers": settings.workers}
    training.fit(dataset, losses, validate, best_by, **options)
    return training.average.requires_grad_()


class EdgeStage:
    """The frozen edge generator, or the truth in its place, for batches and whole pictures."""

    def __init__(self, run: Runtime) -> None:
        self.run = run
        if not settings.true_edges:
            self.network = for_inference(load_network(settings.ckpts / "EdgeModel_gen.pth"), run)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """HR edges (N, 1, 4H, 4W) in [0, 1] of a batch."""
        if settings.true_edges:
            return batch["hr_edges"].float()
        with self.run.autocast():
            return self.network(batch["lr"].float() / 255, batch["lr_edges"].float())

    def judge(self, generator: nn.Module, lr: np.ndarray, hr: np.ndarray) -> dict[str, float]:
        """Figures of a generator's picture made with such edges."""
        edges = canny(hr) if settings.true_edges else predict_edges(lr, self.network, self.run)
        return judge_picture(lr, hr, render(lr, generator, edges, self.run))


def starting(network: type[nn.Module], usual: Path | None = None) -> nn.Module:
    """The generator that `--init` names or `usual` holds, or an untrained one."""
    path = settings.init or usual
    if path is None:
        return network()
    if path == usual and not path.exists():
        print(f"{path} is not there: the generator starts untrained; better run pretrain() first")
        return network()
    found = load_network(path)
    if type(found) is not network:
        raise WeightError(f"{path}: holds {type(found).__name__}, not {network.__name__}")
    return found


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Lets gradients pass through a network without reaching its weights."""
    network.requires_grad_(False)
    yield
    network.requires_grad_(True)


def to_tanh(picture: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return picture.float() / 127.5 - 1


def nearest(lr: Tensor) -> Tensor:
    """LR pictures or edges at HR size, each pixel a block."""
    return F.interpolate(lr, scale_factor=SCALE, mode="nearest")


def picture_grids(lr: Tensor, sr: Tensor, hr: Tensor) -> dict[str, list[Tensor]]:
    """Pictures in [-1, 1] to look at side by side."""
    return {"LR, generated, HR": [(each + 1) / 2 for each in (nearest(lr), sr, hr)]}


def edge_grids(batch: dict[str, Tensor], hr_edges: Tensor) -> dict[str, list[Tensor]]:
    """Canny's edges of LR, the predicted ones, and Canny's of HR to look at side by side."""
    pictures = batch["hr"][:GRID_ROWS].permute(0, 2, 3, 1).cpu().numpy()
    true = torch.stack([torch.from_numpy(canny(picture))[None] for picture in pictures])
    return {"LR edges, predicted, true": [nearest(batch["lr_edges"].float()), hr_edges, true]}


# Testing --------------------------------------------------------------------------------------


def test() -> None:
    """Makes HR tiles in TestSet/600px/output from the LR tiles in TestSet/600px/croppedoverl.

    The networks see the whole picture, put together from its tiles, in windows of their own.
    Pictures whose HR tiles are there already, from the same LR tiles and weights, are left.
    """
    folder = settings.root / TEST / LR
    pictures, complaints = find_pictures(folder)
    if not pictures:
        raise PictureError(f"{folder}: no pictures; put some there, then slice them")
    tiles, output = find_tiles(folder / TILES), find_tiles(folder / OUTPUT)
    (folder / OUTPUT).mkdir(exist_ok=True)
    with runtime(settings.device, settings.precision) as run, ThreadPoolExecutor(1) as writer:
        generator, edge_generator, weights = load_generators(run)
        names = list(pictures)[run.rank :: run.world]
        complaints = complaints if run.rank == 0 else []
        bar = tqdm(
            total=len(names),
            desc="Testing",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total} [{elapsed}<{remaining}]",
            disable=run.rank > 0,
        )
        writing: list[Future] = []
        for done, name in enumerate(names):
            bar.update(done - bar.n)
            try:
                grid = Grid.of(pictures[name], settings.tiles, settings.pad)
                lr = join_lr(name, tiles.get(name, {}), grid)
            except PictureError as error:
                complaints.append(str(error))
                continue
            stamp = f"{hashlib.sha1(lr.tobytes()).hexdigest()} {weights} {run.dtype} {grid}"
            written = output.get(name) or find_tiles(folder / OUTPUT / name).get(name, {})
            if all(at in written and read_stamp(written[at]) == stamp for at in grid):
                continue
            hr = enlarge(
                lr, generator, edge_generator, run, lambda n: bar.update(min(n, bar.total - bar.n))
            )
            while writing:  # at most one picture waits to be written
                writing.pop().result()
            writing.append(writer.submit(write_tiles, folder / OUTPUT, name, hr, grid, stamp))
        while writing:
            writing.pop().result()
        bar.update(len(names) - bar.n)
        bar.close()
        complaints = run.gather(complaints)
    if complaints:
        raise PictureError("\n".join(complaints))


def load_generators(run: Runtime) -> tuple[nn.Module, nn.Module | None, str]:
    """The generator to test, the edge generator if it needs one, and a digest of their files."""
    paths = [settings.ckpt or settings.ckpts / "SRModel_gen.pth"]
    generator = load_network(paths[0])
    if not isinstance(generator, SRResNet):
        raise WeightError(
            f"{paths[0]}: is a {type(generator).__name__}, not a generator of pictures"
        )
    if isinstance(generator, Generator):
        paths.append(settings.ckpts / "EdgeModel_gen.pth")
    digest = hashlib.sha1(b"".join(path.read_bytes() for path in paths)).hexdigest()
    edge_generator = for_inference(load_network(paths[1]), run) if len(paths) > 1 else None
    return for_inference(generator, run), edge_generator, digest


def write_tiles(folder: Path, name: str, hr: np.ndarray, grid: Grid, stamp: str) -> None:
    """Writes a picture's HR tiles in place of all it had before."""
    for earlier in (folder, folder / name):
        for path in find_tiles(earlier).get(name, {}).values():
            path.unlink()
    for at in grid:
        write_png(folder / tile_name(name, *at), cut_tile(hr, grid, *at, SCALE), stamp)


def join_lr(name: str, tiles: dict[tuple[int, int], Path], grid: Grid) -> np.ndarray:
    """The LR picture that its tiles hold."""
    if set(tiles) != set(grid):
        raise PictureError(
            f"{name}: its tiles are not those of {grid.tiles}x{grid.tiles}; run"
            " `python slice_images_w_overlapping.py`, or give the --tiles and --pad it was given"
        )
    parts = {at: read_picture(path) for at, path in tiles.items()}
    for at, part in parts.items():
        if part.shape[:2] != grid.tile_shape(*at):
            raise PictureError(f"{tiles[at]}: of the wrong size; slice the picture again")
    return join(parts, grid)


# Judging --------------------------------------------------------------------------------------


def evaluate() -> None:
    """Compares the joined pictures, and bicubic ones, with TestSet/2400px.

    Prints a table and writes it to TestSet/600px/output/final/figures.csv.
    """
    folder = settings.root / TEST / LR
    joined, _ = find_pictures(folder / OUTPUT / JOINED)
    lr, _ = find_pictures(folder)
    hr, _ = find_pictures(settings.root / TEST / HR)
    names = [name for name in lr if name in hr and f"candidate_{name}" in joined]
    if not names:
        raise PictureError(f"{folder / OUTPUT / JOINED}: no picture whose truth is in {HR}")
    figures = {}
    for name in tqdm(names, "Evaluating", unit="picture"):
        paths = (lr[name], hr[name], joined[f"candidate_{name}"])
        height, width = (SCALE * length for length in picture_size(paths[0]))
        for path in paths[1:]:
            if not (0 <= picture_size(path)[0] - height < SCALE) or not (
                0 <= picture_size(path)[1] - width < SCALE
            ):
                raise PictureError(f"{path}: is not {SCALE} times the size of {paths[0]}")
        figures[name] = judge_picture(*map(read_picture, paths))
    figures["mean"] = mean_of(list(figures.values()))
    rows = [{"picture": name, **each} for name, each in figures.items()]

    width = max(map(len, figures))
    print(" " * width, *(f"{key:>16}" for key in figures["mean"]))
    for name, each in figures.items():
        print(f"{name:{width}}", *(f"{value:16.4f}" for value in each.values()))
    path = folder / OUTPUT / JOINED / "figures.csv"
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    print(f"Written to {path}")


# Command line ---------------------------------------------------------------------------------


def configure(arguments: list[str]) -> Callable[[], None] | None:
    """Takes the settings from the command line; returns the command it names, if any."""
    global settings  # noqa: PLW0603
    commands = {each.__name__: each for each in (train_edges, pretrain, train, test, evaluate)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=commands)
    for each in fields(Settings):
        kind = {bool: {"action": "store_true"}}.get(each.type)
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            **{"default": each.default, **each.metadata},
            **(kind or {"type": get_args(each.type)[0] if get_args(each.type) else each.type}),
        )
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    for name in ("steps", "epochs", "batch_size", "learning_rate", "crop"):
        if options[name] is not None and options[name] <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    if not options["root"].is_dir():
        parser.error(f"--root: there is no folder {options['root']}")
    settings = Settings(**options)
    return commands.get(command)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What the user can mend is said in a sentence, without a traceback."""
    try:
        yield
    except (PictureError, WeightError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt as error:
        sys.exit(f"Interrupted. {error}")


if __name__ == "__main__":
    command = configure(sys.argv[1:])
    with plain_errors():
        if command:
            command()
            sys.exit()
        # train_edges()
        # pretrain()
        # train()
        test()
        # evaluate()
