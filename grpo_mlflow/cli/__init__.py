"""The commands: parse, build, call. Each module has a `main(argv)`; `command.run` ends it."""
