"""What the objective says of a step."""

import math
from dataclasses import dataclass

from apo.bases.base import Slopes


@dataclass
class Verdict:
    """What the objective says of a step.

    Attributes:
        loss: L_B(θ'), or gᵀΔ where the loss is linearised.
        fsd: λ_FSD times the mean discrepancy.
        wsd: λ_WSD times ½‖θ' − θ‖².
        start: Slopes at the beginning of the step.
        end: Slopes at its end.
    """

    loss: float
    fsd: float
    wsd: float
    start: Slopes
    end: Slopes

    @property
    def objective(self) -> float:
        """Q."""
        return self.loss + self.fsd + self.wsd

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(map(math.isfinite, (self.objective, *self.start.values(), *self.end.values())))


def along(slopes: Slopes) -> float:
    """The slope along the step: the sum over all learning rates."""
    return sum(slope for (coordinate, _), slope in slopes.items() if coordinate.hyper == "lr")
