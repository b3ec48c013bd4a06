"""The one exception type of the library; everything else is ``ValueError``, ``TypeError`` or ``OSError``."""


class FormatError(ValueError):
    """Stored data are not what the format specification promises: corrupt, truncated, or of another version.

    The message names the file and the tensor where they are known, what was expected and what was found.
    """
