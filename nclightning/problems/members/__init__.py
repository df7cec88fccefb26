"""Problems of the field from plain arguments, each a function in a file of its own."""
