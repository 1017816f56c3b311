"""Step 2: trains Edge.SRGAN, and upscales images with it, whole or as HR tiles.

python main.py                          # runs the last lines that are uncommented
python main.py upscale holiday.jpg      # runs one command, with options
python main.py train --resume
torchrun --nproc-per-node=2 main.py train
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import console
import files
import images
import pipeline
import sheets
import tiles
from console import ImageError, UserError
from pipeline import Finish, Job, OnProgress, Stamp
from tiles import HR, OUTPUT, SCALE, TEST, TILES

if TYPE_CHECKING:
    from device import Device
    from inference import Enlarger

TRAINS = {  # stages of each command that trains
    "train_edges": ["EdgePreModel", "EdgeModel"],
    "pretrain": ["SRResNet", "EdgeStageModel", "PreModel"],
    "train": ["SRModel", "SRGAN"],
}
ONLY_IF_NAMED = {"EdgeModel", "SRGAN"}  # by --stage
MODELS = {"srresnet": "SRResNet", "srgan": "SRGAN", "edge-srgan": "SRModel"}  # stages by model
COMMANDS: dict[str, Callable[..., None]] = {}
fraction = console.option(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def command(work: Callable[[Namespace], None]) -> Callable[..., None]:
    """Makes a function of parsed options a command that Python code can call as well.

    `test()`, `test(fast=True)`, `upscale("holiday.jpg", output="large")`: as on a command line.
    """

    @wraps(work)
    def call(*paths: str | Path, **given: object) -> None:
        parser, argv = parser_of(work.__name__), [*map(str, paths)]
        for key, value in given.items():
            name = f"--{key.replace('_', '-')}"
            if name not in parser.names:
                raise TypeError(f"{work.__name__}() has no option {key}")
            if value is not None and value is not False:
                argv.append(name if value is True else f"{name}={value}")
        work(parser.parse_args(argv))

    COMMANDS[work.__name__] = work
    return call


# Training -------------------------------------------------------------------------------------


@command
def train_edges(options: Namespace) -> None:
    """Trains the edge generator on cross-entropy; with --stage EdgeModel, adversarially."""
    train_stages(options, TRAINS["train_edges"])


@command
def pretrain(options: Namespace) -> None:
    """Trains the HR generator on squared error: without edges, its edge stage alone, all of it."""
    train_stages(options, TRAINS["pretrain"])


@command
def train(options: Namespace) -> None:
    """Trains the HR generator with all losses; with --stage SRGAN, the SRResNet for texture."""
    train_stages(options, TRAINS["train"])


def train_stages(options: Namespace, names: list[str]) -> None:
    """Trains a command's stages, each from the one before; `--init` is for the first."""
    if options.steps and options.epochs:
        raise UserError("--epochs, --steps: give one or the other")
    import stages
    import training
    from device import open_device

    names = [options.stage] if options.stage else [n for n in names if n not in ONLY_IF_NAMED]
    chosen = [stages.STAGES[name] for name in names]
    device = open_device(options.device, options.precision, training=True)
    device.from_first(check_weights, chosen, options)
    for stage_class in chosen:
        training.fit(stage_class, options, device)
        options.init = None


def check_weights(chosen: list[type], options: Namespace) -> None:
    """Raises UserError if a stage needs weights that are missing and that no earlier one trains."""
    trained = {""}  # "": starts from random weights
    for stage_class in chosen:
        given = options.init and stage_class is chosen[0]
        start = "" if given else stage_class.starts_from
        for name in {start, *stage_class.needs} - trained:
            if not (path := files.weight_path(options.ckpts, name)).exists():
                trainer = next(each for each, names in TRAINS.items() if name in names)
                raise UserError(f"{path}: missing; `python main.py {trainer}` trains it")
        trained.add(stage_class.publishes)


# Testing --------------------------------------------------------------------------------------


def run_networks(
    options: Namespace,
    shares: dict[Path, float],
    found: tuple[list[Job], list[str]],
    work: Callable[["Enlarger", Job, OnProgress], Finish | None],
    done: str,
    where: Path | str,
) -> None:
    """Loads the networks and runs `work` on every image; without `shares`, for edges alone."""
    from device import open_device
    from inference import Enlarger

    jobs, problems = found
    device = open_device(options.device, options.precision)
    device.info(device.describe())
    edge_generator = files.weight_path(options.ckpts, "EdgeModel")
    enlarger = Enlarger.load(shares, edge_generator, device)
    if getattr(options, "edges", None) and not enlarger.needs_edges:
        raise UserError("--edges: this generator uses no edges; use --model edge-srgan")
    work = partial(work, enlarger)
    pipeline.for_each(jobs, work, done, where, problems=problems, device=device)


def chosen_generators(options: Namespace) -> dict[Path, float]:
    """Returns the weight files of the generator to use, and their shares if it is a mixture."""
    if options.texture is not None and (options.model != "srgan" or options.generator):
        raise UserError("--texture: applies to the SRGAN only; add --model srgan")
    if options.generator:
        return {options.generator: 1.0}
    texture = 1.0 if options.texture is None else options.texture
    mixture = {"SRResNet": 1 - texture, "SRGAN": texture}
    shares = mixture if options.model == "srgan" else {MODELS[options.model]: 1.0}
    return {files.weight_path(options.ckpts, name): part for name, part in shares.items() if part}


@command
def test(options: Namespace) -> None:
    """Upscales the sliced images of TestSet/600px, each as a whole, and cuts them into HR tiles."""
    found = pipeline.test_jobs(options.root)
    folder, output = options.root / TEST / tiles.LR / TILES, options.root / TEST / tiles.LR / OUTPUT
    files.check_writable(output)
    hr, _ = tiles.find_images(options.root / TEST / HR)
    work = partial(test_image, options, tiles.find_tiles(folder), tiles.find_tiles(output), hr)
    run_networks(options, chosen_generators(options), found, work, "Tested", output)


def test_image(
    options: Namespace,
    lr_tiles: dict[str, dict[tiles.Position, Path]],
    hr_tiles: dict[str, dict[tiles.Position, Path]],
    hr_paths: dict[str, Path],
    enlarger: "Enlarger",
    job: Job,
    on_progress: OnProgress,
) -> Finish | None:
    """Upscales one image; returns a function that cuts the result into tiles and writes them.

    `options` to `hr_paths` are bound by `test`, `enlarger` by `run_networks`; `for_each` passes the
    rest. Of the LR tiles only the grid is used.
    """
    pipeline.check_hr_unchanged(job.source, hr_paths.get(job.name))
    cut = lr_tiles.get(job.name, {})
    grid = tiles.Grid.of_tiles(job.source, cut, tiles.SLICE_AGAIN)
    pipeline.check_source(cut[1, 1], job.source, tiles.SLICE_AGAIN)
    edges_path = options.edges and options.edges / f"{job.name}.png"
    stamp = stamp_of(job.source, enlarger.digest, edges_path, str(grid))
    unjoined = hr_tiles.get(job.name, {})
    joined = tiles.find_tiles(job.target / job.name).get(job.name, {})
    old = joined | unjoined
    if old.keys() == set(grid) and all(Stamp.read(path) == stamp for path in old.values()):
        return None
    lr = images.read_image(job.source)
    sr = enlarger(lr, edges_path and read_edges(edges_path, lr), on_progress)

    def write() -> None:
        for path in (*unjoined.values(), *joined.values()):
            path.unlink(missing_ok=True)
        for at in grid:
            tile = tiles.cut_tile(sr, grid, *at, SCALE)
            images.write_png(job.target / tiles.tile_name(job.name, *at), tile, str(stamp))

    return write


@command
def edges(options: Namespace) -> None:
    """Writes the predicted HR edges of the test images to TestSet/600px/output/edges/{id}.png.

    Edit them, or draw your own (grey, white on black), and pass their folder to `test --edges`.
    Existing ones are kept.
    """
    found = pipeline.test_jobs(options.root, "edges/{}.png")
    folder = options.root / TEST / tiles.LR / OUTPUT / "edges"
    files.check_writable(folder)
    run_networks(options, {}, found, predict_edges, "Predicted edges of", folder)


def predict_edges(enlarger: "Enlarger", job: Job, on_progress: OnProgress) -> Finish | None:
    """Predicts one image's edges unless they exist; returns a function that writes them."""
    if job.target.exists():
        pipeline.check_source(job.target, job.source, "delete it")
        return None
    found = enlarger.predict_edges(images.read_image(job.source), on_progress)
    stamp = stamp_of(job.source, enlarger.digest)
    return partial(images.write_png, job.target, np.stack([found] * 3, axis=2), str(stamp))


def stamp_of(lr: Path, weights: str, edges: Path | None = None, grid: str = "") -> Stamp:
    """Returns the stamp of a result; `edges` is a file of edges to use, if any.

    Raises:
        ImageError: the edges are missing, or were predicted from an older LR image.
    """
    if edges and not edges.exists():
        raise ImageError(f"{edges}: missing; `python main.py edges` writes edges to start from")
    if edges:
        pipeline.check_source(edges, lr, "delete it")
    return Stamp(files.digest(lr), grid, weights, files.digest(edges) if edges else "")


def read_edges(path: Path, lr: np.ndarray) -> np.ndarray:
    """Returns the HR edges for an LR image, `(4H, 4W)` uint8, from a file.

    Raises:
        ImageError: the file cannot be read, or is not the size of the HR image.
    """
    edges, wanted = images.read_image(path)[..., 0], tuple(SCALE * side for side in lr.shape[:2])
    if edges.shape != wanted:
        raise ImageError(f"{path}: (height, width) is {edges.shape}, but must be {wanted}")
    return edges


# Whole images ---------------------------------------------------------------------------------


@command
def upscale(options: Namespace) -> None:
    """Upscales images, or all images in folders, and writes NAME_x4.png beside each."""
    if not options.images:
        raise UserError("upscale: which images? `python main.py upscale IMAGE_OR_FOLDER ...`")
    texture = "" if options.texture is None else f"_{options.texture:g}"
    which = {"edge-srgan": "", "srresnet": "_fast", "srgan": f"_srgan{texture}"}[options.model]
    ending = f"_x{SCALE}{which}.{options.format}"
    found = pipeline.upscale_jobs(options.images, options.output, ending, options.recursive)
    jobs, work = found[0], partial(upscale_image, options)
    where = jobs[0].target if len(jobs) == 1 else options.output or "beside the originals"
    run_networks(options, chosen_generators(options), found, work, "Upscaled", where)


def upscale_image(
    options: Namespace, enlarger: "Enlarger", job: Job, on_progress: OnProgress
) -> Finish | None:
    """Upscales one image unless its result exists; returns a function that writes it."""
    sheet = job.target.with_name(f"{job.target.stem}_preview.png")
    targets = [job.target, sheet] if options.preview else [job.target]
    stamp = stamp_of(job.source, enlarger.digest, options.edges)
    existing = [target for target in targets if target.exists()]
    for target in existing:
        if target.samefile(job.source):
            raise ImageError(f"{target}: is the source image itself; choose another --output")
        if not options.overwrite and Stamp.read(target) != stamp:
            raise ImageError(f"{target}: exists, from other input or settings; use --overwrite")
    if existing == targets and not options.overwrite:
        return None
    photo = images.read_photo(job.source)
    hr_edges = options.edges and read_edges(options.edges, photo.rgb)
    files.check_writable(job.target.parent)
    if options.preview and enlarger.needs_edges and hr_edges is None:
        hr_edges = enlarger.predict_edges(photo.rgb)
    sr = enlarger(photo.rgb, hr_edges, on_progress)
    if photo.alpha is not None:
        photo.alpha = enlarger(np.repeat(photo.alpha[..., None], 3, axis=2))[..., 0]

    def write() -> list[str]:
        notes = photo.notes + images.write_image(job.target, sr, photo, str(stamp))
        if options.preview:
            images.write_png(sheet, sheets.draw_preview(photo.rgb, sr, hr_edges), str(stamp))
        return notes

    return write


# Evaluation -----------------------------------------------------------------------------------


@command
def evaluate(options: Namespace) -> None:
    """Compares the joined images, and bicubic ones, with the ground truth in TestSet/2400px.

    Prints a table and writes it to TestSet/600px/output/final/metrics.csv.
    """
    from device import open_device

    folder = options.root / TEST / HR
    jobs, problems = pipeline.test_jobs(options.root, pipeline.CANDIDATE)
    hr, rows = tiles.find_images(folder)[0], {}
    known = [job for job in jobs if job.name in hr]
    if not known:
        raise UserError(f"{folder}: no ground truth for the images to evaluate")
    table, missing = known[0].target.with_name("metrics.csv"), len(jobs) - len(known)
    where = f"{table}; {missing} more without ground truth" if missing else table
    device = open_device(options.device, "fp32")
    work = partial(evaluate_image, hr, rows, device)
    pipeline.for_each(known, work, "Evaluated", where, problems=problems, device=device)
    write_table(table, rows, device)


def evaluate_image(
    hr: dict[str, Path], rows: dict[str, dict], device: "Device", job: Job, _: OnProgress
) -> Finish:
    """Computes the metrics of one image and of the bicubic one, if all files are current."""
    import metrics

    unjoined = job.target.parent.parent / tiles.tile_name(job.name, 1, 1)
    if not job.target.exists() or unjoined.exists():
        raise ImageError(f"{job.source}: not joined yet; run `python join_slice_images.py`")
    paths = job.source, hr[job.name], job.target
    pipeline.check_hr_unchanged(*paths[:2])
    pipeline.check_source(job.target, job.source, "slice, test and join again")
    for path in paths[1:]:
        pipeline.check_size(path, job.source)
    rows[job.name] = metrics.against_bicubic(*map(images.read_image, paths), device)
    return lambda: None


def write_table(path: Path, rows: dict[str, dict[str, float]], device: "Device") -> None:
    """Prints the metrics that all processes found, with their mean, and writes them as CSV."""
    import metrics

    found = sorted(device.gather(list(rows.items())))
    if device.rank == 0:
        path.unlink(missing_ok=True)
    if device.rank == 0 and found:
        found.append(("mean", metrics.mean_of([row for _, row in found])))
        metrics.write_csv(path, found)
        metrics.print_table(found)


# Command line ---------------------------------------------------------------------------------


def parser_of(name: str, is_help: bool = False) -> console.Parser:
    """Returns the parser of a command's options."""
    parser = console.Parser(COMMANDS[name].__doc__, prog=f"main.py {name}")
    add, root = parser.add_argument, console.ROOT
    file, folder = console.existing_file, console.existing_folder
    add("--root", type=folder, default=root, help="folder of the image sets")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to compute")
    if name == "evaluate":
        return parser
    add("--ckpts", type=console.path, default=root / "ckpts", help="folder of the weights")
    precisions = ["auto", "fp32", "bf16", "fp16"]
    add("--precision", default="auto", choices=precisions, help="number format of the networks")
    if name in TRAINS:
        add_training_options(add, TRAINS[name], is_help)
    if name in ("test", "upscale"):
        add("--model", choices=MODELS, default="edge-srgan", help="which generator to use")
        fast = {"action": "store_const", "const": "srresnet", "dest": "model"}
        add("--fast", **fast, help="short for --model srresnet")
        add("--texture", type=fraction, shown=1, help="for srgan: 0 is smooth and exact, 1 rich")
        add("--generator", type=file, help="weight file of another generator, instead of --model")
    if name == "test":
        add("--edges", type=folder, help="folder of HR edges, {id}.png, instead of predicted ones")
    if name == "upscale":
        add("--edges", type=file, help="file of HR edges, instead of predicted ones")
        add("images", nargs="*", type=console.path, help="images and folders")
        add("--format", choices=["png", "jpg", "webp", "tif"], default="png", help="output format")
        add("--output", type=console.path, help="file or folder of the results")
        add("--recursive", action="store_true", help="include sub-folders")
        add("--overwrite", action="store_true", help="replace existing results")
        add("--preview", action="store_true", help="write a comparison sheet beside each result")
    return parser


def add_training_options(add: Callable[..., object], names: list[str], is_help: bool) -> None:
    """Adds the options of the training commands; the help shows the stages' own values."""
    # SSIM and Canny need crops of at least this size.
    crop = console.option(int, "a whole number of 8 or more", lambda n: n >= 8)
    seed = console.option(int, "a whole number below 2^63", lambda n: 0 <= n < 2**63)
    own = partial(recipe_values, names) if is_help else str  # the former needs PyTorch
    add("--stage", choices=names, help="train this stage only")
    add("--resume", action="store_true", help="continue the last run")
    add("--accept-changes", action="store_true", help="with --resume: continue with other settings")
    add("--init", type=console.existing_file, help="weight file to start from")
    add("--publish", action="store_true", help="put the weights into --ckpts even if no better")
    add("--steps", type=console.count, shown=own("steps"), help="optimiser steps")
    add("--epochs", type=console.positive, help="passes over the tiles, instead of --steps")
    add("--batch-size", type=console.count, shown=own("batch_size"), help="crops per process")
    add("--learning-rate", type=console.positive, shown=own("learning_rate"), help="peak rate")
    add("--crop", type=crop, shown=own("crops"), help="side of the crops in LR pixels")
    add("--jpeg", type=fraction, shown=own("jpeg"), help="fraction of LR crops to compress as JPEG")
    add("--held-out", type=console.count_or_none, default=4, help="images held out for validation")
    add("--checkpoint-every", type=console.count, default=500, help="batches between validations")
    add("--vgg", type=console.existing_file, shown="download", help="weight file of VGG19")
    add("--runs", type=console.path, default=console.ROOT / "runs", help="folder of the runs")
    workers = min(8, console.processor_share())
    add("--workers", type=console.count_or_none, default=workers, help="data-loading processes")
    add("--seed", type=seed, default=0, help="random seed")


def recipe_values(names: list[str], field: str) -> str:
    """Returns the stages' own values of an option, as the help shows them."""
    import stages

    values = [(getattr(stages.STAGES[name].recipe, field), name) for name in names]
    return ", ".join(f"{value} in {name}" for value, name in values)


def run(argv: list[str]) -> None:
    """Runs the command named by a command line."""
    name, *rest = argv
    if name in ("-h", "--help"):
        console.info(f"{__doc__ or ''}\nCommands; COMMAND --help shows their options:\n")
        for each in COMMANDS:
            console.info(f"  {each:13}{parser_of(each).description}")
    elif name in COMMANDS:
        parser = parser_of(name, is_help=bool({"-h", "--help"} & set(rest)))
        COMMANDS[name](parser.parse_args(rest))
    else:
        hint = console.did_you_mean(name, list(COMMANDS))
        if not hint:
            or_image = "" if name.startswith("-") else f", or did you mean `upscale {name}`?"
            hint = f"; see --help{or_image}"
        text = f"the first argument must be a command, not {name}{hint}"
        console.Parser(None, prog="main.py").error(text)


if __name__ == "__main__":
    with console.plain_errors():
        if sys.argv[1:]:
            run(sys.argv[1:])
        else:
            # train_edges()
            # pretrain()
            # train()
            test()
            # evaluate()
            # upscale("holiday.jpg")
