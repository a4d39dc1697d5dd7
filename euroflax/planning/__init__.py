"""What a run will be and what it takes, before anything is computed."""

from euroflax.planning.compiled import trace_stages
from euroflax.planning.lines import plan_lines, size
from euroflax.planning.plan import Plan, make_plan
from euroflax.planning.stages import describe_stages
from euroflax.planning.targets import Target, parse_target

__all__ = ["Plan", "Target", "describe_stages", "make_plan", "parse_target", "plan_lines", "size", "trace_stages"]
