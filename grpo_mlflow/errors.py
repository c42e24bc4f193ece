"""The errors that a person can mend. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something outside the program is wrong (a path, a store, a model): one line says what and where."""

    exit_code = 1


class Pruned(Exception):
    """A trial was ended early because it is hopeless: neither a failure nor a finish."""


class ConfigError(UserError):
    """A setting is wrong: each line names the key, the value and what is allowed."""

    exit_code = 2
