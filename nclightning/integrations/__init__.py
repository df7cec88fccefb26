"""Neural collapse in programs of other libraries, each in a module that needs that library."""

__all__: list[str] = []
