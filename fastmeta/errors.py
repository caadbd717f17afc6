"""The exceptions of fastmeta's own."""


class BackendUnavailable(RuntimeError):
    """A backend named explicitly cannot run this call; the message says why."""


class CaptureError(RuntimeError):
    """The captured layer program does not compute what the module computes; the message says
    where."""
