"""The trainer behind the command line: data, steps, checkpoints, reports. No other folder of the package imports it."""
