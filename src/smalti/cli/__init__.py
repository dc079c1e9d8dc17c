"""The command line: parse, call the library, print. Heavy imports happen inside the commands."""
