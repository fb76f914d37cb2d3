"""The command line: `python -m baselines train`, `sweep`, `demo`, `short-horizon`, `run` and `report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baselines.comparators.tuned import BY, RELATIVE
from baselines.config import CLIP_BY, CURVATURE, LOOKAHEAD, LOSS_MODEL, META, Config
from baselines.data import LOADERS
from baselines.experiments import BUDGETS, EXPERIMENTS
from baselines.experiments.scripts import SCRIPTS
from baselines.methods import METHODS
from baselines.models import MODELS
from baselines.optimizers import OPTIMIZERS


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _reals(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_whole_numbers.__name__ = "comma-separated list of whole numbers"  # argparse names the type in its messages
_reals.__name__ = "comma-separated list of numbers"


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train one model with one method",
        description="Train one model with one method. Ctrl-C stores everything; --resume continues from there.",
        argument_default=argparse.SUPPRESS,
    )
    _add_config(train)
    train.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/ and what is run)")
    train.add_argument("--resume", action="store_true", help="continue the run stored in --out")
    train.add_argument("--overwrite", action="store_true", help="start anew although --out holds a run")


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="a search over λ, or over any other option of train",
        description="Train with every value of λ, or of other options, on Ray Tune, and show the schedules that came "
        "of it. What is stored is not trained again, so the same command goes on after an interruption.",
        argument_default=argparse.SUPPRESS,
    )
    _add_config(sweep, several=True)
    search = sweep.add_argument_group("search")
    over = "search over an option: NAME=VALUE,VALUE,... or NAME=LOW..HIGH; give it once for each"
    search.add_argument("--over", action="append", metavar="SPEC", help=over)
    trials = "runs in all, where a range is searched, by Optuna (default: 16)"
    search.add_argument("--trials", type=int, metavar="N", help=trials)
    search.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (default: this machine)")
    search.add_argument("--workers", type=int, metavar="N", help="processes of one thread (default: one a core)")
    search.add_argument("--older", action="store_true", help="count cells that were computed by earlier code")
    search.add_argument("--out", type=Path, metavar="DIR", help="default: runs/sweep- and what is searched")
    search.add_argument("--cells", type=Path, metavar="DIR", help="the store (default: results/cells)")


def _add_config(train: argparse.ArgumentParser, several: bool = False) -> None:
    """The options that set a configuration; `several` values of λ where it is searched."""

    def option(group: Any, flag: str, text: str, **settings: Any) -> None:
        default = getattr(Config, flag.removeprefix("--").replace("-", "_"), None)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        group.add_argument(flag, help=text if default in (None, False) else f"{text} (default: {shown})", **settings)

    task = train.add_argument_group("task")
    option(task, "--data", "data set", choices=tuple(LOADERS))
    option(task, "--data-dir", "where its files are", metavar="DIR")
    option(task, "--examples", "train on the first N training examples only", type=int, metavar="N")
    option(task, "--label-noise", "fraction of the training labels drawn anew", type=float, metavar="FRACTION")
    option(task, "--augment", "train on random crops and reflections of the images", action="store_true")
    option(task, "--model", "model", choices=tuple(MODELS))
    option(task, "--hidden", "the mlp's hidden widths (default: 1000,1000; digits: 100,100)", type=_whole_numbers)
    method = train.add_argument_group("method")
    option(method, "--optimizer", "optimizer; sgdm has Nesterov momentum 0.9", choices=tuple(OPTIMIZERS))
    option(method, "--method", "what sets the learning rate", choices=tuple(METHODS))
    lr = "initial learning rate (default: 0.001; 1, a factor, for the methods that estimate it)"
    option(method, "--lr", lr, type=float)
    option(method, "--weight-decay", "weight decay (default: that of torch.optim)", type=float)
    option(method, "--clip", "shorten longer gradients to this norm", type=float, metavar="NORM")
    option(method, "--clip-by", "the norm of all gradients together, or of each parameter's own", choices=CLIP_BY)
    option(method, "--damping", "of --optimizer kfac: damping (default: that of apo.kfac)", type=float)
    option(method, "--eps", "of --optimizer adahessian: epsilon (default: 1e-4)", type=float)
    option(method, "--rule", "use apo's own update rule where torch.optim has the optimizer too", action="store_true")
    meta_lr = "of --method hd, gdtuo, and apo --meta paper: learning rate of the learning rate (default: the authors')"
    option(method, "--meta-lr", meta_lr, type=float)
    warmup = "of schedules and schedule-free: the fraction of the run over which the learning rate grows from 0"
    option(method, "--warmup", warmup, type=float, metavar="FRACTION")
    decay = "of --method step: the factor at each decay; of exponential: over the whole run"
    option(method, "--decay-factor", decay, type=float, metavar="FACTOR")
    option(method, "--decay-at", "of --method step: where, in fractions of the run", type=_reals, metavar="LIST")
    tune = "of --method apo: what is tuned; anything but lr needs --rule, or an optimizer not in torch.optim"
    option(method, "--tune", tune, type=_names, action="extend", metavar="LIST")
    option(method, "--by", "of --method apo: what has a value of its own", choices=BY)
    option(
        method, "--relative", "of --method apo: schedule in units of the tuned learning rate", choices=tuple(RELATIVE)
    )
    option(method, "--meta", "of --method apo: how it is moved", choices=META)
    option(method, "--every", "of --method apo and gen: steps between changes of lr", type=int, metavar="K")
    weight: dict[str, Any] = {"metavar": "VALUES"} if several else {"type": float}
    values = ", or several (1,0.1,0), or a range (1e-5..1)" if several else ""
    option(method, "--fsd", f"of --method apo: weight of the function-space discrepancy{values}", **weight)
    option(method, "--wsd", f"of --method apo: weight of the weight-space discrepancy{values}", **weight)
    option(method, "--curvature", "of --method apo, meta newton: what it is taken from", choices=CURVATURE)
    beyond = "of --method apo, meta newton: the learning rate aimed at, over the objective's minimiser"
    option(method, "--relaxation", beyond, type=float, metavar="FACTOR")
    option(method, "--lookahead", "of --method apo: which step is judged", choices=LOOKAHEAD)
    option(method, "--loss-model", "of --method apo: how the step's own loss is judged", choices=LOSS_MODEL)
    fraction = "of --method apo: part of the other batch that is measured"
    option(method, "--other-fraction", fraction, type=float, metavar="FRACTION")
    run = train.add_argument_group("run")
    length = run.add_mutually_exclusive_group()
    option(length, "--epochs", "passes over the training set (default: 10; digits: 60)", type=int, metavar="N")
    option(length, "--steps", "length of the run in steps", type=int, metavar="N")
    option(run, "--batch-size", "examples a step", type=int, metavar="N")
    option(run, "--seed", "of initial weights and data order", type=int)
    option(run, "--eval-every", "steps between evaluations (default: an epoch)", type=int, metavar="N")
    option(run, "--log-every", "steps between rows of history.csv", type=int, metavar="N")
    option(run, "--device", "auto, cpu, cuda, ...")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="three far-off initial learning rates, with and without apo",
        description="Train the same MLP from initial learning rates 1e-6, 1e-3 and 1, with AdamW alone and with AdamW "
        "tuned by apo; show a table and draw one picture.",
    )
    demo.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits", help="default: digits")
    demo.add_argument("--data-dir", metavar="DIR", help="where its files are")
    demo.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the training set (default: 40; fashion-mnist: 5)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of initial weights and data order (default: 0)")
    demo.add_argument("--out", type=Path, metavar="DIR", help="where demo.png goes (default: runs/demo-<data>)")


def _add_short_horizon(commands: Any) -> None:
    horizon = commands.add_parser(
        "short-horizon",
        help="the noisy quadratic: the paper's Table 2, and what comes of short horizons",
        description="Compute the best schedules on the noisy quadratic in exact expectation, and what comes of looking "
        "only so many steps ahead; write results.json, pictures and a report.",
        argument_default=argparse.SUPPRESS,
    )
    horizon.add_argument("--steps", type=int, metavar="N", help="steps of training for Table 2 (default: 300)")
    horizon.add_argument("--sweep-steps", type=int, metavar="N", help="steps for the horizons (default: 1000)")
    horizon.add_argument("--horizons", type=_whole_numbers, metavar="LIST", help="default: 1,10,100,300,1000")
    horizon.add_argument("--dimension", type=int, metavar="N", help="of the problem (default: 1000)")
    condition = "condition numbers, the first for Table 2 too (default: 100,1000)"
    horizon.add_argument("--conditions", type=_reals, metavar="LIST", help=condition)
    horizon.add_argument("--noises", type=_reals, metavar="LIST", help="noise levels, likewise (default: 1,0.01)")
    horizon.add_argument("--runs", type=int, metavar="N", help="sampled runs beside each cell (default: 100)")
    horizon.add_argument("--workers", type=int, metavar="N", help="processes (default: 2)")
    horizon.add_argument("--out", type=Path, metavar="DIR", help="default: runs/short-horizon")


def _add_experiments(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="tables and figures of the papers, by name",
        description="Carry out experiments: train what the cell store lacks, and write reports. What is stored is not "
        "trained again, so the same command goes on after an interruption.",
        argument_default=argparse.SUPPRESS,
    )
    report = commands.add_parser(
        "report",
        help="the reports again, from the stored cells",
        description="Write the reports of experiments from the cells that are stored; nothing is trained.",
        argument_default=argparse.SUPPRESS,
    )
    named = (*SCRIPTS, *EXPERIMENTS)
    run.add_argument("names", nargs="+", choices=named, metavar="NAME", help=", ".join(named))
    report.add_argument("names", nargs="*", metavar="NAME", help="default: all that have cells")
    run.add_argument("--workers", type=int, metavar="N", help="processes of one thread (default: one a core)")
    run.add_argument("--data-dir", metavar="DIR", help="where the data sets' files are")
    run.add_argument("--older", action="store_true", help="count cells that were computed by earlier code")
    for parser in (run, report):
        parser.add_argument("--budget", choices=BUDGETS, help="default: short")
        parser.add_argument("--out", type=Path, metavar="DIR", help="default: docs/results; smoke: runs/smoke")
        parser.add_argument("--cells", type=Path, metavar="DIR", help="the store (default: results/cells)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="python -m baselines", description="Comparators and training tasks of apo.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands)
    _add_sweep(commands)
    _add_demo(commands)
    _add_short_horizon(commands)
    _add_experiments(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        The exit status: 0, 2 for a mistake that the message explains, 130 when interrupted.
    """
    options = vars(make_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        from baselines.display import make_console

        console = make_console()
        if command == "demo":
            from baselines.demo import demo

            return demo(console, **options)
        if command in ("run", "report"):
            from baselines.experiments import commands

            return int(getattr(commands, command)(console, **options))
        if command == "short-horizon":
            from baselines.short_horizon import short_horizon

            return short_horizon(console, **options)
        if command == "sweep":
            from baselines.search import sweep

            names = ("over", "trials", "address", "workers", "older", "out", "cells")
            of_sweep = {name: options.pop(name) for name in names if name in options}
            of_sweep["over"] = of_sweep.get("over", []) + [
                f"{name}={options.pop(name)}" for name in ("fsd", "wsd") if name in options
            ]
            return sweep(console, options, **of_sweep)
        from baselines.train import train

        own = {name: options.pop(name) for name in ("out", "resume", "overwrite") if name in options}
        return train(options, console, own.get("out"), own.get("resume", False), own.get("overwrite", False))
    except ModuleNotFoundError as error:
        sys.stderr.write(f"python -m baselines {command}: {error}; pip install '.[baselines]' in a checkout\n")
        return 2
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"python -m baselines {command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
