"""The trainer behind the command line: data, steps, checkpoints, reports. Nothing else in the package imports it."""
