"""Step 2: trains Edge.SRGAN and makes HR tiles, or whole images, with it.

    python main.py                          # runs what the last lines leave uncommented
    python main.py upscale holiday.jpg      # runs one command, with options
    python main.py train --resume
    torchrun --nproc-per-node=2 main.py train

Commands: train_edges, pretrain, train, test, edges, evaluate, upscale.
"""

import argparse
import csv
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from console import (
    PARTS_BAR,
    UserError,
    existing_folder,
    non_negative_int,
    plain_errors,
    positive_float,
    positive_int,
    probability,
    problem,
    progress,
    report,
    say,
    seed,
)
from device import open_device, processor_share
from images import (
    ONE_IMAGE_ERRORS,
    ImageError,
    check_writable,
    read_image,
    read_stamp,
    replacing,
    write_png,
)
from inference import Enlarger
from metrics import Metrics, against_bicubic, mean_of, print_table
from models import EdgeGenerator, WeightError, digest, load_network
from stages import (
    EdgeModel,
    EdgePreModel,
    EdgeStageModel,
    PreModel,
    SRGANModel,
    SRModel,
    SRResNetModel,
    Stage,
    weight_path,
)
from tiles import (
    HR,
    JOINED,
    LR,
    OUTPUT,
    ROOT,
    SCALE,
    SLICE_AGAIN,
    TEST,
    TILES,
    Grid,
    Position,
    check_made_lr,
    check_size,
    check_tiles,
    cut_tile,
    edges_stamp,
    find_images,
    find_tiles,
    grid_of,
    join,
    source_stamp,
    tile_name,
    tile_stamp,
)
from training import fit
from upscaling import find_jobs, read_edges, upscale_all

EDGES = "edges"  # folder of the predicted edges, in OUTPUT
STAGES = {  # of each command that trains
    "train_edges": (EdgePreModel, EdgeModel),
    "pretrain": (SRResNetModel, EdgeStageModel, PreModel),
    "train": (SRModel, SRGANModel),
}


# Training -------------------------------------------------------------------------------------


def train_edges(options: argparse.Namespace | None = None) -> None:
    """Trains the edge generator: on pixels, then against its discriminator."""
    train_stages("train_edges", options)


def pretrain(options: argparse.Namespace | None = None) -> None:
    """Trains the HR generator on squared error: without edges, the edge stage alone, the whole."""
    train_stages("pretrain", options)


def train(options: argparse.Namespace | None = None) -> None:
    """Trains the HR generator with all of its losses against its discriminator."""
    train_stages("train", options)


def train_stages(command: str, options: argparse.Namespace | None) -> None:
    """Trains a command's stages, each from the one before; the first may have `--init`."""
    options = options or parse_options()
    names = [stage.name for stage in STAGES[command]]
    if options.stage and options.stage not in names:
        raise UserError(f"--stage {options.stage}: this command trains {', '.join(names)}")
    stages = [stage for stage in STAGES[command] if options.stage in (None, stage.name)]
    with open_device(options.device, options.precision, training=True) as device:
        device.from_first(check_weights, stages, options)
        for stage in stages:
            following = names[names.index(stage.name) + 1 :]
            fit(stage, options, device, tuple(following))
            options = argparse.Namespace(**vars(options) | {"init": None})


def check_weights(stages: list[type[Stage]], options: argparse.Namespace) -> None:
    """Raises WeightError, before the first stage, if one lacks weights that none of them trains."""
    there = {""}
    for stage in stages:
        start = "" if options.init and stage is stages[0] else stage.starts_from
        for name in {start, *stage.needs} - there:
            if not weight_path(options, name).exists():
                command = next(c for c in STAGES if name in [each.name for each in STAGES[c]])
                raise WeightError(
                    f"{weight_path(options, name)}: missing, but {stage.name} needs it;"
                    f" `python main.py {command}` trains it"
                )
        there.add(stage.name)


# Testing --------------------------------------------------------------------------------------


def test(options: argparse.Namespace | None = None) -> None:
    """Makes HR tiles in TestSet/600px/output from the LR tiles in TestSet/600px/croppedoverl.

    The networks see the whole image, put together from its tiles, in windows of their own.
    Images whose HR tiles are there already, from the same LR tiles and weights, are left.
    """
    options = options or parse_options()
    start, folder = time.monotonic(), options.root / TEST / LR
    (images, problems), (hr_images, _) = find_images(folder), find_images(options.root / TEST / HR)
    if not images:
        raise UserError(
            f"{folder}: no images; put some there and run `python slice_images_w_overlapping.py`,"
            " or enlarge one where it lies with `python main.py upscale IMAGE`"
        )
    tiles, output = find_tiles(folder / TILES), find_tiles(folder / OUTPUT)
    check_writable(folder / OUTPUT)
    networks = weight_paths(options)
    with open_device(options.device, options.precision) as device, ThreadPoolExecutor(1) as writer:
        enlarger, weights = Enlarger.load(*networks, device), f"{digest(*networks)} {device.dtype}"
        names = list(images)[device.rank :: device.world]
        problems = problems if device.rank == 0 else []
        made, present = 0, 0
        written = writer.submit(int)
        with progress(total=len(names), desc="Testing", bar_format=PARTS_BAR) as bar:
            for count, name in enumerate(names):
                bar.update(count - bar.n)
                try:
                    if name in hr_images:
                        check_made_lr(images[name], hr_images[name])
                    lr_tiles = tiles.get(name, {})
                    grid = grid_of(images[name], lr_tiles)
                    lr_stamp = tile_stamp(images[name], grid)
                    check_tiles(name, lr_tiles, grid, lr_stamp, SLICE_AGAIN)
                    lr = join({at: read_image(path) for at, path in lr_tiles.items()}, grid)
                    edge_path = options.edges and options.edges / f"{name}.png"
                    given = edge_path and given_edges(edge_path, images[name], lr)
                    hr_stamp = f"{lr_stamp} | {weights}{edges_stamp(edge_path)}"
                    moved = find_tiles(folder / OUTPUT / name).get(name, {})  # by the joining
                    fresh = output.get(name, {})
                    if is_made(name, moved | fresh, grid, lr_stamp, hr_stamp):
                        present += 1
                        continue
                    hr = enlarger(lr, given, bar.update)
                except ONE_IMAGE_ERRORS as error:
                    problems.append(problem(images[name], error))
                    continue
                written.result()  # no more than one image waits to be written
                old = [*moved.values(), *fresh.values()]
                written = writer.submit(write_tiles, folder / OUTPUT, name, hr, grid, hr_stamp, old)
                made += 1
            bar.update(len(names) - bar.n)
        written.result()
        problems = device.gather(problems)
        made, present = (sum(device.gather([each])) for each in (made, present))
    if device.rank == 0:
        report("Tested", made, problems, start, folder / OUTPUT, present)


def is_made(
    name: str, found: dict[Position, Path], grid: Grid, lr_stamp: str, hr_stamp: str
) -> bool:
    """Returns whether an image's HR tiles are all there, from these LR tiles and weights."""
    try:
        return check_tiles(name, found, grid, lr_stamp, "", SCALE) == hr_stamp
    except ImageError:
        return False


def write_tiles(
    folder: Path, name: str, hr: np.ndarray, grid: Grid, stamp: str, old: list[Path]
) -> None:
    """Writes an image's HR tiles in place of its old ones."""
    for path in old:
        path.unlink(missing_ok=True)
    for at in grid:
        write_png(folder / tile_name(name, *at), cut_tile(hr, grid, *at, SCALE), stamp)


def given_edges(path: Path, lr_path: Path, lr: np.ndarray) -> np.ndarray:
    """Returns the HR edges in a file for an LR image, `(4H, 4W)` uint8.

    Raises:
        ImageError: there is no such file, it is not of the HR image's size, or it was predicted
            from the LR image as it was before a change.
    """
    if not path.exists():
        raise ImageError(f"{path}: missing; `python main.py edges` writes edges to start from")
    check_edges(path, lr_path)
    return read_edges(path, lr)


def check_edges(path: Path, lr_path: Path) -> None:
    """Raises ImageError if edges were predicted from the LR image as it was before a change."""
    stamp, now = read_stamp(path) or "", source_stamp(lr_path)
    if stamp != now and stamp.split(" ")[0] == now.split(" ")[0]:
        raise ImageError(f"{path}: predicted from {lr_path.name} as it was; remove it")


def edges(options: argparse.Namespace | None = None) -> None:
    """Writes the predicted HR edges of the test images to TestSet/600px/output/edges/{id}.png.

    Edit them, or draw others, grey, white on black, and give their folder to `test --edges`. Those
    that are there already are left.
    """
    options = options or parse_options()
    start, folder = time.monotonic(), options.root / TEST / LR
    images, problems = find_images(folder)
    if not images:
        raise UserError(f"{folder}: no images; put some there")
    output = folder / OUTPUT / EDGES
    check_writable(output)
    made, present = 0, 0
    with open_device(options.device, options.precision) as device:
        enlarger = Enlarger(
            None, load_network(weight_path(options, "EdgeModel"), EdgeGenerator), device
        )
        for name, path in progress(images.items(), "Predicting edges", unit="image"):
            result = output / f"{name}.png"
            try:
                if result.exists():
                    check_edges(result, path)
                    present += 1
                    continue
                predicted = enlarger.predict_edges(read_image(path))
                write_png(result, np.stack([predicted] * 3, axis=2), source_stamp(path))
            except ONE_IMAGE_ERRORS as error:
                problems.append(problem(path, error))
                continue
            made += 1
    report("Edges predicted", made, problems, start, output, present)


def upscale(*images: str, options: argparse.Namespace | None = None) -> None:
    """Enlarges images, or all images of folders, where they lie: NAME_x4.png beside each."""
    options = options or parse_options()
    paths = [Path(image) for image in images or options.images]
    if not paths:
        raise UserError("upscale: which images? `python main.py upscale IMAGE_OR_FOLDER ...`")
    start = time.monotonic()
    (jobs, problems), networks = find_jobs(paths, options), weight_paths(options)
    with open_device(options.device, options.precision) as device:
        enlarger, weights = Enlarger.load(*networks, device), f"{digest(*networks)} {device.dtype}"
        made, present, pixels, more_problems = upscale_all(jobs, enlarger, weights, options)
    seconds = time.monotonic() - start
    if made:
        say(f"{pixels / 1e6:.1f} megapixels, {pixels / 1e6 / seconds:.2f} per second")
    results = [result for _, result in jobs]
    where = results[-1].parent if len(results) > 1 else (results or paths)[0]
    report("Upscaled", made, problems + more_problems, start, where, present)


def weight_paths(options: argparse.Namespace) -> tuple[Path, Path]:
    """Returns the weight files of the generator to make images with and of the edge generator.

    Raises:
        UserError: the options contradict each other.
    """
    if options.fast and (options.edges or options.generator):
        raise UserError("--fast is the SRResNet, without edges; leave out one or the other")
    generator = weight_path(options, "SRResNet" if options.fast else "SRModel")
    return options.generator or generator, weight_path(options, "EdgeModel")


# Evaluation -----------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace | None = None) -> None:
    """Compares the joined images, and bicubic ones, with the ground truth in TestSet/2400px.

    Prints a table and writes it to TestSet/600px/output/final/metrics.csv.
    """
    options = options or parse_options()
    start, folder = time.monotonic(), options.root / TEST / LR
    (lr, problems), (hr, _) = find_images(folder), find_images(options.root / TEST / HR)
    fresh = find_tiles(folder / OUTPUT)
    names = [name for name in lr if name in hr]
    if not names:
        raise UserError(f"{options.root / TEST / HR}: no ground truth of an image in {folder}")
    if without := len(lr) - len(names):
        say(f"{without} of {len(lr)} images in {folder} have no ground truth and are not compared")
    table: dict[str, Metrics] = {}
    with open_device(options.device, "fp32") as device:
        for name in progress(names, "Evaluating", unit="image"):
            try:
                check_made_lr(lr[name], hr[name])
                if name in fresh:
                    raise ImageError(f"{name}: has new tiles; run `python join_slice_images.py`")
                sr = folder / OUTPUT / JOINED / f"candidate_{name}.png"
                table[name] = against_bicubic(*read_triple(lr[name], hr[name], sr), device)
            except ONE_IMAGE_ERRORS as error:
                problems.append(problem(lr[name], error))
    path = folder / OUTPUT / JOINED / "metrics.csv"
    if table:
        rows = [*table.items(), ("mean", mean_of(list(table.values())))]
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as f,
        ):
            writer = csv.DictWriter(f, ["image", *rows[-1][1]])
            writer.writeheader()
            writer.writerows({"image": name, **row} for name, row in rows)
        print_table(rows)
    report("Evaluated", len(table), problems, start, path if table else "nothing to compare")


def read_triple(lr: Path, hr: Path, sr: Path) -> list[np.ndarray]:
    """Returns LR image, ground truth and joined image, checked for size and for being current."""
    if not sr.exists():
        raise ImageError(f"{lr}: not joined; run `python join_slice_images.py`")
    if not (read_stamp(sr) or "").startswith(f"{source_stamp(lr)} "):
        raise ImageError(f"{sr}: not made from {lr.name} as it is now; slice, test and join again")
    for path in (hr, sr):
        check_size(path, lr)
    return [read_image(path) for path in (lr, hr, sr)]


# Command line ---------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (train_edges, pretrain, train, test, edges, evaluate, upscale)
}


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and leaves the lines of the recipes' table as they are."""


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options of a command line, this process's own by default."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=recipe_table(),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, help="what to run")
    parser.add_argument("images", nargs="*", help="images and folders, for upscale")

    own: list[tuple[str, argparse.Action]] = []  # the commands of options that not all have

    def group(commands: str) -> Callable[..., None]:
        add = parser.add_argument_group(commands).add_argument
        return lambda *args, **given: own.append((commands, add(*args, **given)))

    add = parser.add_argument_group("all commands").add_argument
    add("--root", type=existing_folder, default=ROOT, help="folder of TrainingSet/ and TestSet/")
    add("--ckpts", type=Path, default=ROOT / "ckpts", help="folder of the weights")
    devices, precisions = ["auto", "cpu", "cuda", "mps"], ["auto", "fp32", "bf16", "fp16"]
    add("--device", default="auto", choices=devices, help="where to compute")
    add("--precision", default="auto", choices=precisions, help="number format of the networks")

    add, stages = group("train_edges, pretrain, train"), [stage.name for stage in all_stages()]
    add("--stage", choices=stages, help="the only stage to train; None: all")
    add("--resume", action="store_true", help="continuation of the last training")
    add("--accept-changes", action="store_true", help="with --resume: another recipe or data set")
    add("--init", type=Path, help="weight file that a new training starts from")
    add("--steps", type=positive_int, help="updates of the weights; None: see below")
    add("--epochs", type=positive_float, help="the same in passes over the tiles")
    add("--batch-size", type=positive_int, help="crops per process; None: see below")
    add("--learning-rate", type=positive_float, help="peak learning rate; None: see below")
    add("--crop", type=crop_side, help="LR pixels a side of the crops; None: see below")
    add("--jpeg", type=probability, help="part of LR crops through JPEG; None: see below")
    add("--held-out", type=non_negative_int, default=4, help="images kept for validation")
    add("--checkpoint-every", type=positive_int, default=500, help="batches between checkpoints")
    add("--vgg", type=Path, help="file of VGG19's weights; None: download")
    add("--runs", type=Path, default=ROOT / "runs", help="folder of TensorBoard's files")
    workers = min(8, processor_share())
    add("--workers", type=non_negative_int, default=workers, help="data-loading processes")
    add("--seed", type=seed, default=0, help="seed of everything random")

    add = group("test, upscale")
    add("--generator", type=Path, help="weight file; None: SRModel_gen.pth in --ckpts")
    add(
        "--edges", type=Path, help="test: folder of HR edges {id}.png; upscale: file; None: predict"
    )
    add("--fast", action="store_true", help="the SRResNet, without edges")

    add = group("upscale")
    add("--output", type=Path, help="file or folder of the results; None: beside the images")
    add("--recursive", action="store_true", help="sub-folders too")
    add("--overwrite", action="store_true", help="replaces existing results")
    add("--preview", action="store_true", help="comparison sheet beside each result")
    options = parser.parse_intermixed_args(argv)  # `upscale --fast IMAGE` too
    if options.images and options.command != "upscale":
        parser.error(f"{options.images[0]}: only upscale takes images")
    if options.steps and options.epochs:
        parser.error("--steps and --epochs: leave out one or the other")
    for commands, action in own:
        given = getattr(options, action.dest) != action.default
        if given and options.command and options.command not in commands.split(", "):
            parser.error(f"{action.option_strings[0]}: only for {commands}")
    return options


def all_stages() -> list[type[Stage]]:
    """Returns the stages of all commands, in the order of training."""
    return list(chain(*STAGES.values()))


def crop_side(text: str) -> int:
    """Returns `--crop` from the command line: SSIM's window needs 11 HR pixels, Canny some more."""
    side = positive_int(text)
    if side < 8:
        raise argparse.ArgumentTypeError(f"{text} is below 8 pixels")
    return side


def recipe_table() -> str:
    """Returns the recipes of all stages, a line each."""
    rows = [("stage", "steps", "batch", "crops", "rate", "jpeg")]
    for stage in all_stages():
        r = stage.recipe
        batch = f"{r.batch_size} x {r.accumulate}"
        crops = "-".join(map(str, sorted(set(r.crops))))
        rows.append((stage.name, *map(str, (r.steps, batch, crops, r.learning_rate, r.jpeg))))
    lines = ["  ".join(f"{cell:<15}" for cell in row).rstrip() for row in rows]
    return "what the stages are trained with unless options say otherwise:\n  " + "\n  ".join(lines)


if __name__ == "__main__":
    with plain_errors():
        options = parse_options()
        if options.command:
            COMMANDS[options.command](options=options)
        else:
            # train_edges()
            # pretrain()
            # train()
            test()
            # evaluate()
            # upscale("holiday.jpg")
