"""All names of other libraries in use that their documentation does not promise, one file for each library.

Each function, class or constant says which names it stands on, the version of the library that it was seen to work
with, and what breaks without them. ``tests/test_compat.py`` fails if a name goes away or changes its meaning. The rest
of the package uses no such name, which ``tests/test_house.py`` checks in the source: look there for what counts as one.

What counts as documented by Lightning: what its API reference shows, and members without a leading underscore of
classes that it shows, which its versioning policy calls stable. Among them are ``trainer.strategy``,
``Strategy.batch_to_device``, ``Precision.forward_context`` and ``Precision.convert_input``. ``trainer.fit_loop`` is not
among them: the classes of the loops have underscores.

Only :mod:`nclightning.compat.lightning` loads Lightning.
"""

__all__: list[str] = []
