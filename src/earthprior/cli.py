"""The command line: one subcommand per stage and tool. Errors become exit codes here and nowhere else.

What the codes mean, and what is said, is in last_words.py.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, Literal

import click

from earthprior import last_words, under_dvc
from earthprior.errors import ParamsError
from earthprior.params import Params, load
from earthprior.training.stop import interruptions


class _Program(click.Group):
    """Ends every command in an orderly way, and lists the stages first, in their order."""

    typed: tuple[str, ...] = ()
    alone = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, args: Any = None, *more: Any, **named: Any) -> Any:
        self.alone, self.typed = args is None, tuple(sys.argv[1:] if args is None else args)
        return super().main(args, *more, **named)

    def invoke(self, ctx: click.Context) -> Any:
        go_on = last_words.continue_command(self.typed)
        with interruptions(lasting=self.alone) as asked:
            try:
                done = super().invoke(ctx)
                # What cannot be written is to be known before the interpreter's own end.
                sys.stdout.flush()
                return done
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except BaseException as error:  # noqa: BLE001 (whatever it is, it ends with its last words)
                # A request that comes now must not silence them.
                asked.raises = False
                code = last_words.say(error, asked.signal_number, go_on, bool(ctx.params.get("debug")))
        sys.exit(code)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Pretrain backbones on unlabelled satellite chips, by self-supervision.

    The pipeline is `dvc repro`, which runs stats, pretrain and evaluate with the dials of params.yaml.

    Exit codes: 0 done, 2 something to mend, 3 diverged, 4 disk, 130 and 143 interrupted and saved. The last line after
    any stop is the command that continues.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("earthprior").setLevel(logging.INFO)


def _params(root: Path) -> Params:
    return load(root / "params.yaml")


def _root() -> Path:
    """The project's root, for verbs that read no params.

    Raises:
        ParamsError: This is none.
    """
    if not (Path.cwd() / "params.yaml").exists():
        raise ParamsError(f"params.yaml not found in {Path.cwd().name}/; run from the project's root")
    return Path.cwd()


@main.command()
def stats() -> None:
    """Read every chip once: statistics, and all problems.

    Writes results/stats/.

    Example: earthprior stats
    """
    from earthprior.stages import stats as stage

    params = _params(Path.cwd())
    stage.run(params, Path.cwd())
    under_dvc.check_params("stats", params, Path.cwd())


@main.command()
@click.option(
    "--accept-code",
    is_flag=True,
    envvar="EARTHPRIOR_ACCEPT_CODE",
    show_envvar=True,
    help="Continue a run although the code changed since its last checkpoint.",
)
def pretrain(accept_code: bool) -> None:
    """Train the network, or go on where training was stopped.

    Writes results/pretrain/.

    Example: earthprior pretrain

    Example, on two GPUs: torchrun --nproc-per-node=2 -m earthprior pretrain
    """
    from earthprior.stages import pretrain as stage

    params = _params(Path.cwd())
    stage.run(params, Path.cwd(), accept_code)
    under_dvc.check_params("pretrain", params, Path.cwd())


@main.command()
def evaluate() -> None:
    """Judge the network: denoising gain, samples, probe.

    Writes the report and its numbers to results/evaluate/.

    Example: earthprior evaluate
    """
    from earthprior.stages import evaluate as stage

    params = _params(Path.cwd())
    stage.run(params, Path.cwd())
    under_dvc.check_params("evaluate", params, Path.cwd())


@main.command()
@click.option("--labels", type=click.IntRange(1), help="Learn from so many labelled chips; by default labels.")
@click.option("--pretrained", help="The backbone: a folder, a file or an MLflow run; by default pretrained.")
@click.option("--accept-code", is_flag=True, envvar="EARTHPRIOR_ACCEPT_CODE", show_envvar=True, help="As of pretrain.")
def finetune(labels: int | None, pretrained: str | None, accept_code: bool) -> None:
    """Train a pretrained network on labels.

    Reads downstream/params.yaml, and writes downstream/results/finetune/. Killed and started again, it goes on. As a
    DVC pipeline of its own: dvc repro downstream/dvc.yaml

    Example: earthprior finetune --labels 16

    Example: earthprior finetune --pretrained results/pretrain
    """
    from earthprior.params import load_downstream
    from earthprior.tools import finetune as tool

    asked = {"labels": labels, "pretrained": pretrained}
    changes = {key: value for key, value in asked.items() if value is not None}
    params = load_downstream(_root() / tool.FOLDER / "params.yaml", changes)
    tool.run(params, Path.cwd(), accept_code)
    tool.check_params(params, Path.cwd())


@main.command()
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path), metavar="[INPUT]...")
@click.option("--model", type=click.Path(path_type=Path), help="By default downstream/results/finetune.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the results; by default work/predict."
)
@click.option("--probabilities", is_flag=True, help="Of maps, write the probabilities, too.")
@click.option("--tile", type=click.IntRange(8), help="Width of a tile, px; by default what the network was trained on.")
@click.option("--overlap", type=click.IntRange(0), help="Of neighbouring tiles, px; by default half a tile.")
@click.option("--force", is_flag=True, help="Make again what is there, and replace what was not made here.")
def predict(
    inputs: tuple[Path, ...],
    model: Path | None,
    out: Path | None,
    probabilities: bool,
    tile: int | None,
    overlap: int | None,
    force: bool,
) -> None:
    """Map scenes or chips by a finetuned network.

    INPUT is a GeoTIFF of any size, a folder of them, or a catalog (CSV); by default the catalog of
    downstream/params.yaml. Writes a GeoTIFF for each; a table where the network gives one value per chip. Killed and
    started again, it goes on. Exit code 2: some could not be predicted; the others are.

    Example: earthprior predict scene.tif --out maps --probabilities
    """
    from earthprior.params import load_downstream
    from earthprior.tools import predict as tool

    params = load_downstream(_root() / "downstream/params.yaml")
    tool.run(params, Path.cwd(), inputs, model, out, probabilities, tile, overlap, force)


@main.command()
@click.argument("catalog", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--backbone", help="A folder, a file or an MLflow run; by default results/pretrain.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="By default work/embed/features.parquet.")
@click.option("--force", is_flag=True, help="Make it again where it is there, and replace any other file.")
def embed(catalog: Path | None, backbone: str | None, out: Path | None, force: bool) -> None:
    """Write a pretrained network's features of chips as Parquet.

    CATALOG is a CSV file, its paths relative to its folder; by default that of params.yaml. The file has all its
    columns, and the features as lists of numbers. Exit code 2: some chips could not be read; the others are in it.

    Example: earthprior embed data/catalog.csv --out features.parquet
    """
    from earthprior.tools import embed as tool

    tool.run(_params(Path.cwd()), Path.cwd(), catalog, backbone, out, force)


@main.command()
@click.option("--trials", type=click.IntRange(1), help="How many the study shall have in all; by default tune.trials.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes, sharing GPUs, threads.")
@click.option("--record/--no-record", default=True, help="Run the best trial as a DVC experiment at the end.")
@click.option("--apply", is_flag=True, help="Write the best trial into params.yaml instead of searching.")
@click.option("--trial", type=click.IntRange(0), help="With --apply: this trial, not the best.")
def tune(trials: int | None, jobs: int, record: bool, apply: bool, trial: int | None) -> None:
    """Search params.yaml, as its section tune says.

    Killed and started again, it goes on; started on several machines with one storage, it is one study. The report is
    in work/tune/.

    Example: earthprior tune --jobs 2

    Example: earthprior tune --apply
    """
    from earthprior.tools import tune as tool

    if trial is not None and not apply:
        raise click.UsageError("--trial says which trial --apply takes; add --apply")
    if apply:
        tool.apply(_params(Path.cwd()), Path.cwd(), trial)
    else:
        tool.run(_params(Path.cwd()), Path.cwd(), trials, jobs, record)


@main.command()
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes, sharing GPUs, threads.")
def bench(jobs: int) -> None:
    """Measure how few labels are enough.

    With pretraining and without, beside raw pixels, as the section bench of downstream/params.yaml says. Killed and
    started again, it does what is left. The table and the report are in work/bench/.

    Example: earthprior bench --jobs 2
    """
    from earthprior.params import load_downstream
    from earthprior.tools import bench as tool

    tool.run(load_downstream(_root() / "downstream/params.yaml"), Path.cwd(), jobs)


@main.command("sync-tracking")
def sync_tracking() -> None:
    """Deliver to MLflow what it has missed.

    After an outage: what waits in work/ goes to the store that each run was meant for, once. Trainings that were killed
    are marked so, and can still be continued. Exit code 0: all is delivered; 2: not yet, and nothing is lost.

    Example: earthprior sync-tracking
    """
    from earthprior.tools import sync_tracking as tool

    tool.run(_root())


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--chips", default=2, show_default=True, type=click.IntRange(1, 24), help="Chips that each run denoises.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="The page; by default work/compare/RUN-RUN.html."
)
def compare(runs: tuple[str, ...], chips: int, out: Path | None) -> None:
    """Put runs beside each other on one HTML page.

    RUN is an MLflow run id or the name of a DVC experiment. Shows the params that differ, numbers, curves, and the
    same chips denoised by each.

    Example: earthprior compare fiery-oaks lucid-bets --chips 4
    """
    from earthprior.tools import compare as tool

    tool.run(_params(Path.cwd()), Path.cwd(), runs, chips, out)


@main.command()
@click.argument("asked", metavar="RUN")
@click.option("--keep", is_flag=True, help="Leave the copy in work/reproduce/ afterwards.")
def reproduce(asked: str, keep: bool) -> None:
    """Make a run again, and say whether it is the same.

    RUN is an MLflow run id or the name of a DVC experiment. Exit code 0: the same to the bit; 2: not, or not possible,
    with which of code, data, params, packages and hardware differ, and what moved.

    Example: earthprior reproduce fiery-oaks
    """
    from earthprior.tools import reproduce as tool

    tool.run(_root(), asked, keep)


@main.command()
@click.option("--run", "asked", metavar="RUN", help="A run, folder or checkpoint; by default results/pretrain/.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder; by default work/export/ and the run's name.")
@click.option("--register", metavar="NAME", help="Make it the next version of this model in MLflow.")
def export(asked: str | None, out: Path | None, register: str | None) -> None:
    """Write a backbone for other people's code.

    RUN is whatever earthprior.load_backbone takes. Weights, config.json, a model card, a loader that needs only torch
    and safetensors, and graphs for torch.export and ONNX, each compared with the backbone. See docs/backbone.md.

    Example: earthprior export --out my-backbone
    """
    from earthprior.tools import export as tool

    tool.run(_root(), asked, out, register)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--catalog", help="The CSV file in FOLDER; by default data.catalog.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where all problems are listed; by default work/check/bad_chips.csv.",
)
@click.option("--readers", type=click.IntRange(1), help="Threads; by default operation.readers, or one per core.")
def check(folder: Path | None, catalog: str | None, out: Path | None, readers: int | None) -> None:
    """Read every chip once and tell all that is wrong.

    FOLDER is by default data.dir. What is checked is in docs/data.md. Exit code 0: chips can be trained on, maybe with
    warnings; 2: they cannot.

    Example: earthprior check
    """
    from earthprior.tools import check as tool

    tool.run(_params(Path.cwd()), Path.cwd(), folder, catalog, out, readers)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The catalog; by default catalog.csv in FOLDER.")
@click.option("--validate-fraction", default=0.2, show_default=True, help="Share of chips to validate on, about.")
@click.option("--test-fraction", default=0.0, show_default=True, help="Share of chips for a final test, about.")
@click.option("--seed", default=0, show_default=True, help="Chooses which places are held out.")
@click.option("--force", is_flag=True, help="Replace a catalog that exists.")
def catalog(
    folder: Path, out: Path | None, validate_fraction: float, test_fraction: float, seed: int, force: bool
) -> None:
    """List the GeoTIFFs of FOLDER in a catalog, split by place.

    Example: earthprior catalog data --validate-fraction 0.1
    """
    from earthprior.tools import catalog as tool

    tool.run(folder, out, validate_fraction, seed, test_fraction, force)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "--n", "n", default=1000, show_default=True, help="Number of chips.")
@click.option("--seed", default=0, show_default=True, help="Other seeds give other chips.")
@click.option("--workers", default=os.cpu_count() or 1, show_default="all cores", help="Number of processes.")
@click.option("--validate-fraction", default=0.2, show_default=True, help="Share of chips for validation, about.")
@click.option("--size", default=224, show_default=True, help="Width and height of a chip, px.")
@click.option("--force", is_flag=True, help="Replace an earlier set in OUT.")
def synth(out: Path, n: int, seed: int, workers: int, validate_fraction: float, size: int, force: bool) -> None:
    """Make procedural chips with land cover in folder OUT.

    Example: earthprior synth data -n 2000
    """
    from earthprior.tools import synth as tool

    tool.run(out, n, seed, workers, validate_fraction, size, force)


@main.command()
@click.option("--chips", default=4, show_default=True, type=click.IntRange(1, 24), help="Number of training chips.")
@click.option("--out", type=click.Path(path_type=Path), help="The PNG; by default work/augmentations.png.")
def augmentations(chips: int, out: Path | None) -> None:
    """Draw what each augmentation does to training chips.

    Needs results/stats/.

    Example: earthprior augmentations --chips 6
    """
    from earthprior.tools import augmentations as tool

    tool.run(_params(Path.cwd()), Path.cwd(), chips, out)


@main.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; by default params.yaml itself.")
def preset(name: str, out: Path | None) -> None:
    """Lay presets/NAME.yaml over params.yaml, comments kept.

    Example: earthprior preset nicfi-100k
    """
    from earthprior.tools import preset as tool

    tool.run(name, Path.cwd(), out)


@main.command("import-config")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; by default params.yaml itself.")
@click.option("--as-run", is_flag=True, help="Switch off what never had an effect there.")
def import_config(config: Path, out: Path | None, as_run: bool) -> None:
    """Lay a tutorial's ssl_train.yaml over params.yaml.

    Prints what became of each key, and what had never had an effect there. See docs/migration.md.

    Example: earthprior import-config ssl_train.yaml
    """
    from earthprior.tools import import_config as tool

    tool.run(config, Path.cwd(), out, as_run)


@main.command("import-weights")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--time-conditioning",
    type=click.Choice(["bottleneck", "none"]),
    default="bottleneck",
    show_default=True,
    help="none: trained before the tutorial's time embedding had an effect (before its commit b7b84cb).",
)
@click.option(
    "--write-params", is_flag=True, help="Set the network's keys in params.yaml as the checkpoint needs them."
)
def import_weights(checkpoint: Path, time_conditioning: Literal["bottleneck", "none"], write_params: bool) -> None:
    """Take a tutorial's checkpoint as results/pretrain/.

    Reads .pth (plain tensors only, no code) and .safetensors; needs results/stats/. See docs/migration.md.

    Example: earthprior import-weights best_model.pth
    """
    from earthprior.tools import import_weights as tool

    tool.run(checkpoint, _params(Path.cwd()), Path.cwd(), time_conditioning, write_params)


@main.command(hidden=True, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[STAGE] [--KEY VALUE]...")
def experiment(arguments: tuple[str, ...]) -> None:
    """What MLproject calls: dvc exp run, with keys of params.yaml as options.

    Example: earthprior experiment pretrain --lr 3e-4
    """
    from earthprior.tools import experiment as tool

    sys.exit(tool.run(Path.cwd(), arguments))
