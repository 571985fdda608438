"""Completes the plans of leaves from their uses in the function."""

from dataclasses import replace

from nuqjax._src.calibration.second_moments import Moments
from nuqjax._src.compress.plan import LeafPlan, replanned
from nuqjax._src.compress.rules import Options
from nuqjax._src.leaf.rows import ChannelGroups


def with_scales(options: Options) -> Options:
    """Returns the options with a scale for each channel, if channels share a codebook and no scale is given."""
    shared = options.granularity == "tensor" or isinstance(options.granularity, ChannelGroups)
    return replace(options, scale="channel") if options.scale is None and shared else options


def as_used(plan: LeafPlan, moments: Moments) -> LeafPlan:
    """Returns the plan with the axes from the leaf's uses, where the user has not set them; offsets stay dense."""
    if plan.reason is not None:
        return plan
    options, shown = plan.options, moments.axes(plan.path)
    if shown is None:
        takes_corrections = any(bias.name == plan.path for bias in moments.biases)
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
