"""The spine: rules, plan, compress."""
