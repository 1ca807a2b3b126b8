"""Say something while a machine is rented, to a terminal that may be closed by now or into a pipe that nobody reads any more.

From the first thing that is made to the last that is removed nothing may depend on being heard. So this never raises, and takes text as it
is: what ssh or AWS say may look like rich's markup, of which a wrong tag is an error.
"""

from __future__ import annotations

from suasion.progress import console


def say(text: str, style: str | None = None, end: str = "\n") -> None:
    """Print; where that cannot be done, go on in silence."""
    try:
        shown = text.encode(console.encoding, "replace").decode(console.encoding)  # a letter too many is no reason to fall silent
        console.print(shown, style=style, end=end, markup=False, soft_wrap=True)
    except (OSError, SystemExit, ValueError):  # of a closed terminal, a broken pipe (rich exits then), a closed file
        console.quiet = True
    except RuntimeError:  # a signal came in the middle of another print, and this is its handler ("reentrant call")
        return
