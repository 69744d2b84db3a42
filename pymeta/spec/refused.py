"""Why a model is not native."""


class Refused(Exception):
    """Raised while a model is examined; its message is the reason why it is not native."""
