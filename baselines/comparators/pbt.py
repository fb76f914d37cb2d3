"""Population-based training by Ray Tune (Jaderberg et al. 2017, arXiv 1711.09846; the settings of APO's App. H).

A population of networks is trained side by side. After every `perturb_every` steps the worst quarter of them, by the
mean batch loss since the last time, goes on from the weights and the state of the best quarter, at its learning rate
times 0.8 or 1.2. Members start from weights of their own and the same learning rate, and take turns on one core.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from baselines.cells import Trained
from baselines.config import Config
from baselines.ray_session import session, tune_all
from baselines.run import Run, cost_clock, load_task

FACTORS: Final = (1.2, 0.8)
PERTURBATIONS: Final = 20  # of a run, if `perturb_every` is not given
Report = dict[str, Any]  # of one member, over the steps between two perturbations


def interval(config: Config, steps: int) -> int:
    """The steps between two perturbations: a multiple of `log_every`, so that a row of the history ends each."""
    if config.perturb_every is not None:
        return config.perturb_every
    return config.log_every * max(1, round(steps / PERTURBATIONS / config.log_every))


class Member:
    """A network of the population, from one perturbation to the next.

    Args:
        config: Of the population.
    """

    run: Run

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(1)
        self.config, self.data = config, load_task(config)

    def begin(self, place: int, lr: float) -> None:
        """Start anew, as that member and at that learning rate."""
        config = dataclasses.replace(self.config, seed=self.config.population * self.config.seed + place, lr=lr)
        self.run = Run(config, self.data, clock=cost_clock(config.device))

    def advance(self) -> Report:
        """Train up to the next perturbation.

        Returns:
            The rows of the history since the last one, with their own seconds; the mean batch loss over them
            ("measure"), infinite if it is not finite; and at the end of the run its outcome.
        """
        run = self.run
        before, begun, seconds = run.step, len(run.history), run.seconds
        for _ in range(min(interval(self.config, run.steps), run.steps - run.step)):
            run.advance()
        rows: list[dict[str, Any]] = [dict(row) for row in run.history[begun:]]
        total, at = 0.0, before
        for row in rows:
            row["seconds"] -= seconds
            total += (row["loss"] or 0.0) * (row["step"] - at)
            at = row["step"]
        return {
            "measure": total / (run.step - before) if math.isfinite(total) else math.inf,
            "rows": rows,
            "seed": run.config.seed,
            "steps": run.step,
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "outcome": run.outcome() if run.finished else None,
        }


def reports(config: Config) -> list[list[Report]]:
    """Train a population: the members' reports, by perturbation, in the members' order."""
    with session(1):
        from ray import tune
        from ray.tune.schedulers import PopulationBasedTraining

        class Trial(tune.Trainable):
            """A member, as Ray Tune wants it."""

            def setup(self, config: dict[str, Any]) -> None:
                self.member = Member(base)
                self.reset_config(config)

            def reset_config(self, new_config: dict[str, Any]) -> bool:
                self.member.begin(new_config["place"], new_config["lr"])
                return True

            def step(self) -> Report:
                return self.member.advance()

            def save_checkpoint(self, checkpoint_dir: str) -> None:
                torch.save(self.member.run.state_dict(), Path(checkpoint_dir, "run.pt"))

            def load_checkpoint(self, checkpoint: Any) -> None:
                self.member.run.load_state_dict(torch.load(Path(checkpoint, "run.pt"), weights_only=True))

        base, steps = config, config.total_steps(len(load_task(config).train_targets))
        found: dict[str, list[Report]] = {}
        tune_all(
            Trial,
            {"place": tune.grid_search(list(range(config.population))), "lr": config.lr},
            lambda name, report: found.setdefault(name, []).append(report),
            stop={"training_iteration": math.ceil(steps / interval(config, steps))},
            seed=config.seed,
            scheduler=PopulationBasedTraining(
                time_attr="training_iteration",
                metric="measure",
                mode="min",
                perturbation_interval=1,
                hyperparam_mutations={"lr": lambda: base.lr},  # would be called to resample
                resample_probability=0.0,
                perturbation_factors=FACTORS,
                synch=True,
                log_config=False,
            ),
        )
    return [list(each) for each in zip(*found.values(), strict=True)]


def train(config: Config) -> Trained:
    """Train a population.

    Returns:
        The rows and the outcome of the best member, by its mean batch loss between two perturbations; as seconds, those
        of all members together; as "lr/0" and so on the learning rate of each.
    """
    return combine(reports(config))


def combine(by_time: Sequence[Sequence[Report]]) -> Trained:
    """What `train` returns, from the reports of all members by perturbation."""
    rows: list[dict[str, Any]] = []
    for members in by_time:
        best = min(members, key=lambda report: report["measure"])
        spent = rows[-1]["seconds"] if rows else 0.0
        for place, row in enumerate(best["rows"]):
            others = [member["rows"][place] for member in members]
            rates = {f"lr/{number}": other["lr"] for number, other in enumerate(others)}
            rows.append(row | {"seconds": spent + sum(other["seconds"] for other in others)} | rates)
    return Trained(
        finished=math.isfinite(best["measure"]),
        steps=best["steps"],
        parameters=best["parameters"],
        outcome=best["outcome"] | {"seconds": rows[-1]["seconds"]},
        curves={column: [row[column] for row in rows] for column in rows[0] if column != "epoch"},
    )
