"""The command line: a thin interface to the library and its trainer."""
