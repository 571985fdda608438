"""What stands behind the public names: one folder for each step of the flow."""
