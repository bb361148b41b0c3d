"""What a run was trained with: its folder, its settings, its reward and how its masks are made."""

import importlib

from vesselrl.experiment.config import TrainConfig
from vesselrl.scoring.postprocessing import PostProcessing
from vesselrl.scoring.rewards import CustomReward, Reward, get_reward_function


def post_processing(
    settings: dict,
    threshold: float = 0.5,
    min_component_px: int | None = None,
    close_gaps: float | None = None,
) -> PostProcessing:
    """How masks are made: as asked, or (None) as the run with these settings was trained and validated.

    Raises:
        ValueError: a value out of range.
    """
    if min_component_px is None:
        min_component_px = settings.get("min_component_px", 0)
    if close_gaps is None:
        close_gaps = settings.get("close_gaps", 0.0)
    return PostProcessing(threshold, min_component_px, close_gaps)


def make_reward(config: TrainConfig) -> Reward:
    """The reward of the run, with the user's own term.

    Raises:
        ValueError: weights or the function's name are unusable.
    """
    return get_reward_function(
        config.reward_type,
        spec=config.reward_spec,
        dice_weight=config.dice_weight,
        recall_weight=config.recall_weight,
        topology_weight=config.topology_weight,
        length_weight=config.length_weight,
        recall_target=config.recall_target,
        precision_target=config.precision_target,
        precision_weight=config.precision_weight,
        custom=import_function(config.reward_fn) if config.reward_fn else None,
        custom_weight=config.reward_fn_weight,
    )


def import_function(name: str) -> CustomReward:
    """The function called `package.module:function`.

    Raises:
        ValueError: the name has another form, or the module or function does not exist.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"--reward_fn is {name!r}; give it as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module can raise anything
        raise ValueError(
            f"--reward_fn {name}: the module cannot be imported ({type(error).__name__}: {error}). "
            "It is looked for in the folders of PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--reward_fn {name}: {module_name} has no function {function_name!r}.")
    return function
