"""What `python -m baselines short-horizon` writes: pictures, and a text whose every number is from the results."""

from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from baselines.plots import INK, tidy

NAMES = {
    "optimal": "optimal",
    "exponential": "exponential",
    "linear": "linear",
    "linear_nonnegative": "linear, λ ≥ 0 throughout",
    "linear_clipped": "linear, max(0, a + bt)",
    "fixed": "fixed",
}


def schedules_figure(families: Mapping[str, Any], kind: str) -> Figure:
    """Losses, and learning rates or λ, of the best schedule of each family (the paper, Fig. 12 and 13)."""
    figure = Figure(figsize=(11, 4), layout="constrained", dpi=110)
    losses, chosen = figure.subplots(1, 2)
    colours = colormaps["viridis"]([0.0, 0.3, 0.55, 0.7, 0.82, 0.95])
    for colour, (name, cell) in zip(colours, families.items(), strict=False):
        losses.plot(cell["course"]["loss"], color=colour, label=NAMES[name])
        chosen.plot(cell["sequence"], color=colour, label=NAMES[name])
    losses.set_yscale("log")
    chosen.set_yscale("symlog", linthresh=1e-3)
    tidy(losses, "step", "expected loss")
    tidy(chosen, "step", "learning rate" if kind == "sgd" else "λ")
    losses.legend(frameon=False, labelcolor=INK)
    figure.suptitle("SGD" if kind == "sgd" else "SGD with APO", color=INK)
    return figure


def bias_figure(sweep: Mapping[str, Any]) -> Figure:
    """Losses and learning rates for every horizon."""
    figure = Figure(figsize=(11, 4), layout="constrained", dpi=110)
    losses, rates = figure.subplots(1, 2)
    courses = sweep["horizons"]
    for colour, (horizon, course) in zip(
        colormaps["viridis"]([i / max(1, len(courses) - 1) * 0.95 for i in range(len(courses))]),
        courses.items(),
        strict=True,
    ):
        losses.plot(course["steps"], course["loss"], color=colour, label=f"{horizon} ahead")
        rates.plot(course["steps"], course["lr"], color=colour, label=f"{horizon} ahead")
    for axes, label in ((losses, "expected loss"), (rates, "learning rate")):
        axes.set_yscale("log")
        tidy(axes, "step", label)
    losses.legend(frameon=False, labelcolor=INK)
    return figure


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table2(results: Mapping[str, Any]) -> list[str]:
    lines = [_row("", "schedule", "the paper", "exact optimum", "sampled"), _row("---", "---", *["---:"] * 3)]
    for kind, families in results["schedules"].items():
        for name, cell in families.items():
            printed = results["paper"][kind].get(name)
            sampled = cell.get("sampled")
            seen = f"{sampled['mean']:.3f} ± {sampled['error']:.3f}" if sampled else "-"
            below = printed is not None and printed < 0.995 * cell["loss"]
            label = "SGD" if kind == "sgd" else "SGD + APO"
            lines.append(_row(label, NAMES[name], "-" if printed is None else f"{printed}{'*' if below else ''}",
                              f"{cell['loss']:.3f}", seen))  # fmt: skip
    return lines


def _below(results: Mapping[str, Any]) -> list[str]:
    """The printed cells below the exact optimum of their family."""
    printed = [(kind, name, value) for kind, row in results["paper"].items() for name, value in row.items()]
    return [str(value) for kind, name, value in printed if value < 0.995 * results["table2"][kind][name]]


def _sweep(results: Mapping[str, Any]) -> list[str]:
    settings = results["sweep"]
    heads = [f"κ = {s['condition']:g}, noise {s['noise']:g}" for s in settings]
    lines = [_row("what chooses the learning rate", *heads), _row("---", *["---:"] * len(heads))]
    for horizon in settings[0]["horizons"]:
        ends = [s["horizons"][horizon]["loss"][-1] for s in settings]
        lines.append(_row(f"best for the next {horizon}, chosen anew", *(f"{end:.3g}" for end in ends)))
    for name in settings[0]["methods"]:
        ends = [s["methods"][name]["loss"][-1] for s in settings]
        lines.append(_row(name, *(f"{end:.3g}" for end in ends)))
    return lines


def _statements(results: Mapping[str, Any]) -> list[str]:
    """What the numbers of Table 2's setting say."""
    table, sweep = results["table2"], results["sweep"][0]
    ends = {name: course["loss"][-1] for name, course in sweep["methods"].items()}
    horizons = {int(h): course["loss"][-1] for h, course in sweep["horizons"].items()}
    shortest, best = min(horizons), min(horizons, key=lambda h: horizons[h])
    rates = sweep["horizons"][str(shortest)]["lr"]
    lrs = sweep["methods"]["APO, same batch, λ = 0"]["lr"]
    same, fresh = ends["APO, same batch, λ = 0"], ends["APO, fresh batch, λ = 0"]
    fixed, made = ends["APO, same batch, best fixed λ"], ends["APO, same batch, best exponential λ"]
    return [
        f"- **The bias.** Looking {shortest} step ahead ends at {horizons[shortest]:.3g}, looking {best} ahead at "
        f"{horizons[best]:.3g}. The short look takes the learning rate from {rates[0]:.2g} down to {rates[-1]:.2g}: "
        "what pays now is less noise in the steep directions, and the flat ones are left where they are. "
        f"Hypergradient descent, whose rest point is greedy's, ends at {ends['hypergradient descent']:.3g}.",
        f"- **λ = 0, same batch.** {same:.3g}, against greedy's {ends['greedy']:.3g}: it has the opposite fault. The "
        "step is judged by noise that it is free to fit, so the learning rate stays where it was "
        f"({lrs[0]:.3g} at first, {lrs[-1]:.3g} at the end).",
        f"- **A fixed λ, same batch.** The best one ends at {fixed:.3g}, where the best fixed learning rate ends at "
        f"{ends['SGD, best fixed lr']:.3g}: it amounts to a fixed learning rate.",
        f"- **A λ schedule, same batch.** {made:.3g} with an exponential one, against "
        f"{ends['SGD, best exponential lr']:.3g} for an exponential learning rate. After "
        f"{results['setting']['steps']} steps, with every λ free, {table['apo']['optimal']:.3g} against "
        f"{table['sgd']['optimal']:.3g}. So APO is as good as its λ schedule, which has to know how long the training "
        "lasts, as a learning rate's has to.",
        f"- **A fresh batch.** With λ = 0 it is greedy itself ({fresh:.3g}). λ > 0 only shortens steps that are too "
        f"short already ({ends['APO, fresh batch, λ = 1']:.3g} with λ = 1).",
    ]


def text(results: Mapping[str, Any]) -> str:
    """The report, in Markdown."""
    setting, below = results["setting"], _below(results)
    lines = [
        "# The noisy quadratic and the short-horizon bias",
        "",
        f"f̃(x) = ½ (x − c)ᵀH(x − c), {setting['dimension']} coordinates, curvatures h evenly from 1/κ to 1, "
        "Var c = noise/h, x₀ = 100 in each coordinate. Losses are exact expectations of ½xᵀHx, without sampling "
        "(Amortized Proximal Optimization, App. F).",
        "",
        "    python -m baselines short-horizon --out docs/results/short_horizon",
        "",
        f"## Table 2: the best schedule of each family, after {setting['steps']} steps",
        "",
        *_table2(results),
        "",
        "Each exact optimum is by L-BFGS on the exact gradient through all steps, the best from several starts. "
        "Sampled: the mean over simulated runs at the schedule's learning rates, and its standard error. "
        f"The table took {results['seconds']['table2']:.0f} s. Linear λ may be negative where nothing is said.",
    ]
    if below:
        lines += [
            "",
            f"\\* {', '.join(below)}: the paper prints less than the exact optimum of the model as described. No "
            "schedule of the family can reach that in expectation; a single noisy run can.",
        ]
    lines += [
        "",
        "![Losses and learning rates of SGD](figure_12.png)",
        "",
        "![Losses and λ of SGD with APO](figure_13.png)",
        "",
        f"## The sweep: final loss after {setting['sweep_steps']} steps",
        "",
        *_sweep(results),
        "",
        "![Losses and learning rates for every horizon](horizons.png)",
        "",
    ]
    if results["paper"]["sgd"]:  # the words are about these numbers
        lines += [
            "## What it shows",
            "",
            f"In the first setting (κ = {setting['condition']:g}, noise {setting['noise']:g}):",
            "",
            *_statements(results),
            "",
        ]
    return "\n".join(lines)
