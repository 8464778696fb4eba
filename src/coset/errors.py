"""The five errors a caller can meet.

Each carries `code` (a stable name that scripts may test), `structure_id` and `field` (what was
wrong where) and `hint` (what to do). The message says what, the value, what was expected and the
remedy.
"""


class CosetError(Exception):
    """Base of every error raised on purpose by this package."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        structure_id: str = "",
        field: str = "",
        hint: str = "",
    ) -> None:
        """Keep the parts; `reason` is the message with its hint, without the structure's name."""
        self.reason = f"{message} ({hint})" if hint else message
        super().__init__(
            f"structure {structure_id}: {self.reason}" if structure_id else self.reason
        )
        self.code = code or type(self).__name__
        self.structure_id = structure_id
        self.field = field
        self.hint = hint


class ConfigError(CosetError, ValueError):
    """A setting is wrong or contradicts another one."""


class StructureError(CosetError, ValueError):
    """A structure cannot be used as it is."""


class CheckpointError(CosetError, ValueError):
    """A model file is damaged, foreign, unsafe or newer than this package."""


class NotConvergedError(CosetError, RuntimeError):
    """A calculation ran and did not come to its end."""


class MissingExtraError(CosetError, ImportError):
    """A feature needs an optional package that is not installed."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a ConfigError unless `value` is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} = {value!r} is outside [{low}, {high}]", field=name)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ConfigError unless `value` is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} = {value!r}, expected one of {', '.join(choices)}", field=name)
