"""URLs with a user, password or token in them: never shown. Nothing but `re`: every error is made with it."""

import re

# A pasted password may hold / and @ unescaped, so everything up to the last @ goes. Path() makes one slash of two.
_USER = re.compile(r"""(\b[a-zA-Z][a-zA-Z0-9+.-]*:/{1,2})[^\s'"<>]*@""")
_QUERY = re.compile(r"""(\b[a-zA-Z][a-zA-Z0-9+.-]*:/{1,2}[^\s'"<>?]*\?)[^\s'"<>]+""")


def without_credentials(text: str) -> str:
    """`text` with *** in place of the user and the query of every URL in it.

    >>> without_credentials("no https://me:secret@host/a.json?key=secret here")
    'no https://***@host/a.json?*** here'
    """
    if ":/" not in text:
        return text
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))
