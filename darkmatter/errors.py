"""The one exception for a user's mistakes."""


class DarkmatterError(Exception):
    """A mistake the user can mend: its message is one clear sentence that says what to do."""
