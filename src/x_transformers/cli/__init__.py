"""The command line: a thin face of the library and of its trainer."""
