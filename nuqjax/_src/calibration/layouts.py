"""Plans of leaves with what the function's use of them shows."""

from dataclasses import replace

from nuqjax._src.calibration.second_moments import Moments
from nuqjax._src.compress.plan import LeafPlan, replanned
from nuqjax._src.compress.rules import Options
from nuqjax._src.leaf.rows import ChannelGroups


def with_scales(options: Options) -> Options:
    """The options, with a scale for each channel where channels share a codebook and nothing is said of scales."""
    shared = options.granularity == "tensor" or isinstance(options.granularity, ChannelGroups)
    return replace(options, scale="channel") if options.scale is None and shared else options


def as_used(plan: LeafPlan, moments: Moments) -> LeafPlan:
    """The plan with the axes that the function's use shows, where the user has said nothing of them."""
    if plan.reason is not None:
        return plan
    options, shown = plan.options, moments.axes(plan.path)
    if shown is None:
        takes_corrections = any(slot.name == plan.path for slot in moments.slots)
        if takes_corrections and options.skip is not False:
            return replace(plan, reason="it is an offset, which takes corrections", nbytes_after=plan.nbytes_before)
        return plan
    axes, stack = shown
    if options.stack_axes == 0 and stack and options.skip is not False:
        options = replace(options, stack_axes=stack)
    if options.axis == -1:
        moved = tuple(a + stack - options.stack_axes for a in axes)
        options = replace(options, axis=tuple(a for a in moved if a >= 0))
    return replanned(plan, options)
