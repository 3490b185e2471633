"""A backend distribution to start from, as ``mortise new-plugin`` writes it."""

from mortise.scaffold.plan import PluginPlan, plan_plugin
from mortise.scaffold.render import render_plugin
from mortise.scaffold.write import write_whole

__all__ = ["PluginPlan", "plan_plugin", "render_plugin", "write_whole"]
