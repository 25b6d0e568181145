"""For modules of your own that --import names: add a router, an objective, a condition, a loss term or an average.

    # my_paper.py
    import plugins
    plugins.add_router("mine", MyRouter)

    python train.py --import my_paper --config configs/shapes.yaml --set model.router=mine

docs/extending.md has an example of each.
"""

import config_keys
from diffusion.process import OBJECTIVES, Objective
from models.embeddings import CONDITIONS, Condition
from models.router import ROUTERS, Router
from training.losses import TERMS, Term
from weights.averages import AVERAGES, Average


def add_router(name: str, router: type[Router]) -> None:
    """Let `model.router` be this name."""
    ROUTERS[name] = router
    config_keys.ROUTERS.append(name)
    if not router.is_learned:
        config_keys.CONTROL_ROUTERS.append(name)


def add_objective(name: str, objective: Objective) -> None:
    """Let `diffusion.objective` be this name."""
    OBJECTIVES[name] = objective
    config_keys.OBJECTIVES.append(name)
    if objective.learns_variance:
        config_keys.VARIANCE_OBJECTIVES.append(name)


def add_condition(kind: str, condition: type[Condition]) -> None:
    """Let an entry of `data.conditions` be of this kind; "mine-N" stands for mine-4 and every other number."""
    CONDITIONS[kind] = condition
    config_keys.CONDITIONS.append(kind)


def add_term(name: str, term: type[Term]) -> None:
    """Let `training.terms` have an entry of this name."""
    TERMS[name] = term
    config_keys.TERMS.append(name)


def add_average(name: str, average: type[Average]) -> None:
    """Let `training.averages` have an entry of this name, which `--weights` then takes."""
    AVERAGES[name] = average
