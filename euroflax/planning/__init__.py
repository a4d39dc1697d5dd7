"""What a run will be and what it takes, before anything is computed."""

from euroflax.planning.plan import Plan, make_plan
from euroflax.planning.stages import describe_stages
from euroflax.planning.targets import Target, how_to_compile, parse_target

__all__ = ["Plan", "Target", "describe_stages", "how_to_compile", "make_plan", "parse_target"]
