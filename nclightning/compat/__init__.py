"""All uses of undocumented names of other libraries, one file per library.

Each function, class or constant says which names it uses, the version of the library with which it was tested, and what
breaks without them. ``tests/test_compat.py`` fails if a name is removed or changes its meaning. The rest of the package
uses no such name; ``tests/test_house.py`` checks this in the source, and defines what counts as undocumented.

Documented by Lightning are the names in its API reference, and the members without a leading underscore of the classes
there, which its versioning policy calls stable. Among them are ``trainer.strategy``,
``Strategy.batch_to_device``, ``Precision.forward_context`` and ``Precision.convert_input``. ``trainer.fit_loop`` is not
among them: the classes of the loops have underscores.

Only :mod:`nclightning.compat.lightning` loads Lightning.
"""

__all__: list[str] = []
